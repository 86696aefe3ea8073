"""EPO on TRL, on a CPU with a tiny random Qwen2: its loss, the history, the worlds, the flags."""

import json
import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install -r requirements-trl.txt")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from datasets import Dataset
from test_faults import call
from test_models import save
from transformers import AutoTokenizer
from trl import GRPOTrainer
from trl.chat_template_utils import parse_response

from envs import world_class
from epo import adaptive_coef, beta, epo_loss, mean_of_history
from integrations import epo_trl
from integrations.epo_trl import FIXED, Episode, EPOConfig, EPOTrainer, load_tokenizer
from support.run_folder import ROOT, SetupError
from train import draw_tasks
from worlds.keyquest import KeyQuest

# the tokens of the episodes of a step: w is written by the policy, - by the world
UNEQUAL = "www-----ww", "wwww--wwww", "ww----wwwwwwwwww", "---"
# equally many written: the mean over the tokens of all ranks, TRL's `entropy`, is that of one rank
EQUAL = "www-----ww", "wwww--w", "ww----www", "wwwww-"
EPO = {"entropy_coef": 0.5, "kappa_l": 0.5, "kappa_r": 1.01, "alpha": 2.0}
ADAPTIVE = dict(use_adaptive_entropy=True, entropy_coef=0, entropy_target=4, entropy_coef_delta=0.1)
# no template of tools
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}"
TEMPLATE += "{{ 'assistant ' if add_generation_prompt }}"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save(tmp_path_factory.mktemp("policy"), template=TEMPLATE, initializer_range=0.3)


def fixed_rollout(prompts, trainer, episodes):
    """A rollout without sampling: the same four episodes in a step on any number of ranks."""
    first = trainer.accelerator.process_index * len(prompts)
    numbers = list(range(first, first + len(prompts)))
    out = {"prompt_ids": [], "completion_ids": [], "env_mask": [], "logprobs": None}
    for number in numbers:
        mask = [int(letter == "w") for letter in episodes[number]]
        seed = 31 * number + trainer.state.global_step
        tokens = [1 + (97 * i + seed) % 799 for i in range(len(mask) + 3 + number)]
        out["prompt_ids"].append(tokens[len(mask) :])
        out["completion_ids"].append(tokens[: len(mask)])
        out["env_mask"].append(mask)
    return out | {"number": numbers}


# the first and the last episode of a step succeed
rewards = lambda number, **_: [float(n in (0, 3)) for n in number]
logged = lambda trainer, name: [row[name] for row in trainer.state.log_history if name in row]
weights_of = lambda trainer: torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def trained(policy, folder, kind=EPOTrainer, episodes=UNEQUAL, resume=None, **options):
    """A trainer after three RL steps of four episodes."""
    settings = FIXED | EPO | dict(output_dir=str(folder), save_strategy="no", max_steps=3)
    settings |= dict(generation_batch_size=4, num_generations=4, gradient_accumulation_steps=4)
    settings |= dict(learning_rate=1e-2, lr_scheduler_type="constant", use_bias_correction_kl=False)
    settings |= dict(beta=0.05, gradient_checkpointing=False, bf16=False, use_cpu=True)
    more = dict(processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"))
    more |= dict(train_dataset=Dataset.from_list([{"prompt": "x"}] * 4))
    more |= dict(rollout_func=partial(fixed_rollout, episodes=episodes))
    trainer = kind(policy, rewards, EPOConfig(**settings | options), **more)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Checked(EPOTrainer):
    """It compares each micro-batch, which is an episode, with `epo_loss` on its tokens."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        self.scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self.scored

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        logp, entropy, *_ = self.scored
        written = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        n, share = written.sum().item(), self.args.gradient_accumulation_steps
        updates = 4 // share
        k = self.state.global_step // updates
        known, coef = logged(self, "entropy"), EPO["entropy_coef"]
        entropies = torch.tensor(known[: k * updates], dtype=torch.double)
        history_mean = mean_of_history(entropies.view(k, updates).mean(1).tolist())
        if self.use_adaptive_entropy:
            # TRL's own: not before an update with an entropy of at most the target
            applies = known and known[-1] <= 4.0
            coef = adaptive_coef(known, target=4.0, step=0.1) if applies else 0.0
        expected, terms = epo_loss(
            logp=logp[written],
            old_logp=inputs.get("old_per_token_logps", logp.detach())[written],
            reference_logp=inputs["ref_per_token_logps"][written],
            entropy=entropy[written],
            advantages=inputs["advantages"].expand(n),
            # Eq. 2, for an episode of n tokens beside share - 1 others
            weights=torch.ones(n) / (share * max(n, 1)),
            history_mean=history_mean,
            beta_k=beta(k, 3, 3.0),
            kl_coef=0.05,
            **EPO | {"entropy_coef": coef},
        )
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        # also that padding and what the world wrote have no gradient
        for x in (logp, entropy):
            gradients = [torch.autograd.grad(y, x, retain_graph=True)[0] for y in (loss, expected)]
            assert torch.allclose(*gradients, atol=1e-6)
        wanted = {"smoothing_loss": share * terms["smoothing_loss"], "applied_coef": coef}
        wanted |= {"history_mean": history_mean or 0, "beta_k": beta(k, 3, 3.0)}
        got = {name: self._metrics["train"][name][-1] for name in wanted}
        assert got == pytest.approx(wanted, abs=1e-5)
        return loss


@pytest.mark.parametrize("share, more", [(4, {}), (2, {}), (1, {}), (1, ADAPTIVE)])
def test_loss_and_gradient_are_those_of_epo_loss(policy, tmp_path, share, more):
    # an RL step has 4 / share updates, each on a share of its episodes
    sizes = dict(gradient_accumulation_steps=share, max_steps=12 // share)
    trainer = trained(policy, tmp_path, Checked, **sizes | more)
    # no penalty without a history
    penalties = logged(trainer, "smoothing_loss")
    assert not any(penalties[: 4 // share]) and any(penalties[4 // share :])
    assert len(set(logged(trainer, "applied_coef"))) == (3 if more else 1)


def test_each_form_changes_what_it_should_and_no_name_is_trls(policy, tmp_path):
    plain = trained(policy, tmp_path, GRPOTrainer)
    forms = ("off", "indicator", "hinge")
    off, indicator, hinge = (trained(policy, tmp_path, smoothing=form) for form in forms)
    weights = weights_of(plain)
    assert torch.equal(weights, weights_of(off))
    assert torch.equal(weights, weights_of(indicator))
    assert not torch.allclose(weights, weights_of(hinge), atol=1e-3)
    assert logged(off, "loss") == logged(plain, "loss")
    assert logged(indicator, "loss")[1] > logged(plain, "loss")[1] + 0.1
    assert not any(hasattr(plain, name) for name in ("rl_step", "entropies"))


def test_two_processes_have_the_history_and_the_loss_of_one(policy, tmp_path):
    one = trained(policy, tmp_path, episodes=EQUAL)
    # as accelerate does on GPUs
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, __file__, policy, str(tmp_path / "two")]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True)
    assert result.returncode == 0, result.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "trainer_state.json").read_text())["log_history"]
    for name in ("entropy", "loss", "smoothing_loss", "history_mean", "beta_k"):
        values = [row[name] for row in two if name in row]
        assert values == pytest.approx(logged(one, name), abs=1e-3), name


def test_a_resumed_run_has_the_history(policy, tmp_path):
    whole = trained(policy, tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed = trained(policy, tmp_path / "resumed", max_steps=4, resume=checkpoint)
    assert logged(resumed, "entropy") == logged(whole, "entropy")
    assert resumed.rl_step() == whole.rl_step()
    assert torch.equal(weights_of(resumed), weights_of(whole))
    # as if it had been begun with another logging_strategy
    resumed.state.log_history = []
    with pytest.raises(SetupError, match="the log has 0 of 4 entropies"):
        resumed.rl_step()


def test_an_episode_says_what_is_new_and_ends_at_its_limit_or_with_its_simulator():
    world = KeyQuest()
    episode = Episode(world, 2)
    text = episode.reset(prompt="x", name="short", variation=0)
    assert text.startswith("\n\nTask: open the chest\n\nYou wake up.\nYou see")
    # what was seen already is not said again
    assert episode.act("fly") == "You can not."
    assert "The episode is over" in episode.act("dance")
    assert episode.get_reward() == 0
    assert episode.act("west") == "Nothing happens: the episode is over."
    assert episode.reset("short", 0) == text
    # None is what a world says of an episode that it lost
    world.act, world.start = dict.fromkeys, lambda slot, task: None
    assert "broke down" in episode.act("west")
    assert "broke down" in episode.reset("short", 1)
    assert episode.get_reward() is None


WORLDS = {"scienceworld": {"names": ["find-animal"], "jvms": 1}}
WORLDS |= {"alfworld": {"names": ["pick_and_place_simple"], "games": "generated", "workers": 1}}


@pytest.mark.parametrize("env", WORLDS)
def test_worlds_are_played_to_success_in_their_own_slots(env):
    if env == "alfworld":
        pytest.importorskip("alfworld", reason="ALFWorld needs Python 3.11 or 3.12")
    with world_class(env)(**WORLDS[env]) as world:
        task, other_task = world.tasks("train")[:2]
        episode, other = Episode(world, 50), Episode(world, 50)
        assert "Task: " in other.reset(*other_task)
        episode.reset(*task)
        texts = [other.act(action.upper()) for action in world.gold(other_task)]
        assert "The episode is over" in texts[-1]
        assert (episode.get_reward(), other.get_reward()) == (0, 1)
        # a new one in the same slot; the first is as it was
        other.reset(*task)
        for action in world.gold(task):
            episode.act(action)
        assert (episode.get_reward(), other.get_reward()) == (1, 0)


def test_a_line_of_text_is_an_action_where_the_template_has_no_tools(policy):
    tokenizer = load_tokenizer(policy)
    user = [{"role": "user", "content": "x"}]
    prompt = partial(tokenizer.apply_chat_template, user, add_generation_prompt=True)
    assert prompt(tokenize=False) == f"user x{tokenizer.eos_token}assistant Action:"
    text = tokenizer.encode(f" go to door\nand then{tokenizer.eos_token}")
    (call,) = parse_response(tokenizer, text, prefix=prompt(return_dict=False))["tool_calls"]
    assert call["function"] == {"name": "act", "arguments": {"action": "go to door"}}


FLAGS = "--env keyquest --tasks short --turns 2 --turn-tokens 4 --max_steps 4 --save_steps 2"
FLAGS += " --generation_batch_size 4 --num_generations 2 --gradient_accumulation_steps 2 --use_cpu"
FLAGS += " --max_completion_length 512 --beta 0 --entropy_coef 0.1 --alpha 2"
# what TRL would do in silence
NOT_EPO = "per_device_train_batch_size 2, loss_type dapo, num_iterations 2, logging_steps 2"
NOT_EPO += ", top_entropy_quantile 0.2, use_liger_kernel True, top_k 5, top_p 0.9"
NOT_EPO += ", min_p 0.1, repetition_penalty 2, trust_remote_code 1, eval_strategy steps"
NOT_EPO += ", shuffle_dataset True, max_tool_calling_iterations 1, generation_kwargs {}"


def given(policy, folder, flags=""):
    """The arguments of a command with more flags, of which the last one wins."""
    more = [flag.replace("ROOT", ROOT) for flag in flags.split()]
    return [*FLAGS.split(), "--model", policy, "--output_dir", folder, *more]


def test_main_plays_and_trains(policy, tmp_path, monkeypatch):
    played, start = [], KeyQuest.start
    watched = lambda world, slot, task: played.append(task) or start(world, slot, task)
    monkeypatch.setattr(KeyQuest, "start", watched)
    assert call(epo_trl, *given(policy, tmp_path))[0] == 0
    # the tasks of train.py, each played by a group of two
    tasks = KeyQuest(("short",)).tasks("train")
    drawn = [*draw_tasks(tasks, 2, "42 0"), *draw_tasks(tasks, 2, "42 1")]
    assert played == [task for task in drawn for _ in range(2)]
    *log, _ = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    # K = 2, two updates each
    assert [round(row["beta_k"], 3) for row in log] == [2, 2, 1.05, 1.05]
    for row in (log[0], log[2]):
        # each message was an action; three messages of at most 4 tokens
        assert row["tools/call_frequency"] == 2
        assert row["completions/max_length"] <= 12
        assert "rewards/Episode/mean" in row


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--gradient_accumulation_steps 3", "whole updates: see --gradient_accumulation_steps"),
        ("--num_generations 1", "at least 2 generations"),
        ("--turns -1", "--turns, --turn_tokens and --max_steps must be at least 1"),
        ("--kappa-l 3", "kappa_l <= kappa_r"),
        ("--gamma -1", "gamma"),
        *[(f"--{flag}", f"--{flag.split()[0]} must stay") for flag in NOT_EPO.split(", ")],
        ("--model missing/path", "--model missing/path cannot be loaded"),
        ("--model ROOT/models/keyquest", "no chat template"),
        ("--tasks tiny", "unknown KeyQuest task 'tiny'"),
        ("--resume_from_checkpoint missing", "missing"),
        # a flag of TRL's that needs a package of its own
        *([] if find_spec("vllm") else [("--use_vllm", "vLLM")]),
    ],
)
def test_main_refuses_what_can_not_work_in_one_line(policy, tmp_path, flags, words):
    status, _, error = call(epo_trl, *given(policy, tmp_path, flags))
    # a progress bar may stand before it
    line = error.splitlines()[-1]
    assert status and line.startswith("epo_trl.py: ") and words in line


if __name__ == "__main__":
    # a rank of the test of two processes
    trained(*sys.argv[1:], episodes=EQUAL, gradient_accumulation_steps=2).save_state()
