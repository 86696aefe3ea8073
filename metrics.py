"""The columns of a run's log; docs/metrics.md explains each. None is no value.

The terms of the loss are named in epo.py. Who reads a log takes the columns that it has.
"""

import itertools
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
    turns = [turn for episode in episodes for turn in episode.turns]
    failed = [episode for episode in episodes if not episode.success]
    failed_early = [episode for episode in failed if len(episode.turns) < turn_limit]
    by_turn = {}
    for turn in turns:
        by_turn.setdefault(turn.index, []).append(mean(turn.entropy))
    won = [episode.success for episode in episodes]
    scores = [episode.score for episode in episodes]
    return {
        "success": mean(won),
        "failed_early": len(failed_early) / len(episodes),
        "score": mean(scores),
        "invalid": mean(turn.invalid for turn in turns),
        "entropy_by_turn": [mean(by_turn[t]) for t in sorted(by_turn)],
        "episodes": len(episodes),
        "turns": len(turns),
        "tokens": sum(len(turn.response) for turn in turns),
        "prompt_tokens": sum(len(turn.prompt) for turn in turns),
    }


def group_metrics(episodes, returns):
    """uniform: the share of the groups whose returns are all equal, which have no advantage."""
    by_task = {}
    for episode, value in zip(episodes, returns.tolist(), strict=True):
        by_task.setdefault(episode.task, set()).add(value)
    uniform = [len(values) == 1 for values in by_task.values()]
    return {"groups": len(uniform), "uniform": mean(uniform), "reward": mean(returns.tolist())}


def evaluation_metrics(split, episodes, lost):
    """What the evaluation of a split says; of a split whose episodes were all lost, None."""
    turns = [turn for episode in episodes for turn in episode.turns]
    won = [episode.success for episode in episodes]
    by_task = {}
    for episode in episodes:
        by_task.setdefault(episode.task.name, []).append(episode.success)
    row = {
        "success": mean(won),
        "by_task": {name: mean(by_task[name]) for name in sorted(by_task)},
        "lost": lost,
        "invalid": mean(turn.invalid for turn in turns),
    }
    return {f"{split}_{name}": value for name, value in row.items()}


def token_metrics(batch, cap):
    """Where the entropy is, weighted as Eq. 2: its distribution over the bins of ENTROPY_EDGES, and
    for the first token of a response and for the rest its mean, and the share above the cap.
    """
    # plot.py reads this file, and needs no torch
    import torch

    edges = torch.tensor(ENTROPY_EDGES)
    bins = torch.bucketize(batch.entropy, edges[1:-1], right=True)
    histogram = batch.weights.new_zeros(len(edges) - 1).index_add(0, bins, batch.weights)
    row = {"entropy_histogram": [round(share, 6) for share in histogram.tolist()]}
    first = torch.cat([torch.tensor([True]), batch.turn[1:] != batch.turn[:-1]])
    for name, chosen in {"first": first, "rest": ~first}.items():
        entropy, weights = batch.entropy[chosen], batch.weights[chosen]
        share = weights / weights.sum()
        nats, above = (share * entropy).sum(), (share * (entropy > cap)).sum()
        row[f"{name}_entropy"] = nats.item() if len(share) else None
        row[f"{name}_above"] = above.item() if len(share) else None
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
    the mean of the `last` last ones, for iid and ood. jump: std of the changes of H̄_k, in nats;
    highest: its maximum.
    """
    log = table(rows)
    numbers_of = lambda name: [x for x in log.get(name, []) if type(x) in (int, float)]
    entropy = numbers_of("entropy")
    changes = [after - before for before, after in itertools.pairwise(entropy)]
    numbers = {
        "jump": statistics.pstdev(changes) if changes else 0.0,
        "highest": max(entropy, default=0.0),
    }
    for split in ("iid", "ood"):
        success = numbers_of(f"{split}_success")
        of_split = {
            "before": mean(success[:1]),
            "after": mean(success[-1:]),
            "best": max(success, default=None),
            "last": mean(success[-last:]),
        }
        numbers |= {f"{split}_{name}": value for name, value in of_split.items()}
    return numbers
