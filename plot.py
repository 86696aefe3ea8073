"""Draw runs from their logs, without torch or a GPU.

python plot.py runs/scienceworld --out figures/mine    # a run, or a folder of runs: seeds
python plot.py plain=runs/a strong=runs/b              # LABEL=PATH: one group for each label
python plot.py results/study/short.csv/grpo-epo3-0.1   # an arm of a study; FILE.csv: all arms
python plot.py runs/a --draw kl,grad_norm              # numbers of the log
"""

import csv
import json
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure

from support.report import read_arguments
from support.run_folder import SetupError, damaged, one_line, read_config, read_log, write_whole

# what a file of another shape than expected leads to
DAMAGED = ArithmeticError, AttributeError, LookupError, TypeError, ValueError, csv.Error
DAMAGED += OSError, RecursionError
# of Okabe and Ito, which the colour-blind can tell apart
COLOURS = "#0072B2 #E69F00 #000000 #D55E00 #009E73 #56B4E9 #CC79A7".split()
BLUE, ORANGE, BLACK, RED, GREEN, SKY, _ = COLOURS
DASHES = "- -- -. :".split()
# what is drawn of up to four groups, and of more
OF_FEW, OF_MANY = "overview", "entropy,success,iid_success,ood_success"
# few inches on many pixels make letters that can be read on a phone
SIZE = {"figsize": (8, 6), "dpi": 150, "layout": "constrained"}
LOOK = {"font.size": 12, "axes.titlesize": 11, "axes.grid": True, "grid.alpha": 0.3}
LOOK |= {"axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2}


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
        settings = json.loads(Path(path).with_suffix(".json").read_text("utf-8"))["settings"]
        for cells in csv.DictReader(Path(path).read_text("utf-8").splitlines()):
            arm, seed = cells.pop("arm"), int(cells.pop("seed"))
            _, rows = runs.setdefault((arm, seed), (settings[arm], []))
            rows.append({name: json.loads(cell) for name, cell in cells.items() if cell})
    except DAMAGED as error:
        raise damaged(path, f"{type(error).__name__}: {one_line(error)}") from error
    return runs


def load(path):
    """A PATH of the command line -> {its title: [(config, log) of a run]}. Raises SetupError."""
    file, is_study, arm = str(path).partition(".csv")
    if is_study:
        runs = read_study(file + is_study)
    else:
        name = Path(path).absolute().name
        runs = {(name, at): (read_config(at), read_log(at)) for at in run_folders(path)}
    groups = {}
    try:
        for (name, _), (config, rows) in runs.items():
            if arm in ("", f"/{name}"):
                group = groups.setdefault(f"{name}: {method(config)}", [])
                group.append((config, as_arrays(rows)))
    except DAMAGED as error:
        raise damaged(path, one_line(error)) from error
    if not groups:
        raise SetupError(f"{path}: this study has no such arm")
    return groups


def method(config):
    """The paper's name of a method, which ends in "+EPO" where the corridor acts."""
    text = config["algo"].upper()
    if config.get("entropy_coef") or config.get("entropy_target"):
        text += "+EPO-Base" if config.get("smoothing") == "off" else "+EPO"
    return text


def as_arrays(rows):
    """-> {number: (steps,)}, as arrays; nan where there is nothing."""
    steps = [row.get("step") for row in rows]
    if steps != [*range(len(steps) or 1)]:
        raise ValueError("log.jsonl has no whole row yet, or a step is not in it")
    names = [n for n in set().union(*rows) if not n.endswith(("histogram", "by_turn", "by_task"))]
    return {name: np.array([row.get(name) for row in rows], float) for name in names}


def grouped(arguments):
    """[LABEL=]PATH of the command line -> {title: [(config, log) of a run]}, in their order."""
    groups = {}
    for argument in arguments:
        *label, path = [argument] if Path(argument).exists() else argument.split("=", 1)
        for title, runs in load(path).items():
            if title in groups and not label:
                raise SetupError(f"two groups would be {title}; name them with LABEL=PATH")
            groups.setdefault(label[0] if label else title, []).extend(runs)
    return groups


def mean(numbers):
    """Over the first axis, of what is not nan; nan where nothing is left."""
    return np.ma.masked_invalid(numbers).mean(0).filled(np.nan)


def stack(runs, name):
    """A column of the log of all runs -> (seeds, steps), nan after the end of a shorter run."""
    columns = [log.get(name, log["step"] * np.nan) for _, log in runs]
    stacked = np.full([len(runs), max(map(len, columns))], np.nan)
    for seed, column in zip(stacked, columns):
        seed[: len(column)] = column
    return stacked


def draw(axis, runs, name, colour, dashes, label):
    """The mean of a column as a line, and a band from the lowest to the highest; or as markers."""
    seeds = np.ma.masked_invalid(stack(runs, name))
    steps = np.flatnonzero(seeds.count(0))
    seeds = seeds[:, steps]
    axis.plot(steps, seeds.mean(0), dashes, color=colour, label=label)
    if dashes in DASHES:
        axis.fill_between(steps, seeds.min(0), seeds.max(0), color=colour, alpha=0.2, lw=0)
    axis.locator_params("x", nbins=4, integer=True)


def plain(text):
    """A text as matplotlib shows it: without mathematics, and nothing that it cannot take."""
    return text.encode(errors="replace").decode().replace("$", r"\$")


def overview(groups):
    """A panel of the entropy of each group, and one of its success below."""
    grid = Figure(**SIZE).subplots(
        2, len(groups), height_ratios=(3, 2), sharex=True, sharey="row", squeeze=False
    )
    grid[0, 0].set_ylabel("entropy (nats)")
    grid[1, 0].set_ylabel("success rate")
    for upper, lower, (text, runs) in zip(*grid, groups.items()):
        upper.set_title(fill(plain(f"{text} (n={len(runs)})"), 20))
        lower.set_xlabel("RL step")
        draw(upper, runs, "entropy", BLACK, "-", "mean entropy of a step")
        if method(runs[0][0]).endswith("+EPO"):
            for name in ("corridor_low", "corridor_high"):
                draw(upper, runs, name, RED, ":", "its corridor's floor and cap")
        draw(lower, runs, "success", BLUE, "-", "success in training")
        draw(lower, runs, "iid_success", GREEN, "s", "evaluation on IID tasks")
        draw(lower, runs, "ood_success", RED, "D", "evaluation on OOD tasks")
        iid, ood = (mean(stack(runs, f"{split}_success")) for split in ("iid", "ood"))
        text = f"IID {iid[-1]:.2f}, OOD {ood[-1]:.2f}"
        # a run that goes on may have none in its last step
        lower.set_title("" if "nan" in text else text)
    upper.set_ylim(0)
    lower.set_ylim(-0.05, 1.05)
    finish(upper.figure, groups, "entropy and success")
    return upper.figure


def finish(fig, groups, title):
    worlds = {str(config.get("env")) for runs in groups.values() for config, _ in runs}
    fig.suptitle(plain(f"{', '.join(sorted(worlds))}: {title}"))
    lines = {line.get_label(): line for axis in fig.axes for line in axis.lines}
    fig.legend(
        lines.values(),
        lines,
        title="mean over n seeds; band: from the lowest seed to the highest",
        loc="outside lower center",
        ncols=2,
    )


def column(groups, name):
    if not any(name in log for runs in groups.values() for _, log in runs):
        raise SetupError(f"--draw: {name} is no figure, and no number in these logs")
    axis = Figure(**SIZE).subplots()
    axis.set_xlabel("RL step")
    for i, (text, runs) in enumerate(groups.items()):
        text = fill(plain(f"{text} (n={len(runs)})"), 34)
        draw(axis, runs, name, COLOURS[i % 7], DASHES[i % 4], text)
    finish(axis.figure, groups, name)
    return axis.figure


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]PATH")
    parser.add_argument("--out", default="figures", help="where the files go")
    parser.add_argument("--draw", help="overview, or numbers of the log, separated by commas")
    args = read_arguments(parser, "plot.py")
    rcParams.update(LOOK)
    try:
        groups = grouped(args.runs)
        os.makedirs(args.out, exist_ok=True)
        default = OF_FEW if len(groups) < 5 else OF_MANY
        for name in (args.draw or default).split(","):
            fig = overview(groups) if name == "overview" else column(groups, name)
            path = f"{args.out}/{name}.png"
            write_whole(path, fig.savefig, mark=b"Matplotlib")
            print(path)
    except (SetupError, OSError) as error:
        sys.exit(f"plot.py: {error}")


if __name__ == "__main__":
    main()
