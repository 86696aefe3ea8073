"""What a run tells people: the lines on the screen."""

import re
import sys
from contextlib import suppress

SPLITS = ("iid", "ood")
# what was collected in a step
STEP = "success {success:.2f} | entropy {entropy:.3f}{corridor} | {outside:.0%} of tokens outside"
STEP += " | kl {kl:.4f} | invalid {invalid:.0%} | {turns} turns"
STEP += " | no advantage in {equal:.0f} of {groups} groups"


def read_arguments(parser, program, arguments=None):
    """The command line; one that is wrong ends in one line and status 2."""
    # Greek letters, into a pipe of ASCII; what a notebook or a test prints to has no encoding
    with suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")
    parser.error = lambda message: parser.exit(2, f"{program}: {message}; see --help\n")
    for argument in sys.argv[1:] if arguments is None else arguments:
        if re.search(r"[\0-\x1f\x7f\ud800-\udfff]", argument):
            parser.error(f"{argument!r:.60} has characters that cannot be printed")
    return parser.parse_args(arguments)


def print_header(cfg, policy, train_tasks):
    """The settings that were decided, and what plays where."""
    decided = [f"{name} {value}" for name, value in cfg.unusual().items()]
    print(f"settings: {', '.join(decided)}")
    print(f"{cfg.env}, {len(train_tasks)} train tasks; writing to {cfg.out}")
    print(f"{cfg.model} on {policy.model.device.type}", flush=True)


def line(row):
    """What is printed of a step."""
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
