"""ALFWorld: the fast engine against the stock one, real and generated games, worker processes,
bad input.

The real games are looked for in $ALFWORLD_DATA, then in ../shared/alfworld; without them the tests
that need them are skipped.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from envs import ALFWORLD_TASKS, NOT_AN_ACTION, ALFWorld
from support.run_folder import SetupError
from tools.warmstart import TASK_VERBS, hasty, useful_actions
from worlds.alfworld_generate import FURNITURE, TRAIN_ROOMS, generate, rooms
from worlds.compact import ranges

ROOT = Path(__file__).parent.parent
PLACES = (os.environ.get("ALFWORLD_DATA"), ROOT.parent / "shared" / "alfworld")
DATA = next((p for p in PLACES if p and os.path.isdir(os.path.join(p, "json_2.1.1"))), None)
needs_games = pytest.mark.skipif(DATA is None, reason="no real ALFWorld games here")


# task types that ask for nothing but to put things somewhere
SIMPLE = ("pick_and_place_simple", "pick_two_obj_and_place")


@pytest.fixture(scope="module")
def real():
    if DATA is None:
        pytest.skip("no real ALFWorld games here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALFWORLD_DATA", str(DATA))
        with ALFWorld(games="real", workers=1) as world:
            yield world


@pytest.fixture(scope="module")
def generated():
    with ALFWorld(games="generated", workers=1) as world:
        yield world


def one_of_each_type(world, split):
    tasks = world.tasks(split)
    return [next(task for task in tasks if task.name == name) for name in ALFWORLD_TASKS]


def replay(world, tasks, plans):
    """Play lists of actions side by side -> the last observations."""
    now = dict(enumerate(world.reset(tasks)))
    for turn in range(max(map(len, plans))):
        active = [slot for slot in now if turn < len(plans[slot]) and not now[slot].done]
        now |= world.step({slot: plans[slot][turn] for slot in active})
    return list(now.values())


PLAY = """
import hashlib, json, random, sys
from worlds import alfworld_engine

# read now: loading a game overwrites sys.argv
files, engine = json.loads(sys.argv[1]), sys.argv[2]
if engine == "fast":
    alfworld_engine.speed_up()
env = alfworld_engine.make_env()
seen = []

def see(state):
    seen.append([state.feedback, state["admissible_commands"], state["won"]])
    return state

for file in files:
    seen.clear()
    rng = random.Random(file)
    env.load(file)
    see(env.reset())
    for command in json.load(open(file))["walkthrough"][:4]:
        see(env.step(command)[0])
    state = see(env.reset())
    for _ in range(4):
        command = rng.choice(state["admissible_commands"])
        state = see(env.step(command)[0])
    print(hashlib.sha256(json.dumps(seen).encode()).hexdigest())
"""


@needs_games
def test_observations_and_commands_are_those_of_the_stock_engine(tmp_path):
    folder = Path(DATA).resolve() / "json_2.1.1" / "valid_unseen"
    files = sorted(map(str, folder.rglob("game.tw-pddl")))[::70]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ALFWORLD_DATA": str(tmp_path)}

    def hashes(engine):
        command = [sys.executable, "-c", PLAY, json.dumps(files), engine]
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert process.returncode == 0, process.stderr
        return process.stdout.split()

    fast = hashes("fast")
    assert len(fast) == len(files) == 2
    assert fast == hashes("stock")


def test_splits_are_those_of_the_benchmark(real):
    assert len(real.tasks("iid")) == 140
    assert len(real.tasks("ood")) == 134
    for split in ("train", "iid", "ood"):
        assert {task.name for task in real.tasks(split)} == set(ALFWORLD_TASKS)


def test_walkthroughs_solve_real_games_also_when_cleaned(real):
    tasks = one_of_each_type(real, "ood")
    gold = [real.gold(task) for task in tasks]
    for plans in (gold, [useful_actions(plan) for plan in gold]):
        for now in replay(real, tasks, plans):
            assert now.success and now.done
            assert now.score == 100 and not now.invalid
    for now in replay(real, tasks, [plan[:-1] for plan in gold]):
        assert not now.success and not now.done
        assert now.score == 0


def test_members_of_a_group_start_alike_and_play_apart(real):
    task = real.tasks("iid")[0]
    first, second, third = real.reset([task] * 3)
    assert first == second == third
    command = next(c for c in first.objects if c.startswith("go to "))
    after = real.step({0: command, 2: None})
    assert after[0].reply.startswith("You arrive at")
    assert after[2].reply == NOT_AN_ACTION
    assert real.step({1: command})[1] == after[0]
    real.prefetch([task])
    assert real.reset([task]) == [first]


def test_an_episode_that_starts_anew_leaves_the_others_alone():
    with ALFWorld(games="generated", workers=2) as world:
        first, second, third = one_of_each_type(world, "iid")[:3]
        before = world.reset([first, first, second, second])
        anew = world.restart(2, third)
        assert anew.goal not in (before[0].goal, before[2].goal)
        after = world.step({slot: "look" for slot in range(4)})
        assert after[0].goal == after[1].goal == before[0].goal
        assert after[0].objects == after[1].objects == before[0].objects
        assert after[2].objects == anew.objects
        assert after[3].objects == before[3].objects
        assert before[0].objects != before[3].objects != anew.objects


def test_generated_games_of_each_type_are_solved(generated):
    train, ood = one_of_each_type(generated, "train"), one_of_each_type(generated, "ood")
    tasks = train[:3] + ood[3:]
    gold = [generated.gold(task) for task in tasks]
    assert all(4 <= len(plan) <= 50 for plan in gold)
    for now in replay(generated, tasks, gold):
        assert now.success and not now.invalid
    for now in replay(generated, tasks, [plan[:-1] for plan in gold]):
        assert not now.success


def test_a_hasty_demonstration_can_be_played_and_solves_only_tasks_without_a_verb(generated):
    tasks = one_of_each_type(generated, "train")
    whole = [useful_actions(generated.gold(task)) for task in tasks]
    plans = [hasty(plan) for plan in whole]
    for task, plan, full, now in zip(
        tasks, plans, whole, replay(generated, tasks, plans), strict=True
    ):
        left_out = [action for action in full if action not in plan]
        assert all(action.split()[0] in TASK_VERBS for action in left_out)
        assert not now.invalid
        assert now.success == (not left_out) == (task.name in SIMPLE)


def test_ood_rooms_and_goals_never_occur_in_training():
    games = {
        split: [generate(split, name, i) for name in ALFWORLD_TASKS for i in range(25)]
        for split in ("train", "iid", "ood")
    }
    of_split = {split: {game["room"] for game in games[split]} for split in games}
    assert not of_split["ood"] & (of_split["train"] | of_split["iid"])
    assert len(of_split["ood"]) == 20
    goals = {split: {game["goal"] for game in games[split]} for split in games}
    assert not goals["ood"] & (goals["train"] | goals["iid"])
    assert len(goals["ood"]) > 40 and len(goals["train"]) > 60
    problems = [game["pddl_problem"] for split in games for game in games[split]]
    assert len(set(problems)) == len(problems)


@pytest.mark.parametrize("kind", FURNITURE)
def test_ood_rooms_have_other_furniture_not_only_another_number(kind):
    training = rooms(kind)[:TRAIN_ROOMS]
    ood = rooms(kind)[TRAIN_ROOMS:]
    assert len(ood) == 5
    assert all(room not in training for room in ood)


GENERATE = """
import hashlib
from worlds.alfworld_generate import generate
games = [generate("ood", "pick_two_obj_and_place", i) for i in range(3)]
print(hashlib.sha256(repr(games).encode()).hexdigest())
"""


def test_a_generated_game_is_the_same_everywhere():
    outputs = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", GENERATE]
        outputs.add(subprocess.check_output(command, text=True, cwd=ROOT, env=environment))
    assert len(outputs) == 1
    assert len(outputs.pop()) == 65


@pytest.mark.parametrize(
    "text", [None, "fly away", "go to the fridge 1", "Look", "go to fridge 99", "", "reset"]
)
def test_what_is_not_admissible_costs_a_turn_and_is_not_sent(generated, text):
    task = one_of_each_type(generated, "train")[0]
    before = generated.reset([task])[0]
    after = generated.step({0: text})[0]
    assert after.invalid and not after.done
    assert after.reply == NOT_AN_ACTION
    assert after.objects == before.objects
    assert not generated.step({0: "look"})[0].invalid


def test_prompts_hold_what_is_needed_to_act(generated):
    task = one_of_each_type(generated, "train")[-1]
    assert task.name == "pick_two_obj_and_place"
    now, past = generated.reset([task])[0], []
    for action in generated.gold(task):
        compact = generated.compact_prompt(past, now)
        rules, state = generated.chat_prompt(past, now)
        chat = state["content"]
        assert now.goal in compact and now.goal in chat
        assert len(compact) < 500 and "left " in compact
        assert rules["content"].startswith(generated.chat_rules)
        assert action in chat and "help" not in chat
        # the last two turns, as the paper
        assert chat.count("Earlier observation: ") == min(len(past), 2)
        actions = [line for line in chat.splitlines() if line.startswith("Your action then: ")]
        assert actions == [f"Your action then: {action}" for _, action in past[-2:]]
        verb, _, rest = action.partition(" ")
        if verb == "take":
            # the agent saw it, and where
            thing, place = rest.split(" from ")
            assert f"{thing} in {place}" in compact
        if verb == "move":
            thing, _ = rest.split(" to ")
            assert f"have {thing}" in compact
            assert "You are carrying" in chat
        past.append((now, action))
        now = generated.step({0: action})[0]
    assert now.success


def test_the_compact_prompt_joins_the_numbers_of_a_kind():
    """The tiny policy in models/ was trained on prompts of this form."""
    names = ["drawer 1", "drawer 2", "desk 1", "drawer 4", "drawer 10"]
    assert ranges(names) == "drawer 1-2 4 10, desk 1"


def test_an_action_is_read_from_a_models_reply(generated):
    reply = "<think>so</think><action>Go To Desk 1</action>"
    assert generated.parse_chat(reply) == "go to desk 1"


def test_a_worker_that_dies_is_replaced_and_its_episodes_are_lost(gone):
    with ALFWorld(games="generated", workers=2) as world:
        zero, one = world.workers.workers
        tasks = world.tasks("train")[:2]
        first = world.reset(tasks)
        zero.process.kill()
        after = world.step({0: "look", 1: "look"})
        assert after[0] is None and after[1] is not None
        assert world.step({1: "inventory"})[1].reply.startswith("You are not carrying")
        assert world.reset(tasks) == first
        # before a reset: nothing is lost
        one.process.kill()
        one.process.wait()
        assert world.reset(tasks) == first
        world.prefetch(tasks)
        zero.process.kill()
        assert world.reset(tasks) == first
        # it hangs
        one.patience = 1
        os.kill(one.process.pid, signal.SIGSTOP)
        assert world.step({0: "look", 1: "look"})[1] is None
        pids = [zero.process.pid, one.process.pid]
    assert gone(pids, seconds=10)


def test_a_worker_runs_from_any_folder(monkeypatch):
    """Also from one whose files have the names of packages: worlds/alfworld.py."""
    monkeypatch.chdir(ROOT / "worlds")
    with ALFWorld(games="generated", workers=1) as world:
        assert world.reset(world.tasks("train")[:1])[0].goal


CHILD = """
import sys, time
from envs import ALFWorld
if __name__ == "__main__":
    with ALFWorld(games="generated", workers=2) as world:
        world.step({})
        print(*(worker.process.pid for worker in world.workers.workers), flush=True)
        if sys.argv[1] == "exception":
            raise RuntimeError("a bug")
        if sys.argv[1] == "loading":
            world.prefetch(world.tasks("iid"))
        while sys.argv[1] != "end":
            time.sleep(0.1)
"""


@pytest.mark.parametrize("how", ["end", "exception", "SIGINT", "SIGKILL", "loading"])
def test_no_process_is_left_behind(how, gone):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, how],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    pids = [int(pid) for pid in child.stdout.readline().split()]
    assert len(pids) == 2
    if how == "SIGINT":
        child.send_signal(signal.SIGINT)
    elif how in ("SIGKILL", "loading"):
        child.kill()
    child.communicate(timeout=30)
    assert gone(pids, seconds=10)


def refused(match, *arguments, **more):
    with pytest.raises(SetupError, match=match) as error:
        with ALFWorld(*arguments, workers=1, **more) as world:
            world.tasks("ood")
    assert len(str(error.value).splitlines()) == 1


def test_an_unknown_task_is_one_line():
    refused("unknown ALFWorld task 'boil'.*pick_heat", ("boil",))


def test_games_that_are_missing_are_one_line(tmp_path, monkeypatch, capsys):
    nowhere = tmp_path / "nowhere"
    monkeypatch.setenv("ALFWORLD_DATA", str(nowhere))
    for games in ("real", "auto"):
        refused("ALFWORLD_DATA is .*nowhere.*alfworld-download", games=games)
    assert not nowhere.exists()
    monkeypatch.delenv("ALFWORLD_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    refused("alfworld-download.*--games generated", games="real")
    with ALFWorld(workers=1) as world:
        assert world.games == "generated"
        assert "*generated* games" in capsys.readouterr().out
    folder = tmp_path / ".cache" / "alfworld" / "json_2.1.1"
    folder.mkdir(parents=True)
    refused("no ALFWorld games in .*valid_unseen.*alfworld-download")
    (folder / "valid_unseen" / "look_at_obj_in_light-Book-None-DeskLamp-302").mkdir(parents=True)
    refused("no game of type look_at_obj_in_light", ("look_at_obj_in_light",))


UNPLAYABLE = (
    "",
    "{}",
    '{"pddl_domain": "(define',
    '{"pddl_domain": "", "grammar": "", "pddl_problem": ""}',
    "[]",
)


def test_a_damaged_game_is_one_line_and_an_unsolvable_one_is_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    folder = (
        tmp_path / "json_2.1.1" / "valid_unseen" / "look_at_obj_in_light-Book-None-DeskLamp-302"
    )
    # the benchmark marks games to leave out as unsolvable
    for i, text in enumerate([*UNPLAYABLE, '{"solvable": false}']):
        trial = folder / f"trial{i}"
        trial.mkdir(parents=True)
        (trial / "game.tw-pddl").write_text(text)
    message = "^ALFWorld's game .*/game.tw-pddl can't be played.*damaged.*$"
    with ALFWorld(("look_at_obj_in_light",), workers=1) as world:
        *damaged, unsolvable = world.tasks("ood")
        assert len(damaged) == 5
        for task in damaged:
            with pytest.raises(SetupError, match=message):
                world.reset([task])
        assert world.reset([unsolvable]) == [None]


def test_listing_reads_no_game(tmp_path, monkeypatch):
    for i in range(3553):
        folder = f"{ALFWORLD_TASKS[i % 6]}-Mug-None-Shelf-{i}"
        trial = tmp_path / "json_2.1.1" / "train" / folder / "trial"
        trial.mkdir(parents=True)
        (trial / "game.tw-pddl").touch()
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    before = time.perf_counter()
    with ALFWorld(workers=1) as world:
        assert world.games == "real"
        assert len(world.tasks("train")) == 3553
    assert time.perf_counter() - before < 5
