"""The paper's two other ways to use entropy, for its ablations. Each is off at 0."""


def decayed_weights(weights, index, turns, decay):
    """EPO-Decay: the weights of the entropy term, larger for early turns, smaller for late ones: 1 + d at the first turn that
    an episode can have, 1 - d at its last, a straight line between. weights (N, L), index (N,) from 0, d = decay -> (N, L)."""
    return weights * (1 + decay * (1 - 2 * index / max(turns - 1, 1))).unsqueeze(1)


def shaped_advantages(advantages, entropy, eta, kappa=2.0):
    """EA (Cheng et al. 2025): A + min(η·H, |A| / κ) per token, H without a gradient; the loss has no entropy term then.

    advantages (N,), entropy (N, L) -> (N, L). A sure token keeps its advantage, and no token changes its sign.
    """
    a = advantages.unsqueeze(1)
    return a + (eta * entropy.detach()).minimum(a.abs() / kappa)
