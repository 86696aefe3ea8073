"""The prompts of the tiny policies: a world's own words less what costs tokens and tells nothing.

A tiny policy reads a prompt of 60 to 200 tokens a turn and pays for each of them in seconds.
"""

import re

# what ScienceWorld says at every turn
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
# an ALFWorld object or receptacle, such as "a drawer 2"
THING = re.compile(r"\ba (\S+ \d+)")
SIGHT = re.compile(r"(?:On the (\S+ \d+)|The (\S+ \d+) is open\. In it), you see (.*)")


def scienceworld_prompt(past, now):
    """past: (Observation, action) of the turns before; now: the Observation of this turn."""
    did = " ; ".join(action or "?" for _, action in past[-3:])
    return (
        f"task {now.goal}\ndid {did}\nsaid {shorten(now.reply)[:160]}\n"
        f"have {shorten(now.inventory)}\nsee {shorten(now.look)}\n>"
    )


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


def alfworld_prompt(past, now):
    """As `scienceworld_prompt`. The game tells a thing once, so this remembers it.

    It holds the receptacles left and seen, what the agent saw that the goal names, and where it is.
    """
    # the first reply is the start of the game, not an answer
    replies = [seen.reply for seen in [*(o for o, _ in past), now]][1:]
    contents, state, here = remembered(replies)
    room, words = THING.findall(now.look), now.goal.split()
    useful = [
        f"{thing} in {place}"
        for place, things in contents.items()
        for thing in things
        if thing.split()[0] in words
    ]
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


def remembered(replies):
    """-> {receptacle: what was in it when last seen}, "cleaned " or the like, where the agent is"""
    contents, state, here = {}, "", ""
    for reply in replies:
        if arrived := re.match(r"You arrive at (.*?)\. ", reply):
            here = arrived[1]
            contents.setdefault(here, [])
        if sight := SIGHT.search(reply):
            contents[sight[1] or sight[2]] = THING.findall(sight[3])
        if moved := re.match(r"You (?:pick up|move) the (.*) (from|to) the (.*)\.", reply):
            thing, way, place = moved.groups()
            rest = [other for other in contents.get(place, []) if other != thing]
            contents[place] = rest + [thing] * (way == "to")
            state = ""
        elif changed := re.match("You (clean|heat|cool) ", reply):
            state = changed[1] + "ed "
    return contents, state, here


def ranges(names):
    """["drawer 1", "drawer 2", "desk 1"] -> "drawer 1-2, desk 1"."""
    numbers = {}
    for name in names:
        kind, number = name.split()
        numbers.setdefault(kind, []).append(int(number))
    texts = []
    for kind, of_kind in numbers.items():
        spans = []
        firsts = sorted(n for n in of_kind if n - 1 not in of_kind)
        lasts = sorted(n for n in of_kind if n + 1 not in of_kind)
        for first, last in zip(firsts, lasts, strict=True):
            spans.append(str(first) if first == last else f"{first}-{last}")
        texts.append(" ".join([kind, *spans]))
    return ", ".join(texts)
