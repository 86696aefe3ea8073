"""Break runs of train.py as a machine does, and see that nothing is lost.

    python -m tools.harass                  # 30 kills and 6 fights for a folder
    python -m tools.harass keyquest-grpo    # one kind of run

Runs are killed at random moments and resumed until they end; then two processes resume one stopped
run at once. Each time the log must be that of an undisturbed run, but for the seconds, and no
process may be left. ScienceWorld's simulator has some randomness of its own, so that two
undisturbed runs differ too: there all rows must be there, and both differences are printed.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from support.loading import ROOT
from support.run_folder import is_new, read_log
from tools.sweep import positive

SMALL = "--tasks-per-step 2 --group-size 4 --eval-episodes 2 --eval-every 3"
RUNS = {
    "keyquest-grpo": f"--env keyquest --tasks short --steps 12 {SMALL}",
    "keyquest-ppo": f"--env keyquest --tasks short --steps 12 --algo ppo {SMALL}",
    "scienceworld-grpo": f"--env scienceworld --steps 3 {SMALL}",
}


def begin(folder, flags):
    """Start a run, or go on with it, in a session of its own -> the process"""
    arguments = flags.split() if is_new(folder) else ["--resume"]
    command = [sys.executable, "train.py", *arguments, "--out", folder]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **out)


def left_behind(process):
    """The processes of its session that still live, after they had time to end."""
    for _ in range(100):
        living = map(int, filter(str.isdigit, os.listdir("/proc")))
        session = [pid for pid in living if session_of(pid) == process.pid]
        if not session:
            return []
        time.sleep(0.1)
    return session


def session_of(pid):
    """The session of a process; None if it ended, also if nobody has waited for it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            # the name before may hold anything
            state, _, _, session, *_ = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else int(session)


def rows(folder):
    """The log without what a clock measured."""
    return [
        {name: value for name, value in row.items() if not name.startswith("seconds")}
        for row in read_log(folder)
    ]


def await_first_step(process):
    """Read what a run prints until its simulators and its model are there."""
    assert any("writing to" in line for line in iter(process.stdout.readline, ""))


def undisturbed(folder, flags):
    """-> the log of a whole run, and the seconds that its steps took"""
    process = begin(folder, flags)
    await_first_step(process)
    begun = time.perf_counter()
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return rows(folder), time.perf_counter() - begun


def killed(folder, flags, kills, rng, longest):
    """Kill a run `kills` times within so many seconds, resume it each time, let it end -> logs"""
    logs = []
    while kills:
        process = begin(folder, flags)
        await_first_step(process)
        try:
            process.wait(rng.uniform(0, longest))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills -= 1
        process.stdout.close()
        assert not left_behind(process), f"processes are left of {folder}"
        if process.returncode == 0:
            # it ended before the kill: kill another one
            logs.append(rows(folder))
            shutil.rmtree(folder)
        else:
            assert process.returncode == -signal.SIGKILL, process.returncode
    return [*logs, undisturbed(folder, flags)[0]]


def fight(folder, flags):
    """Stop a run, let two processes resume it at once -> its log; one of them must be refused."""
    process = begin(folder, flags)
    while not os.path.exists(os.path.join(folder, "checkpoint.pt")):
        time.sleep(0.05)
    process.terminate()
    process.communicate()
    both = [begin(folder, flags), begin(folder, flags)]
    outputs = [process.communicate()[0] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes == [0, 1], outputs
    refused = next(text for process, text in zip(both, outputs, strict=True) if process.returncode)
    assert refused.count("\n") == 1 and "another process is writing" in refused, refused
    assert not any(map(left_behind, both))
    return rows(folder)


def difference(log, expected):
    """The largest difference of a number in two logs, which must have the same rows and metrics."""
    assert [row.keys() for row in log] == [row.keys() for row in expected]
    pairs = [
        (row[name], other[name])
        for row, other in zip(log, expected, strict=True)
        for name in row
        if isinstance(row[name], (int, float))
    ]
    return max(abs(a - b) for a, b in pairs)


def harass(name, kills, fights, seed):
    """All that is done to one kind of run. -> a line of what came out"""
    rng, flags = random.Random(f"{seed} {name}"), RUNS[name] + f" --seed {seed}"
    with tempfile.TemporaryDirectory() as folder:
        place = lambda kind: os.path.join(folder, kind)
        expected, seconds = undisturbed(place("undisturbed"), flags)
        again, _ = undisturbed(place("again"), flags)
        noise = difference(again, expected)
        logs = killed(place("killed"), flags, kills, rng, seconds / 2)
        logs += [fight(place(f"fight{number}"), flags) for number in range(fights)]
        largest = max(difference(log, expected) for log in logs)
    assert largest == 0 or noise > 0, f"{name}: the logs differ by {largest}"
    return (
        f"{name}: {kills} kills and {fights} fights, {len(logs)} logs with all rows; largest "
        f"difference from the undisturbed run {largest:.2g}, of two undisturbed ones {noise:.2g}; "
        "no process left"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", choices=[*RUNS, []], help=", ".join(RUNS))
    parser.add_argument("--kills", type=positive, default=10, help="of each kind of run")
    parser.add_argument("--fights", type=positive, default=2, help="of each kind of run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.runs or RUNS:
        try:
            print(harass(name, args.kills, args.fights, args.seed), flush=True)
        except AssertionError as error:
            sys.exit(f"harass.py: {name}: {error}")


if __name__ == "__main__":
    main()
