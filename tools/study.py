"""Studies: arms × seeds of train.py, declared as data; run, kept as tables, and compared.

    python -m tools.study run results/study/short.json --jobs 2    # what is missing of it
    python -m tools.study tables results/study/*confident.json

NAME.json is a `Study`. NAME.csv has a row a step: arm, seed and columns of the log, with four
digits; null is empty. Until it ends, a run is a folder in NAME.running/: a stopped study goes on.
"""

import csv
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import asdict
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap, sem, ttest_1samp

from config import decide, flag, parse_flags
from metrics import mean
from plot import read_study
from support import run_folder
from support.report import SPLITS, read_arguments
from support.run_folder import SetupError

# settings that runs of an arm need not share
OF_A_RUN = set("seed out resume device tokens_per_batch recompute".split())
# what is kept of a log; MORE is for figures, of the arms that they show and the first seed
COLUMNS = "step success score entropy corridor_low corridor_high above below invalid uniform "
COLUMNS += "first_entropy first_above rest_entropy rest_above iid_success ood_success "
COLUMNS += "entropy_coef seconds "
MORE = "kl beta loss policy_loss entropy_loss smoothing_loss entropy_by_turn"
# numbers of a run: of its evaluations, of all its steps (area: the mean success), and means of the
# last ten steps
AT_THE_END = "success invalid first_entropy rest_entropy first_above rest_above".split()
OUTCOMES = "iid_after ood_after after area highest jump".split() + AT_THE_END


class Study(NamedTuple):
    """A declaration. The first run adds `settings`, and each call that runs one its commit."""

    flags: str  # of all runs
    arms: dict  # {name: its flags}
    seeds: list  # the first, and the one after the last
    drawn: list = []  # arms that figures show
    comparisons: list = []  # "CLAIM OUTCOME ARM > BASELINE", or <
    settings: dict = {}  # {arm: what its flags come to}
    commits: list = []  # of the code

    def given(self, arm):
        return shlex.split(f"{self.flags} {self.arms[arm]}")


def load(at):
    """NAME.json -> Study. at: its path without the ending."""
    try:
        with open(f"{at}.json", encoding="utf-8") as file:
            study = Study(**json.load(file))
        # what is of another type raises an error
        wrong = [arm for arm in study.arms if "/" in arm or "--help" in study.given(arm)]
        wrong += [text for text in study.comparisons if len(text.split()) != 5]
        if wrong or not range(*study.seeds) or dict(study.settings) != study.settings:
            raise ValueError(f"{[*wrong, study.seeds][0]!r} is no arm, comparison or seeds")
        return study
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise run_folder.damaged(f"{at}.json", run_folder.one_line(error)) from error


def settle(at):
    """The study with the settings of all arms. Raises SetupError if its runs have other ones."""
    study = load(at)
    settings = dict(study.settings)
    for arm in study.arms:
        cfg = asdict(decide(parse_flags(study.given(arm))))
        new = {name: value for name, value in cfg.items() if name not in OF_A_RUN}
        old = settings.setdefault(arm, new)
        for name in sorted(new.keys() & old.keys() - OF_A_RUN):
            if new[name] != old[name]:
                values = f"{flag(name)} {old[name]}, not {new[name]}"
                raise SetupError(f"{arm} in {at}.csv has {values}; give the arm another name")
    git = "git rev-parse --short HEAD"
    done = subprocess.run(git, shell=True, cwd=run_folder.ROOT, capture_output=True, text=True)
    commits = list(dict.fromkeys([*study.commits, done.stdout.strip()]))
    return study._replace(settings=settings, commits=commits)


def finished(at):
    """The runs of a study as `read_study` has them; none where none is made yet."""
    return read_study(f"{at}.csv") if os.path.exists(f"{at}.csv") else {}


def run(at, jobs):
    """Make what is missing, all arms of a seed before the next seed -> how many runs failed."""
    study, working, failed = settle(at), f"{at}.running", 0
    os.makedirs(working, exist_ok=True)
    with run_folder.locked(working):
        table = {key: rows for key, (_, rows) in finished(at).items()}
        runs = [(arm, seed) for seed in range(*study.seeds) for arm in study.arms]
        missing = [key for key in runs if key not in table]
        if missing:
            run_folder.write_json(f"{at}.json", study._asdict())
        for arm, seed, folder, status in run_all(study, missing, working, jobs):
            ended = f"failed; see {folder}.txt" if status else "is done"
            print(f"{folder} {ended}", flush=True)
            failed += status != 0
            if status == 0:
                drawn = arm in study.drawn and seed == study.seeds[0]
                names = (COLUMNS + MORE if drawn else COLUMNS).split()
                rows = run_folder.read_log(folder)
                table[arm, seed] = [{name: row.get(name) for name in names} for row in rows]
                write_table(at, table)
                shutil.rmtree(folder)
    # what runs printed may go, and nothing of anyone else
    texts = [name for name in os.listdir(working) if "-seed" in name and name.endswith(".txt")]
    if set(os.listdir(working)) == {"lock", *texts}:
        shutil.rmtree(working)
    return failed


def run_all(study, missing, working, jobs):
    """Run train.py for each (arm, seed); yields (arm, seed, folder, exit status) when it ends."""
    running, one_thread = {}, {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        while missing or running:
            if missing and len(running) < jobs:
                arm, seed = missing.pop(0)
                folder = os.path.join(working, f"{arm}-seed{seed}")
                resume = [] if run_folder.is_new(folder) else ["--resume"]
                flags = [*study.given(arm), "--seed", str(seed), "--out", folder, *resume]
                command = [sys.executable, os.path.join(run_folder.ROOT, "train.py"), *flags]
                with open(f"{folder}.txt", "a") as text:
                    process = subprocess.Popen(command, stdout=text, stderr=text, env=one_thread)
                running[arm, seed, folder] = process
            time.sleep(0.1)
            for key, process in list(running.items()):
                if process.poll() is not None:
                    yield *key, running.pop(key).returncode
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


def write_table(at, table):
    """table: {(arm, seed): rows}"""
    found = {name for rows in table.values() for row in rows for name in row}
    columns = [name for name in (COLUMNS + MORE).split() if name in found]
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["arm", "seed", *columns])
    for key, rows in table.items():
        lines.writerows([*key, *[cell(row.get(name)) for name in columns]] for row in rows)
    run_folder.write_whole(f"{at}.csv", lambda file: file.write(text.getvalue().encode()))


def cell(value):
    if isinstance(value, list):
        return f"[{','.join(str(cell(item)) for item in value)}]"
    return f"{value:.4g}" if isinstance(value, float) else value


@cache
def outcomes(at):
    """{arm: {seed: {outcome: number or None}}} of a study's finished runs."""
    arms = {}
    for (arm, seed), (_, rows) in finished(at).items():
        steps, last = [row for row in rows if "entropy" in row], rows[-1]
        entropy = [row["entropy"] for row in steps]
        numbers = {name: mean(r[name] for r in steps[-10:] if name in r) for name in AT_THE_END}
        numbers |= {f"{split}_after": last.get(f"{split}_success") for split in SPLITS}
        both = [numbers["iid_after"], numbers["ood_after"]]
        numbers["after"] = None if None in both else mean(both)
        numbers["area"] = mean(row["success"] for row in steps)
        changes = np.diff(entropy).tolist()
        numbers |= {"highest": max(entropy), "jump": np.std(changes or [0.0])}
        arms.setdefault(arm, {})[seed] = numbers
    return arms


def arms_table(at):
    """Rows {column: text}: means over the seeds ± their standard errors."""
    for arm, runs in outcomes(at).items():
        row = {os.path.basename(at): arm, "seeds": len(runs)}
        for name in OUTCOMES:
            values = [numbers[name] for numbers in runs.values() if numbers[name] is not None]
            error = f" ±{sem(values):.3f}" if len(values) > 1 else ""
            row[name] = f"{np.mean(values):.3f}{error}" if values else "–"
        yield row


def compared(at):
    """Rows {column: value}: the comparisons, by seed, as an equal seed draws equal tasks."""
    study = load(at)
    for text in study.comparisons:
        claim, outcome, arm, relation, baseline = text.split()
        one, other = (outcomes(at).get(name, {}) for name in (arm, baseline))
        pairs = [(one[seed][outcome], other[seed][outcome]) for seed in one if seed in other]
        values = np.array([a - b for a, b in pairs if None not in (a, b)])
        if len(values) < 2:
            continue
        boot = bootstrap([values], np.mean, n_resamples=10_000, method="percentile", rng=0)
        low, high = boot.confidence_interval
        student = ttest_1samp(values, 0)
        t_low, t_high = student.confidence_interval()
        row = {"claim": claim, "study": os.path.basename(at), "outcome": outcome}
        row |= {"comparison": f"{arm} {relation} {baseline}", "seeds": len(values)}
        row |= {"mean": values.mean(), "low": low, "high": high}
        row |= {"t low": t_low, "t high": t_high, "p": student.pvalue}
        verdict = "holds" if (low > 0) == (relation == ">") else "fails"
        # of part of the seeds nothing is said; nan is not above or below anything
        whole = len(pairs) >= len(range(*study.seeds))
        row["verdict"] = verdict if whole and (low > 0 or high < 0) else "undecided"
        yield row


def tables(names):
    """The arms of each study, and all comparisons with Holm's p, as Markdown.

    Holm's correction counts what was declared, also where no run is made yet.
    """
    rows = [row for at in names for row in compared(at)]
    declared, highest = sum(len(load(at).comparisons) for at in names), 0.0
    for rank, row in enumerate(sorted(rows, key=lambda row: row["p"])):
        row["Holm"] = highest = max(highest, min(1.0, (declared - rank) * row["p"]))
    found = [list(arms_table(at)) for at in names] + [rows]
    return "\n".join(markdown(table) for table in found if table)


def markdown(rows):
    """Rows {column: value} as a table."""
    text = lambda value: f"{value:.3f}" if isinstance(value, float) else str(value)
    lines = [rows[0], ["---"] * len(rows[0]), *[map(text, row.values()) for row in rows]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "tables"))
    parser.add_argument("studies", nargs="+", metavar="NAME.json")
    parser.add_argument("--jobs", type=int, choices=range(1, 33), metavar="N", default=1)
    args = read_arguments(parser, "study.py")
    names = [name.removesuffix(".json") for name in args.studies]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = sum(run(at, args.jobs) for at in names) if args.command == "run" else 0
        print(tables(names), end="")
    except (SetupError, OSError) as error:
        sys.exit(f"study.py: {error}")
    except KeyboardInterrupt:
        sys.exit("study.py: stopped; the same command goes on from there")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
