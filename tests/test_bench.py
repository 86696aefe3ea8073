"""The benchmark and the memory model: equal gradients, sums by hand, measured peaks, bad input."""

import sys

import pytest
from test_faults import refuses
from transformers import LlamaConfig

from tools import bench, memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
# 1,400 parameters, 800 of them in the output matrix; an adapter of rank 2 has 256
SMALL = memory.shape(LlamaConfig, 1, 8, 2, 1, 16, 100)
LOGITS = 6.3 * 4 * 2**25


def test_shapes_have_the_parameters_that_their_makers_say():
    counts = 134_515_008, 361_821_120, 1_543_714_304, 3_085_938_688, 7_615_616_512
    # all weights: the model, its reference, Adam's two
    assert tuple(memory.predict(c)[0] / 16 for c in memory.SHAPES.values()) == counts


SUMS = [
    # 28 × 1400; copies 1200, gradients 5600, the residual stream 640, and a gradient of the output
    # matrix 3200; copies 2800, the cache 960, prompts in a layer 1600, its keys and values 1440
    ({"ppo": True}, [39200, 10640, 6800]),
    # 2 × 1400 + 12 × 256; 512 + 1024 + 320; 512 + 480 + 800 + 1280
    ({"rank": 2}, [5872, 1856, 3072]),
]


@pytest.mark.parametrize("options, sums", SUMS)
def test_the_sums_by_hand(options, sums):
    always, update, rollout = memory.predict(SMALL, tokens=10, cached=15, **options)
    assert [always, update - LOGITS, rollout] == pytest.approx(sums)


def test_an_unknown_part_is_one_line():
    refuses(bench, "rollout", "everything", says="'everything'")


@pytest.mark.parametrize("rank", [0, 2])
def test_a_model_of_random_weights_is_timed(rank, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "small", SMALL)
    # not every processor has bfloat16
    for row in bench.model("small", rank, dtype="float32"):
        assert min(row["generated tokens/s"], row["trained tokens/s"]) > 0
        assert row["sampled - scored, nats"] < 1e-5
