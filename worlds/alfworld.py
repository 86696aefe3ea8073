"""ALFWorld: household chores, of PyPI's `alfworld`, in real games or in generated ones.

alfworld_workers.py and alfworld_engine.py make its engine fast, alfworld_generate.py makes games.
"""

import re

from envs import Observation, Task, World, demonstration
from support.run_folder import SetupError, one_line
from worlds.alfworld_generate import SIZES
from worlds.alfworld_workers import Workers, find_alfworld, find_games, list_games

ALFWORLD_TASKS = (
    "look_at_obj_in_light pick_and_place_simple pick_clean_then_place_in_recep "
    "pick_cool_then_place_in_recep pick_heat_then_place_in_recep pick_two_obj_and_place"
).split()


class ALFWorld(World):
    """ALFWorld's six task types; its train, valid_seen and valid_unseen as train, iid and ood.

    Success is the game's own `won`. A Task's variation is the folder of its game. games: "real",
    "generated" (the same rules and task types, other rooms, nothing to download), or "auto": the
    real ones if they were downloaded. An action must be one of the admissible commands, which
    `objects` lists. Raises SetupError for an unknown task, for games that are missing or cannot be
    played, and without its packages.
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
    def from_config(cls, cfg, compact):
        world = cls(cfg.task_names, cfg.games)
        if world.games == "generated":
            text = "playing *generated* games, not the benchmark"
            print(f"{text} (`alfworld-download` fetches its games)", flush=True)
        return world

    @classmethod
    def asks(cls, given):
        """games: "auto" made definite. Raises SetupError if there are no such games."""
        folder = find_games(given.get("games", "auto"))
        return {"turns": cls.turns, "games": "real" if folder else "generated"}

    def __exit__(self, *_):
        self.workers.close()

    def tasks(self, split):
        """Every game of a split. Real ones are listed by their folders, and not read."""
        if self.games == "generated":
            return [Task(name, f"{split}/{i}") for name in self.names for i in range(SIZES[split])]
        return [Task(*game) for game in list_games(self.folder, self.splits[split], self.names)]

    def game_of(self, task):
        """A file, or what to generate the game from."""
        if self.games == "real":
            return f"{self.folder}/{task.variation}/game.tw-pddl"
        split, index = task.variation.split("/")
        return split, task.name, int(index)

    def prefetch(self, tasks):
        self.workers.prefetch([self.game_of(task) for task in tasks])

    def start_all(self, tasks):
        answers = self.workers.reset([self.game_of(task) for task in tasks])
        return [self.begin(task, answer) for task, answer in zip(tasks, answers, strict=True)]

    def start(self, slot, task):
        return self.begin(task, self.workers.restart(slot, self.game_of(task)))

    def begin(self, task, answer):
        if answer is None:
            return None
        # the text of a game that cannot be played says why
        intro, commands, _ = (answer, (), False) if isinstance(answer, str) else answer
        pattern = r"you see (.*)\.\n\nYour task is to: (.*?)\.?\s*$"
        found = re.search(pattern, intro, re.DOTALL)
        if not found:
            message = f"ALFWorld's game {self.game_of(task)} can't be played ({one_line(intro)})"
            mend = "fetch the games again with `alfworld-download --force`"
            raise SetupError(f"{message}; if it's a damaged file, {mend}")
        room, goal = found.groups()
        reply, look = "You are in the middle of a room.", f"In the room are {room}."
        return Observation(goal, reply, look, "You are not carrying anything.", commands)

    def is_valid(self, before, action):
        return action in before.objects

    def act(self, actions):
        answers = self.workers.step(actions)
        return {slot: self.observe(self.last[slot], answer) for slot, answer in answers.items()}

    def observe(self, before, answer):
        if answer is None:
            return None
        reply, commands, won = answer
        # to ask for the inventory costs a turn; this is what the agent can remember
        inventory = before.inventory
        if took := re.match("You pick up the (.*) from", reply):
            inventory = f"You are carrying: a {took[1]}."
        elif re.match("You (?:move|put) the ", reply):
            inventory = "You are not carrying anything."
        outcome = {"score": 100 * won, "done": won, "success": won}
        return Observation(before.goal, reply, before.look, inventory, commands, **outcome)

    def gold(self, task):
        """Of the game's walkthrough, [] if it has none. It does not know where things are."""
        return useful_actions(self.workers.walkthrough(self.game_of(task)) or [])

    # ---- the prompt of a tiny policy

    def compact_prompt(self, past, now):
        """The game tells a thing once, so this remembers it: the receptacles left and seen, what
        the agent saw that the goal names, and where it is."""
        # the first reply is the start of the game, not an answer
        replies = [seen.reply for seen in [*(o for o, _ in past), now]][1:]
        contents, state, here = remembered(replies)
        room, words = THING.findall(now.look), now.goal.split()
        useful = []
        for place, things in contents.items():
            useful += [f"{thing} in {place}" for thing in things if thing.split()[0] in words]
        have = "nothing"
        if not now.inventory.startswith("You are not"):
            have = state + now.inventory.removeprefix("You are carrying: a ").removesuffix(".")
        said = ""
        if past:
            filler = r"You (?:arrive at|open the) .*?\. |\b(?:an?|the|and|you see) "
            said = re.sub(filler, "", now.reply)
        did = " ; ".join(action or "?" for _, action in past[-2:])
        left = ranges(receptacle for receptacle in room if receptacle not in contents)
        return (
            f"task {now.goal}\nleft {left}\nbeen {ranges(contents)}\n"
            f"seen {', '.join(useful[-4:])}\nat {here} have {have}\n"
            f"did {did}\nsaid {said[:80]}\n>"
        )

    # ---- demonstrations

    @classmethod
    def demonstrations(cls, rng, rare=None):
        """Of 100 train games of each type, if there are so many: generated, and real if found.

        One policy then has the words of both. Three of five leave out what their task is about,
        such as to heat a thing at the microwave. To do it is left to RL.
        """
        if rare is not None:
            raise SetupError("--rare is for keyquest and scienceworld")
        with cls(games="generated") as world:
            demos = world.demonstrated(rng)
        if find_alfworld():
            with cls(games="real") as world:
                demos += world.demonstrated(rng)
        return demos

    def demonstrated(self, rng):
        """Of this world's own games. Those that are not cut are played to the end, and solved."""
        tasks, chosen, demos = self.tasks("train"), [], []
        rng.shuffle(tasks)
        for name in self.names:
            chosen += [task for task in tasks if task.name == name][:100]
        for first in range(0, len(chosen), 32):
            part = chosen[first : first + 32]
            plans = [self.gold(task) for task in part]
            cut = [hasty(plan) if rng.random() < 0.6 else plan for plan in plans]
            for plan, actions, (last, past) in zip(plans, cut, self.play(part, cut), strict=True):
                # a plan that is cut solves nothing, but its actions are valid
                if last and (last.success or actions != plan and not last.invalid):
                    demos.append(demonstration(self.compact_prompt, past))
        return demos


# ---- the prompt of a tiny policy

# an object or receptacle, such as "a drawer 2"
THING = re.compile(r"\ba (\S+ \d+)")
# games made before alfworld 0.4 say "You put the mug 1 in/on the desk 1."
MOVED = re.compile(r"You (pick up|move|put) the (.*) (?:from|to|in/on|in|on) the (.*)\.")
SIGHT = re.compile(r"(?:On the (\S+ \d+)|The (\S+ \d+) is open\. In it), you see (.*)")


def remembered(replies):
    """-> {receptacle: what was in it when last seen}, "cleaned " or the like, where the agent is"""
    contents, state, here = {}, "", ""
    for reply in replies:
        if arrived := re.match(r"You arrive at (.*?)\. ", reply):
            here = arrived[1]
            contents.setdefault(here, [])
        if sight := SIGHT.search(reply):
            contents[sight[1] or sight[2]] = THING.findall(sight[3])
        if moved := MOVED.match(reply):
            verb, thing, place = moved.groups()
            contents[place] = [other for other in contents.get(place, []) if other != thing]
            if verb != "pick up":
                contents[place].append(thing)
            state = ""
        elif changed := re.match("You (clean|heat|cool) ", reply):
            state = changed[1] + "ed "
    return contents, state, here


def ranges(names):
    """["drawer 1", "drawer 2", "desk 1"] -> "drawer 1-2, desk 1"."""
    numbers = {}
    for name in names:
        kind, number = name.split()
        numbers.setdefault(kind, set()).add(int(number))
    texts = []
    for kind, own in numbers.items():
        firsts = sorted(own - {n + 1 for n in own})
        lasts = sorted(own - {n - 1 for n in own})
        spans = [f"{a}-{b}" if a < b else str(a) for a, b in zip(firsts, lasts, strict=True)]
        texts.append(" ".join([kind, *spans]))
    return ", ".join(texts)


# ---- demonstrations

# of a walkthrough; they change nothing that matters
IDLE_VERBS = ("look", "inventory", "examine", "help", "close")
# what the task types are about
TASK_VERBS = ("clean", "heat", "cool", "use")


def useful_actions(walkthrough):
    """A walkthrough without what cannot help: looks, closing, and a second visit for nothing."""
    visits = []
    for action in walkthrough:
        if action.startswith("go to "):
            visits.append((action, []))
        elif visits and action.split()[0] not in IDLE_VERBS:
            visits[-1][1].append(action)
    useful, visited, opened, place = [], set(), set(), None
    for go, actions in visits:
        actions = [action for action in actions if action not in opened]
        openings = {action for action in actions if action.startswith("open ")}
        if go in visited and len(openings) == len(actions):
            continue
        if go != place:
            useful.append(go)
        useful += actions
        visited.add(go)
        opened |= openings
        place = go
    return useful


def hasty(plan):
    """A plan without what its task is about. It goes to the microwave, say, and heats nothing."""
    return [action for action in plan if action.split()[0] not in TASK_VERBS]
