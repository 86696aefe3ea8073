"""How the benchmarks measure seconds and memory, and print it."""

import json
import os
import subprocess
import sys
import time

import torch

from support.loading import ROOT

clock = time.perf_counter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def timed(work):
    """-> the seconds that work() takes, its result"""
    begin = clock()
    result = work()
    return clock() - begin, result


def pss(pids):
    """Memory of processes in MB; shared pages are divided among those that share them (Linux)."""
    kilobytes = 0
    for pid in pids:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            kilobytes += next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return kilobytes / 1024


def descendants(name):
    """Ids of the processes below this one whose command begins with `name`."""
    ps = subprocess.run(["ps", "-eo", "pid=,ppid=,comm="], capture_output=True, text=True)
    children = {}
    for line in ps.stdout.splitlines():
        pid, parent, command = line.split(None, 2)
        children.setdefault(int(parent), []).append((int(pid), command))
    named, below = set(), [os.getpid()]
    while below:
        for pid, command in children.get(below.pop(), []):
            below.append(pid)
            if command.startswith(name):
                named.add(pid)
    return named


def memory_used(peak=False):
    """Memory of this process in MB, now or at its peak: on the GPU, else as Linux tells it."""
    if DEVICE == "cuda":
        used = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return used() / 2**20
    name = "VmHWM" if peak else "VmRSS"
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024


def forget_peak():
    if DEVICE == "cuda":
        return torch.cuda.reset_peak_memory_stats()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def alone(function, *arguments):
    """What a function of tools/bench.py returns in a process of its own; None if it fails.

    There no other work takes memory.
    """
    command = [sys.executable, "-m", "tools.bench", "--once", function, json.dumps(arguments)]
    # malloc is to give back at once what is freed
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if result.returncode == 0:
        return json.loads(result.stdout)
    lines = result.stderr.strip().splitlines() or ["it was killed: too little memory?"]
    print(f"{function} {arguments}: left out ({lines[-1][:100]})")


def table(title, rows):
    """Print rows of {column: value}, numbers with three digits. -> rows"""
    if not rows:
        print(f"\n{title}: left out")
        return rows
    cells = [list(rows[0])]
    for row in rows:
        cells.append([f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    return rows
