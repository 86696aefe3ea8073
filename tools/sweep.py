"""Run presets × seeds of train.py, one folder for each run, and print the tables.

    python -m tools.sweep tiny-grpo-plain tiny-grpo-epo --jobs 2 --out runs/sweep --steps 20

Flags that it does not know go to train.py. A finished run is skipped, a stopped one goes on, and a
run of other settings is refused. What a run prints is in FOLDER.txt. The columns of the tables:

before, after    success of the first and the last evaluation
Succ.*, Succ.    success of a run's best evaluation, and the mean of its last ones (--last)
std(ΔH̄), max H̄   how mean entropy changes from step to step, and its highest value (nats)

A number is the mean over the seeds ± its standard error; a / b is IID / OOD.
"""

import argparse
import ctypes
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import NamedTuple

from transformers import AutoConfig

from config import PRESETS, Config, check, parse_flags, resolve
from envs import world_class
from rollout import Policy
from support.loading import ROOT, made_for
from support.report import summary
from support.run_folder import SetupError, is_new, read_config, read_log

SPLITS = ("iid", "ood")
COLUMNS = {"before": "before", "after": "after", "best": "Succ.*", "last": "Succ."}
# the sweep decides these
OWN_FLAGS = {"preset", "seed", "resume", "evaluate"}
# they cannot change a result
MAY_DIFFER = {"preset", "out", "resume", "evaluate", "device", "tokens_per_batch"}
# from linux/prctl.h: the signal that a process gets when its parent ends
PR_SET_PDEATHSIG = 1


class Run(NamedTuple):
    preset: str
    seed: int
    folder: str


def finished(folder):
    """The rows of a run that came to its end; else []."""
    if is_new(folder):
        return []
    steps, rows = read_config(folder).get("steps"), read_log(folder)
    return rows if len(rows) - 1 == steps else []


def arguments_of(run, flags, given):
    """What train.py is to be given, None for a finished run. Raises SetupError: other settings."""
    cfg = Config(**{**PRESETS[run.preset], **given, "seed": run.seed, "out": run.folder})
    check(cfg)
    arguments = ["--seed", str(run.seed), "--out", run.folder, *flags]
    if is_new(run.folder):
        return ["--preset", run.preset, *arguments]
    refuse_other_settings(cfg, read_config(run.folder))
    return None if finished(run.folder) else ["--resume", *arguments]


def refuse_other_settings(cfg, saved):
    """Raises SetupError unless the run that is saved in cfg.out has the settings of cfg."""
    model = os.path.join(ROOT, "models", cfg.env) if cfg.model == "tiny" else cfg.model
    try:
        model_config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SetupError(f"model {cfg.model!r} cannot be loaded; see --model") from error
    compact = getattr(model_config, "prompt", "chat") == "compact"
    before = asdict(cfg)
    with redirect_stdout(None):
        policy = Policy(None, None, [], compact, made_for(model_config))
        resolve(cfg, policy, world_class(cfg.env).turns)
    for name, value in asdict(cfg).items():
        # earlier versions did not have every setting, and did not save all that was decided
        unknown = name not in saved or (before[name] is None and saved[name] is None)
        if name in MAY_DIFFER or unknown or value in ("auto", saved[name]):
            continue
        flag = "--" + name.replace("_", "-")
        raise SetupError(
            f"{cfg.out} has {flag} {saved[name]}, not {value}; give that flag, or another --out"
        )


def end_with_the_sweep():
    """Called in a new process: if the sweep is killed, the process is to get SIGTERM."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def launch(run, arguments):
    command = [sys.executable, os.path.join(ROOT, "train.py"), *arguments]
    with open(run.folder + ".txt", "a") as text:
        return subprocess.Popen(command, stdout=text, stderr=text, preexec_fn=end_with_the_sweep)


def run_all(waiting, jobs):
    """Run all of waiting, {Run: arguments}, `jobs` at a time. If the sweep is stopped, they are."""
    running = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = next(iter(waiting))
                running[run] = launch(run, waiting.pop(run))
            time.sleep(0.2)
            for run, process in list(running.items()):
                if process.poll() is not None:
                    del running[run]
                if process.returncode:
                    message = f"{run.folder} ended with status {process.returncode}"
                    print(f"sweep.py: {message}; see {run.folder}.txt", file=sys.stderr)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def spread(values, digits=2):
    """The mean ± its standard error as text; – if there is no value."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ±{statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def cell(seeds, name):
    """A cell IID / OOD. seeds: their summaries; name: a key of theirs, with {} for the split."""
    texts = [spread([numbers.get(name.format(split)) for numbers in seeds]) for split in SPLITS]
    return f"  {' / '.join(texts):>23}"


def print_tables(summaries):
    """summaries: {preset: the summary of each of its runs}."""
    titles = "".join(f"  {title:>23}" for title in COLUMNS.values())
    print(f"{'preset':24} seeds{titles}  std(ΔH̄)      max H̄")
    for preset, seeds in summaries.items():
        cells = "".join(cell(seeds, f"{{}}_{name}") for name in COLUMNS)
        jump = spread([numbers["jump"] for numbers in seeds], 3)
        highest = spread([numbers["highest"] for numbers in seeds])
        print(f"{preset:24} {len(seeds):5}{cells}  {jump}  {highest}")
    titles = "".join(f"  {preset:>23}" for preset in summaries)
    print(f"\n{'Succ. by task type':30}{titles}")
    keys = {key for seeds in summaries.values() for numbers in seeds for key in numbers}
    for task in sorted({key.split(" ", 1)[1] for key in keys if " " in key}):
        cells = "".join(cell(seeds, f"{{}} {task}") for seeds in summaries.values())
        print(f"{task:30}{cells}")


def positive(text):
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse():
    """-> the command line's arguments, and the flags for train.py"""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: parser.exit(2, f"sweep.py: {message}; see --help\n")
    parser.add_argument("presets", nargs="+", metavar="preset", help="a preset of config.py")
    parser.add_argument("--seeds", type=positive, default=3, help="how many: 0, 1, …")
    text = "runs at a time; each has one thread if there are several"
    parser.add_argument("--jobs", type=positive, default=1, help=text)
    text = "how many of the last evaluations make Succ."
    parser.add_argument("--last", type=positive, default=2, help=text)
    parser.add_argument("--out", default="runs/sweep", help="the folder of the run folders")
    args, flags = parser.parse_known_args()
    if unknown := [name for name in args.presets if name not in PRESETS]:
        parser.error(f"unknown preset {unknown[0]!r}; there are: {', '.join(PRESETS)}")
    return args, flags


def sweep(args, flags):
    """-> True if all runs are finished now"""
    given = parse_flags(flags, None)
    if own := OWN_FLAGS & given.keys():
        raise SetupError(f"leave out --{min(own)}: each run has its own")
    name = lambda preset, seed: os.path.join(args.out, f"{preset}-seed{seed}")
    presets = list(dict.fromkeys(args.presets))
    runs = [Run(p, seed, name(p, seed)) for seed in range(args.seeds) for p in presets]
    arguments = {run: arguments_of(run, flags, given) for run in runs}
    os.makedirs(args.out, exist_ok=True)
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    run_all({run: arguments[run] for run in runs if arguments[run]}, args.jobs)
    summaries = {preset: [] for preset in presets}
    for run in runs:
        if rows := finished(run.folder):
            summaries[run.preset].append(summary(rows, args.last))
    print_tables({preset: seeds for preset, seeds in summaries.items() if seeds})
    return all(len(seeds) == args.seeds for seeds in summaries.values())


def main():
    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        complete = sweep(*parse())
    except (SetupError, OSError) as error:
        sys.exit(f"sweep.py: {error}")
    except KeyboardInterrupt:
        sys.exit("sweep.py: stopped; the same command goes on from there")
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
