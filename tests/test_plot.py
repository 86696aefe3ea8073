"""The figures: names of groups, what is drawn is what was logged, odd runs, one-line errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import plot
from epo import epo_loss
from support.run_folder import SetupError

HERE = Path(__file__).parent.parent
FIGURES = ["entropy", "entropy_by_turn", "loss", "overview", "success", "tokens"]
CONFIG = {
    "env": "scienceworld",
    "games": "auto",
    "model": "tiny",
    "algo": "grpo",
    "steps": 4,
    "turns": 3,
    "lr": 2e-4,
    "entropy_coef": 0.001,
    "smoothing": "hinge",
    "kappa_l": 0.0,
    "kappa_r": 2.0,
    "alpha": 0.1,
    "gamma": 3.0,
    "dynamic_weight": "on",
    "window": None,
    "entropy_decay": 0.0,
    "shaping": 0.0,
    "kl_coef": 0.1,
    "critic_lr": 1e-3,
    "seed": 0,
    "out": "a",
}


def a_row(step, past, entropy, kappa_l, kappa_r):
    """A row of train.py, with numbers that are easy to follow. past: H̄ of the steps before."""
    history_mean = sum(past) / step if step else None
    cap = kappa_r * history_mean if step and kappa_r < np.inf else None
    row = {
        "step": step,
        "success": entropy / 4,
        "reward": entropy / 2,
        "entropy": entropy,
        "entropy_by_turn": [entropy, 2 * entropy, 3 * entropy][: 3 - step % 2],
        "entropy_histogram": [0.75, 0.0, 0.25] + [0.0] * 29,
        "first_entropy": 2 * entropy,
        "rest_entropy": entropy / 2,
        "history_mean": history_mean,
        "corridor_low": kappa_l * history_mean if step else None,
        "corridor_high": cap,
        "above": 0.25 if step else 0.0,
        "below": 0.125 if step and kappa_l else 0.0,
        "beta": 2.0 - step / 4,
        "policy_loss": 0.5,
        "entropy_loss": entropy,
        "smoothing_loss": 0.01,
        "kl": 0.02,
    }
    row["outside"] = row["above"] + row["below"]
    row["loss"] = 0.5 - 0.001 * (entropy - row["beta"] * 0.01) + 0.1 * 0.02
    return row


def a_run(folder, entropies=(0.2, 0.4, 0.1, 0.3), success=(0.25, 0.75), **changes):
    """A run folder as train.py leaves it. success: of the first and the last evaluation; or ()."""
    config = {**CONFIG, **changes}
    bounds = config["kappa_l"], config["kappa_r"]
    rows = [a_row(k, entropies[:k], h, *bounds) for k, h in enumerate(entropies)]
    rows.append({"step": len(entropies)})
    for row, iid in zip((rows[0], rows[-1]), success, strict=False):
        row |= {"iid_success": iid, "ood_success": None if iid is None else iid / 2}
        row |= {"iid_by_task": {"a": iid}, "ood_by_task": {}}
    os.makedirs(folder)
    Path(folder, "config.json").write_text(json.dumps(config))
    Path(folder, "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
    plot.main()


def labelled(axis, label):
    return next(line for line in axis.lines if line.get_label() == label)


def test_names_are_the_papers():
    of = lambda **changes: plot.method(plot.settings({**CONFIG, **changes}))
    assert of() == "GRPO+EPO"
    assert of(algo="ppo") == "PPO+EPO"
    assert of(entropy_coef=0.0, smoothing="off") == of(entropy_coef=0) == "GRPO"
    assert of(smoothing="off") == "GRPO+EPO-Base"
    assert of(smoothing="indicator") == "GRPO+EPO, indicator"
    assert of(smoothing="off", entropy_decay=0.5) == "GRPO+EPO-Decay"
    assert of(dynamic_weight="off") == "GRPO+EPO w/o DW"
    assert of(entropy_coef=0.0, shaping=0.4) == "GRPO+EA"


STRONG = {"alpha": 1.0, "entropy_coef": 0.02}
LARGE = {"model": "Qwen/Qwen2.5-7B-Instruct", "steps": 125}
DIFFERENT_SETTINGS = [
    ([{}], ["GRPO+EPO"]),
    (
        [{}, {"entropy_coef": 0.0}, {"smoothing": "off"}],
        ["GRPO+EPO", "GRPO", "GRPO+EPO-Base"],
    ),
    ([{}, {"lr": 1e-3}], ["GRPO+EPO, lr 0.0002", "GRPO+EPO, lr 0.001"]),
    (
        [{}, STRONG, {"entropy_coef": 0.0}],
        ["GRPO+EPO, α 0.1, λ 0.001", "GRPO+EPO, α 1, λ 0.02", "GRPO"],
    ),
    ([{}, {"window": 10}], ["GRPO+EPO", "GRPO+EPO, window 10"]),
    (
        [{}, LARGE],
        ["GRPO+EPO, model tiny, steps 4", f"GRPO+EPO, model {LARGE['model']}, steps 125"],
    ),
]


@pytest.mark.parametrize("changes, expected", DIFFERENT_SETTINGS)
def test_labels_say_what_differs(changes, expected):
    groups = [plot.settings({**CONFIG, **change}) for change in changes]
    assert [plot.label(own, groups) for own in groups] == expected


def test_only_what_had_an_effect_makes_a_group(tmp_path):
    """Not the seed, the folder or what is off, and not α without its term."""
    numbers = lambda *arguments: {n: len(runs) for n, runs in plot.grouped(arguments).items()}
    a = a_run(tmp_path / "a")
    b = a_run(tmp_path / "b", seed=1, out="b", lora_rank=0, tokens_per_batch=9, games="real")
    assert numbers(a, b) == {"GRPO+EPO": 2}
    c = a_run(tmp_path / "c", entropy_coef=0.0)
    d = a_run(tmp_path / "d", entropy_coef=0.0, alpha=1, smoothing="off")
    assert numbers(c, d) == {"GRPO": 2}
    e, f = a_run(tmp_path / "e", algo="ppo"), a_run(tmp_path / "f", algo="ppo", critic_lr=1.0)
    assert list(numbers(e, f)) == ["PPO+EPO, critic lr 0.001", "PPO+EPO, critic lr 1"]
    assert numbers(a, a + "/") == {"GRPO+EPO": 1}


def test_a_label_makes_one_group_of_all_runs_below_a_path(tmp_path):
    for name, change in (("a", {}), ("b", {"alpha": 3}), ("c", {"seed": 1})):
        a_run(tmp_path / "runs" / name, **change)
    odd = a_run(tmp_path / "lr=1" / "a")
    groups = plot.grouped([f"all={tmp_path / 'runs'}", odd])
    assert {name: len(runs) for name, runs in groups.items()} == {"all": 3, "GRPO+EPO": 1}


def test_the_mean_by_hand():
    """Seeds with 1, 3 and 2, 5, 9: the mean is over those that got so far, of what there is."""
    run = lambda numbers: ({}, {"x": np.array(numbers, float)})
    table = plot.stack([run([1, 3, None]), run([2, 5, 9, np.inf])], "x")
    expected = [[1, 3, np.nan, np.nan], [2, 5, 9, np.inf]]
    assert table.tolist() == pytest.approx(np.array(expected), nan_ok=True)
    assert plot.mean(table).tolist() == pytest.approx([1.5, 4, 9, np.nan], nan_ok=True)


def two_seeds_and_plain(tmp_path):
    a = a_run(tmp_path / "a", (0.2, 0.4, 0.1, 0.3), seed=0)
    b = a_run(tmp_path / "b", (0.4, 0.6, 0.3, 0.5), seed=1)
    return plot.grouped([a, b, a_run(tmp_path / "plain", entropy_coef=0.0)])


def test_entropy_and_corridor_are_as_logged(tmp_path):
    upper, lower, plain, plain_lower = plot.entropy(two_seeds_and_plain(tmp_path)).axes
    assert upper.get_title() == "GRPO+EPO (n = 2)"
    assert plain.get_title() == "GRPO (n = 1)"
    mean, *seeds = upper.lines
    assert mean.get_label() == "mean entropy $\\bar{H}_k$"
    assert list(mean.get_xdata()) == [0, 1, 2, 3]
    assert mean.get_ydata() == pytest.approx([0.3, 0.5, 0.2, 0.4])
    assert [list(line.get_ydata()) for line in seeds] == [
        [0.2, 0.4, 0.1, 0.3],
        [0.4, 0.6, 0.3, 0.5],
    ]
    assert max(line.get_linewidth() for line in seeds) < mean.get_linewidth()
    # 2 · mean so far: of (0.2, 0.4, 0.1) and (0.4, 0.6, 0.3), averaged
    cap, edges, floor = upper.patches[0].get_data()
    assert cap == pytest.approx([0.6, 0.8, 2 / 3])
    assert list(edges) == [0.5, 1.5, 2.5, 3.5]
    assert list(floor) == [0, 0, 0]
    # no corridor acts on plain GRPO
    assert upper.patches[0].get_fill() and not plain.patches[0].get_fill()
    # there is no corridor in step 0
    above = labelled(lower, "tokens above the cap")
    assert list(above.get_xdata()) == [1, 2, 3]
    assert list(above.get_ydata()) == [0.25] * 3
    # κ_l = 0: no token can be below
    assert {line.get_color() for line in [*lower.lines, *plain_lower.lines]} == {plot.ORANGE}


def test_the_floor_and_the_tokens_below_it_are_drawn_where_there_is_one(tmp_path):
    floor = a_run(tmp_path / "floor", kappa_l=0.5)
    no_cap = a_run(tmp_path / "no cap", kappa_l=0.5, kappa_r=float("inf"))
    upper, lower, free, free_lower = plot.entropy(plot.grouped([floor, no_cap])).axes
    assert upper.patches[0].get_data()[2] == pytest.approx([0.1, 0.15, 0.7 / 6])
    assert list(labelled(lower, "tokens below the floor").get_ydata()) == [0.125] * 3
    assert not free.patches
    assert list(labelled(free_lower, "tokens below the floor").get_ydata()) == [0.125] * 3


def test_the_overview_has_entropy_caps_and_success(tmp_path):
    upper, lower = plot.overview(two_seeds_and_plain(tmp_path)).axes
    assert labelled(upper, "GRPO+EPO (n = 2)").get_ydata() == pytest.approx([0.3, 0.5, 0.2, 0.4])
    assert labelled(lower, "GRPO+EPO (n = 2)").get_ydata() == pytest.approx(
        [0.075, 0.125, 0.05, 0.1]
    )
    (cap,) = [line for line in upper.lines if line.get_linestyle() == ":"]
    assert cap.get_color() == labelled(upper, "GRPO+EPO (n = 2)").get_color()
    assert cap.get_ydata()[1:4] == pytest.approx([0.6, 0.8, 2 / 3])


def test_success_is_the_share_of_episodes_won(tmp_path):
    training, iid, ood = plot.success(two_seeds_and_plain(tmp_path)).axes
    assert training.lines[0].get_ydata() == pytest.approx([0.075, 0.125, 0.05, 0.1])
    assert list(iid.lines[0].get_xdata()) == [0, 4]
    assert list(iid.lines[0].get_ydata()) == [0.25, 0.75]
    assert list(ood.lines[0].get_ydata()) == [0.125, 0.375]
    names = [line.get_label() for line in iid.lines if not line.get_label().startswith("_")]
    assert names == ["GRPO+EPO (n = 2)", "GRPO (n = 1)"]


def test_an_evaluation_that_was_lost_is_no_point(tmp_path):
    groups = plot.grouped([a_run(tmp_path / "a", success=(None, 0.5))])
    _, iid, ood = plot.success(groups).axes
    assert list(iid.lines[0].get_xdata()) == list(ood.lines[0].get_xdata()) == [4]


def test_the_terms_add_up_to_the_loss(tmp_path):
    fig = plot.loss(two_seeds_and_plain(tmp_path))
    terms = [axis.lines[0].get_ydata() for axis in fig.axes[:5]]
    assert np.sum(terms[1:], 0) == pytest.approx(terms[0])
    assert terms[2] == pytest.approx([-0.0003, -0.0005, -0.0002, -0.0004])
    # λ = 0
    plain = [labelled(axis, "GRPO (n = 1)") for axis in fig.axes]
    assert [line.get_ydata()[0] for line in plain[2:4]] == [0, 0]
    assert list(fig.axes[5].lines[0].get_ydata()) == [2, 1.75, 1.5, 1.25]


def test_entropy_by_turn_may_be_ragged(tmp_path):
    """Odd steps end after turn 2 of 3: no cell and no late third there, the line goes on after."""
    fig = plot.entropy_by_turn(plot.grouped([a_run(tmp_path / "a")]))
    heat, thirds = fig.axes[:2]
    cells = heat.images[0].get_array()
    assert cells[:, 0].tolist() == pytest.approx([0.2, 0.4, 0.6])
    assert cells[:2, 1].tolist() == pytest.approx([0.4, 0.8])
    # the last row of the log only evaluates
    one_turn, ragged = [False] * 4 + [True], [False, True, False, True, True]
    assert cells.mask.tolist() == [one_turn, one_turn, ragged]
    assert thirds.lines[0].get_ydata() == pytest.approx([0.2, 0.4, 0.1, 0.3])
    assert list(thirds.lines[1].get_xdata()) == [0, 2]
    assert thirds.lines[1].get_ydata() == pytest.approx([0.6, 0.3])


@pytest.mark.parametrize("alpha_beta", (0.2, 2.0))
def test_the_gradient_figure_is_the_gradient_of_the_loss(alpha_beta):
    """Its formulas against epo.py's loss and autograd; the numbers by hand."""
    h = torch.tensor([0.2, 1.0, 2.5], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(3, dtype=torch.float64)
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    entropies = h.detach().numpy()
    expected = {"hinge": plot.net(entropies, 0.5, 2.0, alpha_beta), "indicator": -np.ones(3)}
    by_hand = {"hinge": [0.3, 0, 0.5], "indicator": [1, 0, 1]}
    for form in expected:
        loss, terms = epo_loss(
            logp=zero,
            old_logp=zero,
            entropy=h,
            advantages=zero,
            weights=weights,
            history_mean=1.0,
            beta_k=2.0,
            entropy_coef=0.01,
            kappa_l=0.5,
            kappa_r=2.0,
            alpha=alpha_beta / 2,
            smoothing=form,
        )
        (gradient,) = torch.autograd.grad(loss, h)
        assert (gradient / (0.01 * weights)).numpy() == pytest.approx(expected[form])
        penalties = plot.penalty(entropies, 0.5, 2.0, form)
        average = (penalties * weights.numpy()).sum()
        assert terms["smoothing_loss"] == pytest.approx(alpha_beta / 2 * average)
        assert penalties == pytest.approx(by_hand[form])
    axis = next(axis for axis in plot.gradient().axes if "Eq. 6" in axis.get_title())
    drawn = next(line for line in axis.lines if f"= {alpha_beta:g}$" in line.get_label())
    at_the_ends = [drawn.get_ydata()[i] for i in (0, 1000, -1)]
    assert at_the_ends == pytest.approx([-1 - alpha_beta, -1, alpha_beta - 1])


def make_odd_runs(runs, odd):
    if odd == "one step":
        a_run(runs / "a", (0.2,))
    elif odd == "no evaluations":
        a_run(runs / "a", success=())
    elif odd == "no KL, no cap":
        a_run(runs / "a", kl_coef=0.0, kappa_r=float("inf"))
    elif odd == "different lengths":
        a_run(runs / "a")
        a_run(runs / "b", (0.1, 0.2), seed=1)
        a_run(runs / "c", (0.1, 0.2), entropy_coef=0)
    elif odd == "nine groups":
        for i in range(9):
            a_run(runs / f"{i:02d}", lr=1e-4 * (i + 1), kappa_l=0.1 * (i % 3))
    else:
        a_run(runs / "a", ())


ODD = (
    "one step",
    "no evaluations",
    "no KL, no cap",
    "different lengths",
    "nine groups",
    "no update yet",
)


@pytest.mark.parametrize("odd", ODD)
def test_every_figure_of_odd_runs(tmp_path, monkeypatch, capsys, recwarn, odd):
    """Nothing is missing, nothing warns; an overview is for as many groups as there are colours."""
    make_odd_runs(tmp_path / "runs", odd)
    main(monkeypatch, tmp_path / "runs", "--out", tmp_path / "out")
    files = [f"{name}.png" for name in FIGURES if (name, odd) != ("overview", "nine groups")]
    assert sorted(os.listdir(tmp_path / "out")) == files
    printed = capsys.readouterr().out.splitlines()
    assert sorted(printed) == [str(tmp_path / "out" / name) for name in files]
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize("form", ("png", "svg", "pdf"))
def test_the_same_bytes_every_time_and_gradient_needs_no_run(tmp_path, monkeypatch, form):
    for out in ("a", "b"):
        main(monkeypatch, "--out", tmp_path / out, "--format", form)
    assert os.listdir(tmp_path / "a") == [f"gradient.{form}"]
    first, second = (tmp_path / out / f"gradient.{form}" for out in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_the_picture_of_tokens_has_the_shares_of_the_log(tmp_path):
    groups = plot.grouped([str(a_run(tmp_path / "a")), str(a_run(tmp_path / "b", seed=1))])
    (upper, *_), lower = plot.tokens(groups).axes[:1], plot.tokens(groups).axes[1]
    (mesh,) = upper.collections
    shares = mesh.get_array()
    assert shares.shape == (32, 5)
    assert shares[:, 0].tolist() == [0.75, 0.0, 0.25] + [0.0] * 29
    # the last row of a log is an evaluation alone
    assert np.ma.masked_invalid(shares[:, 4]).count() == 0
    first, rest = (line.get_ydata() for line in lower.lines if not line.get_label().startswith("_"))
    assert first.tolist() == [0.4, 0.8, 0.2, 0.6] and rest.tolist() == [0.1, 0.2, 0.05, 0.15]


def test_half_a_last_line_is_left_out(tmp_path):
    folder = a_run(tmp_path / "a")
    _, whole = plot.load(folder)
    with open(os.path.join(folder, "log.jsonl"), "a") as log:
        log.write('{"step": 5, "entr')
    _, again = plot.load(folder)
    assert whole.keys() == again.keys()
    assert all(np.array_equal(whole[name], again[name], equal_nan=True) for name in whole)


@pytest.mark.parametrize(
    "text", ("", '{"step": 0', '{"step": 0}\n{"st\n{"step": 2}\n', '{"a": 0}\n')
)
def test_a_damaged_log_is_an_error_in_one_line(tmp_path, text):
    folder = a_run(tmp_path / "run")
    Path(folder, "log.jsonl").write_text(text)
    with pytest.raises(SetupError, match=r"log\.jsonl") as error:
        plot.load(folder)
    assert "\n" not in str(error.value)


WRONG_ROWS = ({"entropy": "x"}, {"beta": [1]}, {"entropy_by_turn": 1}, {"entropy_by_turn": ["x"]})
WRONG_SETTINGS = ({"turns": None}, {"entropy_coef": "x"}, {"algo": 5}, {"kl_coef": {}})


@pytest.mark.parametrize(
    "row, config", [(r, {}) for r in WRONG_ROWS] + [({}, c) for c in WRONG_SETTINGS]
)
def test_a_value_of_the_wrong_kind_is_an_error_in_one_line(tmp_path, row, config):
    folder = a_run(tmp_path / "run", **config)
    rows = [{**a_row(0, [], 0.2, 0.0, 2.0), **row}]
    Path(folder, "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        SetupError, match="cannot be read|is damaged or of another program"
    ) as error:
        plot.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["nothing"], 1, "nothing is no run folder (config.json, log.jsonl), and none is inside"),
        (["A=nothing"], 1, "nothing is no run folder"),
        (["other"], 1, "other/config.json cannot be read (its env is missing"),
        (["run", "--format", "gif"], 2, "argument --format: invalid choice: 'gif'"),
        (["run", "--out", "file"], 1, "File exists: 'file'"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, status, message):
    a_run(tmp_path / "run")
    a_run(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, *arguments)
    # Python prints a text and exits with 1
    error = stop.value.code if status == 1 else capsys.readouterr().err
    assert error.startswith("plot.py: ") and message in error
    assert "\n" not in error.strip()
    assert status == 1 or stop.value.code == status


def test_no_torch_and_an_error_as_the_shell_sees_it():
    check = (
        "import sys, plot; sys.argv = ['plot.py', 'no-such-run']; "
        "print({'torch', 'tkinter'} & {*sys.modules}); plot.main()"
    )
    more = {"capture_output": True, "text": True, "timeout": 60, "cwd": HERE}
    done = subprocess.run([sys.executable, "-c", check], **more)
    assert done.stdout == "set()\n" and done.returncode == 1
    expected = "no-such-run is no run folder (config.json, log.jsonl), and none is inside"
    assert done.stderr == f"plot.py: {expected}\n"
