"""The benchmark's own arithmetic: every way of the loss gives the same gradient, and the parts are known by name."""
import os
import subprocess
import sys

import pytest
import torch

import bench
from rollout import HERE


def test_every_way_of_the_loss_has_the_same_gradient(monkeypatch):
    monkeypatch.setattr("train.LOGITS_AT_ONCE", 7 * 500)                     # 7 of 50 tokens at a time
    ways = {way: bench.loss_once(way, 50, 16, 500)[2] for way in ("direct", "ours")}
    assert ways["ours"] == pytest.approx(ways["direct"], rel=1e-5) and ways["direct"] > 0


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="memory is read as Linux tells it")
def test_memory_of_a_process_is_seen():
    before = bench.megabytes([os.getpid()])
    block = torch.ones(50 * 2 ** 18)                                         # 50 MB
    assert 45 < bench.megabytes([os.getpid()]) - before < 60 and block[0] == 1


def test_an_unknown_part_is_one_line():
    result = subprocess.run([sys.executable, os.path.join(HERE, "bench.py"), "everything"], capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and "everything" in result.stderr


def test_a_model_of_random_weights_is_timed(monkeypatch):
    import memory
    monkeypatch.setitem(memory.SHAPES, "small", memory.llama(2, 64, 4, 2, 128, 500))
    for rank in (0, 2):
        row = bench.model_once("small", rank, 3, 20, 4)
        assert row["generated tokens/s"] > 0 and row["trained tokens/s"] > 0 and 0 < row["of matrix throughput"] < 2
