"""What a run tells people: the lines on the screen, transcripts, and the numbers of a whole run."""

import math
import os
import statistics

from tqdm import tqdm

from support.run_folder import write_json, write_whole

# bins of the token entropies of a step, in nats, finer near 0; the last one has no upper end
ENTROPY_EDGES = [12 * (i / 32) ** 2 for i in range(33)]


def progress(title, total):
    """A progress bar within a step, for terminals only."""
    return tqdm(desc=title, total=total, leave=False, disable=None)


def print_header(cfg, policy, train_tasks):
    games = f" ({cfg.games} games)" if cfg.env == "alfworld" else ""
    types = len({task.name for task in train_tasks})
    size = f"{policy.model.num_parameters() / 1e6:.1f} M parameters"
    print(
        f"{cfg.env}{games}, {len(train_tasks)} train tasks of {types} types; {cfg.model} ({size}) "
        f"on {policy.model.device.type}; writing to {cfg.out}",
        flush=True,
    )


def line(row):
    """The line printed after a step."""
    parts = [f"step {row['step']:3d}"]
    if "success" in row:
        entropy = f"entropy {row['entropy']:.3f}"
        if row["corridor_high"] is not None:
            entropy += f" in [{row['corridor_low']:.3f}, {row['corridor_high']:.3f}]"
        parts += [f"success {row['success']:.2f}", entropy]
        parts += [f"{row['outside']:.0%} of tokens outside", f"kl {row.get('kl', 0):.4f}"]
        parts += [f"invalid {row['invalid']:.0%}", f"{row['turns']} turns"]
        if row["lost"]:
            parts.append(f"{row['lost']} episodes lost")
    if "iid_success" in row:
        number = lambda split: two_digits(row[f"{split}_success"])
        parts.append(f"evaluation: IID {number('iid')}, OOD {number('ood')}")
    return " | ".join([*parts, f"{row['seconds']:.0f} s"])


def last_line(rows):
    """Success before and after, Succ.* (a run's best) and Succ. (its last two evaluations)."""
    numbers = summary(rows, last=2)
    names = {"before": "success before", "after": "after"}
    names |= {"best": "Succ.* (best)", "last": "Succ. (last two evaluations)"}
    number = lambda split, key: two_digits(numbers[f"{split}_{key}"])
    cell = lambda key: f"{names[key]} IID {number('iid', key)}, OOD {number('ood', key)}"
    return "; ".join(map(cell, names))


def summary(rows, last):
    """A finished run's numbers -> {name: value}; None where every evaluation was lost.

    before, after, best, last: success of the first and the last evaluation, of the best one, and
    the mean of the `last` last ones, for iid and ood; "iid NAME" is that mean of a task type.
    jump: std of the changes of H̄_k; highest: its maximum, nats.
    """
    entropy = [row["entropy"] for row in rows if "entropy" in row]
    changes = [b - a for a, b in zip(entropy, entropy[1:], strict=False)]
    numbers = {"jump": statistics.pstdev(changes) if changes else 0.0}
    numbers["highest"] = max(entropy, default=0.0)
    for split in ("iid", "ood"):
        evaluations = [row for row in rows if row.get(f"{split}_success") is not None]
        success = [row[f"{split}_success"] for row in evaluations]
        numbers[f"{split}_before"] = success[0] if success else None
        numbers[f"{split}_after"] = success[-1] if success else None
        numbers[f"{split}_best"] = max(success, default=None)
        numbers[f"{split}_last"] = statistics.mean(success[-last:]) if success else None
        by_task = {}
        for row in evaluations[-last:]:
            for name, value in row[f"{split}_by_task"].items():
                by_task.setdefault(name, []).append(value)
        numbers |= {f"{split} {name}": statistics.mean(v) for name, v in by_task.items()}
    return numbers


def two_digits(success):
    """A share of won episodes as text; "lost" for None."""
    return "lost" if success is None else f"{success:.2f}"


def transcript(episode):
    """One episode as readable text."""
    name, variation = episode.task
    outcome = "success" if episode.success else "failure"
    lines = [f"task {name} {variation}: {outcome}, score {episode.score}", episode.goal]
    for turn in episode.turns:
        mark = "   [invalid]" if turn.invalid else ""
        lines += ["", f"--- turn {turn.index + 1}", turn.observation, f"> {turn.text}{mark}"]
    return "\n".join(lines) + "\n"


def save_transcripts(folder, step, texts):
    path = os.path.join(folder, "transcripts", f"step-{step:04d}.txt")
    write_whole(path, lambda file: file.write("\n".join(texts).encode()))


def save_token_transcripts(folder, step, episodes, bounds, tokenizer):
    """A won and a lost episode of a step with the entropy of every token, if there are both.

    bounds: the corridor in nats, the floor and the cap.
    """
    by_outcome = {episode.success: episode for episode in episodes}
    finite = [bound if math.isfinite(bound) else None for bound in bounds]
    transcripts = [token_transcript(e, tokenizer) for e in by_outcome.values()]
    value = {"step": step, "corridor": finite, "episodes": transcripts}
    write_json(os.path.join(folder, "transcripts", f"step-{step:04d}.json"), value)


def token_transcript(episode, tokenizer):
    turns = [
        {
            "observation": turn.observation,
            "tokens": [tokenizer.decode([token]) for token in turn.response],
            "entropy": turn.entropy,
            "action": turn.action,
            "invalid": turn.invalid,
        }
        for turn in episode.turns
    ]
    name, variation = episode.task
    outcome = {"success": episode.success, "score": episode.score}
    return {"task": name, "variation": variation, "goal": episode.goal, **outcome, "turns": turns}
