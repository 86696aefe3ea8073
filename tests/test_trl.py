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
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOTrainer
from trl.chat_template_utils import parse_response

from envs import world_class
from epo import beta, epo_loss, mean_of_history
from integrations import epo_trl
from integrations.epo_trl import FIXED, Episode, EPOConfig, EPOTrainer, load_tokenizer
from support.run_folder import ROOT, SetupError
from train import draw_tasks
from worlds.keyquest import KeyQuest

# tokens written, read and written in each episode of a step
LENGTHS = ((3, 5, 2), (4, 2, 4), (2, 4, 10), (0, 3, 0))
# equally many written: the mean over the tokens of all ranks, TRL's `entropy`, is that of one rank
EQUAL = ((3, 5, 2), (4, 2, 1), (2, 4, 3), (5, 1, 0))
EPO = {"entropy_coef": 0.5, "kappa_l": 0.5, "kappa_r": 1.01, "alpha": 2.0}
# no template of tools
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}"
TEMPLATE += "{{ 'assistant ' if add_generation_prompt }}"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A folder with a random two-layer Qwen2, and the tokenizer of the tiny ScienceWorld policy."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(ROOT, "models", "scienceworld"))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, initializer_range=0.3)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)
    sizes |= dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**sizes)).save_pretrained(folder)
    return str(folder)


def fixed_rollout(prompts, trainer, lengths):
    """A rollout without sampling: the same four episodes in a step on any number of ranks."""
    first, step = trainer.accelerator.process_index * len(prompts), trainer.state.global_step
    out = {"prompt_ids": [], "completion_ids": [], "env_mask": [], "logprobs": None}
    out["number"] = list(range(first, first + len(prompts)))
    for number in out["number"]:
        mask = [int(i != 1) for i in range(3) for _ in range(lengths[number][i])]
        tokens = [1 + (97 * i + 31 * number + step) % 799 for i in range(len(mask) + 3 + number)]
        out["prompt_ids"].append(tokens[len(mask) :])
        out["completion_ids"].append(tokens[: len(mask)])
        out["env_mask"].append(mask)
    return out


# the first and the last episode of a step succeed
rewards = lambda number, **_: [float(n in (0, 3)) for n in number]
logged = lambda trainer, name: [row[name] for row in trainer.state.log_history if name in row]
weights_of = lambda trainer: torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def trained(policy, folder, kind=EPOTrainer, lengths=LENGTHS, resume=None, **options):
    """A trainer after three RL steps of four episodes."""
    settings = FIXED | EPO | dict(output_dir=str(folder), save_strategy="no", max_steps=3)
    settings |= dict(generation_batch_size=4, num_generations=4, gradient_accumulation_steps=4)
    settings |= dict(learning_rate=1e-2, lr_scheduler_type="constant", use_bias_correction_kl=False)
    settings |= dict(beta=0.05, gradient_checkpointing=False, bf16=False, use_cpu=True)
    more = dict(processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"))
    more |= dict(train_dataset=Dataset.from_list([{"prompt": "x"}] * 4))
    more |= dict(rollout_func=partial(fixed_rollout, lengths=lengths))
    trainer = kind(policy, rewards, EPOConfig(**settings | options), **more)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# ---- the loss
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
        k, entropies = self.state.global_step // updates, logged(self, "entropy")
        history = [sum(entropies[m * updates :][:updates]) / updates for m in range(k)]
        step = dict(history_mean=mean_of_history(history), beta_k=beta(k, 3, 3.0))
        # Eq. 2, for an episode of n tokens beside share - 1 others
        tokens = dict(weights=torch.ones(n) / (share * max(n, 1)), entropy=entropy[written])
        tokens |= dict(logp=logp[written], advantages=inputs["advantages"].expand(n))
        tokens |= dict(old_logp=inputs.get("old_per_token_logps", logp.detach())[written])
        tokens |= dict(reference_logp=inputs["ref_per_token_logps"][written], kl_coef=0.05)
        expected, terms = epo_loss(**tokens, **step, **EPO)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        # also that padding and what the world wrote have no gradient
        for x in (logp, entropy):
            gradients = [torch.autograd.grad(y, x, retain_graph=True)[0] for y in (loss, expected)]
            assert torch.allclose(*gradients, atol=1e-6)
        of_log = {name: values[-1] for name, values in self._metrics["train"].items()}
        assert of_log["smoothing_loss"] == pytest.approx(share * terms["smoothing_loss"], abs=1e-5)
        assert of_log["history_mean"] == pytest.approx(step["history_mean"] or 0)
        assert of_log["beta_k"] == step["beta_k"]
        return loss


@pytest.mark.parametrize("share", [4, 2, 1])
def test_loss_and_gradient_are_those_of_epo_loss(policy, tmp_path, share):
    # an RL step has 4 / share updates, each on a share of its episodes
    sizes = dict(gradient_accumulation_steps=share, max_steps=12 // share)
    trainer = trained(policy, tmp_path, Checked, **sizes)
    # no penalty without a history
    penalties = logged(trainer, "smoothing_loss")
    assert not any(penalties[: 4 // share]) and any(penalties[4 // share :])


def test_each_form_changes_what_it_should_and_no_name_is_trls(policy, tmp_path):
    plain = trained(policy, tmp_path, GRPOTrainer)
    forms = ("off", "indicator", "hinge")
    off, indicator, hinge = (trained(policy, tmp_path, smoothing=form) for form in forms)
    assert torch.equal(weights_of(plain), weights_of(off))
    assert logged(plain, "loss") == logged(off, "loss")
    assert torch.equal(weights_of(plain), weights_of(indicator))
    assert logged(indicator, "loss")[1] > logged(plain, "loss")[1] + 0.1
    assert (weights_of(plain) - weights_of(hinge)).abs().max() > 1e-3
    assert not any(hasattr(plain, name) for name in ("rl_step", "entropies"))


def test_two_processes_have_the_history_and_the_loss_of_one(policy, tmp_path):
    one = trained(policy, tmp_path, lengths=EQUAL)
    # as accelerate does on GPUs
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, os.path.abspath(__file__), policy, str(tmp_path / "two")]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True)
    assert result.returncode == 0, result.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "trainer_state.json").read_text())["log_history"]
    for name in ("entropy", "loss", "smoothing_loss", "history_mean", "beta_k"):
        values = [row[name] for row in two if name in row]
        assert values == pytest.approx(logged(one, name), abs=2e-5), name


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


# ---- the worlds
def test_an_episode_says_what_is_new_and_ends_at_its_limit_or_with_its_simulator():
    world = KeyQuest()
    episode = Episode(world, 2)
    text = episode.reset(prompt="x", name="short", variation=0)
    assert text.startswith("\n\nTask: open the chest\n\nYou wake up.\nYou see")
    # what was seen already is not said again
    assert episode.act("fly") == "You can not."
    assert "The episode is over" in episode.act("dance") and episode.get_reward() == 0
    assert episode.act("west") == "Nothing happens: the episode is over."
    assert episode.reset("short", 0) == text
    # None is what a world says of an episode that it lost
    world.act, world.start = dict.fromkeys, lambda slot, task: None
    assert "broke down" in episode.act("west") and "over" in episode.act("west")
    assert "broke down" in episode.reset("short", 1) and episode.get_reward() is None


@pytest.mark.parametrize(
    "env, names, more",
    [
        ("keyquest", ("short",), {}),
        ("scienceworld", ("find-animal",), {"jvms": 1}),
        ("alfworld", ("pick_and_place_simple",), {"games": "generated", "workers": 1}),
    ],
)
def test_worlds_are_played_to_success_in_their_own_slots(env, names, more):
    if env == "alfworld":
        pytest.importorskip("alfworld", reason="ALFWorld needs Python 3.11 or 3.12")
    with world_class(env)(names, **more) as world:
        tasks = world.tasks("train")[:2]
        episodes = [Episode(world, 50) for _ in range(3)]
        for episode, task in zip(episodes, (tasks[0], tasks[1], tasks[0])):
            assert "Task: " in episode.reset(*task)
        texts = [episodes[1].act(action.upper()) for action in world.gold(tasks[1])]
        assert ["The episode is over" in text for text in texts].index(True) == len(texts) - 1
        assert [e.get_reward() for e in episodes] == [0, 1, 0]
        # a new one in the same slot; the others are as they were
        episodes[1].reset(*tasks[0])
        for action in world.gold(tasks[0]):
            episodes[2].act(action)
        assert [e.get_reward() for e in episodes] == [0, 0, 1]


def test_a_line_of_text_is_an_action_where_the_template_has_no_tools(policy):
    tokenizer = load_tokenizer(policy)
    user = [{"role": "user", "content": "x"}]
    prompt = partial(tokenizer.apply_chat_template, user, add_generation_prompt=True)
    assert prompt(tokenize=False) == f"user x{tokenizer.eos_token}assistant Action:"
    text = tokenizer.encode(" go to door\nand then") + [tokenizer.eos_token_id]
    (call,) = parse_response(tokenizer, text, prefix=prompt(return_dict=False))["tool_calls"]
    assert call["function"] == {"name": "act", "arguments": {"action": "go to door"}}


# ---- the command line
FLAGS = "--env keyquest --tasks short --turns 2 --turn-tokens 4 --max_steps 4 --save_steps 2"
FLAGS += " --generation_batch_size 4 --num_generations 2 --gradient_accumulation_steps 2 --use_cpu"
FLAGS += " --max_completion_length 512 --beta 0 --entropy_coef 0.1 --alpha 2"
# what TRL would do in silence
NOT_EPO = "per_device_train_batch_size 2, loss_type dapo, num_iterations 2, logging_steps 2"
NOT_EPO += ", use_adaptive_entropy True, top_entropy_quantile 0.2, use_liger_kernel True, top_k 5"
NOT_EPO += ", top_p 0.9, min_p 0.1, repetition_penalty 2, trust_remote_code 1, eval_strategy steps"
NOT_EPO += ", shuffle_dataset True, max_tool_calling_iterations 1, generation_kwargs {}"


def run(monkeypatch, policy, folder, flags=""):
    """Runs `python -m integrations.epo_trl` with more flags, of which the last one wins."""
    more = [flag.replace("ROOT", ROOT) for flag in flags.split()]
    places = ["--model", policy, "--output_dir", str(folder)]
    monkeypatch.setattr(sys, "argv", ["epo_trl.py", *FLAGS.split(), *places, *more])
    epo_trl.main()


def test_main_plays_and_trains(policy, tmp_path, monkeypatch):
    played, restart = [], KeyQuest.restart
    watched = lambda world, slot, task: played.append(task) or restart(world, slot, task)
    monkeypatch.setattr(KeyQuest, "restart", watched)
    run(monkeypatch, policy, tmp_path)
    # the tasks of train.py, each played by a group of two
    tasks = KeyQuest(("short",)).tasks("train")
    drawn = [task for k in range(2) for task in draw_tasks(tasks, 2, f"42 {k}")]
    assert played == [task for task in drawn for _ in range(2)]
    *log, _ = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    # K = 2, two updates each
    assert [round(row["beta_k"], 3) for row in log] == [2, 2, 1.05, 1.05]
    for row in (log[0], log[2]):
        # each message was an action; three messages of at most 4 tokens
        assert row["tools/call_frequency"] == 2 and row["completions/max_length"] <= 12
        assert row["rewards/Episode/mean"] in (0, 0.25, 0.5, 0.75, 1)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--gradient_accumulation_steps 3", "whole updates: see --gradient_accumulation_steps"),
        ("--num_generations 1", "at least 2 generations"),
        ("--turns -1", "--turns, --turn_tokens and --max_steps must be at least 1"),
        ("--eval-every 5", "unrecognized arguments: --eval-every 5"),
        ("--max_steps many", "invalid int value: 'many'"),
        ("--kappa-l 3", "kappa_l <= kappa_r"),
        ("--smoothing Hinge", "not 'Hinge'"),
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
def test_main_refuses_what_can_not_work_in_one_line(policy, tmp_path, monkeypatch, flags, words):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, policy, tmp_path, flags)
    message = stop.value.code
    assert message.startswith("epo_trl.py: ") and "\n" not in message and words in message


if __name__ == "__main__":
    # a rank of the test of two processes
    trained(*sys.argv[1:], lengths=EQUAL, gradient_accumulation_steps=2).save_state()
