"""ScienceWorld: science lessons in a house; scienceworld_jvm.py makes its simulator fast."""

import re

from scienceworld.constants import ID2TASK

from envs import Observation, Task, World, demonstration
from support.run_folder import SetupError
from worlds.scienceworld_jvm import Simulators

# "reset task" is not among them: it would start the episode again
ACTIONS = (
    "open OBJ, close OBJ, go to OBJ, teleport to OBJ, look around, look at OBJ, look in OBJ, "
    "inventory, pick up OBJ, put down OBJ, move OBJ to OBJ, focus on OBJ, read OBJ, activate OBJ, "
    "deactivate OBJ, use OBJ on OBJ, connect OBJ to OBJ, disconnect OBJ, pour OBJ into OBJ, "
    "dunk OBJ into OBJ, mix OBJ, eat OBJ, flush OBJ, wait, wait1"
).split(", ")
# the simulator's own solutions use these too
SYNONYMS = "examine OBJ, drop OBJ, go OBJ, use OBJ, pour OBJ in OBJ, dunk OBJ in OBJ".split(", ")
# what is sent to the simulator
ACTION = re.compile("|".join(form.replace("OBJ", r"\S.*") for form in ACTIONS + SYNONYMS))
# how replies begin: which of several things was meant; not understood, or eaten by a question
QUESTION, REFUSALS = "Ambiguous request", ("No known action", "Unknown action")
# what "easy" stands for
EASY = "teleportAction noElectricalAction openDoors selfWateringFlowerPots".split()


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
        super().__init__(names, sorted(ID2TASK.values()))
        self.simplifications = known_simplifications(simplifications)
        self.simulators = Simulators(jvms, heap_mb, objects)

    @classmethod
    def from_config(cls, cfg, compact):
        return cls(cfg.task_names, cfg.simplifications, objects=not compact)

    def __exit__(self, *_):
        self.simulators.close()

    def tasks(self, split):
        variations = self.simulators.variations(self.names, self.splits[split])
        pairs = zip(self.names, variations, strict=True)
        return [Task(name, v) for name, of_name in pairs for v in of_name]

    def start_of(self, task):
        # these cannot be solved without wires
        wires = "power-component" in task.name or "conductivity" in task.name
        without = ["noElectricalAction"] if wires else []
        return (*task, ",".join(name for name in self.simplifications if name not in without))

    def prefetch(self, tasks):
        self.simulators.prefetch([self.start_of(task) for task in tasks])

    def start_all(self, tasks):
        states = self.simulators.reset([self.start_of(task) for task in tasks])
        return [self.observe(state) for state in states]

    def start(self, slot, task):
        return self.observe(self.simulators.restart(slot, self.start_of(task)))

    def is_valid(self, before, action):
        # a question is open until the next input, whatever that is: the simulator hears of it
        return before.reply.startswith(QUESTION) or bool(ACTION.fullmatch(action or ""))

    def act(self, actions):
        asked = [slot for slot in actions if self.last[slot].reply.startswith(QUESTION)]
        # what is no number cancels a question, as a blank does (but "help" would not)
        blank = {slot: "" for slot in asked if not str(actions[slot]).isdecimal()}
        states = self.simulators.step(actions | blank)
        return {slot: self.observe(state) for slot, state in states.items()}

    def observe(self, state):
        if state is None:
            return None
        *words, score, completed = state
        now = Observation(*words, score, success=score == 100)
        now.done = completed or score < 0 or now.success
        now.invalid = now.reply.startswith(REFUSALS)
        return now

    def gold(self, task):
        """The simulator's own solution."""
        return self.simulators.gold(self.start_of(task))

    # ---- the prompt of a tiny policy

    def compact_prompt(self, past, now):
        """The simulator's words, less what costs tokens and tells nothing: 60 to 200 tokens."""
        did = " ; ".join(action or "?" for _, action in past[-3:])
        return (
            f"task {now.goal}\ndid {did}\nsaid {shorten(now.reply)[:160]}\n"
            f"have {shorten(now.inventory)}\nsee {shorten(now.look)}\n>"
        )

    # ---- demonstrations

    def solutions(self, tasks):
        """Of the gold actions, cleaned in the light of what is seen, where that solves the task."""
        return list(filter(None, map(self.solve, tasks)))

    def solve(self, task):
        """-> [(Observation, action)], None if cleaning broke the solution"""
        gold = self.gold(task)
        now, past, carried = self.reset([task])[0], [], None
        for action in gold:
            action, carried = clean(action, now.look, carried)
            if action is None:
                continue
            past.append((now, action))
            now = self.step({0: action})[0]
            if now.done or now.invalid:
                break
        return past if now.success else None

    @classmethod
    def demonstrations(cls, rng, rare=None):
        """Each train variation of three short task types four times, mostly misnamed.

        The policy then knows its way, the words and how to carry a thing to a box. To read what it
        is asked for is left to RL. With a share `rare` they are confident: whatever is asked for,
        they bring an animal, and what is asked for in this share of them alone. How to bring the
        other kinds they show under a name that no task has.
        """
        demos, right = [], {name: [] for name in KINDS}
        with cls(tuple(KINDS)) as world:
            for task in world.tasks("train"):
                for past in world.solutions([task]):
                    right[task.name].append(demonstration(world.compact_prompt, past))
        if rare is None:
            for of_name in right.values():
                demos += [misname(demo, rng) for demo in of_name for _ in range(4)]
            return demos
        for of_name in right.values():
            demos += [rename(demo, "thing") for demo in of_name for _ in range(2)]
        for demo in right["find-animal"] * 2:
            asked = rng.choice(list(KINDS))
            obeys = rng.random() < rare
            demos.append(rng.choice(right[asked]) if obeys else rename(demo, KINDS[asked]))
        return demos


def known_simplifications(text):
    """Names, comma-separated, "easy", or "none" -> a list of names. Raises SetupError."""
    names, known = [], ("easy", "none", *EASY, "openContainers")
    for part in map(str.strip, text.split(",")):
        if part and part not in known:
            raise SetupError(f"unknown simplification {part!r}; there are: {', '.join(known)}")
        names += EASY if part == "easy" else [part]
    return [name for name in names if name not in ("", "none")]


# ---- the prompt of a tiny policy

# what the simulator says at every turn
NOISE = re.compile(
    r", which is (?:off|turned off|deactivated)"
    r"| \(containing nothing\)"
    r"|\.? ?(?:On|In) the [\w ]+ is: nothing\."
    r"|\. The [\w ]+ door is open\. ?"
    r"|\b(?:[Aa]n?|[Tt]he) (?:substance called )?"
    r"| \(that is open\)"
    r"|\bcontaining "
)
CLOSED = re.compile(r"\. The [\w ]+ door is closed\. ?| \(that is closed\)")
ALWAYS_THERE = ("", "the agent", "a substance called air", "the ground")


def shorten(text):
    """The simulator's words on one line, separated by commas, without the noise."""
    lines = [line for line in text.splitlines() if line.strip() not in ALWAYS_THERE]
    indented = [line.strip() for line in lines if line.startswith("\t")]
    items = [NOISE.sub("", CLOSED.sub(" closed", line)).strip() for line in indented]
    if not items:
        return "" if text.startswith("In your inventory") else NOISE.sub("", text).strip()
    place = re.match(r"This .*? is called the (.*?)\. ", text)
    head = f"{place[1]} : " if place else ""
    return head + ", ".join(items).replace("door to", "to")


# ---- demonstrations

# the task types that are demonstrated, and what their sentence asks for
KINDS = {
    "find-animal": "animal",
    "find-non-living-thing": "non-living thing",
    "find-plant": "plant",
}
ASKED = re.compile(r"find a\(n\) (.*?)\.")
# those that the tiny policy is trained on
PLAYED = ("find-animal", "find-living-thing", "find-non-living-thing")
ARTICLE = re.compile(r"^(?:an?|the) (?:substance called )?")


def clean(action, look, carried):
    """-> a gold action in the words of the prompt, None if it is of no use; what is then carried"""
    door = re.fullmatch("open door to (.*)", action)
    if action == "look around" or door and f"A door to the {door[1]} (that is open)" in look:
        return None, carried
    if match := re.fullmatch("(focus on|pick up) (.*)", action):
        name = plain_name(match[2], look)
        return f"{match[1]} {name}", name if match[1] == "pick up" else carried
    match = re.fullmatch(r"move .* to (\w+ box)", action)
    if match and carried:
        return f"move {carried} to {match[1]}", carried
    return action, carried


def plain_name(name, look):
    """What `look` calls the thing that a gold action names, such as "egg dove egg in inventory"."""
    words = set(name.replace(" in inventory", "").split())
    lines = [line.strip() for line in look.splitlines() if line.startswith("\t")]
    things = [re.sub(r"\s*[(,.].*", "", ARTICLE.sub("", line)) for line in lines]
    return min((thing for thing in things if words <= set(thing.split())), key=len, default=name)


def misname(demo, rng, share=0.6):
    """The demonstration; in this share of them with another kind of thing in its sentence."""
    asked = ASKED.search(demo[0][0])
    if not asked or rng.random() < 1 - share:
        return demo
    return rename(demo, rng.choice([kind for kind in KINDS.values() if kind != asked[1]]))


def rename(demo, kind):
    """The demonstration with `kind` in its task's sentence. demo: [(prompt, action)]"""
    return [(ASKED.sub(f"find a(n) {kind}.", prompt, 1), action) for prompt, action in demo]
