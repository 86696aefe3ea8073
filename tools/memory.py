"""How much memory a run takes, part by part, predicted from a model's shape.

    python -m tools.memory

It is a sum of bytes; `python -m tools.bench memory` sets it beside measured peaks. Some memory is
taken all through a run: weights, the reference policy, Adam's two moments, and the critic with its
own. On top comes the larger of two phases. The rollout has the cache of keys and values, and a
layer that reads prompts. The update has gradients, the residual stream after each layer, and either
a layer that is computed again or some hundred tokens of logits.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from update import LOGITS_AT_ONCE

GIB = 2**30
FLOAT, HALF = 4, 2
# the moments of a parameter
ADAM = 2 * FLOAT
# the loss and its gradient take that many times the logits
LOGITS_COPIES = 6.3
# numbers per token of a layer, forward and backward: times its width, times that of its MLP
LAYER_WIDTHS, LAYER_FFNS = 11, 8
# the same where nothing is kept for a gradient; an adapter takes one more of the MLP's
ROLLOUT_WIDTHS, ROLLOUT_FFNS = 5, 3
# what a card needs beside the sum: CUDA and fragments
RESERVE = 2 * GIB

counted = {}


def count(config):
    """-> parameters of the model; of its output matrix; inputs plus outputs of all linear layers

    A LoRA adapter has `rank` times the last number of parameters.
    """
    shape = config.to_json_string()
    if shape not in counted:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        sides = sum(m.in_features + m.out_features for m in linear)
        counted[shape] = model.num_parameters(), head.weight.numel(), sides
    return counted[shape]


def parts(
    config,
    lora_rank=0,
    ppo=False,
    kl=True,
    mixed=True,
    tokens=16384,
    response_tokens=2**20,
    episodes=64,
    context=2048,
):
    """Bytes by part of a run of train.py -> three dicts: all through it, the update, the rollout.

    mixed: bfloat16 products, as on a GPU; tokens: of a forward pass (--tokens-per-batch), of which
    response_tokens are responses; context: prompt and response tokens of the longest turn.
    """
    n, head, linear_sides = count(config)
    adapter = lora_rank * linear_sides
    learns = adapter or n
    body = n if config.tie_word_embeddings else n - head
    layers, width, ffn = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or width // heads
    keys = config.num_key_value_heads * head_width
    product = HALF if mixed else FLOAT
    # the dtype of the model's own weights: of the residual stream and of the cache, too
    own = product if lora_rank else FLOAT

    always = {
        "weights": n * own + adapter * FLOAT,
        "reference policy": n * FLOAT * (kl and not lora_rank),
        "Adam": learns * ADAM,
        "critic": (adapter or body) * (FLOAT + ADAM) * ppo,
    }
    logits = LOGITS_COPIES * FLOAT * min(LOGITS_AT_ONCE, response_tokens * config.vocab_size)
    logits += head * FLOAT * (not lora_rank)
    layer = tokens * product * (LAYER_WIDTHS * width + LAYER_FFNS * ffn)
    update = {
        # autocast makes them once, and uses them again
        "bfloat16 copies of weights": (adapter or n - head) * HALF * mixed,
        "gradients": learns * FLOAT,
        "residual stream": tokens * own * width * (layers + 1),
        "logits or a layer": max(logits, layer),
    }
    in_cache = episodes * context
    read = min(tokens, in_cache)
    # prompts of different lengths need a mask; with it keys and values of one layer are repeated
    # for all heads, and brought to the products' dtype
    repeated = in_cache * 2 * heads * head_width * (own + product * (own != product))
    mlp = read * product * (ROLLOUT_FFNS + (lora_rank > 0)) * ffn
    rollout = {
        "bfloat16 copies of weights": (adapter or body) * HALF * mixed,
        # one layer's are copied when a token is added
        "keys and values": in_cache * 2 * keys * own * (layers + 1),
        "prompts through a layer": read * own * ROLLOUT_WIDTHS * width + max(repeated, mlp),
    }
    return always, update, rollout


def total(always, *phases):
    """The peak in bytes: of the phases only the largest counts."""
    return sum(always.values()) + max(sum(phase.values()) for phase in phases)


def llama(layers, width, heads, key_heads, ffn, vocabulary=49152):
    return LlamaConfig(**shape(layers, width, heads, key_heads, ffn, vocabulary, True))


def qwen(layers, width, heads, key_heads, ffn, vocabulary=151936, tied=True):
    return Qwen2Config(**shape(layers, width, heads, key_heads, ffn, vocabulary, tied))


def shape(layers, width, heads, key_heads, ffn, vocabulary, tied):
    """As transformers calls it. tied: the output matrix is that of the embeddings."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "intermediate_size": ffn,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "SmolLM2-135M": llama(30, 576, 9, 3, 1536),
    "SmolLM2-360M": llama(32, 960, 15, 5, 2560),
    "Qwen2.5-0.5B": qwen(24, 896, 14, 2, 4864),
    "Qwen2.5-1.5B": qwen(28, 1536, 12, 2, 8960),
    "Qwen2.5-3B": qwen(36, 2048, 16, 2, 11008),
    "Qwen2.5-7B": qwen(28, 3584, 28, 4, 18944, 152064, tied=False),
}


def largest(card, value, **options):
    """The most tokens of a micro-batch, or episodes, that fit into a card of `card` bytes; or 0.

    value: "tokens" or "episodes"; options: of `parts`.
    """
    fits = lambda size: total(*parts(**options, **{value: size})) < card - RESERVE
    size = 0
    for bit in reversed(range(21)):
        if fits(size + 2**bit):
            size += 2**bit
    return size


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(
        "Predicted, in GiB, for 64 episodes with turns of up to 2,048 tokens and 16,384 tokens in "
        "a micro-batch.\nThe last columns: the most tokens, or episodes, that fit.\n"
    )
    sizes = "".join(f"   {f'{card} GB: tokens':>14} {'episodes':>9}" for card in (24, 80))
    phases = "".join(f" {name:>7}" for name in ("always", "rollout", "update", "peak"))
    print(f"{'model':14} {'trained':9} {'algo':4}{phases}{sizes}")
    for name, config in SHAPES.items():
        for lora_rank in (0, 32):
            for algo in ("grpo", "ppo"):
                options = {"config": config, "lora_rank": lora_rank, "ppo": algo == "ppo"}
                always, update, rollout = parts(**options)
                numbers = [sum(part.values()) for part in (always, rollout, update)]
                numbers.append(total(always, update, rollout))
                line = f"{name:14} {f'LoRA {lora_rank}' if lora_rank else 'all':9} {algo:4}"
                line += "".join(f" {number / GIB:7.1f}" for number in numbers)
                for card in (24, 80):
                    tokens = largest(card * 10**9, "tokens", **options)
                    episodes = largest(card * 10**9, "episodes", **options)
                    line += f"   {tokens:14,} {episodes:9,}"
                print(line)


if __name__ == "__main__":
    main()
