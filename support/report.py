"""What a run tells people: the lines on the screen, and transcripts of episodes."""

import math
import os
import re
import sys
from contextlib import suppress

from tqdm import tqdm

from support.run_folder import read_log, write_json, write_whole

SPLITS = ("iid", "ood")


def progress(title, total):
    """A progress bar within a step; none where there is no terminal."""
    return tqdm(desc=title, total=total, leave=False, disable=None)


def read_arguments(parser, program, arguments=None):
    """The command line; one that is wrong ends in one line and status 2."""
    # Greek letters, into a pipe of ASCII; what a notebook or a test prints to has no encoding
    with suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")
    parser.error = lambda message: parser.exit(2, f"{program}: {message}; see --help\n")
    for argument in sys.argv[1:] if arguments is None else arguments:
        # bytes that are no UTF-8 arrive as surrogates
        if re.search(r"[\0-\x1f\x7f\ud800-\udfff]", argument):
            parser.error(f"{argument!r:.60} has characters that cannot be printed")
    return parser.parse_args(arguments)


def print_header(cfg, policy, train_tasks):
    """The settings that were decided, and what plays where."""
    decided = [f"{name} {value}" for name, value in cfg.unusual().items()]
    print("settings: " + ", ".join(decided), flush=True)
    types = len({task.name for task in train_tasks})
    size = policy.model.num_parameters() / 1e6
    device = policy.model.device.type
    tasks = f"{len(train_tasks)} train tasks of {types} types"
    player = f"{cfg.model} ({size:.1f} M parameters) on {device}"
    print(f"{cfg.env}, {tasks}; {player}; writing to {cfg.out}", flush=True)
    if cfg.model == "tiny" and device == "cuda":
        real = f"--env {cfg.env} --model Qwen/Qwen2.5-1.5B-Instruct --lora-rank 32"
        print(f"a real model: python train.py {real}", flush=True)


def print_step(cfg, row):
    """The line of a step; after the first and the third without any reward, what to do."""
    print(line(row), flush=True)
    rewards = [row["reward"] for row in read_log(cfg.out) if "reward" in row]
    if "reward" in row and len(rewards) in (1, 3) and not any(rewards):
        # only a chat model has the setting "think"
        model = f" --model {cfg.model}" if cfg.think else ""
        start = f"python -m tools.warmstart --env {cfg.env}{model} --out models/warm"
        text = "no episode won: advantages come from penalties alone; warm-start with"
        print(f"  {text} {start}", flush=True)


def line(row):
    """The line printed after a step."""
    parts = [f"step {row['step']:3d}"]
    if "success" in row:
        corridor = ""
        if row["corridor_high"] is not None:
            corridor = f" in [{row['corridor_low']:.3f}, {row['corridor_high']:.3f}]"
        parts.append(f"success {row['success']:.2f}")
        parts.append(f"entropy {row['entropy']:.3f}{corridor}")
        parts.append(f"{row['outside']:.0%} of tokens outside")
        parts.append(f"kl {row.get('kl', 0):.4f}")
        parts.append(f"invalid {row['invalid']:.0%}")
        parts.append(f"{row['turns']} turns")
        uniform = round(row["uniform"] * row["groups"])
        parts.append(f"no advantage in {uniform} of {row['groups']} groups")
        if row["lost"]:
            parts.append(f"{row['lost']} episodes lost")
    if "iid_success" in row:
        iid, ood = two_digits(row["iid_success"]), two_digits(row["ood_success"])
        parts.append(f"evaluation: IID {iid}, OOD {ood}")
    parts.append(f"{row['seconds']:.0f} s")
    return " | ".join(parts)


def last_line(numbers):
    """What a run came to. numbers: metrics.summary of its log."""
    names = {"before": "success before", "after": "after", "best": "Succ.* (best)"}
    names["last"] = "Succ. (last two evaluations)"
    parts = []
    for key, name in names.items():
        iid, ood = two_digits(numbers[f"iid_{key}"]), two_digits(numbers[f"ood_{key}"])
        parts.append(f"{name} IID {iid}, OOD {ood}")
    return "; ".join(parts)


def print_success(row):
    """An evaluation by task type, for --evaluate."""
    iid = row["iid_by_task"] | {"all": row["iid_success"]}
    ood = row["ood_by_task"] | {"all": row["ood_success"]}
    print(f"{'success':32}   IID   OOD")
    for name in [*sorted((iid | ood).keys() - {"all"}), "all"]:
        iid_text, ood_text = two_digits(iid.get(name)), two_digits(ood.get(name))
        print(f"{name:32}{iid_text:>6}{ood_text:>6}")


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
    shown = []
    for episode in {episode.success: episode for episode in episodes}.values():
        turns = [token_transcript(turn, tokenizer) for turn in episode.turns]
        name, variation = episode.task
        row = {"task": name, "variation": variation, "goal": episode.goal, "turns": turns}
        shown.append(row | {"success": episode.success, "score": episode.score})
    finite = [bound if math.isfinite(bound) else None for bound in bounds]
    value = {"step": step, "corridor": finite, "episodes": shown}
    write_json(os.path.join(folder, "transcripts", f"step-{step:04d}.json"), value)


def token_transcript(turn, tokenizer):
    tokens = [tokenizer.decode([token]) for token in turn.response]
    kept = {"observation": turn.observation, "action": turn.action, "invalid": turn.invalid}
    return {"tokens": tokens, "entropy": turn.entropy, **kept}
