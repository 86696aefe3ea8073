"""Household games for those who have not downloaded ALFWorld's.

They are made up from a seed, on ALFWorld's own rules and text grammar, with its six task types,
kinds of room, objects and words. But rooms and contents are invented: success rates on them cannot
be compared with the benchmark's. As there, "iid" games are new games from the rooms and goals that
training draws from. The rooms of "ood" games, and their goal pairs (an object type and the
receptacle type it must get to, or the lamp), never occur in training.
"""

import random
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

# games of each task type
SIZES = {"train": 200, "iid": 25, "ood": 25}
# rooms of a kind; the last 5 are for ood
TRAIN_ROOMS, ALL_ROOMS = 20, 25
LONGEST_SOLUTION = 50

# receptacle types, and how many a room has at least and at most
FURNITURE = {
    "Kitchen": """
        Cabinet:2-8 CoffeeMachine:1-1 CounterTop:1-3 DiningTable:0-1 Drawer:1-5 Fridge:1-1
        GarbageCan:1-1 Microwave:1-1 Shelf:0-3 SideTable:0-1 SinkBasin:1-1 StoveBurner:2-4
        Toaster:1-1""",
    "LivingRoom": """
        ArmChair:0-2 Cabinet:0-4 CoffeeTable:0-2 DiningTable:0-1 Drawer:0-5 Dresser:0-1
        GarbageCan:1-1 Ottoman:0-1 Safe:0-1 Shelf:0-6 SideTable:1-3 Sofa:1-2""",
    "Bedroom": """
        ArmChair:0-1 Bed:1-2 Desk:1-2 Drawer:1-8 Dresser:0-1 GarbageCan:1-1 LaundryHamper:0-1
        Safe:0-1 Shelf:0-6 SideTable:0-2""",
    "Bathroom": """
        BathtubBasin:0-1 Cabinet:1-6 CounterTop:1-2 Drawer:0-4 GarbageCan:1-1 HandTowelHolder:1-2
        Shelf:0-3 SinkBasin:1-2 Toilet:1-1 ToiletPaperHanger:1-1 TowelHolder:1-2""",
}
THINGS = {
    "Kitchen": """
        Apple Bowl Bread ButterKnife Cup DishSponge Egg Fork Glassbottle Kettle Knife Ladle Lettuce
        Mug Pan PepperShaker Plate Pot Potato SaltShaker SoapBottle Spatula Spoon Tomato Vase
        WineBottle""",
    "LivingRoom": """
        Book Box Candle CellPhone CreditCard KeyChain Laptop Newspaper Pillow RemoteControl Statue
        TissueBox Vase Watch WateringCan""",
    "Bedroom": """
        AlarmClock BaseballBat BasketBall Book Bowl CD CellPhone Cloth CreditCard KeyChain Laptop
        Mug Pen Pencil Pillow TennisRacket TissueBox Watch""",
    "Bathroom": """
        Candle Cloth DishSponge HandTowel PaperTowel SoapBar SoapBottle SprayBottle TissueBox
        ToiletPaper Towel""",
}
LAMPS = {"Bedroom": "DeskLamp", "LivingRoom": "FloorLamp"}
LAMP_PLACES = ("Desk", "SideTable", "Dresser")
APPLIANCES = {"clean": "SinkBasin", "heat": "Microwave", "cool": "Fridge"}
ABILITIES = ("Heatable", "Coolable", "Cleanable", "Toggleable")


class Entity(NamedTuple):
    """An object or a receptacle: drawer 2 is ("Drawer", 2)."""

    kind: str
    number: int

    def __str__(self):
        return f"{self.kind} {self.number}".lower()

    @property
    def identifier(self):
        """What the engine will call "drawer 2".

        It counts the identifiers of a kind downwards, in their alphabetical order. A basin's
        ends in its kind.
        """
        head = self.kind.removesuffix("Basin")
        basin = "" if head == self.kind else f"_bar_{self.kind}"
        return f"{head}_bar_{99 - self.number}{basin}"


class Goal(NamedTuple):
    # the object type, and the receptacle type it must get to, or the lamp
    thing: str
    target: str
    lamp: str | None
    # what is to be done with it first: a key of APPLIANCES, or None
    verb: str | None
    # how many of them: 1 or 2
    copies: int


def rules():
    """ALFWorld's own tables. Not imported above: alfworld makes a folder when it is imported."""
    from alfworld.gen import constants

    return constants


@lru_cache(None)
def rooms(kind):
    """The 25 rooms of a kind, no two alike, each as {receptacle type: how many}."""
    rng = random.Random(kind)
    furniture = [re.split("[:-]", entry) for entry in FURNITURE[kind].split()]
    result = []
    while len(result) < ALL_ROOMS:
        counts = {name: rng.randint(int(least), int(most)) for name, least, most in furniture}
        room = {name: count for name, count in counts.items() if count}
        if room not in result:
            result.append(room)
    return result


def numbered(counts):
    """{"Bed": 2} -> [("Bed", 1), ("Bed", 2)]"""
    return [Entity(kind, i + 1) for kind, count in counts.items() for i in range(count)]


def is_ood(thing, target):
    """A quarter of the goal pairs is left out of training, whatever the task type."""
    return random.Random(f"{target} {thing}").random() < 0.25


def generate(split, name, index):
    """Game `index` of task type `name`, as in ALFWorld's files, plus its room and goal pair.

    It is the same for the same arguments.
    """
    rng = random.Random(f"{split} {name} {index}")
    while True:
        # not every draw has a goal, or a solution that is short enough
        game = draw(rng, split, name)
        if game and len(game["walkthrough"]) <= LONGEST_SOLUTION:
            return game


def draw(rng, split, name):
    """One try: a game, or None if its room has nothing to do."""
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

    kind = rng.choice(sorted(rules().GOALS_VALID[name]))
    first, last = (TRAIN_ROOMS, ALL_ROOMS) if split == "ood" else (0, TRAIN_ROOMS)
    number = rng.randrange(first, last)
    room = rooms(kind)[number]
    goal = draw_goal(rng, split, name, kind, room)
    if goal is None:
        return None
    counts = draw_counts(rng, kind, goal)
    homes = {thing: homes_of(thing, room, goal) for thing in counts}
    if not homes[goal.thing] or (goal.lamp and not homes[goal.lamp]):
        return None
    place = draw_places(rng, room, counts, homes)
    sentence, pddl = describe(rng, name, goal)
    solver = Solver(rng, room, place, homes)
    return {
        "pddl_domain": Path(ALFRED_PDDL_PATH).read_text(),
        "grammar": Path(ALFRED_TWL2_PATH).read_text().replace("UNKNOWN GOAL", sentence),
        "pddl_problem": problem(room, place, pddl),
        "solvable": True,
        "walkthrough": solver.solve(goal),
        "room": f"{kind} {number}",
        "goal": (goal.thing, goal.target),
    }


def draw_goal(rng, split, name, kind, room):
    """-> Goal, or None if nothing in the room fits."""
    verb = next((verb for verb in APPLIANCES if f"_{verb}_" in name), None)
    lamp = LAMPS[kind] if name == "look_at_obj_in_light" else None
    things = THINGS[kind].split()
    targets = [lamp] if lamp else room
    pairs = [(thing, target) for thing in things for target in targets]
    if not lamp:
        holds = rules().VAL_RECEPTACLE_OBJECTS
        pairs = [(thing, target) for thing, target in pairs if thing in holds[target]]
    if verb:
        able = rules().VAL_ACTION_OBJECTS[f"{verb.capitalize()}able"]
        others = [target for target in room if target != APPLIANCES[verb]]
        pairs = [pair for pair in pairs if pair[0] in able and pair[1] in others]
    pairs = [pair for pair in pairs if is_ood(*pair) == (split == "ood")]
    if not pairs:
        return None
    thing, target = rng.choice(pairs)
    return Goal(thing, target, lamp, verb, copies=2 if "two" in name else 1)


def draw_counts(rng, kind, goal):
    """How many of each object type: what the goal names, and others. -> {type: count}"""
    things = THINGS[kind].split()
    counts = {goal.thing: rng.randint(goal.copies, goal.copies + 1)}
    if goal.lamp:
        counts[goal.lamp] = 1
    for thing in rng.sample(things, rng.randint(5, 10)):
        counts.setdefault(thing, rng.randint(1, 2))
    return counts


def homes_of(thing, room, goal):
    """The receptacle types that a thing may lie in: for the goal's, not where it must get to."""
    if thing == goal.lamp:
        return [target for target in LAMP_PLACES if target in room]
    possible = [target for target in room if thing in rules().VAL_RECEPTACLE_OBJECTS[target]]
    return [target for target in possible if (thing, target) != (goal.thing, goal.target)]


def draw_places(rng, room, counts, homes):
    """Put each object in a receptacle -> {object: receptacle}"""
    place = {}
    for thing in numbered(counts):
        if homes[thing.kind]:
            receptacle = rng.choice(homes[thing.kind])
            place[thing] = Entity(receptacle, rng.randint(1, room[receptacle]))
    return place


def describe(rng, name, goal):
    """The goal as the player reads it, and as the engine does."""
    from alfworld.gen.goal_library import gdict

    forms = gdict[name]
    lamp = (goal.lamp or "").lower()
    sentence = rng.choice(forms["templates"])
    sentence = sentence.format(obj=goal.thing.lower(), recep=goal.target.lower(), toggle=lamp)
    pddl = forms["pddl"].replace("#", "-")
    pddl = pddl.format(obj=goal.thing, recep=goal.target, toggle=goal.lamp)
    return sentence, pddl


def problem(room, place, goal):
    """The PDDL problem: the agent in the middle of the room, each receptacle at its own location.

    goal: the part of the problem that names it.
    """
    kinds = sorted({thing.kind for thing in place})
    location = {there: f"loc_bar_{i}" for i, there in enumerate(numbered(room), 1)}

    objects = ["agent1 - agent", "loc_bar_0 - location"]
    objects += [f"{target}Type - rtype" for target in room]
    objects += [f"{kind}Type - otype" for kind in kinds]
    facts = ["(= (total-cost) 0)", "(atLocation agent1 loc_bar_0)"]
    for target in room:
        fitting = [kind for kind in kinds if kind in rules().VAL_RECEPTACLE_OBJECTS[target]]
        facts += [f"(canContain {target}Type {kind}Type)" for kind in fitting]
    for there, where in location.items():
        name = there.identifier
        objects += [f"{name} - receptacle", f"{where} - location"]
        facts.append(f"(receptacleType {name} {there.kind}Type)")
        facts.append(f"(receptacleAtLocation {name} {where})")
        if there.kind in rules().OPENABLE_CLASS_LIST:
            facts.append(f"(openable {name})")
    for thing, there in place.items():
        name = thing.identifier
        objects.append(f"{name} - object")
        facts.append(f"(objectType {name} {thing.kind}Type)")
        facts.append(f"(inReceptacle {name} {there.identifier})")
        facts.append(f"(objectAtLocation {name} {location[there]})")
        able = [a for a in ABILITIES if thing.kind in rules().VAL_ACTION_OBJECTS[a]]
        facts += [f"({ability.lower()} {name})" for ability in able]
        if "Toggleable" not in able:
            facts.append(f"(pickupable {name})")

    head = "(define (problem generated)\n(:domain alfred)"
    body = [head, "(:objects", *objects, ")", "(:init", *facts, ")"]
    # the goal closes the whole problem: the metric goes before its last bracket
    body += [goal.strip().removesuffix(")"), "(:metric minimize (total-cost))", ")"]
    return "\n".join(body)


class Solver:
    """Writes a walkthrough by searching, as a player must who does not know where things are."""

    def __init__(self, rng, room, place, homes):
        self.rng, self.room, self.place, self.homes = rng, room, dict(place), homes
        self.here, self.looked, self.opened, self.plan = None, set(), set(), []

    def solve(self, goal):
        """-> list of commands: look through what could hold the thing, take it, bring it."""
        for _ in range(goal.copies):
            thing = self.find(goal.thing)
            self.plan.append(f"take {thing} from {self.place.pop(thing)}")
            if goal.verb:
                appliance = Entity(APPLIANCES[goal.verb], 1)
                self.go(appliance)
                self.plan.append(f"{goal.verb} {thing} with {appliance}")
            if goal.lamp:
                self.plan.append(f"use {self.find(goal.lamp)}")
            else:
                target = Entity(goal.target, 1)
                self.look_into(target)
                self.plan.append(f"move {thing} to {target}")
        return self.plan

    def find(self, kind):
        """Go to the first thing of a kind and see it -> the thing"""
        things = [thing for thing in self.place if thing.kind == kind]
        for thing in things:
            if self.place[thing] in self.looked:
                self.look_into(self.place[thing])
                return thing
        targets = self.rng.sample(self.homes[kind], len(self.homes[kind]))
        for there in numbered({target: self.room[target] for target in targets}):
            if there not in self.looked:
                self.look_into(there)
                self.looked.add(there)
                for thing in things:
                    if self.place[thing] == there:
                        return thing

    def go(self, there):
        if self.here != there:
            self.plan.append(f"go to {there}")
            self.here = there

    def look_into(self, there):
        """Go there, and open it if it is closed."""
        self.go(there)
        if there.kind in rules().OPENABLE_CLASS_LIST and there not in self.opened:
            self.opened.add(there)
            self.plan.append(f"open {there}")
