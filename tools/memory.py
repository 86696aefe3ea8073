"""How much memory a run takes, by part: python memory.py

A sum of bytes from a model's shape; `python bench.py memory` sets it beside measured peaks. The table it prints is a prediction for GPUs,
made where there was none to measure on.

What lives through the whole run ("held"): weights, the frozen start for the KL, Adam's two moments, and the same for PPO's critic. On top of
it comes the larger of the two phases: the rollout (the cache of keys and values) or the update (gradients, the residual stream after
each layer, one layer computed again, and a few hundred tokens of logits).
"""
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from train import LOGITS_AT_ONCE

GIB = 2 ** 30
FLOAT, HALF = 4, 2
ADAM = 2 * FLOAT
LOGITS_COPIES = 6.3                  # the loss and its gradient hold that many times the logits
LAYER_D, LAYER_FFN = 11, 8           # numbers per token that one layer holds, forward and backward: times hidden and feed-forward width

COUNTED = {}


def count(config):
    """Parameters of the model, its output matrix, and all linear layers' inputs plus outputs (a LoRA adapter has rank times these)."""
    shape = config.to_json_string()
    if shape not in COUNTED:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        COUNTED[shape] = model.num_parameters(), head.weight.numel(), sum(m.in_features + m.out_features for m in linear)
    return COUNTED[shape]


def parts(config, lora_rank=0, ppo=False, kl=True, mixed=True, tokens=16384, written=2 ** 20, episodes=64, context=2048):
    """Bytes by part, of a run of train.py with one model shape. mixed: bfloat16 products, as on a GPU; tokens: of a micro-batch
    (--tokens-per-batch), padding counted, `written` of them by the policy; context: prompt and written tokens of the longest turn."""
    n, head, linear = count(config)
    adapters, product = lora_rank * linear, HALF if mixed else FLOAT
    learns = adapters or n
    body = n if config.tie_word_embeddings else n - head
    layers, d, ffn = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * (getattr(config, "head_dim", None) or d // config.num_attention_heads)
    residual = product if lora_rank else FLOAT
    held = {"weights": n * (product if lora_rank else FLOAT) + FLOAT * adapters,
            "start for the KL": FLOAT * n * (kl and not lora_rank),
            "Adam": ADAM * learns,
            "critic": (FLOAT + ADAM) * (adapters or body) * ppo}
    logits = LOGITS_COPIES * FLOAT * min(LOGITS_AT_ONCE, written * config.vocab_size) + FLOAT * head * (not lora_rank)
    layer = tokens * product * (LAYER_D * d + LAYER_FFN * ffn)
    if lora_rank and mixed:              # each adapter's input is made float32, and bfloat16 again for its product
        layer += tokens * (FLOAT * ffn + HALF * (6 * d + ffn))
    copies = {"bfloat16 copies of weights": HALF * (n - head) * (mixed and not lora_rank)}                 # autocast keeps them
    update = {"gradients": FLOAT * learns, **copies,
              "residual stream": tokens * residual * d * (layers + 1),
              "logits or a layer": max(logits, layer)}
    cached = episodes * context * 2 * keys * residual                    # float32 weights make float32 keys, under autocast too
    rollout = {**copies,
               "keys and values": cached * (layers + 1),                  # one layer's are copied when a token is added
               "prompts through a layer": episodes * context * product * (3 * d + 3 * ffn)}
    return held, update, rollout


def total(held, *phases):
    """The peak: what is held and the larger phase, in bytes."""
    return sum(held.values()) + max(sum(phase.values()) for phase in phases)


def llama(layers, d, heads, kv, ffn, vocabulary=49152):
    return LlamaConfig(vocab_size=vocabulary, hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
                       intermediate_size=ffn, tie_word_embeddings=True)


def qwen(layers, d, heads, kv, ffn, vocabulary=151936, tied=True):
    return Qwen2Config(vocab_size=vocabulary, hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
                       intermediate_size=ffn, tie_word_embeddings=tied)


SHAPES = {"SmolLM2-135M": llama(30, 576, 9, 3, 1536), "SmolLM2-360M": llama(32, 960, 15, 5, 2560), "Qwen2.5-0.5B": qwen(24, 896, 14, 2, 4864),
          "Qwen2.5-1.5B": qwen(28, 1536, 12, 2, 8960), "Qwen2.5-3B": qwen(36, 2048, 16, 2, 11008), "Qwen2.5-7B": qwen(28, 3584, 28, 4, 18944, 152064, False)}


def largest(card, value, **options):
    """The most tokens of a micro-batch (or episodes of a step) with which a run fits `card` bytes less 2 GiB for CUDA and fragments; 0: none."""
    fits = lambda size: total(*parts(**options, **{value: size})) < card - 2 * GIB
    size = 0
    for bit in (2 ** k for k in reversed(range(21))):
        size += bit * fits(size + bit)
    return size


def main():
    print("Predicted, in GiB, for 64 episodes with turns of up to 2,048 tokens and 16,384 tokens in a micro-batch. The last columns: the most of them that fit.\n")
    print(f"{'model':14} {'trained':9} {'algo':5} {'held':>6} {'rollout':>8} {'update':>7} {'peak':>6}   {'24 GB: tokens':>14} {'episodes':>9}   {'80 GB: tokens':>14} {'episodes':>9}")
    for name, config in SHAPES.items():
        for rank in (0, 32):
            for ppo in (False, True):
                options = {"config": config, "lora_rank": rank, "ppo": ppo}
                held, update, rollout = parts(**options)
                sizes = [largest(card * 10 ** 9, value, **options) for card in (24, 80) for value in ("tokens", "episodes")]
                gib = [sum(part.values()) / GIB for part in (held, rollout, update)]
                print(f"{name:14} {f'LoRA {rank}' if rank else 'all':9} {'ppo' if ppo else 'grpo':5} {gib[0]:6.1f} {gib[1]:8.1f} {gib[2]:7.1f} "
                      f"{total(held, update, rollout) / GIB:6.1f}   {sizes[0]:14,} {sizes[1]:9,}   {sizes[2]:14,} {sizes[3]:9,}")


if __name__ == "__main__":
    main()
