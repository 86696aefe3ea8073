"""The text worlds that an agent plays in, as the rest of the code knows them.

Each world is a file in worlds/: what it means, its class, its prompts, its demonstrations. Begin
yours with a copy of worlds/keyquest.py, the smallest, and add its line to WORLDS.
"""

import pkgutil
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

from support.run_folder import SetupError

# --env: where its class is. A world of your own is a line here.
WORLDS = {
    "scienceworld": "worlds.scienceworld:ScienceWorld",
    "alfworld": "worlds.alfworld:ALFWorld",
    "keyquest": "worlds.keyquest:KeyQuest",
}
NOT_AN_ACTION = "That was not a valid action: nothing happens."
THINK_FIRST = (
    "First reason about the next step in <think>…</think>, then write exactly one action in "
    "<action>…</action>."
)
ACTION_ALONE = "Reply with one action in <action>…</action> and nothing else."


def world_class(env):
    return pkgutil.resolve_name(WORLDS[env])


def make_world(cfg, compact):
    """The world of cfg.env. compact: a tiny policy plays, which reads the short prompt."""
    return world_class(cfg.env).from_config(cfg, compact)


class Task(NamedTuple):
    """What one episode plays; the members of a group share it."""

    name: str
    variation: int | str


@dataclass
class Observation:
    """What the agent may know at a turn, and how the episode stands.

    goal: the task in the world's words; reply: the answer to the last action; look: what is in
    sight; objects: names that an action can refer to; score: 0 to 100, below 0 is lost; invalid:
    the last text held no valid action. Only `success` is rewarded.
    """

    goal: str
    reply: str
    look: str
    inventory: str
    objects: tuple = ()
    score: int = 0
    done: bool = False
    success: bool = False
    invalid: bool = False


class World(AbstractContextManager):
    """Many episodes side by side, one per slot; all that the rest of the code knows of a world.

    A subclass has these methods. Who plays which task is decided outside, so a group can share
    one. An Observation of None is an episode that was lost with its simulator.

        tasks(split)         the tasks of "train", "iid" or "ood"
        start(slot, task)    begin an episode in a slot -> Observation
        act(actions)         {slot: action} -> {slot: Observation}
        gold(task)           a solution as a list of actions, for warm starts and tests
        compact_prompt(past, now)  for tiny policies; past: (Observation, action) of earlier turns
        demonstrations(rng, rare)  a classmethod -> lists of (prompt, action) to clone a tiny
                             policy from; rare: a share, of a confident start
    """

    # the default turn limit; it counts the agent's turns
    turns = 30
    # the system message of chat models, at every turn; without one some templates put in theirs
    chat_rules = ""
    chat_objects = "You can refer to"

    def __init__(self, names, known):
        """names: task types, () for all. Raises SetupError for one that is not known."""
        for name in names:
            if name not in known:
                message = f"unknown {type(self).__name__} task {name!r}"
                raise SetupError(f"{message}; there are: {', '.join(known)}")
        self.names = tuple(names) or tuple(known)
        # slot -> the last Observation
        self.last = {}

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

    def restart(self, slot, task):
        """Start an episode in one slot, beside those that are being played -> Observation."""
        self.last[slot] = self.start(slot, task)
        return self.last[slot]

    def step(self, actions):
        """{slot: action, or None if the policy wrote none} -> {slot: Observation}

        A text that is no action is not sent to the world, and costs a turn.
        """
        valid = {slot: a for slot, a in actions.items() if self.is_valid(self.last[slot], a)}
        after = self.act(valid)
        for slot in actions.keys() - valid.keys():
            after[slot] = replace(self.last[slot], reply=NOT_AN_ACTION, invalid=True)
        self.last |= after
        return after

    def start_all(self, tasks):
        return [self.start(slot, task) for slot, task in enumerate(tasks)]

    def is_valid(self, before, action):
        return action is not None

    def prefetch(self, tasks):
        """Begin the work of reset(tasks) in the background, if there is any."""

    def close(self):
        """Leave no process behind. A `with` block calls this at its end."""

    def __exit__(self, *_):
        self.close()

    def play(self, tasks, plans):
        """Play lists of actions side by side -> [(last Observation, [(Observation, action)])]"""
        now = dict(enumerate(self.reset(tasks)))
        past = [[] for _ in tasks]
        for t in range(max(map(len, plans), default=0)):
            playing = [slot for slot, o in now.items() if o and not o.done and not o.invalid]
            actions = {slot: plans[slot][t] for slot in playing if t < len(plans[slot])}
            for slot in actions:
                past[slot].append((now[slot], actions[slot]))
            now |= self.step(actions)
        return list(zip(now.values(), past))

    def plan(self, task):
        return self.gold(task) or []

    def solutions(self, tasks):
        """[(Observation, action)] of each task that its plan, the gold one or better, solves."""
        played = self.play(tasks, [self.plan(task) for task in tasks])
        return [past for last, past in played if last and last.success]

    def chat_prompt(self, past, now, think=True):
        """The messages for an instruction-tuned model: the rules, and what is seen now.

        think: it reasons first. Else it writes the action alone, and reads what the tiny ones do.
        """
        form = THINK_FIRST if think else ACTION_ALONE
        rules = f"{self.chat_rules}\n\n{form}"
        state = self.long_state(past, now) if think else self.compact_prompt(past, now)
        if past and past[-1][1] is None:
            state = f"Your last reply had no action. {form}\n\n{state}"
        return [{"role": "system", "content": rules}, {"role": "user", "content": state}]

    def long_state(self, past, now):
        """What the agent knows, with its last two turns (as the paper)."""
        parts = [f"Task: {now.goal}", f"Turns taken so far: {len(past)}"]
        for before, action in past[-2:]:
            parts.append(f"Earlier observation: {before.reply.strip()}")
            parts.append(f"Your action then: {action or '(none that was valid)'}")
        parts += ["", f"Observation now: {now.reply.strip()}"]
        parts += [now.look.strip(), now.inventory.strip()]
        # ALFWorld has it, and it is of no use
        if objects := ", ".join(name for name in now.objects if name != "help"):
            parts.append(f"{self.chat_objects}: {objects}")
        return "\n".join(parts)

    @staticmethod
    def parse_chat(text):
        """The action in a model's reply: what the last <action>…</action> holds, or None."""
        actions = re.findall(r"<action>(.*?)</action>", spoken(text), re.DOTALL)
        return " ".join(actions[-1].lower().split()) or None if actions else None

    @staticmethod
    def parse_compact(text):
        return " ".join(text.split()) or None


def spoken(text):
    """A reply without its thoughts, of which the last may be open still."""
    return re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.DOTALL)


def templated(tokenizer, messages, system_role, think):
    """The text of a prompt. system_role: the chat template has one; else all is the user's."""
    if not system_role:
        text = "\n\n".join(message["content"] for message in messages)
        messages = [{"role": "user", "content": text}]
    # the switch of Qwen3 and others; a template that has none does not read it
    more = {"add_generation_prompt": True, "enable_thinking": think}
    return tokenizer.apply_chat_template(messages, tokenize=False, **more)


def demonstration(prompt, past):
    """[(Observation, action)] of an episode -> [(prompt, action)]. prompt: a World's method."""
    return [(prompt(past[:i], now), action) for i, (now, action) in enumerate(past)]
