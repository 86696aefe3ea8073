"""Forward passes of a causal language model over rows of token ids, with no token read twice."""

import os
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence


def precision(model):
    """The context of a model's matrix products: bfloat16 if the model was loaded so."""
    mixed = getattr(model, "mixed", False)
    return torch.autocast(model.device.type, torch.bfloat16, enabled=mixed)


def pad(rows, device, side="right"):
    """Lists of ids -> ids (N, L) and mask (N, L), padded with 0 on the right or on the left."""
    pad_rows = partial(pad_sequence, batch_first=True, padding_side=side)
    ids = pad_rows([torch.tensor(row) for row in rows])
    mask = pad_rows([torch.ones(len(row), dtype=torch.long) for row in rows])
    return ids.to(device), mask.to(device)


@torch.no_grad()
def read_shared_prefix(model, prompts):
    """Read once what all prompts begin with, such as a world's rules -> (cache, its length).

    A short prefix is not worth it. Under a sliding window there is none either: the window would
    count the padding that would then stand between the prefix and the rest.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache(config=model.config)
    # each row keeps a token to read
    length = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
    if length < 64 or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return cache, 0
    ids = torch.tensor([prompts[0][:length]], device=model.device)
    with precision(model):
        model(ids, past_key_values=cache, logits_to_keep=1)
    cache.batch_repeat_interleave(len(prompts))
    return cache, length


@torch.no_grad()
def read_prompts(model, prompts, budget):
    """-> logits (n, V) after each prompt, the cache, its mask (n, L), the last positions (n, 1)

    The prompts are padded on the left and read at most `budget` tokens at a time.
    """
    cache, shared = read_shared_prefix(model, prompts)
    ids, mask = pad([p[shared:] for p in prompts], model.device, "left")
    mask = torch.cat([mask.new_ones(len(prompts), shared), mask], 1)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    columns = max(budget // len(prompts), 1)
    for part in range(shared, mask.shape[1], columns):
        until = min(part + columns, mask.shape[1])
        logits = next_logits(
            model,
            ids[:, part - shared : until - shared],
            mask[:, :until],
            position[:, part:until],
            cache,
        )
    return logits, cache, mask, position[:, -1:]


def next_logits(model, ids, mask, position, cache):
    """Read more tokens into the cache -> logits (n, V) after the last one."""
    with precision(model):
        output = model(
            ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            logits_to_keep=1,
        )
    return output.logits[:, 0]


def last_hidden(body, rows):
    """The last hidden states of rows of token ids, padded on the right; equal rows are read once.

    -> hidden (n, L, d) of the n distinct rows, and for each row the number of its distinct one.
    Attention is causal, so no token reads the padding after it and no mask is needed.
    """
    distinct = {row: number for number, row in enumerate(dict.fromkeys(map(tuple, rows)))}
    ids, _ = pad(list(distinct), body.device)
    # nothing drops out; this only switches gradient checkpointing
    body.train(torch.is_grad_enabled())
    with precision(body):
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state
    return hidden, [distinct[tuple(row)] for row in rows]
