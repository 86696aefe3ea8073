"""Run presets × seeds of train.py, one folder each, and print the table. What is finished is skipped, what was stopped goes on.

    python sweep.py tiny-grpo-plain tiny-grpo-epo --seeds 3 --jobs 2 --out results/sweep --steps 20

Flags that it doesn't know go to train.py. For runs that are finished it only prints the table:
before: success of the first evaluation. Succ.*: the best of a run's evaluations; Succ.: the mean of its last ones (--last).
Means over seeds ± standard error, as IID / OOD. std(ΔH̄): how much the mean entropy jumps from step to step.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor


def rows(folder):
    """The whole rows of a run's log; [] if there is none."""
    try:
        return [json.loads(line) for line in open(os.path.join(folder, "log.jsonl")) if line.endswith("\n")]
    except OSError:
        return []


def steps(folder):
    """How many steps a run is to have; None if it has not begun."""
    try:
        return json.load(open(os.path.join(folder, "config.json")))["steps"]
    except (OSError, ValueError):
        return None


def run(preset, seed, folder, more):
    """Run, or go on, or do nothing. -> the exit status"""
    log, wanted = rows(folder), steps(folder)
    if log and log[-1]["step"] == wanted:
        return 0
    arguments = ["--out", folder, "--resume"] if wanted else ["--preset", preset, "--seed", str(seed), "--out", folder, *more]
    with open(folder + ".txt", "a") as text:
        return subprocess.run([sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py"), *arguments],
                              stdout=text, stderr=text).returncode


def summary(log, last):
    """A finished run's numbers: {name: value}."""
    evaluations = [row for row in log if "iid_success" in row]
    entropy = [row["entropy"] for row in log if "entropy" in row]
    numbers = {"jump": statistics.pstdev(b - a for a, b in zip(entropy, entropy[1:])) if len(entropy) > 1 else 0.0}
    for split in ("iid", "ood"):
        success = [row[f"{split}_success"] for row in evaluations]
        numbers |= {f"{split}_before": success[0], f"{split}_best": max(success), f"{split}_last": statistics.mean(success[-last:])}
    return numbers


def spread(values):
    """mean ± standard error of the mean, as text."""
    error = f" ±{statistics.stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{error}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to this less one")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread if there are several")
    parser.add_argument("--last", type=int, default=2, help="how many of the last evaluations count as converged")
    parser.add_argument("--out", default="runs/sweep")
    args, more = parser.parse_known_args()
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    os.makedirs(args.out, exist_ok=True)
    runs = [(preset, seed, os.path.join(args.out, f"{preset}-seed{seed}")) for seed in range(args.seeds) for preset in args.presets]
    with ThreadPoolExecutor(args.jobs) as pool:
        for (_, _, folder), status in zip(runs, pool.map(lambda job: run(*job, more), runs)):
            if status:
                print(f"sweep.py: {folder} ended with status {status}; see {folder}.txt", file=sys.stderr)
    print(f"{'preset':24} seeds  {'before':>23}  {'Succ.*':>23}  {'Succ.':>23}  std(ΔH̄)")
    for preset in args.presets:
        found = [summary(log, args.last) for p, _, folder in runs if p == preset and (log := rows(folder)) and log[-1]["step"] == steps(folder)]
        if found:
            cells = ["{} / {}".format(*(spread([n[f"{split}_{name}"] for n in found]) for split in ("iid", "ood"))) for name in ("before", "best", "last")]
            print(f"{preset:24} {len(found):5}  " + "  ".join(f"{cell:>23}" for cell in cells) + f"  {spread([n['jump'] for n in found])}")
    sys.exit(any(not (log := rows(folder)) or log[-1]["step"] != steps(folder) for _, _, folder in runs))


if __name__ == "__main__":
    main()
