"""Draw runs from their logs, without torch or a GPU.

    python plot.py runs/scienceworld --out figures/mine    # run folders, or folders of some
    python plot.py plain=runs/a strong=runs/b              # LABEL=PATH: its runs are a group
    python plot.py results/study/short.csv/grpo-epo3-0.1   # an arm of a study; FILE.csv: all arms
    python plot.py runs/a --draw kl,grad_norm              # numbers of the log

overview  what becomes of entropy and its corridor, and of success? (of up to four groups)
tokens    where is the entropy: in how many tokens, in the first one or in the rest?

Runs that differ only in the seed are a group: their mean, and a band from lowest to highest.
"""

import csv
import json
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from itertools import cycle
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib import rcParams
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metrics import ENTROPY_EDGES
from support.report import read_arguments
from support.run_folder import SetupError, damaged, one_line, read_config, read_log, write_whole

IGNORED = "seed out resume device evaluate preset eval_every tokens_per_batch".split()
CORRIDOR = "smoothing kappa_l kappa_r alpha gamma dynamic_weight window".split()
SYMBOLS = {"entropy_coef": "λ", "alpha": "α", "kappa_l": "κ_l", "kappa_r": "κ_r"}
# what a file of another shape than expected leads to
DAMAGED = ArithmeticError, AttributeError, LookupError, TypeError, ValueError, csv.Error
DAMAGED += OSError, RecursionError
# of Okabe and Ito, which the colour-blind can tell apart
COLOURS = "#0072B2 #E69F00 #000000 #D55E00 #009E73 #56B4E9 #CC79A7".split()
BLUE, ORANGE, BLACK, RED, GREEN, SKY, _ = COLOURS
DASHES = "-", "--", "-.", (0, (6, 1, 1, 1, 1, 1))
# few inches on many pixels make letters that can be read on a phone
SIZE = {"figsize": (8, 6), "dpi": 150, "layout": "constrained"}
LOOK = {
    "font.size": 12,
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 2,
    "svg.hashsalt": "plot.py",
}


def run_folders(path):
    """A run folder -> [path]; a folder of run folders -> those. Raises SetupError for others."""
    for place in ("config.json", "*/config.json"):
        if files := sorted(Path(path).glob(place)):
            return [file.parent for file in files]
    raise SetupError(f"{path} is no run folder (config.json, log.jsonl), and none is inside")


def read_study(path):
    """NAME.csv and NAME.json of a study -> {(arm, seed): (config, rows)}. Raises SetupError."""
    runs = {}
    try:
        study = json.loads(Path(path).with_suffix(".json").read_text("utf-8"))
        with open(path, encoding="utf-8", newline="") as lines:
            for cells in csv.DictReader(lines):
                arm = cells.pop("arm")
                row = {name: json.loads(cell) for name, cell in cells.items() if cell}
                new = study["settings"][arm], []
                _, rows = runs.setdefault((arm, row.pop("seed")), new)
                rows.append(row)
    except DAMAGED as error:
        raise damaged(path, f"{type(error).__name__}: {one_line(error)}") from error
    return runs


def load(path):
    """A PATH of the command line -> {what tells a run from others: (config, log)}."""
    file, is_study, arm = str(path).partition(".csv")
    if is_study:
        study = read_study(file + is_study)
        runs = {(file, *key): run for key, run in study.items() if arm in ("", f"/{key[0]}")}
    else:
        runs = {f.resolve(): (read_config(f), read_log(f)) for f in run_folders(path)}
    if not runs:
        raise SetupError(f"{path}: this study has no such arm")
    try:
        return {key: (config, as_arrays(config, rows)) for key, (config, rows) in runs.items()}
    except DAMAGED as error:
        raise damaged(path, f"{type(error).__name__}: {one_line(error)}") from error


def as_arrays(config, rows):
    """-> {number: (steps,), histogram: (steps, bins)}, as arrays; nan where there is nothing."""
    steps = [row.get("step") for row in rows]
    if not steps or steps != [*range(len(steps))]:
        raise ValueError("log.jsonl has no whole row yet, or a step is not in it")
    # damaged settings raise an error
    label(settings(config), [])
    shares = [row.get("entropy_histogram") or [None] * 32 for row in rows]
    # a comma: --draw does not take it for a number
    log = {"shares, by entropy": np.array(shares, float).reshape(-1, 32)}
    for name in set().union(*rows):
        if not name.endswith(("histogram", "by_turn", "by_task")):
            values = [row.get(name) for row in rows]
            log[name] = np.array(values, float)
    return log


def settings(config):
    """The settings that had an effect, without the seed; algo is the paper's name of the method."""
    own = {name: value for name, value in config.items() if value not in (0, None, "", "off")}
    method, idle = config["algo"].upper(), IGNORED + CORRIDOR
    if "entropy_coef" in own and "smoothing" in own:
        method += "+EPO"
        idle = IGNORED
    elif "entropy_coef" in own:
        method += "+EPO-Base"
    return {name: own[name] for name in own if name not in idle} | {"algo": method}


def label(own, groups):
    """The method of a group's `settings`, a λ that is not the paper's, and what else differs."""
    text = own["algo"]
    rivals = [other for other in groups if other["algo"] == text]
    for name in sorted(own):
        value = str(own[name]).removesuffix(".0")
        if name == "entropy_coef" and own[name] != 0.001:
            text += f", λ\xa0{value} ({own[name] / 0.001:g} × the paper's)"
        elif any(other.get(name) != own[name] for other in rivals):
            text += f", {SYMBOLS.get(name, name)}\xa0{value}"
    return text


def grouped(arguments):
    """[LABEL=]PATH of the command line -> {label: [(config, log) of a run]}, in their order."""
    runs = {}
    for argument in arguments:
        *name, path = [argument] if Path(argument).exists() else argument.split("=", 1)
        for key, run in load(path).items():
            runs[*name, key] = run
    different = [settings(config) for config, _ in runs.values()]
    groups = {}
    for (*name, _), run in runs.items():
        text = name[0] if name else label(settings(run[0]), different)
        groups.setdefault(text, []).append(run)
    return groups


def mean(numbers):
    """Over the first axis, of what is not nan; nan where nothing is left."""
    return np.ma.masked_invalid(numbers).mean(0).filled(np.nan)


def stack(runs, name):
    """A column of the log of all runs -> (seeds, steps, …), nan after the end of a shorter run."""
    columns = [log.get(name, log["step"] * np.nan) for _, log in runs]
    stacked = np.full([len(runs), *max(columns, key=len).shape], np.nan)
    for seed, column in zip(stacked, columns):
        seed[: len(column)] = column
    return stacked


def draw(axis, runs, name, **style):
    """A column of the log: the mean as a line, and a band from the lowest seed to the highest."""
    seeds = np.ma.masked_invalid(stack(runs, name))
    steps = np.flatnonzero(seeds.count(0))
    seeds = seeds[:, steps]
    axis.plot(steps, mean(seeds), **style)
    if len(runs) > 1:
        axis.fill_between(steps, seeds.min(0), seeds.max(0), color=style["color"], alpha=0.2, lw=0)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))


def plain(text):
    """A text as matplotlib shows it: without mathematics, and nothing that it cannot take."""
    return text.encode(errors="replace").decode().replace("$", r"\$")


def side_by_side(fig, groups, rows):
    """A column of panels for each group -> (panels, runs), one by one; rows: {unit: height}."""
    shared = {"sharex": True, "sharey": "row", "squeeze": False}
    heights = list(rows.values())
    grid = fig.subplots(len(rows), len(groups), height_ratios=heights, **shared)
    for axis, unit in zip(grid[:, 0], rows):
        axis.set_ylabel(unit)
    width = max(18, 72 // len(groups))
    for panels, (text, runs) in zip(grid.T, groups.items()):
        title = fill(f"{text} (n = {len(runs)})", width)
        panels[0].set_title(plain(title))
        panels[-1].set_xlabel("RL step")
        yield panels, runs


def finished(fig, groups, title):
    """Its title, and a legend below, where it covers nothing; each name once."""
    worlds = {str(config.get("env")) for runs in groups.values() for config, _ in runs}
    fig.suptitle(plain(f"{', '.join(sorted(worlds))}: {title}"))
    lines = {line.get_label(): line for axis in fig.axes for line in axis.lines}
    fig.legend(
        lines.values(),
        lines,
        title="mean over n seeds; band: from the lowest seed to the highest",
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    return fig


def overview(groups):
    fig = Figure(**SIZE)
    rows = {"entropy (nats)": 4, "episodes won\n(share)": 3}
    for (upper, lower), runs in side_by_side(fig, groups, rows):
        draw(upper, runs, "entropy", color=BLUE, label="mean entropy of a step")
        if "smoothing" in settings(runs[0][0]):
            look = {"color": SKY, "linestyle": "--", "label": "its corridor's floor and cap"}
            draw(upper, runs, "corridor_low", **look)
            draw(upper, runs, "corridor_high", **look)
        draw(lower, runs, "success", color=BLACK, label="success in training")
        after = []
        for split, colour, marker in (("IID", GREEN, "s"), ("OOD", RED, "D")):
            shares = mean(stack(runs, f"{split.lower()}_success"))
            lower.plot(shares, marker, color=colour, label=f"evaluation on {split} tasks")
            done = shares[np.isfinite(shares)]
            after += [f"{split} {share:.2f}" for share in done[-1:]]
        lower.set_title(", ".join(after))
    upper.set_ylim(0)
    lower.set_ylim(-0.05, 1.05)
    return finished(fig, groups, "entropy and success")


def tokens(groups):
    """The mean hides it: most tokens are nearly certain, and a few are decisions."""
    fig = Figure(**SIZE)
    rows = {"entropy (nats)": 2, "mean (nats)": 1}
    for (picture, means), runs in side_by_side(fig, groups, rows):
        shares = mean(stack(runs, "shares, by entropy"))  # (steps, bins)
        steps = np.arange(len(shares) + 1) - 0.5
        image = picture.pcolormesh(steps, ENTROPY_EDGES, shares.T, norm=LogNorm(1e-3, 1))
        picture.set_yscale("function", functions=(np.sqrt, np.square))
        picture.set(ylim=(0, 4), yticks=[0, 0.1, 0.5, 1, 2, 4])
        picture.grid(False)
        draw(picture, runs, "entropy", color=BLACK, label="mean entropy")
        draw(picture, runs, "corridor_high", color=RED, linestyle=":", label="cap of the corridor")
        draw(means, runs, "first_entropy", color=BLUE, label="first token of a response")
        draw(means, runs, "rest_entropy", color=ORANGE, linestyle="--", label="the rest")
    fig.colorbar(image, ax=fig.axes[: len(groups)], label="share of tokens")
    return finished(fig, groups, "entropies of the tokens, and their means")


def column(groups, name):
    """A number of the log, with a line for each group."""
    logs = [log for runs in groups.values() for _, log in runs]
    if "/" in name or not any(name in log for log in logs):
        raise SetupError(f"--draw: {name} is no figure, and no number in these logs")
    fig = Figure(**SIZE)
    axis = fig.subplots()
    looks = zip(cycle(COLOURS), cycle(DASHES))
    for (text, runs), (colour, dashes) in zip(groups.items(), looks):
        text = fill(f"{text} (n = {len(runs)})", 34)
        draw(axis, runs, name, color=colour, linestyle=dashes, label=plain(text))
    axis.set(xlabel="RL step", ylabel=plain(name))
    return finished(fig, groups, name)


FIGURES = {"overview": overview, "tokens": tokens}
# groups: panels beside each other, or lines in one panel
OF_FEW, OF_MANY = "overview,tokens", "entropy,success,iid_success,ood_success"


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]PATH", help="what is drawn")
    parser.add_argument("--out", default="figures", help="where the files go")
    parser.add_argument("--draw", help="figures, or numbers of the log, separated by commas")
    parser.add_argument("--format", default="png", choices=("png", "svg", "pdf"))
    args = read_arguments(parser, "plot.py")
    # the date inside a file: the same bytes every time
    os.environ["SOURCE_DATE_EPOCH"] = "0"
    rcParams.update(LOOK)
    try:
        groups = grouped(args.runs)
        os.makedirs(args.out, exist_ok=True)
        default = OF_FEW if len(groups) < 5 else OF_MANY
        for name in (default if args.draw is None else args.draw).split(","):
            figure = FIGURES.get(name, partial(column, name=name))
            path = os.path.join(args.out, f"{name}.{args.format}")
            save = partial(figure(groups).savefig, format=args.format)
            write_whole(path, save, mark=b"atplotlib")
            print(path)
    except (SetupError, OSError) as error:
        sys.exit(f"plot.py: {error}")


if __name__ == "__main__":
    main()
