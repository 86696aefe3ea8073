"""Forward passes of a causal language model over rows of token ids, with no token read twice."""

import os
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence

from support.architecture import check_room, logits_of, name_of_cache
from support.run_folder import SetupError

# tokens of a micro-batch; below, a CPU has the memory to keep what the backward pass needs
RECOMPUTE_ABOVE = 4096


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


def shortcuts(model, cache):
    """Whether padding may stand between the tokens of a row, and one mask serves all layers.

    Not with recurrent layers, nor where columns are counted: by a sliding window, or by a model
    that is not told positions.
    """
    from transformers.cache_utils import DynamicLayer

    whole = all(type(layer) is DynamicLayer for layer in cache.layers)
    return whole and getattr(model, "shortcuts", True)


def shareable(model, rows):
    """-> an empty cache, and how many of the first tokens of all rows can be read once, into it

    A short prefix is not worth it.
    """
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache(config=model.config)
    # each row keeps a token to read
    length = min(len(os.path.commonprefix(rows)), min(map(len, rows)) - 1)
    if length < 32 or not shortcuts(model, cache):
        return cache, 0
    return cache, length


@torch.no_grad()
def read_shared_prefix(model, prompts):
    """Read once what all prompts begin with, such as a world's rules -> (cache, its length)."""
    cache, length = shareable(model, prompts)
    if not length:
        return cache, 0
    ids = torch.tensor([prompts[0][:length]], device=model.device)
    model.base_model(ids, past_key_values=cache)
    cache.batch_repeat_interleave(len(prompts))
    return cache, length


@torch.no_grad()
def read_prompts(model, prompts, budget):
    """-> logits (n, V) after each prompt, the cache, its mask (n, L), the last positions (n, 1)

    The prompts are padded on the left and read at most `budget` tokens at a time. This and
    `next_logits` run within `precision(model)`. Raises SetupError if the policy has diverged.
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
    # in float32 a weight can be large and finite still, and a product of two no more
    if not logits.logsumexp(-1).isfinite().all():
        message = "the policy's logits are not finite: it has diverged"
        raise SetupError(f"{message}; begin a new run with a lower --lr")
    return logits, cache, mask, position[:, -1:]


def next_logits(model, ids, mask, position, cache):
    """Read more tokens into the cache -> logits (n, V) after the last one."""
    if ids.shape[1] == 1:
        mask = decoding_mask(model, mask, cache)
    more = {"attention_mask": mask, "position_ids": position, name_of_cache(model): cache}
    hidden = model.base_model(ids, **more).last_hidden_state
    # of a slice with gaps in memory the product takes a CPU 5 times as long, in bfloat16 400 times
    return logits_of(model, hidden[:, -1].contiguous())


def decoding_mask(model, mask, cache):
    """What the next token of each row attends to, as attention adds it; made once for all layers.

    Where layers differ, transformers makes theirs from `mask` (n, L).
    """
    # a cache that is still empty has no dtype
    if not shortcuts(model, cache) or cache.layers[0].keys is None:
        return mask
    # log 1 adds nothing, log 0 is -inf
    return mask.to(cache.layers[0].keys.dtype).log()[:, None, None]


def last_hidden(body, rows):
    """The last hidden states of rows of token ids, padded on the right; equal rows are read once.

    -> hidden (n, L, d) of the n distinct rows, and for each row the number of its distinct one.
    Attention is causal, so no token reads the padding after it and no mask is needed.
    """
    distinct = {row: number for number, row in enumerate(dict.fromkeys(map(tuple, rows)))}
    check_room(body, max(map(len, distinct)))
    ids, _ = pad(list(distinct), body.device)
    # nothing drops out; this only switches gradient checkpointing, which takes no cache
    recompute = body.device.type != "cpu" or ids.numel() > RECOMPUTE_ABOVE
    body.train(torch.is_grad_enabled() and recompute)
    shared = 0
    if not body.training:
        cache, shared = shareable(body, list(distinct))
    with precision(body):
        if not shared:
            hidden = body(input_ids=ids, use_cache=False).last_hidden_state
        else:
            prefix = body(input_ids=ids[:1, :shared], past_key_values=cache).last_hidden_state
            cache.batch_repeat_interleave(len(ids))
            rest = body(input_ids=ids[:, shared:], past_key_values=cache).last_hidden_state
            hidden = torch.cat([prefix.expand(len(ids), -1, -1), rest], 1)
    return hidden, [distinct[tuple(row)] for row in rows]


def states_at(hidden, row, column):
    """hidden[row, column], (n, L, d) -> (T, d), with a gradient that adds up in one order.

    That of an index of two dimensions adds in any order, where torch has several threads.
    """
    place = torch.tensor(row) * hidden.shape[1] + torch.tensor(column)
    return torch.nn.functional.embedding(place.to(hidden.device), hidden.flatten(0, 1))


def micro_batches(turns, indices, budget):
    """`indices` of turns, by length, in parts of at most `budget` tokens, padding counted.

    Equal turns are read once, so they count once. A turn longer than the budget is alone.
    """
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
