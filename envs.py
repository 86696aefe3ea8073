"""The text worlds that an agent plays in: what a task is, what success is, what the agent reads.

How the simulators of ScienceWorld and ALFWorld are made fast is in worlds/, and so is KeyQuest, the
smallest world. Yours is a file like worlds/keyquest.py, and a line in WORLDS.
"""

import importlib
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from support.run_folder import SetupError
from worlds import chat
from worlds.alfworld import Workers, find_games, list_games
from worlds.alfworld_generate import SIZES
from worlds.compact import alfworld_prompt, scienceworld_prompt
from worlds.scienceworld import (
    ACTION,
    ACTIONS,
    Simulators,
    Start,
    allowed_simplifications,
    known_simplifications,
)

NOT_AN_ACTION = "That was not a valid action: nothing happens."


# --env: where its class is. A world of your own is a line here.
WORLDS = {
    "scienceworld": "envs:ScienceWorld",
    "alfworld": "envs:ALFWorld",
    "keyquest": "worlds.keyquest:KeyQuest",
}


def world_class(env):
    module, name = WORLDS[env].split(":")
    return getattr(importlib.import_module(module), name)


def make_world(cfg, names, compact):
    """The world of cfg.env. names: task types, () for all; compact: a tiny policy plays."""
    return world_class(cfg.env).from_config(cfg, names, compact)


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


class World:
    """Many episodes side by side, one per slot; all that the rest of the code knows of a world.

    A subclass has these methods. Who plays which task is decided outside, so a group can share
    one. An Observation of None is an episode that was lost with its simulator.

        tasks(split)         the tasks of "train", "iid" or "ood"
        start(slot, task)    begin an episode in a slot -> Observation
        act(actions)         {slot: action} -> {slot: Observation}
        gold(task)           a solution as a list of actions, for warm starts and tests
        compact_prompt(past, now)  for tiny policies; past: (Observation, action) of earlier turns
    """

    # the default turn limit; it counts the agent's turns
    turns = 30
    # the system message of chat models, the same for every turn
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
    def from_config(cls, cfg, names, compact):
        """compact: a tiny policy plays."""
        return cls(names)

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
        """Leave no process behind. Worlds are context managers, which call this."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def chat_prompt(self, past, now, think=True):
        """The messages for an instruction-tuned model: the rules, and what is seen now.

        think: it reasons first. Else it writes the action alone, and reads what the tiny ones do.
        """
        if think:
            state = chat.long_state(past, now, self.chat_objects)
        else:
            state = self.compact_prompt(past, now)
        return chat.messages(self.chat_rules, state, past, think)

    @staticmethod
    def parse_chat(text):
        """The action in a model's reply: what the last <action>…</action> holds, or None."""
        actions = re.findall(r"<action>(.*?)</action>", text, re.DOTALL)
        return " ".join(actions[-1].lower().split()) or None if actions else None

    @staticmethod
    def parse_compact(text):
        """The tiny policies write nothing but the action."""
        return " ".join(text.split()) or None


class ScienceWorld(World):
    """All 30 task types of PyPI's `scienceworld`; its train, dev, test as train, iid, ood.

    Success is score == 100 and nothing else: to wait after partial credit does not pay. A negative
    score (a wrong `focus on`) ends the episode as lost. simplifications: "easy", "none", or names,
    comma-separated; objects: also ask for the names in sight, which the chat prompt shows. Raises
    SetupError for an unknown name, or without Java.
    """

    chat_rules = (
        "You are an agent in a simulated house with a garden and laboratories. You act by writing "
        "one action a turn. These are the forms an action can have, where OBJ is an object or "
        "place in reach:\n"
        + "\n".join(f"- {form}" for form in ACTIONS)
        + "\nGo to a place through its door, one room at a time. `focus on` tells the experimenter "
        "which object is your answer: use it only where the task asks for it, a wrong one ends the "
        "task as failed. If you are asked to choose between numbered readings of an action, your "
        "next action is the number."
    )
    splits = {"train": "getVariationsTrain", "iid": "getVariationsDev", "ood": "getVariationsTest"}

    def __init__(self, names=(), simplifications="easy", objects=False, jvms=None, heap_mb=1024):
        from scienceworld.constants import ID2TASK

        super().__init__(names, sorted(ID2TASK.values()))
        self.simplifications = known_simplifications(simplifications)
        self.simulators = Simulators(jvms, heap_mb, objects)

    @classmethod
    def from_config(cls, cfg, names, compact):
        return cls(names, cfg.simplifications, objects=not compact)

    def close(self):
        self.simulators.close()

    def tasks(self, split):
        variations = self.simulators.variations(self.names, self.splits[split])
        pairs = zip(self.names, variations, strict=True)
        return [Task(name, v) for name, of_name in pairs for v in of_name]

    def start_of(self, task):
        return Start(*task, allowed_simplifications(task.name, self.simplifications))

    def gold(self, task):
        return self.simulators.gold(self.start_of(task))

    def prefetch(self, tasks):
        self.simulators.prefetch([self.start_of(task) for task in tasks])

    def start_all(self, tasks):
        states = self.simulators.reset([self.start_of(task) for task in tasks])
        return [self.observe(state) for state in states]

    def start(self, slot, task):
        return self.observe(self.simulators.restart(slot, self.start_of(task)))

    def act(self, actions):
        states = self.simulators.step(actions)
        return {slot: self.observe(state) for slot, state in states.items()}

    def is_valid(self, before, action):
        if action is None:
            return False
        is_answer = before.reply.startswith("Ambiguous request") and action.isdecimal()
        return is_answer or bool(ACTION.fullmatch(action))

    def observe(self, state):
        if state is None:
            return None
        *words, score, completed = state
        return Observation(
            *words,
            score,
            done=completed or score < 0 or score == 100,
            success=score == 100,
            invalid=state.reply.startswith("No known action matches that input."),
        )

    def compact_prompt(self, past, now):
        return scienceworld_prompt(past, now)


ALFWORLD_TASKS = (
    "look_at_obj_in_light",
    "pick_and_place_simple",
    "pick_clean_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_two_obj_and_place",
)


class ALFWorld(World):
    """ALFWorld's six task types; its train, valid_seen and valid_unseen as train, iid and ood.

    Success is the game's own `won`. A Task's variation is the folder of its game. games: "real",
    "generated" (worlds/alfworld_generate.py: the same rules and task types, other rooms, nothing to
    download), or "auto": the real ones if they were downloaded. An action must be one of the
    admissible commands, which `objects` lists; another text is not sent, and costs a turn. Raises
    SetupError for missing games, a game that cannot be played, an unknown task.
    """

    turns = 50
    chat_rules = (
        "You are an agent in a household. You reach things by going to the receptacle (a shelf, a "
        "drawer, a fridge ...) that they are in or on; you may have to open it first. You can "
        "carry one object. You act by writing one of the admissible actions a turn."
    )
    chat_objects = "Admissible actions"
    splits = {"train": "train", "iid": "valid_seen", "ood": "valid_unseen"}

    def __init__(self, names=(), games="auto", workers=None):
        super().__init__(names, ALFWORLD_TASKS)
        self.folder = find_games(games)
        self.games = "real" if self.folder else "generated"
        self.workers = Workers(workers)

    @classmethod
    def from_config(cls, cfg, names, compact):
        world = cls(names, cfg.games)
        # a resumed run plays what was found, not "auto"
        cfg.games = world.games
        return world

    def close(self):
        self.workers.close()

    def tasks(self, split):
        """Every game of a split. Real ones are listed by their folders, and not read."""
        if self.games == "generated":
            return [Task(name, f"{split}/{i}") for name in self.names for i in range(SIZES[split])]
        games = list_games(self.folder, self.splits[split], self.names)
        return [Task(name, variation) for name, variation in games]

    def game_of(self, task):
        """A file, or what to generate the game from."""
        if self.games == "real":
            return f"{self.folder}/{task.variation}/game.tw-pddl"
        split, index = task.variation.split("/")
        return split, task.name, int(index)

    def gold(self, task):
        """The game's walkthrough, None if it has none. It does not know where things are."""
        return self.workers.walkthrough(self.game_of(task))

    def prefetch(self, tasks):
        self.workers.prefetch([self.game_of(task) for task in tasks])

    def start_all(self, tasks):
        answers = self.workers.reset([self.game_of(task) for task in tasks])
        return [self.begin(task, answer) for task, answer in zip(tasks, answers, strict=True)]

    def start(self, slot, task):
        return self.begin(task, self.workers.restart(slot, self.game_of(task)))

    def act(self, actions):
        answers = self.workers.step(actions)
        return {slot: self.observe(self.last[slot], answer) for slot, answer in answers.items()}

    def is_valid(self, before, action):
        return action in before.objects

    def begin(self, task, answer):
        if isinstance(answer, str):
            raise SetupError(
                f"ALFWorld's game {self.game_of(task)} can't be played ({answer}); if it's a "
                "damaged file, fetch the games again with `alfworld-download --force`"
            )
        if answer is None:
            return None
        intro, commands, _ = answer
        pattern = r"you see (.*)\.\n\nYour task is to: (.*?)\.?\s*$"
        room, goal = re.search(pattern, intro, re.DOTALL).groups()
        reply, look = "You are in the middle of a room.", f"In the room are {room}."
        return Observation(goal, reply, look, "You are not carrying anything.", commands)

    def observe(self, before, answer):
        if answer is None:
            return None
        reply, commands, won = answer
        # to ask for the inventory costs a turn; this is what the agent can remember
        inventory = before.inventory
        if took := re.match("You pick up the (.*) from", reply):
            inventory = f"You are carrying: a {took[1]}."
        elif reply.startswith("You move the "):
            inventory = "You are not carrying anything."
        outcome = {"score": 100 * won, "done": won, "success": won}
        return Observation(before.goal, reply, before.look, inventory, commands, **outcome)

    def compact_prompt(self, past, now):
        return alfworld_prompt(past, now)
