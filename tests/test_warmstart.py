"""Warm starts, chat prompts, what a model's folder asks for, and the model that a run leaves."""

import json
import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from test_faults import call, refuses
from test_models import SHAPE, TEMPLATE, gradient, move, save
from test_rollout import close, play, scored, turns_of
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Qwen2Config

import train
from config import decide
from envs import ACTION_ALONE, THINK_FIRST
from policy import load_policy, save_model, trained
from rollout import Turn
from support import forward
from support.run_folder import ROOT, save_tensors
from tools import smollm2, warmstart
from worlds.keyquest import KeyQuest
from worlds.scienceworld import ScienceWorld

# one template has a persona of its own, the other refuses a system message
SYSTEM = "{% if messages[0]['role'] == 'system' %}"
MESSAGES = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}"
WITH_SYSTEM = SYSTEM + "{% else %}You are Persona. {% endif %}" + MESSAGES
WITHOUT = SYSTEM + "{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("qwen2"), template=WITH_SYSTEM)


@pytest.mark.parametrize("template, role", [(WITH_SYSTEM, "system"), (WITHOUT, "user")])
def test_the_prompt_of_a_chat_model(template, role, tmp_path):
    policy, world = load_policy(save(tmp_path, template=template), "keyquest"), KeyQuest()
    now = world.reset(world.tasks("train")[:1])[0]
    after = world.step({0: world.parse_chat("I go west.")})[0]
    for policy.think, form in ((True, THINK_FIRST), (False, ACTION_ALONE)):
        text = policy.prompt(world, [], now)
        assert text.startswith(f"{role} {world.chat_rules}\n\n{form}")
        assert "Persona" not in text
        # a reply in the wrong form is told the right one
        for action, times in (("west", 1), (None, 2)):
            assert policy.prompt(world, [(now, action)], after).count(form) == times
    # without thoughts it reads what the tiny policies read
    assert world.compact_prompt([], now) in text


@pytest.mark.parametrize(
    "own, flags, wanted",
    [
        # 1.49 and 1.5 billion parameters
        ({"vocab_size": 31_000_000}, {}, ("off", 32, 5e-6)),
        ({"vocab_size": 31_250_000}, {}, ("on", 512, 5e-6)),
        ({"vocab_size": 31_250_000, "think": "off", "lr": 2e-5}, {}, ("off", 32, 2e-5)),
        ({"lora_lr": 5e-4}, {"lora_rank": 8, "think": "on"}, ("on", 512, 5e-4)),
        # the rate of all its weights says nothing about an adapter's
        ({"lr": 2e-5, "max_tokens": 16}, {"lora_rank": 8}, ("off", 16, 1e-4)),
        ({"lr": 2e-5, "lora_lr": 5e-4}, {"lr": 0.1, "max_tokens": 9}, ("off", 9, 0.1)),
    ],
)
def test_what_a_model_asks_for_and_what_wins_over_it(own, flags, wanted, tmp_path):
    Qwen2Config(**SHAPE | own).save_pretrained(tmp_path)
    cfg = decide({"env": "keyquest", "model": str(tmp_path), **flags})
    assert (cfg.think, cfg.max_tokens, cfg.lr) == wanted


@pytest.mark.parametrize("rank", [0, 4])
def test_a_model_with_and_without_an_adapter(folder, rank, tmp_path, monkeypatch):
    policy, out = load_policy(folder, "keyquest", lora_rank=rank), str(tmp_path / "model")
    move(policy)
    episodes = play(policy, turns=3)
    turns = turns_of(episodes)
    # a saved model is the policy, its adapter merged; the second replaces the first
    for limit in (7, 9):
        save_model(policy, {"turns": limit}, out)
    assert os.listdir(tmp_path) == ["model"]
    again = load_policy(out, "keyquest")
    assert again.model.dtype == torch.float32
    assert (again.model.config.turns, again.end) == (9, policy.end)
    assert "lora" not in str(again.model)
    close(scored(again, turns)[0], scored(policy, turns)[0], atol=1e-5)
    # a shared beginning that is read once changes no gradient
    assert forward.shareable(policy.model, [turn.prompt for turn in turns])[1] > 32
    once, _ = gradient(policy, episodes, kl_coef=0.0)
    monkeypatch.setattr(forward, "shareable", lambda *_: (None, 0))
    close(once, gradient(policy, episodes, kl_coef=0.0)[0], atol=1e-6)


def test_a_run_leaves_a_model_that_another_run_goes_on_from(folder, tmp_path):
    flags = "--env keyquest --tasks short --tasks-per-step 2 --group-size 2 --eval-episodes 2"
    flags += " --steps 4 --turns 3 --max-tokens 8 --lora-rank 2"
    out = str(tmp_path / "run")
    call(train, *flags.split(), "--model", folder, "--out", out)
    cfg = decide({"env": "keyquest", "model": f"{out}/model", "lora_rank": 2})
    assert load_policy(cfg.model, cfg.env, lora_rank=2).tokenizer.chat_template == WITH_SYSTEM
    asked = (cfg.tasks, cfg.turns, cfg.max_tokens, cfg.lr, cfg.think)
    assert asked == ("short", 3, 8, 1e-4, "off")


def test_a_cloned_response_is_a_solution_and_ends_where_sampling_ends(folder):
    policy = load_policy(folder, "keyquest", think="off")
    args = Namespace(seed=0, demos=5, epochs=2, misname=0.0)
    turns, orders = warmstart.solved_turns(policy, KeyQuest(("short",)), args)
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    decode = policy.tokenizer.decode
    actions = set()
    for prompt, response in turns:
        actions.add(KeyQuest().parse_chat(decode(response)))
        ids = torch.tensor(response)
        assert not policy.unfinished(ids[-1:], [response])[0]
        assert policy.unfinished(ids[-2:-1], [response[:-1]])[0]
        assert decode(prompt).startswith("system You are in a corridor")
    assert actions == {"west", "east", "take key", "open chest"}
    # ScienceWorld's are in the words of the prompt
    with ScienceWorld(("find-animal",), jvms=1) as world:
        (past,) = world.solutions(world.tasks("train")[:1])
    assert "in inventory" not in past[-1][1]


def test_the_loss_is_that_of_the_responses_alone_for_any_budget(folder):
    policy = load_policy(folder, "keyquest", lora_rank=2)
    move(policy)
    turns = [Turn(0, [5] * 40 + [7, n], list(range(9, 9 + n)), [], []) for n in range(2, 7)]
    gradients, by_hand = [], 0
    for policy.tokens_per_batch in (10**6, 60):
        policy.model.zero_grad()
        loss = warmstart.backpropagate(policy, turns, range(5))
        gradients.append([p.grad.clone() for p in trained(policy.model).values()])
    for turn in turns:
        logits = policy.model(torch.tensor([turn.prompt + turn.response])).logits[0]
        written = logits[len(turn.prompt) - 1 : -1]
        by_hand += cross_entropy(written, torch.tensor(turn.response)).item() / 5
    assert loss == pytest.approx(by_hand, abs=1e-5)
    close(*gradients, atol=1e-6)
    assert max(g.abs().max() for g in gradients[0]) > 1e-3


def test_the_tiny_policies_begin_as_those_that_are_committed(tmp_path, monkeypatch):
    args = Namespace(**warmstart.RECIPES["keyquest"], env="keyquest")
    turns, orders = warmstart.make_tiny(args, tmp_path)
    assert len(turns) == 9967
    assert len(orders[1]) == 311 * 32
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        committed = Path(ROOT, "models", "keyquest", name)
        assert (tmp_path / name).read_bytes() == committed.read_bytes()
    monkeypatch.chdir(ROOT)
    refuses(warmstart, "--env", "keyquest", says="models/keyquest exists already; name another")


TINY = "--env keyquest --out new"
CHAT = f"{TINY} --tasks short --lora-rank 4 --demos 8 --epochs 6 --batch 8 --lr 0.02 --turns 3"
CHAT += " --max-tokens 6 --model MODEL"
ASKED = {CHAT: {"think": "off", "tasks": ["short"], "turns": 3, "lora_lr": 5e-4}}
ASKED |= {TINY: {"prompt": "compact", "tasks": ["short", "long"], "lr": 3e-3}}


@pytest.mark.parametrize("flags", ASKED)
def test_a_command_that_was_stopped_goes_on(flags, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warmstart, "SAVE_EVERY", 0)
    monkeypatch.setattr(KeyQuest, "splits", dict(KeyQuest.splits, train=range(8)))
    command = [*flags.replace("MODEL", folder).split(), "--eval-episodes", 2]

    def stopped(path, state):
        save_tensors(path, state)
        if state["step"] == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(warmstart.run_folder, "save_tensors", stopped)
        refuses(warmstart, *command, says="the same command goes on")
    refuses(warmstart, *command, "--seed", 1, says="is of other settings")
    rest = call(warmstart, *command)[1]
    whole = call(warmstart, *command, "--out", "whole")[1]
    assert sorted(os.listdir()) == ["new", "whole"]
    assert "batch 5 of" in whole and "batch 5 of" not in rest
    assert "after: success IID" in rest
    found = [float(line.split("loss ")[1]) for line in whole.splitlines() if "loss" in line]
    assert found[0] > found[-1] + 1
    weights = [AutoModelForCausalLM.from_pretrained(f).state_dict() for f in ("new", "whole")]
    close(*weights, atol=1e-4)
    config = json.loads(Path("new/config.json").read_text())
    assert ASKED[flags].items() <= config.items()
    result = json.loads(Path("new/warmstart.json").read_text())
    assert 0 <= result["after"]["iid_invalid"] <= 1


REFUSED = {
    "--out taken/": "taken exists already; name another folder with --out, or remove it first",
    "--out dangling": "dangling exists already",
    "--out=": "--out is missing or empty",
    "--out strange": "strange.unfinished is not of a warm start; move it away",
    "--out file/new": "Not a directory",
    "--demos -3": "--demos does nothing without --model",
    "--lr nan": "--lr does nothing without --model",
    "--seed -1": "--seed must be between 0",
    "--eval-episodes 0": "--eval-episodes must be between 1",
    "--model=": "cannot be loaded",
    "--model tiny": "tiny is a tiny policy; leave out --model",
    "--model MODEL --demos -3": "--demos must be between 1 and 100000",
    "--model MODEL --lr nan": "--lr must be between",
    "--model MODEL --tasks nope": "unknown KeyQuest task 'nope'",
    "--model MODEL --measure none": "none of the demonstrations reaches its goal",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_a_warm_start_that_cannot_be_is_one_line(flags, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(KeyQuest, "gold", lambda self, task: ["east"])
    os.makedirs("strange.unfinished/mine")
    os.makedirs("taken/config.json")
    os.symlink("nowhere", "dangling")
    open("file", "w").close()
    before = set(tmp_path.rglob("*"))
    command = f"{TINY} {flags}".replace("MODEL", folder).split()
    refuses(warmstart, *command, says=REFUSED[flags])
    assert before <= set(tmp_path.rglob("*")) and not os.path.exists("new")


def test_an_unpacked_smollm2_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "ROOT", tmp_path)
    (tmp_path / "models/smollm2-135m").mkdir(parents=True)
    refuses(smollm2, says="smollm2-135m exists already; remove it first")
