"""The study of docs/protocol.md: run its arms, and say which of its claims hold.

    python -m tools.study run short coin --jobs 2     # what is missing; a stopped run goes on
    python -m tools.study claims                      # the table, and figures/claims.png

A run leaves config.json and log.jsonl in results/study/WORLD/ARM-seedN. An outcome is a number of a
run. A claim compares an outcome of two arms, seed by seed; its interval is a bootstrap over seeds.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

import numpy as np

from support.loading import ROOT
from support.run_folder import SetupError, is_new
from tools.sweep import end_with_the_sweep, finished, positive

FOLDER = os.path.join(ROOT, "results", "study")
FIGURE = os.path.join(ROOT, "figures", "claims.png")

# ---- The protocol: worlds, arms, seeds, claims

KEYQUEST = "--env keyquest --eval-every 60 --max-tokens 4"
HIGH = "--lr 1e-3 --kl-coef 0.01"
# flags of all runs of a world, the first seed, the number of seeds
WORLDS = {
    "short": (f"{KEYQUEST} --tasks short --steps 40", 100, 20),
    "coin": (
        f"{KEYQUEST} --tasks coin --reward score --steps 60 --turns 24 --group-size 4 "
        "--lr 3e-3 --kl-coef 0.01",
        100,
        20,
    ),
    "scienceworld": (f"--env scienceworld --steps 24 --eval-every 24 {HIGH}", 100, 8),
    "alfworld": (
        f"--env alfworld --games generated --steps 12 --eval-every 12 {HIGH}",
        100,
        5,
    ),
}
PLAIN = "--entropy-coef 0 --smoothing off"
BASE = "--smoothing off --entropy-coef"
# κ_l 0, κ_r 2 and γ 3 are the defaults, which are the paper's
EPO = "--entropy-coef"
# the two λ of a world, and the paper's α there
LAMBDAS = {"short": (0.01, 0.1), "coin": (0.01, 0.03)}
PAPER_ALPHA = {"short": 0.05, "coin": 0.05, "scienceworld": 0.05, "alfworld": 0.1}


def keyquest_arms(world):
    arms = {}
    for algo in ("grpo", "ppo"):
        arms[f"{algo}-plain"] = f"--algo {algo} {PLAIN}"
        for coefficient in LAMBDAS[world]:
            name = f"{algo}-{{}}-{coefficient}"
            arms[name.format("base")] = f"--algo {algo} {BASE} {coefficient}"
            for alpha in (PAPER_ALPHA[world], 3):
                flags = f"--algo {algo} {EPO} {coefficient} --alpha {alpha}"
                arms[name.format(f"epo{alpha}")] = flags
    strong = f"--algo grpo {EPO} {LAMBDAS[world][1]} --alpha 3 --corridor turn"
    arms[f"grpo-turn3-{LAMBDAS[world][1]}"] = strong
    return arms


ARMS = {world: keyquest_arms(world) for world in LAMBDAS}
ARMS["scienceworld"] = {
    "grpo-plain": PLAIN,
    "grpo-base-0.02": f"{BASE} 0.02",
    "grpo-epo0.05-0.001": f"{EPO} 0.001 --alpha 0.05",
    "grpo-epo3-0.02": f"{EPO} 0.02 --alpha 3",
    "grpo-turn3-0.02": f"{EPO} 0.02 --alpha 3 --corridor turn",
    "ppo-plain": f"--algo ppo {PLAIN}",
    "ppo-epo0.05-0.001": f"--algo ppo {EPO} 0.001 --alpha 0.05",
}
ARMS["alfworld"] = {
    "grpo-plain": PLAIN,
    "grpo-epo0.1-0.001": f"{EPO} 0.001 --alpha 0.1",
    "grpo-epo3-0.02": f"{EPO} 0.02 --alpha 3",
}


class Claim(NamedTuple):
    """`arm` has more (sign 1) or less (sign -1) of an outcome than `baseline`."""

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
            published = f"{algo}-epo{PAPER_ALPHA[world]}-{coefficient}"
            strong = f"{algo}-epo3-{coefficient}"
            claims.append(Claim(world, "success", published, plain, 1))
            claims.append(Claim(world, "success", strong, plain, 1))
            claims.append(Claim(world, "success", base, plain, -1))
            for arm in (published, strong):
                claims.append(Claim(world, "highest", arm, base, -1))
                claims.append(Claim(world, "jump", arm, base, -1))
    strong = LAMBDAS[world][1]
    claims.append(Claim(world, "success", f"grpo-turn3-{strong}", f"grpo-epo3-{strong}", 1))
    return claims


CLAIMS = keyquest_claims("short") + keyquest_claims("coin")
for outcome, sign in (("success", 1), ("highest", -1), ("jump", -1)):
    CLAIMS += [
        Claim("scienceworld", outcome, "grpo-epo0.05-0.001", "grpo-plain", sign),
        Claim("scienceworld", outcome, "grpo-epo3-0.02", "grpo-plain", sign),
        Claim("scienceworld", outcome, "grpo-epo3-0.02", "grpo-base-0.02", sign),
        Claim("scienceworld", outcome, "ppo-epo0.05-0.001", "ppo-plain", sign),
        Claim("alfworld", outcome, "grpo-epo0.1-0.001", "grpo-plain", sign),
        Claim("alfworld", outcome, "grpo-epo3-0.02", "grpo-plain", sign),
    ]
CLAIMS.append(Claim("scienceworld", "success", "grpo-turn3-0.02", "grpo-epo3-0.02", 1))
OUTCOMES = {
    "success": "success in training, last ten steps",
    "highest": "highest H̄, nats",
    "jump": "std(ΔH̄), nats",
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
    """{folder: arguments} of what is not finished, all arms of a seed before the next seed."""
    runs = {}
    for world in worlds:
        flags, first, seeds = WORLDS[world]
        for seed in range(first, first + seeds):
            for arm, more in ARMS[world].items():
                folder = folder_of(world, arm, seed)
                arguments = [*flags.split(), *more.split(), "--seed", str(seed), "--out", folder]
                if is_new(folder):
                    runs[folder] = arguments
                elif not finished(folder):
                    runs[folder] = ["--resume", "--out", folder]
    return runs


def run_all(runs, jobs):
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    running, waiting = {}, list(runs.items())
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
                print(f"study.py: {folder} failed; see {folder}.txt", file=sys.stderr)
            else:
                tidy(folder)
                print(f"{os.path.relpath(folder, FOLDER)}: {len(waiting)} runs wait", flush=True)


def tidy(folder):
    """Keep what the claims and the figures need: the settings and the log."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif name not in ("config.json", "log.jsonl"):
            os.remove(path)
    os.remove(folder + ".txt")


# ---- Claims


def outcomes(folder):
    """-> {outcome: number} of a finished run"""
    rows = [row for row in finished(folder) if "entropy" in row]
    entropy = [row["entropy"] for row in rows]
    success = [row["success"] for row in rows[-10:]]
    return {
        "success": sum(success) / len(success),
        "highest": max(entropy),
        "jump": float(np.diff(entropy).std()),
    }


def differences(claim):
    """The arm's outcome minus the baseline's, for each seed of which both runs are finished."""
    _, first, seeds = WORLDS[claim.world]
    values = []
    for seed in range(first, first + seeds):
        pair = [folder_of(claim.world, arm, seed) for arm in (claim.arm, claim.baseline)]
        if all(finished(folder) for folder in pair):
            arm, baseline = (outcomes(folder)[claim.outcome] for folder in pair)
            values.append(arm - baseline)
    return np.array(values)


def interval(values, resamples=10_000):
    """-> the mean and the 95 % interval of a bootstrap over seeds, always the same one."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (resamples, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return values.mean(), low, high


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


def table(rows):
    """The rows as lines of Markdown."""
    yield "| world | outcome | claim | seeds | difference [95 %] | verdict |"
    yield "|---|---|---|---|---|---|"
    for claim, seeds, mean, low, high, word in rows:
        relation = ">" if claim.sign > 0 else "<"
        numbers = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        text = f"{claim.arm} {relation} {claim.baseline}"
        yield f"| {claim.world} | {claim.outcome} | {text} | {seeds} | {numbers} | {word} |"


def draw(rows):
    """A row for each claim, a panel for each outcome; the line is 0, the colour the verdict."""
    from matplotlib.figure import Figure

    colours = {"holds": "#009E73", "fails": "#D55E00", "undecided": "#999999"}
    panels = [outcome for outcome in OUTCOMES if any(row[0].outcome == outcome for row in rows)]
    counts = [sum(row[0].outcome == outcome for row in rows) for outcome in panels]
    fig = Figure((13, 1.5 * len(panels) + 0.3 * len(rows)), layout="constrained")
    axes = fig.subplots(len(panels), 1, height_ratios=counts, squeeze=False)[:, 0]
    for axis, outcome in zip(axes, panels, strict=True):
        shown = [row for row in rows if row[0].outcome == outcome]
        for y, (claim, _, mean, low, high, word) in enumerate(shown):
            axis.plot([low, high], [y, y], color=colours[word], linewidth=3)
            axis.plot(mean, y, "o", color=colours[word])
        relation = {1: ">", -1: "<"}
        names = [f"{c.world}: {c.arm} {relation[c.sign]} {c.baseline}" for c, *_ in shown]
        axis.set_yticks(range(len(shown)), names)
        axis.axvline(0, color="black", linewidth=1)
        axis.invert_yaxis()
        axis.set_title(f"difference of {OUTCOMES[outcome]}")
    handles = [axes[0].plot([], [], "o-", color=c, label=word)[0] for word, c in colours.items()]
    fig.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return fig


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the arms of worlds")
    run.add_argument("worlds", nargs="+", choices=tuple(WORLDS))
    run.add_argument("--jobs", type=positive, default=1, help="runs at a time")
    commands.add_parser("claims", help="print the claims' table and draw their figure")
    args = parser.parse_args()
    try:
        if args.command == "run":
            return run_all(waiting_runs(args.worlds), args.jobs)
        rows = decided()
        print("\n".join(table(rows)))
        if rows:
            draw(rows).savefig(FIGURE)
    except (SetupError, OSError) as error:
        sys.exit(f"study.py: {error}")


if __name__ == "__main__":
    main()
