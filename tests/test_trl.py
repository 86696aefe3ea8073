"""EPO on TRL, on a CPU with a tiny random Qwen2: the added term, the history, the worlds, and by
name what the adapter relies on."""

import json
import os
import random
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install -r requirements-trl.txt")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from datasets import Dataset
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import parse_response, supports_tool_calling

from envs import ALFWorld, ScienceWorld
from epo import beta, mean_of_history, smoothing_loss, token_weights
from integrations.epo_trl import (
    Episode,
    EPOTrainer,
    episode_weights,
    main,
    plain_actions,
    rows,
)
from support.loading import ROOT
from support.run_folder import SetupError
from worlds.keyquest import KeyQuest

# Tokens written, read and written in each episode of a step. The first two and the last two have
# equally many written tokens: TRL's own bonus, a mean over the tokens of a rank, is then the same
# on one rank with four episodes as on two with two each.
LENGTHS = [(3, 5, 2), (4, 2, 4), (2, 4, 10), (1, 1, 0)]
LAMBDA = 0.5
SMOOTHING = {"kappa_l": 0.5, "kappa_r": 1.01, "alpha": 2.0}
# no template of tools
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def policy():
    """A random two-layer Qwen2, and the tokenizer of the tiny ScienceWorld policy."""
    tiny = os.path.join(ROOT, "models", "scienceworld")
    tokenizer = AutoTokenizer.from_pretrained(tiny, padding_side="left")
    tokenizer.chat_template = TEMPLATE
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config), tokenizer


def fixed(prompts, trainer):
    """A rollout without sampling: the same four episodes in a step on any number of ranks."""
    out = {"prompt_ids": [], "completion_ids": [], "env_mask": [], "number": []}
    for i in range(len(prompts)):
        number = trainer.accelerator.process_index * len(prompts) + i
        rng = random.Random(f"{trainer.state.global_step} {number}")
        a, b, c = LENGTHS[number]
        out["prompt_ids"].append(rng.choices(range(1, 800), k=3 + number))
        out["completion_ids"].append(rng.choices(range(1, 800), k=a + b + c))
        out["env_mask"].append([1] * a + [0] * b + [1] * c)
        out["number"].append(number)
    return {**out, "logprobs": None}


def rewards(number, **_):
    return [float(n in (0, 3)) for n in number]


class Record(NamedTuple):
    """A micro-batch. step: the optimizer's; term: what EPO adds to TRL's loss."""

    step: int
    term: float
    # (B, L)
    entropy: torch.Tensor
    written: torch.Tensor
    # k, K, W_k
    rl_step: tuple


class Recorded(EPOTrainer):
    def _compute_loss(self, model, inputs):
        plain = GRPOTrainer._compute_loss(self, model, inputs)
        entropy = self.entropies.detach()
        loss = super()._compute_loss(model, inputs)
        written = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        records = self.__dict__.setdefault("records", [])
        term = (loss - plain).item()
        records.append(Record(self.state.global_step, term, entropy, written, self.rl_step()))
        return loss


def settings(folder, **options):
    return GRPOConfig(
        **{
            "output_dir": str(folder),
            "entropy_coef": LAMBDA,
            "loss_type": "grpo",
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "bf16": False,
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        }
    )


def make(folder, kind=EPOTrainer, terms=SMOOTHING, per_device=4, accumulate=1, **options):
    model, tokenizer = policy()
    defaults = {
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulate,
        "num_generations": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
    }
    return kind(
        model,
        rewards,
        settings(folder, **{**defaults, **options}),
        train_dataset=Dataset.from_list([{"prompt": "x"}] * 4),
        processing_class=tokenizer,
        rollout_func=fixed,
        **(terms if issubclass(kind, EPOTrainer) else {}),
    )


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def weights_of(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- the loss
@pytest.mark.parametrize("accumulate", [1, 4])
def test_added_term_is_that_of_epo_py_however_the_batch_is_split(tmp_path, accumulate):
    trainer = make(tmp_path, Recorded, per_device=4 // accumulate, accumulate=accumulate)
    trainer.train()
    for step in range(3):
        records = [record for record in trainer.records if record.step == step]
        assert len(records) == accumulate
        k, total_steps, history = records[0].rl_step
        assert (k, total_steps) == (step, 3)
        assert history == logged(trainer, "entropy")[:step]
        written = torch.cat([record.written for record in records])
        # what the world wrote is left out
        assert sorted(written.sum(1).tolist()) == sorted(a + c for a, _, c in LENGTHS)
        entropy = torch.cat([record.entropy for record in records])[written]
        episode = written.nonzero()[:, 0]
        weights = token_weights(episode, episode)
        l_smooth = smoothing_loss(entropy, mean_of_history(history), weights, **SMOOTHING).item()
        expected = beta(step, 3, 3.0) * l_smooth
        assert abs(sum(record.term for record in records) - LAMBDA * expected) < 1e-6
        assert expected == 0 if step == 0 else expected > 0.01
        row = trainer.state.log_history[step]
        assert abs(row["smoothing_loss"] * row["beta_k"] - expected) < 1e-5


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_have_the_average_of_the_batch_also_if_an_episode_is_empty(size):
    written = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]]).bool()
    x = torch.rand(4, 4, dtype=torch.float64)
    means = [row[tokens].sum() / max(tokens.sum(), 1) for row, tokens in zip(x, written)]
    parts = zip(x.split(size), written.split(size))
    averages = [(part[tokens] * episode_weights(tokens)).sum() for part, tokens in parts]
    assert abs(sum(averages) / len(averages) - sum(means) / 4) < 1e-12


def test_hinge_changes_the_weights_and_the_indicator_only_the_loss(tmp_path):
    plain = make(tmp_path, GRPOTrainer)
    plain.train()
    runs = {}
    for form in ("off", "indicator", "hinge"):
        runs[form] = make(tmp_path, terms={**SMOOTHING, "smoothing": form})
        runs[form].train()
    assert torch.equal(weights_of(plain), weights_of(runs["off"]))
    assert logged(plain, "loss") == logged(runs["off"], "loss")
    assert torch.equal(weights_of(plain), weights_of(runs["indicator"]))
    assert logged(runs["indicator"], "loss")[1] > logged(plain, "loss")[1] + 0.1
    assert (weights_of(plain) - weights_of(runs["hinge"])).abs().max() > 1e-3


def test_an_rl_step_is_a_generation_with_all_its_updates(tmp_path):
    # 2 × 4 updates each
    more = {"generation_batch_size": 4, "num_iterations": 2, "max_steps": 20}
    trainer = make(tmp_path, Recorded, per_device=1, **more)
    trainer.train()
    entropy = logged(trainer, "entropy")
    # the first pass over the four episodes
    means = [sum(entropy[i : i + 4]) / 4 for i in (0, 8)]
    for record in trainer.records:
        k, total_steps, history = record.rl_step
        assert (k, total_steps) == (record.step // 8, 2)
        assert history == pytest.approx(means[:k])


RANK_NAMES = ("entropy", "loss", "smoothing_loss", "history_mean", "beta_k")


def test_two_processes_have_the_history_and_the_loss_of_one(tmp_path):
    trainer = make(tmp_path / "one")
    trainer.train()
    # as accelerate does on GPUs
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node", "2", os.path.abspath(__file__), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["ranks"] == 2
    for name in RANK_NAMES:
        assert two[name] == pytest.approx(logged(trainer, name), abs=2e-5), name
    _, _, history = trainer.rl_step()
    assert two["history"] == pytest.approx(history, abs=2e-5) and len(two["history"]) == 3


def one_rank(folder):
    """A rank of the test of two processes."""
    trainer = make(os.path.join(folder, "two"), per_device=2)
    trainer.train()
    if trainer.accelerator.is_main_process:
        result = {name: logged(trainer, name) for name in RANK_NAMES}
        result["ranks"] = trainer.accelerator.num_processes
        _, _, result["history"] = trainer.rl_step()
        with open(os.path.join(folder, "two.json"), "w") as file:
            json.dump(result, file)


def test_resume_has_the_history(tmp_path):
    whole = make(tmp_path / "whole", save_strategy="steps", save_steps=2, max_steps=4)
    whole.train()
    resumed = make(tmp_path / "resumed", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name in ("entropy", "history_mean"):
        assert logged(resumed, name) == logged(whole, name)
    assert resumed.rl_step() == whole.rl_step() == (4, 4, logged(whole, "entropy"))
    assert torch.equal(weights_of(resumed), weights_of(whole))
    # as if it had been begun with other logging_steps
    resumed.state.log_history = []
    with pytest.raises(SetupError, match="0 of 4 steps"):
        resumed.rl_step()


# ---- TRL
class Observed(GRPOTrainer):
    """It has what EPOTrainer reads of the last micro-batch."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        self.scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self.scored

    def _compute_loss(self, model, inputs):
        self.last_inputs, self.mode = inputs, self.model.training
        self.divisor = self.current_gradient_accumulation_steps
        self.last_loss = super()._compute_loss(model, inputs)
        return self.last_loss


def test_trl_still_has_what_the_adapter_relies_on(tmp_path):
    """By name, so that a change in TRL fails here and not in silence."""
    trainer = make(tmp_path, Observed, per_device=1, accumulate=4, max_steps=2)
    # no name of EPOTrainer is one of TRL's
    for name in ("smoothing", "beta_gamma", "rl_step", "entropies"):
        assert not hasattr(trainer, name)
    # which is the weight of its KL
    assert trainer.beta == 0.0
    trainer.train()
    inputs, (logp, entropy, *_) = trainer.last_inputs, trainer.scored
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    assert logp.shape == entropy.shape == mask.shape == inputs["tool_mask"].shape
    assert entropy.requires_grad and trainer.mode is True
    assert trainer.divisor == 4 and trainer.loss_is_scaled_for_ga is True
    # its bonus: the mean over the micro-batch's tokens, divided for the accumulation; on policy the
    # ratio is 1, so the policy loss is minus the advantage
    bonus = LAMBDA * (entropy * mask).sum() / mask.sum()
    expected = (-inputs["advantages"][0] - bonus).item() / 4
    assert trainer.last_loss.item() == pytest.approx(expected, abs=1e-6)
    assert trainer.entropy_coef == LAMBDA and trainer.num_iterations == 1
    assert trainer.args.steps_per_generation == 4 and trainer.state.max_steps == 2
    log = trainer.state.log_history
    assert [row["step"] for row in log if "entropy" in row] == [1, 2]
    assert isinstance(trainer._metrics["train"]["entropy"], list)


@pytest.mark.parametrize(
    "options, terms, words",
    [
        ({"entropy_coef": 0.0}, {}, "entropy_coef"),
        ({"logging_steps": 2}, {}, "logging_steps=1"),
        ({"use_liger_kernel": True}, {}, "use_liger_kernel"),
        ({"use_adaptive_entropy": True}, {}, "use_adaptive_entropy"),
        ({}, {"kappa_l": 3.0}, "kappa_l"),
        ({}, {"smoothing": "Hinge"}, "hinge"),
        ({}, {"gamma": -1.0}, "gamma"),
    ],
)
def test_what_can_not_work_is_refused_in_one_line(tmp_path, options, terms, words):
    with pytest.raises(ValueError, match=words) as error:
        make(tmp_path, terms=terms, **options)
    assert "\n" not in str(error.value)


# ---- the worlds
def test_episode_says_what_is_new_counts_turns_and_ends():
    world = KeyQuest()
    task = world.tasks("train")[0]
    first, second = Episode(world), Episode(world, turns=2)
    text = first.reset(**rows(world, [task])[0])
    assert text.startswith("\n\nTask: open the chest\n\nYou wake up.\nYou see")
    assert second.reset(*task) == text
    plan = world.gold(task)
    for action in plan[:-1]:
        assert "over" not in first.act(action.upper())
    assert first.get_reward() == 0
    assert "The episode is over" in first.act(plan[-1]) and first.get_reward() == 1
    assert "over" in first.act("west") and first.get_reward() == 1
    # its turn limit
    assert "can not" in second.act("fly") and "The episode is over" in second.act("dance")
    assert second.get_reward() == 0
    second.reset(*task)
    assert "You see" not in second.act("fly")


def test_episode_without_its_simulator_is_over_and_has_no_reward():
    class Broken(KeyQuest):
        def act(self, actions):
            return dict.fromkeys(actions)

    world = Broken()
    episode = Episode(world)
    episode.reset(*world.tasks("train")[0])
    assert "broke down" in episode.act("west") and "over" in episode.act("west")
    assert episode.get_reward() is None


WORLD_MAKERS = [
    lambda: ScienceWorld(("find-animal",), jvms=1),
    lambda: ALFWorld(("pick_and_place_simple",), "generated", workers=2),
]


@pytest.mark.parametrize("make_world", WORLD_MAKERS, ids=["scienceworld", "alfworld"])
def test_real_worlds_are_played_to_success_in_their_own_slots(make_world):
    with make_world() as world:
        tasks = world.tasks("train")[:2]
        episodes = [Episode(world) for _ in range(3)]
        for episode, task in zip(episodes, (tasks[0], tasks[1], tasks[0])):
            assert "Task: " in episode.reset(**rows(world, [task])[0])
        for action in world.gold(tasks[1]):
            text = episodes[1].act(action)
        assert "The episode is over" in text
        assert [e.get_reward() for e in episodes] == [0, 1, 0]
        # a new one in the same slot; the others are as they were
        episodes[1].reset(*tasks[0])
        for action in world.gold(tasks[0]):
            episodes[2].act(action)
        assert [e.get_reward() for e in episodes] == [0, 0, 1]


def test_a_line_of_text_is_an_action_where_the_template_has_no_tools():
    _, tokenizer = policy()
    assert not supports_tool_calling(tokenizer)
    plain_actions(tokenizer)
    assert supports_tool_calling(tokenizer)
    message = [{"role": "user", "content": "x"}]
    prompt = partial(tokenizer.apply_chat_template, message, add_generation_prompt=True)
    assert prompt(tokenize=False) == f"user x{tokenizer.eos_token}assistant Action:"
    text = tokenizer.encode(" go to door\nand then") + [tokenizer.eos_token_id]
    call = {"name": "act", "arguments": {"action": "go to door"}}
    answer = parse_response(tokenizer, text, prefix=prompt(return_dict=False))
    assert answer["tool_calls"] == [{"type": "function", "function": call}]


def test_trainer_plays_a_world_and_a_group_shares_its_task(tmp_path):
    model, tokenizer = policy()
    plain_actions(tokenizer)
    world, played = KeyQuest(("short",)), []

    class Watched(Episode):
        def reset(self, task, variation, **row):
            played.append((task, variation))
            return super().reset(task, variation, **row)

    tasks = world.tasks("train")[:4]
    args = settings(
        tmp_path,
        per_device_train_batch_size=4,
        num_generations=2,
        max_steps=2,
        max_tool_calling_iterations=2,
        max_completion_length=512,
        generation_kwargs={"max_new_tokens": 4},
        shuffle_dataset=False,
    )
    trainer = Recorded(
        model,
        args=args,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows(world, tasks)),
        environment_factory=partial(Watched, world, 2),
        **SMOOTHING,
    )
    trainer.train()
    assert played == [tuple(task) for task in tasks for _ in range(2)]
    # each message was an action
    assert logged(trainer, "tools/call_frequency")[:2] == [2, 2]
    assert all(reward <= 0 for reward in logged(trainer, "rewards/Watched/mean")[:2])
    # three messages of at most 4 tokens
    assert all(record.written.sum(1).max() <= 12 for record in trainer.records)


# ---- the command line
FLAGS = (
    "--env keyquest --turns 2 --turn-tokens 4 --steps 2 --tasks-per-step 2 --group-size 2 --beta 0 "
    "--updates 2 --save_steps 2 --max_completion_length 512 --use_cpu"
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs `python -m integrations.epo_trl` with more flags, of which the last one wins."""
    model, tokenizer = policy()
    folder = str(tmp_path / "model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    flags = [*FLAGS.split(), "--model", folder, "--output_dir", str(tmp_path / "out")]

    def run_main(*more):
        monkeypatch.setattr(sys, "argv", ["epo_trl.py", *flags, *more])
        main()

    return run_main


def test_main_trains_and_resumes(tmp_path, run):
    terms = ["--entropy_coef", "0.1", "--alpha", "2"]

    def log():
        state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
        return [row for row in state["log_history"] if "entropy" in row]

    run(*terms)
    first = log()
    # K = 2, two updates each
    assert [round(row["beta_k"], 3) for row in first] == [2, 2, 1.05, 1.05]
    assert first[2]["entropy_coef"] == 0.1
    mean = pytest.approx((first[0]["entropy"] + first[1]["entropy"]) / 2)
    assert first[2]["history_mean"] == first[3]["history_mean"] == mean
    os.rename(tmp_path / "out" / "checkpoint-4", tmp_path / "removed")
    run(*terms, "--resume")
    resumed = log()
    assert resumed[:2] == first[:2] and len(resumed) == 4
    assert resumed[2]["history_mean"] == first[2]["history_mean"]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--updates 3", "4 episodes a step can't be shared by 1 processes in 3 updates"),
        ("--updates 0", "--updates must be at least 1, not 0"),
        ("--group-size 1", "at least 2 generations"),
        ("--eval-every 5", "--eval-every"),
        ("--steps many", "invalid int value: 'many'"),
        ("--learning_rate fast", "invalid float value: 'fast'"),
        ("--kappa-l 3", "kappa_l"),
        ("--entropy_coef 0", "entropy_coef"),
        ("--per_device_train_batch_size 2", "--per_device_train_batch_size must stay 1"),
        ("--trust_remote_code", "trust_remote_code"),
        ("--model missing/path", "missing/path"),
        (f"--model {ROOT}/models/keyquest", "no chat template"),
        ("--tasks tiny", "unknown KeyQuest task 'tiny'"),
        ("--output_dir missing --resume", "no checkpoint in missing"),
        # a flag of TRL's that needs a package of its own
        *([] if find_spec("vllm") else [("--use_vllm", "vLLM")]),
    ],
)
def test_main_refuses_what_can_not_work_in_one_line(run, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        run(*flags.split())
    message = stop.value.code
    if message == 2:
        message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("epo_trl.py: ") and "\n" not in message
    assert words in message


if __name__ == "__main__":
    one_rank(sys.argv[1])
