"""What a run tells people: the lines on the screen, transcripts, and the numbers of a whole run."""

import itertools
import math
import os
import statistics
import sys

from tqdm import tqdm

from support.run_folder import read_log, write_json, write_whole

# bins of the token entropies of a step, in nats, finer near 0; the last one has no upper end
ENTROPY_EDGES = [12 * (i / 32) ** 2 for i in range(33)]


def progress(title, total):
    """A progress bar within a step; where there is no terminal, a line a minute."""
    if sys.stderr.isatty():
        return tqdm(desc=title, total=total, leave=False)
    never = {"maxinterval": math.inf, "miniters": 0}
    return Lines(desc=title, total=total, leave=False, mininterval=60, delay=60, **never)


class Lines(tqdm):
    """A progress bar as lines of a text."""

    def display(self, msg=None, pos=None):
        # an empty message is to erase the bar
        if msg is None:
            seconds = f"{self.format_dict['elapsed']:.0f} s"
            parts = [f"  {self.desc.rstrip(': ')}: {self.n} of {self.total}", self.postfix, seconds]
            print(", ".join(filter(None, parts)), flush=True)


def print_header(cfg, policy, train_tasks):
    games = f" ({cfg.games} games)" if cfg.env == "alfworld" else ""
    types = len({task.name for task in train_tasks})
    size = f"{policy.model.num_parameters() / 1e6:.1f} M parameters"
    print(
        f"{cfg.env}{games}, {len(train_tasks)} train tasks of {types} types; {cfg.model} ({size}) "
        f"on {policy.model.device.type}; writing to {cfg.out}",
        flush=True,
    )
    if cfg.model == "tiny" and policy.model.device.type == "cuda":
        print(
            "a real model: python train.py "
            f"--env {cfg.env} --model Qwen/Qwen2.5-1.5B-Instruct --lora-rank 32",
            flush=True,
        )


def print_step(cfg, row):
    """The line of a step; and what to do if no episode wins, at first and after three such steps.

    The steps must follow each other, and there must have been no reward in them.
    """
    print(line(row), flush=True)
    rewards = [row["reward"] for row in read_log(cfg.out) if "reward" in row]
    without = list(itertools.takewhile(lambda reward: not reward, reversed(rewards)))
    if "reward" in row and len(without) in (1, 3):
        # only a chat model has that setting
        model = f" --model {cfg.model} --out models/warm" if cfg.think else ""
        print(
            "  no episode won: advantages come from penalties alone; warm-start with "
            f"python -m tools.warmstart --env {cfg.env}{model}",
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
    entropy = [row["entropy"] for row in rows if row.get("entropy") is not None]
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
            of_row = row.get(f"{split}_by_task", {})
            for name in (name for name in of_row if of_row[name] is not None):
                by_task.setdefault(name, []).append(of_row[name])
        numbers |= {f"{split} {name}": statistics.mean(v) for name, v in by_task.items()}
    return numbers


def print_success(row):
    """An evaluation by task type, for --evaluate."""
    number = lambda value: "   lost" if value is None else f"{value:7.3f}"
    line = lambda name, values: f"{name:32}" + "".join(map(number, values))
    by_task = [row["iid_by_task"], row["ood_by_task"]]
    print(f"{'success':32}    IID    OOD")
    for name in sorted({name for split in by_task for name in split}):
        print(line(name, [split.get(name, math.nan) for split in by_task]))
    print(line("all", [row["iid_success"], row["ood_success"]]))


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
