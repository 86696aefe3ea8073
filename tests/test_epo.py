"""epo.py in numbers: every formula against plain Python loops, hand-worked cases, and what the
paper's terms do to gradients.

The references know nothing of weights or tensors: they average as Eq. 2 reads (tokens, then turns,
then episodes), and their gradients are central differences.
"""

import ast
import math
from pathlib import Path

import pytest
import torch

import epo
from critic import gae
from epo import (
    beta,
    corridor,
    decayed_weights,
    entropy_loss,
    epo_loss,
    group_advantages,
    kl_loss,
    mean_of_history,
    policy_loss,
    shaped_advantages,
    smoothing_loss,
    token_logp_and_entropy,
    token_weights,
)


def rand(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


# One ragged batch: five turns of three episodes, interleaved, with ids that are neither small nor
# in
# order. The references see a table (N, L) of turns; the code sees its tokens as one flat row (T,).
N, L, V = 5, 4, 6
EPISODE, LENGTHS = torch.tensor([7, -2, 7, 100, -2]), [4, 1, 3, 2, 4]
MASK = torch.tensor([[1] * n + [0] * (L - n) for n in LENGTHS]).bool()
TURN, _ = MASK.nonzero(as_tuple=True)
T = len(TURN)
WEIGHTS = token_weights(TURN, EPISODE[TURN])
LOGITS = 2 * rand(N, L, V, seed=1)
TOKENS = torch.arange(N * L).view(N, L) % V
LOGP, ENTROPY = token_logp_and_entropy(LOGITS, TOKENS)
# ratios inside and outside the clip range
OLD_LOGP = LOGP + 0.4 * rand(N, L, seed=2)
ADVANTAGES = {"per turn": rand(N, 1, seed=3).expand(N, L), "per token": rand(N, L, seed=4)}
A = ADVANTAGES["per turn"]
# [0.9, 1.2]: tokens below, inside and above
CORRIDOR = dict(history_mean=1.5, kappa_l=0.6, kappa_r=0.8, alpha=0.8)
EPO = dict(beta_k=1.7, entropy_coef=0.3, **CORRIDOR)


def flat(table):
    """(N, L) -> (T,), the tokens that were written."""
    return table[MASK]


def flat_loss(logp, old_logp, entropy, advantages, **more):
    """epo_loss of tables."""
    tables = dict(logp=logp, old_logp=old_logp, entropy=entropy, advantages=advantages)
    rows = {name: flat(table) for name, table in tables.items()}
    return epo_loss(**rows, **{**EPO, "weights": WEIGHTS, **more})


# ---- references: plain Python, lists of lists in, a number out


def mean(values):
    return sum(values) / len(values)


def ref_average(x, average="episode"):
    turns = [row[:n] for row, n in zip(x, LENGTHS)]
    if average == "token":
        return mean([value for turn in turns for value in turn])
    ids = EPISODE.tolist()
    return mean([mean([mean(turn) for turn, e in zip(turns, ids) if e == j]) for j in set(ids)])


def ref_logp_entropy(logits, token, temperature):
    scaled = [z / temperature for z in logits]
    log_z = math.log(sum(math.exp(z) for z in scaled))
    return scaled[token] - log_z, -sum(math.exp(z - log_z) * (z - log_z) for z in scaled)


def ref_objective(logp, old, a):
    ratio = math.exp(logp - old)
    return min(ratio * a, max(0.8, min(1.2, ratio)) * a)


def ref_penalty(h, form="hinge"):
    below, above = max(0, 0.9 - h), max(0, h - 1.2)  # CORRIDOR
    return 0.8 * (below + above if form == "hinge" else float(below > 0 or above > 0))


def each(f, *tables):
    """f of every token; a table is a list of rows."""
    return [[f(*(x[t][i] for x in tables)) for i in range(L)] for t in range(N)]


def ref_epo(logp, old, h, a, form="hinge"):
    l_mt, l_smooth = (
        -ref_average(each(ref_objective, logp, old, a)),
        ref_average(each(lambda x: ref_penalty(x, form), h)),
    )
    return l_mt - 0.3 * (ref_average(h) - 1.7 * l_smooth)


def check(function, reference, *inputs, step=1e-6):
    """The value of `function`, and its gradient in every input by central differences of
    `reference`."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    assert value.item() == pytest.approx(
        reference(*(x.tolist() for x in inputs)), rel=1e-12, abs=1e-12
    )
    for which, gradient in enumerate(torch.autograd.grad(value, leaves)):
        for i in range(gradient.numel()):
            up, down = ([x.clone() for x in inputs] for _ in range(2))
            up[which].view(-1)[i] += step
            down[which].view(-1)[i] -= step
            slope = (
                reference(*(x.tolist() for x in up)) - reference(*(x.tolist() for x in down))
            ) / (2 * step)
            assert gradient.reshape(-1)[i].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


# ---- log π and H


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("which", [0, 1], ids=["logp", "entropy"])
def test_logp_and_entropy_match_loops(which, temperature):
    factors, turn, tokens = (
        rand(L, seed=5),
        LOGITS[0],
        TOKENS[0],
    )  # a random sum of the outputs tells them all apart
    check(
        lambda z: (token_logp_and_entropy(z, tokens, temperature)[which] * factors).sum(),
        lambda z: sum(
            factors[i].item() * ref_logp_entropy(z[i], tokens[i].item(), temperature)[which]
            for i in range(L)
        ),
        turn,
    )


@pytest.mark.parametrize(
    "logits, h, gradient",
    [
        *[([3.0] * v, math.log(v), [-1 / v, 1 - 1 / v] + [-1 / v] * (v - 2)) for v in (2, 1000)],
        *[
            ([low, 1.0, low], 0.0, [0, 0, 0]) for low in (-1e4, -1e30, -math.inf)
        ],  # a certain token; -inf is a masked logit
        *[([-high, high, high], math.log(2), [0, 0.5, -0.5]) for high in (1e4, 1e30)],
    ],
)
def test_uniform_certain_and_extreme_logits(logits, h, gradient):
    """H is log V, 0 and log 2, and 0 · log 0 is 0, forwards and backwards."""
    logits = torch.tensor([logits], requires_grad=True)
    logp, entropy = token_logp_and_entropy(logits, torch.tensor([1]))
    (logp + entropy).sum().backward()
    assert (entropy.item(), logp.item()) == pytest.approx((h, -h))
    assert logits.grad[0].tolist() == pytest.approx(gradient, abs=1e-7)


def test_entropy_is_not_the_surprisal_of_the_sampled_token():
    """-log π(token) equals H only on average over sampled tokens."""
    p = [0.7, 0.2, 0.1]
    logp, entropy = token_logp_and_entropy(f64(p, p, p).log(), torch.tensor([0, 1, 2]))
    assert logp.tolist() == pytest.approx([math.log(x) for x in p])
    assert entropy.tolist() == pytest.approx([-sum(x * math.log(x) for x in p)] * 3)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_upcast(half):
    logits = LOGITS.to(half)
    for got, want in zip(
        token_logp_and_entropy(logits, TOKENS, 0.7),
        token_logp_and_entropy(logits.float(), TOKENS, 0.7),
    ):
        assert got.dtype == torch.float32 and torch.equal(got, want)


# ---- Eq. 2's weights


def test_averages_by_hand():
    """Eq. 2 is 1 / B / T_j / |τ_jt|, with B = 3; the flat mean gives each of the 14 tokens 1/14."""
    per_turn = [1 / 3 / 2 / 4, 1 / 3 / 2 / 1, 1 / 3 / 2 / 3, 1 / 3 / 1 / 2, 1 / 3 / 2 / 4]
    per_token = [w for w, n in zip(per_turn, LENGTHS, strict=True) for _ in range(n)]
    for average, by_hand in [("episode", per_token), ("token", [1 / 14] * 14)]:
        weights = token_weights(TURN, EPISODE[TURN], average)
        assert torch.allclose(weights, f64(*by_hand), rtol=1e-14, atol=0)
        assert weights.sum().item() == pytest.approx(1, rel=1e-14)


def test_order_of_tokens_and_names_of_turns_and_episodes_do_not_matter():
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    assert torch.equal(token_weights(TURN[order], EPISODE[TURN][order]), WEIGHTS[order])
    turn_names = torch.tensor([3, 10**12, -7, 5, 4])
    episode_names = torch.tensor([10**12, 5, 10**12, -1, 5])
    assert torch.equal(token_weights(turn_names[TURN], episode_names[TURN]), WEIGHTS)


# ---- group advantages


def test_group_advantages_by_hand():
    """(1 0 0 0): mean 1/4, sample variance (9 + 3) / 16 / 3 = 1/4. (0 10), interleaved with it:
    mean 5, std 5·√2."""
    got = group_advantages(f64(0, 1, 0, 10, 0, 0), torch.tensor([8, 3, 3, 8, 3, 3]), eps=0.0)
    assert got.tolist() == pytest.approx(
        [-1 / math.sqrt(2), 1.5, -0.5, 1 / math.sqrt(2), -0.5, -0.5]
    )


def test_group_advantages_match_loops_in_any_order():
    returns, group, want = rand(9, seed=6), torch.tensor([4, 4, 0, 4, 0, -9, 4, -9, 0]), []
    for r, g in zip(returns.tolist(), group.tolist()):
        same = [x for x, h in zip(returns.tolist(), group.tolist()) if h == g]
        want.append(
            (r - mean(same))
            / (math.sqrt(sum((x - mean(same)) ** 2 for x in same) / (len(same) - 1)) + 1e-6)
        )
    for order in (list(range(9)), [8, 2, 5, 0, 7, 1, 3, 6, 4]):
        assert group_advantages(returns[order], group[order]).tolist() == pytest.approx(
            [want[i] for i in order], rel=1e-12
        )


def test_equal_returns_and_groups_of_one_get_exactly_zero():
    """In float32 the mean of eight 9.9 (each won, with one invalid action) is not 9.9; unguarded,
    that gives ±0.47."""
    returns, group = (
        torch.tensor([0.1, 0.1, 5.0, 0.1] + [9.9] * 8),
        torch.tensor([1, 1, 2, 1] + [3] * 8),
    )
    assert torch.equal(group_advantages(returns, group), torch.zeros(12))


# ---- generalized advantage estimation


def test_gae_by_hand():
    """Two episodes, of 2 turns and of 1. γ = λ = 1: what is still to come, less the value. γ =
    1/2, λ = 0: δ_t alone."""
    values, rewards, last = (
        f64(0.5, 0.25, 0.75),
        f64(-0.125, 1, 0),
        torch.tensor([False, True, True]),
    )
    assert gae(values, rewards, last).tolist() == [0.375, 0.75, -0.75]
    assert gae(values, rewards, last, 0.5, 0.0).tolist() == [-0.5, 0.75, -0.75]


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.7), (1.0, 0.0), (0.0, 1.0)])
def test_gae_matches_a_double_loop_on_ragged_episodes(gamma, lam):
    lengths, want = [3, 1, 6, 2], []
    values, rewards = rand(12, seed=8), rand(12, seed=9)
    last = torch.tensor([t == n - 1 for n in lengths for t in range(n)])
    for end, n in zip((3, 4, 10, 12), lengths):
        v, r = values[end - n : end].tolist() + [0.0], rewards[end - n : end].tolist()
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        want += [sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, n)) for t in range(n)]
    assert gae(values, rewards, last, gamma, lam).tolist() == pytest.approx(want, rel=1e-12)


# ---- the three terms


@pytest.mark.parametrize(
    "ratio, advantage, objective, slope",
    [
        (1.1, +1, 1.1, 1.1),
        (1.1, -1, -1.1, -1.1),  # inside the range: the plain ratio
        (1.5, +1, 1.2, 0.0),
        (0.5, -1, -0.8, 0.0),  # moved far enough already: no gradient
        (0.5, +1, 0.5, 0.5),
        (1.5, -1, -1.5, -1.5),
    ],
)  # moved the wrong way: free to come back
def test_clip_by_hand(ratio, advantage, objective, slope):
    logp = f64([math.log(ratio)]).requires_grad_()
    loss = policy_loss(logp, f64([0]), f64(advantage), f64([1]), clip=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-objective) and logp.grad.item() == pytest.approx(-slope)


@pytest.mark.parametrize("average", ["episode", "token"])
@pytest.mark.parametrize("kind", ADVANTAGES)
def test_terms_match_loops(kind, average):
    weights = token_weights(TURN, EPISODE[TURN], average)
    check(
        lambda h: entropy_loss(flat(h), weights),
        lambda h: ref_average(h, average),
        ENTROPY,
    )
    check(
        lambda h: smoothing_loss(flat(h), weights=weights, **CORRIDOR),
        lambda h: ref_average(each(ref_penalty, h), average),
        ENTROPY,
    )
    check(
        lambda logp, old, a: policy_loss(flat(logp), flat(old), flat(a), weights),
        lambda *x: -ref_average(each(ref_objective, *x), average),
        *(LOGP, OLD_LOGP, ADVANTAGES[kind]),
    )


# ---- β_k and the history


@pytest.mark.parametrize(
    "step, total, gamma, want",
    [
        (0, 124, 3, 2.0),
        (62, 124, 3, 1 + math.exp(-3)),
        (124, 124, 3, 1 + math.exp(-6)),
        (31, 124, 2, 1 + math.exp(-1)),
        (62, 125, 3, 1 + math.exp(-3)),
        (3, 3, 2, 1 + math.exp(-6)),  # odd K: k_mid is the floor
        (0, 1, 3, 2.0),
        (1, 1, 3, 1 + math.exp(-3)),
        (7, 10, 0, 2.0),
    ],
)  # K = 1 has k_mid 1; γ = 0 holds β at 2
def test_beta_by_hand(step, total, gamma, want):
    assert beta(step, total, gamma) == pytest.approx(want, rel=1e-15)


@pytest.mark.parametrize(
    "window, means", [(None, [1.0, 0.75, 0.8]), (2, [1.0, 0.75, 0.7]), (1, [1.0, 0.5, 0.9])]
)
def test_history_is_read_before_it_is_appended_to(window, means):
    """Algorithm 1: step k compares with W_k, the steps before k and not k itself."""
    history, seen = [], []
    for batch_entropy in (1.0, 0.5, 0.9, 0.1):
        seen.append(mean_of_history(history, window))
        history.append(batch_entropy)
    assert seen[0] is None and seen[1:] == pytest.approx(means)


def test_no_history_is_no_smoothing_but_a_mean_of_zero_is_a_history():
    assert smoothing_loss(flat(ENTROPY), None, WEIGHTS, 0.6, 0.8, 0.8).item() == 0
    loss = smoothing_loss(flat(ENTROPY), 0.0, WEIGHTS, 0.6, 0.8, 0.8)
    assert loss.item() == pytest.approx(0.8 * ref_average(ENTROPY.tolist()))


@pytest.mark.parametrize("history_mean", [0.0, 1.5])
def test_an_infinite_kappa_r_is_no_cap(history_mean):
    """`--kappa-r inf` is an ablation: the floor alone, with finite numbers and gradients."""
    h = flat(ENTROPY).clone().requires_grad_()
    loss = smoothing_loss(h, history_mean, WEIGHTS, 0.6, math.inf, 0.8)
    loss.backward()
    floor = 0.6 * history_mean
    want = ref_average(each(lambda x: 0.8 * max(0, floor - x), ENTROPY.tolist()))
    assert loss.item() == pytest.approx(want)
    assert torch.equal(h.grad != 0, flat(ENTROPY) < floor)
    assert corridor(history_mean, 0.6, math.inf) == (floor, math.inf)


H = flat(ENTROPY)


@pytest.mark.parametrize(
    "word, call",
    [
        ("average", lambda: token_weights(TURN, EPISODE[TURN], "turn")),
        ("kappa_l", lambda: smoothing_loss(H, 1.0, WEIGHTS, 1.5, 0.5, 0.1)),
        ("kappa_l", lambda: smoothing_loss(H, 1.0, WEIGHTS, -0.1, 2.0, 0.1)),
        ("kappa_l", lambda: smoothing_loss(H, 1.0, WEIGHTS, math.nan, 2.0, 0.1)),
        ("alpha", lambda: smoothing_loss(H, 1.0, WEIGHTS, 0.0, 2.0, -0.1)),
        # in step 0 too
        ("alpha", lambda: smoothing_loss(H, None, WEIGHTS, 0.0, 2.0, math.nan)),
        ("form", lambda: smoothing_loss(H, 1.0, WEIGHTS, 0.0, 2.0, 0.1, "squared")),
        ("form", lambda: flat_loss(LOGP, OLD_LOGP, ENTROPY, A, smoothing="soft")),
        *[
            ("beta", lambda bad=bad: beta(*bad))
            for bad in [(-1, 10, 3), (11, 10, 3), (1, 10, -0.1), (1, 10, math.nan)]
        ],
    ],
)
def test_bad_values_are_refused_in_one_line(word, call):
    with pytest.raises(ValueError) as error:
        call()
    assert word in str(error.value) and "\n" not in str(error.value)


# ---- Eq. 6


@pytest.mark.parametrize("form", ["hinge", "indicator"])
@pytest.mark.parametrize("kind", ADVANTAGES)
def test_epo_loss_matches_loops(kind, form):
    check(
        lambda *x: flat_loss(*x, smoothing=form)[0],
        lambda *x: ref_epo(*x, form),
        *(LOGP, OLD_LOGP, ENTROPY, ADVANTAGES[kind]),
    )


def test_logged_terms_match_loops():
    reference_logp = LOGP + 0.3 * rand(N, L, seed=10)
    loss, log = flat_loss(
        LOGP, OLD_LOGP, ENTROPY, A, reference_logp=flat(reference_logp), kl_coef=0.7
    )
    logp, old, h, a = LOGP.tolist(), OLD_LOGP.tolist(), ENTROPY.tolist(), A.tolist()
    k3 = lambda x, y: math.exp(y - x) - (y - x) - 1
    kl = ref_average(each(k3, logp, reference_logp.tolist()))
    want = {
        "policy_loss": -ref_average(each(ref_objective, logp, old, a)),
        "entropy_loss": ref_average(h),
        "smoothing_loss": ref_average(each(ref_penalty, h)),
        "kl": kl,
        "loss": ref_epo(logp, old, h, a) + 0.7 * kl,
    }
    assert log == pytest.approx(want) and loss.item() == pytest.approx(want["loss"])
    # no case here is trivial
    assert log["smoothing_loss"] > 0.1 and log["kl"] > 0.01


def test_kl_is_zero_for_equal_policies_and_k3_by_hand():
    """d = (0.5, -0.5): e^0.5 - 1.5 = 0.14872, e^-0.5 - 0.5 = 0.10653, mean 0.12763."""
    x, w = torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 0.5])
    assert kl_loss(x, x, w) == 0
    assert abs(kl_loss(x, x + torch.tensor([0.5, -0.5]), w).item() - 0.12763) < 1e-5


@pytest.mark.parametrize("alpha, beta_k", [(1 / 16, 2.0), (1 / 2, 1.5), (1 / 2, 2.0), (4.0, 1.5)])
def test_what_the_corridor_does_to_one_token(alpha, beta_k):
    """∂L/∂H is -λw(1 + αβ) below, -λw inside, -λw(1 - αβ) above.

    Over the cap, entropy is pulled back only if αβ > 1. All numbers are short binary fractions, so
    this is exact.
    """
    coef, weights = 1 / 64, f64(0.5, 0.25, 0.25)
    h, zero = f64(0.25, 1.0, 2.0).requires_grad_(), f64(0, 0, 0)
    loss, _ = epo_loss(
        logp=zero,
        old_logp=zero,
        entropy=h,
        advantages=zero,
        weights=weights,
        history_mean=2.0,
        beta_k=beta_k,
        entropy_coef=coef,
        kappa_l=0.25,
        kappa_r=0.75,
        alpha=alpha,
    )
    loss.backward()
    below, inside, above = (h.grad / (coef * weights)).tolist()
    assert (below, inside, above) == (-(1 + alpha * beta_k), -1, -(1 - alpha * beta_k))
    assert (above > 0) == (alpha * beta_k > 1)


# a small softmax policy
FEATURES, MATRIX = flat(rand(N, L, 3, seed=7)), rand(3, V, seed=8)


def policy_gradient(parts=1, order=None, **changes):
    """Gradient of epo_loss in the matrix, summed over micro-batches, and the sum of their logs."""
    matrix, total = MATRIX.clone().requires_grad_(), {}
    order = torch.arange(T) if order is None else order
    advantages = changes.pop("advantages", A)
    for rows in order.tensor_split(parts):
        tokens = flat(TOKENS)[rows]
        logp, entropy = token_logp_and_entropy(FEATURES[rows] @ matrix, tokens)
        loss, log = epo_loss(
            logp=logp,
            old_logp=flat(OLD_LOGP)[rows],
            entropy=entropy,
            advantages=flat(advantages)[rows],
            weights=WEIGHTS[rows],
            **{**EPO, **changes},
        )
        loss.backward()
        total = {name: total.get(name, 0) + value for name, value in log.items()}
    return matrix.grad, total


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize("parts", [2, 3, T])
def test_micro_batches_add_up_to_the_batch_in_any_order(parts, kind):
    order = torch.randperm(T, generator=torch.Generator().manual_seed(parts))
    whole, log = policy_gradient(advantages=ADVANTAGES[kind])
    sums, sum_of_logs = policy_gradient(parts, order, advantages=ADVANTAGES[kind])
    assert whole.abs().max() > 1e-3 and torch.allclose(sums, whole, rtol=0, atol=1e-12)
    assert sum_of_logs == pytest.approx(log, rel=0, abs=1e-12) and log["smoothing_loss"] > 0


def test_indicator_changes_the_printed_loss_and_nothing_else():
    """The form of v1 and the published code is piecewise constant: bit for bit no smoothing."""
    off, off_log = policy_gradient(smoothing="off")
    indicator, log = policy_gradient(smoothing="indicator")
    hinge, _ = policy_gradient(smoothing="hinge")
    assert torch.equal(indicator, off) and (hinge - off).abs().max() > 1e-3
    assert off_log["smoothing_loss"] == 0 and log["smoothing_loss"] > 0.1
    assert log["loss"] > off_log["loss"] + 0.01


@pytest.mark.parametrize("change", [{"alpha": 0.0}, {"history_mean": None}], ids=str)
def test_no_smoothing_is_alpha_zero_is_step_zero(change):
    (got, log), (off, off_log) = policy_gradient(**change), policy_gradient(smoothing="off")
    assert torch.allclose(got, off, rtol=0, atol=1e-15)
    assert log["loss"] == pytest.approx(off_log["loss"], rel=1e-15)


def test_without_entropy_coefficient_it_is_the_policy_loss():
    entropy = ENTROPY.clone().requires_grad_()
    loss, _ = flat_loss(LOGP, OLD_LOGP, entropy, A, clip=0.1, entropy_coef=0.0)
    loss.backward()
    want = policy_loss(flat(LOGP), flat(OLD_LOGP), flat(A), WEIGHTS, 0.1)
    assert torch.equal(loss, want) and (entropy.grad == 0).all()


def test_defaults_are_the_papers():
    """λ 0.001, κ_l 0, κ_r 2, α 0.05, the hinge of v2, ε 0.2, KL 0.01."""
    tables = dict(logp=LOGP, old_logp=OLD_LOGP, entropy=3 * ENTROPY, advantages=A)
    batch = {name: flat(table) for name, table in tables.items()}
    batch |= dict(weights=WEIGHTS, history_mean=1.0, beta_k=2.0, reference_logp=flat(OLD_LOGP))
    paper = dict(entropy_coef=0.001, kappa_l=0.0, kappa_r=2.0, alpha=0.05, smoothing="hinge")
    default = epo_loss(**batch)
    assert default == epo_loss(**batch, **paper, clip=0.2, kl_coef=0.01)
    assert default != epo_loss(**batch, smoothing="off")


def test_variants_by_hand():
    """Turns 0, 2 and 4 of at most 5, decay 0.5: 1.5, 1, 0.5. EA: A + min(H / 2, |A| / 2)."""
    weights, index = torch.tensor([0.25, 0.25, 0.125]), torch.tensor([0, 2, 4])
    decayed = decayed_weights(weights, index, 5, 0.5)
    assert torch.equal(decayed, weights * torch.tensor([1.5, 1.0, 0.5]))
    assert torch.equal(decayed_weights(weights, torch.tensor([0, 0, 0]), 1, 0.0), weights)
    entropy = torch.tensor([0.0, 1.0, 4.0, 0.0, 1.0, 4.0], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, 1.0, -2.0, -2.0, -2.0])
    shaped = shaped_advantages(advantages, entropy, 0.5)
    assert shaped.tolist() == [1.0, 1.5, 1.5, -2.0, -1.5, -1.0] and not shaped.requires_grad
    assert torch.equal(shaped_advantages(advantages, entropy, 0.0), advantages)


def test_epo_stays_one_short_file_of_torch():
    source = Path(epo.__file__).read_text()
    nodes = list(ast.walk(ast.parse(source)))
    imported = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    assert imported == {"torch", "math"} and len(source.splitlines()) <= 165
