"""Rollouts: a policy plays many episodes at once; and what it wrote is scored again for training.

The distribution that is sampled is the distribution that is scored: softmax(logits / temperature)
over the whole vocabulary, with no top-k, no top-p and nothing from a model's generation config.
That is why sampling is a loop of a few lines here and not `model.generate`. Every turn is a fresh
prompt (the paper's setting), not one growing conversation.
"""

import os
import time
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence

from epo import token_logp_and_entropy


@dataclass
class Turn:
    """One turn: what the policy read and wrote.

    The response ends with the end token unless the length limit cut it. observation is what the
    policy saw, for transcripts. action is what was sent to the world, None if the text held none;
    invalid: there was none, or the world did not know it.
    """

    index: int
    prompt: list[int]
    response: list[int]
    logp: list[float]
    entropy: list[float]
    text: str = ""
    action: str | None = None
    observation: str = ""
    invalid: bool = False


@dataclass
class Episode:
    """A task as it was played. score is the world's, 0 to 100; goal is the task in its words."""

    task: tuple
    turns: list[Turn] = field(default_factory=list)
    success: bool = False
    score: int = 0
    goal: str = ""


@dataclass
class Policy:
    """A causal language model with what it takes to play; models/loading.py makes one.

    end: the tokens that end a turn. compact: it reads World.compact_prompt and writes the bare
    action; else World.chat_prompt through the chat template. made_for: settings that the model's
    own configuration asks for. reference: a frozen copy of the policy as it was, for the KL; None
    with LoRA, where the model without its adapter is the reference policy.
    """

    model: torch.nn.Module
    tokenizer: object
    end: list[int]
    compact: bool
    made_for: dict = field(default_factory=dict)
    reference: torch.nn.Module | None = None

    def encode(self, world, past, now):
        """The prompt of a turn as token ids. past: (Observation, action) of the turns before."""
        if self.compact:
            text = world.compact_prompt(past, now)
            return self.tokenizer.encode(text, add_special_tokens=False)
        messages = [{"role": "user", "content": world.chat_prompt(past, now)}]
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )

    def reference_states(self, turns):
        """`response_states` of the reference policy, without a gradient."""
        with torch.no_grad():
            if self.reference is not None:
                return response_states(self.reference, turns)
            self.model.disable_adapters()
            try:
                return response_states(self.model, turns)
            finally:
                self.model.enable_adapters()


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
def generate(policy, prompts, temperature, max_tokens, generator=None):
    """Sample a response for each prompt (a list of ids), all together; a finished row drops out.

    -> a list of (response ids, log-probs, entropies). generator: a torch.Generator on the device.
    """
    model, device = policy.model.eval(), policy.model.device
    end = torch.tensor(policy.end, device=device)
    active = torch.arange(len(prompts), device=device)
    responses = [([], [], []) for _ in prompts]
    cache, shared = read_shared_prefix(model, prompts)
    ids, mask = pad([p[shared:] for p in prompts], device, "left")
    mask = torch.cat([mask.new_ones(len(prompts), shared), mask], 1)
    position = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
    for _ in range(max_tokens):
        context = {"attention_mask": mask, "position_ids": position, "past_key_values": cache}
        with precision(model):
            output = model(ids, **context, logits_to_keep=1)
        logits = output.logits[:, 0]  # (n, V)
        p = (logits.float() / temperature).softmax(-1)
        token = p.multinomial(1, generator=generator)[:, 0]  # (n,)
        logp, entropy = token_logp_and_entropy(logits, token, temperature)
        sampled = zip(active.tolist(), token.tolist(), logp.tolist(), entropy.tolist(), strict=True)
        for i, *values in sampled:
            for column, value in zip(responses[i], values, strict=True):
                column.append(value)
        unfinished = ~torch.isin(token, end)
        if not unfinished.any():
            break
        if not unfinished.all():
            active, token = active[unfinished], token[unfinished]
            mask, position = mask[unfinished], position[unfinished]
            cache.batch_select_indices(unfinished.nonzero()[:, 0])
        ids, position = token.unsqueeze(1), position[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return responses


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


def response_states(model, turns):
    """The hidden states just before each response token, (T, d), turn after turn.

    They alone meet the output matrix (`score_tokens`): with a vocabulary of 152,000 the logits of
    the prompts would be most of the memory.
    """
    hidden, number = last_hidden(model.base_model, [t.prompt + t.response for t in turns])
    row, column = [], []
    for i, turn in enumerate(turns):
        row += [number[i]] * len(turn.response)
        first = len(turn.prompt) - 1
        column += range(first, first + len(turn.response))
    return hidden[row, column]


def score_tokens(model, hidden, tokens, temperature=1.0):
    """Log-prob and entropy of response tokens: states (T, d), tokens (T,) -> (T,), (T,)."""
    with precision(model):
        logits = model.get_output_embeddings()(hidden)
    return token_logp_and_entropy(logits, tokens, temperature)


def micro_batches(turns, indices, budget):
    """`indices` of turns, by length, in parts of at most `budget` tokens, padding counted.

    A turn longer than the budget is alone.
    """
    length = lambda i: len(turns[i].prompt) + len(turns[i].response)
    parts = [[]]
    for i in sorted(indices, key=length):
        if parts[-1] and (len(parts[-1]) + 1) * length(i) > budget:
            parts.append([])
        parts[-1].append(i)
    return parts


def collect(world, policy, tasks, turn_limit, temperature, max_tokens, generator=None, bar=None):
    """Play one episode per task, all at once, to its end or the turn limit.

    -> (episodes, lost, seconds). lost counts the episodes dropped because their simulator died:
    without an outcome they cannot be scored. seconds: those spent on load, generate, environment.
    bar: a tqdm bar that counts finished episodes.
    """
    clock = time.perf_counter
    seconds = {"load": -clock(), "generate": 0.0, "environment": 0.0}
    now = dict(enumerate(world.reset(tasks)))
    seconds["load"] += clock()
    episodes = [Episode(task, goal=now[i].goal if now[i] else "") for i, task in enumerate(tasks)]
    past = [[] for _ in tasks]
    active = [slot for slot in now if now[slot]]
    for t in range(turn_limit):
        if not active:
            break
        seconds["generate"] -= clock()
        turns = write_turns(world, policy, active, past, now, t, temperature, max_tokens, generator)
        seconds["generate"] += clock()
        seconds["environment"] -= clock()
        after = world.step({slot: turn.action for slot, turn in turns.items()})
        seconds["environment"] += clock()
        for slot, turn in turns.items():
            past[slot].append((now[slot], turn.action))
            now[slot] = after[slot]
            if now[slot]:
                turn.invalid = now[slot].invalid
                episodes[slot].turns.append(turn)
                episodes[slot].score = now[slot].score
                episodes[slot].success = now[slot].success
        unfinished = [slot for slot in active if now[slot] and not now[slot].done]
        if bar is not None:
            bar.update(len(active) - len(unfinished))
        active = unfinished
    complete = [episode for slot, episode in enumerate(episodes) if now[slot]]
    return complete, len(episodes) - len(complete), seconds


def write_turns(world, policy, active, past, now, t, temperature, max_tokens, generator):
    """The policy writes turn t of the active episodes -> {slot: Turn}."""
    prompts = [policy.encode(world, past[slot], now[slot]) for slot in active]
    samples = generate(policy, prompts, temperature, max_tokens, generator)
    turns = {}
    for slot, prompt, sample in zip(active, prompts, samples, strict=True):
        text = policy.tokenizer.decode(sample[0], skip_special_tokens=True)
        action = world.parse_compact(text) if policy.compact else world.parse_chat(text)
        seen = "\n".join((now[slot].reply, now[slot].look, now[slot].inventory))
        turns[slot] = Turn(t, prompt, *sample, text, action, seen)
    return turns
