"""PPO's critic: a copy of the policy's body with a scalar head, its advantages and its update."""

import copy

import torch

from policy import add_lora, states_at, trained
from support.forward import last_hidden, micro_batches


class Critic:
    """V(prompt), in units of reward, 0 at first. With LoRA its body is the policy's own."""

    def __init__(self, model, lora_rank=0):
        # the model that has both adapters, the policy's and its own
        self.adapted = model if lora_rank else None
        if lora_rank:
            add_lora(model, "critic", lora_rank)
            model.set_adapter("policy")
            model.to(model.device)
        self.body = model.base_model if lora_rank else copy.deepcopy(model.base_model)
        width = model.get_output_embeddings().weight.shape[1]
        self.head = torch.nn.Linear(width, 1).to(model.device)
        for p in self.head.parameters():
            p.data.zero_()

    def trained(self):
        """The parameters that learn, by name."""
        head = {f"head.{name}": p for name, p in self.head.named_parameters()}
        if self.adapted:
            return head | trained(self.adapted, "critic")
        return {f"body.{name}": p for name, p in self.body.named_parameters()} | head

    def switch_to(self, adapter):
        """With LoRA, make the adapter "critic" or "policy" the one that is read."""
        if self.adapted:
            self.adapted.set_adapter(adapter)

    def __call__(self, turns):
        """Turns -> their values (N,), each read at the last token of a prompt."""
        hidden, number = last_hidden(self.body, [t.prompt for t in turns])
        last = [len(t.prompt) - 1 for t in turns]
        return self.head(states_at(hidden, number, last).float())[:, 0]

    @torch.no_grad()
    def values(self, turns, tokens_per_batch):
        """Turns -> their values (N,) on the CPU, without a gradient."""
        values = torch.zeros(len(turns))
        self.switch_to("critic")
        for part in micro_batches(turns, range(len(turns)), tokens_per_batch):
            values[part] = self([turns[i] for i in part]).cpu()
        self.switch_to("policy")
        return values


def gae(values, rewards, last, discount=1.0, gae_lambda=1.0):
    """A_t = Σ_l (γλ)^l δ_(t+l) of N turns, δ_t = r_t + γ·V_(t+1) - V_t; γ, λ: discount, gae_lambda.

    values, rewards (N,): episode after episode; last (N,): True where one ends, so the next V is 0.
    """
    advantages = torch.zeros_like(values)
    for t in reversed(range(len(values))):
        if last[t]:
            next_advantage = next_value = 0.0
        delta = rewards[t] + discount * next_value - values[t]
        advantages[t] = delta + discount * gae_lambda * next_advantage
        next_advantage, next_value = advantages[t], values[t]
    return advantages


def ppo_advantages(values, returns, owner, cfg):
    """PPO's advantage of each turn (N,), normalised over the batch, and the critic's targets (N,).

    values (N,), owner (N,): the episode of a turn, returns (B,) of the episodes. Each episode has
    the same share of the mean and the standard deviation, as it has in Eq. 2.
    """
    # at the last turn of an episode the next one is of another, or there is none
    last = owner.diff(append=owner[-1:] + 1) != 0
    rewards = torch.zeros_like(values)
    rewards[last] = returns
    raw = gae(values, rewards, last, cfg.discount, cfg.gae_lambda)
    turns_of = torch.bincount(owner)
    share = 1 / (len(turns_of) * turns_of[owner])
    centred = raw - (raw * share).sum()
    std = (centred**2 * share).sum().sqrt()
    return centred / (std + 1e-6), raw + values


def value_loss(values, old_values, targets, clip):
    """½·mean of the larger squared error: of the value, or of it clipped around the old one."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - targets) ** 2, (clipped - targets) ** 2).mean()


def explained_variance(values, targets):
    """1 - Var(targets - values) / Var(targets): 1 is perfect, 0 is no better than the mean."""
    variance, error = (x.var(unbiased=False) for x in (targets, targets - values))
    return (1 - error / variance).item() if variance else 0.0


def update_critic(critic, optimizer, turns, old_values, targets, cfg):
    """One pass over the step's turns in cfg.critic_minibatches updates. -> what is logged"""
    total, norms = 0.0, []
    critic.switch_to("critic")
    for part in torch.randperm(len(turns)).chunk(cfg.critic_minibatches):
        for micro in micro_batches(turns, part.tolist(), cfg.tokens_per_batch):
            values = critic([turns[i] for i in micro])
            old, target = old_values[micro].to(values), targets[micro].to(values)
            loss = value_loss(values, old, target, cfg.value_clip) * len(micro)
            (loss / len(part)).backward()
            total += loss.item() / len(turns)
        norm = torch.nn.utils.clip_grad_norm_(critic.trained().values(), cfg.grad_clip)
        norms.append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
    critic.switch_to("policy")
    return {
        "value_loss": total,
        "value_grad_norm": sum(norms) / len(norms),
        "value": old_values.mean().item(),
        "explained_variance": explained_variance(old_values, targets),
    }
