"""What a run leaves on the disk, and how it is read again: nothing half written, nothing trusted.

    config.json     every setting, resolved       log.jsonl       a row per step
    checkpoint.pt   what resuming needs           tasks.json      the evaluation tasks
    transcripts/    episodes as text and JSON     lock            held by the process that writes

A file is written whole or not at all. The row of a step is written before its checkpoint, so a
kill leaves at most a row too many, which --resume drops. A damaged file is one line that names it.
"""

import fcntl
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path

# the project's folder
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ANOTHER = "repair it, or use another run folder"
# of every version's config.json
ALWAYS = {"env": str, "model": str, "algo": str, "steps": int}


class SetupError(Exception):
    """Something that the user must mend; its text is one line: what is wrong, and what to do."""


def write_whole(path, save, mark=None):
    """Write a file, and its folder, whole or not at all: a kill or a full disk leaves the old one.

    save(file) writes bytes. mark: bytes without which the old one is another program's, and stays.
    Raises SetupError in one line.
    """
    try:
        if mark and os.path.exists(path) and mark not in Path(path).read_bytes():
            raise SetupError(f"{path} is not of this program; use another --out")
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path + ".new", "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".new", path)
    except (OSError, RuntimeError) as error:
        # torch.save turns an OSError into a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__ or error
        with suppress(OSError):
            os.remove(path + ".new")
        reason = getattr(cause, "strerror", None) or one_line(cause)
        message = f"could not write {path} ({reason}); the file there before is untouched"
        raise SetupError(message) from error


def write_json(path, value):
    write_whole(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def one_line(error):
    """An exception's message cut to one line of at most 150 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:150]


def damaged(path, reason):
    return SetupError(f"{path} cannot be read ({reason}); {ANOTHER}")


@contextmanager
def locked(folder):
    """Keep other processes from writing to `folder`; the lock ends with the process that has it."""
    with open(os.path.join(folder, "lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            wait = "wait for it, or use another --out"
            raise SetupError(f"another process is writing to {folder}; {wait}") from error
        yield


def read_config(folder):
    """The settings of a run -> dict. Raises SetupError for a missing or damaged config.json."""
    path = os.path.join(folder, "config.json")
    try:
        config = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError as error:
        raise SetupError(f"{folder} is not a run folder: it has no config.json") from error
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, one_line(error)) from error
    if not isinstance(config, dict):
        raise damaged(path, "not a JSON object")
    for name, kind in ALWAYS.items():
        if type(config.get(name)) is not kind:
            raise damaged(path, f"its {name} is missing, or not of type {kind.__name__}")
    return config


def read_log(folder):
    """The rows of log.jsonl -> list of dicts, [] if there is none; half a last row is left out.

    Raises SetupError unless row i is an object with step i, and all its values are numbers.
    """
    path = os.path.join(folder, "log.jsonl")
    try:
        lines = Path(path).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise damaged(path, one_line(error)) from error
    rows = []
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise damaged(path, f"line {number + 1} is not JSON") from error
        if not isinstance(row, dict) or row.get("step") != number:
            raise damaged(path, f"line {number + 1} is not the row of step {number}")
        for name, value in row.items():
            if not is_metric(value):
                raise damaged(path, f"line {number + 1}: {name!r:.30} is not what a run writes")
        rows.append(row)
    return rows


def is_metric(value):
    """True for what a log can hold: None, a finite number, or a list or dict of them."""
    if type(value) is dict:
        value = list(value.values())
    values = value if type(value) is list else [value]
    # nan is not below anything, and no metric is so large
    return all(v is None or (type(v) in (int, float) and abs(v) < 1e100) for v in values)


def append_row(folder, row):
    """Add a row to log.jsonl and see it on the disk. Raises SetupError: no room, or no numbers."""
    path = os.path.join(folder, "log.jsonl")
    if wrong := [name for name, value in row.items() if not is_metric(value)]:
        message = "the last checkpoint is untouched; begin a run with lower learning rates"
        raise SetupError(f"step {row['step']}: {wrong[0]} is not a finite number; {message}")
    # six significant digits
    text = json.dumps(row, allow_nan=False)
    row = json.loads(text, parse_float=lambda number: float(f"{float(number):.6g}"))
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise SetupError(f"could not write {path} ({error.strerror}); --resume goes on") from error


def refuse_existing(folder):
    if not is_new(folder):
        message = "continue it with --resume, or choose another folder with --out"
        raise SetupError(f"{folder} exists already; {message}")


def begin(folder, config, tasks):
    """Make the folder of a new run. config: dict; tasks: {split: tasks of the evaluations}."""
    # another run may have begun a moment ago
    refuse_existing(folder)
    # with it the folder is the run's
    write_json(os.path.join(folder, "config.json"), config)
    write_json(os.path.join(folder, "tasks.json"), tasks)


def rewind(folder, first):
    """Drop the rows that the checkpoint does not hold: those from step `first` on, and half a row.

    Raises SetupError, and writes nothing, if a row before `first` is missing, or if more than that
    row would be lost: no kill leaves that.
    """
    rows = read_log(folder)
    if not first <= len(rows) <= first + 1:
        path = os.path.join(folder, "log.jsonl")
        reason = f"it has {len(rows)} rows, but the checkpoint goes on at step {first}"
        raise damaged(path, reason)
    text = "".join(json.dumps(row) + "\n" for row in rows[:first])
    write_whole(os.path.join(folder, "log.jsonl"), lambda file: file.write(text.encode()))


def save_tensors(path, state):
    """state: tensors, numbers, strings, and lists and dicts of them."""
    import torch

    write_whole(path, lambda file: torch.save(state, file))


def load_checkpoint(path):
    """-> the state, on the CPU. Raises SetupError for a missing or damaged file, or another's."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # of many kinds, whose messages are about torch
        damage = "damaged, or not written by train.py"
        raise damaged(path, getattr(error, "strerror", None) or damage) from error
    kinds = {"step": int, "model": dict, "history": list, "optimizer": dict}
    values = state if isinstance(state, dict) else {}
    if any(type(values.get(name)) is not kind for name, kind in kinds.items()):
        raise damaged(path, "it is no checkpoint of train.py")
    return state


def form(value):
    """Types, names, lengths, and of tensors what a kernel trusts: equal for two that are alike."""
    import torch

    if isinstance(value, dict):
        return {name: form(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [type(value), *map(form, value)]
    if not isinstance(value, torch.Tensor):
        return type(value)
    plain = value.layout == torch.strided and not (value.is_nested or value.is_meta)
    return plain and (value.dtype, value.shape, value.stride())


def is_new(folder):
    """True if nothing would be lost: no folder, an empty one, or one that no run has begun in."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise SetupError(f"{folder} is a file; choose another folder with --out")
    # a run that was killed as it began leaves these two
    return not os.path.isdir(folder) or {"lock", "config.json.new"}.issuperset(os.listdir(folder))
