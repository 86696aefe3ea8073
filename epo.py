"""EPO: entropy-regularized policy optimization (arXiv 2509.22576, v2), as one file of pure tensors.

    L_EPO = L_MT - λ · [ L_H - β_k · L_smooth ]                                            (Eq. 6)

Letters, here and in the other files: T response tokens, N turns, B episodes, V vocabulary.
Only tokens that the policy wrote count, the end-of-turn token among them; never prompt or padding.
They stand in one flat row (T,). Every loss is `(x * weights).sum()` with weights made once for the
whole batch, so the losses of its parts add up, and a micro-batch's size cannot change a gradient.
"""

from math import exp, inf

import torch


def token_logp_and_entropy(logits, tokens, temperature=1.0):
    """log π(token) and H = -Σ_v p(v) log p(v), in nats, of the distribution that was sampled.

    logits (…, V), tokens (…) -> two tensors (…), both differentiable, in at least float32.
    H is over the whole vocabulary; it is not the surprisal of the sampled token.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    log_p = (logits / temperature).log_softmax(-1)
    p = log_p.exp()
    # 0 · log 0 = 0
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropy


def token_weights(turn, episode, average="episode"):
    """The weight of each token in the averages below: (T,) in float64, adding up to 1.

    turn, episode (T,): which turn and episode a token is of. "episode" is Eq. 2: the mean over the
    tokens of a turn, then the turns of an episode, then the episodes. "token" is the flat mean.
    """
    if average == "token":
        return torch.full(turn.shape, 1 / len(turn), dtype=torch.float64)
    if average != "episode":
        raise ValueError(f"token_weights: average is 'episode' or 'token', not {average!r}")
    # the turns numbered from 0, and how many tokens each has, |τ_jt| in Eq. 2
    _, turn, tokens_of = turn.unique(return_inverse=True, return_counts=True)  # (T,), (N,)
    owner = episode.new_zeros(len(tokens_of)).scatter(0, turn, episode)  # (N,)
    # the episode of each turn, numbered from 0, and how many turns it has, T_j in Eq. 2
    _, owner, turns_of = owner.unique(return_inverse=True, return_counts=True)  # (N,), (B,)
    weight = 1 / (len(turns_of) * turns_of[owner] * tokens_of.double())  # (N,)
    return weight[turn]


def group_advantages(returns, group, eps=1e-6):
    """GRPO: A = (R - mean) / (std + eps) within a group of episodes, exactly 0 for equal returns.

    returns (B,), group (B,) of integers -> (B,). The std is the sample's (n - 1).
    """
    advantages = torch.zeros_like(returns)
    for g in group.unique():
        r = returns[group == g]
        if (r != r[0]).any():
            advantages[group == g] = (r - r.mean()) / (r.std() + eps)
    return advantages


def policy_loss(logp, old_logp, advantages, weights, clip=0.2, clip_high=None):
    """L_MT: minus PPO's clipped objective, one ratio π_θ / π_old per token. (T,) -> scalar

    clip_high: another ε above 1, as DAPO's clip-higher; None is the same.
    """
    ratio = (logp - old_logp).exp()
    # at a ratio of 1 this is minus the mean advantage, which is near 0; its gradient is not
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    return -(objective * weights).sum()


def entropy_loss(entropy, weights):
    """Eq. 2, L_H: the average entropy (nats). The name is the paper's: Eq. 6 maximises it."""
    return (entropy * weights).sum()


def corridor(history_mean, kappa_l, kappa_r):
    """The floor κ_l·H̄_W and the cap κ_r·H̄_W, in nats; κ_l = 0 is no floor, κ_r = inf no cap."""
    if history_mean is None:
        return -inf, inf
    # inf · 0 would be nan
    cap = inf if kappa_r == inf else kappa_r * history_mean
    return kappa_l * history_mean, cap


def smoothing_loss(entropy, history_mean, weights, kappa_l, kappa_r, alpha, form="hinge"):
    """Eq. 3 and 4, L_smooth: the average of α·P, P = how far H is outside [κ_l·H̄_W, κ_r·H̄_W].

    entropy, weights (T,); history_mean: H̄_W, None while there is no history (then 0) -> scalar.
    form "hinge" is Eq. 3 of v2, "off" is 0. "indicator" is v1 and the published code: P = 1
    outside, whose gradient is exactly zero. Raises ValueError unless 0 <= κ_l <= κ_r and α >= 0.
    """
    if not (0 <= kappa_l <= kappa_r and alpha >= 0):
        raise ValueError(f"need 0 <= kappa_l <= kappa_r, alpha >= 0: {kappa_l}, {kappa_r}, {alpha}")
    if form not in ("hinge", "indicator", "off"):
        raise ValueError(f"smoothing_loss: form is 'hinge', 'indicator' or 'off', not {form!r}")
    if history_mean is None or form == "off":
        return entropy.new_zeros(())
    floor, cap = corridor(history_mean, kappa_l, kappa_r)
    outside = (floor - entropy).relu() + (entropy - cap).relu()
    penalty = outside if form == "hinge" else (outside > 0).to(entropy.dtype)
    return alpha * (penalty * weights).sum()


def kl_loss(logp, reference_logp, weights):
    """KL(π_θ ‖ π_ref), k3 estimator: e^d - d - 1, d = log π_ref - log π_θ. (T,) -> scalar."""
    d = reference_logp - logp
    return ((d.exp() - d - 1) * weights).sum()


def beta(step, total_steps, gamma):
    """Eq. 5: β_k = 1 + exp(-γ·k / ⌊K/2⌋), 2 at k = 0, falling. ValueError for k > K or γ < 0."""
    if not (0 <= step <= total_steps and gamma >= 0):
        raise ValueError(f"beta: bad step, total_steps or gamma: {step}, {total_steps}, {gamma}")
    return 1 + exp(-gamma * step / max(total_steps // 2, 1))


def mean_of_history(entropies, window=None):
    """H̄_W, the mean of W_k = [H̄_0 … H̄_(k-1)] or of its last `window`; None while it is empty."""
    recent = entropies if window is None else entropies[-window:]
    return sum(recent) / len(recent) if recent else None


def adaptive_coef(entropies, target, step=0.002):
    """λ of Skywork-OR1 after the steps of W_k: from 0, up while H̄ is below target, else down."""
    coef = 0.0
    for entropy in entropies:
        coef = max(coef + (step if entropy < target else -step), 0.0)
    return coef


def epo_loss(
    *,
    logp, old_logp,
    entropy,
    advantages,
    weights,
    history_mean, beta_k,
    entropy_coef=0.001,
    kappa_l=0.0, kappa_r=2.0, alpha=0.05,
    smoothing="hinge", clip=0.2, clip_high=None,
    entropy_weights=None,
    reference_logp=None, kl_coef=0.01,
):  # fmt: skip
    """Eq. 6, and kl_coef times the KL where there is a reference_logp -> loss, {term: float}.

    Tensors are (T,), entropy_coef is λ. L_H has weights of its own where entropy_weights are given.
    A token of weight w has ∂L/∂H = -λw(1 + α·β_k) below the floor, -λw inside, -λw(1 - α·β_k)
    above the cap. So the cap pulls entropy back only if α·β_k > 1, which the paper's α is not.
    """
    l_mt = policy_loss(logp, old_logp, advantages, weights, clip, clip_high)
    l_h = entropy_loss(entropy, weights if entropy_weights is None else entropy_weights)
    l_smooth = smoothing_loss(entropy, history_mean, weights, kappa_l, kappa_r, alpha, smoothing)
    loss = l_mt - entropy_coef * (l_h - beta_k * l_smooth)
    terms = {"policy_loss": l_mt, "entropy_loss": l_h, "smoothing_loss": l_smooth}
    if reference_logp is not None:
        terms["kl"] = kl_loss(logp, reference_logp, weights)
        loss = loss + kl_coef * terms["kl"]
    terms["loss"] = loss
    return loss, {name: value.item() for name, value in terms.items()}


def decayed_weights(weights, index, turn_limit, decay):
    """EPO-Decay, an ablation: L_H's weights, 1 + decay at turn 0 down to 1 - decay at the last."""
    return weights * (1 + decay * (1 - 2 * index / max(turn_limit - 1, 1)))


def shaped_advantages(advantages, entropy, eta, kappa=2.0):
    """An ablation, EA (Cheng et al. 2025): A + min(η·H, |A| / κ), where H has no gradient."""
    return advantages + (eta * entropy.detach()).minimum(advantages.abs() / kappa)
