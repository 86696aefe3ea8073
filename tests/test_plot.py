"""The figures: names of groups, what is drawn is what was logged, odd runs, one-line errors."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import plot
from figures.gradient import gradient
from support.run_folder import ROOT
from tools.study import write_table

CONFIG = {"env": "scienceworld", "model": "tiny", "algo": "grpo", "steps": 4}
CONFIG |= {"entropy_coef": 0.001, "smoothing": "hinge", "seed": 0}
PLAIN = {"entropy_coef": 0.0}


def rows_of(entropies, cap=2.0, evaluated=(0.25, 0.75), **_):
    """A log as train.py writes it. evaluated: IID success in the first and the last row, or ()."""
    rows = []
    for h in entropies:
        row = {"step": len(rows), "success": h / 4, "entropy": h, "kl": 0.02}
        row |= {"first_entropy": 2 * h, "rest_entropy": h / 2, "entropy_by_turn": [1.0]}
        row |= {"corridor_low": h / 10, "corridor_high": cap and cap * h}
        rows.append(row)
    rows.append({"step": len(rows)})
    rows[0] |= {"corridor_low": None, "corridor_high": None}
    for row, iid in zip((rows[0], rows[-1]), evaluated, strict=False):
        row |= {"iid_success": iid, "ood_success": iid and iid / 2, "iid_by_task": {"a": iid}}
    return rows


def a_run(name, entropies=(0.2, 0.4, 0.1, 0.3), **changes):
    """A run folder, with half a line at the end of its log, as a kill leaves it -> name"""
    os.makedirs(name)
    config = CONFIG | changes
    Path(name, "config.json").write_text(json.dumps(config))
    lines = [json.dumps(row) + "\n" for row in rows_of(entropies, **config)]
    Path(name, "log.jsonl").write_text("".join(lines) + '{"step": 5, "entr')
    return name


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A run, and a study of two seeds of plain and one of epo."""
    monkeypatch.chdir(tmp_path)
    a_run("run")
    rows = rows_of([0.1, 0.2])
    write_table("s", {("plain", 0): rows, ("plain", 1): rows, ("epo", 0): rows})
    settings = {"plain": CONFIG | PLAIN, "epo": CONFIG}
    Path("s.json").write_text(json.dumps({"settings": settings}))


def main(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["plot.py", *arguments.split()])
    plot.main()


def refuses(monkeypatch, arguments, says):
    with pytest.raises(SystemExit, match=r"\Aplot.py: .*\Z") as stop:
        main(monkeypatch, arguments)
    assert says in stop.value.code


def drawn(*axes):
    """The numbers of every line."""
    return [[round(float(y), 4) for y in line.get_ydata()] for axis in axes for line in axis.lines]


# what a run trained with, and the paper's name of it, of which +EPO alone has a corridor
METHODS = """{} | GRPO+EPO
{"algo": "ppo", "smoothing": "indicator"} | PPO+EPO
{"smoothing": "off"} | GRPO+EPO-Base
{"entropy_coef": 0.0} | GRPO
{"entropy_coef": 0.0, "entropy_target": 0.3} | GRPO+EPO"""


@pytest.mark.parametrize("line", METHODS.splitlines())
def test_a_title_names_the_method_and_the_corridor_is_drawn_where_it_acts(line):
    changes, method = line.split(" | ")
    groups = plot.grouped([a_run("a", **json.loads(changes))])
    assert list(groups) == [f"a: {method}"]
    upper, _ = plot.overview(groups).axes
    assert len(upper.lines) == (3 if method.endswith("+EPO") else 1)


# arguments, and {title: how many runs}
GROUPS = {
    # a mean over methods would say nothing
    "runs runs/d=1": {"runs: GRPO+EPO": 2, "runs: GRPO": 1, "d=1: GRPO": 1},
    "all=runs runs/a all=runs/d=1/e": {"all": 4, "a: GRPO+EPO": 1},
    "s.csv": {"plain: GRPO": 2, "epo: GRPO+EPO": 1},
    "x=s.csv/plain s.csv/epo": {"x": 2, "epo: GRPO+EPO": 1},
}


@pytest.mark.parametrize("arguments", GROUPS)
def test_a_group_is_a_path_or_an_arm_or_all_of_a_label(arguments):
    a_run("runs/a")
    a_run("runs/b", lr=3)
    a_run("runs/c", **PLAIN)
    a_run("runs/d=1/e", **PLAIN)
    groups = plot.grouped(arguments.split())
    assert {title: len(runs) for title, runs in groups.items()} == GROUPS[arguments]


def test_the_mean_is_over_the_seeds_that_got_so_far():
    run = lambda *numbers: ({}, {"x": np.array(numbers), "step": np.arange(len(numbers))})
    seeds = [run(1, 3), run(2, 5, 9)]
    assert plot.mean(plot.stack(seeds, "x")).tolist() == [1.5, 4, 9]
    # a column that no log has
    assert np.isnan(plot.mean(plot.stack(seeds, "y"))).tolist() == [True] * 3


@pytest.fixture
def groups():
    a_run("epo/0")
    a_run("epo/1", (0.4, 0.6, 0.3, 0.5), seed=1)
    return plot.grouped(["epo", a_run("plain", **PLAIN)])


def test_the_overview_is_as_logged(groups):
    upper, plain, lower, _ = plot.overview(groups).axes
    assert upper.get_title() == "epo: GRPO+EPO (n=2)"
    epo = [[0.3, 0.5, 0.2, 0.4], [0.05, 0.02, 0.04], [1.0, 0.4, 0.8]]
    assert drawn(upper, plain) == [*epo, [0.2, 0.4, 0.1, 0.3]]
    assert drawn(lower) == [[0.075, 0.125, 0.05, 0.1], [0.25, 0.75], [0.125, 0.375]]
    # before step 1 there is no corridor
    assert upper.lines[2].get_xdata().tolist() == [1, 2, 3]
    band = upper.collections[0].get_paths()[0].vertices.tolist()
    for corner in ([0, 0.2], [0, 0.4], [3, 0.3], [3, 0.5]):
        assert corner in band


def test_no_cap_and_a_lost_evaluation():
    run = a_run("a", cap=None, evaluated=(0.5, None))
    numbers = drawn(*plot.overview(plot.grouped([run])).axes)
    assert numbers[1:3] == [[0.04, 0.01, 0.03], []]
    assert numbers[4:] == [[0.5], [0.25]]


def test_columns_are_as_logged(groups):
    fig = plot.column(groups, "kl")
    assert drawn(*fig.axes) == [[0.02] * 4] * 2
    names = [text.get_text() for text in fig.legends[0].texts]
    assert names == ["epo: GRPO+EPO (n=2)", "plain: GRPO (n=1)"]


def test_the_gradient_figure_by_hand():
    """At entropies of 0, 1 and 3: below the corridor, in it, and above it."""
    expected = {"= 0.2$": [-1.2, -1, -0.8], "= 2$": [-3, -1, 1], "any": [-1, -1, -1]}
    (axis,) = gradient().axes
    for line, y, end in zip(axis.lines, drawn(axis), expected, strict=False):
        assert end in line.get_label()
        assert [y[0], y[1000], y[3000]] == expected[end]


ODD = {
    "one step": [{"entropies": (0.2,)}],
    "no evaluations": [{"evaluated": ()}],
    "no cap": [{"cap": None}],
    "different lengths": [{}, {"entropies": (0.1, 0.2)}, {"entropies": (0.1,)} | PLAIN],
    "no update yet": [{"entropies": ()}],
    "nine groups": [{"algo": f"x{i}"} for i in range(9)],
}


@pytest.mark.parametrize("odd", ODD)
def test_every_figure_of_odd_runs(monkeypatch, capsys, recwarn, odd):
    """Nothing is missing, nothing warns (but of other tests' open files), all bytes come again."""
    for i, changes in enumerate(ODD[odd]):
        a_run(f"runs/{i}", **changes)
    names = plot.OF_MANY if odd == "nine groups" else plot.OF_FEW
    contents = []
    for out in ("a", "b"):
        main(monkeypatch, f"runs --out {out}")
        files = [f"{out}/{name}.png" for name in names.split(",")]
        assert capsys.readouterr().out.split() == files
        assert len(os.listdir(out)) == len(files)
        contents.append([Path(file).read_bytes() for file in files])
    assert contents[0] == contents[1]
    assert not [str(w.message) for w in recwarn if w.category is not ResourceWarning]


# a file of a run or of a study, a pattern in it, what stands there instead, what the line says
FAULTS = [
    ("run/log.jsonl", "\n.*", "", "no whole row yet"),
    ("run/log.jsonl", '"kl": 0.02', '"kl": [1]', "run cannot be read (setting an array"),
    ("run/log.jsonl", r"\[1.0", '["x"', "not the numbers of step 0"),
    ("s.csv", "epo,0,0.*?\n", "", "a step is not in it"),
    ("s.csv", ",0.05", ",x", "s.csv cannot be read (JSONDecodeError"),
    ("s.csv", "epo", "other", "KeyError: 'other'"),
    ("s.json", "settings", "setting", "KeyError: 'settings'"),
    ("s.json", '"algo"', '"other"', "s.csv cannot be read ('algo')"),
]


@pytest.mark.parametrize("file, pattern, new, says", FAULTS)
def test_a_damaged_file_is_one_line(monkeypatch, file, pattern, new, says):
    text = Path(file).read_text()
    Path(file).write_text(re.sub(pattern, lambda _: new, text, flags=re.S))
    refuses(monkeypatch, "run s.csv", says)


ERRORS = {
    "nothing": "nothing is no run folder (config.json, log.jsonl), and none is inside",
    "nothing.csv": "nothing.csv cannot be read (FileNotFoundError",
    "s.csv/ppo": "s.csv/ppo: this study has no such arm",
    "run A=run run": "two groups would be run: GRPO+EPO; name them with LABEL=PATH",
    "A=run --draw iid_by_task": "iid_by_task is no figure, and no number in these logs",
    "run --draw entropy_by_turn": "--draw: entropy_by_turn is no figure",
    "run --out s.csv": "File exists: 's.csv'",
}


@pytest.mark.parametrize("arguments", ERRORS)
def test_errors_are_one_line(monkeypatch, arguments):
    refuses(monkeypatch, arguments, ERRORS[arguments])


def test_no_torch_and_an_error_as_the_shell_sees_it():
    check = "import sys, plot; sys.argv = ['plot.py', 'no-such-run']; "
    check += "print({'torch', 'tkinter'} & {*sys.modules}); plot.main()"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n" and done.returncode == 1
    assert done.stderr.startswith("plot.py: no-such-run is no run folder")
