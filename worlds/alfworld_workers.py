"""ALFWorld's games: where they are, and a few worker processes that play them, each many episodes.

A game is a path, or (split, task type, index) of a generated one. An answer of the engine is
(reply, admissible commands, won), a text if the game cannot be played, or None if it is marked
unsolvable or was lost with its process.
"""

import importlib.util
import os
import sys
from glob import glob

from support.run_folder import SetupError
from worlds.alfworld_engine import Worker

PACKAGES = ("alfworld", "textworld", "fast_downward")


def require_packages():
    """Raises SetupError unless ALFWorld's packages are here. Only workers import them."""
    if all(importlib.util.find_spec(name) for name in PACKAGES):
        return
    major, minor, *_ = sys.version_info
    if (major, minor) > (3, 12):
        message = f"ALFWorld needs Python 3.11 or 3.12, and this is {major}.{minor}"
        why = "for which there is no fast-downward-textworld"
        raise SetupError(f"{message}, {why}; install the project anew with one of those")
    raise SetupError("ALFWorld is not installed: `pip install -r requirements.txt`")


def find_alfworld():
    """The folder with ALFWorld's train, valid_seen and valid_unseen, or None without a download.

    Raises SetupError if ALFWORLD_DATA names a folder without them.
    """
    data = os.environ.get("ALFWORLD_DATA")
    folder = os.path.join(data or os.path.expanduser("~/.cache/alfworld"), "json_2.1.1")
    if os.path.isdir(folder):
        return folder
    if data:
        message = f"ALFWORLD_DATA is {data!r}, but there is no folder json_2.1.1 in it"
        mend = "fetch the games with `alfworld-download`, or unset ALFWORLD_DATA"
        raise SetupError(f"{message}; {mend}")


def find_games(games):
    """games: "real", "generated" or "auto" -> the folder of the real ones, None for generated."""
    require_packages()
    folder = None if games == "generated" else find_alfworld()
    if games == "real" and folder is None:
        mend = "fetch them with `alfworld-download`, set ALFWORLD_DATA to where they are"
        message = f"no ALFWorld games found in ~/.cache/alfworld; {mend}"
        raise SetupError(f"{message}, or use --games generated")
    return folder


def list_games(folder, split, names):
    """(task type, game's folder) of every game of a split. No game is read. Raises SetupError."""
    path, games = os.path.join(folder, split), []
    files = glob("*/*/game.tw-pddl", root_dir=path)
    for task, trial, _ in sorted(file.split(os.sep) for file in files):
        name = task.split("-")[0]
        if name in names and "Sliced" not in task:
            games.append((name, f"{split}/{task}/{trial}"))
    if missing := set(names) - {name for name, _ in games}:
        message = f"{path} has no game of type {min(missing)}"
        raise SetupError(f"{message}; fetch the games with `alfworld-download`")
    return games


class Workers:
    """Episodes in slots 0, 1, …, spread over a few processes."""

    def __init__(self, workers=None):
        self.workers = [Worker() for _ in range(workers or min(os.cpu_count() or 1, 4))]
        # slot -> (worker, number of its environment there)
        self.homes = {}
        # game -> the worker that has read it
        self.owners = {}
        # the games of a prefetch and the requests sent for them, by worker
        self.pending = (None, {})

    def close(self):
        for worker in self.workers:
            worker.close()

    def walkthrough(self, game):
        """A game's own solution, or None. It searches as an agent must."""
        worker = self.owners.get(game, 0)
        answers = self._ask({worker: [("walkthrough", None, game)]})[worker]
        return answers[0] if answers and isinstance(answers[0], list) else None

    def prefetch(self, games):
        """Begin `reset` in the background. Until then, nothing else may be asked."""
        # what was prefetched for other games is dropped
        self._collect()
        # the members of a group share a worker: what it has read once serves them all
        distinct = dict.fromkeys(games)
        self.owners = {game: i % len(self.workers) for i, game in enumerate(distinct)}
        self.homes, batches = {}, {}
        for slot, game in enumerate(games):
            worker = self.owners[game]
            batch = batches.setdefault(worker, [])
            self.homes[slot] = (worker, len(batch))
            batch.append(("load", len(batch), game))
        for worker, batch in batches.items():
            self.workers[worker].ask(batch)
        self.pending = (games, batches)

    def reset(self, games):
        """Start a game in each of the slots 0, 1, … -> an answer of each."""
        if self.pending[0] != games:
            self.prefetch(games)
        answers = self._collect()
        return [answers[worker][number] for worker, number in self.homes.values()]

    def restart(self, slot, game):
        # beside those that reset began, in an environment of its own
        worker, number = self.homes.setdefault(slot, (slot % len(self.workers), f"slot {slot}"))
        # a worker that died has a successor
        for _ in range(2):
            if answers := self._ask({worker: [("load", number, game)]})[worker]:
                return answers[0]

    def step(self, commands):
        """{slot: command} -> {slot: answer}; of a game that fails, None."""
        batches = {}
        for slot, command in commands.items():
            worker, number = self.homes[slot]
            batches.setdefault(worker, {})[slot] = ("step", number, command)
        answers = self._ask({worker: list(batch.values()) for worker, batch in batches.items()})
        after = {}
        for worker, batch in batches.items():
            # None: the worker died
            for slot, answer in zip(batch, answers[worker] or [None] * len(batch), strict=True):
                after[slot] = answer if isinstance(answer, tuple) else None
        return after

    def _ask(self, batches):
        # a prefetch that nobody waited for would answer first
        if self.pending[1]:
            self._collect()
        for worker, batch in batches.items():
            self.workers[worker].ask(batch)
        return {worker: self.workers[worker].answers() for worker in batches}

    def _collect(self):
        """The answers to a prefetch, by worker."""
        (_, batches), self.pending = self.pending, (None, {})
        answers = {worker: self.workers[worker].answers() for worker in batches}
        for _ in range(2):
            # they died, perhaps long ago: again in their successors
            lost = {worker: batches[worker] for worker in batches if answers[worker] is None}
            answers |= self._ask(lost)
        if None in answers.values():
            message = "a process that plays ALFWorld died three times while it loaded games"
            mend = "see whether the machine has memory left, or play fewer --tasks-per-step"
            raise SetupError(f"{message}; {mend}")
        return answers
