"""Run presets × seeds of train.py, one folder each, and print the table. What is finished is skipped, what was stopped goes on.

    python sweep.py tiny-grpo-plain tiny-grpo-epo --seeds 3 --jobs 2 --out results/sweep --steps 20

Flags that it doesn't know go to train.py. For runs that are finished it only prints the table:
before, after: success of the first and the last evaluation. Succ.*: the best of a run's evaluations; Succ.: the mean of its last
ones (--last), which a second table has by task type. Means over seeds ± standard error, as IID / OOD. std(ΔH̄): how much the mean
entropy jumps from step to step; max H̄: the highest it gets, nats.
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


def finished(folder):
    """The rows of a run that came to its end; else []."""
    log = rows(folder)
    return log if log and log[-1]["step"] == steps(folder) else []


def run(preset, seed, folder, more):
    """Run, or go on, or do nothing. -> the exit status"""
    if finished(folder):
        return 0
    arguments = ["--out", folder, "--resume"] if steps(folder) else ["--preset", preset, "--seed", str(seed), "--out", folder, *more]
    with open(folder + ".txt", "a") as text:
        return subprocess.run([sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py"), *arguments],
                              stdout=text, stderr=text).returncode


def summary(log, last):
    """A finished run's numbers: {name: value}."""
    evaluations = [row for row in log if "iid_success" in row]
    entropy = [row["entropy"] for row in log if "entropy" in row]
    numbers = {"jump": statistics.pstdev(b - a for a, b in zip(entropy, entropy[1:])) if len(entropy) > 1 else 0.0, "highest": max(entropy, default=0.0)}
    for split in ("iid", "ood"):
        success = [row[f"{split}_success"] for row in evaluations]
        numbers |= {f"{split}_before": success[0], f"{split}_after": success[-1], f"{split}_best": max(success),
                    f"{split}_last": statistics.mean(success[-last:])}
        by_task = [row[f"{split}_by_task"] for row in evaluations[-last:]]
        numbers |= {f"{split} {name}": statistics.mean(row[name] for row in by_task if name in row) for name in {n for row in by_task for n in row}}
    return numbers


def spread(values, digits=2):
    """mean ± standard error of the mean, as text; – if there is none."""
    if not values:
        return "–"
    error = f" ±{statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{error}"


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
    done = {folder: summary(log, args.last) for _, _, folder in runs if (log := finished(folder))}
    found = {preset: [done[folder] for p, _, folder in runs if p == preset and folder in done] for preset in args.presets}
    found = {preset: numbers for preset, numbers in found.items() if numbers}
    cell = lambda numbers, form: "{:>23}".format(" / ".join(spread([n[form.format(split)] for n in numbers if form.format(split) in n]) for split in ("iid", "ood")))
    print(f"{'preset':24} seeds" + "".join(f"  {name:>23}" for name in ("before", "after", "Succ.*", "Succ.")) + "  std(ΔH̄)      max H̄")
    for preset, numbers in found.items():
        print(f"{preset:24} {len(numbers):5}  " + "  ".join(cell(numbers, f"{{}}_{name}") for name in ("before", "after", "best", "last"))
              + f"  {spread([n['jump'] for n in numbers], 3)}  {spread([n['highest'] for n in numbers])}")
    print(f"\n{'Succ. by task type':24}      " + "".join(f"  {preset:>23}" for preset in found))
    for name in sorted({key[4:] for numbers in found.values() for n in numbers for key in n if " " in key}):
        print(f"{name:30}" + "".join("  " + cell(numbers, f"{{}} {name}") for numbers in found.values()))
    sys.exit(len(done) < len(runs))


if __name__ == "__main__":
    main()
