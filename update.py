"""The update of a step: Eq. 6 over one flat row of tokens, in little memory, in a few updates."""

import copy
import math
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm
from transformers import get_cosine_with_min_lr_schedule_with_warmup_lr_rate as cosine_schedule

from critic import Critic
from epo import corridor, decayed_weights, epo_loss, shaped_advantages, token_weights
from policy import Policy, response_states, score_tokens, trained
from support.forward import micro_batches
from support.run_folder import SetupError

# 128 MB of float32; the loss and its gradient take about six times that
LOGITS_AT_ONCE = 2**25


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
    optimizer = make_optimizer(trained(policy.model), cfg.lr, cfg.weight_decay)
    critic = critic_optimizer = None
    if cfg.algo == "ppo":
        critic = Critic(policy.model, cfg.lora_rank)
        critic_optimizer = make_optimizer(critic.trained(), cfg.critic_lr, cfg.weight_decay)
    return Learner(policy, optimizer, critic, critic_optimizer, history=[])


def make_optimizer(parameters, lr, weight_decay):
    """AdamW with all of its state from the beginning, as a checkpoint is compared with it."""
    adamw = torch.optim.AdamW(parameters.values(), lr, weight_decay=weight_decay, fused=True)
    # a schedule that goes on needs it
    adamw.param_groups[0]["initial_lr"] = lr
    for p in parameters.values():
        moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        adamw.state[p] = {"step": torch.tensor(0.0, device=p.device), **moments}
    return adamw


def load_optimizer(optimizer, saved):
    """Put a checkpoint's state, which is of the form of its own, into a new optimizer."""
    groups = optimizer.state_dict()["param_groups"]
    # its own zeros would take memory beside it
    optimizer.state.clear()
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def make_schedules(cfg, learner, first):
    """Linear warm-up, then a cosine to min_lr · lr, for the policy and the critic."""
    warmup = math.ceil(cfg.warmup * cfg.steps)
    more = {"min_lr_rate": cfg.min_lr, "last_epoch": first - 1}
    optimizers = filter(None, [learner.optimizer, learner.critic_optimizer])
    return [cosine_schedule(optimizer, warmup, cfg.steps, **more) for optimizer in optimizers]


@dataclass
class Batch:
    """The T response tokens of a step in one flat row, turn after turn; each tensor is (T,)."""

    tokens: torch.Tensor
    turn: torch.Tensor  # the number of its turn in the batch
    episode: torch.Tensor  # the number of its episode in the batch
    index: torch.Tensor  # the number of its turn in the episode
    old_logp: torch.Tensor  # under the policy that sampled it
    entropy: torch.Tensor  # of that policy, too
    advantages: torch.Tensor
    weights: torch.Tensor  # in Eq. 2's average

    def select(self, rows, device="cpu"):
        return Batch(*(column[rows].to(device) for column in vars(self).values()))


def make_batch(turns, owner, advantages, cfg):
    """One flat row of tokens. owner (N,): the episode of a turn; advantages (N,) of the turns."""
    lengths = torch.tensor([len(turn.response) for turn in turns])
    number = torch.arange(len(turns)).repeat_interleave(lengths)  # (T,)
    flat = lambda name: torch.tensor([x for turn in turns for x in getattr(turn, name)])
    return Batch(
        tokens=flat("response"),
        turn=number,
        episode=owner[number],
        index=torch.tensor([turn.index for turn in turns])[number],
        old_logp=flat("logp"),
        entropy=flat("entropy"),
        advantages=advantages[number],
        weights=token_weights(number, owner[number], cfg.average),
    )


def update(learner, turns, batch, history_mean, beta_k, cfg):
    """One pass over the step's tokens in cfg.minibatches updates -> their mean losses.

    A mini-batch has its share of the batch's weights times the number of mini-batches: an unbiased
    estimate of the batch's gradient.
    """
    model, optimizer = learner.policy.model, learner.optimizer
    rows_of = torch.arange(len(batch.turn)).split(torch.bincount(batch.turn).tolist())
    order = torch.randperm(int(batch.episode.max()) + 1)
    parts = min(cfg.minibatches, len(order))
    batch = replace(batch, weights=batch.weights * parts)
    losses, norms = {}, []
    for part in range(parts):
        chosen = batch.turn[torch.isin(batch.episode, order[part::parts])].unique()
        micros = micro_batches(turns, chosen.tolist(), cfg.tokens_per_batch)
        for micro in tqdm(micros, "micro-batches", leave=False, disable=None):
            of_micro = batch.select(torch.cat([rows_of[i] for i in micro]))
            played = [turns[i] for i in micro]
            terms = add_gradient(learner.policy, played, of_micro, history_mean, beta_k, cfg)
            losses = {name: losses.get(name, 0.0) + terms[name] / parts for name in terms}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item()
        if not math.isfinite(norm + losses["loss"]):
            raise SetupError("the loss or its gradient is not finite: begin anew with a lower --lr")
        norms.append(norm)
        optimizer.step()
        optimizer.zero_grad()
    return {**losses, "grad_norm": sum(norms) / len(norms)}


def add_gradient(policy, turns, batch, history_mean, beta_k, cfg):
    """Backpropagate the loss of some turns. -> its terms

    The loss is a sum over tokens, so it goes back to the last hidden states for a few hundred of
    them at a time, and from there through the model once. A (T, V) matrix never exists whole.
    """
    reference = policy.reference_states(turns) if cfg.kl_coef else None
    hidden = response_states(policy.model, turns)  # (T, d)
    states = hidden.detach().requires_grad_()
    # as exact as the log-probs will be; not every device has float64
    exact = torch.promote_types(hidden.dtype, torch.float32)
    batch = replace(batch, weights=batch.weights.to(exact))
    at_once = max(LOGITS_AT_ONCE // len(policy.model.get_output_embeddings().weight), 1)
    total = {}
    for rows in torch.arange(len(batch.tokens)).split(at_once):
        few, reference_logp = batch.select(rows, hidden.device), None
        if cfg.kl_coef:
            with torch.no_grad():
                frozen = policy.reference or policy.model
                scores = score_tokens(frozen, reference[rows], few.tokens, cfg.temperature)
            reference_logp = scores[0]
        logp, entropy = score_tokens(policy.model, states[rows], few.tokens, cfg.temperature)
        loss, terms = batch_loss(logp, entropy, few, reference_logp, history_mean, beta_k, cfg)
        loss.backward()
        total = {name: total.get(name, 0.0) + terms[name] for name in terms}
    hidden.backward(states.grad)
    return total


def batch_loss(logp, entropy, batch, reference_logp, history_mean, beta_k, cfg):
    """Eq. 6 and the ablations, summed over some tokens, perhaps from mid-turn -> loss, its terms"""
    weights, advantages, entropy_weights = batch.weights, batch.advantages, None
    if cfg.shaping:
        advantages = shaped_advantages(advantages, entropy, cfg.shaping)
    if cfg.entropy_decay:
        entropy_weights = decayed_weights(weights, batch.index, cfg.turns, cfg.entropy_decay)
    loss, terms = epo_loss(
        logp=logp, old_logp=batch.old_logp,
        entropy=entropy,
        advantages=advantages,
        weights=weights, entropy_weights=entropy_weights,
        history_mean=history_mean, beta_k=beta_k,
        entropy_coef=cfg.entropy_coef,
        kappa_l=cfg.kappa_l, kappa_r=cfg.kappa_r, alpha=cfg.alpha,
        smoothing=cfg.smoothing, clip=cfg.clip, clip_high=cfg.clip_high,
        reference_logp=reference_logp, kl_coef=cfg.kl_coef,
    )  # fmt: skip
    floor, cap = corridor(history_mean, cfg.kappa_l, cfg.kappa_r)
    ratio = (logp - batch.old_logp).exp()
    high = cfg.clip if cfg.clip_high is None else cfg.clip_high
    share = lambda chosen: (weights * chosen).sum().item()
    terms["clip_fraction"] = share((ratio < 1 - cfg.clip) | (ratio > 1 + high))
    return loss, terms | {"below": share(entropy < floor), "above": share(entropy > cap)}
