"""ALFWorld: the fast engine against the stock one, real and generated games, worker processes, bad
input. The real games are looked for in $ALFWORLD_DATA, then in ../shared/alfworld."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from config import decide
from envs import NOT_AN_ACTION
from support.run_folder import ROOT, SetupError
from worlds.alfworld import ALFWORLD_TASKS, ALFWorld, hasty, ranges, remembered, useful_actions
from worlds.alfworld_generate import FURNITURE, TRAIN_ROOMS, generate, rooms
from worlds.alfworld_workers import require_packages

try:
    require_packages()
except SetupError as error:
    pytest.skip(str(error), allow_module_level=True)

PLACES = (os.environ.get("ALFWORLD_DATA"), Path(ROOT).parent / "shared" / "alfworld")
DATA = next((p for p in PLACES if p and os.path.isdir(os.path.join(p, "json_2.1.1"))), None)


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
    # workers also start in a folder whose files have the names of packages: worlds/alfworld.py
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(os.path.join(ROOT, "worlds"))
        world = ALFWorld(games="generated", workers=2)
    with world:
        yield world


def one_of_each_type(world, split):
    tasks = world.tasks(split)
    return [next(task for task in tasks if task.name == name) for name in ALFWORLD_TASKS]


PLAY = """
import json, random, sys
from worlds import alfworld_engine

# read now: loading a game overwrites sys.argv
file, engine = sys.argv[1:]
if engine == "fast":
    alfworld_engine.speed_up()
env, rng = alfworld_engine.make_env(), random.Random(0)
env.load(file)
for commands in (json.load(open(file))["walkthrough"][:5], [None] * 5):
    state = env.reset()
    for command in commands:
        print(state.feedback, state["admissible_commands"], state["won"])
        state, *_ = env.step(command or rng.choice(state["admissible_commands"]))
"""


def test_observations_and_commands_are_those_of_the_stock_engine(real, tmp_path):
    file = f"{os.path.abspath(real.folder)}/{real.tasks('ood')[70].variation}/game.tw-pddl"
    environment = {**os.environ, "PYTHONPATH": ROOT, "ALFWORLD_DATA": str(tmp_path)}
    commands = [[sys.executable, "-c", PLAY, file, engine] for engine in ("fast", "stock")]
    fast, stock = [subprocess.check_output(command, env=environment) for command in commands]
    assert fast == stock
    assert fast.count(b"Your task is to: ") == 2


def test_splits_are_those_of_the_benchmark(real):
    assert [len(real.tasks(split)) for split in ("iid", "ood")] == [140, 134]
    for split in ("train", "iid", "ood"):
        assert {task.name for task in real.tasks(split)} == set(ALFWORLD_TASKS)


@pytest.mark.parametrize("games", ["real", "generated"])
def test_walkthroughs_solve_their_games_also_when_cleaned(games, request):
    world = request.getfixturevalue(games)
    tasks = one_of_each_type(world, "train")[:3] + one_of_each_type(world, "ood")[3:]
    gold = [world.workers.walkthrough(world.game_of(task)) for task in tasks]
    assert all(4 <= len(plan) <= 50 for plan in gold)
    for now, _ in world.play(tasks, gold):
        assert now.success and now.done and now.score == 100 and not now.invalid
    for now, _ in world.play(tasks, [plan[:-1] for plan in gold]):
        assert not now.success and not now.done and now.score == 0
    played = [[action for _, action in past] for past in world.solutions(tasks)]
    assert played == [useful_actions(plan) for plan in gold]


def test_a_hasty_demonstration_can_be_played_and_solves_only_tasks_without_a_verb(generated):
    tasks = one_of_each_type(generated, "train")
    whole = [generated.gold(task) for task in tasks]
    played = generated.play(tasks, [hasty(plan) for plan in whole])
    for task, full, (now, _) in zip(tasks, whole, played, strict=True):
        # these ask for nothing but to put things somewhere
        simple = task.name in ("pick_and_place_simple", "pick_two_obj_and_place")
        assert not now.invalid and now.success == (hasty(full) == full) == simple


def test_members_of_a_group_start_alike_and_play_apart(generated):
    task, other, *_ = one_of_each_type(generated, "iid")
    first, second, third = generated.reset([task] * 3)
    assert first == second == third
    command = next(c for c in first.objects if c.startswith("go to "))
    after = generated.step({0: command, 2: None})
    assert after[0].reply.startswith("You arrive at") and after[2].reply == NOT_AN_ACTION
    assert generated.step({1: command})[1] == after[0]
    # an episode that starts anew leaves those beside it alone
    generated.last[1] = generated.start(1, other)
    before = dict(generated.last)
    assert before[1].goal != first.goal
    for slot, now in generated.step(dict.fromkeys(range(3), "look")).items():
        assert (now.goal, now.objects) == (before[slot].goal, before[slot].objects)
    for prefetched in (task, other):
        generated.prefetch([prefetched])
        assert generated.reset([task]) == [first]
    # also in a slot that an earlier reset had used, and while others are loaded
    generated.reset([task, other, task])
    generated.reset([task] * 2)
    assert generated.start(2, other) == before[1]
    assert generated.step({1: command})[1] == after[0]
    generated.prefetch([task])
    assert generated.start(0, other) == before[1]


def test_ood_rooms_and_goals_never_occur_in_training():
    numbers = [(name, i) for name in ALFWORLD_TASKS for i in range(25)]
    games = {split: [generate(split, *n) for n in numbers] for split in ("train", "iid", "ood")}
    for what, least in (("room", 20), ("goal", 41)):
        train, iid, ood = [{game[what] for game in games[split]} for split in games]
        assert not ood & (train | iid) and len(ood) >= least
    problems = [game["pddl_problem"] for split in games for game in games[split]]
    assert len(set(problems)) == len(problems) == 450
    for kind in FURNITURE:
        # not only another number: other furniture
        assert not [room for room in rooms(kind)[TRAIN_ROOMS:] if room in rooms(kind)[:TRAIN_ROOMS]]


def test_a_generated_game_is_the_same_everywhere():
    game = ("ood", "pick_two_obj_and_place", 1)
    code = f"from worlds.alfworld_generate import generate; print(generate(*{game}))"
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT, env=env)
    assert printed == f"{generate(*game)}\n"


@pytest.mark.parametrize("text", [None, "fly away", "go to fridge 99", "Look", "", "reset"])
def test_what_is_not_admissible_costs_a_turn_and_is_not_sent(generated, text):
    before = generated.reset(generated.tasks("train")[:1])[0]
    after = generated.step({0: text})[0]
    assert after.invalid and not after.done
    assert (after.reply, after.objects) == (NOT_AN_ACTION, before.objects)
    assert not generated.step({0: "look"})[0].invalid


def test_prompts_hold_what_is_needed_to_act(generated):
    task = one_of_each_type(generated, "train")[-1]
    now, past = generated.reset([task])[0], []
    for action in generated.gold(task):
        compact = generated.compact_prompt(past, now)
        rules, state = generated.chat_prompt(past, now)
        assert now.goal in compact and now.goal in state
        assert len(compact) < 500 and "left " in compact
        assert rules.startswith(generated.chat_rules) and action in state and "help" not in state
        # the last two turns, as the paper
        actions = [line for line in state.splitlines() if line.startswith("Your action then: ")]
        assert actions == [f"Your action then: {action}" for _, action in past[-2:]]
        verb, _, rest = action.partition(" ")
        if verb == "take":
            # the agent saw it, and where
            thing, place = rest.split(" from ")
            assert f"{thing} in {place}" in compact
        if verb == "move":
            thing, _ = rest.split(" to ")
            assert f"have {thing}" in compact and "You are carrying" in state
        past.append((now, action))
        now = generated.step({0: action})[0]
    assert now.success
    # the tiny policy in models/ was trained on this form
    names = ["drawer 1", "drawer 2", "desk 1", "drawer 4", "drawer 10"]
    assert ranges(names) == "drawer 1-2 4 10, desk 1"
    reply = "<think>so</think><action>Go To Desk 1</action>"
    assert generated.parse_chat(reply) == "go to desk 1"


def test_a_worker_that_dies_or_hangs_is_replaced(generated, monkeypatch):
    zero, one = generated.workers.workers
    tasks = generated.tasks("train")[:2]
    first = generated.reset(tasks)
    zero.process.kill()
    after = generated.step({0: "look", 1: "look"})
    assert after[0] is None and after[1] is not None
    assert generated.step({1: "inventory"})[1].reply.startswith("You are not carrying")
    # before a reset: nothing is lost
    one.process.kill()
    one.process.wait()
    generated.prefetch(tasks)
    zero.process.kill()
    assert generated.reset(tasks) == first
    monkeypatch.setattr(one, "patience", 1)
    os.kill(one.process.pid, signal.SIGSTOP)
    assert generated.step({1: "look"})[1] is None


# the second is that of games made before alfworld 0.4
@pytest.mark.parametrize("way", ["move the mug 1 to", "put the mug 1 in/on"])
def test_what_was_put_down_is_no_longer_carried(generated, way):
    replies = ["You pick up the mug 1 from the desk 1.", f"You {way} the shelf 2."]
    now = generated.reset(generated.tasks("train")[:1])[0]
    now, then = [now := generated.observe(now, (reply, (), False)) for reply in replies]
    assert (now.inventory, then.inventory) == (
        "You are carrying: a mug 1.",
        "You are not carrying anything.",
    )
    assert remembered(replies)[0] == {"desk 1": [], "shelf 2": ["mug 1"]}


LAMP = "look_at_obj_in_light"
GAME = f"json_2.1.1/valid_unseen/{LAMP}-Book-None-DeskLamp-302"
# ALFWORLD_DATA, a folder that is there, what is asked for, what the line says
MISSING = [
    (None, "", {"names": ("boil",)}, "unknown ALFWorld task 'boil'.*pick_heat"),
    ("nowhere", "", {"games": "real"}, "ALFWORLD_DATA is .*nowhere.*alfworld-download"),
    ("nowhere", "", {}, "ALFWORLD_DATA is .*nowhere.*alfworld-download"),
    (None, "", {"games": "real"}, "alfworld-download.*--games generated"),
    (None, "json_2.1.1/train", {}, "valid_unseen has no game of type.*alfworld-download"),
    (None, GAME, {"names": (LAMP,)}, f"no game of type {LAMP}"),
]


@pytest.mark.parametrize("data, folder, asked, line", MISSING)
def test_games_that_are_missing_are_one_line(data, folder, asked, line, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ALFWORLD_DATA", data or "")
    (tmp_path / ".cache" / "alfworld" / folder).mkdir(parents=True)
    with pytest.raises(SetupError, match=f"^.*{line}.*$"):
        with ALFWorld(workers=1, **asked) as world:
            world.tasks("ood")


@pytest.mark.parametrize("minor, line", [(13, "needs Python 3.11 or 3.12"), (12, "pip install")])
def test_without_its_packages_a_line_says_which_python_it_needs(minor, line, monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_downward", None)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", (3, minor, 0, "final", 0))
        with pytest.raises(SetupError, match=f"^ALFWorld.*{line}.*$"):
            ALFWorld.asks({})


def test_auto_is_generated_games_where_there_are_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    cfg = decide({"env": "alfworld"})
    with ALFWorld.from_config(cfg, compact=True) as world:
        assert cfg.games == world.games == "generated"
    assert "*generated* games" in capsys.readouterr().out


def test_a_damaged_game_is_one_line_and_an_unsolvable_one_is_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    empty = '{"pddl_domain": "", "grammar": "", "pddl_problem": ""}'
    # the benchmark marks games to leave out as unsolvable
    marked = '{"solvable": false}'
    game = generate("train", LAMP, 0)
    aimless = json.dumps({**game, "grammar": game["grammar"].replace("#look.feedback#", "Hi!")})
    for i, text in enumerate(["", "{}", "[]", '{"pddl_domain": "(define', empty, aimless, marked]):
        trial = tmp_path / GAME / f"trial{i}"
        trial.mkdir(parents=True)
        (trial / "game.tw-pddl").write_text(text)
    line = "^ALFWorld's game .*/game.tw-pddl can't be played.*damaged.*$"
    with ALFWorld((LAMP,), workers=1) as world:
        # to list them reads no game
        *damaged, unsolvable = world.tasks("ood")
        for task in damaged:
            with pytest.raises(SetupError, match=line):
                world.reset([task])
        assert world.reset([unsolvable]) == [None]
