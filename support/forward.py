"""Forward passes of a causal language model over rows of token ids, with no token read twice."""

import os
from inspect import signature

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache, DynamicLayer

from support.run_folder import SetupError

# tokens of a micro-batch; below, a CPU has the memory to keep what the backward pass needs
RECOMPUTE_ABOVE = 4096


def precision(model):
    """The context of a model's matrix products: bfloat16 if the model was loaded so."""
    mixed = getattr(model, "mixed", False)
    return torch.autocast(model.device.type, torch.bfloat16, enabled=mixed)


def pad(rows, device, side="right"):
    """Lists of ids -> ids (N, L) and mask (N, L), padded with 0 on the right or on the left."""
    rows = [torch.tensor(row) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side=side).to(device)
    return ids.clamp(min=0), (ids >= 0).long()


def shortcuts(model, cache):
    """Whether padding may stand between the tokens of a row, and one mask serves all layers."""
    # not with recurrent layers, nor where a sliding window or ALiBi counts columns
    whole = all(type(layer) is DynamicLayer for layer in cache.layers)
    return whole and getattr(model, "shortcuts", True)


def shareable(model, rows):
    """-> an empty cache, and how many of the first tokens of all rows can be read once, into it"""
    cache = DynamicCache(config=model.config)
    # each row keeps a token to read
    length = min(len(os.path.commonprefix(rows)), min(map(len, rows)) - 1)
    # a short one is not worth it
    return cache, length if length >= 32 and shortcuts(model, cache) else 0


def read_once(body, rows, length, cache):
    """Read the `length` tokens with which all n rows begin -> their hidden states (n, length, d)"""
    ids = torch.tensor([rows[0][:length]], device=body.device)
    hidden = body(input_ids=ids, past_key_values=cache).last_hidden_state
    cache.batch_repeat_interleave(len(rows))
    return hidden.expand(len(rows), -1, -1)


@torch.no_grad()
def read_prompts(model, prompts, budget):
    """-> logits (n, V) after each prompt, the cache, its mask (n, L), the last positions (n, 1)

    The prompts are padded on the left and read at most `budget` tokens at a time. This and
    `next_logits` run within `precision(model)`. Raises SetupError if the policy has diverged.
    """
    cache, end = shareable(model, prompts)
    if end:
        read_once(model.base_model, prompts, end, cache)
    ids, mask = pad([prompt[end:] for prompt in prompts], model.device, "left")
    position = (end + mask.cumsum(1) - 1).clamp(min=0)
    mask = torch.cat([mask.new_ones(len(prompts), end), mask], 1)
    columns = max(budget // len(prompts), 1)
    for part, places in zip(ids.split(columns, 1), position.split(columns, 1)):
        end += part.shape[1]
        logits = next_logits(model, part, mask[:, :end], places, cache)
    # in float32 a weight can be large and finite still, and a product of two no more
    if not logits.logsumexp(-1).isfinite().all():
        raise SetupError("the policy's logits are not finite: begin a new run with a lower --lr")
    return logits, cache, mask, position[:, -1:]


def next_logits(model, ids, mask, position, cache):
    """Read more tokens into the cache -> logits (n, V) after the last one. mask: (n, L)"""
    # a cache that is still empty has no dtype
    if ids.shape[1] == 1 and shortcuts(model, cache) and cache.layers[0].keys is not None:
        # as attention adds it, made once for all layers: log 1 adds nothing, log 0 is -inf
        mask = mask.to(cache.layers[0].keys.dtype).log()[:, None, None]
    read = {"attention_mask": mask, "position_ids": position, "past_key_values": cache}
    hidden = model.base_model(ids, **read).last_hidden_state
    # of a slice with gaps in memory the product takes a CPU 5 times as long, in bfloat16 400 times
    return logits_of(model, hidden[:, -1].contiguous())


def last_hidden(body, rows):
    """The last hidden states of rows of token ids, padded on the right; equal rows are read once.

    -> hidden (n, L, d) of the n distinct rows, and for each row the number of its distinct one.
    Attention is causal, so no token reads the padding after it and no mask is needed.
    """
    number = {row: i for i, row in enumerate(dict.fromkeys(map(tuple, rows)))}
    distinct = list(number)
    check_room(body, max(map(len, distinct)))
    ids, _ = pad(distinct, body.device)
    # nothing drops out; this only switches gradient checkpointing, which takes no cache
    body.train(torch.is_grad_enabled() and recomputes(body, ids.numel()))
    cache, shared = shareable(body, distinct)
    with precision(body):
        if body.training or not shared:
            hidden = body(input_ids=ids, use_cache=False).last_hidden_state
        else:
            prefix = read_once(body, distinct, shared, cache)
            rest = body(input_ids=ids[:, shared:], past_key_values=cache).last_hidden_state
            hidden = torch.cat([prefix, rest], 1)
    return hidden, [number[tuple(row)] for row in rows]


def kept(config, tokens):
    """-> bytes that all layers keep of a micro-batch for their gradient, in bfloat16"""
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return 2 * tokens * config.num_hidden_layers * (8 * config.hidden_size + 4 * inner)


def recomputes(body, tokens):
    """Whether layers are computed again for their gradient: a third more work, little memory."""
    if getattr(body, "recompute", "auto") != "auto":
        return body.recompute == "on"
    if body.device.type == "cpu":
        return tokens > RECOMPUTE_ABOVE
    free = torch.cuda.mem_get_info()[0]
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    # the rest is for gradients, copies of weights and logits; float32 keeps twice as much
    return kept(body.config.get_text_config(), tokens) > free / (3 if body.mixed else 6)


def micro_batches(turns, indices, budget):
    """`indices` of turns, by length, in parts of at most `budget` tokens with their padding."""
    # equal turns are read once, so they count once
    equal = {}
    for i in indices:
        equal.setdefault((*turns[i].prompt, *turns[i].response), []).append(i)
    parts, rows = [[]], 0
    for ids in sorted(equal, key=len):
        if rows and (rows + 1) * len(ids) > budget:
            parts.append([])
            rows = 0
        parts[-1] += equal[ids]
        rows += 1
    return parts


# ---- what differs between architectures; `rollout.prove` cannot see all of it


def check_room(model, tokens):
    """Raises SetupError if the model's context has no room for a row of so many tokens."""
    config = model.config.get_text_config()
    room = getattr(config, "max_position_embeddings", None) or tokens
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # past this length a row gives all rows of its batch other numbers
        room = min(room, rope["original_max_position_embeddings"])
    if tokens > room:
        need = f"{tokens} are needed: lower --max-tokens, or use another model"
        raise SetupError(f"the model's context has room for {room} tokens, and {need}")


def logits_of(model, hidden):
    """Last hidden states (n, d) -> logits (n, V): by an output matrix, which some scale or cap."""
    config = model.config.get_text_config()
    value = lambda name: getattr(config, name, None) or 1
    # Cohere's, Falcon-H1's and Granite's; the states are fewer numbers than the logits
    scale = value("logit_scale") * value("lm_head_multiplier") / value("logits_scaling")
    logits = model.get_output_embeddings()(hidden if scale == 1 else hidden * scale)
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * (logits / cap).tanh() if cap else logits


def prepare(model, dtype):
    """What is decided for good when a model is loaded."""
    config, body = model.config.get_text_config(), model.base_model
    # ALiBi and GPT-Neo's window count columns, instead of reading position_ids
    counts = getattr(config, "alibi", False) or getattr(config, "window_size", None)
    told = "position_ids" in signature(body.forward).parameters and not counts
    model.shortcuts = body.shortcuts = told
    model.mixed = body.mixed = dtype == "bfloat16"
    # no dropout: the log-probs of a rollout and of the update must agree
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "jitter" in name):
                setattr(module, name, 0.0)
