"""What a run tells people: the lines on the screen, and transcripts of episodes."""

import math
import re
import sys
from contextlib import suppress

from tqdm import tqdm

from support.run_folder import write_json

SPLITS = ("iid", "ood")
# what was collected in a step
STEP = "success {success:.2f} | entropy {entropy:.3f}{corridor} | {outside:.0%} of tokens outside"
STEP += " | kl {kl:.4f} | invalid {invalid:.0%} | {turns} turns"
STEP += " | no advantage in {equal:.0f} of {groups} groups"


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
    print(f"settings: {', '.join(decided)}")
    size = policy.model.num_parameters() / 1e6
    print(f"{cfg.env}, {len(train_tasks)} train tasks; writing to {cfg.out}")
    print(f"{cfg.model} ({size:.2g} M parameters) on {policy.model.device.type}", flush=True)


def print_step(cfg, row):
    """The line of a step; after a first one without any reward, what to do."""
    print(line(row), flush=True)
    if row["step"] == 0 and row.get("reward") == 0:
        # only a chat model has the setting "think"
        model = f"--model {cfg.model} " if cfg.think else ""
        start = f"python -m tools.warmstart --env {cfg.env} {model}--out models/warm"
        print(f"  no episode won, so advantages come from penalties alone; warm-start with {start}")


def line(row):
    parts = [f"step {row['step']:3d}"]
    if "success" in row:
        bounds = ""
        if row["corridor_high"] is not None:
            bounds = " in [{corridor_low:.3f}, {corridor_high:.3f}]".format(**row)
        more = {"kl": 0.0, "corridor": bounds, "equal": row["uniform"] * row["groups"]}
        parts.append(STEP.format(**more | row))
        if row["lost"]:
            parts.append(f"{row['lost']} episodes lost")
    if "iid_success" in row:
        parts.append(f"evaluation: {on_splits(row)}")
    parts.append(f"{row['seconds']:.0f} s")
    return " | ".join(parts)


def last_line(rows):
    """What a run came to, from the rows of its log."""
    first, *_, last = [row for row in rows if "iid_success" in row] * 2
    return f"success before {on_splits(first)}; after {on_splits(last)}"


def on_splits(row):
    return f"IID {two_digits(row['iid_success'])}, OOD {two_digits(row['ood_success'])}"


def two_digits(success):
    """A share of won episodes as text; "lost" for None."""
    return "lost" if success is None else f"{success:.2f}"


def save_token_transcripts(folder, step, episodes, corridor, tokenizer):
    """A won and a lost episode of a step, if there are both. corridor: its ends, in nats."""
    shown = []
    for episode in {episode.success: episode for episode in episodes}.values():
        turns = []
        for turn in episode.turns:
            tokens = [tokenizer.decode([token]) for token in turn.response]
            kept = {"observation": turn.observation, "action": turn.action, "invalid": turn.invalid}
            turns.append({"tokens": tokens, "entropy": turn.entropy, **kept})
        name, variation = episode.task
        shown.append({**vars(episode), "task": name, "variation": variation, "turns": turns})
    finite = [end if math.isfinite(end) else None for end in corridor]
    value = {"step": step, "corridor": finite, "episodes": shown}
    write_json(f"{folder}/transcripts/step-{step:04d}.json", value)
