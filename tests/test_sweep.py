"""The sweep: finished runs are skipped, stopped ones go on, others are refused, none is left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.loading import ROOT
from support.report import summary
from tools import sweep

SMALL = "--env keyquest --turns 5 --tasks-per-step 2 --group-size 2 --eval-episodes 2".split()


def command_of(arguments):
    return [sys.executable, "-m", "tools.sweep", *map(str, arguments)]


def run_sweep(*arguments):
    command = command_of(arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


@pytest.fixture
def sweep_here(monkeypatch, capsys):
    """sweep_here(arguments) -> status, stdout, stderr; for what needs no run, it is much faster."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sweep.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            sweep.main()
        out, err = capsys.readouterr()
        if isinstance(stop.value.code, str):
            return 1, out, err + stop.value.code
        return stop.value.code, out, err

    yield call
    signal.signal(signal.SIGTERM, before)


def evaluation(iid, ood, task="a"):
    shares = {"iid": iid, "ood": ood}
    row = {f"{split}_success": share for split, share in shares.items()}
    return row | {f"{split}_by_task": {task: share} for split, share in shares.items()}


def test_summary_by_hand():
    """Entropies 1, 3, 2: jumps 2 and -1, mean 0.5, deviation 1.5."""
    log = [{"entropy": 1, **evaluation(0.1, 0.0)}, {"entropy": 3, **evaluation(0.7, 0.2)}]
    log += [{"entropy": 2}, evaluation(0.5, 0.4)]
    expected = {"jump": 1.5, "highest": 3}
    expected |= {"iid_before": 0.1, "iid_after": 0.5, "iid_best": 0.7, "iid_last": 0.6}
    expected |= {"ood_before": 0.0, "ood_after": 0.4, "ood_best": 0.4, "ood_last": 0.3}
    expected |= {"iid a": 0.6, "ood a": 0.3}
    assert summary(log, 2) == pytest.approx(expected)


def test_a_mean_has_its_standard_error():
    assert sweep.spread([0.1, 0.3]) == "0.20 ±0.10"
    assert sweep.spread([0.1, None, 0.3], 3) == "0.200 ±0.100"
    assert sweep.spread([0.25]) == "0.25"
    assert sweep.spread([None]) == "–"


def finished_run(folder, task, env="scienceworld", **settings):
    folder.mkdir()
    config = {"env": env, "model": "tiny", "algo": "grpo", "steps": 1, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"step": 0, "entropy": 0.5, **evaluation(0.5, 0.25, task)}]
    rows.append({"step": 1, **evaluation(0.5, 0.25, task)})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_presets_of_different_worlds_have_one_table(tmp_path, sweep_here):
    finished_run(tmp_path / "tiny-grpo-plain-seed0", "a")
    finished_run(tmp_path / "tiny-grpo-epo-seed0", "b")
    presets = ("tiny-grpo-plain", "tiny-grpo-epo")
    arguments = ("--seeds", 1, "--out", tmp_path, "--steps", 1)
    status, out, err = sweep_here(*presets, *arguments)
    assert status == 0, err
    assert [line.split() for line in out.splitlines()[-2:]] == [
        ["a", "0.50", "/", "0.25", "–", "/", "–"],
        ["b", "–", "/", "–", "0.50", "/", "0.25"],
    ]


@pytest.mark.parametrize(
    "flags",
    ["--lr 1e-3", "", "--lr 2e-3 --window 5", "--lr 2e-3 --steps 2", "--lr 2e-3 --tasks short"],
)
def test_finished_runs_of_other_settings_are_refused(flags, tmp_path, sweep_here):
    saved = {"lr": 0.002, "window": None, "tasks": None, "max_tokens": None, "games": "real"}
    finished_run(tmp_path / "tiny-grpo-plain-seed0", "a", "alfworld", **saved)
    command = f"tiny-grpo-plain --seeds 1 --out {tmp_path} --steps 1 --env alfworld".split()
    status, *_ = sweep_here(*command, "--lr", "2e-3")
    assert status == 0
    status, out, err = sweep_here(*command, *flags.split())
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert "tiny-grpo-plain-seed0 has --" in err


def test_bad_input_is_one_line(tmp_path, sweep_here):
    file = tmp_path / "file"
    file.write_text("")
    cases = {
        "--jobs": ("tiny-grpo-plain", "--jobs", 0),
        "--seeds": ("tiny-grpo-plain", "--seeds", -1),
        "unknown preset 'tiny'": ("tiny",),
        "--no-such": ("tiny-grpo-plain", "--no-such", 1),
        "leave out --seed": ("tiny-grpo-plain", "--seed", 1),
        "--clip": ("tiny-grpo-plain", "--clip", 0),
        str(file): ("tiny-grpo-plain", "--out", file),
        "no such world": ("tiny-grpo-plain", "--env", "no such world"),
    }
    for text, arguments in cases.items():
        status, out, err = sweep_here("--out", tmp_path / "runs", *arguments)
        assert status != 0, text
        assert out == ""
        assert len(err.splitlines()) == 1
        assert text in err
    assert not (tmp_path / "runs").exists()


def test_presets_by_seeds_are_run_once_and_resumed(tmp_path):
    presets = ("tiny-grpo-plain", "tiny-ppo-epo")
    command = (*presets, "--seeds", 2, "--out", tmp_path, "--steps", 2, *SMALL)
    # one was killed before it had a config.json
    early = tmp_path / "tiny-grpo-plain-seed1"
    (early / "transcripts").mkdir(parents=True)
    for name in ("lock", "tasks.json", "config.json.new"):
        (early / name).write_text("")
    first = run_sweep(*command)
    assert first.returncode == 0, first.stderr
    logs = {path: path.read_text() for path in tmp_path.glob("*/log.jsonl")}
    assert len(logs) == 4
    table = [line.split()[:2] for line in first.stdout.splitlines()[1:3]]
    assert table == [["tiny-grpo-plain", "2"], ["tiny-ppo-epo", "2"]]
    assert json.loads((early / "config.json").read_text())["seed"] == 1

    # as if it had been stopped in its first step
    stopped = tmp_path / "tiny-ppo-epo-seed1"
    (stopped / "checkpoint.pt").unlink()
    log = stopped / "log.jsonl"
    log.write_text(logs[log].splitlines(keepends=True)[0])
    second = run_sweep(*command)
    assert second.stdout == first.stdout
    assert len(log.read_text().splitlines()) == 3
    assert all(path.read_text() == text for path, text in logs.items() if path != log)


def test_a_run_that_fails_is_named(tmp_path):
    command = ("tiny-grpo-plain", "--seeds", 1, "--out", tmp_path, "--steps", 1, *SMALL)
    result = run_sweep(*command, "--model", tmp_path)
    name = str(tmp_path / "tiny-grpo-plain-seed0")
    assert result.returncode == 1
    assert result.stderr == f"sweep.py: {name} ended with status 1; see {name}.txt\n"
    assert "cannot be loaded" in Path(name + ".txt").read_text()


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a kill of the sweep leaves its runs")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stop_or_a_kill_of_the_sweep_ends_its_runs(number, tmp_path, gone):
    arguments = ("tiny-grpo-plain", "--jobs", 2, "--out", tmp_path, "--steps", 10000)
    command = command_of([*arguments, *SMALL])
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.time() + 120
    while len(list(tmp_path.glob("*/log.jsonl"))) < 2:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    runs = children(process.pid)
    assert len(runs) == 2
    os.kill(process.pid, number)
    assert process.wait(60) != 0
    assert gone(runs)
    if number == signal.SIGTERM:
        assert process.stderr.read().startswith("sweep.py: stopped")
    process.stderr.close()
