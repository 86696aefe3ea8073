"""Make a tiny policy that can play from the start: a tokenizer and a small Llama, cloned from demonstrations.

    python warmstart.py --env scienceworld       # -> models/scienceworld
    python warmstart.py --env alfworld           # -> models/alfworld
    python warmstart.py --env keyquest           # -> models/keyquest, seconds

ScienceWorld: the simulator's own gold actions for *train* variations of seven short task types, cleaned (doors that are open
are not opened again, an object is called what the prompt calls it) and kept only if the cleaned actions still solve the task.
Two of the types are shown six times only: the policy knows what their solutions look like, doing them reliably is left to RL.
Some are shown but not played by default (PLAYED): the policy is good at them already, or too small for them (find-plant: it can't
tell which flower pot holds which plant).
ALFWorld: the walkthroughs of *train* games, cleaned likewise: of generated games, and of the real ones where they are found. One
policy then has the words of both.
KeyQuest: random walks among valid actions, so that the policy can write but has no idea what for.
"""
import argparse
import json
import os
import random
import re
import time

import torch

from envs import ALFWORLD_TASKS, ALFWorld, KeyQuest, ScienceWorld, find_alfworld
from epo import token_weights
from rollout import HERE, Turn, pad_left, score

DEMONSTRATIONS = {                           # task type -> how many (there are 62 to 150 train variations of each)
    "find-animal": 150, "find-non-living-thing": 150, "find-plant": 150, "find-living-thing": 6,
    "lifespan-longest-lived": 62, "lifespan-longest-lived-then-shortest-lived": 62, "lifespan-shortest-lived": 6}
PLAYED = ("find-living-thing", "lifespan-longest-lived", "lifespan-longest-lived-then-shortest-lived", "lifespan-shortest-lived")


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


def keyquest_demo(world, task, rng):
    now, past = world.reset([task])[0], []
    for _ in range(20):
        action = rng.choice(["west", "east"] + ["take key"] * ("key" in now.look) + ["open chest"] * ("chest" in now.look))
        past.append((now, action))
        now = world.step({0: action})[0]
    return [(world.prompt(past[:i], o), a) for i, (o, a) in enumerate(past)]


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--env", choices=("scienceworld", "alfworld", "keyquest"), required=True)
    parser.add_argument("--out", help="folder to write (default: models/ENV)")
    parser.add_argument("--epochs", type=int, help="passes over the demonstrations")
    parser.add_argument("--demos", help="a JSON file that keeps the demonstrations, so that the next time needs no simulator")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(args.seed)
    rng, start = random.Random(args.seed), time.time()
    big = args.env != "keyquest"
    demos = json.load(open(args.demos)) if args.demos and os.path.exists(args.demos) else {}      # "type variation" -> demonstration
    if args.env == "alfworld":
        demos, names = alfworld_demos(rng, demos), ALFWORLD_TASKS
    else:
        with (ScienceWorld(tuple(DEMONSTRATIONS)) if big else KeyQuest()) as world:
            tasks, wanted = world.tasks("train"), []
            rng.shuffle(tasks)
            for name in world.names:
                wanted += [t for t in tasks if t.name == name][:DEMONSTRATIONS[name] if big else None]
            for task in wanted:
                key = f"{task.name} {task.variation}"
                if key not in demos:
                    demos[key] = scienceworld_demo(world, task) if big else keyquest_demo(world, task, rng)
            demos = {f"{t.name} {t.variation}": demos[f"{t.name} {t.variation}"] for t in wanted}
            names = PLAYED if big else world.names
    if args.demos:
        with open(args.demos, "w") as file:
            json.dump(demos, file)
    demos = list(demos.values())
    kept = [pair for demo in demos if demo for pair in demo]
    print(f"{len(demos)} demonstrations, {demos.count(None)} dropped, {len(kept)} turns, {time.time() - start:.0f} s", flush=True)

    tokenizer = make_tokenizer((text for pair in kept for text in pair), 1024 if big else 0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128 if big else 32, num_hidden_layers=3 if big else 2, num_attention_heads=4,
        intermediate_size=352 if big else 64, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.05,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
        prompt="compact", tasks=list(names))          # the last two are ours: rollout.load_policy reads them
    model = LlamaForCausalLM(config)
    turns = [Turn(0, tokenizer.encode(p, add_special_tokens=False),
                  tokenizer.encode(a, add_special_tokens=False) + [tokenizer.eos_token_id], [], [], a, a, "") for p, a in kept]
    lengths = [len(t.prompt) for t in turns]
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens, prompts of {sum(lengths) / len(lengths):.0f} tokens "
          f"on average, {max(lengths)} at most", flush=True)

    batch, rate = (16, 1.5e-3) if big else (32, 2e-3)
    epochs = args.epochs or (4 if big else 2)
    steps = epochs * (len(turns) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for epoch in range(epochs):
        rng.shuffle(turns)
        total = 0.0
        for i in range(0, len(turns) - batch + 1, batch):
            logp, _, mask = score(model, turns[i:i + batch])
            loss = -(logp * token_weights(mask, torch.arange(batch))).sum()
            prompts, attention = pad_left([t.prompt for t in turns[i:i + batch]], "cpu")
            labels = prompts.masked_fill(attention == 0, -100)
            reading = model(input_ids=prompts, attention_mask=attention, labels=labels).loss      # predicting what it reads teaches it to copy
            total += loss.item()
            loss = loss + 0.5 * reading
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {total / (len(turns) // batch):.3f} nats a token, {time.time() - start:.0f} s", flush=True)
    out = args.out or os.path.join(HERE, "models", args.env)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
