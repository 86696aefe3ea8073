"""A run is wired as Algorithm 1 has it: which numbers of which policy reach the loss and the log.

What is expected is computed here from what was played, and not by the functions under test.
"""

import itertools
import json
import math
from dataclasses import replace
from statistics import fmean as mean
from types import SimpleNamespace

import pytest
import torch
from pytest import approx
from test_faults import call, log_of
from test_train import all_turns

import rollout
import train
from config import Config, decide
from envs import Task
from metrics import episode_metrics
from policy import load_policy
from rollout import Turn, collect
from update import add_gradient, make_batch
from worlds.keyquest import KeyQuest

FLAGS = (
    "--env keyquest --tasks short,long --seed 5 --steps 3 --turns 8 --tasks-per-step 4 "
    "--group-size 4 --minibatches 1 --temperature 2 --entropy-coef 0.3 --alpha 2 --kl-coef 0.2 "
    "--warmup 0.5 --eval-every 3 --eval-episodes 6"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """-> what each step played, its log, its folder"""
    out, played = tmp_path_factory.mktemp("wiring") / "run", []

    def keep(world, policy, tasks, *more):
        _, temperature, _, generator = more
        seeds = (generator.initial_seed(), torch.initial_seed())
        result = collect(world, policy, tasks, *more)
        # the evaluations play at another temperature
        if temperature == 2:
            step = SimpleNamespace(tasks=tasks, seeds=seeds, episodes=result[0])
            played.append(step)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "collect", keep)
        assert call(train, *FLAGS.split(), "--out", out)[0] == 0
    assert len(played) == 3
    return played, log_of(out), out


def test_each_step_has_tasks_and_chance_of_its_own(run):
    played, _, _ = run
    first, second, third = [set(step.tasks) for step in played]
    assert len(first) == 4
    assert not first & second and not second & third
    seeds = [step.seeds for step in played]
    assert len(set(seeds)) == 3
    assert all(generator == whole for generator, whole in seeds)
    all_tasks = KeyQuest(("short", "long")).tasks("train")
    of_seed = lambda s: Config(seed=s, tasks_per_step=4, group_size=4)
    assert train.step_tasks(all_tasks, of_seed(5), 0) == played[0].tasks
    assert set(train.step_tasks(all_tasks, of_seed(6), 0)) != first
    configs = [of_seed(s) for s in range(3)]
    uses = list(itertools.product(configs, range(5), ("train", "iid", "ood")))
    assert len({train.seed_of(*use) for use in uses}) == len(uses)


def test_training_plays_train_tasks_and_evaluations_the_same_for_every_seed(run):
    played, _, out = run
    world = KeyQuest(("short", "long"))
    for step in played:
        assert set(step.tasks) <= set(world.tasks("train"))
    evaluated = json.loads((out / "tasks.json").read_text())
    for split, tasks in evaluated.items():
        wanted = train.draw_tasks(world.tasks(split), 6, 0)
        assert [Task(*task) for task in tasks] == wanted


def test_the_log_of_a_run(run):
    """β_k, the corridor and the loss are those of Eq. 3 to 6."""
    _, log, _ = run
    steps = log[:3]
    assert [row["step"] for row in log if "iid_success" in row] == [0, 3]
    assert [row["step"] for row in log if "success" in row] == [0, 1, 2]
    # Algorithm 1: no reference in step 0, then the mean of the entropies of the steps before
    numbers = lambda row, *names: [row[name] for name in names]
    first = numbers(log[0], "history_mean", "smoothing_loss", "net_above_cap", "beta")
    assert first == [None, 0, 1, 2]
    entropies = [row["entropy"] for row in steps]
    for k in (1, 2):
        history = mean(entropies[:k])
        # ⌊K / 2⌋ is 1
        beta = 1 + math.exp(-3 * k)
        want = [history, 2 * history, beta, 1 - 2 * beta]
        got = numbers(log[k], "history_mean", "corridor_high", "beta", "net_above_cap")
        # logged numbers have six digits
        assert got == approx(want, rel=5e-6)
    for row in steps:
        bonus = row["entropy_loss"] - row["beta"] * row["smoothing_loss"]
        loss = row["policy_loss"] - 0.3 * bonus + 0.2 * row["kl"]
        assert row["loss"] == approx(loss, abs=1e-5)
    assert log[1]["smoothing_loss"] > 1e-3
    # it rises in half of the steps, and falls to a fifth
    lr = [row["lr"] for row in steps]
    assert lr == approx([0.5 * lr[1], lr[1], 0.2 * lr[1]])


def test_entropy_is_eq_2_of_the_policy_that_played(run):
    played, log, _ = run
    for step, row in zip(played, log, strict=False):
        of_episode = lambda episode: mean(mean(turn.entropy) for turn in episode.turns)
        entropy = mean(map(of_episode, step.episodes))
        assert row["entropy"] == approx(entropy, rel=1e-5)
        assert row["success"] == mean(episode.success for episode in step.episodes)


def test_at_any_temperature_what_is_scored_is_what_was_sampled(run):
    """Before the first update the ratio is 1 and the reference is the policy."""
    _, (first, _, third, _), _ = run
    assert first["clip_fraction"] == 0
    assert first["kl"] == approx(0, abs=1e-8)
    assert first["entropy_loss"] == approx(first["entropy"], rel=1e-4)
    # what is left are the penalties of invalid turns, 0.01 each
    assert first["policy_loss"] == approx(0, abs=0.011)
    # the updates in between were large
    assert third["kl"] > 1e-4


def play(world, task, plan, monkeypatch):
    """Play a plan in place of the policy's actions -> the episode, and (past, now) of each turn."""
    seen = []

    def write_turns(world, policy, active, past, now, t, *_):
        assert active == [0]
        seen.append((list(past[0]), now[0]))
        return {0: Turn(t, [1], [2], [0.0], [0.5], action=plan[t])}

    monkeypatch.setattr(rollout, "write_turns", write_turns)
    (episode,), lost, _ = collect(world, None, [task], len(plan), 1.0, 4)
    assert lost == 0
    return episode, seen


def test_a_positive_score_at_the_end_is_no_success(monkeypatch):
    """The coin ends the episode with 50 points; only the chest is success."""
    world = KeyQuest(("coin",))
    task = world.tasks("train")[0]
    world.reset([task])
    game = world.games[0]
    way = "east" if game["coin"] > game["here"] else "west"
    coin, _ = play(world, task, [way, "take coin"], monkeypatch)
    assert (coin.score, coin.success) == (50, False)
    chest, _ = play(world, task, world.gold(task), monkeypatch)
    assert (chest.score, chest.success) == (100, True)
    row = episode_metrics([coin, chest], 30)
    assert (row["success"], row["score"]) == (0.5, 75)


def test_the_past_pairs_what_was_seen_with_what_was_done_then(monkeypatch):
    """And an action that the world does not know, or none, is an invalid turn."""
    world = KeyQuest(("short",))
    task = world.tasks("train")[0]
    gold = world.gold(task)
    plan = ["dance", None, *gold]
    episode, seen = play(world, task, plan, monkeypatch)
    invalid = [turn.invalid for turn in episode.turns]
    assert invalid == [True, True] + [False] * len(gold)
    done = []
    for (past, now), action in zip(seen, plan, strict=True):
        assert past == done
        done.append((now, action))


@pytest.mark.parametrize("entropy_coef, low, high", [(0.001, 0.001, 0.003), (0.1, 0.1, 0.3)])
def test_what_share_of_the_first_gradient_the_entropy_terms_are(entropy_coef, low, high):
    """At the paper's λ about 0.2 %: in few steps, where groups differ, it can change nothing."""
    cfg = decide({"env": "keyquest", "tasks": "short", "kl_coef": 0.0})
    policy, world = load_policy("tiny", "keyquest"), KeyQuest(("short",))
    tasks = train.step_tasks(world.tasks("train"), cfg, 0)
    generator = torch.Generator().manual_seed(0)
    episodes, _, _ = collect(world, policy, tasks, cfg.turns, 1.0, cfg.max_tokens, generator)
    turns, owner = all_turns(episodes)
    returns = train.episode_returns(episodes, cfg)
    advantages = train.grpo_advantages(episodes, returns)[owner]
    norms = []
    for coef, own in ((0.0, advantages), (entropy_coef, 0 * advantages)):
        batch = make_batch(turns, owner, own, cfg)
        history_mean = (batch.entropy * batch.weights).sum().item()
        terms = replace(cfg, entropy_coef=coef)
        add_gradient(policy, turns, batch, history_mean, 2.0, terms)
        parameters = policy.model.parameters()
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf)
        norms.append(norm.item())
        policy.model.zero_grad()
    of_policy, of_entropy = norms
    assert low < of_entropy / of_policy < high, norms
