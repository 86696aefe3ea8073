"""The text worlds, as the rest of the code knows them. Each is a file in worlds/: begin yours with
a copy of keyquest.py, the smallest, and add it to WORLDS."""

import pkgutil
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import NamedTuple

from support.run_folder import SetupError

# --env: the class, of the file in worlds/ that has its name
WORLDS = {"scienceworld": "ScienceWorld", "alfworld": "ALFWorld", "keyquest": "KeyQuest"}
NOT_AN_ACTION = "That was not a valid action: nothing happens."
THINK_FIRST = (
    "First reason about the next step in <think>…</think>, then write exactly one action in "
    "<action>…</action>."
)
ACTION_ALONE = "Reply with one action in <action>…</action> and nothing else."


def world_class(env):
    return pkgutil.resolve_name(f"worlds.{env}:{WORLDS[env]}")


def make_world(cfg, compact):
    """The world of cfg.env. compact: a tiny policy plays, which reads the short prompt."""
    return world_class(cfg.env).from_config(cfg, compact)


class Task(NamedTuple):
    """What one episode plays; the members of a group share it."""

    name: str
    variation: int | str


@dataclass
class Observation:
    """What the agent may know at a turn, and how the episode stands."""

    goal: str  # the task in the world's words
    reply: str  # the answer to the last action
    look: str  # what is in sight
    inventory: str
    objects: tuple = ()  # names that an action can refer to
    score: int = 0  # 0 to 100; below 0 the episode is lost
    done: bool = False
    success: bool = False  # the reward, unless --reward asks for the score
    invalid: bool = False  # the last text held no valid action


class World(AbstractContextManager):
    """Many episodes side by side, one per slot. A subclass has these methods:

    tasks(split)               the tasks of "train", "iid" or "ood"
    start(slot, task)          begin an episode -> Observation, None: lost with its simulator
    act(actions)               {slot: action} -> {slot: Observation, None if it was lost}
    compact_prompt(past, now)  the short one; past: (Observation, action) of earlier turns
    gold(task)                 for warm starts alone: a solution as a list of actions
    demonstrations(rng, rare)  for them, too: a classmethod -> lists of (prompt, action) to clone
                               a tiny policy from; rare: a share, of a confident start
    """

    turns = 30
    chat_rules = ""  # the system message; without one some chat templates put in theirs
    chat_objects = "You can refer to"

    def __init__(self, names, known):
        """names: task types, () for all. Raises SetupError for one that is not known."""
        if unknown := [name for name in names if name not in known]:
            message = f"unknown {type(self).__name__} task {unknown[0]!r}"
            raise SetupError(f"{message}; there are: {', '.join(known)}")
        self.names = tuple(names) or tuple(known)
        self.last = {}  # slot -> its last Observation

    @classmethod
    def from_config(cls, cfg, compact):
        return cls(cfg.task_names)

    @classmethod
    def asks(cls, given):
        """The settings that the world decides. given: {name: value} of those decided before."""
        return {"turns": cls.turns}

    def reset(self, tasks):
        """Start one episode per task, in slots 0, 1, … -> a list of Observations."""
        self.last = dict(enumerate(self.start_all(tasks)))
        return list(self.last.values())

    def start_all(self, tasks):
        return [self.start(slot, task) for slot, task in enumerate(tasks)]

    def step(self, actions):
        """{slot: action, or None if the policy wrote none} -> {slot: Observation}"""
        valid = {slot: a for slot, a in actions.items() if self.is_valid(self.last[slot], a)}
        after = self.act(valid)
        # what is no action is not sent to the world, and costs a turn
        for slot in actions.keys() - valid.keys():
            after[slot] = replace(self.last[slot], reply=NOT_AN_ACTION, invalid=True)
        self.last |= after
        return after

    def is_valid(self, before, action):
        return action is not None

    def prefetch(self, tasks):
        """Begin the work of reset(tasks) in the background, if there is any."""

    def __exit__(self, *_):
        """Leave no process behind."""

    def play(self, tasks, plans):
        """Play lists of actions side by side -> [(last Observation, [(Observation, action)])]"""
        self.reset(tasks)
        past = [[] for _ in tasks]
        for row in zip_longest(*plans):
            going = [slot for slot, o in self.last.items() if o and not o.done and not o.invalid]
            actions = {slot: row[slot] for slot in going if row[slot]}
            for slot in actions:
                past[slot].append((self.last[slot], actions[slot]))
            self.step(actions)
        return list(zip(self.last.values(), past))

    def solutions(self, tasks):
        """The [(Observation, action)] of each task that its gold actions solve."""
        played = self.play(tasks, [self.gold(task) for task in tasks])
        return [past for last, past in played if last and last.success]

    def chat_prompt(self, past, now, think=True):
        """-> what a chat model is told, by the system and by the user. think: it reasons first."""
        form = THINK_FIRST if think else ACTION_ALONE
        state = self.long_state(past, now) if think else self.compact_prompt(past, now)
        if past and past[-1][1] is None:
            state = f"Your last reply had no action. {form}\n\n{state}"
        return f"{self.chat_rules}\n\n{form}", state

    def long_state(self, past, now):
        """What the agent knows, with its last two turns (as the paper)."""
        told = [f"Task: {now.goal}", f"Turns taken so far: {len(past)}"]
        for before, action in past[-2:]:
            told.append(f"Earlier observation: {before.reply.strip()}")
            told.append(f"Your action then: {action or '(none that was valid)'}")
        told += [f"\nObservation now: {now.reply.strip()}", now.look.strip(), now.inventory.strip()]
        # ALFWorld has it, and it is of no use
        if objects := ", ".join(name for name in now.objects if name != "help"):
            told.append(f"{self.chat_objects}: {objects}")
        return "\n".join(told)

    def parse_chat(self, text):
        """The action in a model's reply: what the last <action>…</action> holds, or None."""
        actions = re.findall(r"<action>(.*?)</action>", spoken(text), re.DOTALL)
        return self.parse_compact(actions[-1].lower()) if actions else None

    def parse_compact(self, text):
        return " ".join(text.split()) or None


def spoken(text):
    """A reply without its thoughts, of which the last may be open still."""
    return re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.DOTALL)


def demonstration(prompt, past):
    """[(Observation, action)] of an episode -> [(prompt, action)]. prompt: a World's method."""
    return [(prompt(past[:i], now), action) for i, (now, action) in enumerate(past)]
