"""The loop: advantages and metrics by hand, one gradient for any split, what a run logs."""

import copy
import math
import re
from dataclasses import replace

import pytest
import torch
from pytest import approx
from test_faults import ROOT, SMALL, call, log_of

import train
import update
from config import Config
from critic import Critic, explained_variance, ppo_advantages, update_critic, value_loss
from envs import Task
from epo import epo_loss, group_advantages, token_logp_and_entropy
from metrics import episode_metrics, token_metrics
from policy import load_policy
from rollout import Episode, Turn, collect
from support import report
from worlds.keyquest import KeyQuest

RUN = [*SMALL, "--turns", "8", "--tasks-per-step", "4", "--group-size", "4"]


def run(out, *flags):
    """train.py in this process, with more flags than RUN"""
    status, _, error = call(train, *RUN, *flags, "--out", out)
    assert status == 0, error


def x(*values):
    return torch.tensor(values)


def all_turns(episodes):
    """-> the turns, and the episode of each (N,)"""
    turns, owner = [], []
    for i, episode in enumerate(episodes):
        turns += episode.turns
        owner += [i] * len(episode.turns)
    return turns, torch.tensor(owner)


def played(lengths, invalid, wins=()):
    """A group of episodes by their numbers of turns and of invalid turns."""
    group = []
    for i, (length, bad) in enumerate(zip(lengths, invalid, strict=True)):
        episode = Episode(Task("find-plant", 0), success=i in wins)
        for t in range(length):
            turn = Turn(t, [1], [2], [-1.0], [0.5], invalid=t < bad)
            episode.turns.append(turn)
        group.append(episode)
    return group


def advantages_of_turns(episodes, cfg):
    """GRPO's advantages as rl_step makes them -> a list for each episode."""
    turns, owner = all_turns(episodes)
    returns = train.episode_returns(episodes, cfg)
    of_episodes = train.grpo_advantages(episodes, returns)
    advantages = of_episodes[owner] - train.invalid_penalties(turns, cfg)
    return [advantages[owner == i].tolist() for i in range(len(episodes))]


def test_an_episode_that_dies_early_never_beats_its_group_for_being_short():
    """Seven play 12 turns, 7 to 12 of them invalid; the eighth dies in its first turn.

    Normalised with the return, as the paper has it, the penalty would give the eighth +2.24.
    """
    lengths = [12] * 7 + [1]
    invalid = [10, 8, 12, 9, 10, 11, 7, 0]
    penalties = 0.01 * torch.tensor(invalid).double()
    normalised = group_advantages(-penalties, torch.zeros(8))
    assert normalised[7].item() == approx(2.24, abs=0.01)
    all_lose = played(lengths, invalid)
    lost = advantages_of_turns(all_lose, Config())
    for of_episode, bad in zip(lost, invalid, strict=True):
        good = len(of_episode) - bad
        assert of_episode == approx([-0.01] * bad + [0.0] * good)
    # beside a winner it has the advantage of all who fail, and the penalty is as small as before
    one_wins = played(lengths, invalid, wins=(0,))
    won = advantages_of_turns(one_wins, Config())
    mean, std = 1 / 8, 8**-0.5
    failure = (0 - mean) / (std + 1e-6)
    assert won[7] == approx([failure], abs=1e-6)
    assert won[2] == approx([failure - 0.01] * 12, abs=1e-6)
    assert won[0][-1] == approx(7 * -failure, abs=1e-5)


def test_a_group_is_of_one_variation_not_of_one_type():
    episodes = [Episode(Task("short", variation)) for variation in (1, 1, 2, 2)]
    # no member of a group did better than another
    returns = x(1.0, 1.0, 0.0, 0.0).double()
    assert not train.grpo_advantages(episodes, returns).any()


def test_returns_by_hand():
    """1 for success; with `--reward score` the points, of which a wrong focus leaves none."""
    episodes = played([12, 3, 1], [0, 0, 0], wins=(1,))
    for episode, score in zip(episodes, (50, 100, -100), strict=True):
        episode.score = score
    assert episode_metrics(episodes, turn_limit=12)["failed_early"] == 1 / 3
    by_success = train.episode_returns(episodes, Config())
    assert by_success.tolist() == [0, 1, 0]
    by_score = train.episode_returns(episodes, Config(reward="score"))
    assert by_score.tolist() == [0.5, 1, 0]


def test_ppo_normalises_with_the_weights_of_eq_2():
    """Raw advantages 0 in one turn and 1 in three: an episode counts once, however long it is."""
    values = x(0.0, -1.0, -1.0, -1.0)
    owner, returns = x(0, 1, 1, 1), x(0.0, 0.0)
    advantages, targets = ppo_advantages(values, returns, owner, Config())
    # the mean is 1/2 and so is the standard deviation; by turns the mean would be 3/4
    assert advantages.tolist() == approx([-1, 1, 1, 1], abs=1e-5)
    assert not targets.any()
    # the reward is at the last turn alone: what each turn is to predict is the return, γ = λ = 1
    values = x(0.5, 0.25, 0.75, 0.5, 0.0)
    owner, returns = x(0, 0, 1, 1, 1), x(1.0, 0.0)
    _, targets = ppo_advantages(values, returns, owner, Config())
    assert targets.tolist() == approx([1, 1, 0, 0, 0])
    # or the next value, halved, γ = 1/2 and λ = 0
    cfg = Config(discount=0.5, gae_lambda=0.0)
    _, targets = ppo_advantages(values, returns, owner, cfg)
    assert targets.tolist() == approx([0.125, 1, 0.25, 0, 0])


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_an_invalid_turn_of_a_step_has_a_lower_advantage(algo, tmp_path, monkeypatch):
    """All that differs between the turns of a new PPO policy's episode, or of any of GRPO's."""
    made = []
    keep = lambda *given: made.append(given) or update.make_batch(*given)
    monkeypatch.setattr(train, "make_batch", keep)
    run(tmp_path / "run", "--algo", algo, "--temperature", 3, "--steps", 1)
    ((turns, owner, advantages, _),) = made
    invalid = torch.tensor([turn.invalid for turn in turns])
    assert 0 < invalid.sum() < len(turns)
    without = advantages + 0.01 * invalid
    for i in owner.unique():
        of_episode = without[owner == i]
        assert (of_episode - of_episode[0]).abs().max() < 1e-6


def batch_of(**given):
    """A batch of tokens by the names of its tensors; one that is not given is zero."""
    zeros = torch.zeros(len(given["weights"]))
    names = update.Batch.__annotations__
    return update.Batch(**dict.fromkeys(names, zeros) | given)


def test_shares_of_tokens_by_hand():
    """Old log-prob 0; ratios of 1, 1.5 and 0.5; the corridor is from 0.25 to 1 nats."""
    batch = batch_of(weights=x(0.5, 0.3, 0.2))
    logp = x(1.0, 1.5, 0.5).log()
    entropy = x(0.1, 1.5, 0.5)
    cfg = Config(kappa_l=0.5, kappa_r=2.0)
    _, terms = update.batch_loss(logp, entropy, batch, None, 0.5, 1.5, cfg)
    assert terms["below"] == approx(0.5)
    assert terms["above"] == approx(0.3)
    assert terms["clip_fraction"] == approx(0.3 + 0.2)


def test_variants_by_hand():
    """Two episodes of one turn each, and one token: index 0 twice, though the turns are 0 and 1.

    EPO-Decay at turn 0 of 2: 1.5 times the entropy. EA, at a ratio of 1: 1 + min(H / 4, 1 / 2).
    """
    numbers = dict(turn=x(0, 1), episode=x(0, 1), index=x(0, 0))
    batch = batch_of(**numbers, advantages=x(1.0, 1.0), weights=x(0.5, 0.5))
    logp, entropy = x(0.0, 0.0), x(1.0, 3.0)
    cfg = Config(turns=2, smoothing="off")
    given = (logp, entropy, batch, None, None, 2.0)
    terms = lambda **more: update.batch_loss(*given, replace(cfg, **more))[1]
    assert terms()["entropy_loss"] == approx(2.0)
    assert terms(entropy_decay=0.5)["entropy_loss"] == approx(1.5 * 2.0)
    assert terms()["policy_loss"] == approx(-1.0)
    assert terms(shaping=0.25)["policy_loss"] == approx(-(1.25 + 1.5) / 2)


def test_entropies_of_first_tokens_and_of_the_rest_are_weighted():
    """Two episodes: one turn of two tokens; two turns of one token, and of three."""
    turn = x(0, 0, 1, 2, 2, 2)
    entropy = x(1.0, 0.0, 1.0, 1.0, 0.0, 20.0)
    weights = x(3, 3, 3, 1, 1, 1) / 12
    batch = batch_of(turn=turn, entropy=entropy, weights=weights)
    row = token_metrics(batch, cap=0.5)
    assert (row["first_entropy"], row["first_above"]) == approx((1.0, 1.0))
    assert (row["rest_entropy"], row["rest_above"]) == approx((20 / 5, 1 / 5))
    # responses of one token have no rest
    single = replace(batch, turn=torch.arange(6))
    row = token_metrics(single, cap=math.inf)
    assert row["first_above"] == 0
    assert row["rest_entropy"] is None and row["rest_above"] is None


@pytest.fixture(scope="module")
def batch():
    policy, world = load_policy("tiny", "keyquest"), KeyQuest()
    tasks = world.tasks("train")[:8]
    generator = torch.Generator().manual_seed(0)
    episodes, _, _ = collect(world, policy, tasks, 7, 1.0, 8, generator)
    _, owner = all_turns(episodes)
    of_episodes = torch.randn(8, generator=generator)
    return policy, episodes, of_episodes[owner]


def move(model):
    """As if it had learnt something."""
    for p in model.parameters():
        generator = torch.Generator().manual_seed(p.numel())
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.data += 0.01 * noise


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


TERMS = dict(kl_coef=0.3, entropy_coef=0.5, kappa_l=0.5, kappa_r=1.2, alpha=1.0)


def gradient(batch, **options):
    """The gradients that `update` hands to the optimizer, and its log."""
    policy, episodes, advantages = batch
    model, taken = copy.deepcopy(policy.model).double(), []
    reference = copy.deepcopy(model).requires_grad_(False)
    policy = replace(policy, model=model, reference=reference)
    move(model)

    class Record:
        def step(self):
            taken.append(gradient_of(model))

        def zero_grad(self):
            model.zero_grad()

    cfg = Config(**dict(minibatches=1, grad_clip=1e9) | TERMS | options)
    torch.manual_seed(0)
    learner = update.Learner(policy, Record(), None, None, [])
    turns, owner = all_turns(episodes)
    tokens = update.make_batch(turns, owner, advantages, cfg)
    log = update.update(learner, turns, tokens, 0.4, 1.5, cfg)
    return taken, log


def near(a, b):
    error = (a - b).abs().max()
    return error < 1e-5 * b.abs().max()


# tokens of a forward pass, and logits at once: of 1, 3 and 5 tokens, for a vocabulary of 27
@pytest.mark.parametrize("size, at_once", [(1, 2**25), (50, 27), (300, 100), (10**6, 27 * 5)])
def test_gradient_is_the_same_for_any_micro_batch_size(size, at_once, batch, monkeypatch):
    """The loss is divided by the whole batch's weights, so memory settings can't change it."""
    (whole,), log = gradient(batch, tokens_per_batch=10**6)
    assert whole.abs().max() > 1e-3
    monkeypatch.setattr(update, "LOGITS_AT_ONCE", at_once)
    (split,), other = gradient(batch, tokens_per_batch=size)
    assert near(split, whole)
    assert other == approx(log, abs=1e-5)


def test_gradient_is_that_of_the_direct_formula(batch):
    """`update` goes through the output matrix a few tokens at a time; here all logits of all
    tokens, one turn after another."""
    (taken,), log = gradient(batch)
    policy, episodes, advantages = batch
    model = copy.deepcopy(policy.model).double()
    start = copy.deepcopy(model)
    move(model)
    loss, number = 0.0, 0
    for e in episodes:
        for t in e.turns:
            ids, n = torch.tensor([t.prompt + t.response]), len(t.response)
            logits = model(ids).logits[0, -n - 1 : -1]
            reference_logits = start(ids).logits[0, -n - 1 : -1].detach()
            tokens = torch.tensor(t.response)
            weight = 1 / (n * len(e.turns) * len(episodes))
            logp, entropy = token_logp_and_entropy(logits, tokens)
            reference_logp, _ = token_logp_and_entropy(reference_logits, tokens)
            part, _ = epo_loss(
                logp=logp,
                old_logp=torch.tensor(t.logp),
                entropy=entropy,
                advantages=advantages[number],
                weights=torch.full((n,), weight, dtype=torch.float64),
                history_mean=0.4,
                beta_k=1.5,
                reference_logp=reference_logp,
                **TERMS,
            )
            loss = loss + part
            number += 1
    loss.backward()
    assert near(taken, gradient_of(model))
    assert loss.item() == approx(log["loss"], abs=1e-6)


def test_the_gradient_is_clipped(batch):
    (clipped,), log = gradient(batch, grad_clip=0.01)
    assert log["grad_norm"] > 0.02
    assert clipped.norm().item() == approx(0.01, rel=1e-3)


def test_mini_batches_are_an_unbiased_split_of_the_batch(batch):
    """Without a step in between, the mean of the mini-batches' gradients is the gradient of the
    batch (Eq. 2's weights)."""
    (whole,), log = gradient(batch)
    parts, other = gradient(batch, minibatches=4)
    assert len(parts) == 4
    assert near(sum(parts) / 4, whole)
    assert other["loss"] == approx(log["loss"], abs=1e-5)


def test_critic_reads_the_last_prompt_token_and_learns_the_same_for_any_micro_batch(batch):
    policy, episodes, _ = batch
    turns, _ = all_turns(episodes)
    lengths = torch.tensor([len(turn.prompt) for turn in turns])
    targets = (lengths % 3).float()
    heads = []
    for size in (10**6, 60):
        torch.manual_seed(0)
        critic = Critic(policy.model)
        # before it has learnt anything
        old = critic.values(turns, 5)
        assert not old.any()
        optimizer = torch.optim.SGD(critic.trained().values(), lr=0.01)
        cfg = Config(critic_minibatches=2, tokens_per_batch=size)
        update_critic(critic, optimizer, turns, old, targets, cfg)
        heads.append(critic.head.weight.detach().clone())
    assert heads[0].abs().max() > 1e-3
    assert torch.allclose(*heads, atol=1e-6)
    torch.nn.init.normal_(critic.head.weight)
    whole = critic.values(turns, 10**6)
    assert whole.std() > 0.1
    assert torch.allclose(critic.values(turns, 1), whole, atol=1e-5)
    prompt = torch.tensor([turns[3].prompt])
    last = critic.body(prompt).last_hidden_state[0, -1]
    assert torch.allclose(critic.head(last), whole[3], atol=1e-5)


def test_value_loss_and_explained_variance_by_hand():
    """Old 0, clip 0.5. Value 1 is held at 0.5: towards a target of 2 the held error counts, away
    from one of -1 the free one."""
    loss = lambda value, target: value_loss(x(value), x(0.0), x(target), 0.5).item()
    assert loss(1.0, 2.0) == approx(0.5 * 1.5**2)
    assert loss(1.0, -1.0) == approx(0.5 * 2**2)
    assert loss(0.25, 1.0) == approx(0.5 * 0.75**2)
    targets = x(1.0, 2.0, 3.0)
    constant = x(5.0, 5.0, 5.0)
    assert explained_variance(targets, targets) == 1
    assert explained_variance(constant, targets) == 0
    assert explained_variance(targets, constant) == 0


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_indicator_equals_base_in_every_weight_and_the_hinge_does_not(algo, tmp_path):
    """v1's smoothing after 3 steps on KeyQuest: bit for bit the weights of a run without
    smoothing. Under PPO too: the published launcher passed its smoothing flags for GRPO only."""
    weights = {}
    for form in ("off", "indicator", "hinge"):
        flags = ["--algo", algo, "--entropy-coef", 0.01, "--smoothing", form]
        if form != "off":
            flags += ["--kappa-r", 1, "--alpha", 1]
        out = tmp_path / form
        run(out, *flags)
        weights[form] = torch.load(out / "checkpoint.pt")["model"]
    off, indicator, hinge = weights.values()
    equal = lambda other: all(torch.equal(other[name], off[name]) for name in off)
    assert equal(indicator)
    assert not equal(hinge)


def test_window_and_constant_weight(tmp_path):
    run(tmp_path / "run", "--window", 1, "--dynamic-weight", "off")
    *steps, _ = log_of(tmp_path / "run")
    assert [row["beta"] for row in steps] == [1.0, 1.0, 1.0]
    first, second, third = steps
    assert second["history_mean"] == first["entropy"]
    assert third["history_mean"] == second["entropy"]


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_it_learns(algo, tmp_path):
    """From a start that can write and walk and has no idea what for, to most of the layouts that it
    never saw."""
    flags = "--steps 12 --turns 20 --tasks-per-step 8 --group-size 8 --minibatches 4 --kl-coef 0.01"
    flags += f" --eval-every 4 --eval-episodes 50 --algo {algo}"
    run(tmp_path / "run", *flags.split())
    evaluations = log_of(tmp_path / "run")[::4]
    before, *after = [row["iid_success"] for row in evaluations]
    assert before < 0.3
    assert max(after) > 0.6, after


def test_an_evaluation_plays_every_task_and_one_that_was_lost_is_no_failure():
    world, policy = KeyQuest(), load_policy("tiny", "keyquest")
    tasks = {split: world.tasks(split)[:5] for split in ("iid", "ood")}
    start, parts = world.start_all, []
    world.start_all = lambda part: parts.append(part) or start(part)
    # its simulators die in the first turn
    world.act = dict.fromkeys
    cfg = Config(turns=4, max_tokens=4)
    row = train.evaluate(world, policy, tasks, cfg, 5, at_once=2)
    assert [len(part) for part in parts] == [2, 2, 1, 2, 2, 1]
    assert sum(parts, []) == tasks["iid"] + tasks["ood"]
    assert (row["iid_success"], row["iid_lost"]) == (None, 5)
    assert row["iid_by_task"] == {}
    line = report.line(row | {"step": 5, "seconds": 1.0})
    assert "evaluation: IID lost, OOD lost" in line
    assert "after IID lost" in report.last_line([row])


def test_tasks_are_drawn_by_type_in_turn_and_from_the_seed():
    many = [Task("a", variation) for variation in range(100)]
    few = [Task("b", variation) for variation in range(5)]
    draw = lambda n, seed: train.draw_tasks(many + few, n, seed)
    drawn = draw(8, "0 3")
    assert drawn == draw(8, "0 3") != draw(8, "0 4")
    assert len(set(drawn)) == 8
    assert [task.name for task in drawn].count("b") == 4
    # far more than there are
    assert len(draw(10**6, 0)) == 10**6


def test_every_option_is_used():
    """A coefficient that is defined and never read is a bug."""
    files = {*ROOT.glob("*.py"), *ROOT.glob("worlds/*.py")}
    files -= {ROOT / "config.py"}
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    used = set(re.findall(r"\bcfg\.(\w+)", code))
    # the task types are read as a tuple
    assert vars(Config()).keys() - used == {"tasks"}
    assert "task_names" in used
