"""The figures: names of groups, what is drawn is what was logged, odd runs, one-line errors."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import plot
from figures.gradient import gradient, slopes
from support.run_folder import ROOT

CONFIG = {"env": "scienceworld", "model": "tiny", "algo": "grpo", "steps": 4, "lr": 2e-4}
CONFIG |= {"entropy_coef": 0.001, "smoothing": "hinge", "kappa_l": 0.0, "kappa_r": 2.0}
CONFIG |= {"alpha": 0.1, "window": None, "seed": 0, "out": "a"}
PLAIN = {"entropy_coef": 0.0}
SHARES = [0.75, 0.0, 0.25] + [0.0] * 29


def rows_of(entropies, kappa_l=0.0, kappa_r=2.0, evaluated=(0.25, 0.75), **_):
    """A log as train.py writes it. evaluated: IID success in the first and the last row, or ()."""
    rows = []
    for step, h in enumerate(entropies):
        row = {"step": step, "success": h / 4, "entropy": h, "kl": 0.02}
        row |= {"entropy_by_turn": [h, 2 * h][: 2 - step % 2], "entropy_histogram": SHARES}
        row |= {"first_entropy": 2 * h, "rest_entropy": h / 2}
        for name, kappa in (("corridor_low", kappa_l), ("corridor_high", kappa_r)):
            row[name] = kappa * np.mean(entropies[:step]) if step and kappa < np.inf else None
        rows.append(row)
    rows.append({"step": len(entropies)})
    for row, iid in zip((rows[0], rows[-1]), evaluated, strict=False):
        row |= {"iid_success": iid, "ood_success": iid and iid / 2, "iid_by_task": {"a": iid}}
    return rows


def a_run(folder, entropies=(0.2, 0.4, 0.1, 0.3), **changes):
    """A run folder, with half a line at the end of its log, as a kill leaves it."""
    config = CONFIG | changes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    lines = [json.dumps(row) + "\n" for row in rows_of(entropies, **config)]
    (folder / "log.jsonl").write_text("".join(lines) + '{"step": 5, "entr')
    return str(folder)


def a_study(path, runs, settings):
    """runs: {(arm, seed): entropies} -> NAME.csv and NAME.json, as tools.study writes them."""
    names = "step success entropy corridor_low corridor_high entropy_histogram".split()
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["arm", "seed", *names])
        for key, entropies in runs.items():
            for row in rows_of(entropies):
                cells = [json.dumps(row.get(name)) for name in names]
                table.writerow([*key, *("" if cell == "null" else cell for cell in cells)])
    path.with_suffix(".json").write_text(json.dumps({"settings": settings}))


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
    plot.main()


def lines_of(axis):
    """{label: what is drawn} of the means."""
    return {line.get_label(): [float(y) for y in line.get_ydata()] for line in axis.lines}


def groups_of(*arguments):
    """{label, with plain spaces: number of runs}."""
    groups = plot.grouped(map(str, arguments))
    return {text.replace("\xa0", " "): len(runs) for text, runs in groups.items()}


EPO, LARGE = "GRPO+EPO", "GRPO+EPO, α 3, λ 0.1 (100 × the paper's)"
LABELS = [
    ([{}], [EPO]),
    ([{"algo": "ppo"}, PLAIN], ["PPO+EPO", "GRPO"]),
    ([{}, PLAIN, {"smoothing": "off"}], [EPO, "GRPO", "GRPO+EPO-Base"]),
    ([{}, {"smoothing": "indicator"}], [EPO + ", smoothing hinge", EPO + ", smoothing indicator"]),
    ([{}, {"lr": 1e-3}], ["GRPO+EPO, lr 0.0002", "GRPO+EPO, lr 0.001"]),
    ([{}, {"alpha": 3.0, "entropy_coef": 0.1}, PLAIN], ["GRPO+EPO, α 0.1, λ 0.001", LARGE, "GRPO"]),
    ([{"entropy_coef": 0.02, "smoothing": "off"}], ["GRPO+EPO-Base, λ 0.02 (20 × the paper's)"]),
    ([{}, {"window": 10}], ["GRPO+EPO", "GRPO+EPO, window 10"]),
    ([{}, {"model": "a/b"}], ["GRPO+EPO, model tiny", "GRPO+EPO, model a/b"]),
    ([{}, {"algo": "ppo", "critic_lr": 1}], ["GRPO+EPO", "PPO+EPO"]),
    # what had no effect makes no group
    ([{}, {"seed": 1, "out": "b", "lora_rank": 0, "tokens_per_batch": 9}], ["GRPO+EPO"]),
    ([PLAIN, PLAIN | {"alpha": 1, "smoothing": "off"}], ["GRPO"]),
]


@pytest.mark.parametrize("changes, expected", LABELS)
def test_labels_are_the_papers_and_say_what_differs(tmp_path, changes, expected):
    runs = [a_run(tmp_path / str(i), **change) for i, change in enumerate(changes)]
    assert list(groups_of(*runs)) == expected


def test_a_path_is_a_run_some_runs_or_an_arm_and_can_have_a_label(tmp_path):
    for name, change in (("runs/a", {}), ("runs/b", {"alpha": 3}), ("lr=1/c", PLAIN)):
        a_run(tmp_path / name, **change)
    twice = tmp_path / "lr=1", tmp_path / "lr=1" / "c"
    assert groups_of(f"all={tmp_path}/runs", *twice) == {"all": 2, "GRPO": 1}
    file, steps = tmp_path / "s.csv", [0.1, 0.2]
    runs = {("plain", 0): steps, ("plain", 1): steps, ("epo", 0): steps}
    a_study(file, runs, {"plain": CONFIG | PLAIN, "epo": CONFIG})
    assert groups_of(file) == {"GRPO": 2, EPO: 1}
    assert groups_of(f"x={file}/plain", f"{file}/epo") == {"x": 2, EPO: 1}
    study = plot.read_study(file)
    assert list(study) == list(runs) and study["epo", 0][0] == CONFIG
    (_, last, end) = study["epo", 0][1]
    assert last == {name: rows_of(steps)[1][name] for name in last} and end == {"step": 2}


def test_the_mean_by_hand():
    """Seeds with 1, 3 and 2, 5, 9: the mean is over those that got so far, of what there is."""
    run = lambda *numbers: ({}, {"x": np.array(numbers, float), "step": np.arange(len(numbers))})
    table = plot.stack([run(1, 3, None), run(2, 5, 9, np.inf)], "x")
    expected = [[1, 3, np.nan, np.nan], [2, 5, 9, np.inf], [1.5, 4, 9, np.nan]]
    assert np.array_equal([*table, plot.mean(table)], expected, equal_nan=True)
    # a column that no log has
    assert plot.stack([run(1, 2), run(3)], "y").shape == (2, 2)


def two_seeds_and_plain(tmp_path):
    a_run(tmp_path / "epo" / "0")
    a_run(tmp_path / "epo" / "1", (0.4, 0.6, 0.3, 0.5), seed=1)
    return plot.grouped([str(tmp_path / "epo"), a_run(tmp_path / "plain", **PLAIN)])


def test_the_overview_is_as_logged(tmp_path):
    upper, plain, lower, _ = plot.overview(two_seeds_and_plain(tmp_path)).axes
    assert upper.get_title() == "GRPO+EPO (n = 2)" and plain.get_title() == "GRPO (n = 1)"
    assert lines_of(upper)["mean entropy of a step"] == pytest.approx([0.3, 0.5, 0.2, 0.4])
    band = upper.collections[0].get_paths()[0].vertices.round(9).tolist()
    assert all([step, h] in band for step, h in ((0, 0.2), (0, 0.4), (3, 0.3), (3, 0.5)))
    # from step 1 on: twice the mean so far, of both seeds; no corridor acts on plain GRPO
    assert list(upper.lines[2].get_xdata()) == [1, 2, 3] and len(plain.lines) == 1
    assert upper.lines[2].get_ydata() == pytest.approx([0.6, 0.8, 2 / 3])
    assert lines_of(lower)["success in training"] == pytest.approx([0.075, 0.125, 0.05, 0.1])
    evaluations = [[y for y in line.get_ydata() if y == y] for line in lower.lines[1:]]
    assert evaluations == [[0.25, 0.75], [0.125, 0.375]]
    assert np.flatnonzero(np.isfinite(lower.lines[1].get_ydata())).tolist() == [0, 4]
    assert lower.get_title() == "IID 0.75, OOD 0.38"


def test_a_floor_no_cap_and_a_lost_evaluation(tmp_path):
    run = a_run(tmp_path / "a", kappa_l=0.5, kappa_r=float("inf"), evaluated=(0.5, None))
    upper, lower = plot.overview(plot.grouped([run])).axes
    floor, cap = (list(line.get_ydata()) for line in upper.lines[1:])
    assert floor == pytest.approx([0.1, 0.15, 0.7 / 6]) and cap == []
    assert lower.get_title() == "IID 0.50, OOD 0.25"


def test_tokens_and_columns_are_as_logged(tmp_path):
    groups = two_seeds_and_plain(tmp_path)
    picture, _, means, *_ = plot.tokens(groups).axes
    shares = picture.collections[0].get_array()
    assert shares.shape == (32, 5) and shares[:, 0].tolist() == SHARES
    # the last row of a log is an evaluation alone
    assert np.ma.masked_invalid(shares[:, 4]).count() == 0
    assert [round(y[0], 6) for y in lines_of(means).values()] == [0.6, 0.15]
    (axis,) = plot.column(groups, "kl").axes
    assert lines_of(axis) == {"GRPO+EPO (n = 2)": [0.02] * 4, "GRPO (n = 1)": [0.02] * 4}


@pytest.mark.parametrize("product", (0.2, 2.0))
def test_the_gradient_figure_by_hand(product):
    h = torch.tensor([0.2, 1.0, 2.5])
    expected = [-1 - product, -1, product - 1]
    assert slopes(h, "hinge", product).tolist() == pytest.approx(expected)
    assert slopes(h, "indicator", product).tolist() == pytest.approx([-1] * 3)
    drawn = next(y for text, y in lines_of(gradient().axes[0]).items() if f"= {product:g}$" in text)
    assert [drawn[i] for i in (0, 1000, -1)] == pytest.approx(expected)


ODD = {
    "one step": [{"entropies": (0.2,)}],
    "no evaluations": [{"evaluated": ()}],
    "no cap": [{"kappa_r": float("inf")}],
    "different lengths": [{}, {"entropies": (0.1, 0.2), "seed": 1}, {"entropies": (0.1,)} | PLAIN],
    "no update yet": [{"entropies": ()}],
    "nine groups": [{"lr": 1e-4 * (i + 1)} for i in range(9)],
}


@pytest.mark.parametrize("odd", ODD)
def test_every_figure_of_odd_runs(tmp_path, monkeypatch, capsys, recwarn, odd):
    """Nothing is missing, nothing warns; more than four groups are lines in one panel."""
    for i, changes in enumerate(ODD[odd]):
        a_run(tmp_path / "runs" / str(i), **changes)
    out = tmp_path / "out"
    main(monkeypatch, tmp_path / "runs", "--out", out)
    names = plot.OF_MANY if odd == "nine groups" else plot.OF_FEW
    files = [out / f"{name}.png" for name in names.split(",")]
    assert capsys.readouterr().out.split() == list(map(str, files))
    assert sorted(out.iterdir()) == sorted(files) and not list(recwarn)


@pytest.mark.parametrize("form", ("png", "svg", "pdf"))
def test_the_same_bytes_every_time(tmp_path, monkeypatch, form):
    run, out = a_run(tmp_path / "run"), tmp_path / "out"
    draw = lambda: main(monkeypatch, run, "--out", out, "--format", form, "--draw", "kl")
    draw()
    first = (out / f"kl.{form}").read_bytes()
    draw()
    assert (out / f"kl.{form}").read_bytes() == first


@pytest.fixture
def line(tmp_path, monkeypatch, capsys):
    """line(arguments): what plot.py says instead of drawing."""
    a_run(tmp_path / "run")
    a_study(tmp_path / "s.csv", {("epo", 0): [0.2, 0.4]}, {"epo": CONFIG})
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.chdir(tmp_path)

    def line(arguments):
        with pytest.raises(SystemExit) as stop:
            main(monkeypatch, *arguments.split())
        # Python prints a text and exits with 1
        says = stop.value.code if stop.value.code != 2 else capsys.readouterr().err.strip()
        assert says.startswith("plot.py: ") and "\n" not in says
        return says

    return line


# a file of a run or of a study, a pattern in it, what stands there instead, what the line says
FAULTS = [
    ("run/log.jsonl", ".*", "", "no whole row yet"),
    ("run/log.jsonl", "\n.*", "", "no whole row yet"),
    ("run/log.jsonl", '}\n{"st', '}\n{"st\n{"st', "line 2 is not JSON"),
    ("run/log.jsonl", '"step": 1', '"stop": 1', "is not the row of step 1"),
    ("run/log.jsonl", '"entropy": 0.2', '"entropy": "x"', "is not what a run writes"),
    ("run/log.jsonl", '"kl": 0.02', '"kl": [1]', "run cannot be read (ValueError"),
    ("run/log.jsonl", r"\[0.75.*?\]", "1", "run cannot be read (ValueError"),
    ("run/log.jsonl", r"\[0.75.*", "[1]}\n", "run cannot be read (ValueError"),
    ("run/log.jsonl", r"\[0.75", '["x"', "is not what a run writes"),
    ("run/config.json", '"env".*"model"', '"model"', "its env is missing"),
    ("run/config.json", '"grpo"', "5", "its algo is missing, or not of type str"),
    ("run/config.json", "0.001", '"x"', "run cannot be read (TypeError"),
    ("run/config.json", ".*", "[", "config.json cannot be read"),
    ("s.csv", "epo,0,0.*?\n", "", "a step is not in it"),
    ("s.csv", ",0.05", ",x", "s.csv cannot be read (JSONDecodeError"),
    ("s.csv", "epo", "other", "KeyError: 'other'"),
    ("s.json", "settings", "setting", "KeyError: 'settings'"),
    ("s.json", '"algo"', '"other"', "KeyError: 'algo'"),
]


@pytest.mark.parametrize("file, pattern, new, says", FAULTS)
def test_a_damaged_file_is_one_line(line, file, pattern, new, says):
    text = Path(file).read_text()
    Path(file).write_text(re.sub(pattern, lambda _: new, text, flags=re.S))
    assert says in line("run" if file.startswith("run/") else "s.csv")


ERRORS = {
    "nothing": "nothing is no run folder (config.json, log.jsonl), and none is inside",
    "A=nothing": "nothing is no run folder",
    "nothing.csv": "nothing.csv cannot be read (FileNotFoundError",
    "s.csv/plain": "s.csv/plain: this study has no such arm",
    "run --draw kll": "--draw: kll is no figure, and no number in these logs",
    "run --draw iid_by_task": "--draw: iid_by_task is no figure",
    "run --draw entropy_histogram": "--draw: entropy_histogram is no figure",
    "run --format gif": "argument --format: invalid choice: 'gif'",
    "run --out file": "File exists: 'file'",
    "--out file": "the following arguments are required",
}


@pytest.mark.parametrize("arguments", ERRORS)
def test_errors_are_one_line(line, arguments):
    assert ERRORS[arguments] in line(arguments)


def test_no_torch_and_an_error_as_the_shell_sees_it():
    check = "import sys, plot; sys.argv = ['plot.py', 'no-such-run']; "
    check += "print({'torch', 'tkinter'} & {*sys.modules}); plot.main()"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n" and done.returncode == 1
    assert done.stderr.startswith("plot.py: no-such-run is no run folder")
