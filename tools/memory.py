"""The memory of a run on a GPU, predicted as a sum of bytes; tools.bench measures its peak."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from support.forward import kept
from update import LOGITS_AT_ONCE

# bytes of a number, and of one with the two that Adam keeps for it
FLOAT, HALF, WITH_ADAM = 4, 2, 12
SIZES = (
    "num_hidden_layers hidden_size num_attention_heads num_key_value_heads intermediate_size "
    "vocab_size"
).split()


def shape(family, *sizes, tied=True):
    """sizes: in the order of SIZES. tied: the output matrix is that of the embeddings."""
    return family(**dict(zip(SIZES, sizes)), tie_word_embeddings=tied)


SHAPES = {
    "SmolLM2-135M": shape(LlamaConfig, 30, 576, 9, 3, 1536, 49152),
    "SmolLM2-360M": shape(LlamaConfig, 32, 960, 15, 5, 2560, 49152),
    "Qwen2.5-1.5B": shape(Qwen2Config, 28, 1536, 12, 2, 8960, 151936),
    "Qwen2.5-3B": shape(Qwen2Config, 36, 2048, 16, 2, 11008, 151936),
    "Qwen2.5-7B": shape(Qwen2Config, 28, 3584, 28, 4, 18944, 152064, tied=False),
}


def predict(config, rank=0, ppo=False, keep=False, tokens=16384, cached=64 * 2048):
    """-> bytes that a run holds all through it, and on top in an update, in a rollout

    rank: LoRA's, or 0; keep: no layer is computed again; tokens: of a micro-batch; cached: of a
    turn, of all episodes together.
    Matrix products are bfloat16, for which autocast copies float32 weights once.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    n = model.num_parameters()
    head = model.get_output_embeddings().weight.numel()
    layers, width, ffn = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    keys = width * config.num_key_value_heads // config.num_attention_heads
    if rank:
        # only the adapter is float32 and learns
        own, head, copies, mlps = HALF, 0, HALF, 4
        linear = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
        learns = body = inner = rank * sum(m.in_features + m.out_features for m in linear)
    else:
        own, copies, mlps = FLOAT, HALF + FLOAT, 3
        learns, inner = n, n - head
        body = n if config.tie_word_embeddings else inner
    # the model; the adapter or the reference policy, and Adam's; the critic and Adam's for it
    always = n * own + WITH_ADAM * (learns + ppo * body)
    # the loss and its gradient take 6.3 times the logits; the output matrix has a gradient, too
    logits = FLOAT * (6.3 * LOGITS_AT_ONCE + head)
    # a layer that is computed again, forward and backward
    layer = tokens * HALF * (11 * width + 8 * ffn)
    update = logits + kept(config, tokens) if keep else max(logits, layer)
    # copies, gradients, the residual stream
    update += inner * HALF + learns * FLOAT
    update += tokens * own * width * (layers + 1)
    read = min(tokens, cached)
    mlp = read * HALF * ffn * mlps
    # one layer's keys and values are copied when a token is added, and repeated for all heads
    rollout = max(mlp, cached * 2 * width * copies)
    # copies, the cache, prompts
    rollout += body * HALF
    rollout += cached * 2 * keys * own * (layers + 1)
    rollout += read * own * 5 * width
    return always, update, rollout


# trained, algo, options of predict
CASES = [
    ("all", "grpo", {}),
    ("all", "ppo", {"ppo": 1}),
    ("LoRA 32", "grpo", {"rank": 32}),
    ("kept", "grpo", {"rank": 32, "keep": True}),
    ("LoRA 32", "ppo", {"rank": 32, "ppo": 1}),
]


def main():
    print("GiB for 64 episodes, turns of up to 2,048 tokens, micro-batches of 16,384 tokens\n")
    print("model        trained algo   always  update rollout    peak  card")
    for name, config in SHAPES.items():
        for trained, algo, options in CASES:
            always, *phases = predict(config, **options)
            peak = always + max(phases)
            sizes = "".join(f"{n / 2**30:8.1f}" for n in (always, *phases, peak))
            # beside the sum a card needs 2 GiB for CUDA and for fragments
            fits = [f"{card} GB" for card in (24, 80) if peak + 2**31 < card * 10**9]
            print(f"{name:12} {trained:7} {algo:4} {sizes}  {[*fits, 'neither'][0]}")


if __name__ == "__main__":
    main()
