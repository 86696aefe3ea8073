"""Every setting of a run: its default, its flag, and what is refused.

`decide` is the one place where settings are decided. A setting of yours is one field of Config, and
is passed by name where it acts.
"""

import argparse
import math
import os
import typing
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from transformers import HfArgumentParser

from envs import WORLDS, world_class
from policy import asked_for
from support.forward import RECOMPUTE_ABOVE
from support.report import read_arguments
from support.run_folder import SetupError, damaged, read_config

# a CPU reads as many as it can without running the forward pass twice
TOKENS = 16384 if torch.cuda.is_available() else RECOMPUTE_ABOVE


def option(default, text):
    """A field with its line of help. None means that `decide` decides it."""
    default_text = "" if default is None else f" (default: {default!r})"
    text = (text + default_text).replace("%", "%%")
    return field(default=default, metadata={"help": text})


Env = Literal[tuple(WORLDS)]
Switch = Literal["on", "off"]


@dataclass(frozen=True)
class Config:
    """The settings; `python train.py --help` lists them as flags."""

    env: Env = option("scienceworld", "the world")
    tasks: str | None = option(None, "task types, comma-separated; else the tiny policy's, or all")
    simplifications: str = option("easy", "ScienceWorld's: easy, none, or names, comma-separated")
    games: Literal["auto", "real", "generated"] = option("auto", "ALFWorld's; auto: real if here")
    turns: int | None = option(None, "turn limit; else the tiny policy's, or the world's (30, 50)")
    model: str = option("tiny", "tiny, a folder, or an instruct model on the hub")
    lora_rank: int = option(0, "rank of LoRA adapters, which alone are trained; 0: all weights are")
    dtype: Literal["auto", "bfloat16", "float32"] = option("auto", "auto: bfloat16 on a GPU")
    # on, the paper's: reason first. off: write the action alone, from a short prompt
    think: Switch | None = option(None, "reason first; else the model's own, or from 1.5 B on")
    max_tokens: int | None = option(None, "of a response; else the model's, 24 (tiny), 512, or 32")
    algo: Literal["grpo", "ppo"] = option("grpo", "the baseline: the group's mean, or a critic")
    steps: int = option(40, "RL steps K; 0: evaluate the model, and train nothing")
    tasks_per_step: int = option(8, "tasks of a step, different while there are enough")
    group_size: int = option(8, "episodes of each task (the GRPO group)")
    temperature: float = option(1.0, "sampling temperature of training")
    minibatches: int = option(2, "updates per step; each takes an equal share of the episodes")
    tokens_per_batch: int = option(TOKENS, "tokens of a forward pass; it cannot change a gradient")
    recompute: Literal["auto", "on", "off"] = option("auto", "layers, for less memory on a GPU")
    lr: float | None = option(None, "peak rate; else the model's own, 5e-6 (paper), 1e-4 (LoRA)")
    warmup: float = option(0.05, "share of the steps in which the rate rises to lr (paper: 0.1)")
    min_lr: float = option(0.2, "where the cosine schedule ends, as a share of lr")
    weight_decay: float = option(0.01, "AdamW's")
    grad_clip: float = option(1.0, "largest gradient norm of an update")
    clip: float = option(0.2, "PPO's ε")
    clip_high: float | None = option(
        None, "another ε above 1, DAPO's clip-higher (0.28); else clip"
    )
    entropy_coef: float = option(0.001, "λ, 0: no entropy terms")
    entropy_target: float | None = option(None, "nats: λ follows H̄, from 0 by 0.002 (Skywork-OR1)")
    # episode is Eq. 2's mean over tokens, turns, episodes; token is the flat one
    average: Literal["episode", "token"] = option("episode", "every term's mean; token: flat")
    smoothing: Literal["hinge", "indicator", "off"] = option("hinge", "form of P, Eq. 3")
    kappa_l: float = option(0.0, "κ_l, the corridor's floor as a share of H̄_W")
    kappa_r: float = option(2.0, "κ_r, its cap; inf: no cap")
    alpha: float = option(0.05, "α; the cap pulls entropy back only where α·β_k > 1")
    gamma: float = option(3.0, "γ of β_k (Eq. 5)")
    dynamic_weight: Switch = option("on", "off: β_k = 1 always (the paper's EPO w/o DW)")
    window: int | None = option(None, "how many of the last steps make H̄_W; else all (the paper)")
    entropy_decay: float = option(0.0, "EPO-Decay: L_H weighs 1 + this at turn 0, 1 - this at last")
    shaping: float = option(0.0, "η of EA, the shaped advantage; meant for --entropy-coef 0")
    kl_coef: float = option(0.1, "weight of the KL to the reference policy (the paper: 0.01)")
    invalid_penalty: float = option(0.01, "for a turn without a valid action (paper: 0.1 of 10)")
    reward: Literal["sparse", "score"] = option("sparse", "1 for success; or the score / 100")
    discount: float = option(1.0, "ppo: γ of the advantages, per turn")
    gae_lambda: float = option(1.0, "ppo: λ of the advantages (GAE)")
    critic_lr: float | None = option(None, "ppo: the critic's peak rate; else 1e-3 (tiny) or 1e-5")
    critic_minibatches: int = option(16, "ppo: the critic's updates per step")
    value_clip: float = option(0.5, "ppo: how far a value may move in a step before it is clipped")
    eval_every: int = option(20, "steps between evaluations; the first and the last are always")
    eval_episodes: int = option(128, "episodes per evaluation on each of IID and OOD")
    eval_temperature: float = option(0.4, "sampling temperature of evaluations")
    seed: int = option(0, "seed of every random choice")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda, else cpu")
    out: str | None = option(None, "run folder; else runs/ENV")
    resume: bool = option(False, "continue the run in --out from its checkpoint")

    @property
    def task_names(self):
        """The task types to play; () for all of the world's."""
        names = (self.tasks or "").split(",")
        return tuple(name.strip() for name in names if name.strip())

    def unusual(self):
        """{name: value} of the settings that are not their field's default."""
        return {f.name: value for f in fields(self) if (value := vars(self)[f.name]) != f.default}


def allowed(hint):
    """A field's type -> the types that its value may have, and its choices, [] for any."""
    parts = [hint] if typing.get_origin(hint) in (None, Literal) else typing.get_args(hint)
    choices = [choice for part in parts for choice in typing.get_args(part)]
    return [str if typing.get_args(part) else part for part in parts], choices


ALLOWED = {name: allowed(hint) for name, hint in typing.get_type_hints(Config).items()}


def parse_flags(arguments, description=None):
    """Command line -> {name: value} of the flags that were given. Ends in one line for others."""
    more = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = HfArgumentParser(Config, description=description, **more)
    not_given = object()
    parser.set_defaults(**{name: not_given for name in ALLOWED})
    values = vars(read_arguments(parser, "train.py", arguments))
    return {name: value for name, value in values.items() if value is not not_given}


def decide(given):
    """The settings of a run -> Config: checked as a whole, with nothing left to decide.

    given: {name: value} of the flags. Where they say nothing the model's folder does, then the
    world, then the defaults. A resumed run has them in its config.json. Raises SetupError.
    """
    if given.get("out") == "":
        raise SetupError("--out is empty; leave it out, or name a folder")
    start = checked(saved_settings(given) if given.get("resume") else given)
    # what is None or "auto" is decided by the first of these that has a value for it
    model = asked_for(start.model, start.env)
    if type(model["tasks"]) is list:
        model["tasks"] = ",".join(map(str, model["tasks"]))
    if start.lora_rank:
        # an adapter needs a higher rate than all weights do; a tiny policy's is high enough
        model["lr"] = model["lr"] if model["compact"] else None
        if model["lora_lr"] is not None:
            model["lr"] = model["lora_lr"]
    long = (start.think or model["think"]) == "on"
    defaults = {
        "out": os.path.join("runs", start.env),
        "lr": 1e-4 if start.lora_rank else 5e-6,
        "max_tokens": 24 if model["compact"] else (512 if long else 32),
        "critic_lr": 1e-3 if model["compact"] else 1e-5,
    }
    values = dict(vars(start))
    for decided in (model, world_class(start.env).asks(values), defaults):
        for name in decided.keys() & values.keys():
            if values[name] in (None, "auto"):
                values[name] = decided[name]
    try:
        cfg = checked(values)
    except SetupError as error:
        # what was given has been checked
        raise SetupError(f"the config.json of model {start.model!r}: {error}") from error
    refuse_idle(given, cfg, model["compact"])
    return cfg


def saved_settings(given):
    """Those of the run that is resumed, with what may be given anew. Raises SetupError."""
    out = given.get("out") or os.path.join("runs", given.get("env", Config.env))
    saved, where = read_config(out), os.path.join(out, "config.json")
    if unknown := saved.keys() - ALLOWED.keys():
        raise damaged(where, f"{min(unknown)!r:.30} is no setting here")
    if missing := ALLOWED.keys() - saved.keys():
        print(f"{where} lacks {', '.join(sorted(missing))}: the defaults are taken", flush=True)
    try:
        # this machine's device need not be that of the run
        checked({**saved, "device": "auto"})
    except SetupError as error:
        raise damaged(where, error) from error
    for name in given.keys() - {"out", "resume", "device", "tokens_per_batch", "recompute"}:
        if given[name] != saved.get(name):
            values = f"{flag(name)} is {given[name]}, but the run has {saved.get(name)}"
            raise SetupError(f"--resume: {values}; leave it out")
    # what was asked for, not what a file says
    return {**saved, **given, "out": out}


# nothing works with more, and float32 and torch's integers hold it
LARGEST = 1_000_000_000_000
# the least and the largest value of a number; else up to LARGEST, from 0.0 or from 1
BOUNDS = {
    # colder, float32 cannot hold the KL, or the logits
    "temperature": (0.05, 100),
    "eval_temperature": (0.01, 100),
    # no layer is wider, and torch's seeds stay in range
    "lora_rank": (0, 100_000),
    "seed": (0, 999_999_999_999),
    "eval_episodes": (1, 1_000_000),
    **dict.fromkeys(["tasks_per_step", "group_size"], (1, 1000)),
    "steps": (0, LARGEST),
    **dict.fromkeys("discount gae_lambda entropy_decay warmup min_lr".split(), (0, 1)),
    **dict.fromkeys("clip clip_high value_clip grad_clip".split(), (1e-9, LARGEST)),
}


def flag(name):
    return "--" + name.replace("_", "-")


def checked(values):
    """{name: value} -> Config; None is not decided yet. SetupError for what cannot work."""
    # JSON has 1 where 1.0 is meant; a larger one is refused as it is
    whole = [name for name, value in values.items() if type(value) is int and abs(value) <= LARGEST]
    floats = {name: float(values[name]) for name in whole if float in ALLOWED[name][0]}
    cfg = Config(**values | floats)
    for name, (types, choices) in ALLOWED.items():
        what, value = flag(name), vars(cfg)[name]
        low, high = BOUNDS.get(name, (type(value) is int, LARGEST))
        if type(value) not in types:
            raise SetupError(f"{what} {value!r:.30} is not of type {types[0].__name__}")
        if choices and value not in (*choices, None):
            raise SetupError(f"{what} {value!r:.30} is not one of {', '.join(choices)}")
        no_cap = (name, value) == ("kappa_r", math.inf)
        # also of nan, which is not above anything
        if type(value) in (int, float) and not (low <= value <= high or no_cap):
            raise SetupError(f"{what} must be between {low:g} and {high:g}, not {value!r:.30}")
    if cfg.kappa_l > cfg.kappa_r:
        raise SetupError(f"--kappa-l {cfg.kappa_l} is above --kappa-r {cfg.kappa_r}")
    if cfg.algo == "grpo" and cfg.group_size == 1:
        raise SetupError("--group-size 1: GRPO compares the episodes of a group; give at least 2")
    episodes = cfg.tasks_per_step * cfg.group_size
    if episodes % cfg.minibatches:
        raise SetupError(f"--minibatches {cfg.minibatches} doesn't divide the {episodes} episodes")
    if cfg.device != "auto" and not torch.get_device_module(cfg.device).is_available():
        raise SetupError(f"--device {cfg.device}: PyTorch sees no such GPU here; use --device cpu")
    return cfg


CORRIDOR = "kappa_l kappa_r alpha gamma dynamic_weight window"
# a setting and its value: what then does nothing
IDLE = {
    ("env", "scienceworld"): "games",
    ("env", "alfworld"): "simplifications",
    ("env", "keyquest"): "games simplifications",
    ("algo", "grpo"): "discount gae_lambda critic_lr critic_minibatches value_clip",
    ("entropy_coef", 0): f"smoothing entropy_decay {CORRIDOR}",
    ("smoothing", "off"): CORRIDOR,
    ("dynamic_weight", "off"): "gamma",
}


def refuse_idle(given, cfg, compact):
    """Refuse a flag where it does nothing; a saved run may have it. SetupError.

    To switch off what is off is no mistake. compact: a tiny policy plays.
    """
    idle, values = {}, dict(vars(cfg))
    if compact:
        idle["think"] = idle["recompute"] = "a tiny policy"
    if cfg.entropy_target is not None:
        # λ is not what entropy_coef says
        idle["entropy_coef"], values["entropy_coef"] = "--entropy-target", None
    for (name, value), names in IDLE.items():
        if values[name] == value:
            idle |= dict.fromkeys(names.split(), f"{flag(name)} {value}")
    for name, value in given.items():
        if name in idle and value is not None and (value != "off" or name == "think"):
            raise SetupError(f"{flag(name)} does nothing with {idle[name]}; leave it out")
