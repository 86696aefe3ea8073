"""The rollout loop on the pure-Python world with real (tiny) models: what is sampled is what is
scored."""

import copy
import math

import pytest
import torch

from envs import Task
from rollout import Turn, collect, generate, micro_batches, response_states, score_tokens
from support.loading import load_policy
from worlds.keyquest import KeyQuest


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny", "keyquest")


def play(policy, n=8, turns=6, temperature=1.0, seed=0):
    world = KeyQuest()
    return collect(
        world,
        policy,
        world.tasks("train")[:n],
        turns,
        temperature,
        8,
        torch.Generator().manual_seed(seed),
    )


def scored(policy, turns, temperature=1.0):
    """-> the log-probs (T,) and entropies (T,) of all response tokens."""
    tokens = torch.tensor([token for t in turns for token in t.response])
    return score_tokens(policy.model, response_states(policy.model, turns), tokens, temperature)


def difference(rows, values):
    return (torch.tensor([x for row in rows for x in row]) - values).abs().max()


@pytest.mark.parametrize(
    "name,env", [("tiny", "keyquest"), ("tiny", "scienceworld"), ("tiny", "alfworld")]
)
@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("tokens_per_batch", [16384, 12])
def test_sampled_logp_and_entropy_equal_the_recomputed_ones(
    name, env, temperature, tokens_per_batch
):
    policy = load_policy(name, env)
    policy.tokens_per_batch = tokens_per_batch
    prompts = [
        policy.tokenizer.encode(text, add_special_tokens=False)
        for text in (
            "| You wake up. You see key. You carry nothing. >",
            "west east | A wall. >",
            "task find plant did see kitchen : red box >",
        )
    ]
    samples = generate(policy, prompts * 4, temperature, 12, torch.Generator().manual_seed(1))
    turns = [Turn(0, p, *s) for p, s in zip(prompts * 4, samples)]
    logp, entropy = scored(policy, turns, temperature)
    assert difference([t.logp for t in turns], logp) < 1e-4
    assert difference([t.entropy for t in turns], entropy) < 1e-4


def test_a_turns_score_does_not_depend_on_its_batch(policy):
    """Padding invariance: alone, or beside turns with longer prompts and longer texts."""
    episodes, _, _ = play(policy)
    turns = sorted((t for e in episodes for t in e.turns), key=lambda t: len(t.prompt))
    short, long = turns[0], turns[-1]
    long = Turn(0, long.prompt * 3, long.response * 2, [], [])
    alone, entropy_alone = scored(policy, [short])
    both, entropy_both = scored(policy, [short, long])
    n = len(short.response)
    torch.testing.assert_close(both[:n], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy_both[:n], entropy_alone, atol=1e-5, rtol=0)


def test_equal_turns_are_computed_once_with_the_gradient_of_all(policy):
    """Equal (prompt, response) rows share one forward pass; their gradients add up."""
    episodes, _, _ = play(policy)
    turns = [t for e in episodes for t in e.turns]
    distinct = {(tuple(t.prompt), tuple(t.response)) for t in turns}
    assert len(distinct) < 0.8 * len(turns)
    policy = copy.copy(policy)
    policy.model = copy.deepcopy(policy.model).double()
    factors = torch.randn(sum(len(t.response) for t in turns), dtype=torch.float64)
    rows, read = [], policy.model.base_model.forward
    with pytest.MonkeyPatch.context() as patch:
        count = lambda input_ids, **more: rows.append(len(input_ids)) or read(input_ids, **more)
        patch.setattr(policy.model.base_model, "forward", count)
        together = gradient(policy, turns, factors)
    assert rows == [len(distinct)]
    lengths = [len(t.response) for t in turns]
    alone = sum(gradient(policy, [t], f) for t, f in zip(turns, factors.split(lengths)))
    assert (together - alone).abs().max() < 1e-6 * alone.abs().max()


def gradient(policy, turns, factors):
    """Of the sum of log-probs and entropies of the response tokens, each times its factor."""
    policy.model.zero_grad()
    logp, entropy = scored(policy, turns)
    ((logp + 0.5 * entropy) * factors).sum().backward()
    taken = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.model.zero_grad()
    return taken


def test_micro_batches_keep_to_their_budget_and_lose_no_turn():
    sizes = ((9, 1), (2, 1), (30, 5), (2, 8), (9, 1), (3, 1))
    turns = [Turn(0, [i] * p, [1] * w, [], []) for i, (p, w) in enumerate(sizes)]
    parts = micro_batches(turns, [0, 1, 2, 3, 4], 20)
    assert sorted(i for part in parts for i in part) == [0, 1, 2, 3, 4] and [2] in parts
    for part in parts:
        widest = max(sum(sizes[i]) for i in part)
        assert part == [2] or len(part) * widest <= 20
    assert len(parts) == 3 and len(micro_batches(turns, range(6), 10**9)) == 1


def test_equal_turns_share_a_micro_batch_and_count_once():
    turns = [Turn(0, [1] * 9, [i % 2], [], []) for i in range(50)]
    assert micro_batches(turns, range(50), 20) == [[*range(0, 50, 2), *range(1, 50, 2)]]
    assert micro_batches(turns, range(50), 19) == [[*range(0, 50, 2)], [*range(1, 50, 2)]]


def test_the_end_token_is_written_scored_and_last(policy):
    episodes, _, _ = play(policy)
    turns = [t for e in episodes for t in e.turns]
    ended = [t for t in turns if t.response[-1] in policy.end]
    assert len(ended) > 0.9 * len(turns)
    assert all(token not in policy.end for t in turns for token in t.response[:-1])
    assert all(len(t.response) == len(t.logp) == len(t.entropy) for t in turns)


def test_the_length_limit_cuts_a_turn(policy):
    prompt = policy.tokenizer.encode("| You wake up. >", add_special_tokens=False)
    assert {
        len(written)
        for written, _, _ in generate(
            policy, [prompt] * 16, 1.0, 1, torch.Generator().manual_seed(0)
        )
    } == {1}


def test_sampling_uses_the_whole_softmax_whatever_the_generation_config_says(policy):
    """A model's own top_k = 1 must not leak in: frequencies of the first token match
    softmax(logits / T) within 4.5 sigma."""
    policy.model.generation_config.top_k, policy.model.generation_config.repetition_penalty = 1, 5.0
    prompt, n, temperature = (
        policy.tokenizer.encode(
            "| You wake up. You see nothing. You carry nothing. >", add_special_tokens=False
        ),
        4000,
        1.7,
    )
    counts = torch.zeros(len(policy.tokenizer))
    for written, _, _ in generate(
        policy, [prompt] * n, temperature, 1, torch.Generator().manual_seed(3)
    ):
        counts[written[0]] += 1
    p = (policy.model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    sigma = (n * p * (1 - p)).sqrt()
    assert (counts > 0).sum() > 5
    assert ((counts - n * p).abs() <= 4.5 * sigma + 1).all()


def test_sampling_is_fixed_by_its_seed(policy):
    texts = lambda seed: [t.text for e in play(policy, seed=seed)[0] for t in e.turns]
    assert texts(5) == texts(5) != texts(6)


def test_episodes_of_a_group_share_their_task_and_order_is_kept(policy):
    world, tasks = KeyQuest(), [Task("long", 3)] * 3 + [Task("short", 9)] * 3
    episodes, lost, seconds = collect(world, policy, tasks, 2, 1.0, 8)
    assert (
        [e.task for e in episodes] == tasks
        and lost == 0
        and set(seconds) == {"load", "generate", "environment"}
    )
    first = [e.turns[0].observation for e in episodes]
    assert len(set(first[:3])) == 1


def test_the_turn_limit_counts_agent_turns_and_finished_episodes_stop(policy):
    episodes, _, _ = play(policy, n=40, turns=25)
    assert all(len(e.turns) == 25 for e in episodes if not e.success)
    assert any(e.success for e in episodes) and all(len(e.turns) <= 25 for e in episodes)
    assert [t.index for t in episodes[0].turns] == list(range(len(episodes[0].turns)))


def test_entropy_of_a_sampled_token_is_not_its_surprisal(policy):
    episodes, _, _ = play(policy)
    turns = [t for e in episodes for t in e.turns]
    assert any(abs(h + lp) > 0.1 for t in turns for h, lp in zip(t.entropy, t.logp))
    assert all(0 <= h <= math.log(len(policy.tokenizer)) + 1e-5 for t in turns for h in t.entropy)
