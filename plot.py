"""Draw runs from their logs, without torch or a GPU: one figure for each question.

    python plot.py results/lr2e-3 --out figures/mine  # run folders, or folders of run folders
    python plot.py plain=runs/a strong=runs/b         # LABEL=PATH: the runs below PATH are a group
    python plot.py                                    # no run: gradient alone

overview         does entropy explode, does the cap stop it, and what becomes of success?
entropy          group by group: every seed, its corridor, and the share of tokens outside
tokens           where is the entropy: in how many tokens, in the first one or in the rest?
entropy_by_turn  turn by step, and the first turns against the last ones
success          episodes won in training, and in the evaluations on IID and OOD tasks
loss             the four terms that add up to the loss, and β_k
gradient         what v1's and v2's penalties do to the entropy of a token

Runs that differ only in the seed are a group: a thick line is their mean, a thin line is a seed.
"""

import argparse
import os
import sys
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from support.report import ENTROPY_EDGES
from support.run_folder import SetupError, read_config, read_log, write_whole

IGNORED = "seed out resume device evaluate preset eval_every tokens_per_batch".split()
CORRIDOR = "smoothing kappa_l kappa_r alpha gamma dynamic_weight window".split()
SYMBOLS = {"entropy_coef": "λ", "alpha": "α", "kappa_l": "κ_l", "kappa_r": "κ_r", "kl_coef": "KL"}
COLUMNS = (
    "entropy corridor_low corridor_high above below success iid_success ood_success "
    "loss policy_loss entropy_loss smoothing_loss kl beta first_entropy rest_entropy"
).split()
# of Okabe and Ito, which the colour-blind can tell apart
COLOURS = "#0072B2 #E69F00 #000000 #D55E00 #009E73 #56B4E9 #CC79A7".split()
BLUE, ORANGE, BLACK, RED, _, SKY, _ = COLOURS
DASHES = "-", "--", "-.", (0, (6, 1, 1, 1, 1, 1))
LOOK = {
    "font.size": 13,
    "axes.titlesize": 13,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-3, 4),
    "axes.formatter.use_mathtext": True,
    "lines.linewidth": 2,
    "svg.hashsalt": "plot.py",
}


def run_folders(path):
    """A run folder -> [path]; a folder of run folders -> those. Raises SetupError for others."""
    if Path(path, "config.json").exists():
        return [Path(path)]
    inside = sorted(Path(path).glob("*/config.json"))
    if not inside:
        raise SetupError(f"{path} is no run folder (config.json, log.jsonl), and none is inside")
    return [file.parent for file in inside]


def load(folder):
    """-> (config, {name: a number per step, nan where there is none}). Raises SetupError."""
    config, rows = read_config(folder), read_log(folder)
    if not rows:
        raise SetupError(f"log.jsonl in {folder} is missing, or has no whole row yet")
    try:
        method(settings(config))
        columns = [[row.get(name) for row in rows] for name in COLUMNS]
        log = dict(zip(COLUMNS, np.array(columns, float), strict=True))
        coefficient, limit = config["entropy_coef"], config["turns"]
        log["entropy_term"] = -coefficient * log["entropy_loss"]
        log["smoothing_term"] = coefficient * log["beta"] * log["smoothing_loss"]
        log["kl_term"] = config["kl_coef"] * log["kl"]
        # without a corridor no token is outside
        no_corridor = np.isnan(log["corridor_low"])
        log["above"][no_corridor] = log["below"][no_corridor] = np.nan
        by_turn = [row.get("entropy_by_turn", []) for row in rows]
        # one more column, cut off again, makes them as long as the turn limit
        by_turn = [*zip_longest(*by_turn, [None] * limit)]
        by_turn = np.array(by_turn, float)[:, :-1]
        histogram = [row.get("entropy_histogram") or [None] * 32 for row in rows]
        log["entropy_histogram"] = np.array(histogram, float).T  # (bins, steps)
        third = max(limit // 3, 1)
        log["entropy_by_turn"] = by_turn  # (turns, steps)
        log["first_third"] = mean(by_turn[:third])
        log["last_third"] = mean(by_turn[limit - third : limit])
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise SetupError(f"{folder} is damaged or of another program ({reason})") from error
    return config, log


def settings(config):
    """The settings that had an effect, without the seed; 0, None, "" and "off" have none."""
    used = {name: value for name, value in config.items() if value not in (0, None, "", "off")}
    smoothed = "entropy_coef" in used and "smoothing" in used
    idle = IGNORED + ([] if smoothed else CORRIDOR)
    idle += [] if config["env"] == "alfworld" else ["games"]
    return {name: value for name, value in used.items() if name not in idle}


def method(own):
    """The paper's name for `settings`."""
    name = own["algo"].upper()
    if "entropy_coef" not in own:
        return name + "+EA" * ("shaping" in own)
    if "smoothing" not in own:
        return name + ("+EPO-Decay" if "entropy_decay" in own else "+EPO-Base")
    name += "+EPO" if "dynamic_weight" in own else "+EPO w/o DW"
    return name + ", indicator" * (own["smoothing"] == "indicator")


def label(own, groups):
    """The method of a group's `settings`, and what else differs between the groups."""
    text = method(own)
    for name in sorted(own.keys() - {"algo", "smoothing", "dynamic_weight"}):
        rivals = [other for other in groups if name in other or method(other) == method(own)]
        if any(other.get(name) != own[name] for other in rivals):
            value = str(own[name]).removesuffix(".0")
            text += f", {SYMBOLS.get(name, name.replace('_', ' '))} {value}"
    return text


def grouped(arguments):
    """[LABEL=]PATH of the command line -> {label: [(config, log) of a run]}, in their order."""
    runs = {}
    for argument in arguments:
        *name, path = [argument] if Path(argument).exists() else argument.split("=", 1)
        for folder in run_folders(path):
            runs[*name, folder.resolve()] = load(folder)
    unnamed = []
    for key, (config, _) in runs.items():
        if len(key) == 1:
            unnamed.append(settings(config))
    groups = {}
    for (*name, _), run in runs.items():
        text = name[0] if name else label(settings(run[0]), unnamed)
        groups.setdefault(text, []).append(run)
    return groups


def mean(table):
    """Over the first axis, of what is not nan; nan where nothing is left."""
    return np.ma.masked_invalid(table).mean(0).filled(np.nan)


def stack(runs, name):
    """A column of the log of all runs -> (seeds, …, steps), nan after the end of a shorter run."""
    columns = [log[name] for _, log in runs]
    largest = np.max([column.shape for column in columns], 0)
    table = np.full([len(runs), *largest], np.nan)
    for row, column in zip(table, columns, strict=True):
        row[tuple(map(slice, column.shape))] = column
    return table


def draw(axis, runs, name, **style):
    """A column of the log: the mean as a thick line, each of several seeds as a thin one."""
    table = stack(runs, name)
    thin = {"color": style["color"], "linewidth": 0.8, "alpha": 0.5}
    lines = [(mean(table), style)]
    if len(table) > 1:
        lines += [(seed, thin) for seed in table]
    for numbers, look in lines:
        steps = np.flatnonzero(np.isfinite(numbers))
        axis.plot(steps, numbers[steps], **look)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axis.set_xlabel("RL step")


def compare(axes, groups, panels):
    """A line for each group in each panel. panels: {column of the log: (title, unit)}."""
    for axis, (column, (title, unit)) in zip(axes, panels.items(), strict=True):
        axis.set(title=title, ylabel=unit)
        for i, (text, runs) in enumerate(groups.items()):
            # colour, marker and dashes differ, in cycles of 7, 8 and 4
            style = {"color": COLOURS[i % 7], "marker": "osD^vPX*"[i % 8]}
            style |= {"linestyle": DASHES[i % 4], "markevery": (0.02 * i, 0.15)}
            style["label"] = f"{text} (n = {len(runs)})"
            draw(axis, runs, column, **style)


def new_figure(groups, title, size=(13, 7.5), dpi=100):
    fig = Figure(size, dpi, layout="constrained")
    worlds = {config["env"] for runs in groups.values() for config, _ in runs}
    fig.suptitle(f"{', '.join(sorted(worlds))}: {title}")
    return fig


def legend(fig, note=""):
    """Below, where it covers nothing; each name once."""
    lines = {}
    for axis in fig.axes:
        lines |= {name: line for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    columns = 1 if max(map(len, lines)) > 45 else 2
    place = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    title = f"thick: mean of n seeds; thin: each seed{note}"
    fig.legend(lines.values(), lines, title=title, **place)
    return fig


def overview(groups):
    # fewer inches on as many pixels make larger letters
    fig = new_figure(groups, "entropy and success in training", size=(9.5, 6.5), dpi=137)
    upper, lower = fig.subplots(2, 1, height_ratios=[2, 1], sharex=True)
    panels = {"entropy": (None, "mean entropy (nats)"), "success": (None, "episodes won\n(share)")}
    compare([upper, lower], groups, panels)
    for colour, runs in zip(COLOURS, groups.values(), strict=False):
        if "smoothing" in settings(runs[0][0]):
            cap = mean(stack(runs, "corridor_high"))
            upper.plot(cap, color=colour, linestyle=":", linewidth=1)
    upper.set(xlabel=None, ylim=(0, None))
    lower.set_ylim(0)
    return legend(fig, "; dotted: cap $\\kappa_r\\bar{H}_W$")


def cells(fig, groups, ratio):
    """Two panels, one over the other, for each group -> (upper, lower, its runs) one by one."""
    columns = min(len(groups), 2)
    bands = -(-len(groups) // columns)
    fig.set_figheight(3.75 * max(bands, 2))
    boxes = fig.subfigures(bands, columns, squeeze=False).flat
    for box, (text, runs) in zip(boxes, groups.items(), strict=False):
        upper, lower = box.subplots(2, 1, sharex=True, height_ratios=ratio)
        upper.set_title(f"{text} (n = {len(runs)})")
        upper.sharey(fig.axes[0])
        lower.sharey(fig.axes[1])
        yield upper, lower, runs
    lower.set_ylim(0)


def entropy(groups):
    fig = new_figure(groups, "mean entropy and its corridor; below, the share of tokens outside it")
    for upper, lower, runs in cells(fig, groups, [2, 1]):
        low, high = mean(stack(runs, "corridor_low")), mean(stack(runs, "corridor_high"))
        steps = np.flatnonzero(np.isfinite(low + high))
        style = {"fill": True, "alpha": 0.35, "label": "corridor"}
        if "smoothing" not in settings(runs[0][0]):
            style = {"linestyle": ":", "label": "corridor, not in the loss"}
        if len(steps):
            # it is set before a step, and the same all through it
            edges = [steps[0] - 0.5, *(steps + 0.5)]
            upper.stairs(high[steps], edges, baseline=low[steps], color=SKY, **style)
        draw(upper, runs, "entropy", color=BLUE, marker=".", label="mean entropy $\\bar{H}_k$")
        draw(lower, runs, "above", color=ORANGE, marker=".", label="tokens above the cap")
        if (low > 0).any():
            draw(lower, runs, "below", color=RED, linestyle="--", label="tokens below the floor")
        upper.set(ylabel="entropy (nats)", xlabel=None)
        lower.set_ylabel("tokens\n(share)")
    return legend(fig, "; corridor: $\\kappa_l\\bar{H}_W$ to $\\kappa_r\\bar{H}_W$")


def entropy_by_turn(groups):
    fig = new_figure(groups, "mean entropy of each turn; below, of the first and the last turns")
    pictures = [mean(stack(runs, "entropy_by_turn")) for runs in groups.values()]
    highest = max(np.nanmax(picture, initial=0) for picture in pictures)
    for (upper, lower, runs), picture in zip(cells(fig, groups, [3, 2]), pictures, strict=True):
        turns, steps = picture.shape
        image = upper.imshow(picture, aspect="auto", origin="lower", vmin=0, vmax=highest)
        image.set_extent((-0.5, steps - 0.5, 0.5, turns + 0.5))
        upper.figure.colorbar(image, ax=upper, label="nats")
        upper.grid(False)
        upper.set_ylabel("turn")
        draw(lower, runs, "first_third", color=BLUE, marker=".", label="first third of the turns")
        draw(lower, runs, "last_third", color=RED, marker=".", ls="--", label="last third")
        lower.set_ylabel("nats")
    return legend(fig)


def tokens(groups):
    """The mean hides it: most tokens are nearly certain, and a few are decisions."""
    fig = new_figure(groups, "entropies of the tokens; below, the means by position in a response")
    for upper, lower, runs in cells(fig, groups, [3, 2]):
        shares = mean(stack(runs, "entropy_histogram"))  # (bins, steps)
        steps = np.arange(shares.shape[1] + 1) - 0.5
        image = upper.pcolormesh(steps, ENTROPY_EDGES, shares, norm=LogNorm(1e-3, 1))
        upper.figure.colorbar(image, ax=upper, label="share of tokens")
        upper.set_yscale("function", functions=(np.sqrt, np.square))
        upper.set(ylim=(0, 4), yticks=[0, 0.1, 0.5, 1, 2, 4], ylabel="entropy (nats)")
        upper.grid(False)
        draw(upper, runs, "entropy", color=BLACK, label="mean entropy $\\bar{H}_k$")
        for bound in ("corridor_low", "corridor_high"):
            nats = mean(stack(runs, bound))
            upper.plot(nats, color=RED, linestyle=":", label="corridor")
        draw(lower, runs, "first_entropy", color=BLUE, label="first token")
        draw(lower, runs, "rest_entropy", color=ORANGE, ls="--", label="the rest")
        upper.set_xlabel(None)
        lower.set_ylabel("nats")
    return legend(fig)


def success(groups):
    fig = new_figure(groups, "success in training and in evaluations")
    axes = fig.subplot_mosaic([["training", "training"], ["IID", "OOD"]], sharey=True)
    unit = "episodes won (share)"
    panels = {
        "success": ("training", unit),
        "iid_success": ("evaluation, IID tasks", unit),
        "ood_success": ("evaluation, OOD tasks", unit),
    }
    compare(axes.values(), groups, panels)
    axes["training"].set_ylim(0)
    return legend(fig)


def loss(groups):
    fig = new_figure(groups, "the loss and its terms; each panel has its own scale")
    axes = fig.subplots(2, 3).flat
    panels = {
        "loss": ("loss: the sum of the four terms", "loss (log beyond ±0.001)"),
        "policy_loss": ("policy, $L_{MT}$", "loss"),
        "entropy_term": ("entropy, $-\\lambda L_H$", "loss"),
        "smoothing_term": ("smoothing, $\\lambda\\beta_k L_{smooth}$", "loss"),
        "kl_term": ("KL to the reference policy, times its weight", "loss (log beyond ±0.001)"),
        "beta": ("$\\beta_k$", "weight"),
    }
    compare(axes, groups, panels)
    # the KL can jump by orders of magnitude
    axes[0].set_yscale("symlog", linthresh=1e-3)
    axes[4].set_yscale("symlog", linthresh=1e-3)
    return legend(fig)


def penalty(h, low, high, form):
    """Eq. 3's P of tokens with entropy h: v2's hinge, or v1's indicator."""
    distance = np.maximum(low - h, 0) + np.maximum(h - high, 0)
    return distance if form == "hinge" else np.sign(distance)


def net(h, low, high, alpha_beta):
    """∂L/∂H of tokens with entropy h, in units of λ·w: the bonus, and α·β_k times P's slope."""
    return -1 + alpha_beta * (1.0 * (h > high) - (h < low))


def gradient():
    """The two penalties, their slopes, and what Eq. 6 makes of them; needs no run."""
    fig = Figure((13, 7.5), layout="constrained")
    axes = fig.subplot_mosaic([["penalty", "net"], ["slope", "net"]], width_ratios=[1, 1.2])
    low, high, h = 0.5, 2.0, np.linspace(0, 3, 3001)
    panels = {
        "penalty": (-0.1, 1.7, "penalty of a token", "$P$"),
        "slope": (-1.4, 1.4, "its slope", "$\\partial P / \\partial H$"),
        "net": (
            -3.5,
            1.6,
            "gradient of the loss, Eq. 6",
            "$\\partial L / \\partial H$, in units of $\\lambda w$",
        ),
    }
    for name, (bottom, top, title, unit) in panels.items():
        axes[name].axvspan(low, high, color=SKY, alpha=0.25, linewidth=0)
        axes[name].set(xlim=(0, 3), ylim=(bottom, top), title=title, ylabel=unit)
        axes[name].set_xlabel("entropy of the token, in units of $\\bar{H}_W$")
    hinge = {"color": BLUE, "label": "hinge (v2)"}
    indicator = {"color": RED, "linestyle": "--", "label": "indicator (v1, published code)"}
    for form, style in {"hinge": hinge, "indicator": indicator}.items():
        axes["penalty"].plot(h, penalty(h, low, high, form), **style)
    axes["slope"].plot(h, net(h, low, high, 1) + 1, **hinge)
    axes["slope"].plot(h, 0 * h, **indicator)
    weak, strong = "raises entropy everywhere", "pulls it back above the cap"
    for value, dashes, effect in ((0.2, "-", weak), (2, ":", strong)):
        text = f"hinge, $\\alpha\\beta_k = {value}$: {effect}"
        style = {"color": BLUE, "linewidth": 3, "linestyle": dashes, "label": text}
        axes["net"].plot(h, net(h, low, high, value), **style)
    axes["net"].plot(h, 0 * h - 1, **indicator)
    axes["net"].axhline(0, color="#000000", linewidth=1)
    notes = {
        "above 0: lowers entropy": (1.25, 0.2),
        "below 0: raises entropy": (1.25, -0.2),
        "$-(1+0.2)$": (0.25, -1.4),
        "$-(1+2)$": (0.25, -2.8),
        "$-(1-0.2)$": (2.5, -0.6),
        "$-(1-2)$": (2.5, 1.2),
    }
    centred = {"ha": "center", "va": "center"}
    for text, place in notes.items():
        axes["net"].text(*place, text, **centred)
    axes["penalty"].text(1.25, 0.5, "corridor\n$\\kappa_l = 0.5$, $\\kappa_r = 2$", **centred)
    axes["penalty"].legend(loc="upper center", fontsize=12)
    axes["net"].legend(loc="lower right", fontsize=12)
    return fig


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: parser.exit(2, f"plot.py: {message}; see --help\n")
    text = "a run folder, or a folder of run folders"
    parser.add_argument("runs", nargs="*", metavar="[LABEL=]PATH", help=text)
    parser.add_argument("--out", default="figures", help="where the files go")
    parser.add_argument("--format", default="png", choices=("png", "svg", "pdf"))
    args = parser.parse_args()
    # the date inside a file: the same bytes every time
    os.environ["SOURCE_DATE_EPOCH"] = "0"
    try:
        groups = grouped(args.runs)
        os.makedirs(args.out, exist_ok=True)
        with rc_context(LOOK):
            makers = [overview, entropy, tokens, entropy_by_turn, success, loss]
            if len(groups) > len(COLOURS):
                # it would say little
                makers.remove(overview)
            figures = {make.__name__: make(groups) for make in makers if groups}
            for name, fig in (figures or {"gradient": gradient()}).items():
                path = os.path.join(args.out, f"{name}.{args.format}")
                write_whole(path, partial(fig.savefig, format=args.format))
                print(path)
    except (SetupError, OSError) as error:
        sys.exit(f"plot.py: {error}")


if __name__ == "__main__":
    main()
