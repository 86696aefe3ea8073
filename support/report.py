"""What a run tells people: the lines on the screen, and transcripts of episodes."""

import itertools
import math
import os

from tqdm import tqdm

from support.run_folder import read_log, write_json, write_whole

SPLITS = ("iid", "ood")


def progress(title, total):
    """A progress bar within a step; none where there is no terminal."""
    return tqdm(desc=title, total=total, leave=False, disable=None)


def print_header(cfg, policy, train_tasks):
    """The settings that were decided, and what plays where."""
    decided = [f"{name} {value}" for name, value in cfg.unusual().items()]
    print("settings: " + ", ".join(decided), flush=True)
    games = f" ({cfg.games} games)" if cfg.env == "alfworld" else ""
    types = len({task.name for task in train_tasks})
    size = f"{policy.model.num_parameters() / 1e6:.1f} M parameters"
    print(
        f"{cfg.env}{games}, {len(train_tasks)} train tasks of {types} types; {cfg.model} ({size}) "
        f"on {policy.model.device.type}; writing to {cfg.out}",
        flush=True,
    )
    if cfg.model == "tiny" and policy.model.device.type == "cuda":
        real = f"--env {cfg.env} --model Qwen/Qwen2.5-1.5B-Instruct --lora-rank 32"
        print(f"a real model: python train.py {real}", flush=True)


def print_step(cfg, row):
    """The line of a step; and what to do if no episode wins, at first and after three such steps.

    The steps must follow each other, and there must have been no reward in them.
    """
    print(line(row), flush=True)
    rewards = [row["reward"] for row in read_log(cfg.out) if "reward" in row]
    without = list(itertools.takewhile(lambda reward: not reward, reversed(rewards)))
    if "reward" in row and len(without) in (1, 3):
        # only a chat model has that setting
        model = f" --model {cfg.model}" if cfg.think else ""
        print(
            "  no episode won: advantages come from penalties alone; warm-start with "
            f"python -m tools.warmstart --env {cfg.env}{model} --out models/warm",
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
        numbers = [two_digits(row[f"{split}_success"]) for split in SPLITS]
        parts.append("evaluation: IID {}, OOD {}".format(*numbers))
    return " | ".join([*parts, f"{row['seconds']:.0f} s"])


def last_line(numbers):
    """What a run came to. numbers: metrics.summary of its log."""
    names = {"before": "success before", "after": "after"}
    names |= {"best": "Succ.* (best)", "last": "Succ. (last two evaluations)"}
    number = lambda split, key: two_digits(numbers[f"{split}_{key}"])
    cell = lambda key: f"{names[key]} IID {number('iid', key)}, OOD {number('ood', key)}"
    return "; ".join(map(cell, names))


def print_success(row):
    """An evaluation by task type, for --evaluate."""
    cell = lambda by_task, name: f"{two_digits(by_task.get(name)):>6}"
    splits = [row[f"{split}_by_task"] | {"all": row[f"{split}_success"]} for split in SPLITS]
    print(f"{'success':32}   IID   OOD")
    for name in [*sorted(splits[0].keys() - {"all"}), "all"]:
        print(f"{name:32}" + "".join(cell(by_task, name) for by_task in splits))


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
    kept = ("observation", "entropy", "action", "invalid")
    turns = []
    for turn in episode.turns:
        tokens = [tokenizer.decode([token]) for token in turn.response]
        turns.append({"tokens": tokens} | {name: getattr(turn, name) for name in kept})
    name, variation = episode.task
    outcome = {"success": episode.success, "score": episode.score}
    return {"task": name, "variation": variation, "goal": episode.goal, **outcome, "turns": turns}
