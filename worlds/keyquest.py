"""KeyQuest, the smallest world, in pure Python: for tests and laptops, and to begin yours from."""

import random

from envs import Observation, Task, World, demonstration


class KeyQuest(World):
    """A corridor of rooms: find the key, carry it to the chest, open it: in 4 to 13 turns.

    A variation is the seed of a layout. short has 4 rooms, long has 6; in "ood" there are two more.
    coin is long with a coin beside the start: to take it ends the episode with half the points and
    without success, so with --reward score it is a local optimum.
    """

    chat_rules = (
        "You are in a corridor of rooms. Find the key, take it, carry it to the chest, and open "
        "the chest. Your actions are: west, east, take key, open chest."
    )
    rooms = {"short": 4, "long": 6, "coin": 6}
    splits = {"train": range(0, 200), "iid": range(200, 250), "ood": range(250, 300)}

    def __init__(self, names=()):
        super().__init__(names, self.rooms)
        self.games = {}

    def tasks(self, split):
        return [Task(name, variation) for name in self.names for variation in self.splits[split]]

    def start(self, slot, task):
        rooms = self.rooms[task.name]
        if task.variation in self.splits["ood"]:
            rooms += 2
        layout = random.Random(f"{task.name} {task.variation}")
        key, chest, here = layout.sample(range(rooms), 3)
        coin = None
        if task.name == "coin":
            coin = layout.choice([room for room in (here - 1, here + 1) if room in range(rooms)])
        # a key of None: the agent carries it
        self.games[slot] = {"rooms": rooms, "key": key, "chest": chest, "coin": coin, "here": here}
        return self.observe(slot, "You wake up.")

    def act(self, actions):
        return {slot: self.act_in(slot, action) for slot, action in actions.items()}

    def act_in(self, slot, action):
        game = self.games[slot]
        if action in ("west", "east"):
            room = game["here"] + (1 if action == "east" else -1)
            if room not in range(game["rooms"]):
                return self.observe(slot, "A wall.")
            game["here"] = room
            return self.observe(slot, "You walk.")
        if action == "take key" and game["key"] == game["here"]:
            game["key"] = None
            return self.observe(slot, "Taken.")
        if action == "take coin" and game["coin"] == game["here"]:
            return self.observe(slot, "It is yours.", score=50, done=True)
        if action == "open chest" and game["chest"] == game["here"]:
            if game["key"] is not None:
                return self.observe(slot, "It is locked.")
            return self.observe(slot, "It opens!", score=100, done=True, success=True)
        return self.observe(slot, "You can not.", invalid=True)

    def observe(self, slot, reply, **outcome):
        game = self.games[slot]
        things = [thing for thing in ("key", "chest", "coin") if game[thing] == game["here"]]
        look = f"You see {' '.join(things) or 'nothing'}."
        inventory = "You carry the key." if game["key"] is None else "You carry nothing."
        return Observation("open the chest", reply, look, inventory, **outcome)

    def gold(self, task):
        """A solution. It knows where things are."""
        self.start(-1, task)
        game, plan = self.games[-1], []
        for room, action in ((game["key"], "take key"), (game["chest"], "open chest")):
            way = "east" if room > game["here"] else "west"
            plan += [way] * abs(room - game["here"]) + [action]
            game["here"] = room
        return plan

    # ---- the prompt of a tiny policy

    def compact_prompt(self, past, now):
        last = past[-1][1] if past else ""
        return f"{now.look} {now.inventory} {now.reply} {last} >"

    # ---- demonstrations

    @classmethod
    def demonstrations(cls, rng, rare=None):
        """Walks of 20 turns among valid actions. They turn back at a wall, and else rather go on.

        The policy can then write and walk, and does not know what for. With a share `rare` they are
        of a confident walker: west in this share of the steps, else east, and it uses what is here.
        """
        acts = {"key": "take key", "chest": "open chest", "coin": "take coin"}
        world, demos = cls(), []
        for task in world.tasks("train"):
            now, past, action = world.reset([task])[0], [], None
            while len(past) < 20 and not now.done:
                ways = ["west", "east"]
                if action in ways and now.reply == "A wall.":
                    ways.remove(action)
                elif action in ways:
                    ways.append(action)
                useful = [act for thing, act in acts.items() if thing in now.look]
                action = rng.choice(ways + useful)
                if rare is not None:
                    locked = now.inventory == "You carry nothing."
                    useful = [act for act in useful if act != "open chest" or not locked]
                    step = "west" if rng.random() < rare else "east"
                    action = useful[0] if useful else step
                past.append((now, action))
                now = world.step({0: action})[0]
            demos.append(demonstration(world.compact_prompt, past))
        return demos
