"""All that learns, how a run begins, and how it goes on from a checkpoint."""

import copy
import math
import os
from dataclasses import asdict, dataclass

import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

from critic import Critic
from rollout import Policy
from support import run_folder
from support.loading import trained
from support.run_folder import ANOTHER, SetupError, damaged, one_line


@dataclass
class Learner:
    """All that learns, and so all that a checkpoint holds. history is W_k = [H̄_0 … H̄_(k-1)]."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    critic: Critic | None
    critic_optimizer: torch.optim.Optimizer | None
    history: list


def make_learner(cfg, policy):
    """The reference policy, the critic and the optimizers, as a run begins."""
    if cfg.kl_coef and not cfg.lora_rank:
        policy.reference = copy.deepcopy(policy.model).requires_grad_(False)
    adamw = lambda parameters, lr: torch.optim.AdamW(
        parameters.values(), lr=lr, weight_decay=cfg.weight_decay, fused=True
    )
    optimizer = adamw(trained(policy.model), cfg.lr)
    if cfg.algo == "grpo":
        return Learner(policy, optimizer, None, None, [])
    critic = Critic(policy.model, cfg.lora_rank)
    return Learner(policy, optimizer, critic, adamw(critic.trained(), cfg.critic_lr), [])


def make_schedules(cfg, learner, first):
    """Linear warm-up, then a cosine to min_lr · lr, for the policy and the critic."""
    optimizers = [learner.optimizer] + [learner.critic_optimizer] * (cfg.algo == "ppo")
    warmup = math.ceil(cfg.warmup * cfg.steps)
    schedule = get_cosine_with_min_lr_schedule_with_warmup_lr_rate
    more = {"min_lr_rate": cfg.min_lr, "last_epoch": first - 1}
    return [schedule(optimizer, warmup, cfg.steps, **more) for optimizer in optimizers]


def save(cfg, learner, step):
    """Write checkpoint.pt. step: the first that is still to do."""
    state = {
        "step": step,
        "history": learner.history,
        "model": trained(learner.policy.model),
        "optimizer": learner.optimizer.state_dict(),
    }
    if learner.critic is not None:
        state["critic"] = learner.critic.trained()
        state["critic_optimizer"] = learner.critic_optimizer.state_dict()
    run_folder.save_tensors(os.path.join(cfg.out, "checkpoint.pt"), state)


def begin_or_resume(cfg, learner, eval_tasks):
    """Make the run folder, or restore its checkpoint. -> the first step to do"""
    path = os.path.join(cfg.out, "checkpoint.pt")
    if not cfg.resume:
        run_folder.begin(cfg.out, asdict(cfg), eval_tasks)
        return 0
    if not os.path.exists(path):
        # a kill between the first row and the first checkpoint leaves one row
        if len(run_folder.read_log(cfg.out)) > 1:
            raise SetupError(f"{path} is missing, but there is a log of several steps; {ANOTHER}")
        run_folder.rewind(cfg.out, 0)
        return 0
    saved = run_folder.load_checkpoint(path)
    if ("critic" in saved) != (cfg.algo == "ppo"):
        raise damaged(path, f"it is not of --algo {cfg.algo}, which config.json names")
    try:
        restore(learner, saved)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"{type(error).__name__}: {one_line(error)}") from error
    run_folder.rewind(cfg.out, saved["step"])
    return saved["step"]


def restore(learner, saved):
    """Put a checkpoint's values into all that learns."""
    run_folder.restore(trained(learner.policy.model), saved["model"])
    learner.optimizer.load_state_dict(saved["optimizer"])
    learner.history = list(map(float, saved["history"]))
    if learner.critic is not None:
        run_folder.restore(learner.critic.trained(), saved["critic"])
        learner.critic_optimizer.load_state_dict(saved["critic_optimizer"])
