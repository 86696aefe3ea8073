"""Break runs of train.py as a machine does, and see that nothing is lost.

    python -m tools.harass                  # every kind of run, 30 kills in all
    python -m tools.harass --kills 100      # more of them, at other moments with --seed

Each kind of run is killed at random moments and resumed until it ends; two processes resume it at
once; the disk is full at three of its writes. Each time its log and its model must be those of an
undisturbed run, but for the seconds, and none of its processes may be left. A simulator of a
ScienceWorld run is stopped: its episodes are lost, and the run must end by itself.

ScienceWorld lists things in the order of hash codes, which Java draws anew in each process. Here
all hash codes are the same, so that its runs can be compared too.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from support.loading import ROOT
from support.run_folder import is_new, read_log
from tools.sweep import end_with_the_sweep, positive

SMALL = "--tasks-per-step 2 --group-size 4 --eval-episodes 2 --eval-every 3"
KEYQUEST = f"--env keyquest --tasks short --steps 12 {SMALL}"
SCIENCEWORLD = f"--env scienceworld --steps 4 --turns 8 {SMALL}"
RUNS = {
    "keyquest grpo": KEYQUEST,
    "keyquest ppo": f"{KEYQUEST} --algo ppo",
    "scienceworld grpo": SCIENCEWORLD,
    "scienceworld ppo": f"{SCIENCEWORLD} --algo ppo",
}
# the file that is being written, and the bytes that there is room for
FULL = {"log.jsonl": 100, "checkpoint.pt": 30_000, "transcripts": 200}
# a simulator counts as dead after 120 s, so a run that takes as long as this has hung
PATIENCE = 1200


def begin(folder, flags):
    """Start a run, or go on with it, in a session of its own -> the process"""
    arguments = flags.split() if is_new(folder) else ["--resume"]
    return subprocess.Popen(
        [sys.executable, "train.py", *arguments, "--out", folder],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=end_with_the_sweep,
    )


def processes_of(session):
    """{id: name} of the processes of a session that have not ended."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                # the name is in brackets, and may hold anything
                name, _, rest = file.read().partition("(")[2].rpartition(")")
        except OSError:
            continue
        state, _, _, of, *_ = rest.split()
        if int(of) == session and state != "Z":
            found[int(pid)] = name
    return found


def leaves_nothing(process):
    """Raises AssertionError if a run that has ended leaves a process for ten seconds."""
    for _ in range(100):
        if not processes_of(process.pid):
            return
        time.sleep(0.1)
    raise AssertionError(f"processes are left: {processes_of(process.pid)}")


def wait_for(process, text):
    """Read what a run prints until a line has `text`."""
    assert any(text in line for line in process.stdout), f"it ended before it printed {text!r}"


def printed(process, status):
    """What a run still prints until it ends, with this exit status."""
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == status, output
    leaves_nothing(process)
    return output


def kill(process):
    process.kill()
    process.wait()
    process.stdout.close()
    leaves_nothing(process)


def rows(folder):
    """The log without what a clock measured."""
    timed = lambda name: name.startswith("seconds")
    return [{k: v for k, v in row.items() if not timed(k)} for row in read_log(folder)]


def result(folder):
    """The log and the weights of a run that came to its end."""
    with open(os.path.join(folder, "model", "model.safetensors"), "rb") as file:
        return rows(folder), file.read()


def finish(folder, flags):
    """Begin a run, or go on with it, until its end -> its result"""
    printed(begin(folder, flags), 0)
    return result(folder)


def killed(folder, flags, kills, rng, longest):
    """Kill runs so many times, each within `longest` seconds, and resume them -> their results"""
    results = []
    while kills:
        process = begin(folder, flags)
        # one of five is killed while it loads and starts its simulators
        if rng.random() < 0.8:
            wait_for(process, "writing to")
        try:
            process.wait(rng.uniform(0, longest))
        except subprocess.TimeoutExpired:
            kill(process)
            kills -= 1
            continue
        # it came to its end before the kill: kill another one
        printed(process, 0)
        results.append(result(folder))
        shutil.rmtree(folder)
    return [*results, finish(folder, flags)]


def fight(folder, flags):
    """Let two processes resume a killed run at once -> its result"""
    process = begin(folder, flags)
    wait_for(process, "step ")
    kill(process)
    both = [begin(folder, flags), begin(folder, flags)]
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1], outputs
    refused = outputs[codes.index(1)]
    assert refused.count("\n") == 1 and "another process is writing" in refused, refused
    for process in both:
        leaves_nothing(process)
    return result(folder)


def full_disk(folder, flags):
    """Let three writes fail, each in another step, and resume each time -> the run's result

    What is written beyond the largest size of a file fails as on a full disk.
    """
    for name, room in FULL.items():
        process = begin(folder, flags)
        wait_for(process, "step ")
        if name == "log.jsonl":
            # half of the next row
            room += os.path.getsize(os.path.join(folder, name))
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, room))
        error = printed(process, 1)
        assert f"could not write {folder}/{name}" in error.splitlines()[-1], error
    return finish(folder, flags)


def hung(folder, flags):
    """Stop a simulator in the middle of step 1 -> the log, which must have every step"""
    process = begin(folder, flags)
    wait_for(process, "step ")
    (row,) = read_log(folder)
    # most episodes of the next step are not over after a quarter of the seconds of this one
    time.sleep((row["seconds_generate"] + row["seconds_environment"]) / 4)
    java = [pid for pid, name in processes_of(process.pid).items() if name == "java"]
    os.kill(java[0], signal.SIGSTOP)
    printed(process, 0)
    return rows(folder)


def harass(name, kills, rng, folder):
    """All that is done to a kind of run -> a line for each; AssertionError if one fails."""
    flags, place = RUNS[name], lambda kind: os.path.join(folder, kind)
    expected = finish(place("undisturbed"), flags)
    longest = sum(row["seconds"] for row in read_log(place("undisturbed"))) / 2
    results = killed(place("killed"), flags, kills, rng, longest)
    assert all(result == expected for result in results), "a killed run differs"
    yield f"{kills} kills in {len(results)} runs, log and model equal"
    assert fight(place("fight"), flags) == expected, "a run that two resumed differs"
    yield "two resumed it at once, one was refused, log and model equal"
    assert full_disk(place("full"), flags) == expected, "after a full disk a run differs"
    yield f"a full disk at {', '.join(FULL)}, log and model equal"
    if flags == SCIENCEWORLD:
        log = hung(place("hung"), flags)
        lost = sum(row.get("lost", 0) for row in log)
        assert lost and len(log) == len(expected[0]), f"{lost} lost in {len(log)} steps"
        assert log[0] == expected[0][0], "the step before the stop differs"
        yield f"a simulator stopped, {lost} episodes lost, all {len(log)} steps there"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=positive, default=30, help="of all runs together")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    for number, name in enumerate(RUNS):
        kills = (args.kills + number) // len(RUNS)
        try:
            with tempfile.TemporaryDirectory() as folder:
                for line in harass(name, kills, rng, folder):
                    print(f"{name}: {line}; no process left", flush=True)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            sys.exit(f"harass.py: {name}: {error}")


if __name__ == "__main__":
    main()
