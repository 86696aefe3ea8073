"""EPO: entropy-regularized policy optimization for multi-turn agents (arXiv 2509.22576, v2), as one file of pure tensors.

    L_EPO = L_MT - λ · [ L_H - β_k · L_smooth ]                                                            (Eq. 6)

Letters, here and in the other files: N turns in a batch, L written tokens of the longest turn, V vocabulary, B episodes.
Only tokens that the policy wrote count, the end-of-turn token among them; a padded position has weight 0 (its values must be
finite). Everything per token is (N, L), and every loss is `(x * weights).sum()` with weights made once for the whole batch:
parts of a batch add up to the batch, so neither micro-batches nor padding can change a gradient.

Left out on purpose: the critic, which is critic.py, and the KL term and the optimizer, which are in train.py.
"""
from dataclasses import dataclass, field

import torch


def token_logp_and_entropy(logits, tokens, temperature=1.0):
    """log π(token) and the entropy H = -Σ_v p(v) log p(v), in nats, of the distribution that was sampled.

    logits (N, L, V), tokens (N, L) -> (N, L), (N, L), both differentiable, in at least float32.
    The entropy is over the whole vocabulary; it is not the surprisal of the sampled token.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    log_p = (logits / temperature).log_softmax(-1)                                  # (N, L, V)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)                         # 0 · log 0 = 0
    return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropy


def token_weights(mask, episode, average="episode"):
    """The weight of each written token in every average below: (N, L), summing to 1 over the batch, 0 on padding.

    mask (N, L): 1 where the policy wrote the token. episode (N,): which episode a turn belongs to (any integers).
    "episode" is Eq. 2's mean over the tokens of a turn, then the turns of an episode, then episodes; "token" is the flat
    mean over all tokens (the published code's). Raises ValueError for a turn without tokens or an unknown average.
    """
    mask = mask if mask.dtype == torch.float64 else mask.float()
    tokens = mask.sum(1, keepdim=True)                                              # (N, 1)  |τ_jt|
    if (tokens == 0).any():
        raise ValueError("token_weights: a turn has no written token; every turn ends with at least its end token")
    if average == "token":
        return mask / mask.sum()
    if average != "episode":
        raise ValueError(f"token_weights: average must be 'episode' or 'token', not {average!r}")
    _, index, turns = episode.unique(return_inverse=True, return_counts=True)       # (N,), (B,)  T_j
    return mask / tokens / turns[index].unsqueeze(1) / len(turns)


def group_advantages(returns, group, eps=1e-6):
    """GRPO: A = (R - mean) / (std + eps) within the group of an episode; std is the sample's (n - 1).

    returns (B,), group (B,) of integers -> (B,). A group with equal returns gives exactly 0, a group of one too.
    """
    advantages = torch.zeros_like(returns)
    for g in group.unique():
        members = group == g
        r = returns[members]
        if (r != r[0]).any():
            advantages[members] = (r - r.mean()) / (r.std() + eps)
    return advantages


def gae(values, rewards, last, gamma=1.0, lam=1.0):
    """PPO: generalized advantage estimation over turns, A_t = Σ_l (γλ)^l δ_(t+l) with δ_t = r_t + γ·V_(t+1) - V_t.

    values, rewards (N,): the turns of an episode one after the other, episode after episode; last (N,): True at an episode's
    last turn, after which nothing is worth anything. -> (N,). A_t + V_t is what the critic learns.
    """
    advantages, following, value = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(len(values))):
        if last[t]:
            following, value = 0.0, 0.0
        following = rewards[t] + gamma * value - values[t] + gamma * lam * following
        advantages[t], value = following, values[t]
    return advantages


def policy_loss(logp, old_logp, advantages, weights, clip=0.2):
    """L_MT: minus PPO's clipped objective, one ratio per token. advantages: (N,) for a whole turn or (N, L). -> scalar."""
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)                                        # (N, 1): one per turn
    ratio = (logp - old_logp).masked_fill(weights == 0, 0.0).exp()                  # (N, L)  π_θ / π_old; 1 on padding
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(objective * weights).sum()


def entropy_loss(entropy, weights):
    """Eq. 2, L_H: the average entropy (nats). It keeps the paper's name, but enters Eq. 6 with a minus: it is maximised."""
    return (entropy * weights).sum()


def smoothing_loss(entropy, reference, weights, kappa_l, kappa_r, alpha, form="hinge"):
    """Eq. 3 and 4, L_smooth: the average of α·P, where P is how far a token's entropy lies outside [κ_l·H̄_W, κ_r·H̄_W].

    entropy, weights (N, L); reference H̄_W in nats, a number, or None while there is no history (then 0) -> scalar.
    form "hinge" is Eq. 3 of v2. "indicator" is v1 and the published code: P = 1 outside. It is piecewise constant, so its
    gradient is exactly zero: it changes the loss that is printed and nothing else.
    Raises ValueError for 0 ≤ κ_l ≤ κ_r or α ≥ 0 violated, and for an unknown form.
    """
    if not 0 <= kappa_l <= kappa_r:
        raise ValueError(f"smoothing_loss: need 0 <= kappa_l <= kappa_r, not kappa_l={kappa_l}, kappa_r={kappa_r}")
    if not alpha >= 0:
        raise ValueError(f"smoothing_loss: alpha must not be negative, not {alpha}")
    if form not in ("hinge", "indicator"):
        raise ValueError(f"smoothing_loss: the form is 'hinge' or 'indicator' (or 'off' for epo_loss), not {form!r}")
    if reference is None:
        return entropy.new_zeros(())
    below = (kappa_l * reference - entropy).relu()                                  # (N, L)  [κ_l·H̄_W - H]_+
    above = (entropy - kappa_r * reference).relu()                                  # (N, L)  [H - κ_r·H̄_W]_+
    penalty = below + above if form == "hinge" else ((below + above) > 0).to(entropy.dtype)
    return alpha * (penalty * weights).sum()


def beta(step, total_steps, gamma):
    """Eq. 5: β_k = 1 + exp(-γ·k / k_mid) with k_mid = ⌊K/2⌋: 2 at RL step k = 0, falling towards 1. -> float

    Raises ValueError unless 0 <= step <= total_steps and gamma >= 0.
    """
    if not 0 <= step <= total_steps or not gamma >= 0:
        raise ValueError(f"beta: need 0 <= step <= total_steps and gamma >= 0, not {step}, {total_steps}, {gamma}")
    k_mid = max(total_steps // 2, 1)
    return 1 + torch.tensor(-gamma * step / k_mid, dtype=torch.float64).exp().item()


@dataclass
class EntropyHistory:
    """W_k = {H̄_0 … H̄_(k-1)}, one number per RL step, and its mean H̄_W. Cumulative, or the last `window` steps.

    Algorithm 1's order: use `.mean` in step k first, then `.append` the entropy of the batch that step k collected.
    """
    window: int | None = None
    values: list[float] = field(default_factory=list)

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"EntropyHistory: window must be at least 1, not {self.window}")

    def append(self, value):
        self.values.append(float(value))

    @property
    def mean(self):
        kept = self.values if self.window is None else self.values[-self.window:]
        return sum(kept) / len(kept) if kept else None

    def state_dict(self):
        return {"window": self.window, "values": list(self.values)}

    def load_state_dict(self, state):
        self.window, self.values = state["window"], list(state["values"])


def epo_loss(logp, old_logp, entropy, advantages, weights, reference, beta_k, entropy_coef=0.001,
             kappa_l=0.0, kappa_r=2.0, alpha=0.05, smoothing="hinge", clip=0.2, entropy_weights=None):
    """Eq. 6: L_EPO = L_MT - λ·[L_H - β_k·L_smooth] -> the loss (scalar) and a dict of floats to log.

    logp, old_logp, entropy, weights (N, L); advantages (N,) or (N, L); reference: H̄_W or None; λ = entropy_coef.
    smoothing: "hinge", "indicator" or "off". entropy_weights (N, L): other weights for L_H alone (variants.py).
    Every logged value is a sum over weighted tokens, so those of micro-batches add.
    Note what Eq. 6 does to one token's entropy: ∂L/∂H is -λw(1 + α·β_k) below the floor, -λw inside, -λw(1 - α·β_k) above
    the cap. Only with α·β_k > 1 does the cap pull entropy back; with the paper's α it weakens the bonus by 5 to 20 %.
    """
    l_mt = policy_loss(logp, old_logp, advantages, weights, clip)
    l_h = entropy_loss(entropy, weights if entropy_weights is None else entropy_weights)
    l_smooth = entropy.new_zeros(()) if smoothing == "off" else smoothing_loss(
        entropy, reference, weights, kappa_l, kappa_r, alpha, smoothing)
    loss = l_mt - entropy_coef * (l_h - beta_k * l_smooth)
    with torch.no_grad():
        share = lambda condition: (condition * weights).sum().item()
        log = {"loss": loss.item(), "policy_loss": l_mt.item(), "entropy_loss": l_h.item(), "smoothing_loss": l_smooth.item(),
               "clip_fraction": share(((logp - old_logp).exp() - 1).abs() > clip),
               "below": 0.0 if reference is None else share(entropy < kappa_l * reference),
               "above": 0.0 if reference is None else share(entropy > kappa_r * reference)}
    return loss, log
