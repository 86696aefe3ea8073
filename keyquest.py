"""KeyQuest, a world in pure Python, for tests and laptops; it shows what a world of yours needs."""
import random

from envs import NOT_AN_ACTION, Observation, SetupError, Task, World


class KeyQuest(World):
    """A corridor of rooms; find the key, carry it to the chest, open it. The only reward is at the end, 5 to 25 turns away.

    A variation is the seed of a layout. short has 4 rooms and long 6; "ood" layouts have two rooms more than any in training.
    """
    name = "keyquest"
    chat_rules = "You are in a corridor of rooms. Your actions are: west, east, take key, open chest."
    types = {"short": 4, "long": 6}
    splits = {"train": range(0, 200), "iid": range(200, 250), "ood": range(250, 300)}

    def __init__(self, names=()):
        if unknown := [n for n in names if n not in self.types]:
            raise SetupError(f"unknown KeyQuest task {unknown[0]!r}; there are: {', '.join(self.types)}")
        self.names, self.games = tuple(names) or tuple(self.types), {}

    def tasks(self, split):
        return [Task(name, v) for name in self.names for v in self.splits[split]]

    def reset(self, tasks):
        return [self.restart(slot, task) for slot, task in enumerate(tasks)]

    def restart(self, slot, task):
        rooms = self.types[task.name] + (2 if task.variation in self.splits["ood"] else 0)
        key, chest, here = random.Random(f"{task.name} {task.variation}").sample(range(rooms), 3)
        self.games[slot] = {"rooms": rooms, "key": key, "chest": chest, "here": here}    # key None: the agent carries it
        return self._observe(slot, "You wake up.")

    def step(self, actions):
        return {slot: self._step(slot, action) for slot, action in actions.items()}

    def _step(self, slot, action):
        g = self.games[slot]
        if action in ("west", "east"):
            here = g["here"] + (1 if action == "east" else -1)
            moved = 0 <= here < g["rooms"]
            g["here"] = here if moved else g["here"]
            return self._observe(slot, "You walk." if moved else "A wall.")
        if action == "take key" and g["key"] == g["here"]:
            g["key"] = None
            return self._observe(slot, "Taken.")
        if action == "open chest" and g["chest"] == g["here"]:
            return self._observe(slot, "It opens!" if g["key"] is None else "It is locked.", opened=g["key"] is None)
        return self._observe(slot, NOT_AN_ACTION if action is None else "You can not.", invalid=True)

    def _observe(self, slot, reply, opened=False, invalid=False):
        g = self.games[slot]
        look = " ".join(thing for thing in ("key", "chest") if g[thing] == g["here"]) or "nothing"
        return Observation("open the chest", reply, f"You see {look}.", "You carry the key." if g["key"] is None else "You carry nothing.",
                           score=100 * opened, done=opened, success=opened, invalid=invalid)

    def prompt(self, past, now):
        return f"{now.look} {now.inventory} {now.reply} {past[-1][1] if past else ''} >"

    def gold(self, task):
        """A solution (it knows where things lie)."""
        self.restart(-1, task)
        g, plan = self.games[-1], []
        for goal, act in ((g["key"], "take key"), (g["chest"], "open chest")):
            plan += ["east" if goal > g["here"] else "west"] * abs(goal - g["here"]) + [act]
            g["here"] = goal
        return plan
