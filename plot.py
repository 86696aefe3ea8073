"""Draw runs from their logs, without torch, GPU or account: a file for each question, in --out.

    python plot.py results/sweep --out figures         # run folders, or folders of them
    python plot.py                                     # no run: `gradient` alone

entropy: its mean and the corridor, and the tokens outside. entropy_by_turn: turn × step, and early against late turns. success.
loss: the terms that add up to it. oscillation: std(ΔH̄) against success. gradient: what v1's and v2's penalties do to a token.
transcript.html: episodes, token by token. Runs that differ in nothing but the seed are a group: a line is the mean of
its seeds, its band reaches from the lowest to the highest, at each step of those that got so far.
"""
import argparse
import glob
import html
import json
import os
import statistics
import sys
import textwrap

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sweep import rows, summary

IGNORED = {"seed", "out", "resume", "device", "evaluate", "preset", "eval_every", "micro_batch", "tokens_per_batch"}
PPO = {"discount", "gae_lambda", "critic_lr", "critic_minibatches", "value_clip"}
CORRIDOR = {"smoothing", "kappa_l", "kappa_r", "alpha", "gamma", "dynamic_weight", "window"}
EARLIER = {"algo": "grpo", "dynamic_weight": "on", "window": 0, "entropy_decay": 0, "shaping": 0, "reward": "sparse", "lora_rank": 0,
           "dtype": "auto"}                                              # what runs did before there were these flags
SAID = {"entropy_coef": "λ {}", "kappa_l": "κ_l {}", "kappa_r": "κ_r {}", "alpha": "α {}", "gamma": "γ {}", "shaping": "η {}",
        "kl_coef": "KL {}", "gae_lambda": "GAE λ {}", "steps": "{} steps", "turns": "{} turns", "games": "{} games", "env": "{}", "model": "{}"}
BLUE, RED, SKY, ORANGE = "#0072B2", "#D55E00", "#56B4E9", "#E69F00"      # Okabe and Ito's, which the colour-blind can tell apart
COLOURS = BLUE, ORANGE, "#000000", SKY, RED, "#009E73", "#CC79A7"
MARKERS, DASHES = "osD^vPX*", ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
LOOK = {"font.size": 13, "axes.titlesize": 13, "legend.fontsize": 12, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
        "axes.spines.right": False, "axes.formatter.limits": (-3, 4), "axes.formatter.use_mathtext": True, "lines.linewidth": 2,
        "lines.markersize": 7, "svg.hashsalt": "plot.py"}


def load(path):
    """A run folder, or a folder of some -> [(folder, config, rows)]. Ends the program if it can't."""
    if not os.path.exists(os.path.join(path, "config.json")):
        inside = sorted(glob.glob(os.path.join(glob.escape(path), "*", "config.json")))
        return [run for file in inside for run in load(os.path.dirname(file))] or sys.exit(
            f"plot.py: {path} is no run folder (config.json, log.jsonl), and none is inside")
    try:
        name = "config.json"
        config = json.load(open(os.path.join(path, name)))
        settings(config)
        name = "log.jsonl"
        log = rows(path)
        [row["step"] for row in log]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"plot.py: {name} in {path} is damaged or of another program ({type(error).__name__}: {error})")
    return [(path, config, log)] if log else sys.exit(f"plot.py: log.jsonl in {path} is missing, or has no whole row yet")


def settings(config):
    """What makes a run what it is: the settings that had an effect, without the seed."""
    c = {**EARLIER, **config}
    idle = IGNORED | {name for name in ("window", "entropy_decay", "shaping", "entropy_coef") if not c[name]}
    idle |= PPO if c["algo"] == "grpo" else set()
    idle |= {"games"} if c["env"] != "alfworld" else set()
    idle |= CORRIDOR if not c["entropy_coef"] or c["smoothing"] == "off" else set()
    idle |= {"entropy_decay"} if not c["entropy_coef"] else set()
    return {name: value for name, value in c.items() if name not in idle}


def name_of(s):
    """The paper's name for settings."""
    method = ("+EPO" if "smoothing" in s else "+EPO-Decay" if "entropy_decay" in s else "+EPO-Base") if "entropy_coef" in s else \
        "+EA" if "shaping" in s else ""
    return s["algo"].upper() + method + " w/o DW" * (s.get("dynamic_weight") == "off") + ", indicator" * (s.get("smoothing") == "indicator")


def labels(groups):
    """Of each group's settings: the name, and what else differs between groups."""
    def label(own):
        differ = sorted(k for k, v in own.items() if k not in ("algo", "smoothing", "dynamic_weight") and any(
            other[k] != v if k in other else name_of(other) == name_of(own) for other in groups))
        text = lambda v: f"{v:g}" if isinstance(v, (int, float)) else str(v).rstrip("/").split("/")[-1] or "default"
        return ", ".join([name_of(own)] + [SAID.get(k, k.replace("_", " ") + " {}").format(text(own[k])) for k in differ])
    return [label(own) for own in groups]


def grouped(runs):
    """-> {label: runs}, in the order given; a folder given twice counts once."""
    groups = {}
    for run in {os.path.realpath(run[0]): run for run in runs}.values():
        groups.setdefault(json.dumps(settings(run[1]), sort_keys=True), []).append(run)
    names = labels([json.loads(text) for text in groups])
    names = [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]
    return dict(zip(names, groups.values()))


def curve(runs, value):
    """A key of the log, or value(row, config), None where there is none, over the seeds -> steps, means, lowest, highest."""
    found = {}
    for _, config, log in runs:
        for row in log:
            if (number := row.get(value) if isinstance(value, str) else value(row, config)) is not None:
                found.setdefault(row["step"], []).append(number)
    return sorted(found), *([of(found[step]) for step in sorted(found)] for of in (statistics.fmean, min, max))


def draw(axis, runs, value, fill=0.2, **style):
    steps, middle, low, high = curve(runs, value)
    axis.plot(steps, middle, **({"marker": "o"} if len(steps) == 1 else {}) | style)       # a line through one point can't be seen
    if low != high:
        axis.fill_between(steps, low, high, color=style["color"], alpha=fill, linewidth=0)


def seeds(label, runs):
    return f"{label} ({len(runs)} seed{'s' * (len(runs) > 1)})"


def step_axis(axis, groups, text="RL step"):
    last = max(row["step"] for runs in groups.values() for _, _, log in runs for row in log)
    axis.set(xlim=(-0.5, last + 0.5), xlabel=text)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def legend(fig, axes, note="line: mean of the seeds; band: lowest to highest seed", columns=None):
    """Under the figure, where it covers nothing; each name once."""
    found = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels())}
    columns = columns or max(1, min(130 // (max(map(len, found)) + 8), len(found)))
    fig.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False, title=note, title_fontsize=12)


def cells(groups, ratio, *units):
    """Two panels, one over the other, for each group -> the figure, the upper ones, the lower ones."""
    columns = len(groups) if len(groups) < 4 else 2 if len(groups) == 4 else 3 if len(groups) < 7 else 4
    bands = -(-len(groups) // columns)
    fig = Figure((13, max(7.5, 3.75 * bands)), layout="constrained")
    grid = fig.subplots(2 * bands, columns, squeeze=False, height_ratios=ratio * bands)
    upper, lower = ([axis for band in grid[start::2] for axis in band] for start in (0, 1))
    for i, pair in enumerate(zip(upper, lower)):
        for axis, unit in zip(pair, units):
            axis.set_visible(i < len(groups))
            step_axis(axis, groups, "RL step" if axis is pair[1] and i + columns >= len(groups) else None)
            axis.set_ylabel(None if i % columns else unit, fontsize=13 if bands == 1 else 11)
            axis.tick_params(labelbottom=axis is pair[1], labelleft=i % columns == 0)
    for axis, (label, runs) in zip(upper, groups.items()):
        unbroken = seeds(label, runs).replace(" ", "\u00a0").replace(",\u00a0", ", ").replace("\u00a0(", " (")
        axis.set_title(textwrap.fill(unbroken, 100 // columns), fontsize=13 if columns < 4 else 11)
    return fig, upper[:len(groups)], lower[:len(groups)]


def same_scale(axes):
    top = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, top)


def entropy(groups):
    fig, upper, lower = cells(groups, [2, 1], "entropy (nats)", "tokens\n(share)")
    known = lambda name: lambda row, config: row[name] if row.get("reference") is not None else None
    for top, bottom, runs in zip(upper, lower, groups.values()):
        steps, floor = curve(runs, "corridor_low")[:2]
        if steps:                                                        # set before a step, and the same all through it
            style = {"fill": True, "alpha": 0.35, "label": "corridor $[\\kappa_l\\bar{H}_W, \\kappa_r\\bar{H}_W]$"} \
                if "smoothing" in settings(runs[0][1]) else {"linestyle": ":", "linewidth": 2, "label": "corridor, not in the loss"}
            top.stairs(curve(runs, "corridor_high")[1], [steps[0] - 0.5, *(step + 0.5 for step in steps)], baseline=floor, color=SKY, **style)
        for others in groups.values():
            if others is not runs:
                top.plot(*curve(others, "entropy")[:2], color="#999999", linewidth=0.8, label="that of the other groups")
        draw(top, runs, "entropy", color=BLUE, label="mean entropy $\\bar{H}_k$")
        draw(bottom, runs, known("outside"), color=ORANGE, linewidth=4, label="share of tokens outside")
        draw(bottom, runs, known("above"), fill=0, color="#000000", linestyle="--", linewidth=1.5, label="above its cap")
        draw(bottom, runs, known("below"), fill=0, color=RED, linestyle=":", label="below its floor")
    same_scale(upper), same_scale(lower)
    legend(fig, upper + lower, columns=4)
    return fig


def by_turn(runs):
    """The mean over seeds of entropy_by_turn: (turns, steps), nan where no episode got so far."""
    found = {}
    for row in (row for _, _, log in runs for row in log):
        for turn, value in enumerate(row.get("entropy_by_turn", [])):
            found.setdefault((turn, row["step"]), []).append(value)
    picture = np.full([1 + max(index) for index in zip(*found)] or [1, 1], np.nan)
    for place, values in found.items():
        picture[place] = statistics.fmean(values)
    return picture


def third(late):
    """The mean entropy of the first or the last third of the turn limit; None where no episode got there."""
    def value(row, config):
        n, turns = max(config["turns"] // 3, 1), row.get("entropy_by_turn", [])
        chosen = turns[config["turns"] - n:] if late else turns[:n]
        return statistics.fmean(chosen) if chosen else None
    return value


def entropy_by_turn(groups):
    fig, upper, lower = cells(groups, [3, 2], "turn", "entropy (nats)")
    pictures = [by_turn(runs) for runs in groups.values()]
    seen = np.concatenate([picture[~np.isnan(picture)] for picture in pictures])
    for heat, axis, picture, runs in zip(upper, lower, pictures, groups.values()):
        turns, steps = picture.shape
        image = heat.imshow(picture, vmin=0, vmax=np.percentile(seen, 99) if len(seen) else 1, aspect="auto", origin="lower",
                            interpolation="nearest", extent=(-0.5, steps - 0.5, 0.5, turns + 0.5))
        heat.set_facecolor("white"), heat.grid(False)
        heat.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        heat.tick_params(labelleft=True)
        step_axis(heat, groups, None)
        draw(axis, runs, third(False), color=BLUE, marker="o", markersize=3, label="first third of the turn limit")
        draw(axis, runs, third(True), color=RED, linestyle="--", marker="s", markersize=3, label="last third of it")
    same_scale(lower)
    for axis in lower:
        axis.yaxis.set_major_locator(MaxNLocator(3))
    fig.colorbar(image, ax=upper, label="mean entropy of the turn (nats)", aspect=30, extend="max")
    legend(fig, lower)
    return fig


def compare(axes, groups, values):
    """A line per group in each panel. values: for each (title, unit, key or function of `curve`)."""
    for axis, (title, unit, value) in zip(axes, values):
        for i, (label, runs) in enumerate(groups.items()):               # colour, dashes and marker differ: 280 different lines
            steps = curve(runs, value)[0]
            every = max(len(steps) // 8, 1)
            draw(axis, runs, value, 0.2 if len(groups) < 4 else 0.08, color=COLOURS[i % 7], linestyle=DASHES[i % 5], marker=MARKERS[i % 8],
                 markevery=(i % every, every), label=seeds(label, runs))
        axis.set(title=title, ylabel=unit)
        step_axis(axis, groups)
        if not any(len(line.get_xdata()) for line in axis.lines):
            axis.text(0.5, 0.5, "not in these logs", transform=axis.transAxes, ha="center")


def success(groups):
    fig = Figure((13, 7.5), layout="constrained")
    axes = list(fig.subplot_mosaic([["training", "training"], ["iid", "ood"]]).values())
    compare(axes, groups, [("training", "mean return", "reward"), ("IID", "episodes won (share)", "iid_success"),
                           ("OOD", "episodes won (share)", "ood_success")])
    same_scale(axes[1:])
    legend(fig, axes)
    return fig


# As they are added to the loss, from a row of the log
TERMS = [("policy, $L_{MT}$", "policy_loss"),
         ("entropy, $-\\lambda L_H$", lambda row, config: -config["entropy_coef"] * row["entropy_loss"] if "loss" in row else None),
         ("smoothing, $\\lambda\\beta_k L_{smooth}$",
          lambda row, config: config["entropy_coef"] * row["beta"] * row["smoothing_loss"] if "loss" in row else None),
         ("KL to the start, times its weight", lambda row, config: config["kl_coef"] * row.get("kl", 0) if "loss" in row else None)]


def loss(groups):
    fig = Figure((13, 7.5), layout="constrained")
    axes = list(fig.subplots(2, 3).flat)
    terms = [(title, "loss", value) for title, value in TERMS]
    compare(axes, groups, [("loss: the sum of the four terms", "loss", "loss"), *terms, ("$\\beta_k$", "weight", "beta")])
    axes[4].set_ylim(0)
    for axis in (axes[0], axes[4]):                                      # the KL can jump by orders of magnitude
        if np.ptp(axis.dataLim.intervaly) > 0.01:
            axis.set_yscale("symlog", linthresh=1e-3)
            axis.set_ylabel("loss (log beyond ±0.001)")
    legend(fig, axes, "line: mean of the seeds; band: lowest to highest seed; each panel has its own scale")
    return fig


def correlation(xs, ys):
    """Pearson's r; None for fewer than 3 pairs, or where one side is constant."""
    return statistics.correlation(xs, ys) if len(xs) > 2 and len(set(xs)) > 1 and len(set(ys)) > 1 else None


def final(log):
    """A run's std(ΔH̄) and its last success, (std, IID, OOD); None before two changes of the entropy and a second evaluation."""
    if sum("entropy" in row for row in log) < 3 or sum("iid_success" in row for row in log) < 2:
        return None
    numbers = summary(log, 1)
    return numbers["jump"], numbers["iid_after"], numbers["ood_after"]


def oscillation(groups):
    fig = Figure((13, 7.5), layout="constrained")
    axes = fig.subplots(1, 2, sharex=True, sharey=True)
    points = [[point for _, _, log in runs if (point := final(log))] for runs in groups.values()]
    for split, axis in enumerate(axes, 1):
        for i, (label, found) in enumerate(zip(groups, points)):
            axis.plot([p[0] for p in found], [p[split] for p in found], linestyle="", color=COLOURS[i % 7], marker=MARKERS[i % 8], markersize=11,
                      markerfacecolor="none", markeredgewidth=2, label=f"{label} ({len(found)} run{'s' * (len(found) != 1)})")
        pairs = [(p[0], p[split]) for found in points for p in found]
        r = correlation([x for x, _ in pairs], [y for _, y in pairs])
        axis.set_title(f"{('IID', 'OOD')[split - 1]}: " + (f"Pearson's $r = {r:.2f}$, " if r is not None else "") + f"all $n = {len(pairs)}$ runs")
        axis.set(xlabel="std($\\Delta\\bar{H}$), how much the mean entropy jumps (nats)", ylabel="episodes won at the last evaluation (share)")
        axis.label_outer()
        axis.xaxis.set_major_locator(MaxNLocator(5))
        if not pairs:
            axis.text(0.5, 0.5, "no run with three steps and two evaluations", transform=axis.transAxes, ha="center")
    legend(fig, axes, None)
    return fig


def penalty(h, low, high, form):
    """Eq. 3's P of tokens with entropy h: v2's hinge, or v1's indicator."""
    distance = np.maximum(low - h, 0) + np.maximum(h - high, 0)
    return distance if form == "hinge" else np.sign(distance)


def net(h, low, high, alpha_beta):
    """∂L/∂H of tokens with entropy h in units of λ·w: the bonus, and α·β_k times the slope of the hinge."""
    return -1 + alpha_beta * (1.0 * (h > high) - (h < low))


def gradient():
    """The two penalties, their slopes, and what Eq. 6 makes of them; needs no run."""
    fig = Figure((13, 7.5), layout="constrained")
    axes = fig.subplot_mosaic([["penalty", "net"], ["slope", "net"]], width_ratios=[1, 1.2])
    low, high, h = 0.5, 2.0, np.linspace(0, 3, 3001)
    for name, limits, title, unit in (("penalty", (-0.1, 1.7), "penalty of a token", "$P$"),
                                      ("slope", (-1.4, 1.4), "its slope", "$\\partial P / \\partial H$"),
                                      ("net", (-3.5, 1.6), "gradient of the loss, Eq. 6", "$\\partial L / \\partial H$, in units of $\\lambda w$")):
        axes[name].axvspan(low, high, color=SKY, alpha=0.25, linewidth=0)
        axes[name].set(xlim=(0, 3), ylim=limits, title=title, ylabel=unit, xlabel="entropy of the token, in units of $\\bar{H}_W$")
    hinge, indicator = {"color": BLUE, "label": "hinge (v2)"}, {"color": RED, "linestyle": "--", "label": "indicator (v1, published code)"}
    axes["penalty"].plot(h, penalty(h, low, high, "hinge"), **hinge)
    axes["penalty"].plot(h, penalty(h, low, high, "indicator"), **indicator)
    axes["slope"].plot(h, net(h, low, high, 1) + 1, **hinge)
    axes["slope"].plot(h, 0 * h, **indicator)
    for value, dashes, what in ((0.2, "-", "raises entropy everywhere"), (2, ":", "pulls it back above the cap")):
        text = f"hinge, $\\alpha\\beta_k = {value}$: {what}"
        axes["net"].plot(h, net(h, low, high, value), color=BLUE, linewidth=3, linestyle=dashes, label=text)
    axes["net"].plot(h, 0 * h - 1, **indicator)
    axes["net"].axhline(0, color="#000000", linewidth=1)
    axes["penalty"].text(1.25, 0.5, "corridor\n$\\kappa_l = 0.5$, $\\kappa_r = 2$", ha="center", va="center")
    for x, y, text in ((1.25, 0.2, "above 0: lowers entropy"), (1.25, -0.2, "below 0: raises entropy"), (0.25, -1.4, "$-(1+0.2)$"),
                       (0.25, -2.8, "$-(1+2)$"), (2.5, -0.6, "$-(1-0.2)$"), (2.5, 1.2, "$-(1-2)$")):
        axes["net"].text(x, y, text, ha="center", va="center")
    axes["penalty"].legend(loc="upper center"), axes["net"].legend(loc="lower right")
    return fig


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Token entropy</title><style>
body { font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #000; background: #fff }
pre, .written { font-family: monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .2em 0; tab-size: 2 }
pre, summary { color: #444; font-family: monospace }
.turn { border-left: 4px solid #ccc; padding-left: .8em; margin: 1em 0 } .invalid { border-color: #000 }
b { background: #000; color: #fff; padding: 0 .3em } .scale { display: flex; gap: .5em; margin: 2.4em 0 }
.written span { margin: 0 2px; box-shadow: 0 0 0 1px #ccc } .above { outline: 2px solid #000 } .below { border-bottom: 3px dotted #000 }
.bar { position: relative; flex: 1; background: linear-gradient(to right, COLOURS); border: 1px solid #888 }
.bar span { position: absolute; height: 100%; border-left: 2px solid #000; white-space: nowrap } .bar i { position: absolute; left: 0 }
.floor i { bottom: 100% } .cap i { top: 100% } 
</style><h1>Token entropy, run by run</h1><p>The background of a token is the entropy of the distribution it was drawn from, on one
scale for the page; point at a token for the number, click on an observation to unfold it. <span class="above">Outlined</span>: above the corridor's cap.
<span class="below">Dotted</span>: below its floor.</p>
"""


def shade(share):
    """From white to an orange that black can be read on, darker all the way in grey too."""
    return "#" + "".join(f"{round(255 - (255 - end) * share):02x}" for end in (213, 94, 0))


def transcript(folder):
    """The last of a run's transcripts that has a corridor, or None."""
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "transcripts", "step-*.json")), reverse=True):
        try:
            data = json.load(open(path, encoding="utf-8"))
            if data["corridor"] and data["episodes"]:
                return data
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"plot.py: {path} can't be read ({type(error).__name__}: {error})")


def section(title, step, corridor, episode, top):
    """An episode as HTML. top: the colour scale's end, in nats."""
    (low, high), escape = corridor, html.escape
    def token(text, h):
        mark = ' class="above"' if h > high else ' class="below"' if h < low else ""
        return f'<span{mark} style="background:{shade(h / top)}" title="{h:.3f} nats">{escape(text)}</span>'
    def observation(text, first):                        # the first is open, of the others only the first line shows until clicked
        line, _, more = escape(text.strip()).partition("\n")
        return f'<details{" open" * first}><summary>{line}</summary><pre>{more}</pre></details>'
    turns = [f'<div class="turn{" invalid" * turn["invalid"]}">{observation(turn["observation"], number == 1)}<div class="written">'
             f'{"".join(map(token, turn["tokens"], turn["entropy"]))}</div>turn {number}, '
             + ("no action" if turn["action"] is None else f"action: {escape(turn['action'])}") + " <b>invalid</b>" * turn["invalid"] + "</div>\n"
             for number, turn in enumerate(episode["turns"], 1)]
    goal = f"<br>Task: {escape(episode['goal'])}" if "goal" in episode else ""                # older runs did not write it
    ticks = "".join(f'<span class="{name}" style="left:{100 * h / top:.1f}%"><i>{name} {h:.3f}</i></span>'
                    for name, h in (("floor", low), ("cap", high)))
    return (f"<h2>{escape(title)}</h2><p>Step {step}, {escape(episode['task'])}, variation {episode['variation']}: "
            f"<strong>{'success' if episode['success'] else 'failure'}</strong>, score {episode['score']}, {len(turns)} turns. "
            f"Corridor: {low:.3f} to {high:.3f} nats.{goal}</p>\n"
            f'<div class="scale">0<div class="bar">{ticks}</div>{top:.3f} nats</div>\n{"".join(turns)}')


def page(groups):
    """The transcripts of all runs that have one -> HTML, or None."""
    runs = [(f"{label}, seed {config['seed']}", transcript(folder)) for label, group in groups.items() for folder, config, _ in group]
    found = [(title, data["step"], data["corridor"], episode) for title, data in runs if data for episode in data["episodes"]]
    if without := sum(data is None for _, data in runs):
        print(f"{without} of {len(runs)} runs have no transcripts/step-*.json with a corridor and are not in transcript.html")
    top = max([h for *_, corridor, episode in found for h in [*corridor, *(h for turn in episode["turns"] for h in turn["entropy"])]], default=1)
    return PAGE.replace("COLOURS", f"{shade(0)}, {shade(1)}") + "".join(section(*one, top) for one in found) if found else None


def write(path, save):
    """Whole or not at all. save(file) does the writing."""
    with open(path + ".new", "wb") as file:
        save(file)
    os.replace(path + ".new", path)
    print(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"plot.py: {message}; see --help\n")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run folder, or a folder of run folders")
    parser.add_argument("--out", default="figures", help="where the files go")
    parser.add_argument("--format", default="png", choices=("png", "svg", "pdf"))
    args = parser.parse_args()
    groups = grouped([run for path in args.runs for run in load(path)])
    text = page(groups)
    undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[args.format]       # the same bytes every time
    try:
        os.makedirs(args.out, exist_ok=True)
        with rc_context(LOOK):
            for make in (entropy, entropy_by_turn, success, loss, oscillation) if groups else (gradient,):
                figure = make(groups) if groups else make()
                if groups:
                    figure.suptitle(", ".join(sorted({config["env"] for runs in groups.values() for _, config, _ in runs})), fontsize=13)
                write(os.path.join(args.out, f"{make.__name__}.{args.format}"), lambda file: figure.savefig(file, format=args.format, metadata=undated))
        if text:
            write(os.path.join(args.out, "transcript.html"), lambda file: file.write(text.encode()))
    except OSError as error:
        sys.exit(f"plot.py: {error}")


if __name__ == "__main__":
    main()
