"""The columns of a run's log (docs/metrics.md; None is no value), and its transcripts."""

import math

import numpy as np


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
    rewards = returns.tolist()
    different = {}
    for episode, reward in zip(episodes, rewards):
        different.setdefault(episode.task, set()).add(reward)
    uniform = mean(len(group) == 1 for group in different.values())
    return {"groups": len(different), "uniform": uniform, "reward": mean(rewards)}


def evaluation_metrics(split, episodes, lost):
    """What the evaluation of a split says; of a split whose episodes were all lost, None."""
    return {
        f"{split}_success": mean(episode.success for episode in episodes),
        f"{split}_by_task": means((episode.task.name, episode.success) for episode in episodes),
        f"{split}_lost": lost,
        f"{split}_invalid": mean(turn.invalid for episode in episodes for turn in episode.turns),
    }


def token_metrics(batch, cap):
    """Entropy of the first tokens of responses, and of the rest, weighted as in Eq. 2."""
    entropy, weights = batch.entropy.numpy(), batch.weights.numpy()
    row = {}
    # the token before a first one is of another turn
    first = np.diff(batch.turn, prepend=-1) != 0
    for name, chosen in {"first": first, "rest": ~first}.items():
        share = weights * chosen
        total = share.sum()
        for what, values in {"entropy": entropy, "above": entropy > cap}.items():
            # responses of one token have no rest
            row[f"{name}_{what}"] = (share @ values / total).item() if total else None
    return row


def corridor_metrics(floor, cap, history_mean, beta_k, losses, cfg):
    """The corridor as the step used it. net_above_cap > 0: the loss still rewards more entropy."""
    hinge = cfg.smoothing == "hinge" and cfg.entropy_coef > 0 and history_mean is not None
    return {
        "history_mean": history_mean,
        "beta": beta_k,
        "corridor_low": floor if math.isfinite(floor) else None,
        "corridor_high": cap if math.isfinite(cap) else None,
        "outside": losses["below"] + losses["above"],
        "net_above_cap": 1 - cfg.alpha * beta_k if hinge else 1.0,
    }


def transcripts(episodes, tokenizer):
    """A won and a lost episode of a step, if there are both, token by token -> for JSON"""
    shown, kept = [], ("entropy", "observation", "action", "invalid")
    for episode in {episode.success: episode for episode in episodes}.values():
        turns = [{name: vars(turn)[name] for name in kept} for turn in episode.turns]
        for shorter, turn in zip(turns, episode.turns):
            shorter["tokens"] = [tokenizer.decode([token]) for token in turn.response]
        name, variation = episode.task
        shown.append({**vars(episode), "task": name, "variation": variation, "turns": turns})
    return shown
