"""The rollout loop on the pure-Python world with real (tiny) models: what is sampled is scored."""

import copy
import math
from functools import partial

import pytest
import torch

from envs import Task
from policy import load_policy, response_states, score_tokens
from rollout import Turn, collect, generate
from support.forward import micro_batches
from worlds.keyquest import KeyQuest

close = partial(torch.testing.assert_close, rtol=0)


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny", "keyquest")


def play(policy, n=8, turns=6, max_tokens=8, seed=0):
    """n episodes of KeyQuest."""
    world = KeyQuest()
    tasks = world.tasks("train")[:n]
    generator = torch.Generator().manual_seed(seed)
    return collect(world, policy, tasks, turns, 1.0, max_tokens, generator)[0]


def turns_of(episodes):
    return [turn for episode in episodes for turn in episode.turns]


def scored(policy, turns, temperature=1.0):
    """-> the log-probs (T,) and entropies (T,) of all response tokens."""
    tokens = sum([turn.response for turn in turns], [])
    states = response_states(policy.model, turns)
    return score_tokens(policy.model, states, torch.tensor(tokens), temperature)


def check_sampled_is_scored(policy, prompts, temperature):
    """What is recorded while sampling is what training computes of the same tokens."""
    generator = torch.Generator().manual_seed(1)
    samples = generate(policy, prompts, temperature, 12, generator)
    turns = [Turn(0, prompt, *sample) for prompt, sample in zip(prompts, samples)]
    logp, entropy = scored(policy, turns, temperature)
    _, sampled_logp, sampled_entropy = zip(*samples)
    close(torch.tensor(sum(sampled_logp, [])), logp, atol=1e-4)
    close(torch.tensor(sum(sampled_entropy, [])), entropy, atol=1e-4)
    # entropy is that of the distribution, not the surprisal of the token
    assert (entropy + logp).abs().max() > 0.1
    of_uniform = math.log(len(policy.tokenizer))
    assert -1e-5 < entropy.min() < entropy.max() < of_uniform


@pytest.mark.parametrize("env", ["keyquest", "scienceworld", "alfworld"])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("tokens_per_batch", [16384, 12])
def test_sampled_logp_and_entropy_equal_the_recomputed_ones(env, temperature, tokens_per_batch):
    policy = load_policy("tiny", env)
    policy.tokens_per_batch = tokens_per_batch
    texts = (
        "| You wake up. You see key. You carry nothing. >",
        "west east | A wall. >",
        "task find plant did see kitchen : red box >",
    )
    prompts = [policy.tokenizer.encode(text) for text in texts]
    check_sampled_is_scored(policy, prompts * 4, temperature)


def test_a_turns_score_and_gradient_do_not_depend_on_its_batch(policy, monkeypatch):
    """Padding invariance; and equal turns share one forward pass, with the gradient of all."""
    turns = turns_of(play(policy))
    first = turns[0]
    turns.append(Turn(0, first.prompt * 3, first.response * 2, [], []))
    distinct = {(*turn.prompt, *turn.response) for turn in turns}
    assert len(distinct) < 0.8 * len(turns)
    policy = copy.copy(policy)
    policy.model = copy.deepcopy(policy.model).double()
    each_alone = [scores_and_gradient(policy, [turn]) for turn in turns]
    values, gradients = zip(*each_alone)
    rows, read = [], policy.model.base_model.forward
    count = lambda input_ids, **more: rows.append(len(input_ids)) or read(input_ids, **more)
    monkeypatch.setattr(policy.model.base_model, "forward", count)
    together, gradient = scores_and_gradient(policy, turns)
    assert rows == [len(distinct)]
    close(together, torch.cat(values, 1), atol=1e-10)
    largest = gradient.abs().max().item()
    close(gradient, sum(gradients), atol=1e-6 * largest)


def scores_and_gradient(policy, turns):
    """Log-probs and entropies of the response tokens (2, T), and the gradient of their sum."""
    scores = torch.stack(scored(policy, turns))
    parameters = list(policy.model.parameters())
    gradients = torch.autograd.grad(scores.sum(), parameters)
    return scores.detach(), torch.cat([x.flatten() for x in gradients])


@pytest.mark.parametrize(
    "texts, budget, parts",
    [
        # by length, and as many as fit with their padding; a turn that is too long is alone
        ("aaaa b cccccccccc dddd eeee", 8, [[1, 0], [3, 4], [2]]),
        ("aaaa b cccccccccc dddd eeee", 999, [[1, 0, 3, 4, 2]]),
        # equal turns are read once, so they count once
        ("aaaa bbbb aaaa bbbb aaaa", 8, [[0, 2, 4, 1, 3]]),
        ("aaaa bbbb aaaa bbbb aaaa", 7, [[0, 2, 4], [1, 3]]),
    ],
)
def test_micro_batches_keep_to_their_budget_and_lose_no_turn(texts, budget, parts):
    """A letter is a token, of which the first is the prompt."""
    turns = []
    for text in texts.split():
        first, *rest = text
        turns.append(Turn(0, [first], rest, [], []))
    assert micro_batches(turns, range(5), budget) == parts


def test_turns_and_episodes_end_where_they_should(policy):
    """The end token is written, scored and last; the turn limit counts the agent's turns."""
    episodes = play(policy, n=40, turns=25)
    turns = turns_of(episodes)
    ended = [turn.response[-1] in policy.end for turn in turns]
    assert sum(ended) > 0.9 * len(ended)
    before_the_last = sum([turn.response[:-1] for turn in turns], [])
    assert not set(before_the_last) & set(policy.end)
    # the length limit cuts a turn
    cut = turns_of(play(policy, max_tokens=1))
    assert {len(turn.response) for turn in cut} == {1}
    assert {len(episode.turns) for episode in episodes if not episode.success} == {25}
    # a finished episode stops
    assert min(len(episode.turns) for episode in episodes if episode.success) < 25
    for episode in episodes:
        indices = [turn.index for turn in episode.turns]
        assert indices == list(range(len(indices)))


def test_sampling_uses_the_whole_softmax_whatever_the_generation_config_says(policy):
    """A model's own top_k = 1 must not leak in: frequencies are within 4.5 sigma."""
    policy.model.generation_config.top_k = 1
    prompt = policy.tokenizer.encode("| You wake up. You see nothing. You carry nothing. >")
    n, generator = 4000, torch.Generator().manual_seed(3)
    samples = generate(policy, [prompt] * n, 1.7, 1, generator)
    written = torch.tensor([token for (token,), _, _ in samples])
    counts = torch.bincount(written, minlength=len(policy.tokenizer))
    assert (counts > 0).sum() > 5
    logits = policy.model(torch.tensor([prompt])).logits[0, -1]
    p = (logits / 1.7).softmax(-1)
    sigma = (n * p * (1 - p)).sqrt()
    off = (counts - n * p).abs()
    assert (off <= 4.5 * sigma + 1).all()


def test_sampling_is_fixed_by_its_seed(policy):
    texts = lambda seed: [turn.text for turn in turns_of(play(policy, seed=seed))]
    assert texts(5) == texts(5) != texts(6)


def test_episodes_of_a_group_share_their_task_and_order_is_kept(policy):
    tasks = [Task("long", 3)] * 3 + [Task("short", 9)] * 3
    world = KeyQuest()
    episodes, lost, seconds = collect(world, policy, tasks, 2, 1.0, 8)
    assert [episode.task for episode in episodes] == tasks
    assert lost == 0
    assert seconds.keys() == {"load", "generate", "environment"}
    rooms_of_chests = [world.games[slot]["chest"] for slot in range(6)]
    assert rooms_of_chests == [5, 5, 5, 1, 1, 1]
