"""The study of docs/protocol.md: run its arms, and say which of its claims hold.

    python -m tools.study run short coin --jobs 2     # what is missing; a stopped run goes on
    python -m tools.study claims                      # the table, and figures/claims.png

A run leaves config.json and log.jsonl in results/study/WORLD/ARM-seedN. An outcome is a number of a
run. A claim compares an outcome of two arms, seed by seed; its interval is a bootstrap over seeds.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from typing import NamedTuple

import numpy as np

from config import Config, parse_flags
from support import report
from support.loading import ROOT
from support.run_folder import SetupError, is_new, read_config, read_log, write_whole
from tools.sweep import end_with_the_sweep, finished, positive, refuse_other_settings

FOLDER = os.path.join(ROOT, "results", "study")
FIGURE = os.path.join(ROOT, "figures", "claims.png")

# ---- The protocol: worlds, arms, seeds, claims

FEW = "--eval-episodes 36"
KEYQUEST = f"--env keyquest --eval-every 60 {FEW} --max-tokens 4"
HIGH = f"{FEW} --lr 1e-3 --kl-coef 0.01"
# small enough for the caches of a CPU; it cannot change a gradient
SMALL = "--tokens-per-batch 2500"
FIRST_SEED = 100
# flags of all runs of a world, the first seed, the number of seeds
WORLDS = {
    "short": (f"{KEYQUEST} --tasks short --steps 40", FIRST_SEED, 20),
    "coin": (
        f"{KEYQUEST} --tasks coin --reward score --steps 60 --turns 24 --group-size 4 "
        "--lr 3e-3 --kl-coef 0.01",
        FIRST_SEED,
        20,
    ),
    "scienceworld": (
        f"--env scienceworld --steps 24 --eval-every 24 {HIGH} {SMALL}",
        FIRST_SEED,
        8,
    ),
    "alfworld": (
        f"--env alfworld --games generated --steps 24 --eval-every 24 {FEW} {SMALL}",
        FIRST_SEED,
        5,
    ),
}
PLAIN = "--entropy-coef 0 --smoothing off"
BASE = "--smoothing off --entropy-coef"
# κ_l 0, κ_r 2 and γ 3 are the defaults, which are the paper's
EPO = "--entropy-coef"
# of KeyQuest: the two λ of a task type, and the published α
LAMBDAS = {"short": (0.01, 0.1), "coin": (0.01, 0.03)}
PAPER_ALPHA = 0.05


def keyquest_arms(world):
    arms = {}
    for algo in ("grpo", "ppo"):
        arms[f"{algo}-plain"] = f"--algo {algo} {PLAIN}"
        for coefficient in LAMBDAS[world]:
            name = f"{algo}-{{}}-{coefficient}"
            arms[name.format("base")] = f"--algo {algo} {BASE} {coefficient}"
            for alpha in (PAPER_ALPHA, 3):
                flags = f"--algo {algo} {EPO} {coefficient} --alpha {alpha}"
                arms[name.format(f"epo{alpha}")] = flags
    return arms


ARMS = {world: keyquest_arms(world) for world in LAMBDAS}
ARMS["scienceworld"] = {
    "grpo-plain": PLAIN,
    "grpo-base-0.02": f"{BASE} 0.02",
    "grpo-epo0.05-0.001": f"{EPO} 0.001 --alpha 0.05",
    "grpo-epo3-0.02": f"{EPO} 0.02 --alpha 3",
    "ppo-plain": f"--algo ppo {PLAIN}",
    "ppo-epo0.05-0.001": f"--algo ppo {EPO} 0.001 --alpha 0.05",
}
ARMS["alfworld"] = {
    "grpo-plain": PLAIN,
    "grpo-epo0.1-0.001": f"{EPO} 0.001 --alpha 0.1",
    "grpo-epo3-0.02": f"{EPO} 0.02 --alpha 3",
}
# Arms of our variant, the corridor around turns. Claim 7 failed on short and on coin, so its option
# went, as the protocol says; commit 36c03f6 has it. The arm of ScienceWorld was not run.
GONE = {
    "short": "grpo-turn3-0.1",
    "coin": "grpo-turn3-0.03",
    "scienceworld": "grpo-turn3-0.02",
    "alfworld": None,
}


class Claim(NamedTuple):
    """`arm` has more (sign 1) or less (sign -1) of an outcome than `baseline`."""

    number: int
    world: str
    outcome: str
    arm: str
    baseline: str
    sign: int


def keyquest_claims(world):
    claims = []
    for algo in ("grpo", "ppo"):
        plain = f"{algo}-plain"
        for coefficient in LAMBDAS[world]:
            base = f"{algo}-base-{coefficient}"
            published = f"{algo}-epo{PAPER_ALPHA}-{coefficient}"
            strong = f"{algo}-epo3-{coefficient}"
            claims.append(Claim(1, world, "success", published, plain, 1))
            claims.append(Claim(2, world, "success", strong, plain, 1))
            claims.append(Claim(3, world, "success", base, plain, -1))
            for number, arm in ((4, published), (5, strong)):
                claims.append(Claim(number, world, "highest", arm, base, -1))
                claims.append(Claim(number, world, "jump", arm, base, -1))
    strong = LAMBDAS[world][1]
    claims.append(Claim(7, world, "success", f"grpo-turn3-{strong}", f"grpo-epo3-{strong}", 1))
    return claims


CLAIMS = keyquest_claims("short") + keyquest_claims("coin")
CLAIMS += [
    Claim(1, "scienceworld", "success", "grpo-epo0.05-0.001", "grpo-plain", 1),
    Claim(1, "scienceworld", "success", "ppo-epo0.05-0.001", "ppo-plain", 1),
    Claim(1, "alfworld", "success", "grpo-epo0.1-0.001", "grpo-plain", 1),
    Claim(2, "scienceworld", "success", "grpo-epo3-0.02", "grpo-plain", 1),
    Claim(2, "alfworld", "success", "grpo-epo3-0.02", "grpo-plain", 1),
    Claim(7, "scienceworld", "success", "grpo-turn3-0.02", "grpo-epo3-0.02", 1),
    Claim(8, "scienceworld", "success", "grpo-epo3-0.02", "grpo-base-0.02", 1),
]
for outcome in ("highest", "jump"):
    CLAIMS += [
        Claim(5, "scienceworld", outcome, "grpo-epo3-0.02", "grpo-base-0.02", -1),
        Claim(6, "scienceworld", outcome, "grpo-epo0.05-0.001", "grpo-plain", -1),
        Claim(6, "scienceworld", outcome, "grpo-epo3-0.02", "grpo-plain", -1),
        Claim(6, "scienceworld", outcome, "ppo-epo0.05-0.001", "ppo-plain", -1),
        Claim(6, "alfworld", outcome, "grpo-epo0.1-0.001", "grpo-plain", -1),
        Claim(6, "alfworld", outcome, "grpo-epo3-0.02", "grpo-plain", -1),
    ]
SENTENCES = {
    1: "EPO as published wins more than plain",
    2: "EPO with α 3 wins more than plain",
    3: "the bonus alone wins less than plain",
    4: "EPO as published: lower, steadier entropy than the bonus alone",
    5: "EPO with α 3: lower, steadier entropy than the bonus alone",
    6: "EPO: lower, steadier entropy than plain",
    7: "a corridor around turns wins more than one around tokens",
    8: "EPO with α 3 wins more than the bonus alone",
}
OUTCOMES = {
    "success": "success in training, last ten steps",
    "highest": "highest H̄, nats",
    "jump": "std(ΔH̄), nats",
    "iid_after": "IID after",
    "ood_after": "OOD after",
}

# ---- Running


def folder_of(world, arm, seed):
    return os.path.join(FOLDER, world, f"{arm}-seed{seed}")


def train_in_this_process(arguments, printed):
    """A run of train.py, in a process that has imported torch already."""
    import train

    end_with_the_sweep()
    sys.argv = ["train.py", *arguments]
    with open(printed, "a") as file, redirect_stdout(file), redirect_stderr(file):
        train.main()


def waiting_runs(worlds):
    """{folder: arguments} of what is not finished, all arms of a seed before the next seed.

    A finished run that a kill left untidy is tidied. Raises SetupError for other settings.
    """
    runs = {}
    for world in worlds:
        flags, first, seeds = WORLDS[world]
        for seed in range(first, first + seeds):
            for arm, more in ARMS[world].items():
                # a path that names no machine
                folder = os.path.relpath(folder_of(world, arm, seed))
                arguments = [*flags.split(), *more.split(), "--seed", str(seed), "--out", folder]
                if is_new(folder):
                    runs[folder] = arguments
                elif not finished(folder):
                    cfg = Config(**parse_flags(arguments, None))
                    refuse_other_settings(cfg, read_config(folder))
                    runs[folder] = ["--resume", "--out", folder]
                elif os.path.exists(os.path.join(folder, "checkpoint.pt")):
                    tidy(folder)
    return runs


def run_all(runs, jobs):
    """Make the runs, some at a time -> how many failed."""
    # also of `kill`, the runs end with it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    running, waiting, failed = {}, list(runs.items()), 0
    while waiting or running:
        while waiting and len(running) < jobs:
            folder, arguments = waiting.pop(0)
            os.makedirs(os.path.dirname(folder), exist_ok=True)
            job = (arguments, folder + ".txt")
            process = context.Process(target=train_in_this_process, args=job, daemon=True)
            process.start()
            running[folder] = process
        time.sleep(0.1)
        for folder, process in list(running.items()):
            if process.is_alive():
                continue
            del running[folder]
            if process.exitcode:
                failed += 1
                print(f"study.py: {folder} failed; see {folder}.txt", file=sys.stderr)
            else:
                tidy(folder)
                print(f"{folder}: {len(waiting)} runs wait", flush=True)
    return failed


# of a log, what the claims and the figures of many seeds need
KEPT = (
    "step success score entropy corridor_low corridor_high above below outside invalid "
    "first_entropy first_above rest_entropy rest_above iid_success ood_success seconds"
).split()


def tidy(folder):
    """Keep the settings and the log: of a world's first seed all of it, of others these columns."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif name not in ("config.json", "log.jsonl"):
            os.remove(path)
    if not folder.endswith(f"-seed{FIRST_SEED}"):
        rows = [{name: row[name] for name in KEPT if name in row} for row in read_log(folder)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_whole(os.path.join(folder, "log.jsonl"), lambda file: file.write(lines.encode()))
    os.remove(folder + ".txt")


# ---- Claims


def outcomes(log):
    """-> {outcome: number} of a finished run; "after" is the evaluation after the last step"""
    success = [row["success"] for row in log if "success" in row][-10:]
    numbers = {"success": sum(success) / len(success), **report.summary(log, last=1)}
    return {name: numbers[name] for name in OUTCOMES}


@cache
def log_of(folder):
    """`finished`, which several claims ask for."""
    return finished(folder)


def finished_runs(world, arm):
    """{seed: log} of an arm's finished runs."""
    _, first, seeds = WORLDS[world]
    logs = {seed: log_of(folder_of(world, arm, seed)) for seed in range(first, first + seeds)}
    return {seed: log for seed, log in logs.items() if log}


def differences(claim):
    """The arm's outcome minus the baseline's, for each seed of which both runs are finished."""
    runs = finished_runs(claim.world, claim.arm)
    others = finished_runs(claim.world, claim.baseline)
    outcome = lambda log: outcomes(log)[claim.outcome]
    return np.array([outcome(runs[s]) - outcome(others[s]) for s in runs if s in others])


def interval(values, resamples=10_000):
    """-> the mean and the 95 % interval of a bootstrap over seeds, always the same one."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (resamples, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return values.mean(), low, high


# the 97.5th percentile of Student's t, by the number of seeds
STUDENT = {5: 2.776, 8: 2.365, 20: 2.093}


def interval_by_t(values):
    """-> a 95 % interval of Student's t, wider than `interval` where seeds are few"""
    half = STUDENT[len(values)] * values.std(ddof=1) / len(values) ** 0.5
    return values.mean() - half, values.mean() + half


def verdict(claim, low, high):
    """holds or fails if the interval excludes 0, else undecided"""
    if low <= 0 <= high:
        return "undecided"
    return "holds" if (low > 0) == (claim.sign > 0) else "fails"


def decided():
    """-> (claim, number of seeds, mean, low, high, verdict) of each claim that has two seeds"""
    rows = []
    for claim in CLAIMS:
        values = differences(claim)
        if len(values) > 1:
            mean, low, high = interval(values)
            rows.append((claim, len(values), mean, low, high, verdict(claim, low, high)))
    return rows


def worlds_of(rows):
    return [world for world in WORLDS if any(row[0].world == world for row in rows)]


def summary(rows):
    """How many of each claim's places hold, fail, and are undecided, as lines of Markdown."""
    worlds = worlds_of(rows)
    yield f"| claim | {' | '.join(worlds)} |"
    yield "|---" * (1 + len(worlds)) + "|"
    for number, sentence in SENTENCES.items():
        cells = []
        for world in worlds:
            of_claim = [row for row in rows if row[0][:2] == (number, world)]
            words = [row[-1] for row in of_claim]
            counts = [f"{word} {words.count(word)}" for word in COLOURS if word in words]
            cells.append(", ".join(counts) or "-")
        if any(cell != "-" for cell in cells):
            yield f"| {number} {sentence} | {' | '.join(cells)} |"


def readable(arm):
    """An arm's name as the paper has it: EPO-Base is the bonus alone."""
    algo, kind, *coefficient = arm.split("-")
    if kind == "plain":
        return algo.upper()
    name = kind.rstrip("0123456789.")
    alpha = kind.removeprefix(name)
    method = {"base": "EPO-Base", "epo": "EPO", "turn": "EPO over turns"}[name]
    return f"{algo.upper()}+{method}, λ {coefficient[0]}" + (f", α {alpha}" if alpha else "")


def arms_with_runs(world):
    return [arm for arm in (*ARMS[world], GONE[world]) if arm and finished_runs(world, arm)]


def arms(world):
    """Means and standard errors of each arm's outcomes, as lines of Markdown."""
    yield f"| {world} | seeds | {' | '.join(OUTCOMES.values())} |"
    yield "|---" * (2 + len(OUTCOMES)) + "|"
    for arm in arms_with_runs(world):
        values = [list(outcomes(log).values()) for log in finished_runs(world, arm).values()]
        cells = []
        for numbers in np.array(values).T:
            error = numbers.std(ddof=1) / len(numbers) ** 0.5
            cells.append(f"{numbers.mean():.3f} ±{error:.3f}")
        yield f"| {readable(arm)} | {len(values)} | {' | '.join(cells)} |"


def positions(world):
    """The entropy of a response's first token and of the rest, as lines of Markdown.

    Nats and shares of turns in the first and the last step, the cap in the second and the last
    one, and the shares of tokens above it in the last ten; means over seeds.
    """
    columns = "first token, the rest, cap, first above cap, rest above cap, invalid".split(", ")
    yield f"| {world} | {' | '.join(columns)} |"
    yield "|---" * 7 + "|"
    for arm in arms_with_runs(world):
        logs = finished_runs(world, arm).values()
        # without the row of the last evaluation
        steps = [[row for row in log if "entropy" in row] for log in logs]
        mean = lambda name, part, steps=steps: np.mean(
            [[row[name] for row in log[part]] for log in steps]
        )
        first, second, last, end = slice(0, 1), slice(1, 2), slice(-1, None), slice(-10, None)
        cells = [
            f"{mean(f'{place}_entropy', first):.2f} → {mean(f'{place}_entropy', last):.2f}"
            for place in ("first", "rest")
        ]
        cells.append(f"{mean('corridor_high', second):.2f} → {mean('corridor_high', last):.2f}")
        cells += [f"{mean(f'{place}_above', end):.0%}" for place in ("first", "rest")]
        cells.append(f"{mean('invalid', first):.0%} → {mean('invalid', last):.0%}")
        yield f"| {readable(arm)} | {' | '.join(cells)} |"


def table(rows):
    """Every comparison, as lines of Markdown."""
    yield "| claim | world | outcome | comparison | seeds | difference [95 %] | verdict |"
    yield "|---|---|---|---|---|---|---|"
    for claim, seeds, mean, low, high, word in rows:
        relation = ">" if claim.sign > 0 else "<"
        cells = [claim.number, claim.world, claim.outcome]
        cells += [f"{readable(claim.arm)} {relation} {readable(claim.baseline)}", seeds]
        cells += [f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", word]
        yield f"| {' | '.join(map(str, cells))} |"


def weak(rows):
    """The verdicts that an interval of Student's t leaves undecided, as lines of Markdown."""
    yield "| claim | world | outcome | seeds | verdict | difference [bootstrap] | [Student's t] |"
    yield "|---|---|---|---|---|---|---|"
    for claim, seeds, mean, low, high, word in rows:
        if word == "undecided" or seeds not in STUDENT:
            continue
        by_t = interval_by_t(differences(claim))
        if verdict(claim, *by_t) == word:
            continue
        cells = [f"{claim.number}, {readable(claim.arm)}", claim.world, claim.outcome, seeds, word]
        cells += [f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", "[{:+.3f}, {:+.3f}]".format(*by_t)]
        yield f"| {' | '.join(map(str, cells))} |"


def blocks(rows):
    """What docs/results.md has, each as lines of Markdown."""
    worlds = worlds_of(rows)
    of_worlds = [*map(arms, worlds), *map(positions, worlds)]
    return [summary(rows), weak(rows), *of_worlds, table(rows)]


# the colour-blind can tell them apart
COLOURS = {"holds": "#009E73", "fails": "#D55E00", "undecided": "#999999"}


def draw(rows):
    """A panel for each claim and outcome, a line for each world, algorithm and λ; 0 is black."""
    from matplotlib.figure import Figure

    panels = {}
    for row in rows:
        panels.setdefault((row[0].number, row[0].outcome), []).append(row)
    height = max(map(len, panels.values())) * 0.3 + 0.8
    lines = (len(panels) + 1) // 2
    fig = Figure((15, height * lines + 0.8), layout="constrained")
    axes = list(fig.subplots(lines, 2, squeeze=False).flat)
    for (number, outcome), shown in sorted(panels.items()):
        axis = axes.pop(0)
        draw_panel(axis, shown)
        axis.set_title(f"{number} {SENTENCES[number]}", loc="left", fontsize="medium")
        axis.set_xlabel(f"difference of {OUTCOMES[outcome]}")
    for axis in axes:
        axis.remove()
    lines = [fig.axes[0].plot([], [], "o-", color=c, label=word)[0] for word, c in COLOURS.items()]
    fig.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False)
    return fig


def draw_panel(axis, rows):
    names = []
    for y, (claim, _, mean, low, high, word) in enumerate(rows):
        axis.plot([low, high], [y, y], color=COLOURS[word], linewidth=3)
        axis.plot(mean, y, "o", color=COLOURS[word])
        algo, _, coefficient = claim.arm.split("-")
        names.append(f"{claim.world} {algo.upper()} λ {coefficient}")
    axis.set_yticks(range(len(rows)), names)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_ylim(len(rows) - 0.5, -0.5)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the arms of worlds")
    run.add_argument("worlds", nargs="+", choices=tuple(WORLDS))
    run.add_argument("--jobs", type=positive, default=1, help="runs at a time")
    commands.add_parser("claims", help="print the tables and draw the figure")
    args = parser.parse_args()
    try:
        if args.command == "run":
            sys.exit(1 if run_all(waiting_runs(args.worlds), args.jobs) else 0)
        rows = decided()
        for lines in blocks(rows):
            print("\n".join(lines), end="\n\n")
        if rows:
            draw(rows).savefig(FIGURE)
    except (SetupError, OSError) as error:
        sys.exit(f"study.py: {error}")


if __name__ == "__main__":
    main()
