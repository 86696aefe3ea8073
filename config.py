"""Every setting of a run: its default, its flag, the named presets, and what is refused.

A setting of yours is one field of Config, read where it is used. A field that is named as a keyword
of `epo_loss` or `group_advantages` reaches that function.
"""

import argparse
import inspect
import math
import os
import typing
from dataclasses import asdict, dataclass, field, fields

import torch
from transformers import HfArgumentParser

from envs import WORLDS
from epo import beta, smoothing_loss
from support.forward import RECOMPUTE_ABOVE
from support.run_folder import SetupError, damaged, is_new, read_config

# a CPU reads as many as it can without running the forward pass twice
TOKENS = 16384 if torch.cuda.is_available() else RECOMPUTE_ABOVE


def option(default, text, **more):
    """A field with its line of help. None means that the setting is decided elsewhere."""
    default_text = "" if default is None else f" (default: {default!r})"
    text = (text + default_text).replace("%", "%%")
    return field(default=default, metadata={"help": text, **more})


@dataclass
class Config:
    """The settings; `python train.py --help` lists them as flags."""

    env: str = option("scienceworld", "the world", choices=tuple(WORLDS))
    tasks: str | None = option(None, "task types, comma-separated; else the tiny policy's, or all")
    simplifications: str = option("easy", "ScienceWorld's: easy, none, or names, comma-separated")
    games: str = option(
        "auto",
        "ALFWorld's: downloaded or generated ones; auto: generated if none are here",
        choices=("auto", "real", "generated"),
    )
    turns: int | None = option(None, "turn limit; else the tiny policy's, or the world's (30, 50)")
    model: str = option("tiny", "tiny, a folder, or an instruct model on the hub")
    lora_rank: int = option(0, "rank of LoRA adapters, which alone are trained; 0: all weights are")
    dtype: str = option(
        "auto",
        "of matrix products; auto: bfloat16 on a GPU, else float32",
        choices=("auto", "bfloat16", "float32"),
    )
    think: str | None = option(
        None,
        "chat models: on: reason first, as the paper; off: the action alone, from a short prompt; "
        "else the model's own, or on from 1.5 billion parameters",
        choices=("on", "off"),
    )
    max_tokens: int | None = option(
        None, "most tokens of a response; else the model's, or 24 (tiny), 512, 32 (--think off)"
    )
    algo: str = option(
        "grpo",
        "grpo: the baseline is the group's mean return; ppo: it is a critic's value of the turn",
        choices=("grpo", "ppo"),
    )
    steps: int = option(40, "RL steps K")
    tasks_per_step: int = option(8, "different tasks collected per step")
    group_size: int = option(8, "episodes of each task (the GRPO group)")
    temperature: float = option(1.0, "sampling temperature of training")
    minibatches: int = option(2, "updates per step; each takes an equal share of the episodes")
    tokens_per_batch: int = option(TOKENS, "tokens of a forward pass; it cannot change a gradient")
    lr: float | None = option(
        None, "peak learning rate; else the model's own, or 5e-6 (the paper), 1e-4 with LoRA"
    )
    warmup: float = option(0.05, "share of the steps in which the rate rises to lr (paper: 0.1)")
    min_lr: float = option(0.2, "where the cosine schedule ends, as a share of lr")
    weight_decay: float = option(0.01, "AdamW's")
    grad_clip: float = option(1.0, "largest gradient norm of an update")
    clip: float = option(0.2, "PPO's ε")
    entropy_coef: float = option(0.001, "λ, 0: no entropy terms")
    average: str = option(
        "episode",
        "episode: Eq. 2's mean over tokens, turns, episodes; token: the flat mean",
        choices=("episode", "token"),
    )
    smoothing: str = option(
        "hinge",
        "form of Eq. 3; indicator is v1's, without a gradient",
        choices=("hinge", "indicator", "off"),
    )
    kappa_l: float = option(0.0, "κ_l, the corridor's floor as a share of H̄_W")
    kappa_r: float = option(2.0, "κ_r, its cap; inf: no cap")
    alpha: float = option(0.05, "α; the cap pulls entropy back only where α·β_k > 1")
    gamma: float = option(3.0, "γ of β_k (Eq. 5)")
    dynamic_weight: str = option(
        "on", "off: β_k = 1 in every step (the paper's EPO w/o DW)", choices=("on", "off")
    )
    window: int | None = option(None, "how many of the last steps make H̄_W; else all (the paper)")
    entropy_decay: float = option(0.0, "EPO-Decay: L_H weighs 1 + this at turn 0, 1 - this at last")
    shaping: float = option(0.0, "η of EA, the shaped advantage; meant for --entropy-coef 0")
    kl_coef: float = option(0.1, "weight of the KL to the reference policy (the paper: 0.01)")
    invalid_penalty: float = option(0.01, "for a turn without a valid action (paper: 0.1 of 10)")
    reward: str = option(
        "sparse",
        "sparse: 1 for success, else 0; score: the final score / 100, not below 0",
        choices=("sparse", "score"),
    )
    discount: float = option(1.0, "ppo: γ of the advantages, per turn")
    gae_lambda: float = option(1.0, "ppo: λ of the advantages (GAE)")
    critic_lr: float | None = option(None, "ppo: the critic's peak rate; else 1e-3 (tiny) or 1e-5")
    critic_minibatches: int = option(16, "ppo: the critic's updates per step")
    value_clip: float = option(0.5, "ppo: how far a value may move in a step before it is clipped")
    preset: str | None = option(None, "named settings (config.py); a flag given beside it wins")
    eval_every: int = option(20, "steps between evaluations; the first and the last are always")
    eval_episodes: int = option(128, "episodes per evaluation on each of IID and OOD")
    eval_temperature: float = option(0.4, "sampling temperature of evaluations")
    seed: int = option(0, "seed of every random choice")
    device: str = option(
        "auto",
        "auto: cuda if there is such a GPU, else cpu; mps: Apple's, untested",
        choices=("auto", "cpu", "cuda", "mps"),
    )
    out: str | None = option(None, "run folder; else runs/ENV")
    resume: bool = option(False, "continue the run in --out from its checkpoint")
    evaluate: str | None = option(None, "a run's checkpoint.pt: print its success, train nothing")


def settings_of(cfg, function):
    """The settings that are keywords of a function of epo.py."""
    keywords = inspect.signature(function).parameters
    return {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name in keywords}


# ---- Presets: the paper's settings (its Tables 2 and 3), and tiny ones for a CPU. The paper counts
# mini-batches in turns (PPO 64, GRPO 128, ALFWorld 256), here they are updates of a step: with 128
# episodes of about 20 turns these are near to it.
PAPER = dict(steps=125, turns=30, max_tokens=512, tasks_per_step=16, group_size=8)
PAPER |= dict(weight_decay=0.01, warmup=0.1, min_lr=0.2, kl_coef=0.01, invalid_penalty=0.01)
PAPER |= dict(eval_every=5, eval_temperature=0.4)
SCIENCEWORLD = dict(PAPER, env="scienceworld", model="Qwen/Qwen2.5-7B-Instruct", alpha=0.05)
ALFWORLD = dict(PAPER, env="alfworld", model="Qwen/Qwen2.5-3B-Instruct", alpha=0.1)
ALFWORLD |= dict(steps=150, turns=50, lr=5e-6, minibatches=16)
TINY = dict(env="scienceworld", model="tiny")
PPO = dict(algo="ppo", lr=3e-6, minibatches=32, critic_lr=1e-5, critic_minibatches=32)
GRPO = dict(algo="grpo", lr=5e-6, minibatches=16)
EPO = dict(entropy_coef=0.001, smoothing="hinge", kappa_l=0.0, kappa_r=2.0, gamma=3.0)
PLAIN = dict(entropy_coef=0.0, smoothing="off")
# what each ablation changes of EPO
ABLATIONS = {
    "plain": PLAIN,
    "epo": {},
    "base": dict(smoothing="off"),
    "indicator": dict(smoothing="indicator"),
    "constant": dict(dynamic_weight="off"),
    "window": dict(window=10),
    "decay": dict(smoothing="off", entropy_decay=0.5),
    "ea": dict(PLAIN, shaping=0.4),
}
PRESETS = {}
for ablation, changes in ABLATIONS.items():
    for algorithm, paper in (("ppo", PPO), ("grpo", GRPO)):
        PRESETS[f"tiny-{algorithm}-{ablation}"] = {**TINY, "algo": algorithm, **EPO, **changes}
        if ablation in ("plain", "epo"):
            for world in (SCIENCEWORLD, ALFWORLD):
                preset = {**paper, **world, **EPO, **changes}
                PRESETS[f"{world['env']}-{algorithm}-{ablation}"] = preset


def parse(arguments, description=None):
    """Command line -> Config. Raises SetupError; ends the program in one line for unknown flags.

    A resumed or evaluated run takes what is not given from its config.json. A resumed run refuses
    a flag that differs from it.
    """
    given = parse_flags(arguments, description)
    name = given.get("preset")
    if name is not None and name not in PRESETS:
        raise SetupError(f"unknown --preset {name!r}; there are: {', '.join(PRESETS)}")
    if name is not None and "resume" not in given:
        given = {**PRESETS[name], **given}
        text = ", ".join(f"{key} {given[key]}" for key in PRESETS[name])
        print(f"preset {name}: {text}", flush=True)
    cfg = Config(**given)
    if cfg.evaluate is not None:
        cfg.out = os.path.dirname(cfg.evaluate) or "."
    if cfg.out is None:
        cfg.out = os.path.join("runs", cfg.env)
    if cfg.resume or cfg.evaluate is not None:
        cfg = saved_config(cfg, given)
    elif not is_new(cfg.out):
        message = "continue it with --resume, or choose another folder with --out"
        raise SetupError(f"{cfg.out} exists already; {message}")
    check(cfg)
    return cfg


def parse_flags(arguments, description):
    """-> {name: value} of the flags that were given."""
    more = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = HfArgumentParser(Config, description=description, **more)
    # one line, not a page of usage
    parser.error = lambda message: parser.exit(2, f"train.py: {message}; see --help\n")
    not_given = object()
    parser.set_defaults(**{f.name: not_given for f in fields(Config)})
    values = vars(parser.parse_args(arguments))
    given = {name: value for name, value in values.items() if value is not not_given}
    for name in ("out", "evaluate"):
        if given.get(name) == "":
            raise SetupError(f"--{name} is empty; leave it out, or name what you mean")
    return given


def saved_config(cfg, given):
    """The configuration of the run in cfg.out, with what may be given anew. Raises SetupError."""
    saved = read_config(cfg.out)
    known = {f.name for f in fields(Config)}
    where = os.path.join(cfg.out, "config.json")
    if unknown := saved.keys() - known:
        raise damaged(where, f"{min(unknown)!r:.30} is no setting here")
    if missing := known - saved.keys():
        print(f"{where} lacks {', '.join(sorted(missing))}: the defaults are taken", flush=True)
    try:
        # this machine's device need not be that of the run
        check(Config(**{**saved, "device": "auto"}))
    except SetupError as error:
        raise damaged(where, error) from error
    if cfg.resume:
        for name in given.keys() - {"out", "resume", "device", "tokens_per_batch"}:
            if given[name] != saved.get(name):
                flag = "--" + name.replace("_", "-")
                values = f"{flag} is {given[name]}, but the run has {saved.get(name)}"
                raise SetupError(f"--resume: {values}; leave it out")
    # what was asked for, not what a file says
    own = {"out": cfg.out, "resume": cfg.resume, "evaluate": cfg.evaluate}
    return Config(**{**saved, **given, **own})


POSITIVE = (
    "steps tasks_per_step group_size minibatches tokens_per_batch turns max_tokens window "
    "eval_every eval_episodes grad_clip clip critic_minibatches value_clip"
).split()
NOT_NEGATIVE = "lr critic_lr lora_rank entropy_coef kl_coef weight_decay invalid_penalty shaping"
SHARES = ("discount", "gae_lambda", "entropy_decay", "warmup", "min_lr")
BOUNDS = {name: (0, 1) for name in SHARES}
BOUNDS |= {name: (0, math.inf) for name in NOT_NEGATIVE.split()}
# colder than that, float32 cannot hold the KL, or the logits
BOUNDS |= {"temperature": (0.05, 100), "eval_temperature": (0.01, 100)}
# no layer is wider; torch's seeds stay in range
BOUNDS |= {"lora_rank": (0, 10**5), "seed": (0, 10**12 - 1)}
MOST_EPISODES = 10**6
# nothing works with more, and float32 and torch's integers hold it
LARGEST = 10**12


def check(cfg):
    """Refuse what cannot work before any work starts. Raises SetupError."""
    check_types(cfg)
    for name in POSITIVE:
        value = getattr(cfg, name)
        if value is not None and not value > 0:
            raise SetupError(f"--{name.replace('_', '-')} must be positive, not {value}")
    for name, (low, high) in BOUNDS.items():
        value = getattr(cfg, name)
        if value is not None and not low <= value <= high:
            limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise SetupError(f"--{name.replace('_', '-')} must be {limits}, not {value}")
    episodes = cfg.tasks_per_step * cfg.group_size
    if max(episodes, cfg.eval_episodes) > MOST_EPISODES:
        flags = "--eval-episodes, and --tasks-per-step times --group-size,"
        raise SetupError(f"{flags} must be at most {MOST_EPISODES}")
    if cfg.smoothing == "indicator" and not cfg.entropy_coef:
        raise SetupError("--smoothing indicator --entropy-coef 0: without λ nothing is smoothed")
    if cfg.algo == "grpo" and cfg.group_size < 2:
        message = "GRPO compares the episodes of a group, so it needs at least 2"
        raise SetupError(f"--group-size {cfg.group_size}: {message}")
    if cfg.algo == "grpo" and (cfg.discount, cfg.gae_lambda) != (1, 1):
        raise SetupError("--discount and --gae-lambda are for --algo ppo: GRPO has no critic")
    if episodes % cfg.minibatches:
        raise SetupError(f"--minibatches {cfg.minibatches} doesn't divide the {episodes} episodes")
    if cfg.device != "auto" and not torch.get_device_module(cfg.device).is_available():
        raise SetupError(f"--device {cfg.device}: PyTorch sees no such GPU here; use --device cpu")
    try:
        beta(0, cfg.steps, cfg.gamma)
        smoothing_loss(torch.zeros(1), 0.0, torch.ones(1), cfg.kappa_l, cfg.kappa_r, cfg.alpha)
    except ValueError as error:
        raise SetupError(str(error)) from error


def check_types(cfg):
    """Raises SetupError unless each value has its field's type, is finite and a choice."""
    types = typing.get_type_hints(Config)
    for f in fields(cfg):
        value, allowed = getattr(cfg, f.name), typing.get_args(types[f.name]) or (types[f.name],)
        flag = "--" + f.name.replace("_", "-")
        # also of nan, which is not below anything
        too_large = type(value) in (int, float) and not abs(value) <= LARGEST
        if too_large and not (f.name == "kappa_r" and value == math.inf):
            raise SetupError(f"{flag}: {value!r:.30} is not a number of at most {LARGEST:g}")
        if float in allowed and type(value) is int:
            value = float(value)
            setattr(cfg, f.name, value)
        if type(value) not in allowed:
            raise SetupError(f"{flag}: {value!r:.30} is not of type {allowed[0].__name__}")
        choices = f.metadata.get("choices")
        if choices and value not in (*choices, f.default):
            raise SetupError(f"{flag}: {value!r:.30} is not one of {', '.join(choices)}")


def resolve(cfg, policy, world_turns):
    """Decide what the user left to the policy and the world, and print it."""
    before, tiny, made_for = asdict(cfg), policy.compact, policy.made_for
    cfg.think = cfg.think or made_for["think"]
    policy.think = cfg.think == "on"
    rate = made_for["lr"]
    # an adapter needs a higher rate than all weights do; a tiny policy's is high enough
    if cfg.lora_rank:
        rate = made_for["lora_lr"] or (rate if tiny else None)
    tokens = 24 if tiny else {"on": 512, "off": 32}[cfg.think]
    choices = {
        "turns": made_for["turns"] or world_turns,
        "lr": rate or (1e-4 if cfg.lora_rank else 5e-6),
        "max_tokens": made_for["max_tokens"] or tokens,
        "critic_lr": 1e-3 if tiny else 1e-5,
    }
    for name, value in choices.items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    decided = [f"{name} {value}" for name, value in asdict(cfg).items() if before[name] != value]
    if decided:
        print("decided here: " + ", ".join(decided), flush=True)


def asked_for(cfg, policy):
    """What the model that a run leaves asks for in its configuration (support/loading.py)."""
    names = list(task_names(cfg, policy)) or None
    settings = {"tasks": names, "lora_lr" if cfg.lora_rank else "lr": cfg.lr}
    return settings | {name: getattr(cfg, name) for name in ("think", "turns", "max_tokens")}


def task_names(cfg, policy):
    """The task types to play as a tuple; () for all of the world's."""
    if cfg.tasks is None:
        return tuple(policy.made_for["tasks"] or ())
    return tuple(filter(None, (name.strip() for name in cfg.tasks.split(","))))
