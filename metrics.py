"""The columns of a run's log; docs/metrics.md explains each. None is no value.

The terms of the loss are named in epo.py. Who reads a log takes the columns that it has.
"""

import math
from itertools import pairwise
from statistics import pstdev

import numpy as np

# bins of the token entropies of a step, in nats, finer near 0; the last one has no upper end
ENTROPY_EDGES = [12 * (i / 32) ** 2 for i in range(33)]


def mean(values):
    """The mean, or None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None


def means(pairs):
    """(key, number) pairs -> {key: the mean of its numbers}, the keys in order."""
    numbers = {}
    for key, number in pairs:
        numbers.setdefault(key, []).append(number)
    return {key: mean(numbers[key]) for key in sorted(numbers)}


def episode_metrics(episodes, turn_limit):
    """What the episodes of a step say of the policy that played them."""
    turns = [turn for episode in episodes for turn in episode.turns]
    by_turn = means((turn.index, mean(turn.entropy)) for turn in turns)
    return {
        "success": mean(episode.success for episode in episodes),
        "failed_early": mean(not e.success and len(e.turns) < turn_limit for e in episodes),
        "score": mean(episode.score for episode in episodes),
        "invalid": mean(turn.invalid for turn in turns),
        "entropy_by_turn": list(by_turn.values()),
        "episodes": len(episodes),
        "turns": len(turns),
        "tokens": sum(len(turn.response) for turn in turns),
        "prompt_tokens": sum(len(turn.prompt) for turn in turns),
    }


def group_metrics(episodes, returns):
    """uniform: the share of the groups whose returns are all equal, which have no advantage."""
    rewards, different = returns.tolist(), {}
    for episode, reward in zip(episodes, rewards):
        different.setdefault(episode.task, set()).add(reward)
    uniform = [len(group) == 1 for group in different.values()]
    return {"groups": len(uniform), "uniform": mean(uniform), "reward": mean(rewards)}


def evaluation_metrics(split, episodes, lost):
    """What the evaluation of a split says; of a split whose episodes were all lost, None."""
    return {
        f"{split}_success": mean(episode.success for episode in episodes),
        f"{split}_by_task": means((episode.task.name, episode.success) for episode in episodes),
        f"{split}_lost": lost,
        f"{split}_invalid": mean(turn.invalid for episode in episodes for turn in episode.turns),
    }


def token_metrics(batch, cap):
    """Where the entropy is, weighted as Eq. 2: its distribution over the bins of ENTROPY_EDGES, and
    for the first token of a response and for the rest its mean, and the share above the cap.
    """
    entropy, weights = batch.entropy.numpy(), batch.weights.numpy()
    edges = [*ENTROPY_EDGES[:-1], math.inf]
    histogram, _ = np.histogram(entropy, edges, weights=weights)
    row = {"entropy_histogram": histogram.round(6).tolist()}
    # the token before a first one is of another turn
    first = np.diff(batch.turn, prepend=-1) != 0
    for name, chosen in {"first": first, "rest": ~first}.items():
        share = weights * chosen
        total = share.sum()
        # responses of one token have no rest
        row[f"{name}_entropy"] = (share @ entropy / total).item() if total else None
        row[f"{name}_above"] = (share @ (entropy > cap) / total).item() if total else None
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
    # a step has no evaluation, and one whose episodes were all lost no success
    numbers_of = lambda name: [row[name] for row in rows if type(row.get(name)) in (int, float)]
    entropy = numbers_of("entropy")
    changes = [after - before for before, after in pairwise(entropy)]
    numbers = {"jump": pstdev(changes or [0.0]), "highest": max(entropy, default=0.0)}
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
