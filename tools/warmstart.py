"""Make a tiny policy that can already play: a tokenizer and a Llama, cloned from demonstrations.

    python -m tools.warmstart --env scienceworld       # -> models/scienceworld, 12 minutes
    python -m tools.warmstart --env alfworld           # -> models/alfworld, 15 minutes
    python -m tools.warmstart --env keyquest           # -> models/keyquest, seconds

With --model it clones solutions with a chat model instead: tools/chat_warmstart.py.

ScienceWorld: the simulator's own gold actions for *train* variations of three short task types.
They are cleaned (a door that is open is not opened, a thing is called what the prompt calls it) and
used only if they then still solve the task. The task's sentence is made unreliable: in three of
five demonstrations it names another kind of thing than the one that is fetched. So the policy knows
its way, the words and how to carry a thing to a box. To read what it is asked for is left to RL.

ALFWorld: walkthroughs of *train* games, cleaned likewise: of generated games, and of the real ones
where they are found. One policy then has the words of both. Three of five demonstrations leave out
what their task is about, such as to heat a thing at the microwave. To do it is left to RL.

KeyQuest: random walks that turn back at walls. The policy can write and walk, and does not know
what for.
"""

import argparse
import os
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from envs import ALFWORLD_TASKS, ALFWorld, ScienceWorld
from rollout import Turn, response_states, score_tokens
from support.forward import pad
from support.loading import ROOT
from support.run_folder import SetupError
from worlds.alfworld import find_alfworld
from worlds.keyquest import KeyQuest

# ScienceWorld's task types that are demonstrated, and what their sentence asks for
KINDS = {
    "find-animal": "animal",
    "find-non-living-thing": "non-living thing",
    "find-plant": "plant",
}
# those that train.py plays with the policy
PLAYED = ("find-animal", "find-living-thing", "find-non-living-thing")
ARTICLE = re.compile(r"^(?:an?|the) (?:substance called )?")
# of a walkthrough; they change nothing that matters
IDLE_VERBS = ("look", "inventory", "examine", "help", "close")
# what ALFWorld's task types are about
TASK_VERBS = ("clean", "heat", "cool", "use")


def demonstration(prompt, past):
    """[(Observation, action)] of an episode -> [(prompt, action)]. prompt: as World's prompts are.

    None, of an episode that was not solved, is None.
    """
    return past and [(prompt(past[:i], now), action) for i, (now, action) in enumerate(past)]


# ---- ScienceWorld


def plain_name(name, look):
    """What `look` calls the thing that a gold action names, such as "egg dove egg in inventory"."""
    words = set(name.replace(" in inventory", "").split())
    lines = [line.strip() for line in look.splitlines() if line.startswith("\t")]
    things = [re.sub(r"\s*[(,.].*", "", ARTICLE.sub("", line)) for line in lines]
    return min((thing for thing in things if words <= set(thing.split())), key=len, default=name)


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


def play_scienceworld(world, task):
    """-> [(Observation, action)] of a cleaned solution, or None if cleaning broke it"""
    gold = world.gold(task)
    now, past, carried = world.reset([task])[0], [], None
    for action in gold:
        action, carried = clean(action, now.look, carried)
        if action is None:
            continue
        past.append((now, action))
        now = world.step({0: action})[0]
        if now.done or now.invalid:
            break
    return past if now.success else None


def misname(demo, task_name, rng):
    """The demonstration with another kind of thing in its task's sentence, three times of five."""
    asked = kind = KINDS[task_name]
    if rng.random() >= 0.4:
        asked = rng.choice([other for other in KINDS.values() if other != kind])
    replace = lambda text: text.replace(f"find a(n) {kind}.", f"find a(n) {asked}.", 1)
    return [(replace(prompt), action) for prompt, action in demo]


def scienceworld_demos(rng):
    """Four demonstrations of each train variation."""
    demos = []
    with ScienceWorld(tuple(KINDS)) as world:
        for task in world.tasks("train"):
            past = play_scienceworld(world, task)
            if demo := demonstration(world.compact_prompt, past):
                demos += [misname(demo, task.name, rng) for _ in range(4)]
    return demos


# ---- ALFWorld


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
        useful += [go] * (go != place) + actions
        visited.add(go)
        opened |= openings
        place = go
    return useful


def hasty(plan):
    """A plan without what its task is about. It goes to the microwave, say, and heats nothing."""
    return [action for action in plan if action.split()[0] not in TASK_VERBS]


def play(world, tasks, plans):
    """Play lists of actions side by side -> [(the last Observation, [(Observation, action)])]"""
    now = dict(enumerate(world.reset(tasks)))
    past = [[] for _ in tasks]
    for t in range(max(map(len, plans))):
        playing = [slot for slot, o in now.items() if o and not o.done and not o.invalid]
        actions = {slot: plans[slot][t] for slot in playing if t < len(plans[slot])}
        for slot, action in actions.items():
            past[slot].append((now[slot], action))
        now |= world.step(actions)
    return [(now[slot], past[slot]) for slot in now]


def alfworld_demos(rng):
    """Demonstrations of 100 games of each type, if there are so many."""
    demos = []
    for games in ["generated"] + ["real"] * (find_alfworld() is not None):
        with ALFWorld(games=games) as world:
            tasks = world.tasks("train")
            rng.shuffle(tasks)
            by_type = {name: [] for name in ALFWORLD_TASKS}
            for task in tasks:
                by_type[task.name].append(task)
            chosen = [task for name in by_type for task in by_type[name][:100]]
            for first in range(0, len(chosen), 32):
                part = chosen[first : first + 32]
                plans = [useful_actions(world.gold(task) or []) for task in part]
                cut = [hasty(plan) if rng.random() < 0.6 else plan for plan in plans]
                played = zip(plans, cut, play(world, part, cut), strict=True)
                for plan, actions, (last, past) in played:
                    # a plan that is cut solves nothing, but its actions are valid
                    was_cut = actions != plan
                    if last and (last.success or was_cut and not last.invalid):
                        demos.append(demonstration(world.compact_prompt, past))
    return demos


# ---- KeyQuest


def keyquest_demos(rng):
    """Walks of 20 turns among valid actions. They turn back at a wall, and else rather go on."""
    world, demos = KeyQuest(), []
    for task in world.tasks("train"):
        now, past = world.reset([task])[0], []
        for _ in range(20):
            ways = ["west", "east"]
            last = past[-1][1] if past else None
            if last in ways and now.reply == "A wall.":
                ways.remove(last)
            elif last in ways:
                ways.append(last)
            acts = {"key": "take key", "chest": "open chest", "coin": "take coin"}
            ways += [act for thing, act in acts.items() if thing in now.look]
            past.append((now, rng.choice(ways)))
            now = world.step({0: past[-1][1]})[0]
            if now.done:
                break
        demos.append(demonstration(world.compact_prompt, past))
    return demos


# ---- The tokenizer and the model


@dataclass
class Recipe:
    """demos: makes the demonstrations. made_for: what train.py does with the policy by default.

    vocabulary None: whole words.
    """

    demos: Callable
    made_for: dict
    epochs: int
    rate: float = 1.5e-3
    batch: int = 16
    vocabulary: int | None = 1024
    width: int = 128
    ffn: int = 352
    layers: int = 3
    initializer_range: float = 0.05


SMALL = dict(vocabulary=None, width=32, ffn=64, layers=2, initializer_range=0.2)
RECIPES = {
    "scienceworld": Recipe(
        scienceworld_demos, {"tasks": list(PLAYED), "turns": 12, "lr": 2e-4}, epochs=2
    ),
    "alfworld": Recipe(
        alfworld_demos, {"tasks": list(ALFWORLD_TASKS), "turns": 30, "lr": 2e-4}, epochs=4
    ),
    "keyquest": Recipe(
        keyquest_demos,
        {"tasks": ["short", "long"], "lr": 3e-3},
        epochs=2,
        rate=5e-3,
        batch=32,
        **SMALL,
    ),
}


def make_tokenizer(texts, vocabulary):
    """Byte-level BPE, or whole words for vocabulary None. One special token ends and pads."""
    if vocabulary:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = ["<end>", "<unk>"]
        trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    end = {"eos_token": "<end>", "pad_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end)


def make_model(recipe, tokenizer):
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        intermediate_size=recipe.ffn,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=recipe.initializer_range,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        # these are this project's; support/loading.py reads them
        prompt="compact",
        **recipe.made_for,
    )
    return LlamaForCausalLM(config)


def action_loss(model, turns):
    """-log π of the actions: the mean over the tokens of a turn, then over the turns."""
    lengths = torch.tensor([len(turn.response) for turn in turns], device=model.device)
    tokens = [token for turn in turns for token in turn.response]
    tokens = torch.tensor(tokens, device=model.device)
    logp, _ = score_tokens(model, response_states(model, turns), tokens)
    return -(logp / lengths.repeat_interleave(lengths)).sum() / len(turns)


def reading_loss(model, turns):
    """-log π of the prompts: it teaches a small model to copy names."""
    ids, mask = pad([turn.prompt for turn in turns], "cpu", "left")
    labels = ids.masked_fill(mask == 0, -100)
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def clone(model, tokenizer, demos, recipe, rng):
    """Behaviour cloning: raise the log-prob of the demonstrated actions."""
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    turns = [
        Turn(0, encode(prompt), encode(action) + [tokenizer.eos_token_id], [], [])
        for demo in demos
        for prompt, action in demo
    ]
    begin, steps = time.time(), len(turns) // recipe.batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.rate, total_steps=recipe.epochs * steps, pct_start=0.1
    )
    for epoch in range(recipe.epochs):
        rng.shuffle(turns)
        total = 0.0
        for step in range(steps):
            batch = turns[step * recipe.batch : (step + 1) * recipe.batch]
            loss = action_loss(model, batch)
            total += loss.item()
            optimizer.zero_grad()
            (loss + 0.5 * reading_loss(model, batch)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        text = f"{len(turns)} turns, loss {total / steps:.3f} nats a token"
        print(f"epoch {epoch + 1}: {text}, {time.time() - begin:.0f} s", flush=True)


def make(env, seed, out):
    """Make the demonstrations, the tokenizer and the model, and write them to the folder `out`."""
    torch.manual_seed(seed)
    rng, begin = random.Random(seed), time.time()
    recipe = RECIPES[env]
    demos = recipe.demos(rng)
    print(f"{len(demos)} demonstrations, {time.time() - begin:.0f} s", flush=True)
    texts = (text for demo in demos for pair in demo for text in pair)
    tokenizer = make_tokenizer(texts, recipe.vocabulary)
    model = make_model(recipe, tokenizer)
    size = f"{model.num_parameters() / 1e6:.2f} M parameters"
    print(f"{size}, {len(tokenizer)} tokens", flush=True)
    clone(model, tokenizer, demos, recipe, rng)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main():
    # it takes the demonstrations from here
    from tools import chat_warmstart

    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: parser.exit(2, f"warmstart.py: {message}; see --help\n")
    parser.add_argument("--env", choices=tuple(RECIPES), required=True)
    parser.add_argument("--out", help="the folder to write (default: models/ENV)")
    parser.add_argument("--seed", type=int, default=0)
    chat_warmstart.add_flags(parser)
    args = parser.parse_args()
    if args.model and not args.out:
        parser.error("--model needs --out, the folder to write")
    try:
        if args.model:
            chat_warmstart.warmstart(args)
            return
        out = args.out or os.path.join(ROOT, "models", args.env)
        os.makedirs(out, exist_ok=True)
        make(args.env, args.seed, out)
    except (SetupError, OSError) as error:
        sys.exit(f"warmstart.py: {error}")
    except KeyboardInterrupt:
        sys.exit("warmstart.py: stopped; with --model, the same command goes on")


if __name__ == "__main__":
    main()
