"""The memory model: known parameter counts, a sum by hand, and a measured peak."""
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import memory
from rollout import HERE


def test_shapes_have_the_parameters_that_their_makers_say():
    found = {name: memory.count(config)[0] for name, config in memory.SHAPES.items()}
    assert found == {"SmolLM2-135M": 134_515_008, "SmolLM2-360M": 361_821_120, "Qwen2.5-0.5B": 494_032_768, "Qwen2.5-1.5B": 1_543_714_304,
                     "Qwen2.5-3B": 3_085_938_688, "Qwen2.5-7B": 7_615_616_512}


def test_parts_by_hand():
    """One layer, d 8, two heads of which one for keys and values, ffn 16, V 100: linear layers q 8·8, k and v 8·4, o 8·8, gate, up and down 8·16."""
    config = memory.llama(1, 8, 2, 1, 16, 100)
    matrices, norms, head = 64 + 32 + 32 + 64 + 3 * 128, 3 * 8, 800
    n = matrices + norms + head
    assert memory.count(config) == (n, head, 16 + 12 + 12 + 16 + 3 * 24)
    held, update, rollout = memory.parts(config, 0, True, True, False, 10, 2, 3, 5)
    assert held == {"weights": 4 * n, "start for the KL": 4 * n, "Adam": 8 * n, "critic": 12 * n}
    assert update == {"gradients": 4 * n, "bfloat16 copies of weights": 0, "residual stream": 10 * 4 * 8 * 2,
                      "logits or a layer": max(6.3 * 4 * 200 + 4 * head, 10 * 4 * (11 * 8 + 8 * 16))}
    assert rollout["keys and values"] == 15 * 2 * 4 * 4 * 2 == memory.parts(config, 0, True, True, True, 10, 2, 3, 5)[2]["keys and values"]
    held, update, _ = memory.parts(config, 2, False, True, True, 10, 2, 3, 5)
    assert held == {"weights": 2 * n + 4 * 256, "start for the KL": 0, "Adam": 8 * 256, "critic": 0}
    assert update["gradients"] == 4 * 256 and update["residual stream"] == 10 * 2 * 8 * 2


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_keys_and_values_have_the_weights_dtype_whatever_the_products_have(weights):
    model = AutoModelForCausalLM.from_config(memory.llama(1, 8, 2, 1, 16, 100), dtype=weights)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model(torch.tensor([[1, 2]]), use_cache=True).past_key_values
    assert cache.layers[0].keys.dtype == cache.layers[0].values.dtype == weights


def test_the_largest_fits_and_one_more_does_not():
    options = {"config": memory.SHAPES["Qwen2.5-1.5B"], "lora_rank": 32}
    size, room = memory.largest(24e9, "tokens", **options), 24e9 - 2 * memory.GIB
    assert memory.total(*memory.parts(tokens=size, **options)) < room <= memory.total(*memory.parts(tokens=size + 1, **options))
    assert memory.largest(24e9, "tokens", config=memory.SHAPES["Qwen2.5-7B"]) == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="memory is read as Linux tells it")
def test_a_measured_peak_is_what_it_says():
    result = subprocess.run([sys.executable, os.path.join(HERE, "bench.py"), "--once", "memory_once", json.dumps(["update", 2, 512, 2048, 20000, 0, "grpo", "float32"])],
                            capture_output=True, text=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    measured, predicted = json.loads(result.stdout)
    assert predicted == pytest.approx(measured, rel=0.15), result.stderr
