"""Every setting of a run, with its default and its flag, and what is refused before any work starts."""
import argparse
import json
import os
from dataclasses import dataclass, field, fields

import torch

from envs import SetupError
from epo import beta, smoothing_loss
from presets import PRESETS

INSTRUCT = "HuggingFaceTB/SmolLM2-360M-Instruct"


def option(default, help, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass
class Config:
    env: str = option("scienceworld", "the world", choices=("scienceworld", "alfworld", "keyquest"))
    tasks: str = option("", "task types, comma-separated; default: those the tiny policy was warm-started on, else all")
    simplifications: str = option("easy", "ScienceWorld's simplifications: easy, none, or its names, comma-separated")
    games: str = option("auto", "ALFWorld's: the downloaded ones, ones generated from a seed; auto: generated if none are here",
                        choices=("auto", "real", "generated"))
    turns: int = option(0, "turn limit of an episode; 0: what the tiny policy is made for, else the world's: 30, ALFWorld 50 (as the paper)")
    model: str = option("", f"tiny, a folder, or an instruct model on the hub; default: tiny on a CPU, {INSTRUCT} on a GPU")
    lora_rank: int = option(0, "rank of LoRA adapters, which are then all that is trained; 0: all weights are")
    dtype: str = option("auto", "of matrix products; auto: bfloat16 on a GPU, float32 on a CPU", choices=("auto", "bfloat16", "float32"))
    max_tokens: int = option(0, "most tokens the policy may write in a turn; 0: 24 for a tiny policy, 512 for others")
    algo: str = option("grpo", "grpo: advantages from the other episodes of the group; ppo: from a critic, one per turn", choices=("grpo", "ppo"))
    steps: int = option(40, "RL steps K")
    tasks_per_step: int = option(8, "different tasks collected per step")
    group_size: int = option(8, "episodes of each task (the GRPO group)")
    temperature: float = option(1.0, "sampling temperature of training")
    minibatches: int = option(2, "optimizer updates per step; each takes an equal share of the episodes")
    tokens_per_batch: int = option(16384, "tokens per forward pass, padding counted; memory only, it can't change a gradient")
    lr: float = option(0.0, "learning rate at its peak; 0: what the tiny policy is made for, else 5e-6 (the paper)")
    warmup: float = option(0.05, "share of the steps in which the rate rises to lr (the paper: 0.1)")
    min_lr: float = option(0.2, "where the cosine ends, as a share of lr")
    weight_decay: float = option(0.01, "AdamW's")
    grad_clip: float = option(1.0, "largest gradient norm of an update")
    clip: float = option(0.2, "PPO's ε")
    entropy_coef: float = option(0.001, "λ, 0: no entropy terms")
    average: str = option("episode", "Eq. 2's mean over tokens, turns, episodes; or the flat mean over tokens", choices=("episode", "token"))
    smoothing: str = option("hinge", "form of Eq. 3; indicator is v1's, without a gradient", choices=("hinge", "indicator", "off"))
    kappa_l: float = option(0.0, "κ_l, the corridor's floor as a share of the mean entropy so far")
    kappa_r: float = option(2.0, "κ_r, its cap")
    alpha: float = option(0.1, "α; the cap pulls entropy back only where α·β_k > 1")
    gamma: float = option(3.0, "γ of β_k (Eq. 5)")
    dynamic_weight: str = option("on", "off: β = 1 in every step (the paper's EPO w/o DW)", choices=("on", "off"))
    window: int = option(0, "how many of the last steps make the mean entropy H̄_W; 0: all (the paper)")
    entropy_decay: float = option(0.0, "EPO-Decay: the entropy term weighs 1 + this at the first turn, 1 - this at the last")
    shaping: float = option(0.0, "η of EA, the entropy-shaped advantage; meant for --entropy-coef 0")
    kl_coef: float = option(0.1, "weight of the KL to the frozen starting policy (the paper: 0.01)")
    invalid_penalty: float = option(0.01, "taken from the return for each turn without a valid action (the paper: 0.1 of a reward of 10)")
    reward: str = option("sparse", "sparse: 1 for success, else 0; score: the world's final score / 100, not below 0", choices=("sparse", "score"))
    discount: float = option(1.0, "ppo: γ of the advantages, per turn")
    gae_lambda: float = option(1.0, "ppo: λ of the advantages (GAE)")
    critic_lr: float = option(0.0, "ppo: the critic's learning rate at its peak, same schedule; 0: 1e-3 for a tiny policy, else 1e-5")
    critic_minibatches: int = option(16, "ppo: the critic's updates per step; it starts from nothing, so it takes more than the policy")
    value_clip: float = option(0.5, "ppo: how far a value may move in a step before its loss is held")
    preset: str = option("", "named settings of presets.py; a flag given beside it wins")
    eval_every: int = option(20, "steps between evaluations; before the first and after the last step there is always one")
    eval_episodes: int = option(36, "episodes per evaluation on each of IID and OOD")
    eval_temperature: float = option(0.4, "sampling temperature of evaluations")
    seed: int = option(0, "seed of every random choice")
    device: str = option("auto", "auto: the GPU if there is one", choices=("auto", "cpu", "cuda"))
    out: str = option("", "run folder; default: runs/ENV")
    resume: bool = option(False, "continue the run in --out from its checkpoint")
    evaluate: str = option("", "score this checkpoint.pt of a run on the run's evaluation tasks, print the table, and train nothing")


class Parser(argparse.ArgumentParser):
    def error(self, message):                          # one line, not a page of usage
        self.exit(2, f"train.py: {message}; see --help\n")


def parse(arguments, description=None):
    """Command line -> Config. A resumed or evaluated run takes what is not given from its config.json; when resumed, nothing given
    may differ from it."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        more = {"action": "store_true"} if f.type is bool else {"type": f.type, "choices": f.metadata.get("choices")}
        parser.add_argument("--" + f.name.replace("_", "-"), help=f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%"), **more)
    given = vars(parser.parse_args(arguments))
    if name := given.get("preset"):
        if name not in PRESETS:
            raise SetupError(f"unknown --preset {name!r}; there are: {', '.join(PRESETS)}")
        if "resume" not in given:
            given = {**PRESETS[name], **given}
            print(f"preset {name}: " + ", ".join(f"{key} {given[key]}" for key in PRESETS[name]), flush=True)
    cfg = Config(**given)
    cfg.out = os.path.dirname(cfg.evaluate) if cfg.evaluate else cfg.out or os.path.join("runs", cfg.env)
    if cfg.resume or cfg.evaluate:
        flag = "--resume" if cfg.resume else "--evaluate"
        try:
            saved = json.load(open(os.path.join(cfg.out, "config.json")))
        except (OSError, ValueError) as error:
            raise SetupError(f"{flag}: {cfg.out} holds no run that can be read ({error})") from error
        if saved.keys() != {f.name for f in fields(Config)}:
            raise SetupError(f"{flag}: the run in {cfg.out} was made by a version with other flags; go on with that version")
        for name in given.keys() - {"out", "resume", "device", "tokens_per_batch"} if cfg.resume else ():
            if given[name] != saved[name]:
                raise SetupError(f"--resume: --{name.replace('_', '-')} is {given[name]}, but the run in {cfg.out} has {saved[name]}; leave it out")
        cfg = Config(**{**saved, **given, "out": cfg.out})
    elif os.path.exists(cfg.out):
        raise SetupError(f"{cfg.out} exists already; continue it with --resume, or choose another folder with --out")
    check(cfg)
    return cfg


def check(cfg):
    """Refuse what can't work before anything starts. Raises SetupError."""
    for name in ("steps", "tasks_per_step", "group_size", "minibatches", "tokens_per_batch", "eval_every", "eval_episodes", "temperature",
                 "eval_temperature", "grad_clip", "clip", "critic_minibatches", "value_clip"):
        if not getattr(cfg, name) > 0:
            raise SetupError(f"--{name.replace('_', '-')} must be positive, not {getattr(cfg, name)}")
    for name in ("turns", "lr", "critic_lr", "lora_rank", "entropy_coef", "kl_coef", "weight_decay", "invalid_penalty", "max_tokens", "warmup", "min_lr",
                 "window", "shaping"):
        if not getattr(cfg, name) >= 0:
            raise SetupError(f"--{name.replace('_', '-')} must not be negative, not {getattr(cfg, name)}")
    for name in ("discount", "gae_lambda", "entropy_decay"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise SetupError(f"--{name.replace('_', '-')} must lie between 0 and 1, not {getattr(cfg, name)}")
    if not 0 <= cfg.seed < 10 ** 12:                   # times a million it must be one of torch's
        raise SetupError(f"--seed must lie between 0 and 10^12, not {cfg.seed}")
    if cfg.smoothing == "indicator" and not cfg.entropy_coef:
        raise SetupError("--smoothing indicator --entropy-coef 0: without entropy terms (λ = 0) nothing is smoothed; leave one out")
    if cfg.algo == "grpo" and cfg.group_size < 2:
        raise SetupError(f"--group-size {cfg.group_size}: GRPO compares the episodes of a group, so it needs at least 2")
    if cfg.algo == "grpo" and (cfg.discount, cfg.gae_lambda) != (1, 1):
        raise SetupError("--discount and --gae-lambda are for --algo ppo: a GRPO advantage is the same in all turns of an episode")
    if cfg.tasks_per_step * cfg.group_size % cfg.minibatches:
        raise SetupError(f"--minibatches {cfg.minibatches} doesn't divide the {cfg.tasks_per_step * cfg.group_size} episodes of a step")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise SetupError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    try:
        beta(0, cfg.steps, cfg.gamma)
        smoothing_loss(torch.zeros(1, 1), 0.0, torch.ones(1, 1), cfg.kappa_l, cfg.kappa_r, cfg.alpha)
    except ValueError as error:
        raise SetupError(str(error)) from error
