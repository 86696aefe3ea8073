"""EPO on TRL (epo_trl.py), on a tiny random Qwen2 and a CPU: the added term, the history, the environments, and by name what it relies on."""
import functools
import json
import os
import random
import subprocess
import sys

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install -r requirements-trl.txt")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from datasets import Dataset
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import parse_response, supports_tool_calling

import epo
from envs import ALFWorld, ScienceWorld, SetupError
from epo_trl import EPOTrainer, Episode, main, plain_actions, rows
from keyquest import KeyQuest
from rollout import HERE

# Tokens written, read and written in each episode of a step. The first two and the last two hold equally many written tokens:
# TRL's own bonus, a mean over the tokens of a rank, is then the same on one rank with four episodes as on two with two each.
LENGTHS = [(3, 5, 2), (4, 2, 4), (2, 4, 10), (1, 1, 0)]
LAMBDA, CORRIDOR = 0.5, {"kappa_l": 0.5, "kappa_r": 1.01, "alpha": 2.0}


def policy():
    """A random two-layer Qwen2, and the ScienceWorld policy's tokenizer with a chat template without tools."""
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(HERE, "models", "scienceworld"), padding_side="left")
    tokenizer.chat_template = ("{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}"
                               "{% if add_generation_prompt %}assistant {% endif %}")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.3, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, pad_token_id=tokenizer.eos_token_id))
    return model, tokenizer


def fixed(prompts, trainer):
    """A rollout without sampling: the same four episodes in a step, however many ranks they are spread over."""
    out = {"prompt_ids": [], "completion_ids": [], "env_mask": [], "number": [], "logprobs": None}
    for i in range(len(prompts)):
        number = trainer.accelerator.process_index * len(prompts) + i
        rng, (a, b, c) = random.Random(f"{trainer.state.global_step} {number}"), LENGTHS[number]
        out["prompt_ids"].append(rng.choices(range(1, 800), k=3 + number))
        out["completion_ids"].append(rng.choices(range(1, 800), k=a + b + c))
        out["env_mask"].append([1] * a + [0] * b + [1] * c)
        out["number"].append(number)
    return out


class Recorded(EPOTrainer):
    """Keeps for each micro-batch: the optimizer step, what EPO adds to TRL's loss, entropies, mask, and β_k's k, K and W_k."""
    def _compute_loss(self, model, inputs):
        plain = GRPOTrainer._compute_loss(self, model, inputs)
        entropy, loss = self.entropies.detach(), super()._compute_loss(model, inputs)
        self.__dict__.setdefault("records", []).append(
            (self.state.global_step, (loss - plain).item(), entropy, inputs["completion_mask"] * inputs["tool_mask"], self.rl_step()))
        return loss


def make(folder, kind=EPOTrainer, epo_options=CORRIDOR, per_device=4, accumulate=1, **options):
    model, tokenizer = policy()
    args = GRPOConfig(**{
        "output_dir": str(folder), "per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulate, "num_generations": 4,
        "max_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "entropy_coef": LAMBDA, "loss_type": "grpo", "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "bf16": False, "use_cpu": True, "disable_tqdm": True, "gradient_checkpointing": False, **options})
    return kind(model, lambda number, **_: [float(n in (0, 3)) for n in number], args, train_dataset=Dataset.from_list([{"prompt": "x"}] * 4),
                processing_class=tokenizer, rollout_func=fixed, **(epo_options if kind is not GRPOTrainer else {}))


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()])


@pytest.mark.parametrize("accumulate", [1, 4])
def test_added_term_is_that_of_epo_py_however_the_batch_is_split(tmp_path, accumulate):
    trainer = make(tmp_path, Recorded, per_device=4 // accumulate, accumulate=accumulate)
    trainer.train()
    for step in range(3):
        records = [r for r in trainer.records if r[0] == step]
        assert len(records) == accumulate
        k, total, history = records[0][4]
        assert (k, total) == (step, 3) and history.values == logged(trainer, "entropy")[:step]
        entropy, mask = torch.cat([r[2] for r in records]), torch.cat([r[3] for r in records])
        assert sorted(mask.sum(1).tolist()) == sorted(a + c for a, _, c in LENGTHS)              # what the world wrote is left out
        expected = epo.beta(step, 3, 3.0) * epo.smoothing_loss(entropy, history.mean, epo.token_weights(mask, torch.arange(4)), **CORRIDOR).item()
        assert abs(sum(r[1] for r in records) - LAMBDA * expected) < 1e-6
        assert (expected == 0) == (step == 0) and (step == 0 or expected > 0.01)
        log = trainer.state.log_history[step]
        assert abs(log["smoothing_loss"] * log["beta_k"] - expected) < 1e-5


def test_hinge_changes_the_weights_and_the_indicator_only_the_loss(tmp_path):
    runs = {}
    for name, kind, smoothing in (("plain", GRPOTrainer, ""), ("indicator", EPOTrainer, "indicator"), ("hinge", EPOTrainer, "hinge")):
        runs[name] = make(tmp_path, kind, {**CORRIDOR, "smoothing": smoothing})
        runs[name].train()
    assert torch.equal(weights_of(runs["plain"]), weights_of(runs["indicator"]))
    assert logged(runs["indicator"], "loss")[1] > logged(runs["plain"], "loss")[1] + 0.1
    assert (weights_of(runs["plain"]) - weights_of(runs["hinge"])).abs().max() > 1e-3


def test_an_rl_step_is_a_generation_with_all_its_updates(tmp_path):
    trainer = make(tmp_path, Recorded, per_device=1, generation_batch_size=4, num_iterations=2, max_steps=20)       # 2 × 4 updates each
    trainer.train()
    entropy = logged(trainer, "entropy")
    firsts = [sum(entropy[i:i + 4]) / 4 for i in (0, 8)]                                          # the first pass over the four episodes
    for step, _, _, _, (k, total, history) in trainer.records:
        assert (k, total) == (step // 8, 2) and history.values == pytest.approx(firsts[:k])


def test_two_processes_have_the_history_and_the_loss_of_one(tmp_path):
    trainer = make(tmp_path / "one")
    trainer.train()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", os.path.abspath(__file__), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": HERE})      # as accelerate does on GPUs
    assert result.returncode == 0, result.stderr[-3000:]
    two = json.load(open(tmp_path / "two.json"))
    assert two["ranks"] == 2
    for name in ("entropy", "loss", "smoothing_loss", "reference", "beta_k"):
        assert two[name] == pytest.approx(logged(trainer, name), abs=2e-5), name
    assert two["history"] == pytest.approx(trainer.rl_step()[2].values, abs=2e-5) and len(two["history"]) == 3


def test_resume_keeps_the_history(tmp_path):
    whole = make(tmp_path / "whole", save_strategy="steps", save_steps=2, max_steps=4)
    whole.train()
    resumed = make(tmp_path / "resumed", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(resumed, "entropy") == logged(whole, "entropy") and logged(resumed, "reference") == logged(whole, "reference")
    assert resumed.rl_step()[2].values == whole.rl_step()[2].values == logged(whole, "entropy")
    assert torch.equal(weights_of(resumed), weights_of(whole))
    resumed.state.log_history = []                                         # as if it had been begun with other logging_steps
    with pytest.raises(RuntimeError, match="0 of 4 steps"):
        resumed.rl_step()


def test_trl_still_has_what_the_adapter_relies_on(tmp_path):
    """By name, so that a change in TRL fails here and not in silence."""
    seen = {}

    class Look(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            seen["result"] = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            return seen["result"]

        def _compute_loss(self, model, inputs):
            seen["inputs"], seen["divisor"], seen["mode"] = inputs, self.current_gradient_accumulation_steps, self.model.training
            seen["loss"] = super()._compute_loss(model, inputs)
            return seen["loss"]
    trainer = make(tmp_path, Look, epo_options={}, per_device=1, accumulate=4, max_steps=2)
    for mine in ("smoothing", "beta_gamma", "rl_step", "entropies"):
        assert not hasattr(trainer, mine)                                  # no name of ours is one of TRL's
    assert trainer.beta == 0.0                                             # which is the weight of its KL
    trainer.train()
    logp, entropy = seen["result"][:2]
    assert logp.shape == entropy.shape == seen["inputs"]["completion_mask"].shape == seen["inputs"]["tool_mask"].shape
    assert entropy.requires_grad and seen["mode"] is True and seen["divisor"] == 4 and trainer.loss_is_scaled_for_ga is True
    # its bonus: the mean over the micro-batch's tokens, divided for the accumulation
    mask = seen["inputs"]["completion_mask"] * seen["inputs"]["tool_mask"]
    advantage = seen["inputs"]["advantages"][0]                            # on policy the ratio is 1: the policy loss is minus this
    assert seen["loss"].item() == pytest.approx((-advantage - LAMBDA * (entropy * mask).sum() / mask.sum()).item() / 4, abs=1e-6)
    assert trainer.entropy_coef == LAMBDA and trainer.num_iterations == 1 and trainer.args.steps_per_generation == 4
    assert [row["step"] for row in trainer.state.log_history if "entropy" in row] == [1, 2] and trainer.state.max_steps == 2
    assert isinstance(trainer._metrics["train"]["entropy"], list)


@pytest.mark.parametrize("options, epo_options, words", [
    ({"entropy_coef": 0.0}, {}, "entropy_coef"), ({"logging_steps": 2}, {}, "logging_steps=1"), ({"use_liger_kernel": True}, {}, "use_liger_kernel"),
    ({"use_adaptive_entropy": True}, {}, "use_adaptive_entropy"), ({}, {"kappa_l": 3.0}, "kappa_l"), ({}, {"smoothing": "off"}, "hinge")])
def test_what_can_not_work_is_refused_in_one_line(tmp_path, options, epo_options, words):
    with pytest.raises(ValueError, match=words) as error:
        make(tmp_path, epo_options=epo_options, **options)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------ environments
def test_episode_tells_what_is_new_counts_turns_and_ends():
    world = KeyQuest()
    task = world.tasks("train")[0]
    first, second = Episode(world), Episode(world, turns=2)
    text = first.reset(**rows(world, [task])[0])
    assert text.startswith("\n\nTask: open the chest\n\nYou wake up.\nYou see") and second.reset(*task) == text
    plan = world.gold(task)
    for action in plan[:-1]:
        assert "over" not in first.act(action.upper())
    assert first.get_reward() == 0 and "The episode is over" in first.act(plan[-1]) and first.get_reward() == 1
    assert "over" in first.act("west") and first.get_reward() == 1
    assert "can not" in second.act("fly") and "The episode is over" in second.act("dance")                           # its turn limit
    assert second.get_reward() == pytest.approx(-0.02) and "You see" not in second.act("fly")
    second.reset(*task)
    second._world = type("Dead", (), {"step": lambda self, actions: dict.fromkeys(actions)})()
    assert "broke down" in second.act("west") and "over" in second.act("west") and second.get_reward() is None


@pytest.mark.parametrize("world", [lambda: ScienceWorld(("find-animal",), jvms=1),
                                   lambda: ALFWorld(("pick_and_place_simple",), "generated", workers=2)])
def test_real_worlds_are_played_to_success_in_their_own_slots(world):
    with world() as world:
        tasks = world.tasks("train")[:2]
        episodes = [Episode(world) for _ in range(3)]
        for episode, task in zip(episodes, (tasks[0], tasks[1], tasks[0])):
            assert "Task: " in episode.reset(**rows(world, [task])[0])
        plan = world.gold(tasks[1])
        for action in plan:
            text = episodes[1].act(action)
        assert "The episode is over" in text and [e.get_reward() for e in episodes] == [0, 1, 0]
        episodes[1].reset(*tasks[0])                                       # a new one in the same slot; the others are as they were
        for action in world.gold(tasks[0]):
            episodes[2].act(action)
        assert [e.get_reward() for e in episodes] == [0, 0, 1]


def test_trainer_plays_a_world_and_a_group_shares_its_task(tmp_path):
    model, tokenizer = policy()
    assert not supports_tool_calling(tokenizer)
    plain_actions(tokenizer)
    prefix = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True, return_dict=False)
    answer = parse_response(tokenizer, tokenizer.encode(" go to door\nand then") + [tokenizer.eos_token_id], prefix=prefix)
    assert answer["tool_calls"] == [{"type": "function", "function": {"name": "act", "arguments": {"action": "go to door"}}}]
    world, played = KeyQuest(("short",)), []

    class Watched(Episode):
        def reset(self, task, variation, **row):
            played.append((task, variation))
            return super().reset(task, variation, **row)
    args = GRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_steps=2, entropy_coef=LAMBDA, logging_steps=1,
                      report_to="none", save_strategy="no", bf16=False, use_cpu=True, disable_tqdm=True, max_tool_calling_iterations=2,
                      max_completion_length=512, generation_kwargs={"max_new_tokens": 4}, shuffle_dataset=False)
    trainer = Recorded(model, args=args, processing_class=tokenizer, train_dataset=Dataset.from_list(rows(world, world.tasks("train")[:4])),
                       environment_factory=functools.partial(Watched, world, 2), **CORRIDOR)
    trainer.train()
    assert played == [tuple(t) for t in world.tasks("train")[:4] for _ in range(2)]
    assert [row["tools/call_frequency"] for row in trainer.state.log_history[:2]] == [2, 2]         # each message was an action
    assert all(row["rewards/Watched/mean"] <= 0 for row in trainer.state.log_history[:2])
    assert all(mask.sum(1).max() <= 12 for _, _, _, mask, _ in trainer.records)                      # three messages of at most 4 tokens


def test_main_trains_resumes_and_refuses_a_split_that_does_not_work(tmp_path, monkeypatch, capsys):
    model, tokenizer = policy()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["epo_trl.py", *(
            f"--env keyquest --model {tmp_path}/model --turns 2 --turn-tokens 4 --steps 2 --tasks-per-step 2 --group-size 2 --beta 0 --save_steps 2 "
            f"--max_completion_length 512 --use_cpu --output_dir {tmp_path}/out").split(), *flags])
        main()
    run("--updates", "2", "--entropy_coef", "0.1", "--alpha", "2")
    log = lambda: [row for row in json.load(open(tmp_path / "out" / "trainer_state.json"))["log_history"] if "entropy" in row]
    assert [round(row["beta_k"], 3) for row in log()] == [2, 2, 1.05, 1.05] and log()[2]["entropy_coef"] == 0.1                  # K = 2, two updates each
    assert log()[2]["reference"] == log()[3]["reference"] == pytest.approx((log()[0]["entropy"] + log()[1]["entropy"]) / 2)
    first = log()
    os.rename(tmp_path / "out" / "checkpoint-4", tmp_path / "gone")
    run("--updates", "2", "--entropy_coef", "0.1", "--alpha", "2", "--resume")
    assert log()[:2] == first[:2] and len(log()) == 4 and log()[2]["reference"] == first[2]["reference"]
    with pytest.raises(SystemExit) as stop:
        run("--updates", "3")
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("epo_trl.py: 4 episodes a step can't be shared by 1 processes in 3 updates")
    for flags, words in ((["--eval-every", "5"], "--eval-every"), (["--kappa-l", "3"], "kappa_l"), (["--entropy_coef", "0"], "entropy_coef"),
                         (["--model", "missing/path"], "missing/path"), (["--output_dir", str(tmp_path), "--resume"], "no checkpoint")):
        with pytest.raises(SetupError, match=words) as error:
            run("--updates", "2", *flags)
        assert "\n" not in str(error.value)


def script(folder):
    """One rank of the test of two processes."""
    trainer = make(os.path.join(folder, "two"), per_device=2)
    trainer.train()
    if trainer.accelerator.is_main_process:
        names = ("entropy", "loss", "smoothing_loss", "reference", "beta_k")
        with open(os.path.join(folder, "two.json"), "w") as file:
            json.dump({**{name: logged(trainer, name) for name in names}, "ranks": trainer.accelerator.num_processes,
                       "history": trainer.rl_step()[2].values}, file)


if __name__ == "__main__":
    script(sys.argv[1])
