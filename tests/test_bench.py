"""The benchmark: every way of the loss gives the same gradient, and bad input is one line."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from support.loading import ROOT
from tools import bench_models, measure, memory


@pytest.mark.parametrize("way", ["ours", "trl"])
def test_every_way_of_the_loss_has_the_same_gradient(way, monkeypatch):
    if way == "trl" and find_spec("trl") is None:
        pytest.skip("needs requirements-trl.txt")
    # 7 of 50 tokens at a time
    monkeypatch.setattr(bench_models, "LOGITS_AT_ONCE", 7 * 500)
    *_, direct = bench_models.loss_once("direct", 50, 16, 500)
    *_, other = bench_models.loss_once(way, 50, 16, 500)
    assert direct > 0
    assert other == pytest.approx(direct, rel=1e-5)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_memory_of_a_process_is_seen():
    before = measure.pss([os.getpid()])
    block = torch.ones(50 * 2**18)
    assert 45 < measure.pss([os.getpid()]) - before < 60
    assert block[0] == 1


def test_a_process_below_a_process_is_found():
    sleep = "import subprocess, sys; subprocess.run(['sleep', '60'])"
    parent = subprocess.Popen([sys.executable, "-c", sleep])
    try:
        while not (below := measure.descendants("sleep")):
            assert parent.poll() is None
        assert not measure.descendants("no such command")
    finally:
        parent.kill()
        parent.wait()
        for pid in below:
            os.kill(pid, 9)


def test_columns_of_a_table_are_aligned(capsys):
    measure.table("Title", [{"way": "ours", "speed": 2.0}, {"way": "the usual", "speed": 1 / 3}])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["", "Title", "way        speed", "ours       2", "the usual  0.333"]
    measure.table("Title", [])
    assert capsys.readouterr().out == "\nTitle: left out\n"


def bench(*arguments):
    command = [sys.executable, "-m", "tools.bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_bad_input_is_one_line(tmp_path):
    damaged = tmp_path / "bench.json"
    damaged.write_text("[1, 2")
    cases = {
        "everything": ("everything",),
        "bench.json": ("loss", "--out", str(damaged)),
        "is a directory": ("loss", "--out", str(tmp_path)),
    }
    for text, arguments in cases.items():
        result = bench(*arguments)
        assert result.returncode != 0
        assert len(result.stderr.splitlines()) == 1
        assert text in result.stderr.lower()


@pytest.mark.parametrize("rank", [0, 2])
def test_a_model_of_random_weights_is_timed(rank, monkeypatch):
    monkeypatch.setitem(memory.SHAPES, "small", memory.llama(2, 64, 4, 2, 128, 500))
    row = bench_models.model_once("small", rank, 3, 20, 4)
    assert row["generated tokens/s"] > 0
    assert row["trained tokens/s"] > 0
    assert 0 < row["of matrix throughput"] < 2
    assert json.loads(json.dumps(row)) == row


def test_its_learner_is_that_of_training():
    cfg = bench_models.Config(algo="ppo", lr=1e-5, critic_lr=1e-4)
    learner = bench_models.random_learner(memory.llama(1, 8, 2, 1, 16, 100), cfg)
    assert learner.policy.reference is not None
    (group,), (critic_group,) = (
        optimizer.param_groups for optimizer in (learner.optimizer, learner.critic_optimizer)
    )
    assert (group["lr"], critic_group["lr"]) == (1e-5, 1e-4)
    assert group["weight_decay"] == cfg.weight_decay
