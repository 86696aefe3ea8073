"""The folder of a run (docs/running.md lists it): nothing is written half, nothing read is trusted.

The row of a step is written before its checkpoint, so a kill leaves at most a row too many, which
--resume drops. A damaged file is one line that names it.
"""

import fcntl
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path

# the project's folder
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# of every version's config.json, and of every checkpoint
ALWAYS = {"env": str, "model": str, "algo": str, "steps": int}
SAVED = {"step": int, "model": dict, "history": list, "optimizer": dict}


class SetupError(Exception):
    """Something that the user must mend; its text is one line: what is wrong, and what to do."""


def write_whole(path, save, mark=None):
    """Write a file, and its folder, whole or not at all: a kill or a full disk leaves the old one.

    save(file) writes bytes. Raises SetupError, also if the old one lacks the bytes `mark`.
    """
    try:
        if mark and os.path.exists(path) and mark not in Path(path).read_bytes():
            raise SetupError(f"{path} is not of this program; use another --out")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.new", "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.new", path)
    except (OSError, RuntimeError) as error:
        # torch.save turns an OSError into a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__ or error
        with suppress(OSError):
            os.remove(f"{path}.new")
        reason = getattr(cause, "strerror", None) or one_line(cause)
        raise SetupError(f"could not write {path} ({reason}); the old one is untouched") from error


def write_json(path, value):
    write_whole(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def one_line(error):
    """An exception's message cut to one line of at most 150 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:150]


def damaged(path, reason):
    return SetupError(f"{path} cannot be read ({reason}); repair it, or use another run folder")


@contextmanager
def locked(folder):
    """Keep other processes from writing to `folder`; the lock ends with the process that has it."""
    with open(Path(folder, "lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SetupError(f"another process is writing to {folder}; wait for it") from error
        yield


def read_config(folder):
    """The settings of a run -> dict. Raises SetupError for a missing or damaged config.json."""
    path = Path(folder, "config.json")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, one_line(error)) from error
    return with_types(config, ALWAYS, path)


def with_types(values, kinds, path):
    """`values`, as they were read, if they are a dict with these types. Raises SetupError."""
    for name, kind in kinds.items():
        if not isinstance(values, dict) or type(values.get(name)) is not kind:
            raise damaged(path, f"its {name} is missing, or not of type {kind.__name__}")
    return values


def read_log(folder):
    """The rows of log.jsonl, [] if there is none, without half a last one. Raises SetupError."""
    path, rows = Path(folder, "log.jsonl"), []
    try:
        for line in path.read_bytes().split(b"\n")[:-1]:
            row = json.loads(line)
            is_next = isinstance(row, dict) and row.get("step") == len(rows)
            if not is_next or not all(map(is_metric, row.values())):
                raise ValueError(f"not the numbers of step {len(rows)}")
            rows.append(row)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"line {len(rows) + 1}: {one_line(error)}") from error
    return rows


def is_metric(value):
    """True for what a log can hold: None, a finite number, or a list or dict of them."""
    if type(value) is dict:
        value = list(value.values())
    values = value if type(value) is list else [value]
    # nan is not below anything, and no metric is so large
    return all(v is None or (type(v) in (int, float) and abs(v) < 1e100) for v in values)


def append_row(folder, row):
    """Add a row to log.jsonl, in six digits. Raises SetupError: no room for it, or no numbers."""
    if wrong := [name for name, value in row.items() if not is_metric(value)]:
        message = "the last checkpoint is untouched; begin a run with lower learning rates"
        raise SetupError(f"step {row['step']}: {wrong[0]} is not a finite number; {message}")
    six_digits = lambda number: float(f"{float(number):.6g}")
    row = json.loads(json.dumps(row), parse_float=six_digits)
    write_log(folder, [*read_log(folder), row])


def write_log(folder, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(Path(folder, "log.jsonl"), lambda file: file.write(text.encode()))


def rewind(folder, first):
    """Drop the row of step `first`, which the checkpoint does not hold. Raises SetupError."""
    rows = read_log(folder)
    # a kill leaves no others
    if not first <= len(rows) <= first + 1:
        reason = f"it has {len(rows)} rows, but the checkpoint goes on at step {first}"
        raise damaged(Path(folder, "log.jsonl"), reason)
    write_log(folder, rows[:first])


def is_new(folder):
    """True if nothing would be lost: no folder, an empty one, or one that no run has begun in."""
    found = os.listdir(folder) if os.path.exists(folder) else []
    # a run that was killed as it began leaves these two
    return {"lock", "config.json.new"}.issuperset(found)


def refuse_existing(folder):
    if not is_new(folder):
        raise SetupError(f"{folder} exists already; continue it with --resume, or name another")


def save_tensors(path, state):
    import torch

    write_whole(path, lambda file: torch.save(state, file))


def load_checkpoint(path):
    """-> the state, on the CPU. Raises SetupError for a missing or damaged file, or another's."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # of many kinds, whose messages are about torch
        raise damaged(path, getattr(error, "strerror", None) or "it is damaged") from error
    return with_types(state, SAVED, path)


def form(value):
    """Types, names, lengths, and of tensors what a kernel trusts: equal for two that are alike."""
    if isinstance(value, dict):
        return {name: form(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [type(value), *map(form, value)]
    if not hasattr(value, "layout"):
        return type(value)
    plain = str(value.layout) == "torch.strided" and not (value.is_nested or value.is_meta)
    return plain and (value.dtype, value.shape, value.stride())
