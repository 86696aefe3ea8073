"""Warm start: a model that can play a little, because reward teaches nothing where nobody wins.

    python -m tools.warmstart --env keyquest --out models/mine          # a tiny policy, seconds
    python -m tools.warmstart --env keyquest --model models/smollm2-135m --out models/mine

Without --model it makes a tiny policy as those in models/: a tokenizer and a small Llama, cloned on
what the world demonstrates. With --model it clones solutions of train tasks into a chat model, with
LoRA. They hold no thoughts, so the model is asked for the action alone (--think off). The folder
appears whole, and a command that was stopped goes on if it is given again.
"""

import argparse
import math
import os
import random
import shutil
import sys
import time
from dataclasses import asdict, fields
from functools import partial

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from config import Config, checked, decide, flag
from envs import demonstration, world_class
from policy import (
    asked_for,
    load_policy,
    load_weights,
    response_states,
    save_model,
    score_tokens,
    trained,
)
from rollout import Turn, prove
from support import run_folder
from support.forward import micro_batches, pad
from support.report import SPLITS, read_arguments, two_digits
from support.run_folder import SetupError, locked
from train import draw_tasks, evaluate
from worlds.alfworld import ALFWORLD_TASKS
from worlds.scienceworld import PLAYED, misname

# seconds between checkpoints
SAVE_EVERY = 60
FLAGS = {
    "out": (str, "the folder to write; a tiny policy's is else models/ENV"),
    "seed": (int, "(default: 0)"),
    "eval_episodes": (int, "on each of IID and OOD"),
    "rare": (float, "a confident start: the share of what a tiny policy does in rare cases alone"),
    "model": (str, "a chat model: a folder, or a name on the hub; the rest is for chat models"),
    "lora_rank": (int, "of the adapter that learns (default: 32; 0: all weights learn)"),
    "demos": (int, "train tasks whose solutions are cloned (default: 200)"),
    "misname": (float, "the share of them whose task names another thing to find; ScienceWorld's"),
    "epochs": (int, "(default: 1)"),
    "batch": (int, "turns of an update (default: 16)"),
    "lr": (float, "highest rate of the cloning (default: 1e-3)"),
}
FLAGS |= dict.fromkeys("turns max_tokens tokens_per_batch".split(), (int, "as train.py's"))
FLAGS |= dict.fromkeys("tasks dtype device simplifications games".split(), (str, "as train.py's"))
CHAT = dict(seed=0, out="", measure="both", batch=16, lr=1e-3, epochs=1, demos=200)
CHAT |= dict(lora_rank=32, misname=0.0)
LLAMA = dict(num_attention_heads=4, max_position_embeddings=1024, tie_word_embeddings=True)
# a tiny policy's settings. asks: what train.py does with it; vocabulary None: whole words
MEDIUM = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=3, initializer_range=0.05)
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, initializer_range=0.2)
TINY = dict(seed=0, rare=None, measure="after", batch=16, lr=1.5e-3, vocabulary=1024, shape=MEDIUM)
WORDS = dict(TINY, batch=32, lr=5e-3, vocabulary=None, shape=SMALL)
RECIPES = {
    "scienceworld": dict(TINY, epochs=2, asks=dict(tasks=list(PLAYED), turns=12, lr=2e-4)),
    "alfworld": dict(TINY, epochs=4, asks=dict(tasks=list(ALFWORLD_TASKS), turns=30, lr=2e-4)),
    "keyquest": dict(WORDS, epochs=2, asks=dict(tasks=["short", "long"], lr=3e-3)),
}


def parse_arguments():
    """The command line, with what was not given. Raises SetupError for what cannot work."""
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    # what is not given is left out
    style["argument_default"] = argparse.SUPPRESS
    parser = argparse.ArgumentParser(description=__doc__, **style)
    parser.add_argument("--env", choices=tuple(RECIPES), required=True)
    when = "success; default: both (before and after), of a tiny policy after"
    parser.add_argument("--measure", choices=("both", "after", "none"), help=when)
    for name, (kind, text) in FLAGS.items():
        parser.add_argument(flag(name), type=kind, help=text)
    given = vars(read_arguments(parser, "warmstart.py"))
    env, chat = given["env"], "model" in given
    tiny = {"env", "out", "measure", "seed", "eval_episodes", "rare"}
    for where, is_so, idle in (
        ("without --model", not chat, given.keys() - tiny),
        ("with --model", chat, given.keys() & {"rare"}),
        (f"with --env {env}", env != "scienceworld", given.keys() & {"misname"}),
        ("with --measure none", given.get("measure") == "none", given.keys() & {"eval_episodes"}),
    ):
        if is_so and idle:
            raise SetupError(f"{flag(min(idle))} does nothing {where}; leave it out")
    defaults = CHAT if chat else RECIPES[given["env"]] | {"out": f"models/{given['env']}"}
    args = argparse.Namespace(**defaults | given)
    for name in ("rare", "misname"):
        if not 0 <= (getattr(args, name, None) or 0) <= 1:
            raise SetupError(f"--{name} must be between 0 and 1")
    for name in ("demos", "epochs", "batch"):
        if not 1 <= getattr(args, name, 1) <= 10**5:
            raise SetupError(f"{flag(name)} must be between 1 and 100000")
    if not args.out:
        raise SetupError("--out is missing or empty; name the folder to write")
    args.out = os.path.normpath(args.out)
    if os.path.lexists(args.out):
        message = "name another folder with --out, or remove it first"
        raise SetupError(f"{args.out} exists already; {message}")
    return args


def warmstart(args):
    """Clone, or go on with cloning; write the model to args.out. Raises SetupError."""
    tiny, folder, made = "model" not in args, args.out + ".unfinished", None
    within = lambda name: os.path.join(folder, name)
    if os.path.exists(folder) and {"lock", "start"}.isdisjoint(os.listdir(folder)):
        raise SetupError(f"{folder} is not of a warm start; move it away")
    given = {f.name: getattr(args, f.name) for f in fields(Config) if f.name in args}
    checked(given)
    if tiny:
        given |= {"model": within("start"), "device": "cpu"}
        if not os.path.exists(within("checkpoint.pt")):
            made = make_tiny(args, within("start"))
    elif asked_for(args.model, args.env)["compact"]:
        raise SetupError(f"{args.model} is a tiny policy; leave out --model to make one")
    else:
        given["think"] = "off"
    cfg = decide(given | {"out": folder})
    # LoRA's adapter begins at random
    torch.manual_seed(cfg.seed)
    how = (cfg.device, cfg.dtype, cfg.lora_rank, cfg.think, cfg.tokens_per_batch)
    policy = load_policy(cfg.model, cfg.env, *how)
    prove(policy)
    with world_class(cfg.env).from_config(cfg, compact=True) as world:
        os.makedirs(folder, exist_ok=True)
        with locked(folder):
            state = begin_or_go_on(policy, world, args, within("checkpoint.pt"), made)
            result = state["result"]
            if args.measure == "both" and not result:
                result["before"] = measure(policy, world, cfg, "before")
            clone(policy, state, args, within("checkpoint.pt"))
            if args.measure != "none":
                result["after"] = measure(policy, world, cfg, "after")
            asks = {"think": "off", "turns": cfg.turns, "max_tokens": cfg.max_tokens}
            asks["tasks"] = list(world.names)
            if policy.model.num_parameters() < 1.5e9:
                # the learning rate of RL; for larger models none was tried
                asks["lora_lr"] = 5e-4
            # a tiny policy has what it asks for from its start
            save_model(policy, {} if tiny else asks, within("whole"))
            result = {"settings": asdict(cfg) | vars(args), **result}
            run_folder.write_json(within("whole/warmstart.json"), result)
            os.rename(within("whole"), args.out)
            shutil.rmtree(folder)
    print(f"wrote {args.out}")


def measure(policy, world, cfg, when):
    """Success and the share of invalid turns on both splits, printed. -> what train.py would log"""
    tasks = {split: draw_tasks(world.tasks(split), cfg.eval_episodes, 0) for split in SPLITS}
    row = evaluate(world, policy, tasks, cfg, ["before", "after"].index(when))
    text = ""
    for what in ("success", "invalid"):
        iid, ood = (two_digits(row[f"{split}_{what}"]) for split in SPLITS)
        text += f"{what} IID {iid}, OOD {ood}; "
    print(f"{when}: {text}{row['seconds_eval']:.0f} s", flush=True)
    return row


def make_tiny(args, start):
    """Write a random tiny model and its tokenizer to the folder `start`. -> as solved_turns"""
    # a folder that cannot be written is refused before the work
    os.makedirs(start, exist_ok=True)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    demos = world_class(args.env).demonstrations(rng, args.rare)
    pairs = [pair for demo in demos for pair in demo]
    tokenizer = make_tokenizer((text for pair in pairs for text in pair), args.vocabulary)
    end = tokenizer.eos_token_id
    # prompt and what it asks for are this project's; policy.py reads them
    own = {"vocab_size": len(tokenizer), "prompt": "compact", **args.shape, **args.asks}
    special = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    model = LlamaForCausalLM(LlamaConfig(**own, **special, **LLAMA))
    model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    encode = tokenizer.encode
    turns = [(encode(prompt), [*encode(action), end]) for prompt, action in pairs]
    order, orders = list(range(len(turns))), []
    for _ in range(args.epochs):
        rng.shuffle(order)
        # whole batches alone
        orders.append(order[: len(order) // args.batch * args.batch])
    return turns, orders


def make_tokenizer(texts, vocabulary):
    """Byte-level BPE, or whole words for vocabulary None. One special token ends and pads."""
    if vocabulary:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = {"special_tokens": ["<end>"], "show_progress": False}
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, **special)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=["<end>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def solved_turns(policy, world, args):
    """-> turns, as (prompt ids, response ids), and for each epoch the order of their numbers"""
    tasks = draw_tasks(world.tasks("train"), args.demos, f"demonstrations {args.seed}")
    write = lambda past, now: policy.prompt(world, past, now)
    pairs, encode = [], partial(policy.tokenizer.encode, add_special_tokens=False)
    rng = random.Random(f"misname {args.seed}")
    # as many side by side as simulators hold
    for first in range(0, args.demos, 16):
        for past in world.solutions(tasks[first : first + 16]):
            pairs += misname(demonstration(write, past), rng, args.misname)
    if not pairs:
        raise SetupError("none of the demonstrations reaches its goal; give more --demos")
    turns = [(encode(prompt), encode(f"<action>{action}</action>")) for prompt, action in pairs]
    rngs = [random.Random(f"{args.seed} {epoch}") for epoch in range(args.epochs)]
    return turns, [rng.sample(range(len(turns)), len(turns)) for rng in rngs]


def begin_or_go_on(policy, world, args, path, made):
    """-> what a checkpoint holds. made: the turns and orders of a tiny policy"""
    if os.path.exists(path):
        state = run_folder.load_checkpoint(path)
        if state.get("settings") != vars(args):
            raise SetupError(f"{path} is of other settings; give them, or remove its folder")
        load_weights(trained(policy.model), state["model"])
        return state
    turns, orders = made or solved_turns(policy, world, args)
    print(f"{len(turns)} turns to clone", flush=True)
    size = args.batch
    batches = [order[i : i + size] for order in orders for i in range(0, len(order), size)]
    state = {"settings": vars(args), "result": {}, "turns": turns, "batches": batches}
    # with a history, as any checkpoint, which is empty here
    return state | {"step": 0, "optimizer": {}, "history": []}


def clone(policy, state, args, path):
    """Behaviour cloning, from state["step"] on: raise the log-prob of the responses."""
    turns = [Turn(0, prompt, response, [], []) for prompt, response in state["turns"]]
    batches, parameters = state["batches"], trained(policy.model)
    decay = 0.1 if policy.compact else 0.0
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.lr, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, len(batches), pct_start=0.1)
    if state["step"]:
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    saved = -math.inf
    for step in range(state["step"], len(batches)):
        loss = backpropagate(policy, turns, batches[step])
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        now = time.perf_counter()
        if now - saved > SAVE_EVERY or step + 1 == len(batches):
            saved = now
            state |= {"step": step + 1, "model": parameters}
            state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            run_folder.save_tensors(path, state)
            print(f"batch {step + 1} of {len(batches)}: loss {loss:.3f}", flush=True)


def backpropagate(policy, turns, batch):
    """Add the gradient of a batch, given by the numbers of its turns. -> its action_loss"""
    # a tiny policy reads it at once and in this order, so that models/ can be made again
    parts = [batch] if policy.compact else micro_batches(turns, batch, policy.tokens_per_batch)
    total = 0.0
    for numbers in parts:
        part, share = [turns[i] for i in numbers], len(numbers) / len(batch)
        loss = action_loss(policy.model, part)
        total += loss.item() * share
        if policy.compact:
            # a small model learns to copy names where it learns to write prompts
            ids, mask = pad([turn.prompt for turn in part], "cpu", "left")
            labels = ids.masked_fill(mask == 0, -100)
            reading = policy.model(input_ids=ids, attention_mask=mask, labels=labels)
            loss = loss + 0.5 * reading.loss
        (loss * share).backward()
    return total


def action_loss(model, turns):
    """-log π of the responses: the mean over the tokens of a turn, then over the turns."""
    lengths = torch.tensor([len(turn.response) for turn in turns], device=model.device)
    tokens = torch.tensor([t for turn in turns for t in turn.response], device=model.device)
    logp, _ = score_tokens(model, response_states(model, turns), tokens)
    return -(logp / lengths.repeat_interleave(lengths)).sum() / len(turns)


def main():
    try:
        warmstart(parse_arguments())
    except (SetupError, OSError) as error:
        sys.exit(f"warmstart.py: {error}")
    except KeyboardInterrupt:
        sys.exit("warmstart.py: stopped; the same command goes on")


if __name__ == "__main__":
    main()
