"""Rollouts: a policy plays many episodes at once, and every token it writes is kept.

What is sampled is what is scored: softmax(logits / temperature) over the whole vocabulary, with no
top-k, no top-p and nothing from a generation config. That is why sampling is a loop here and not
`model.generate`. Every turn is a fresh prompt (as the paper's), not one growing conversation.
"""

import copy
import time
from dataclasses import dataclass, field
from functools import partial

import torch
from tqdm import tqdm

from epo import token_logp_and_entropy
from policy import merged_model, response_states, score_tokens, unusable
from support.forward import check_room, next_logits, precision, read_prompts
from support.replay import Replay, replayable
from support.run_folder import one_line


@dataclass
class Turn:
    """What the policy read and wrote. A response ends with the end token, or was cut."""

    index: int
    prompt: list[int]
    response: list[int]
    logp: list[float]
    entropy: list[float]
    text: str = ""
    action: str | None = None  # what was sent to the world, None if the text held none
    observation: str = ""  # what the policy saw, for transcripts
    invalid: bool = False  # there was no action, or the world did not know it


@dataclass
class Episode:
    task: tuple
    turns: list[Turn] = field(default_factory=list)
    success: bool = False
    score: int = 0  # the world's, 0 to 100
    goal: str = ""  # the task in the world's words


@torch.no_grad()
def generate(policy, prompts, temperature, max_tokens, generator=None):
    """Sample a response for each prompt (a list of ids), all together; a finished one drops out.

    Equal prompts, with what was sampled after them, are one row of the batch until they differ.
    generator: a torch.Generator on the device. -> a list of (response ids, log-probs, entropies)
    """
    model = policy.model.eval()
    check_room(model, max(map(len, prompts)) + max_tokens)
    responses = [([], [], []) for _ in prompts]
    # the numbers of the unfinished responses, and the row of the batch that each of them reads
    active = list(range(len(prompts)))
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    row_of = {prompt: row for row, prompt in enumerate(distinct)}
    row = torch.tensor([row_of[tuple(prompt)] for prompt in prompts])
    # around the whole loop, so that bfloat16 copies of weights are not made for every token anew
    with precision(model):
        logits, *read = read_prompts(model, distinct, policy.tokens_per_batch)
        replay = None
        if replayable(model, read[0]):
            replay = Replay(model, read, row, max_tokens)
        for length in range(1, max_tokens + 1):
            logits = logits[row].float()
            p = (logits / temperature).softmax(-1)
            token = p.multinomial(1, generator=generator)[:, 0]  # (n,)
            logp, entropy = token_logp_and_entropy(logits, token, temperature)
            token = token.cpu()
            for number, *sampled in zip(active, token.tolist(), logp.tolist(), entropy.tolist()):
                for values, value in zip(responses[number], sampled):
                    values.append(value)
            so_far = [responses[number][0] for number in active]
            unfinished = policy.unfinished(token, so_far)
            if length == max_tokens or not unfinished.any():
                break
            active = [number for number, goes_on in zip(active, unfinished.tolist()) if goes_on]
            if replay:
                # a row for each response, which stays in its place
                row, logits = active, replay.read(active, token[unfinished])
                continue
            old_row, token, row = share_rows(row[unfinished], token[unfinished])
            cache, mask, position = select_rows(read, old_row)
            # the token that was sampled is one more column, of ones
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            read = (cache, mask, position + 1)
            logits = next_logits(model, token.to(model.device), mask, position + 1, cache)
    return responses


def share_rows(row, token):
    """Responses that are equal up to here are one row of the batch.

    row, token (n,): the row that a response has read, and the token that it wrote after it.
    -> the old row of each new one, its token (rows, 1), and the new row of each response (n,)
    """
    pairs, new_row = torch.stack([row, token], 1).unique(dim=0, return_inverse=True)
    return pairs[:, 0], pairs[:, 1:], new_row


def select_rows(read, kept):
    """What was read (cache, mask, position), of the rows `kept` alone and in their order."""
    cache, mask, position = read
    if not torch.equal(kept, torch.arange(len(mask))):
        kept = kept.to(mask.device)
        # a recurrent layer has no other way
        cache.reorder_cache(kept)
        mask, position = mask[kept], position[kept]
    return cache, mask, position


def collect(world, policy, tasks, turn_limit, temperature, max_tokens, generator=None):
    """Play one episode per task, all at once, to its end or the turn limit.

    -> episodes, how many were lost with their simulator and so have no outcome, the seconds of
    each part.
    """
    begin = time.perf_counter()
    now = dict(enumerate(world.reset(tasks)))
    seconds = {"load": time.perf_counter() - begin, "generate": 0.0, "environment": 0.0}
    goals = [start.goal if start else "" for start in now.values()]
    episodes = [Episode(task, goal=goal) for task, goal in zip(tasks, goals)]
    past = [[] for _ in tasks]
    active = [slot for slot in now if now[slot]]
    # a bar, where there is a terminal
    for t in tqdm(range(turn_limit), "turns", leave=False, disable=None):
        if not active:
            break
        begin = time.perf_counter()
        sampling = (temperature, max_tokens, generator)
        turns = write_turns(world, policy, active, past, now, t, *sampling)
        written = time.perf_counter()
        actions = {slot: turn.action for slot, turn in turns.items()}
        after = world.step(actions)
        seconds["generate"] += written - begin
        seconds["environment"] += time.perf_counter() - written
        for slot, turn in turns.items():
            past[slot].append((now[slot], turn.action))
            now[slot] = after[slot]
            if now[slot]:
                turn.invalid = now[slot].invalid
                episodes[slot].turns.append(turn)
                episodes[slot].score = now[slot].score
                episodes[slot].success = now[slot].success
        active = [slot for slot in active if now[slot] and not now[slot].done]
    complete = [episode for slot, episode in enumerate(episodes) if now[slot]]
    return complete, len(episodes) - len(complete), seconds


def write_turns(world, policy, active, past, now, t, temperature, max_tokens, generator):
    """The policy writes turn t of the active episodes -> {slot: Turn}."""
    texts = [policy.prompt(world, past[slot], now[slot]) for slot in active]
    # a chat template has put the special tokens there already
    encode = partial(policy.tokenizer.encode, add_special_tokens=False)
    ids = {text: encode(text) for text in set(texts)}
    prompts = [ids[text] for text in texts]
    samples = generate(policy, prompts, temperature, max_tokens, generator)
    turns = {}
    for slot, prompt, sample in zip(active, prompts, samples, strict=True):
        text = policy.tokenizer.decode(sample[0], skip_special_tokens=True)
        parse = world.parse_compact if policy.compact else world.parse_chat
        action = parse(policy.opening + text)
        before = now[slot]
        seen = "\n".join((before.reply, before.look, before.inventory))
        turns[slot] = Turn(t, prompt, *sample, text, action, seen)
    return turns


def prove(policy):
    """Refuse a model whose samples or scores are not what it says of the same text, read alone.

    Call it before any work. It changes no random state. A shortcut that is wrong is left out.
    """
    model = policy.model
    # an adapter adds nothing at first; meanwhile it is as if it had learnt something
    adapter = {p: p.data for name, p in model.named_parameters() if ".lora_B." in name}
    for p in adapter:
        p.data = torch.full_like(p, 0.02)
    wrong = still = fault(policy)
    if wrong:
        model.shortcuts = model.base_model.shortcuts = False
        still = fault(policy)
    for p, data in adapter.items():
        p.data = data
    if still:
        raise unusable(model.name_or_path, still)
    if wrong:
        print(f"each prompt is read whole: behind a prefix that is read once, {wrong}")


@torch.no_grad()
def fault(policy):
    """What is wrong with a model, in words; None if all is right."""
    model = policy.model
    try:
        # what it takes to be saved, without the numbers
        merged_model(model, "meta")
        with precision(model):
            logits = model(torch.arange(1, 9, device=model.device)[None]).logits
        # so large that a cap shows, and what small ones would hide
        scale = max(1, 5 / logits.float().std().item())
        enlarge = lambda module, read, output: scale * output
        with model.get_output_embeddings().register_forward_hook(enlarge):
            off, limit = differences(policy)
    except Exception as error:
        return f"it raises {type(error).__name__}: {one_line(error)}"
    for when, numbers in off.items():
        nats = numbers.abs().max()
        if not nats <= limit:
            return f"its log-probs {when} are off by {nats:.2g} nats"


def differences(policy):
    """-> by how much log-probs and entropies (2, T) differ from the plain model's, and may"""
    model, sampler = policy.model, copy.copy(policy)
    generator = torch.Generator(model.device).manual_seed(0)
    ids = torch.arange(40) ** 2 + torch.arange(2)[:, None]
    one, other = (ids % len(policy.tokenizer)).tolist()
    # unequal ones and two equal ones; each has 40 tokens with its response
    short = one[:37]
    prompts = [one[:39], one[:36] + other[:2], short, short]
    # the first of them ends at each token; what has no shared prefix is read in two parts
    sampler.unfinished = lambda token, responses: torch.arange(len(token)) > 0
    sampler.tokens_per_batch = 72
    samples = generate(sampler, prompts, 1.0, 3, generator)
    turns = [Turn(0, prompt, *sample) for prompt, sample in zip(prompts, samples)]
    tokens, *sampled = [sum(values, []) for values in zip(*samples)]
    tokens = torch.tensor(tokens, device=model.device)
    states = response_states(model, turns)
    scored = score_tokens(model, states, tokens)
    plain = read_alone(model, turns)
    # beside a row that begins otherwise there is no shared prefix
    beside, _ = generate(policy, [short, other], 1.0, 1, generator)
    off = {
        "as sampled": torch.tensor(sampled) - plain,
        # 3 tokens come before those of that prompt
        "as sampled without a shared prefix": torch.tensor(beside[2]) - plain[1, 3],
        "as scored": torch.stack(scored).cpu() - plain,
    }
    limit = 1e-3
    if model.mixed:
        with model.get_input_embeddings().register_forward_hook(round_otherwise):
            limit += 3 * (read_alone(model, turns) - plain).abs().max()
    return off, limit


def read_alone(model, turns):
    """The plain model's log-probs and entropies of the responses (2, T): no cache, no padding."""
    ids = torch.tensor([turn.prompt + turn.response for turn in turns], device=model.device)
    with precision(model):
        # in training mode a dropout would show
        logits = model.train()(ids, use_cache=False).logits
    model.eval()
    numbers = token_logp_and_entropy(logits[:, :-1], ids[:, 1:])
    numbers = torch.stack(numbers).cpu()
    rows = [numbers[:, n, -len(turn.response) :] for n, turn in enumerate(turns)]
    return torch.cat(rows, 1)


def round_otherwise(module, read, states):
    """Each number is off by up to what bfloat16 tells apart."""
    number = torch.arange(states.numel(), device=states.device)
    noise = number.view(states.shape).sin()
    return states + (2**-7 * noise * states).to(states.dtype)
