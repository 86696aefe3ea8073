"""The figures: what groups are called, that what is drawn is what was logged, odd runs, and the one-line errors."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import plot
from epo import epo_loss
from rollout import HERE

FIGURES = "entropy", "entropy_by_turn", "loss", "oscillation", "success"
CONFIG = {"env": "scienceworld", "games": "auto", "model": "tiny", "algo": "grpo", "steps": 4, "turns": 3, "lr": 2e-4, "entropy_coef": 0.001,
          "smoothing": "hinge", "kappa_l": 0.0, "kappa_r": 2.0, "alpha": 0.1, "gamma": 3.0, "dynamic_weight": "on", "window": 0,
          "entropy_decay": 0.0, "shaping": 0.0, "kl_coef": 0.1, "discount": 1.0, "critic_lr": 1e-3, "seed": 0, "out": "a"}


def a_run(folder, entropies=(0.2, 0.4, 0.1, 0.3), evaluations=True, **config):
    """A run folder as train.py leaves it, with numbers that are easy to follow. -> the folder, as text"""
    os.makedirs(folder)
    rows, n = [], len(entropies)
    for k, h in enumerate(entropies):
        past = entropies[:k]
        reference = sum(past) / k if k else None
        rows.append({"step": k, "reward": h / 2, "entropy": h, "entropy_by_turn": [h, 2 * h, 3 * h][:3 - k % 2], "reference": reference,
                     "corridor_low": 0.0 if k else None, "corridor_high": 2 * reference if k else None, "above": 0.25 if k else 0.0, "below": 0.0,
                     "outside": 0.25 if k else 0.0, "beta": 2.0 - k / 4, "policy_loss": 0.5, "entropy_loss": h, "smoothing_loss": 0.01, "kl": 0.02,
                     "loss": 0.5 - 0.001 * (h - (2.0 - k / 4) * 0.01) + 0.1 * 0.02})
    rows.append({"step": n})
    for row, iid in ((rows[0], 0.25), (rows[n], 0.75)) if evaluations else ():
        row |= {"iid_success": iid, "ood_success": iid / 2, "iid_by_task": {"a": iid}, "ood_by_task": {"a": iid / 2}}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
    plot.main()


def groups_of(*folders):
    return plot.grouped([run for folder in folders for run in plot.load(folder)])


def line(axis, label):
    return next(line for line in axis.lines if line.get_label() == label)


def test_names_are_the_papers():
    of = lambda **changes: plot.name_of(plot.settings({**CONFIG, **changes}))
    assert of() == "GRPO+EPO" and of(algo="ppo") == "PPO+EPO"
    assert of(entropy_coef=0.0, smoothing="off") == of(entropy_coef=0) == "GRPO"
    assert of(smoothing="off") == "GRPO+EPO-Base" and of(smoothing="indicator") == "GRPO+EPO, indicator"
    assert of(smoothing="off", entropy_decay=0.5) == "GRPO+EPO-Decay" and of(dynamic_weight="off") == "GRPO+EPO w/o DW"
    assert of(entropy_coef=0.0, shaping=0.4) == "GRPO+EA"


@pytest.mark.parametrize("changes, expected", [
    ([{}], ["GRPO+EPO"]),
    ([{}, {"entropy_coef": 0.0}, {"smoothing": "off"}], ["GRPO+EPO", "GRPO", "GRPO+EPO-Base"]),
    ([{}, {"lr": 1e-3}], ["GRPO+EPO, lr 0.0002", "GRPO+EPO, lr 0.001"]),
    ([{}, {"alpha": 1, "entropy_coef": 0.02}, {"entropy_coef": 0.0}], ["GRPO+EPO, α 0.1, λ 0.001", "GRPO+EPO, α 1, λ 0.02", "GRPO"]),
    ([{}, {"window": 10}], ["GRPO+EPO", "GRPO+EPO, window 10"]),
    ([{}, {"model": "Qwen/Qwen2.5-7B-Instruct", "steps": 125}], ["GRPO+EPO, tiny, 4 steps", "GRPO+EPO, Qwen2.5-7B-Instruct, 125 steps"])])
def test_labels_say_what_differs(changes, expected):
    assert plot.labels([plot.settings({**CONFIG, **change}) for change in changes]) == expected


def test_only_what_had_an_effect_makes_a_group(tmp_path):
    """Not the seed or the folder, not the critic's rate without a critic, not α without its term, not a flag that older runs lack."""
    base = groups_of(a_run(tmp_path / "a"), a_run(tmp_path / "b", seed=1, out="b", critic_lr=1.0, lora_rank=0, tokens_per_batch=9))
    assert {label: len(runs) for label, runs in base.items()} == {"GRPO+EPO": 2}
    plain = groups_of(a_run(tmp_path / "c", entropy_coef=0.0), a_run(tmp_path / "d", entropy_coef=0.0, alpha=1, smoothing="off"))
    assert {label: len(runs) for label, runs in plain.items()} == {"GRPO": 2}
    ppo = groups_of(a_run(tmp_path / "e", algo="ppo"), a_run(tmp_path / "f", algo="ppo", critic_lr=1.0))
    assert list(ppo) == ["PPO+EPO, critic lr 0.001", "PPO+EPO, critic lr 1"]
    assert [len(runs) for runs in groups_of(str(tmp_path / "a"), str(tmp_path / "a") + "/").values()] == [1]


def test_mean_and_band_by_hand():
    """Seeds with 1, 3 and 2, 5, 9: the mean is over those that got so far; a row without the key counts for nothing."""
    runs = [("a", {}, [{"step": 0, "x": 1}, {"step": 1, "x": 3}, {"step": 2}]), ("b", {}, [{"step": k, "x": x} for k, x in enumerate((2, 5, 9))])]
    assert plot.curve(runs, "x") == ([0, 1, 2], [1.5, 4, 9], [1, 3, 9], [2, 5, 9])
    assert plot.curve(runs, lambda row, config: None) == ([], [], [], [])


def test_what_is_drawn_is_what_was_logged(tmp_path):
    seeds = (0.2, 0.4, 0.1, 0.3), (0.4, 0.6, 0.3, 0.5)
    groups = groups_of(*(a_run(tmp_path / str(seed), entropies, seed=seed) for seed, entropies in enumerate(seeds)),
                       a_run(tmp_path / "plain", entropy_coef=0.0))
    upper, plain, lower, _ = plot.entropy(groups).axes
    assert upper.get_title() == "GRPO+EPO (2\u00a0seeds)" and plain.get_title() == "GRPO (1\u00a0seed)"
    drawn = line(upper, "mean entropy $\\bar{H}_k$")
    assert list(drawn.get_xdata()) == [0, 1, 2, 3] and drawn.get_ydata() == pytest.approx([0.3, 0.5, 0.2, 0.4])
    cap, edges, floor = upper.patches[0].get_data()          # 2 · mean so far: of (0.2, 0.4, 0.1) and (0.4, 0.6, 0.3), averaged
    assert cap == pytest.approx([0.6, 0.8, 2 / 3]) and list(edges) == [0.5, 1.5, 2.5, 3.5] and list(floor) == [0, 0, 0]
    assert upper.patches[0].get_fill() and not plain.patches[0].get_fill()                      # no corridor pulls in plain GRPO
    assert list(line(lower, "above its cap").get_xdata()) == [1, 2, 3]                          # there is no corridor in step 0

    reward, iid, ood = plot.success(groups).axes
    assert reward.lines[0].get_ydata() == pytest.approx([0.15, 0.25, 0.1, 0.2])
    assert list(iid.lines[0].get_xdata()) == [0, 4] and list(iid.lines[0].get_ydata()) == [0.25, 0.75]
    assert list(ood.lines[0].get_ydata()) == [0.125, 0.375]
    assert [line.get_label() for line in iid.lines] == ["GRPO+EPO (2 seeds)", "GRPO (1 seed)"]

    loss = plot.loss(groups)
    parts = [next(iter(axis.lines)).get_ydata() for axis in loss.axes[:5]]
    assert np.sum(parts[1:], 0) == pytest.approx(parts[0]) and parts[2] == pytest.approx([-0.0003, -0.0005, -0.0002, -0.0004])
    assert [axis.lines[1].get_ydata()[0] for axis in loss.axes[2:4]] == [0, 0]                  # λ = 0
    assert list(loss.axes[5].lines[0].get_ydata()) == [2, 1.75, 1.5, 1.25]


def test_entropy_by_turn_may_be_ragged(tmp_path):
    """Odd steps end after turn 2 of 3: no cell and no late third there, though the line goes on after it."""
    groups = groups_of(a_run(tmp_path / "a"))
    heat, thirds = plot.entropy_by_turn(groups).axes[:2]
    cells = heat.images[0].get_array()
    assert cells[:, 0].tolist() == pytest.approx([0.2, 0.4, 0.6]) and cells[:2, 1].tolist() == pytest.approx([0.4, 0.8])
    assert cells.mask.tolist() == [[False] * 4, [False] * 4, [False, True, False, True]]
    assert thirds.lines[0].get_ydata() == pytest.approx([0.2, 0.4, 0.1, 0.3])
    assert list(thirds.lines[1].get_xdata()) == [0, 2] and thirds.lines[1].get_ydata() == pytest.approx([0.6, 0.3])


def test_oscillation_by_hand(tmp_path):
    """Entropies 1, 3, 2 jump by 2 and -1: deviation 1.5. r of (1, 2, 4) and (1, 3, 2) is 1 / √(14/3 · 2)."""
    assert plot.correlation([1, 2, 4], [1, 3, 2]) == pytest.approx(1 / (14 / 3 * 2) ** 0.5)
    assert plot.correlation([1, 2], [1, 3]) is plot.correlation([1, 2, 4], [3, 3, 3]) is plot.correlation([3, 3, 3], [1, 2, 4]) is None
    folders = [a_run(tmp_path / "a", (1, 3, 2)), a_run(tmp_path / "b", (1, 1, 1), seed=1), a_run(tmp_path / "c", (1, 3), seed=2),
               a_run(tmp_path / "d", evaluations=False, seed=3)]
    iid, ood = plot.oscillation(groups_of(*folders)).axes
    assert list(iid.lines[0].get_xdata()) == [1.5, 0] and list(iid.lines[0].get_ydata()) == [0.75, 0.75]
    assert list(ood.lines[0].get_ydata()) == [0.375, 0.375]
    assert iid.get_title() == "IID: all $n = 2$ runs"                                               # no r of two, and none of a constant
    varied = [a_run(tmp_path / name, entropies) for name, entropies in (("e", (0, 1, 0)), ("f", (0, 2, 0)), ("g", (0, 4, 0)))]
    for folder, success in zip(varied, (0.1, 0.3, 0.2)):
        path = os.path.join(folder, "log.jsonl")
        text = open(path).read().replace('"iid_success": 0.75', f'"iid_success": {success}')
        open(path, "w").write(text)
    iid, ood = plot.oscillation(groups_of(*varied)).axes
    assert iid.get_title() == "IID: Pearson's $r = 0.33$, all $n = 3$ runs" and ood.get_title() == "OOD: all $n = 3$ runs"


@pytest.mark.parametrize("alpha_beta", (0.2, 2.0))
def test_the_gradient_figure_is_the_gradient_of_the_loss(alpha_beta):
    """Its formulas against epo.py's loss and autograd; the numbers by hand."""
    h = torch.tensor([[0.2, 1.0, 2.5]], dtype=torch.float64, requires_grad=True)
    zero, weights = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    for form, expected in (("hinge", plot.net(h.detach().numpy(), 0.5, 2.0, alpha_beta)), ("indicator", -np.ones((1, 3)))):
        loss, log = epo_loss(zero, zero, h, zero, weights, 1.0, 2.0, 0.01, 0.5, 2.0, alpha_beta / 2, form)
        gradient, = torch.autograd.grad(loss, h)
        assert (gradient / (0.01 * weights)).numpy() == pytest.approx(expected)
        penalties = plot.penalty(h.detach().numpy(), 0.5, 2.0, form)
        assert log["smoothing_loss"] == pytest.approx(alpha_beta / 2 * (penalties * weights.numpy()).sum())
        assert penalties[0] == pytest.approx([0.3, 0, 0.5] if form == "hinge" else [1, 0, 1])
    axis = next(axis for axis in plot.gradient().axes if "Eq. 6" in axis.get_title())
    drawn = next(line for line in axis.lines if f"= {alpha_beta:g}$" in line.get_label())
    assert [drawn.get_ydata()[i] for i in (0, 1000, -1)] == pytest.approx([-1 - alpha_beta, -1, alpha_beta - 1])


@pytest.mark.parametrize("odd", ("one step", "no evaluations", "different lengths", "nine groups", "no update yet"))
def test_every_figure_of_odd_runs(tmp_path, monkeypatch, capsys, recwarn, odd):
    """Nothing is missing, nothing warns."""
    files = [f"{name}.png" for name in FIGURES]
    if odd == "one step":
        a_run(tmp_path / "runs" / "a", (0.2,))
        os.mkdir(tmp_path / "runs" / "a" / "transcripts")
        episode = {"task": "t", "variation": 0, "success": False, "score": 0, "turns": []}
        told = json.dumps({"step": 0, "corridor": [0, 1], "episodes": [episode, episode]})
        (tmp_path / "runs" / "a" / "transcripts" / "step-0000.json").write_text(told)
        files.append("transcript.html")
    elif odd == "no evaluations":
        a_run(tmp_path / "runs" / "a", evaluations=False)
    elif odd == "different lengths":
        for name, entropies, more in (("a", (0.2, 0.4, 0.1, 0.3), {}), ("b", (0.1, 0.2), {"seed": 1}), ("c", (0.1, 0.2), {"entropy_coef": 0})):
            a_run(tmp_path / "runs" / name, entropies, **more)
    elif odd == "nine groups":
        for i in range(9):
            a_run(tmp_path / "runs" / f"{i:02d}", lr=1e-4 * (i + 1), kappa_l=0.1 * (i % 3))
    else:
        a_run(tmp_path / "runs" / "a", ())
    main(monkeypatch, tmp_path / "runs", "--out", tmp_path / "out")
    said = capsys.readouterr().out.splitlines()
    assert sorted(os.listdir(tmp_path / "out")) == files
    assert sorted(line for line in said if "no transcripts/" not in line) == [str(tmp_path / "out" / name) for name in files]
    assert not [str(w.message) for w in recwarn if "unclosed" not in str(w.message)]


def test_the_same_bytes_every_time_and_gradient_needs_no_run(tmp_path, monkeypatch):
    for out in ("a", "b"):
        main(monkeypatch, "--out", tmp_path / out, "--format", "svg")
    assert os.listdir(tmp_path / "a") == ["gradient.svg"]
    assert (tmp_path / "a" / "gradient.svg").read_bytes() == (tmp_path / "b" / "gradient.svg").read_bytes()


def test_transcript_is_escaped_and_marked(tmp_path, capsys):
    """Of the newest file with a corridor: below, inside and above it; the colour scale ends at the highest entropy, 0.8."""
    turns = [{"observation": "\na <box>\n& \"door\"", "tokens": ["<b>", " go", "</s>"], "entropy": [0.05, 0.4, 0.8], "action": "go <out>",
              "invalid": False},
             {"observation": "end", "tokens": ["x"], "entropy": [0.0], "action": None, "invalid": True}]
    told = lambda step, corridor, task: json.dumps({"step": step, "corridor": corridor, "episodes": [
        {"task": task, "variation": 7, "goal": "find a <plant>", "success": True, "score": 100, "turns": turns}]})
    folder = tmp_path / "a"
    a_run(folder), a_run(tmp_path / "b", algo="ppo")
    os.mkdir(folder / "transcripts")
    (folder / "transcripts" / "step-0000.json").write_text(told(0, [0.2, 0.5], "older"))
    (folder / "transcripts" / "step-0002.json").write_text(told(2, [0.1, 0.6], "find-<plant>"))
    (folder / "transcripts" / "step-0004.json").write_text(told(4, None, "without"))
    page = plot.page(groups_of(folder, tmp_path / "b"))
    assert re.findall(r'<span( class="\w+")? style="background:(#\w+)" title="([\d.]+) nats">(.*?)</span>', page) == [
        (' class="below"', plot.shade(0.05 / 0.8), "0.050", "&lt;b&gt;"), ("", plot.shade(0.5), "0.400", " go"),
        (' class="above"', "#d55e00", "0.800", "&lt;/s&gt;"), (' class="below"', "#ffffff", "0.000", "x")]
    assert "<details open><summary>a &lt;box&gt;</summary><pre>&amp; &quot;door&quot;</pre>" in page and "<details><summary>end" in page
    assert "action: go &lt;out&gt;</div>" in page and "no action <b>invalid</b></div>" in page
    assert "<h2>GRPO+EPO, seed 0</h2>" in page and page.count("<h2>") == 1 and "PPO" not in page
    assert "Step 2, find-&lt;plant&gt;, variation 7: <strong>success</strong>, score 100, 2 turns. Corridor: 0.100 to 0.600 nats.<br>Task: find a &lt;plant&gt;</p>" in page
    assert "<i>floor 0.100</i>" in page and "<i>cap 0.600</i>" in page and "</div>0.800 nats</div>" in page
    assert capsys.readouterr().out.startswith("1 of 2 runs have no transcripts")


def test_half_a_last_line_is_left_out(tmp_path):
    folder = a_run(tmp_path / "a")
    whole = groups_of(folder)
    with open(os.path.join(folder, "log.jsonl"), "a") as log:
        log.write('{"step": 5, "entr')
    assert groups_of(folder) == whole


def bad_log(text):
    def make(folder):
        a_run(folder)
        (folder / "log.jsonl").write_text(text)
    return make


@pytest.mark.parametrize("make, arguments, status, message", [
    (lambda folder: None, [], 1, "is no run folder (config.json, log.jsonl), and none is inside"),
    (bad_log(""), [], 1, "log.jsonl in RUN is missing, or has no whole row yet"),
    (bad_log('{"step": 0'), [], 1, "log.jsonl in RUN is missing, or has no whole row yet"),
    (bad_log('{"step": 0}\n{"st\n{"step": 2}\n'), [], 1, "log.jsonl in RUN is damaged"),
    (bad_log('{"entropy": 0}\n'), [], 1, "log.jsonl in RUN is damaged"),
    (lambda folder: (a_run(folder), (folder / "config.json").write_text("{}")), [], 1, "config.json in RUN is damaged"),
    (a_run, ["--format", "gif"], 2, "argument --format: invalid choice: 'gif'"),
    (a_run, ["--out", "config.json"], 1, "File exists: 'config.json'")])
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, make, arguments, status, message):
    make(tmp_path / "run")
    (tmp_path / "config.json").write_text("not a folder")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, "run", *arguments)
    error = stop.value.code if status == 1 else capsys.readouterr().err                         # Python prints a text and exits with 1
    assert error.startswith("plot.py: ") and message.replace("RUN", "run") in error and "\n" not in error.strip()
    assert status == 1 or stop.value.code == status


def test_no_torch_and_an_error_as_the_shell_sees_it(tmp_path):
    check = "import sys, plot; sys.argv = ['plot.py', 'results/sweep/no-such-run']; print({'torch', 'tkinter'} & {*sys.modules}); plot.main()"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, cwd=HERE)
    assert done.stdout == "set()\n" and done.returncode == 1
    assert done.stderr == "plot.py: results/sweep/no-such-run is no run folder (config.json, log.jsonl), and none is inside\n"
