"""Draw what Eq. 6 does to the entropy of a token, with the loss's own gradient, as gradient.png.

Run it from the project's folder: python -m figures.gradient. Above the cap the gradient changes
its sign only with α·β_k > 1; the indicator of v1 is flat on both sides, so it never changes any.
"""

from pathlib import Path

import torch
from matplotlib import rcParams
from matplotlib.figure import Figure

import plot
from epo import epo_loss

KAPPAS = {"kappa_l": 0.5, "kappa_r": 2.0}


def slopes(h, smoothing, product):
    """∂L/∂H of tokens with entropy h, in units of λ·w; product: α·β_k. H̄_W is 1."""
    entropy = h.clone().requires_grad_()
    no_policy = dict.fromkeys(("logp", "old_logp", "advantages"), torch.zeros_like(h))
    terms = {"smoothing": smoothing, "alpha": product, "beta_k": 1.0, "entropy_coef": 1.0}
    tokens = {"entropy": entropy, "weights": torch.ones_like(h), "history_mean": 1.0}
    loss, _ = epo_loss(**no_policy, **tokens, **terms, **KAPPAS)
    loss.backward()
    return entropy.grad


def gradient():
    fig = Figure((8, 4.5), dpi=150, layout="constrained")
    axis = fig.subplots()
    h = torch.linspace(0, 3, 3001)
    text = "corridor, $\\kappa_l = 0.5$ and $\\kappa_r = 2$"
    axis.axvspan(*KAPPAS.values(), color=plot.SKY, alpha=0.25, label=text)
    for product, dashes in ((0.2, "-"), (2.0, ":")):
        text = f"hinge (v2), $\\alpha\\beta_k = {product:g}$"
        axis.plot(h, slopes(h, "hinge", product), color=plot.BLUE, ls=dashes, label=text)
    text = "indicator (v1, published code), any $\\alpha\\beta_k$"
    axis.plot(h, slopes(h, "indicator", 2.0), color=plot.RED, ls="--", label=text)
    axis.axhline(0, color=plot.BLACK, linewidth=1)
    axis.set_title("Below 0, training raises the entropy of the token; above 0, it lowers it")
    axis.set(xlim=(0, 3), xlabel="entropy of the token (units of $\\bar{H}_W$)")
    axis.set_ylabel("$\\partial L / \\partial H$ (units of $\\lambda w$)")
    axis.legend()
    return fig


if __name__ == "__main__":
    rcParams.update(plot.LOOK)
    gradient().savefig(Path(__file__).with_suffix(".png"))
