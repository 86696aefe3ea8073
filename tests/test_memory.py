"""The memory model: known parameter counts, a sum by hand, and a measured peak."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.loading import ROOT
from tools import memory


def test_shapes_have_the_parameters_that_their_makers_say():
    assert {name: memory.count(config)[0] for name, config in memory.SHAPES.items()} == {
        "SmolLM2-135M": 134_515_008,
        "SmolLM2-360M": 361_821_120,
        "Qwen2.5-0.5B": 494_032_768,
        "Qwen2.5-1.5B": 1_543_714_304,
        "Qwen2.5-3B": 3_085_938_688,
        "Qwen2.5-7B": 7_615_616_512,
    }


# one layer, width 8, two heads of which one is for keys and values, ffn 16, V 100; the linear
# layers are q 8·8, k and v 8·4, o 8·8, and gate, up and down 8·16
SMALL = memory.llama(1, 8, 2, 1, 16, 100)
HEAD, NORMS = 800, 3 * 8
PARAMETERS = HEAD + NORMS + 64 + 32 + 32 + 64 + 3 * 128
SIDES = 16 + 12 + 12 + 16 + 3 * 24
SIZES = {"tokens": 10, "response_tokens": 2, "episodes": 3, "context": 5}


def test_all_weights_by_hand():
    assert memory.count(SMALL) == (PARAMETERS, HEAD, SIDES)
    always, update, rollout = memory.parts(SMALL, ppo=True, mixed=False, **SIZES)
    assert always == {
        "weights": 4 * PARAMETERS,
        "reference policy": 4 * PARAMETERS,
        "Adam": 8 * PARAMETERS,
        "critic": 12 * PARAMETERS,
    }
    assert update == {
        "gradients": 4 * PARAMETERS,
        "bfloat16 copies of weights": 0,
        "residual stream": 10 * 4 * 8 * 2,
        "logits or a layer": max(6.3 * 4 * 200 + 4 * HEAD, 10 * 4 * (11 * 8 + 8 * 16)),
    }
    assert rollout == {
        "bfloat16 copies of weights": 0,
        "keys and values": 15 * 2 * 4 * 4 * 2,
        # at most `tokens` at a time
        "prompts through a layer": 10 * 4 * (5 * 8 + 3 * 16),
    }
    assert memory.total(always, update, rollout) == sum(always.values()) + sum(update.values())


def test_bfloat16_products_by_hand():
    _, update, rollout = memory.parts(SMALL, **SIZES)
    assert update["bfloat16 copies of weights"] == 2 * (PARAMETERS - HEAD)
    # the output matrix, too
    assert rollout["bfloat16 copies of weights"] == 2 * PARAMETERS
    # keys and values are float32 all the same
    assert rollout["keys and values"] == 15 * 2 * 4 * 4 * 2
    # here a layer's keys and values for both heads, in float32 and in bfloat16, are the larger part
    repeated = 15 * 2 * 8 * (4 + 2)
    assert rollout["prompts through a layer"] == 10 * 4 * 5 * 8 + repeated


def test_lora_by_hand():
    always, update, rollout = memory.parts(SMALL, lora_rank=2, **SIZES)
    adapter = 2 * SIDES
    assert always == {
        "weights": 2 * PARAMETERS + 4 * adapter,
        "reference policy": 0,
        "Adam": 8 * adapter,
        "critic": 0,
    }
    assert update["gradients"] == 4 * adapter
    assert update["residual stream"] == 10 * 2 * 8 * 2
    assert update["logits or a layer"] == max(6.3 * 4 * 200, 10 * 2 * (11 * 8 + 8 * 16))
    assert update["bfloat16 copies of weights"] == 2 * adapter
    assert rollout["prompts through a layer"] == 10 * 2 * (5 * 8 + 4 * 16)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_keys_and_values_have_the_weights_dtype_whatever_the_products_have(weights):
    model = AutoModelForCausalLM.from_config(SMALL, dtype=weights)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model(torch.tensor([[1, 2]]), use_cache=True).past_key_values
    assert cache.layers[0].keys.dtype == cache.layers[0].values.dtype == weights


def test_the_largest_fits_and_one_more_does_not():
    options = {"config": memory.SHAPES["Qwen2.5-1.5B"], "lora_rank": 32}
    size, room = memory.largest(24e9, "tokens", **options), 24e9 - 2 * memory.GIB
    peak = lambda tokens: memory.total(*memory.parts(tokens=tokens, **options))
    assert peak(size) < room <= peak(size + 1)
    assert memory.largest(24e9, "tokens", config=memory.SHAPES["Qwen2.5-7B"]) == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
def test_a_measured_peak_is_as_predicted():
    case = json.dumps(["update", 2, 512, 2048, 20000, 0, "grpo", "float32"])
    command = [sys.executable, "-m", "tools.bench", "--once", "memory_once", case]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    measured, predicted = json.loads(result.stdout)
    assert predicted == pytest.approx(measured, rel=0.15), result.stderr
