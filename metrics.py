"""The columns of a run's log: what the episodes, the tokens and the corridor of a step say.

A column is named here, where it is computed, and explained in docs/metrics.md; the terms of the
loss are named in epo.py. Who reads a log takes the columns that it has. None is no value.
"""

import math
import statistics

# bins of the token entropies of a step, in nats, finer near 0; the last one has no upper end
ENTROPY_EDGES = [12 * (i / 32) ** 2 for i in range(33)]


def table(rows):
    """A log's rows -> {column: its value in each row, None where there is none}."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def mean(values):
    """The mean, or None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None


def episode_metrics(episodes, turn_limit):
    """What the episodes of a step say of the policy that played them."""
    failed_early = lambda e: not e.success and len(e.turns) < turn_limit
    turns = [turn for episode in episodes for turn in episode.turns]
    by_turn = {}
    for turn in turns:
        by_turn.setdefault(turn.index, []).append(mean(turn.entropy))
    return {
        "success": mean(episode.success for episode in episodes),
        "failed_early": mean(failed_early(episode) for episode in episodes),
        "score": mean(episode.score for episode in episodes),
        "invalid": mean(turn.invalid for turn in turns),
        "entropy_by_turn": [mean(by_turn[t]) for t in sorted(by_turn)],
        "episodes": len(episodes),
        "turns": len(turns),
        "tokens": sum(len(turn.response) for turn in turns),
        "prompt_tokens": sum(len(turn.prompt) for turn in turns),
    }


def evaluation_metrics(split, episodes, lost):
    """What the evaluation of a split says; of a split whose episodes were all lost, None."""
    by_task = {}
    for episode in sorted(episodes, key=lambda episode: episode.task.name):
        by_task.setdefault(episode.task.name, []).append(episode.success)
    return {
        f"{split}_success": mean(episode.success for episode in episodes),
        f"{split}_by_task": {name: mean(values) for name, values in by_task.items()},
        f"{split}_lost": lost,
        f"{split}_invalid": mean(turn.invalid for e in episodes for turn in e.turns),
    }


def token_metrics(batch, cap):
    """Where the entropy is, weighted as Eq. 2: its distribution over the bins of ENTROPY_EDGES, and
    for the first token of a response and for the rest its mean, and the share above the cap.
    """
    # plot.py reads this file, and needs no torch
    import torch

    bins = torch.bucketize(batch.entropy, torch.tensor(ENTROPY_EDGES[1:-1]), right=True)
    histogram = batch.weights.new_zeros(len(ENTROPY_EDGES) - 1).index_add(0, bins, batch.weights)
    row = {"entropy_histogram": [round(share, 6) for share in histogram.tolist()]}
    first = torch.cat([torch.tensor([True]), batch.turn[1:] != batch.turn[:-1]])
    for name, chosen in {"first": first, "rest": ~first}.items():
        weights, entropy = batch.weights[chosen], batch.entropy[chosen]
        share = weights / weights.sum()
        row[f"{name}_entropy"] = (share * entropy).sum().item() if len(share) else None
        row[f"{name}_above"] = (share * (entropy > cap)).sum().item() if len(share) else None
    return row


def corridor_metrics(floor, cap, history_mean, beta_k, losses, cfg):
    """The corridor as the step used it, and the share of tokens outside it.

    net_above_cap is 1 - α·β_k, which is positive where the loss still rewards more entropy.
    """
    hinge = cfg.smoothing == "hinge" and cfg.entropy_coef > 0 and history_mean is not None
    return {
        "history_mean": history_mean,
        "beta": beta_k,
        "corridor_low": floor if math.isfinite(floor) else None,
        "corridor_high": cap if math.isfinite(cap) else None,
        "outside": losses["below"] + losses["above"],
        "net_above_cap": 1 - cfg.alpha * beta_k if hinge else 1.0,
    }


def summary(rows, last):
    """A finished run's numbers -> {name: value}; None where every evaluation was lost.

    before, after, best, last: success of the first and the last evaluation, of the best one, and
    the mean of the `last` last ones, for iid and ood. jump: std of the changes of H̄_k; highest: its
    maximum, nats.
    """
    entropy = [row["entropy"] for row in rows if row.get("entropy") is not None]
    changes = [b - a for a, b in zip(entropy, entropy[1:], strict=False)]
    numbers = {"jump": statistics.pstdev(changes) if changes else 0.0}
    numbers["highest"] = max(entropy, default=0.0)
    for split in ("iid", "ood"):
        success = [row.get(f"{split}_success") for row in rows]
        success = [share for share in success if share is not None]
        numbers[f"{split}_before"] = success[0] if success else None
        numbers[f"{split}_after"] = success[-1] if success else None
        numbers[f"{split}_best"] = max(success, default=None)
        numbers[f"{split}_last"] = mean(success[-last:])
    return numbers
