"""The rollout loop on the pure-Python world with real (tiny) models: what is sampled is what is scored."""
import math

import pytest
import torch

from envs import Observation, Task, parse_chat
from keyquest import KeyQuest
from rollout import Turn, by_length, collect, generate, load_policy, score, written_states


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny", "keyquest")


def play(policy, n=8, turns=6, temperature=1.0, seed=0):
    world = KeyQuest()
    return collect(world, policy, world.tasks("train")[:n], turns, temperature, 8, torch.Generator().manual_seed(seed))


def scored(policy, turns, temperature=1.0):
    """-> the log-probs (T,), entropies (T,) and turns (T,) of all that was written."""
    hidden, tokens, turn = written_states(policy.model, turns)
    logp, entropy = score(policy.model, hidden, tokens, temperature)
    assert tokens.tolist() == [token for t in turns for token in t.written]
    return logp[:, 0], entropy[:, 0], turn


def difference(rows, values):
    return (torch.tensor([x for row in rows for x in row]) - values).abs().max()


@pytest.mark.parametrize("name,env", [("tiny", "keyquest"), ("tiny", "scienceworld"), ("tiny", "alfworld")])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_sampled_logp_and_entropy_equal_the_recomputed_ones(name, env, temperature):
    policy = load_policy(name, env)
    prompts = [policy.tokenizer.encode(text, add_special_tokens=False) for text in
               ("| You wake up. You see key. You carry nothing. >", "west east | A wall. >", "task find plant did see kitchen : red box >")]
    samples = generate(policy, prompts * 4, temperature, 12, torch.Generator().manual_seed(1))
    turns = [Turn(0, p, *s, "", None, "") for p, s in zip(prompts * 4, samples)]
    logp, entropy, turn = scored(policy, turns, temperature)
    assert difference([t.logp for t in turns], logp) < 1e-4
    assert difference([t.entropy for t in turns], entropy) < 1e-4
    assert turn.bincount().tolist() == [len(t.written) for t in turns]


def test_a_turns_score_does_not_depend_on_its_batch(policy):
    """Padding invariance: alone, or beside turns with longer prompts and longer texts."""
    episodes, _, _ = play(policy)
    turns = sorted((t for e in episodes for t in e.turns), key=lambda t: len(t.prompt))
    short, long = turns[0], turns[-1]
    long = Turn(0, long.prompt * 3, long.written * 2, [], [], "", None, "")
    alone, entropy_alone, _ = scored(policy, [short])
    both, entropy_both, _ = scored(policy, [short, long])
    n = len(short.written)
    torch.testing.assert_close(both[:n], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy_both[:n], entropy_alone, atol=1e-5, rtol=0)


def test_micro_batches_keep_to_their_budget_and_lose_no_turn():
    turns = [Turn(0, [1] * p, [1] * w, [], [], "", None, "") for p, w in ((9, 1), (2, 1), (30, 5), (2, 8), (9, 1), (3, 1))]
    parts = by_length(turns, [0, 1, 2, 3, 4], 20)
    assert sorted(i for part in parts for i in part) == [0, 1, 2, 3, 4] and [2] in parts
    assert all(len(part) * (max(len(turns[i].prompt) for i in part) + max(len(turns[i].written) for i in part)) <= 20 for part in parts if part != [2])
    assert len(parts) == 4 and len(by_length(turns, range(6), 10 ** 9)) == 1


def test_the_end_token_is_written_scored_and_last(policy):
    episodes, _, _ = play(policy)
    turns = [t for e in episodes for t in e.turns]
    ended = [t for t in turns if t.written[-1] in policy.end]
    assert len(ended) > 0.9 * len(turns)
    assert all(token not in policy.end for t in turns for token in t.written[:-1])
    assert all(len(t.written) == len(t.logp) == len(t.entropy) for t in turns)


def test_the_length_limit_cuts_a_turn(policy):
    prompt = policy.tokenizer.encode("| You wake up. >", add_special_tokens=False)
    assert {len(written) for written, _, _ in generate(policy, [prompt] * 16, 1.0, 1, torch.Generator().manual_seed(0))} == {1}


def test_sampling_uses_the_whole_softmax_whatever_the_generation_config_says(policy):
    """A model's own top_k = 1 must not leak in: frequencies of the first token match softmax(logits / T) within 4.5 sigma."""
    policy.model.generation_config.top_k, policy.model.generation_config.repetition_penalty = 1, 5.0
    prompt, n, temperature = policy.tokenizer.encode("| You wake up. You see nothing. You carry nothing. >", add_special_tokens=False), 4000, 1.7
    counts = torch.zeros(len(policy.tokenizer))
    for written, _, _ in generate(policy, [prompt] * n, temperature, 1, torch.Generator().manual_seed(3)):
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
    assert [e.task for e in episodes] == tasks and lost == 0 and set(seconds) == {"load", "generate", "environment"}
    first = [e.turns[0].observation for e in episodes]
    assert len(set(first[:3])) == 1


def test_the_turn_limit_counts_agent_turns_and_finished_episodes_stop(policy):
    episodes, _, _ = play(policy, n=40, turns=25)
    assert all(len(e.turns) == 25 for e in episodes if not e.success)
    assert any(e.success for e in episodes) and all(len(e.turns) <= 25 for e in episodes)
    assert [t.index for t in episodes[0].turns] == list(range(len(episodes[0].turns)))


def test_keyquest_is_solved_by_its_solution_and_rewards_nothing_before():
    world = KeyQuest()
    lengths = []
    for split in ("train", "iid", "ood"):
        for task in world.tasks(split)[::10]:
            plan, now = world.gold(task), world.reset([task])[0]
            for action in plan:
                assert not now.success and now.score == 0
                now = world.step({0: action})[0]
            assert now.success and now.done
            lengths.append(len(plan))
    assert min(lengths) >= 4 and max(lengths) >= 10


def test_text_without_an_action_costs_a_turn_and_says_so():
    world = KeyQuest()
    now = world.reset([Task("short", 0)])[0]
    assert not now.invalid
    now = world.step({0: None})[0]
    assert now.invalid and "not a valid action" in now.reply


def test_parse_chat_takes_the_last_action_and_needs_one():
    assert parse_chat("<think>go?</think><action>Go to  Kitchen</action>") == "go to kitchen"
    assert parse_chat("<action>a</action> or <action>b\n</action>") == "b"
    assert parse_chat("go to kitchen") is None
    assert parse_chat("<action> </action>") is None


def test_the_chat_prompt_shows_the_last_two_turns_only():
    world, see = KeyQuest(), lambda text: Observation("goal", text, "look", "inventory", ("key", "door"))
    prompt = world.chat([(see("first"), "one"), (see("second"), "two"), (see("third"), None)], see("now"))
    assert "first" not in prompt and "second" in prompt and "two" in prompt and "none that was valid" in prompt
    assert "Turns taken so far: 3" in prompt and "key, door" in prompt and "<action>" in prompt
    assert prompt.index(world.chat_rules) == 0, "the static part comes first, so that its cache can be shared"


def test_entropy_of_a_sampled_token_is_not_its_surprisal(policy):
    episodes, _, _ = play(policy)
    turns = [t for e in episodes for t in e.turns]
    assert any(abs(h + lp) > 0.1 for t in turns for h, lp in zip(t.entropy, t.logp))
    assert all(0 <= h <= math.log(len(policy.tokenizer)) + 1e-5 for t in turns for h in t.entropy)
