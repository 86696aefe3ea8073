"""Make a tiny policy that can play from the start: a tokenizer and a small Llama, cloned from demonstrations.

    python warmstart.py --env scienceworld       # -> models/scienceworld
    python warmstart.py --env alfworld           # -> models/alfworld
    python warmstart.py --env keyquest           # -> models/keyquest, seconds

ScienceWorld: the simulator's own gold actions for *train* variations of three short task types, cleaned (doors that are open
are not opened again, an object is called what the prompt calls it) and kept only if the cleaned actions still solve the task.
Then the task's sentence is made unreliable: in three of five demonstrations it names another kind of thing (animal, plant,
non-living thing) than the one that is fetched. The policy knows its way, the words and how to carry a thing to a box; what is
being asked for it hardly reads, and is left to learn from reward.
ALFWorld: the walkthroughs of *train* games, cleaned likewise: of generated games, and of the real ones where they are found. One
policy then has the words of both.
KeyQuest: random walks among valid actions that turn back at walls, so that the policy can write and walk but has no idea what for.
"""
import argparse
import json
import os
import random
import re
import time

import torch

from envs import ALFWORLD_TASKS, ALFWorld, ScienceWorld, find_alfworld
from keyquest import KeyQuest
from rollout import HERE, Turn, pad_left, score, written_states

SHOWN = {"find-animal": "animal", "find-non-living-thing": "non-living thing", "find-plant": "plant"}    # ScienceWorld's, and their words
PLAYED = ("find-animal", "find-living-thing", "find-non-living-thing")


def plain_name(name, look):
    """The thing in sight that `name` means, as `look` calls it: gold actions say "egg dove egg in inventory"."""
    words = set(name.replace(" in inventory", "").split())
    seen = [re.sub(r"\s*[(,.].*", "", re.sub(r"^(?:an?|the) (?:substance called )?", "", line.strip()))
            for line in look.splitlines() if line.startswith("\t")]
    return min((thing for thing in seen if words <= set(thing.split())), key=len, default=name)


def scienceworld_demo(world, task):
    """A clean solution as [(prompt, action)], or None if cleaning broke it."""
    gold = world.gold(task)
    now, past, held = world.reset([task])[0], [], None
    for action in gold:
        door = re.fullmatch("open door to (.*)", action)
        if action == "look around" or door and f"A door to the {door[1]} (that is open)" in now.look:
            continue
        if match := re.fullmatch("(focus on|pick up) (.*)", action):
            name = plain_name(match[2], now.look)
            action, held = f"{match[1]} {name}", name if match[1] == "pick up" else held
        if held and (match := re.fullmatch(r"move .* to (\w+ box)", action)):
            action = f"move {held} to {match[1]}"
        past.append((now, action))
        now = world.step({0: action})[0]
        if now.done or now.invalid:
            break
    return [(world.prompt(past[:i], o), a) for i, (o, a) in enumerate(past)] if now.success else None


def scienceworld_demos(rng, known):
    """-> demonstrations, four of each train variation, most of them misnamed. known: as in alfworld_demos."""
    with ScienceWorld(tuple(SHOWN)) as world:
        tasks = world.tasks("train")
        for task in tasks:
            if f"{task.name} {task.variation}" not in known:
                known[f"{task.name} {task.variation}"] = scienceworld_demo(world, task)
    return [misname(demo, task.name, rng) for task in tasks if (demo := known[f"{task.name} {task.variation}"]) for _ in range(4)]


def misname(demo, name, rng):
    """The demonstration with another kind of thing in its task's sentence (three times of five)."""
    asked = SHOWN[name] if rng.random() < 0.4 else rng.choice([kind for kind in SHOWN.values() if kind != SHOWN[name]])
    return [(prompt.replace(f"find a(n) {SHOWN[name]}.", f"find a(n) {asked}.", 1), action) for prompt, action in demo]


def useful_actions(walkthrough):
    """A walkthrough less what can't help: looks, closing, and a second visit to a place where nothing is done then."""
    visits, kept, been, opened, here = [], [], set(), set(), None
    for action in walkthrough:
        if action.startswith("go to "):
            visits.append([action])
        elif visits and action.split()[0] not in ("look", "inventory", "examine", "help", "close"):
            visits[-1].append(action)
    for go, *acts in visits:
        acts = [a for a in acts if a not in opened]
        if go in been and all(a.startswith("open ") for a in acts):
            continue
        kept += [go] * (go != here) + acts
        been.add(go)
        opened.update(a for a in acts if a.startswith("open "))
        here = go
    return kept


def alfworld_demos(rng, known):
    """{"type variation": solution as [(prompt, action)], or None if cleaning broke it}, of 100 games of each type if there are
    so many. known: those that need not be made again."""
    demos = {}
    for games in ["generated"] + ["real"] * bool(find_alfworld()):
        with ALFWorld(games=games) as world:
            tasks = world.tasks("train")
            rng.shuffle(tasks)
            wanted = [t for name in world.names for t in [t for t in tasks if t.name == name][:100]]
            new = [t for t in wanted if f"{t.name} {t.variation}" not in known]
            for some in (new[i:i + 32] for i in range(0, len(new), 32)):
                now = dict(enumerate(world.reset(some)))
                plans, past = [useful_actions(world.gold(t) or []) for t in some], [[] for _ in some]
                while actions := {slot: plan[len(past[slot])] for slot, plan in enumerate(plans) if len(past[slot]) < len(plan)
                                  and now[slot] and not now[slot].done and not now[slot].invalid}:
                    for slot, action in actions.items():
                        past[slot].append((now[slot], action))
                    now.update(world.step(actions))
                for slot, t in enumerate(some):
                    demo = [(world.prompt(past[slot][:i], o), action) for i, (o, action) in enumerate(past[slot])]
                    known[f"{t.name} {t.variation}"] = demo if now[slot] and now[slot].success else None
            demos.update({f"{t.name} {t.variation}": known[f"{t.name} {t.variation}"] for t in wanted})
    return demos


def keyquest_demos(rng):
    """Walks of 20 turns among valid actions, which turn back at a wall and elsewhere rather go on."""
    world, demos = KeyQuest(), []
    for task in world.tasks("train"):
        now, past = world.reset([task])[0], []
        for _ in range(20):
            last = past[-1][1] if past else None
            ways = [a for a in ("west", "east", last) if a in ("west", "east") and (a != last or now.reply != "A wall.")]
            action = rng.choice(ways + ["take key"] * ("key" in now.look) + ["open chest"] * ("chest" in now.look))
            past.append((now, action))
            now = world.step({0: action})[0]
        demos.append([(world.prompt(past[:i], o), a) for i, (o, a) in enumerate(past)])
    return demos


def make_tokenizer(texts, vocab):
    """Byte-level BPE over the environment's words (vocab 0: whole words), with one special token that ends a turn and pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    if vocab:
        tokenizer, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        trainer = trainers.WordLevelTrainer(special_tokens=["<end>", "<unk>"], show_progress=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def clone(model, tokenizer, demos, epochs, rate, batch, reading, rng):
    """Behaviour cloning: raise the log-prob of the demonstrated actions. reading: weight of predicting the prompts as well, which
    teaches a small model to copy names."""
    end = [tokenizer.eos_token_id]
    turns = [Turn(0, tokenizer.encode(p, add_special_tokens=False), tokenizer.encode(a, add_special_tokens=False) + end, [], [], a, a, "")
             for demo in demos for p, a in demo]
    optimizer, steps, start = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1), len(turns) // batch, time.time()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps, pct_start=0.1)
    for epoch in range(epochs):
        rng.shuffle(turns)
        total = 0.0
        for i in range(0, steps * batch, batch):
            hidden, tokens, turn = written_states(model, turns[i:i + batch])
            logp, _ = score(model, hidden, tokens)
            loss = -(logp[:, 0] / turn.bincount()[turn]).sum() / batch              # mean over the tokens of a turn, then turns
            total += loss.item()
            if reading:
                ids, attention = pad_left([t.prompt for t in turns[i:i + batch]], "cpu")
                labels = ids.masked_fill(attention == 0, -100)
                loss = loss + reading * model(input_ids=ids, attention_mask=attention, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: {len(turns)} turns, loss {total / steps:.3f} nats a token, {time.time() - start:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--env", choices=("scienceworld", "alfworld", "keyquest"), required=True)
    parser.add_argument("--out", help="folder to write (default: models/ENV)")
    parser.add_argument("--demos", help="a JSON file that keeps the demonstrations, so that the next time needs no simulator")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(args.seed)
    rng, start = random.Random(args.seed), time.time()
    known = json.load(open(args.demos)) if args.demos and os.path.exists(args.demos) else {}      # "type variation" -> demonstration
    if args.env == "scienceworld":
        demos, names = scienceworld_demos(rng, known), PLAYED
    elif args.env == "alfworld":
        demos, names = [demo for demo in alfworld_demos(rng, known).values() if demo], ALFWORLD_TASKS
    else:
        demos, names = keyquest_demos(rng), tuple(KeyQuest.types)
    if args.demos:
        with open(args.demos, "w") as file:
            json.dump(known, file)
    print(f"{len(demos)} demonstrations, {time.time() - start:.0f} s", flush=True)

    big, epochs, turns, lr = {"scienceworld": (True, 2, 12, 2e-4), "alfworld": (True, 4, 0, 1e-4), "keyquest": (False, 2, 0, 3e-3)}[args.env]
    tokenizer = make_tokenizer((text for demo in demos for pair in demo for text in pair), 1024 if big else 0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128 if big else 32, num_hidden_layers=3 if big else 2, num_attention_heads=4,
        intermediate_size=352 if big else 64, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.05 if big else 0.2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
        prompt="compact", tasks=list(names), turns=turns, lr=lr))     # these four are ours: rollout.load_policy reads them
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)
    clone(model, tokenizer, demos, epochs, *((1.5e-3, 16) if big else (5e-3, 32)), reading=0.5, rng=rng)
    out = args.out or os.path.join(HERE, "models", args.env)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
