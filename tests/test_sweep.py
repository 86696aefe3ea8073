"""The sweep: numbers of a run by hand, what is finished is skipped, what was stopped goes on."""
import json
import os
import subprocess
import sys

import pytest

import sweep
from rollout import HERE


def test_summary_by_hand():
    """Entropies 1, 3, 2: jumps 2 and -1, mean 0.5, deviation 1.5."""
    evaluation = lambda iid, ood: {"iid_success": iid, "ood_success": ood, "iid_by_task": {"a": iid}, "ood_by_task": {"a": ood}}
    log = [{"entropy": 1, **evaluation(0.1, 0.0)}, {"entropy": 3, **evaluation(0.7, 0.2)}, {"entropy": 2}, evaluation(0.5, 0.4)]
    assert sweep.summary(log, 2) == pytest.approx({
        "jump": 1.5, "highest": 3, "iid_before": 0.1, "iid_after": 0.5, "iid_best": 0.7, "iid_last": 0.6, "iid a": 0.6,
        "ood_before": 0.0, "ood_after": 0.4, "ood_best": 0.4, "ood_last": 0.3, "ood a": 0.3})
    assert sweep.spread([0.1, 0.3]) == "0.20 ±0.10" and sweep.spread([0.25]) == "0.25"


def test_presets_of_different_worlds_have_one_table(tmp_path, monkeypatch, capsys):
    for preset, name in (("tiny-grpo-plain", "a"), ("tiny-grpo-epo", "b")):
        folder = tmp_path / f"{preset}-seed0"
        folder.mkdir()
        (folder / "config.json").write_text('{"steps": 0}')
        (folder / "log.jsonl").write_text(json.dumps({"step": 0, "iid_success": 0.5, "ood_success": 0.25, "iid_by_task": {name: 0.5},
                                                      "ood_by_task": {name: 0.25}}) + "\n")
    monkeypatch.setattr(sys, "argv", ["sweep.py", "tiny-grpo-plain", "tiny-grpo-epo", "--seeds", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        sweep.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert stop.value.code == 0 and lines == [["a", "0.50", "/", "0.25", "–", "/", "–"], ["b", "–", "/", "–", "0.50", "/", "0.25"]]


def test_presets_by_seeds_are_run_once_and_resumed(tmp_path):
    command = [sys.executable, os.path.join(HERE, "sweep.py"), "tiny-grpo-plain", "tiny-ppo-epo", "--seeds", "2", "--out", str(tmp_path),
               "--env", "keyquest", "--steps", "2", "--turns", "5", "--tasks-per-step", "2", "--group-size", "2", "--eval-episodes", "2"]
    first = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    logs = {p: p.read_text() for p in tmp_path.glob("*/log.jsonl")}
    assert len(logs) == 4 and [line.split()[:2] for line in first.stdout.splitlines()[1:3]] == [["tiny-grpo-plain", "2"], ["tiny-ppo-epo", "2"]]
    assert [json.load(open(tmp_path / f"tiny-grpo-plain-seed{i}" / "config.json"))["seed"] for i in (0, 1)] == [0, 1]
    os.remove(tmp_path / "tiny-ppo-epo-seed1" / "checkpoint.pt")              # as if it had been stopped in its first step
    stopped = tmp_path / "tiny-ppo-epo-seed1" / "log.jsonl"
    stopped.write_text(logs[stopped].splitlines(keepends=True)[0])
    second = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert second.stdout == first.stdout and len(stopped.read_text().splitlines()) == 3
    assert all(p.read_text() == text for p, text in logs.items() if p != stopped)
    bad = subprocess.run([*command[:2], "no-such-preset", "--seeds", "1", "--out", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert bad.returncode == 1 and "no-such-preset-seed0.txt" in bad.stderr
