"""epo.py in numbers: every formula against plain Python loops and by hand.

The references know nothing of weights or tensors: they average as Eq. 2 reads (tokens, then turns,
then episodes), and their gradients are central differences.
"""

import math
import re
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch

import epo
from critic import gae
from epo import epo_loss, group_advantages, policy_loss, smoothing_loss, token_weights

close = partial(torch.testing.assert_close, rtol=0)


def rand(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


# One ragged batch of T tokens: five turns of three episodes, interleaved, with ids that are neither
# small nor in order.
EPISODE_OF = torch.tensor([7, -2, 7, 100, -2])
TURN = torch.arange(5).repeat_interleave(torch.tensor([4, 1, 3, 2, 4]))
EPISODE = EPISODE_OF[TURN]
T, V = len(TURN), 6
WEIGHTS = token_weights(TURN, EPISODE)
LOGITS = 2 * rand(T, V, seed=1)
TOKENS = torch.arange(T) % V
LOGP, H = epo.token_logp_and_entropy(LOGITS, TOKENS)
# ratios inside and outside the clip range
OLD_LOGP = LOGP + 0.4 * rand(T, seed=2)
REFERENCE_LOGP = LOGP + 0.3 * rand(T, seed=10)
ADVANTAGES = rand(5, seed=3)[TURN]
BATCH = dict(logp=LOGP, old_logp=OLD_LOGP, entropy=H, advantages=ADVANTAGES, weights=WEIGHTS)
# the corridor is from 0.9 to 1.2: there are tokens below, inside and above
EPO = dict(entropy_coef=0.3, history_mean=1.5, beta_k=1.7, kappa_l=0.6, kappa_r=0.8, alpha=0.8)


def loss_of(**changes):
    return epo_loss(**BATCH | EPO | changes)


def gradient(rows=slice(None), **changes):
    """Of the loss of some tokens, in their log π and H -> (2, T), and its log."""
    tensors = {name: x[rows].clone().requires_grad_() for name, x in BATCH.items()}
    loss, log = loss_of(**tensors | changes)
    loss.backward()
    return torch.stack([tensors["logp"].grad, tensors["entropy"].grad]), log


def ref_average(values, average="episode"):
    if average == "token":
        return fmean(values)
    turns, episodes = {}, {}
    for value, turn in zip(values, TURN.tolist(), strict=True):
        turns.setdefault(turn, []).append(value)
    for turn, tokens in turns.items():
        episodes.setdefault(EPISODE_OF[turn].item(), []).append(fmean(tokens))
    return fmean(map(fmean, episodes.values()))


def ref_logp_entropy(logits, token, temperature):
    scaled = [z / temperature for z in logits]
    log_z = math.log(sum(map(math.exp, scaled)))
    log_p = [z - log_z for z in scaled]
    entropy = -sum(math.exp(x) * x for x in log_p)
    return log_p[token], entropy


def ref_objective(logp, old, a):
    ratio = math.exp(logp - old)
    clipped = max(0.8, min(1.2, ratio))
    return min(ratio * a, clipped * a)


def ref_penalty(h, form):
    outside = max(0, 0.9 - h) + max(0, h - 1.2)
    return 0.8 * {"hinge": outside, "indicator": outside > 0, "off": 0}[form]


def ref_kl(logp, reference):
    return math.exp(reference - logp) - (reference - logp) - 1


def ref_epo(logp, old, h, a, form, average):
    """The terms of Eq. 6 by name, and the loss."""
    tokens = {
        "policy_loss": [-x for x in map(ref_objective, logp, old, a)],
        "entropy_loss": h,
        "smoothing_loss": [ref_penalty(x, form) for x in h],
        "kl": list(map(ref_kl, logp, REFERENCE_LOGP.tolist())),
    }
    terms = {name: ref_average(values, average) for name, values in tokens.items()}
    bonus = terms["entropy_loss"] - 1.7 * terms["smoothing_loss"]
    terms["loss"] = terms["policy_loss"] - 0.3 * bonus + 0.7 * terms["kl"]
    return terms


def check(function, reference, *inputs, step=1e-6):
    """The value of a function, and its gradient by central differences of the reference."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    by_loops = lambda: reference(*(x.tolist() for x in leaves))
    assert value.item() == pytest.approx(by_loops(), rel=1e-12, abs=1e-12)
    for x, gradient in zip(leaves, torch.autograd.grad(value, leaves)):
        entries = x.data.view(-1)
        for i, slope in enumerate(gradient.flatten().tolist()):
            entries[i] += step
            up = by_loops()
            entries[i] -= 2 * step
            down = by_loops()
            entries[i] += step
            difference = (up - down) / (2 * step)
            assert slope == pytest.approx(difference, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("which", [0, 1], ids=["logp", "entropy"])
def test_logp_and_entropy_match_loops(which, temperature):
    tokens = [4, 0, 5]
    by_loops = lambda *row: ref_logp_entropy(*row, temperature)[which]
    check(
        lambda z: epo.token_logp_and_entropy(z, torch.tensor(tokens), temperature)[which].sum(),
        lambda logits: sum(map(by_loops, logits, tokens)),
        LOGITS[:3],
    )


@pytest.mark.parametrize(
    "logits, h, gradient",
    [
        # uniform
        ([3.0, 3.0], math.log(2), [-0.5, 0.5]),
        ([3.0] * 1000, math.log(1000), [-0.001, 0.999] + [-0.001] * 998),
        # a certain token; -inf is a masked logit
        ([-1e4, 1.0, -1e4], 0.0, [0, 0, 0]),
        ([-math.inf, 1.0, -1e30], 0.0, [0, 0, 0]),
        # two of three
        ([-1e30, 1e30, 1e30], math.log(2), [0, 0.5, -0.5]),
    ],
)
def test_uniform_certain_and_extreme_logits(logits, h, gradient):
    """H is log V, 0 and log 2, and 0 · log 0 is 0, forwards and backwards."""
    logits = torch.tensor([logits], requires_grad=True)
    logp, entropy = epo.token_logp_and_entropy(logits, torch.tensor([1]))
    (logp + entropy).sum().backward()
    assert (entropy.item(), logp.item()) == pytest.approx((h, -h))
    assert logits.grad[0].tolist() == pytest.approx(gradient, abs=1e-7)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_upcast(half):
    logits = LOGITS.to(half)
    score = lambda x: torch.stack(epo.token_logp_and_entropy(x, TOKENS, 0.7))
    assert score(logits).dtype == torch.float32
    assert torch.equal(score(logits), score(logits.float()))


@pytest.mark.parametrize(
    "average, parts, of_each_turn", [("episode", 72, [3, 12, 4, 12, 3]), ("token", 14, [1] * 5)]
)
def test_averages_by_hand(average, parts, of_each_turn):
    """Eq. 2 is 1 / B / T_j / |τ_jt|, with B = 3; the flat mean gives each token 1/14."""
    weights = token_weights(TURN, EPISODE, average)
    close(parts * weights, f64(*of_each_turn)[TURN], atol=1e-14)


def test_order_of_tokens_and_names_of_turns_and_episodes_do_not_matter():
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    shuffled = token_weights(TURN[order], EPISODE[order])
    assert torch.equal(shuffled, WEIGHTS[order])
    turn_names = torch.tensor([3, 10**12, -7, 5, 4])
    episode_names = torch.tensor([10**12, 5, 10**12, -1, 5])
    renamed = token_weights(turn_names[TURN], episode_names[TURN])
    assert torch.equal(renamed, WEIGHTS)


def test_group_advantages_match_loops_of_interleaved_groups():
    returns = rand(9, seed=6).tolist()
    group = [4, 4, 0, 4, 0, -9, 4, -9, 0]
    got = group_advantages(f64(*returns), torch.tensor(group)).tolist()
    for r, g, advantage in zip(returns, group, got):
        same = [x for x, h in zip(returns, group) if h == g]
        want = (r - fmean(same)) / (stdev(same) + 1e-6)
        assert advantage == pytest.approx(want, rel=1e-12)


def test_equal_returns_and_groups_of_one_get_exactly_zero():
    """In float32 the mean of eight 9.9 is not 9.9; unguarded, that gives ±0.47."""
    returns = torch.tensor([0.1, 0.1, 5.0, 0.1] + [9.9] * 8)
    group = torch.tensor([1, 1, 2, 1] + [3] * 8)
    assert torch.equal(group_advantages(returns, group), torch.zeros(12))


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.7), (1.0, 0.0), (0.0, 1.0)])
def test_gae_matches_a_double_loop_on_ragged_episodes(gamma, lam):
    values, rewards = rand(2, 12, seed=8)
    last = torch.zeros(12).bool()
    last[[2, 3, 9, 11]] = True
    next_values = values.roll(-1) * ~last
    delta = (rewards + gamma * next_values - values).tolist()
    want = []
    for begin, end in ((0, 3), (3, 4), (4, 10), (10, 12)):
        for t in range(begin, end):
            decayed = [(gamma * lam) ** n * x for n, x in enumerate(delta[t:end])]
            want.append(sum(decayed))
    got = gae(values, rewards, last, gamma, lam)
    assert got.tolist() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    "ratio, advantage, objective, slope, high",
    [
        # inside the range: the plain ratio
        (1.1, +1, 1.1, 1.1, None),
        (1.1, -1, -1.1, -1.1, None),
        (1.25, +1, 1.25, 1.25, 0.28),
        # moved far enough already: no gradient
        (1.5, +1, 1.2, 0.0, None),
        (1.5, +1, 1.28, 0.0, 0.28),
        (0.5, -1, -0.8, 0.0, 0.28),
        # moved the wrong way: free to come back, from any distance
        (0.5, +1, 0.5, 0.5, None),
        (1.5, -1, -1.5, -1.5, 0.28),
        (4.0, -1, -4.0, -4.0, None),
    ],
)
def test_clip_by_hand(ratio, advantage, objective, slope, high):
    logp = f64(math.log(ratio)).requires_grad_()
    loss = policy_loss(logp, f64(0), f64(advantage), f64(1), clip=0.2, clip_high=high)
    loss.backward()
    assert loss.item() == pytest.approx(-objective)
    assert logp.grad.item() == pytest.approx(-slope)


@pytest.mark.parametrize(
    "step, total, gamma, exponent",
    [
        (0, 124, 3, 0),
        (62, 124, 3, -3),
        (124, 124, 3, -6),
        # odd K: k_mid is the floor; K = 1 has k_mid 1
        (62, 125, 3, -3),
        (3, 3, 2, -6),
        (1, 1, 3, -3),
        # γ = 0 holds β at 2
        (7, 10, 0, 0),
    ],
)
def test_beta_by_hand(step, total, gamma, exponent):
    assert epo.beta(step, total, gamma) == pytest.approx(1 + math.exp(exponent), rel=1e-15)


@pytest.mark.parametrize(
    "window, means", [(None, [1.0, 0.75, 0.8]), (2, [1.0, 0.75, 0.7]), (1, [1.0, 0.5, 0.9])]
)
def test_history_is_read_before_it_is_appended_to(window, means):
    """Algorithm 1: step k compares with W_k, the steps before k and not k itself."""
    history = [1.0, 0.5, 0.9, 0.1]
    seen = [epo.mean_of_history(history[:k], window) for k in range(4)]
    assert seen[0] is None
    assert seen[1:] == pytest.approx(means)
    assert epo.corridor(seen[0], 0.6, 0.8) == (-math.inf, math.inf)


def test_adaptive_coefficient_by_hand():
    """From 0, up by 0.002 while H̄ is below the target, else down, but not below 0."""
    entropies = [0.3, 0.2, 0.4, 0.35, 0.5]
    seen = [epo.adaptive_coef(entropies[:k], 0.35) for k in range(6)]
    assert seen == pytest.approx([0, 0.002, 0.004, 0.002, 0, 0])


@pytest.mark.parametrize(
    "history_mean, kappa_r, penalty",
    [
        # a mean of 0 is a history
        (0.0, 0.8, lambda h: h),
        # `--kappa-r inf` is an ablation: the floor alone, with finite numbers and gradients
        (0.0, math.inf, lambda h: 0),
        (1.5, math.inf, lambda h: max(0, 0.9 - h)),
    ],
)
def test_corridors_with_one_side(history_mean, kappa_r, penalty):
    check(
        lambda h: smoothing_loss(h, history_mean, WEIGHTS, 0.6, kappa_r, 0.8),
        lambda h: 0.8 * ref_average(map(penalty, h)),
        H,
    )


@pytest.mark.parametrize(
    "word, call",
    [
        ("average", lambda: token_weights(TURN, EPISODE, "turn")),
        ("kappa_l", lambda: loss_of(kappa_l=1.5, kappa_r=0.5)),
        ("kappa_l", lambda: loss_of(kappa_l=-0.1)),
        ("kappa_l", lambda: loss_of(kappa_l=math.nan)),
        ("alpha", lambda: loss_of(alpha=-0.1)),
        # in step 0 too
        ("alpha", lambda: loss_of(alpha=math.nan, history_mean=None)),
        ("form", lambda: loss_of(smoothing="squared")),
        ("beta", lambda: epo.beta(-1, 10, 3)),
        ("beta", lambda: epo.beta(11, 10, 3)),
        ("beta", lambda: epo.beta(1, 10, -0.1)),
        ("beta", lambda: epo.beta(1, 10, math.nan)),
    ],
)
def test_bad_values_are_refused_in_one_line(word, call):
    with pytest.raises(ValueError) as error:
        call()
    assert word in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("average", ["episode", "token"])
@pytest.mark.parametrize("form", ["hinge", "indicator", "off"])
def test_epo_loss_and_its_terms_match_loops(form, average):
    more = dict(weights=token_weights(TURN, EPISODE, average), smoothing=form)
    more |= dict(reference_logp=REFERENCE_LOGP, kl_coef=0.7)
    inputs = LOGP, OLD_LOGP, H, ADVANTAGES
    by_loops = lambda *lists: ref_epo(*lists, form, average)
    _, log = loss_of(**more)
    assert log == pytest.approx(by_loops(*(x.tolist() for x in inputs)))
    # no case here is trivial
    assert log["kl"] > 0.01
    assert (log["smoothing_loss"] > 0.1) == (form != "off")
    names = ("logp", "old_logp", "entropy", "advantages")
    loss = lambda *tensors: loss_of(**dict(zip(names, tensors)), **more)[0]
    check(loss, lambda *lists: by_loops(*lists)["loss"], *inputs)


@pytest.mark.parametrize("alpha, beta_k", [(0.05, 2.0), (0.5, 1.5), (0.5, 2.0), (3.0, 1.5)])
def test_what_the_corridor_does_to_one_token(alpha, beta_k):
    """∂L/∂H is -λw(1 + αβ) below, -λw inside, -λw(1 - αβ) above.

    Over the cap, entropy is pulled back only if αβ > 1.
    """
    (_, slope), _ = gradient(alpha=alpha, beta_k=beta_k)
    below, above = (H < 0.9).double(), (H > 1.2).double()
    want = 1 + alpha * beta_k * (below - above)
    close(slope, -0.3 * WEIGHTS * want, atol=1e-15)
    pulled_back = slope[H > 1.2] > 1e-12
    assert pulled_back.all() == pulled_back.any() == (alpha * beta_k > 1)


@pytest.mark.parametrize("parts", [2, 3, T])
def test_micro_batches_add_up_to_the_batch_in_any_order(parts):
    order = torch.randperm(T, generator=torch.Generator().manual_seed(parts))
    each = [gradient(rows) for rows in order.tensor_split(parts)]
    gradients, logs = zip(*each)
    whole, log = gradient()
    close(torch.cat(gradients, 1), whole[:, order], atol=1e-15)
    for name, value in log.items():
        total = sum(log[name] for log in logs)
        assert total == pytest.approx(value, rel=0, abs=1e-12)


def test_indicator_changes_the_printed_loss_and_nothing_else():
    """The form of v1 and the published code is piecewise constant: bit for bit no smoothing."""
    off, off_log = gradient(smoothing="off")
    indicator, log = gradient(smoothing="indicator")
    hinge, _ = gradient(smoothing="hinge")
    assert torch.equal(indicator, off)
    assert (hinge - off).abs().max() > 1e-3
    assert off_log["smoothing_loss"] == 0 and log["smoothing_loss"] > 0.1
    assert log["loss"] > off_log["loss"] + 0.01


@pytest.mark.parametrize("change", [{"alpha": 0.0}, {"history_mean": None}], ids=str)
def test_no_smoothing_is_alpha_zero_is_step_zero(change):
    got, log = gradient(**change)
    off, off_log = gradient(smoothing="off")
    close(got, off, atol=1e-15)
    assert log["loss"] == pytest.approx(off_log["loss"], rel=1e-15)


def test_without_entropy_coefficient_it_is_the_policy_loss():
    (_, slope), log = gradient(entropy_coef=0.0, clip=0.1)
    assert log["loss"] == policy_loss(LOGP, OLD_LOGP, ADVANTAGES, WEIGHTS, 0.1)
    assert not slope.any()


def test_defaults_are_the_papers():
    """λ 0.001, κ_l 0, κ_r 2, α 0.05, the hinge of v2, ε 0.2, KL 0.01."""
    batch = BATCH | dict(history_mean=0.5, beta_k=2.0, reference_logp=REFERENCE_LOGP)
    paper = dict(entropy_coef=0.001, kappa_l=0.0, kappa_r=2.0, alpha=0.05, smoothing="hinge")
    default = epo_loss(**batch)
    assert default == epo_loss(**batch, **paper, clip=0.2, kl_coef=0.01)
    assert default != epo_loss(**batch, smoothing="off")


def test_variants_by_hand():
    """Turns 0, 2 and 4 of at most 5, decay 0.5: 1.5, 1, 0.5. EA: A + min(H / 2, |A| / 2)."""
    weights = f64(0.25, 0.25, 0.125)
    index = torch.tensor([0, 2, 4])
    decayed = epo.decayed_weights(weights, index, 5, 0.5)
    assert decayed.tolist() == [0.375, 0.25, 0.0625]
    assert torch.equal(epo.decayed_weights(weights, 0 * index, 1, 0.0), weights)
    entropy = f64(0, 1, 4, 1, 4).requires_grad_()
    shaped = epo.shaped_advantages(f64(1, 1, 1, -2, -2), entropy, 0.5)
    assert shaped.tolist() == [1.0, 1.5, 1.5, -1.5, -1.0]
    assert not shaped.requires_grad


def test_epo_is_a_file_of_torch_alone():
    source = Path(epo.__file__).read_text(encoding="utf-8")
    assert re.findall(r"^\s*(?:import|from) (\S+)", source, re.M) == ["math", "torch"]
