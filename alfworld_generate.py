"""Household games for those who have not downloaded ALFWorld's: made up from a seed, on ALFWorld's own rules and text grammar.

    python alfworld_generate.py ood pick_heat_then_place_in_recep 3      # print one: its first lines and its solution

They have ALFWorld's six task types, kinds of room, objects and words, but rooms and contents are invented: scores on them can't
be compared with the benchmark's. As there, "iid" games are new games from the rooms and goals that training draws from, while the
rooms of "ood" games, and their goal pairs (an object type and the receptacle type it must get to, or the lamp), never occur in
training.
"""
import random
import sys
from functools import lru_cache

SIZES = {"train": 200, "iid": 25, "ood": 25}         # games of each task type
TRAIN_ROOMS, ALL_ROOMS = 20, 25                      # rooms of a kind; the last 5 are for ood

FURNITURE = {                                        # how many of each receptacle type: (least, most)
    "Kitchen": {"Cabinet": (2, 8), "CoffeeMachine": (1, 1), "CounterTop": (1, 3), "DiningTable": (0, 1), "Drawer": (1, 5),
                "Fridge": (1, 1), "GarbageCan": (1, 1), "Microwave": (1, 1), "Shelf": (0, 3), "SideTable": (0, 1),
                "SinkBasin": (1, 1), "StoveBurner": (2, 4), "Toaster": (1, 1)},
    "LivingRoom": {"ArmChair": (0, 2), "Cabinet": (0, 4), "CoffeeTable": (0, 2), "DiningTable": (0, 1), "Drawer": (0, 5),
                   "Dresser": (0, 1), "GarbageCan": (1, 1), "Ottoman": (0, 1), "Safe": (0, 1), "Shelf": (0, 6),
                   "SideTable": (1, 3), "Sofa": (1, 2)},
    "Bedroom": {"ArmChair": (0, 1), "Bed": (1, 2), "Desk": (1, 2), "Drawer": (1, 8), "Dresser": (0, 1), "GarbageCan": (1, 1),
                "LaundryHamper": (0, 1), "Safe": (0, 1), "Shelf": (0, 6), "SideTable": (0, 2)},
    "Bathroom": {"BathtubBasin": (0, 1), "Cabinet": (1, 6), "CounterTop": (1, 2), "Drawer": (0, 4), "GarbageCan": (1, 1),
                 "HandTowelHolder": (1, 2), "Shelf": (0, 3), "SinkBasin": (1, 2), "Toilet": (1, 1), "ToiletPaperHanger": (1, 1),
                 "TowelHolder": (1, 2)}}
THINGS = {
    "Kitchen": "Apple Bowl Bread ButterKnife Cup DishSponge Egg Fork Glassbottle Kettle Knife Ladle Lettuce Mug Pan PepperShaker "
               "Plate Pot Potato SaltShaker SoapBottle Spatula Spoon Tomato Vase WineBottle",
    "LivingRoom": "Book Box Candle CellPhone CreditCard KeyChain Laptop Newspaper Pillow RemoteControl Statue TissueBox Vase "
                  "Watch WateringCan",
    "Bedroom": "AlarmClock BaseballBat BasketBall Book Bowl CD CellPhone Cloth CreditCard KeyChain Laptop Mug Pen Pencil Pillow "
               "TennisRacket TissueBox Watch",
    "Bathroom": "Candle Cloth DishSponge HandTowel PaperTowel SoapBar SoapBottle SprayBottle TissueBox ToiletPaper Towel"}
LAMPS = {"Bedroom": "DeskLamp", "LivingRoom": "FloorLamp"}
LAMP_PLACES = ("Desk", "SideTable", "Dresser")
APPLIANCES = {"clean": "SinkBasin", "heat": "Microwave", "cool": "Fridge"}


@lru_cache(None)
def rooms(kind):
    """The 25 rooms of a kind, no two alike, each as {receptacle type: how many}."""
    rng, found = random.Random(kind), []
    while len(found) < ALL_ROOMS:
        room = {r: n for r, (least, most) in FURNITURE[kind].items() if (n := rng.randint(least, most))}
        if room not in found:
            found.append(room)
    return found


def is_ood(thing, target):
    """A quarter of the goal pairs is kept from training, whatever the task type."""
    return random.Random(f"{target} {thing}").random() < 0.25


def generate(split, name, index):
    """Game `index` of task type `name`, as in ALFWorld's files, plus room and goal pair; the same for the same arguments."""
    rng = random.Random(f"{split} {name} {index}")
    while True:                                      # some draws have no goal, or a solution that is too long
        game = draw(rng, split, name)
        if game and len(game["walkthrough"]) <= 50:
            return game


def draw(rng, split, name):
    from alfworld.gen import constants
    from alfworld.gen.goal_library import gdict
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH
    holds, abilities = constants.VAL_RECEPTACLE_OBJECTS, constants.VAL_ACTION_OBJECTS
    kind = rng.choice(sorted(constants.GOALS_VALID[name]))
    number = rng.randrange(TRAIN_ROOMS, ALL_ROOMS) if split == "ood" else rng.randrange(TRAIN_ROOMS)
    room, things = rooms(kind)[number], THINGS[kind].split()
    verb = next((v for v in APPLIANCES if f"_{v}_" in name), None)
    lamp = LAMPS[kind] if name == "look_at_obj_in_light" else None

    # the goal, and where everything is; nothing that the goal names is where it should get to
    pairs = [(o, t) for o in things for t in ([lamp] if lamp else room)
             if (lamp or o in holds[t]) and is_ood(o, t) == (split == "ood")
             and (not verb or o in abilities[verb.capitalize() + "able"] and t != APPLIANCES[verb])]
    if not pairs:
        return None
    thing, target = rng.choice(pairs)
    homes = {o: [t for t in room if o in holds[t] and (o, t) != (thing, target)] for o in things}
    homes[lamp] = [t for t in LAMP_PLACES if t in room]
    copies = {thing: rng.randint(2, 3) if "two" in name else rng.randint(1, 2), **({lamp: 1} if lamp else {})}
    for o in rng.sample(things, rng.randint(5, 10)):
        copies.setdefault(o, rng.randint(1, 2))
    if not homes[thing] or lamp and not homes[lamp]:
        return None
    place = {}                                       # (type, number) of an object -> (type, number) of the receptacle
    for o, count in copies.items():
        for i in range(count if homes[o] else 0):
            t = rng.choice(homes[o])
            place[o, i + 1] = (t, rng.randint(1, room[t]))

    words = rng.choice(gdict[name]["templates"]).format(obj=thing.lower(), recep=target.lower(), toggle=(lamp or "").lower())
    goal = gdict[name]["pddl"].replace("#", "-").format(obj=thing, recep=target, toggle=lamp)
    openable, needed = constants.OPENABLE_CLASS_LIST, 2 if "two" in name else 1
    return {"pddl_domain": open(ALFRED_PDDL_PATH).read(), "grammar": open(ALFRED_TWL2_PATH).read().replace("UNKNOWN GOAL", words),
            "pddl_problem": problem(room, place, holds, abilities, openable, goal), "solvable": True,
            "walkthrough": solve(rng, room, dict(place), homes, thing, target, lamp, verb, needed, openable),
            "room": f"{kind} {number}", "goal": (thing, target)}


def identifier(kind, number):
    """What the engine will show as "drawer 2": it counts the identifiers of a kind downwards, in their alphabetical order."""
    head, basin = (kind[:-len("Basin")], f"_bar_{kind}") if kind.endswith("Basin") else (kind, "")
    return f"{head}_bar_{99 - number}{basin}"


def problem(room, place, holds, abilities, openable, goal):
    """The PDDL problem: the agent in the middle of the room, each receptacle at a location of its own."""
    receptacles = [(t, i + 1) for t, n in room.items() for i in range(n)]
    kinds = sorted({o for o, _ in place})
    objects = ["agent1 - agent", "loc_bar_0 - location"]
    objects += [f"{t}Type - rtype" for t in room] + [f"{o}Type - otype" for o in kinds]
    facts = ["(= (total-cost) 0)", "(atLocation agent1 loc_bar_0)"]
    facts += [f"(canContain {t}Type {o}Type)" for t in room for o in kinds if o in holds[t]]
    for i, (t, n) in enumerate(receptacles, 1):
        r = identifier(t, n)
        objects += [f"{r} - receptacle", f"loc_bar_{i} - location"]
        facts += [f"(receptacleType {r} {t}Type)", f"(receptacleAtLocation {r} loc_bar_{i})"]
        facts += [f"(openable {r})"] * (t in openable)
    for (o, n), there in place.items():
        x = identifier(o, n)
        objects.append(f"{x} - object")
        facts += [f"(objectType {x} {o}Type)", f"(inReceptacle {x} {identifier(*there)})",
                  f"(objectAtLocation {x} loc_bar_{receptacles.index(there) + 1})"]
        facts += [f"({a.lower()} {x})" for a in ("Heatable", "Coolable", "Cleanable", "Toggleable") if o in abilities[a]]
        facts += [f"(pickupable {x})"] * (o not in abilities["Toggleable"])
    lines = "\n".join
    return (f"(define (problem generated)\n(:domain alfred)\n(:objects\n{lines(objects)}\n)\n(:init\n{lines(facts)}\n)\n"
            f"{goal.strip().removesuffix(')')}\n(:metric minimize (total-cost))\n)")


def solve(rng, room, place, homes, thing, target, lamp, verb, copies, openable):
    """A solution by one who must search: look through the receptacles that could hold it, take it, bring it."""
    plan, looked, opened, called, path = [], [], set(), "{0[0]} {0[1]}".format, [None]

    def go(there, look=True):
        if path[-1] != there:
            plan.append(f"go to {called(there)}")
            path.append(there)
        if look and there[0] in openable and there not in opened:
            opened.add(there)
            plan.append(f"open {called(there)}")

    def find(kind):
        known = [x for x, there in place.items() if x[0] == kind and there in looked]
        unknown = [(t, i + 1) for t in rng.sample(homes[kind], len(homes[kind])) for i in range(room[t])]
        for there in [place[known[0]]] if known else [r for r in unknown if r not in looked]:
            go(there)
            looked.append(there)
            if here := [x for x in place if x[0] == kind and place[x] == there]:
                return here[0]

    for _ in range(copies):
        x = find(thing)
        plan.append(f"take {called(x)} from {called(place.pop(x))}")
        if verb:
            appliance = (APPLIANCES[verb], 1)
            go(appliance, look=False)
            plan.append(f"{verb} {called(x)} with {called(appliance)}")
        if lamp:
            plan.append(f"use {called(find(lamp))}")
        else:
            go((target, 1))
            plan.append(f"move {called(x)} to {called((target, 1))}")
    return [command.lower() for command in plan]


if __name__ == "__main__":
    game = generate(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    print(game["room"], game["goal"], *game["walkthrough"], sep="\n")
