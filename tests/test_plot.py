"""The figures: names of groups, what is drawn is what was logged, odd runs, one-line errors."""

import json
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

CONFIG = {"env": "scienceworld", "model": "tiny", "algo": "grpo", "steps": 4, "lr": 2e-4}
CONFIG |= {"entropy_coef": 0.001, "smoothing": "hinge", "kappa_l": 0.0, "kappa_r": 2.0}
CONFIG |= {"alpha": 0.1, "window": None, "seed": 0, "out": "a"}
PLAIN = {"entropy_coef": 0.0}
SHARES = [0.75, 0.0, 0.25] + [0.0] * 29
NAN = np.nan


def rows_of(entropies, kappa_l=0.0, kappa_r=2.0, evaluated=(0.25, 0.75), **_):
    """A log as train.py writes it. evaluated: IID success in the first and the last row, or ()."""
    rows = []
    for step, h in enumerate(entropies):
        row = {"step": step, "success": h / 4, "entropy": h, "kl": 0.02}
        row |= {"first_entropy": 2 * h, "rest_entropy": h / 2, "entropy_histogram": SHARES}
        row |= {"corridor_low": None, "corridor_high": None}
        if step:
            past = sum(entropies[:step]) / step
            row["corridor_low"] = kappa_l * past
            row["corridor_high"] = kappa_r * past if kappa_r < np.inf else None
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
    """runs: {(arm, seed): entropies} -> NAME.csv and NAME.json"""
    table = {key: rows_of(entropies) for key, entropies in runs.items()}
    write_table(str(path.with_suffix("")), table)
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


# settings of runs, and the labels of their groups; in the last two what differs has no effect
LABELS = """[{}] | GRPO+EPO
[{"algo": "ppo"}, {"entropy_coef": 0.0}] | PPO+EPO; GRPO
[{}, {"entropy_coef": 0.0}, {"smoothing": "off"}] | GRPO+EPO; GRPO; GRPO+EPO-Base
[{}, {"smoothing": "indicator"}] | GRPO+EPO, smoothing hinge; GRPO+EPO, smoothing indicator
[{}, {"lr": 1e-3}] | GRPO+EPO, lr 0.0002; GRPO+EPO, lr 0.001
[{}, {"alpha": 3.0}] | GRPO+EPO, α 0.1; GRPO+EPO, α 3
[{}, {"entropy_coef": 0.1}] | GRPO+EPO, λ 0.001; GRPO+EPO, λ 0.1 (100 × the paper's)
[{"entropy_coef": 0.02, "smoothing": "off"}] | GRPO+EPO-Base, λ 0.02 (20 × the paper's)
[{}, {"window": 10}] | GRPO+EPO; GRPO+EPO, window 10
[{}, {"model": "a/b"}] | GRPO+EPO, model tiny; GRPO+EPO, model a/b
[{}, {"algo": "ppo", "critic_lr": 1}] | GRPO+EPO; PPO+EPO
[{}, {"seed": 1, "out": "b", "lora_rank": 0, "tokens_per_batch": 9}] | GRPO+EPO
[{"entropy_coef": 0.0}, {"entropy_coef": 0.0, "alpha": 1, "smoothing": "off"}] | GRPO"""


@pytest.mark.parametrize("line", LABELS.splitlines())
def test_labels_are_the_papers_and_say_what_differs(tmp_path, line):
    changes, labels = line.split(" | ")
    for i, change in enumerate(json.loads(changes)):
        a_run(tmp_path / str(i), **change)
    assert list(groups_of(tmp_path)) == labels.split("; ")


def test_a_path_is_a_run_some_runs_or_an_arm_and_can_have_a_label(tmp_path):
    a_run(tmp_path / "runs/a")
    a_run(tmp_path / "runs/b", alpha=3)
    a_run(tmp_path / "lr=1/c", **PLAIN)
    twice = tmp_path / "lr=1", tmp_path / "lr=1/c"
    assert groups_of(f"all={tmp_path}/runs", *twice) == {"all": 2, "GRPO": 1}
    file, steps = tmp_path / "s.csv", [0.1, 0.2]
    runs = {("plain", 0): steps, ("plain", 1): steps, ("epo", 0): steps}
    a_study(file, runs, {"plain": CONFIG | PLAIN, "epo": CONFIG})
    assert groups_of(file) == {"GRPO": 2, "GRPO+EPO": 1}
    assert groups_of(f"x={file}/plain", f"{file}/epo") == {"x": 2, "GRPO+EPO": 1}


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
    assert upper.get_title() == "GRPO+EPO (n = 2)"
    assert plain.get_title() == "GRPO (n = 1)"
    assert lines_of(upper)["mean entropy of a step"] == pytest.approx([0.3, 0.5, 0.2, 0.4])
    band = upper.collections[0].get_paths()[0].vertices.tolist()
    for corner in ([0, 0.2], [0, 0.4], [3, 0.3], [3, 0.5]):
        assert corner in band
    # from step 1 on: twice the mean so far, of both seeds; no corridor acts on plain GRPO
    assert upper.lines[2].get_xdata().tolist() == [1, 2, 3]
    assert upper.lines[2].get_ydata() == pytest.approx([0.6, 0.8, 2 / 3])
    assert len(plain.lines) == 1
    drawn = lines_of(lower)
    assert drawn["success in training"] == pytest.approx([0.075, 0.125, 0.05, 0.1])
    iid, ood = (drawn[f"evaluation on {split} tasks"] for split in ("IID", "OOD"))
    assert iid == pytest.approx([0.25, NAN, NAN, NAN, 0.75], nan_ok=True)
    assert ood == pytest.approx([0.125, NAN, NAN, NAN, 0.375], nan_ok=True)
    assert lower.get_title() == "IID 0.75, OOD 0.38"


def test_a_floor_no_cap_and_a_lost_evaluation(tmp_path):
    run = a_run(tmp_path / "a", kappa_l=0.5, kappa_r=float("inf"), evaluated=(0.5, None))
    upper, lower = plot.overview(plot.grouped([run])).axes
    _, floor, cap = (line.get_ydata() for line in upper.lines)
    assert floor == pytest.approx([0.1, 0.15, 0.7 / 6])
    assert not len(cap)
    assert lower.get_title() == "IID 0.50, OOD 0.25"


def test_tokens_and_columns_are_as_logged(tmp_path):
    groups = two_seeds_and_plain(tmp_path)
    picture, _, means, *_ = plot.tokens(groups).axes
    shares = picture.collections[0].get_array()
    assert shares.shape == (32, 5)
    assert shares[:, 0].tolist() == SHARES
    # the last row of a log is an evaluation alone
    assert np.isnan(shares[:, 4].filled(NAN)).all()
    first, rest = lines_of(means).values()
    assert (first[0], rest[0]) == pytest.approx((0.6, 0.15))
    (axis,) = plot.column(groups, "kl").axes
    assert lines_of(axis) == {"GRPO+EPO (n = 2)": [0.02] * 4, "GRPO (n = 1)": [0.02] * 4}


def test_the_gradient_figure_by_hand():
    """At entropies of 0, 1 and 3: below the corridor, in it, and above it."""
    expected = {"= 0.2$": [-1.2, -1, -0.8], "= 2$": [-3, -1, 1], "any": [-1, -1, -1]}
    drawn = lines_of(gradient().axes[0])
    for (label, y), (end, slopes) in zip(drawn.items(), expected.items(), strict=False):
        assert end in label
        assert [y[0], y[1000], y[3000]] == pytest.approx(slopes)


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
    files = [str(out / f"{name}.png") for name in names.split(",")]
    assert capsys.readouterr().out.split() == files
    assert sorted(map(str, out.iterdir())) == sorted(files)
    assert not list(recwarn)


@pytest.mark.parametrize("form", ("png", "svg", "pdf"))
def test_the_same_bytes_every_time(tmp_path, monkeypatch, form):
    run = a_run(tmp_path / "run")
    contents = []
    for _ in range(2):
        main(monkeypatch, run, "--out", tmp_path, "--format", form, "--draw", "kl")
        contents.append((tmp_path / f"kl.{form}").read_bytes())
    assert contents[0] == contents[1]


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
