"""Warm-start a chat model: clone solutions of train tasks with LoRA, and write the merged model.

    python -m tools.warmstart --env keyquest --model models/smollm2-135m --out models/mine
    python train.py --env keyquest --model models/mine --lora-rank 16

The solutions are the world's own, of *train* tasks. They hold no thoughts, so the model is asked
for the action alone (--think off). The loss is on the response, and on no word of the prompt. The
model is evaluated before and after. What train.py is to do with it, such as which tasks to play,
goes into its config.json, and what was measured into its warmstart.json. A run that was stopped
goes on if the same command is given again.
"""

import os
import random
import shutil
import time
from dataclasses import asdict

import torch

from config import Config, check, resolve, task_names
from envs import ALFWorld, ScienceWorld, make_world
from rollout import Turn, micro_batches
from support.loading import choose_device, load_policy, save_model, trained
from support.report import progress, two_digits
from support.run_folder import (
    SetupError,
    load_checkpoint,
    locked,
    restore,
    save_tensors,
    write_json,
)
from tools.warmstart import (
    action_loss,
    demonstration,
    play,
    play_scienceworld,
    useful_actions,
)
from train import draw, evaluate

# those of Config that `python -m tools.warmstart --model` takes too
SHARED = (
    "env tasks simplifications games turns model lora_rank dtype device max_tokens "
    "tokens_per_batch eval_episodes seed"
).split()
# seconds between checkpoints
SAVE_EVERY = 60
# the learning rate of RL with LoRA that a small cloned model asks for; for others it was not tried
SMALL_RATE = 5e-4


def add_flags(parser):
    """The flags of a chat model. What is not given is None, and train.py's default is taken."""
    flags = parser.add_argument_group("with --model: a chat model")
    flags.add_argument("--model", help="a folder, or an instruct model on the hub")
    flags.add_argument("--tasks", help="task types, comma-separated (default: all)")
    flags.add_argument("--lora-rank", type=int, default=32)
    flags.add_argument("--demos", type=int, default=200, help="solved train tasks")
    flags.add_argument("--epochs", type=int, default=1, help="0: evaluate the model, and no more")
    flags.add_argument("--batch", type=int, default=16, help="turns of an update")
    flags.add_argument("--lr", type=float, default=1e-3, help="highest rate of the cloning")
    measure = ("both", "after", "none")
    flags.add_argument("--measure", choices=measure, default="both", help="before and after")
    flags.add_argument("--eval-episodes", type=int, help="on each of IID and OOD")
    flags.add_argument("--turns", type=int, help="turn limit, also of RL")
    flags.add_argument("--max-tokens", type=int, help="most tokens of a response, also in RL")
    for name in ("--dtype", "--device", "--simplifications", "--games"):
        flags.add_argument(name, help="as train.py's")
    flags.add_argument("--tokens-per-batch", type=int, help="as train.py's")


def warmstart(args):
    """Clone, or go on with cloning; write the model to args.out. Raises SetupError."""
    given = {name: getattr(args, name) for name in SHARED if getattr(args, name) is not None}
    unfinished = args.out + ".unfinished"
    cfg = Config(**given, think="off", lr=args.lr, out=unfinished)
    check(cfg)
    for name, least in (("demos", 1), ("batch", 1), ("epochs", 0), ("lr", 0)):
        if getattr(args, name) < least:
            raise SetupError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    if os.path.exists(args.out):
        raise SetupError(f"{args.out} exists already; choose another folder with --out")
    torch.manual_seed(cfg.seed)
    device, dtype = choose_device(cfg.device, cfg.dtype)
    policy = load_policy(cfg.model, cfg.env, device, dtype, cfg.lora_rank)
    policy.tokens_per_batch = cfg.tokens_per_batch
    if policy.compact:
        raise SetupError(f"{cfg.model} is a tiny policy; leave out --model to make one")
    os.makedirs(os.path.join(unfinished, "transcripts"), exist_ok=True)
    with locked(unfinished), make_world(cfg, task_names(cfg, policy), compact=True) as world:
        resolve(cfg, policy, world.turns)
        state = begin_or_resume(policy, world, args, cfg)
        clone(policy, state, args, cfg)
        result = state["result"]
        if args.epochs and args.measure != "none":
            result["after"] = measured(policy, world, cfg, 1)
        settings = {"think": "off", "tasks": list(world.names)}
    settings |= {"turns": cfg.turns, "max_tokens": cfg.max_tokens}
    if policy.model.num_parameters() < 1.5e9:
        settings["lora_lr"] = SMALL_RATE
    finish(policy, settings, result, unfinished, args)


def begin_or_resume(policy, world, args, cfg):
    """-> what a checkpoint holds: the turns to clone, how far it is, and what was measured"""
    path = os.path.join(cfg.out, "checkpoint.pt")
    own = {name: getattr(args, name) for name in ("demos", "epochs", "batch", "lr")}
    settings = {**asdict(cfg), **own}
    if os.path.exists(path):
        state = load_checkpoint(path)
        if state["result"]["settings"] != settings:
            raise SetupError(f"{cfg.out} is of other settings; give them, or remove it")
        restore(trained(policy.model), state["model"])
        return state
    # with a history, as any checkpoint, which is empty here
    state = {"step": 0, "optimizer": {}, "seconds": 0.0, "history": []}
    state["result"] = {"settings": settings}
    if args.measure == "both":
        state["result"]["before"] = measured(policy, world, cfg, 0)
    state["turns"] = demonstrate(policy, world, args.demos, cfg.seed) if args.epochs else []
    if args.epochs and not state["turns"]:
        raise SetupError("none of the demonstrations reaches its goal; give more --demos")
    save(policy, state, cfg)
    return state


def save(policy, state, cfg):
    state["model"] = trained(policy.model)
    save_tensors(os.path.join(cfg.out, "checkpoint.pt"), state)


def measured(policy, world, cfg, step):
    """Success and the share of valid turns on both splits."""
    tasks = {split: draw(world.tasks(split), cfg.eval_episodes, 0) for split in ("iid", "ood")}
    row = evaluate(world, policy, tasks, cfg, step)
    number = lambda split, what: two_digits(row[f"{split}_{what}"])
    shares = [f"{split.upper()} {number(split, 'success')}" for split in tasks]
    invalid = [f"{split.upper()} {number(split, 'invalid')}" for split in tasks]
    when = "after" if step else "before"
    text = f"success {', '.join(shares)}; invalid turns {', '.join(invalid)}"
    print(f"{when}: {text}; {row['seconds_eval']:.0f} s", flush=True)
    return row


def demonstrate(policy, world, number, seed):
    """Solve `number` train tasks -> [(prompt ids, response ids)] of their turns."""
    tasks = draw(world.tasks("train"), number, f"demonstrations {seed}")
    write = lambda past, now: policy.encode(policy.prompt(world, past, now))
    turns = []
    with progress("demonstrations", number) as bar:
        for first in range(0, number, 16):
            part = tasks[first : first + 16]
            for past in solutions(world, part):
                turns += demonstration(write, past)
            bar.update(len(part))
    print(f"{len(turns)} turns of {number} demonstrations", flush=True)
    answer = lambda action: policy.encode(f"<action>{action}</action>")
    return [(prompt, answer(action)) for prompt, action in turns]


def solutions(world, tasks):
    """-> [(Observation, action)] of each task that its solution solves, as the agent sees it"""
    if isinstance(world, ScienceWorld):
        return filter(None, [play_scienceworld(world, task) for task in tasks])
    plans = [world.gold(task) or [] for task in tasks]
    if isinstance(world, ALFWorld):
        plans = [useful_actions(plan) for plan in plans]
    played = play(world, tasks, plans)
    return [past for last, past in played if last and last.success]


def clone(policy, state, args, cfg):
    """Raise the log-prob of the demonstrated responses, from state["step"] on."""
    turns = [Turn(0, prompt, response, [], []) for prompt, response in state["turns"]]
    batches = []
    for epoch in range(args.epochs):
        order = random.Random(f"{cfg.seed} {epoch}").sample(range(len(turns)), len(turns))
        batches += [order[i : i + args.batch] for i in range(0, len(order), args.batch)]
    if state["step"] == len(batches):
        return
    parameters = trained(policy.model).values()
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, len(batches), pct_start=0.1)
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    begin = saved = time.perf_counter()
    with progress("clone", len(batches)) as bar:
        bar.update(state["step"])
        for step in range(state["step"], len(batches)):
            loss = add_gradient(policy, turns, batches[step], cfg.tokens_per_batch)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()
            now = time.perf_counter()
            if now - saved > SAVE_EVERY or step + 1 == len(batches):
                state["seconds"] += now - saved
                state |= {"step": step + 1, "optimizer": optimizer.state_dict()}
                state["schedule"] = schedule.state_dict()
                save(policy, state, cfg)
                saved = now
    seconds = time.perf_counter() - begin
    print(f"cloned {len(turns)} turns, last loss {loss:.3f}, {seconds:.0f} s", flush=True)


def add_gradient(policy, turns, batch, budget):
    """Backpropagate -log π of the responses of a batch: its mean over tokens, then turns."""
    total = 0.0
    for micro in micro_batches(turns, batch, budget):
        share = len(micro) / len(batch)
        loss = action_loss(policy.model, [turns[i] for i in micro]) * share
        loss.backward()
        total += loss.item()
    return total


def finish(policy, settings, result, unfinished, args):
    """Write the model with what was measured beside it, and remove the unfinished folder.

    The folder appears whole and at once; killed before that, the same command goes on.
    """
    whole = os.path.join(unfinished, "whole")
    shutil.rmtree(whole, ignore_errors=True)
    if args.epochs:
        save_model(policy, settings, whole)
    transcripts = os.path.join(unfinished, "transcripts")
    shutil.copytree(transcripts, os.path.join(whole, "transcripts"))
    write_json(os.path.join(whole, "warmstart.json"), result)
    os.rename(whole, args.out)
    shutil.rmtree(unfinished)
    print(f"wrote {args.out}")
