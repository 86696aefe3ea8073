"""A run is wired as Algorithm 1 has it: which numbers of which policy reach the loss and the log.

What is expected is computed here from what was played, and not by the functions under test.
"""

import json
from dataclasses import dataclass, field
from statistics import fmean as mean

import pytest
import torch

import rollout
import train
import update
from config import Config, parse_flags
from envs import Task
from rollout import Episode, Turn, collect
from support.run_folder import read_log
from worlds.keyquest import KeyQuest

FLAGS = (
    "--env keyquest --tasks short,long --seed 5 --steps 3 --turns 8 --tasks-per-step 4 "
    "--group-size 4 --minibatches 1 --temperature 2 --entropy-coef 0.3 --alpha 2 --kl-coef 0.2 "
    "--warmup 0 --eval-every 3 --eval-episodes 6"
)


@dataclass
class Played:
    """What the steps of a run did: for each, the tasks, the seeds, the turns of each episode."""

    tasks: list = field(default_factory=list)
    seeds: list = field(default_factory=list)
    episodes: list = field(default_factory=list)
    # the rows of the run, and its evaluation tasks
    log: list = field(default_factory=list)
    drawn: dict = field(default_factory=dict)


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("wiring") / "run")
    played = Played()

    def keep(world, policy, tasks, *more):
        generator = more[3]
        seeds = (generator.initial_seed(), torch.initial_seed())
        result = collect(world, policy, tasks, *more)
        # the evaluations play at another temperature
        if more[1] == 2:
            played.tasks.append(tasks)
            played.seeds.append(seeds)
            played.episodes.append(result[0])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "collect", keep)
        train.train(Config(**parse_flags([*FLAGS.split(), "--out", out], None)))
    played.log = read_log(out)
    with open(f"{out}/tasks.json") as file:
        played.drawn = json.load(file)
    assert len(played.episodes) == 3
    return played


def test_each_step_has_tasks_and_chance_of_its_own(played):
    first, second, third = (set(tasks) for tasks in played.tasks)
    assert len(first) == 4
    assert not first & second and not second & third
    seeds = [seed for of_step in played.seeds for seed in of_step]
    assert len(set(seeds)) == 3
    assert all(generator == whole for generator, whole in played.seeds)
    world = KeyQuest(("short", "long"))
    of_seed = lambda seed: train.step_tasks(
        world.tasks("train"), Config(seed=seed, tasks_per_step=4, group_size=4), 0
    )
    assert of_seed(5) == played.tasks[0]
    assert set(of_seed(6)) != first


def test_training_plays_train_tasks_and_evaluations_the_same_for_every_seed(played):
    world = KeyQuest(("short", "long"))
    assert {task for tasks in played.tasks for task in tasks} <= set(world.tasks("train"))
    for split, tasks in played.drawn.items():
        wanted = train.draw(world.tasks(split), 6, 0)
        assert [Task(*task) for task in tasks] == wanted


def test_entropy_is_eq_2_of_the_policy_that_played(played):
    for row, episodes in zip(played.log, played.episodes, strict=False):
        of_episode = lambda episode: mean(mean(turn.entropy) for turn in episode.turns)
        assert row["entropy"] == pytest.approx(mean(map(of_episode, episodes)), rel=1e-5)
        assert row["success"] == mean(episode.success for episode in episodes)


def test_at_any_temperature_what_is_scored_is_what_was_sampled(played):
    """Before the first update the ratio is 1 and the reference is the policy."""
    first = played.log[0]
    assert first["clip_fraction"] == 0
    assert abs(first["kl"]) < 1e-9
    assert first["entropy_loss"] == pytest.approx(first["entropy"], rel=1e-4)
    assert abs(first["policy_loss"]) < 0.01
    # the updates in between were large
    assert played.log[2]["kl"] > 1e-4


def test_the_loss_that_is_logged_has_the_beta_that_is_logged(played):
    for row in played.log[:3]:
        bonus = row["entropy_loss"] - row["beta"] * row["smoothing_loss"]
        loss = row["policy_loss"] - 0.3 * bonus + 0.2 * row["kl"]
        assert row["loss"] == pytest.approx(loss, abs=1e-5)
    assert played.log[1]["smoothing_loss"] > 1e-3
    assert played.log[1]["beta"] != 1


def test_a_group_is_of_one_variation_not_of_one_type():
    tasks = [Task("short", 1)] * 2 + [Task("short", 2)] * 2
    returns = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.double)
    episodes = [Episode(task) for task in tasks]
    # no member of a group did better than another
    assert train.grpo_advantages(episodes, tasks, returns, Config()).tolist() == [0, 0, 0, 0]


def scripted(plan, seen):
    """In place of the policy: the actions of a plan, one after the other."""

    def write_turns(world, policy, active, past, now, t, *_):
        seen.append((list(past[0]), now[0]))
        return {slot: Turn(t, [1], [2], [0.0], [0.5], action=plan[t]) for slot in active}

    return write_turns


def play(world, task, plan, monkeypatch):
    seen = []
    monkeypatch.setattr(rollout, "write_turns", scripted(plan, seen))
    (episode,), lost, _ = collect(world, None, [task], len(plan), 1.0, 4)
    assert lost == 0
    return episode, seen


def test_a_positive_score_at_the_end_is_no_success(monkeypatch):
    """The coin ends the episode with 50 points; only the chest is success."""
    world = KeyQuest(("coin",))
    task = world.tasks("train")[0]
    world.reset([task])
    game = world.games[0]
    to_the_coin = "east" if game["coin"] > game["here"] else "west"
    at_the_coin, _ = play(world, task, [to_the_coin, "take coin"], monkeypatch)
    assert (at_the_coin.score, at_the_coin.success) == (50, False)
    at_the_chest, _ = play(world, task, world.gold(task), monkeypatch)
    assert (at_the_chest.score, at_the_chest.success) == (100, True)
    row = train.episode_metrics([at_the_coin, at_the_chest], 30)
    assert (row["success"], row["score"]) == (0.5, 75)


def test_an_action_that_the_world_does_not_know_is_an_invalid_turn(monkeypatch):
    world = KeyQuest(("short",))
    task = world.tasks("train")[0]
    episode, _ = play(world, task, ["dance", world.gold(task)[0], None], monkeypatch)
    assert [turn.invalid for turn in episode.turns] == [True, False, True]
    assert not episode.success


def test_the_past_pairs_what_was_seen_with_what_was_done_then(monkeypatch):
    world = KeyQuest(("short",))
    task = world.tasks("train")[0]
    plan = world.gold(task)
    _, seen = play(world, task, plan, monkeypatch)
    for t in range(1, len(plan)):
        past, _ = seen[t]
        assert past == [(seen[i][1], plan[i]) for i in range(t)]


def test_epo_decay_weighs_the_place_of_a_turn_in_its_episode():
    """Two episodes of one turn each, and one token: index 0 twice, though the turns are 0 and 1."""
    x = lambda *values: torch.tensor(values)
    none, entropy, weights = torch.zeros(2), x(1.0, 3.0), x(0.5, 0.5)
    number = x(0, 1)
    batch = update.Batch(none, number, number, x(0, 0), none, none, none, weights)
    cfg = Config(turns=2, entropy_decay=0.5, smoothing="off")
    _, terms = update.batch_loss(none, entropy, batch, None, None, 2.0, cfg)
    assert terms["entropy_loss"] == pytest.approx(1.5 * 2.0)
