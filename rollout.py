"""Rollouts: a policy plays many episodes at once; and what it wrote is scored again for training.

The distribution that is sampled is the distribution that is scored: softmax(logits / temperature)
over the whole vocabulary, with no top-k, no top-p and nothing from a model's generation config.
That is why sampling is a loop of a few lines here and not `model.generate`. Every turn is a fresh
prompt (the paper's setting), not one growing conversation.
"""

import time
from dataclasses import dataclass, field

import torch

from epo import token_logp_and_entropy
from support.forward import last_hidden, next_logits, precision, read_prompts
from worlds.chat import templated

# a chat model's response ends here
ACTION_END = "</action>"


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
    """A causal language model with what it takes to play; support/loading.py makes one.

    end: the tokens that end a turn. compact: it reads World.compact_prompt and writes the bare
    action; else World.chat_prompt, where think: it reasons first. system_role: its template has
    one. made_for: settings that its own configuration asks for. reference: a frozen copy of the
    policy as it was, for the KL; None with LoRA, where the model without its adapter is it.
    tokens_per_batch: the most that are read in a forward pass.
    """

    model: torch.nn.Module
    tokenizer: object
    end: list[int]
    compact: bool
    made_for: dict = field(default_factory=dict)
    reference: torch.nn.Module | None = None
    tokens_per_batch: int = 16384
    think: bool = True
    system_role: bool = True

    def prompt(self, world, past, now):
        """The text of a turn's prompt. past: (Observation, action) of the turns before."""
        if self.compact:
            return world.compact_prompt(past, now)
        messages = world.chat_prompt(past, now, self.think)
        return templated(self.tokenizer, messages, self.system_role)

    def encode(self, text):
        """A prompt as token ids. A chat template has put the special tokens there already."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def unfinished(self, token, responses):
        """(n,) of bool: which responses go on after `token` (n,). responses: their ids so far."""
        go_on = ~torch.isin(token, torch.tensor(self.end, device=token.device))
        if self.compact:
            return go_on
        # nothing is sampled, paid for or trained on after the action
        ends = self.tokenizer.batch_decode([ids[-len(ACTION_END) :] for ids in responses])
        acted = [ACTION_END in text for text in ends]
        return go_on & ~torch.tensor(acted, device=token.device)

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


@torch.no_grad()
def generate(policy, prompts, temperature, max_tokens, generator=None):
    """Sample a response for each prompt (a list of ids), all together; a finished one drops out.

    Equal prompts, with what was sampled after them, are one row of the batch until they differ.
    generator: a torch.Generator on the device. -> a list of (response ids, log-probs, entropies)
    """
    model = policy.model.eval()
    responses = [([], [], []) for _ in prompts]
    active = torch.arange(len(prompts))
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    # the row of each active response
    row = torch.tensor([number[tuple(prompt)] for prompt in prompts])
    # around the whole loop, so that bfloat16 copies of weights are not made for every token anew
    with precision(model):
        logits, cache, mask, position = read_prompts(model, list(number), policy.tokens_per_batch)
        while True:
            logits = logits[row].float()
            p = (logits / temperature).softmax(-1)
            token = p.multinomial(1, generator=generator)[:, 0]  # (n,)
            logp, entropy = token_logp_and_entropy(logits, token, temperature)
            token = token.cpu()
            columns = (active.tolist(), token.tolist(), logp.tolist(), entropy.tolist())
            for i, *values in zip(*columns, strict=True):
                for column, value in zip(responses[i], values, strict=True):
                    column.append(value)
            unfinished = policy.unfinished(token, [responses[i][0] for i in columns[0]])
            if not unfinished.any() or len(responses[columns[0][0]][0]) == max_tokens:
                return responses
            # the rows that go on: the old row and the token after it, each pair once
            active = active[unfinished]
            pairs = torch.stack([row, token], 1)[unfinished]
            pairs, row = pairs.unique(dim=0, return_inverse=True)
            old_row, token = pairs[:, 0], pairs[:, 1:]
            if not torch.equal(old_row, torch.arange(len(mask))):
                old_row = old_row.to(model.device)
                cache.batch_select_indices(old_row)
                mask, position = mask[old_row], position[old_row]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            position = position + 1
            logits = next_logits(model, token.to(model.device), mask, position, cache)


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
    texts = [policy.prompt(world, past[slot], now[slot]) for slot in active]
    ids = {text: policy.encode(text) for text in set(texts)}
    prompts = [ids[text] for text in texts]
    samples = generate(policy, prompts, temperature, max_tokens, generator)
    turns = {}
    for slot, prompt, sample in zip(active, prompts, samples, strict=True):
        text = policy.tokenizer.decode(sample[0], skip_special_tokens=True)
        action = world.parse_compact(text) if policy.compact else world.parse_chat(text)
        seen = "\n".join((now[slot].reply, now[slot].look, now[slot].inventory))
        turns[slot] = Turn(t, prompt, *sample, text, action, seen)
    return turns
