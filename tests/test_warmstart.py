"""Warm starts of chat models, their prompts, and the folder that a run leaves."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from test_models import TEMPLATE, gradient, move, play, save
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

import config
from envs import WORLDS, ScienceWorld, world_class
from rollout import Policy, Turn, response_states, score_tokens
from support import forward, report
from support.loading import ROOT, load_policy, made_for, save_model
from tools import chat_warmstart, warmstart
from worlds.chat import ACTION_ALONE, THINK_FIRST
from worlds.keyquest import KeyQuest

WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}You are Persona. {% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
)
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + TEMPLATE
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("qwen2"), template=WITH_SYSTEM)


def run(module, *arguments):
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


# ---- prompts


def test_the_rules_are_the_system_message_and_the_persona_of_the_template_is_gone(folder):
    policy, world = load_policy(folder, "keyquest"), KeyQuest()
    now = world.reset(world.tasks("train")[:1])[0]
    for think, form in ((True, THINK_FIRST), (False, ACTION_ALONE)):
        policy.think = think
        text = policy.prompt(world, [], now)
        assert text.startswith(f"system: {world.chat_rules}\n\n{form}\nuser: ")
        assert "Persona" not in text and now.look in text
    assert "carry it to the chest" in world.chat_rules


def test_without_a_system_role_the_rules_are_in_the_users_message(tmp_path):
    policy, world = load_policy(save(tmp_path, template=REFUSES_SYSTEM), "keyquest"), KeyQuest()
    assert not policy.system_role
    now = world.reset(world.tasks("train")[:1])[0]
    assert policy.prompt(world, [], now).startswith(f"user {world.chat_rules}")


def test_a_reply_in_the_wrong_form_is_told_the_right_one():
    world = KeyQuest()
    before = world.reset(world.tasks("train")[:1])[0]
    after = world.step({0: world.parse_chat("I go west.")})[0]
    assert after.invalid
    for think, form in ((True, THINK_FIRST), (False, ACTION_ALONE)):
        _, state = world.chat_prompt([(before, None)], after, think)
        assert form in state["content"]
        _, state = world.chat_prompt([(before, "west")], after, think)
        assert form not in state["content"]


@pytest.mark.parametrize("env", WORLDS)
def test_the_short_prompt_is_what_the_tiny_policies_read(env):
    games = {"games": "generated"} if env == "alfworld" else {}
    with world_class(env)(**games) as world:
        task = world.tasks("train")[0]
        now = world.reset([task])[0]
        _, state = world.chat_prompt([], now, think=False)
        assert state["content"] == world.compact_prompt([], now)


def test_models_of_one_and_a_half_billion_parameters_think_and_smaller_ones_do_not():
    """The shapes of Qwen2.5-1.5B and 0.5B."""
    tied = dict(vocab_size=151936, tie_word_embeddings=True, num_key_value_heads=2)
    large = Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        **tied,
    )
    small = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        **tied,
    )
    assert made_for(large)["think"] == "on" and made_for(small)["think"] == "off"
    large.think = "off"
    assert made_for(large)["think"] == "off"


@pytest.mark.parametrize(
    "own, flags, wanted",
    [
        ({"think": "on"}, {}, ("on", 512, 5e-6)),
        ({"think": "off"}, {}, ("off", 32, 5e-6)),
        ({"think": "off"}, {"think": "on", "lora_rank": 8}, ("on", 512, 1e-4)),
        ({"think": "off", "lora_lr": 5e-4, "lr": 2e-5}, {}, ("off", 32, 2e-5)),
        ({"think": "off", "lora_lr": 5e-4}, {"lora_rank": 8}, ("off", 32, 5e-4)),
        # the rate of all its weights says nothing about an adapter's
        ({"think": "off", "lr": 5e-6}, {"lora_rank": 8}, ("off", 32, 1e-4)),
        ({"think": "off", "max_tokens": 16}, {"lr": 0.1}, ("off", 16, 0.1)),
    ],
)
def test_what_a_model_asks_for_and_what_wins_over_it(own, flags, wanted):
    asked = dict.fromkeys(("think", "tasks", "turns", "lr", "lora_lr", "max_tokens")) | own
    cfg, policy = config.Config(**flags), Policy(None, None, [], False, asked)
    config.resolve(cfg, policy, 30)
    assert (cfg.think, cfg.max_tokens, cfg.lr) == wanted
    assert policy.think == (cfg.think == "on")


# ---- the folder that a run leaves


@pytest.mark.parametrize("rank", [0, 4])
def test_a_saved_model_is_the_policy_without_its_adapter(folder, rank, tmp_path):
    policy = load_policy(folder, "keyquest", lora_rank=rank)
    move(policy)
    turns = [turn for episode in play(policy) for turn in episode.turns]
    out = str(tmp_path / "model")
    for turn_limit in (7, 9):
        # the second replaces the first
        save_model(policy, {"turns": turn_limit, "tasks": ["short"]}, out)
    assert os.listdir(tmp_path) == ["model"]
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert plain.dtype == torch.float32 and not any(
        "lora" in n for n, _ in plain.named_parameters()
    )
    again = load_policy(out, "keyquest")
    assert again.made_for["turns"] == 9 and again.made_for["tasks"] == ["short"]
    assert again.end == policy.end
    tokens = torch.tensor([token for turn in turns for token in turn.response])
    logp = [
        score_tokens(p.model, response_states(p.model, turns), tokens)[0] for p in (policy, again)
    ]
    assert torch.allclose(*logp, atol=1e-5)


def test_a_run_leaves_a_model_that_another_run_goes_on_from(folder, tmp_path):
    few = "--steps 1 --turns 3 --tasks-per-step 2 --group-size 2 --max-tokens 8 --eval-episodes 2"
    few = ["--env", "keyquest", "--lora-rank", "2", *few.split()]
    first = run("train", *few, "--tasks", "short", "--model", folder, "--out", tmp_path / "a")
    assert first.returncode == 0, first.stderr
    model = tmp_path / "a" / "model"
    assert AutoConfig.from_pretrained(model).lora_lr == 1e-4
    second = run("train", "--evaluate", tmp_path / "a" / "checkpoint.pt")
    assert second.returncode == 0 and "short" in second.stdout
    settings = "--steps 1 --tasks-per-step 2 --group-size 2 --eval-episodes 2 --lora-rank 2".split()
    out = tmp_path / "b"
    third = run("train", "--env", "keyquest", *settings, "--model", model, "--out", out)
    assert third.returncode == 0, third.stderr
    saved = json.loads((out / "config.json").read_text())
    assert (saved["turns"], saved["max_tokens"], saved["lr"], saved["think"]) == (3, 8, 1e-4, "off")
    assert "200 train tasks of 1 types" in third.stdout


# ---- cloning


def test_a_cloned_response_ends_where_sampling_ends(folder):
    policy, world = load_policy(folder, "keyquest"), KeyQuest(("short",))
    policy.think = False
    turns = chat_warmstart.demonstrate(policy, world, 5, seed=0)
    for prompt, response in turns:
        text = policy.tokenizer.decode(response)
        assert world.parse_chat(text) in ("west", "east", "take key", "open chest")
        token = torch.tensor(response[-1:])
        assert not policy.unfinished(token, [response])[0]
        assert policy.unfinished(torch.tensor(response[-2:-1]), [response[:-1]])[0]
        assert policy.tokenizer.decode(prompt).startswith("system: You are in a corridor")


def test_scienceworld_is_cloned_in_the_words_that_the_model_reads(folder):
    policy = load_policy(folder, "scienceworld")
    policy.think = False
    with ScienceWorld(("find-animal",), jvms=1) as world:
        turns = chat_warmstart.demonstrate(policy, world, 2, seed=0)
    actions = [ScienceWorld.parse_chat(policy.tokenizer.decode(response)) for _, response in turns]
    assert sum(action.startswith("focus on") for action in actions) == 2
    assert not any(action.startswith("look around") for action in actions)


def test_the_loss_is_that_of_the_responses_alone_for_any_budget(folder):
    policy = load_policy(folder, "keyquest", lora_rank=2)
    move(policy)
    turns = [Turn(0, [5] * 40 + [7, n], list(range(9, 9 + n)), [], []) for n in range(2, 7)]
    gradients = []
    for budget in (10**6, 60):
        policy.model.zero_grad()
        loss = chat_warmstart.add_gradient(policy, turns, range(5), budget)
        gradients.append(
            torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
        )
    by_hand = 0.0
    for turn in turns:
        with torch.no_grad():
            logits = policy.model(torch.tensor([turn.prompt + turn.response])).logits[0]
        logp = logits[len(turn.prompt) - 1 : -1].log_softmax(-1)
        by_hand -= logp.gather(1, torch.tensor(turn.response)[:, None]).mean().item() / 5
    assert loss == pytest.approx(by_hand, abs=1e-5)
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 1e-3


def test_cloning_goes_on_after_a_kill_and_lowers_the_loss(folder, tmp_path, monkeypatch):
    flags = "--env keyquest --tasks short --lora-rank 4 --demos 8 --epochs 6 --batch 8 --lr 0.02"
    flags += " --eval-episodes 2 --turns 3 --max-tokens 6 --measure after"
    arguments = [*flags.split(), "--model", folder]
    states = []
    for name in ("whole", "killed"):
        out = str(tmp_path / name)
        code = (
            "import sys; from tools import chat_warmstart, warmstart; "
            "chat_warmstart.SAVE_EVERY = 0; sys.argv = ['warmstart', *sys.argv[1:]]; "
            "warmstart.main()"
        )
        command = [sys.executable, "-c", code, *arguments, "--out", out]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        if name == "killed":
            checkpoint = os.path.join(out + ".unfinished", "checkpoint.pt")
            while not os.path.exists(checkpoint) or torch.load(checkpoint)["step"] < 5:
                assert process.poll() is None
                time.sleep(0.02)
            process.kill()
            process.wait()
            assert not os.path.exists(out)
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        text = process.communicate()[0]
        assert process.returncode == 0
        assert "after: success IID" in text and "invalid turns" in text
        states.append(AutoModelForCausalLM.from_pretrained(out).state_dict())
        assert float(text.split("last loss ")[1].split(",")[0]) < 3
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    result = json.load(open(os.path.join(out, "warmstart.json")))
    assert result["settings"]["demos"] == 8 and 0 <= result["after"]["iid_invalid"] <= 1
    asked = AutoConfig.from_pretrained(out)
    assert (asked.think, asked.tasks, asked.turns) == ("off", ["short"], 3)
    refused = run("tools.warmstart", *arguments, "--out", out)
    assert refused.returncode and "exists already" in refused.stderr


def test_without_a_demonstration_there_is_no_clone(folder, tmp_path, monkeypatch):
    out = str(tmp_path / "clone")
    arguments = ["--env", "keyquest", "--measure", "none", "--model", folder, "--out", out]
    monkeypatch.setattr(sys, "argv", ["warmstart", *arguments])
    # as of games that nobody can win
    monkeypatch.setattr(chat_warmstart, "solutions", lambda world, tasks: [])
    with pytest.raises(SystemExit, match="^warmstart.py: none of the demonstrations"):
        warmstart.main()
    assert not os.path.exists(out)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_shared_beginning_that_is_read_once_changes_no_gradient(folder, rank, monkeypatch):
    policy = load_policy(folder, "keyquest", lora_rank=rank)
    move(policy)
    episodes = play(policy)
    rows = [turn.prompt for episode in episodes for turn in episode.turns]
    assert forward.shareable(policy.model, rows)[1] > 32
    once, _ = gradient(policy, episodes, kl_coef=0.0)
    monkeypatch.setattr(forward, "shareable", lambda *_: (None, 0))
    again, _ = gradient(policy, episodes, kl_coef=0.0)
    assert all(torch.allclose(once[name], again[name], atol=1e-6) for name in again)
    assert max(g.abs().max() for g in again.values()) > 1e-3


# ---- what is printed


def test_the_hint_of_a_run_that_wins_nothing_comes_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "line", lambda row: "the line")
    cfg = config.Config(env="keyquest", model="some/model", think="on", out=str(tmp_path))
    hints = []
    with open(tmp_path / "log.jsonl", "a") as log:
        for step, reward in enumerate((0.0, 0.0, 0.0, 0.0, 0.5, 0.0)):
            row = {"step": step, "reward": reward}
            log.write(json.dumps(row) + "\n")
            log.flush()
            report.print_step(cfg, row)
            printed = capsys.readouterr().out
            hints.append("python -m tools.warmstart --env keyquest --model some/model" in printed)
    assert hints == [True, False, True, False, False, True]


def test_off_a_terminal_a_long_step_prints_lines_and_a_short_one_none(capsys):
    with report.progress("step 3 collect", 8) as bar:
        bar.update(8)
    assert isinstance(bar, report.Lines) and bar.mininterval == 60
    assert capsys.readouterr().out == ""
    with report.Lines(desc="step 3 collect", total=8, leave=False, mininterval=0) as bar:
        bar.set_postfix_str("turn 2", refresh=False)
        bar.update(3)
    captured = capsys.readouterr()
    assert captured.out.endswith("  step 3 collect: 3 of 8, turn 2, 0 s\n")
    assert not captured.err.strip()
