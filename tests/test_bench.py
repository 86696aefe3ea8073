"""The benchmark and the memory model: equal gradients, sums by hand, measured peaks, bad input."""

import sys

import pytest
from transformers import LlamaConfig

from tools import bench, memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
# 1,400 parameters, 800 of them in the output matrix; an adapter of rank 2 has 256
SMALL = memory.shape(LlamaConfig, 1, 8, 2, 1, 16, 100)
LOGITS = 6.3 * 4 * 2**25


def test_both_ways_of_the_loss_have_the_same_gradient(monkeypatch):
    tokens, at_once, vocabulary = 50, 7, 500
    monkeypatch.setattr(bench, "LOGITS_AT_ONCE", at_once * vocabulary)
    ours, direct = bench.loss(tokens, 16, vocabulary)
    assert 0 < ours["|∂L/∂h|"] == pytest.approx(direct["|∂L/∂h|"], rel=1e-5)


def test_the_logits_take_the_predicted_memory_whatever_the_number_of_tokens():
    row = next(bench.loss(2500, 8, 20_000))
    assert row["peak MB"] == pytest.approx(LOGITS / 2**20, rel=0.1)


def test_shapes_have_the_parameters_that_their_makers_say():
    counts = 134_515_008, 361_821_120, 1_543_714_304, 3_085_938_688, 7_615_616_512
    # all weights: the model, its reference, Adam's two
    assert tuple(memory.predict(c)[0] / 16 for c in memory.SHAPES.values()) == counts


def test_the_sums_by_hand():
    always, update, rollout = memory.predict(SMALL, ppo=True, tokens=10, cached=15)
    # of a rollout: copies, the cache, prompts in a layer, and its keys and values for both heads
    assert (always, rollout) == (28 * 1400, 2800 + 960 + 1600 + 1440)
    # copies, gradients, the residual stream and a gradient of the output matrix
    assert update == pytest.approx(1200 + 5600 + 640 + 3200 + LOGITS)
    always, update, rollout = memory.predict(SMALL, rank=2, tokens=10, cached=15)
    assert (always, rollout) == (2 * 1400 + 12 * 256, 512 + 480 + 800 + 1280)
    assert update == pytest.approx(512 + 1024 + 320 + LOGITS)


def test_an_unknown_part_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "loss", "everything"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    message = capsys.readouterr().err
    assert "'everything'" in message and message.count("\n") == 1


@pytest.mark.parametrize("rank", [0, 2])
def test_a_model_of_random_weights_is_timed(rank, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "small", SMALL)
    # not every processor has bfloat16
    (row,) = bench.model("small", rank, dtype="float32")
    assert row["generated tokens/s"] > 0 and row["trained tokens/s"] > 0
