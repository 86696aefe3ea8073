"""PPO's critic: a copy of the policy's body with a scalar head, one value per turn, and its update.

The value of turn t is read at the last token of its prompt, before the policy writes: so the advantage that `epo.gae` makes
of it is the paper's A_t, one number for all the tokens of the turn.
"""
import copy
from contextlib import contextmanager

import torch

from rollout import add_lora, by_length, pad_left, precision, trained


class Critic(torch.nn.Module):
    """V(prompt), in units of reward. The head starts at 0: nothing is expected before something was seen.

    Its body is a copy of the policy's; with LoRA it is the policy's own, with a second adapter switched on.
    """

    def __init__(self, model, lora_rank=0):
        super().__init__()
        self.adapted = [model] if lora_rank else []        # in a list, so that it doesn't count as part of this module
        if lora_rank:
            add_lora(model, "critic", lora_rank)
            model.set_adapter("policy")
            model.to(model.device)
        else:
            self.body = copy.deepcopy(model.base_model)
            self.body.mixed = model.mixed
        self.head = torch.nn.Linear(model.get_output_embeddings().weight.shape[1], 1).to(model.device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def trained(self):
        """The parameters that learn, by name."""
        return {**dict(self.named_parameters()), **(trained(self.adapted[0], "critic") if self.adapted else {})}

    @contextmanager
    def switched_on(self):
        for model in self.adapted:
            model.set_adapter("critic")
        try:
            yield
        finally:
            for model in self.adapted:
                model.set_adapter("policy")

    def forward(self, turns):
        """Turns -> their values (N,), in the order given."""
        body = self.adapted[0].base_model if self.adapted else self.body
        ids, attention = pad_left([t.prompt for t in turns], self.head.weight.device)
        body.train(torch.is_grad_enabled())
        with precision(self.adapted[0] if self.adapted else body):
            hidden = body(input_ids=ids, attention_mask=attention, position_ids=(attention.cumsum(1) - 1).clamp(min=0), use_cache=False)
        return self.head(hidden.last_hidden_state[:, -1].float())[:, 0]

    @torch.no_grad()
    def values(self, turns, tokens_per_batch):
        values = torch.zeros(len(turns))
        with self.switched_on():
            for part in by_length(turns, range(len(turns)), tokens_per_batch):
                values[part] = self([turns[i] for i in part]).cpu()
        return values


def value_loss(values, old_values, targets, clip):
    """½·mean of the larger squared error of the value and of the value held within `clip` of the old one. All (N,) -> scalar."""
    held = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - targets) ** 2, (held - targets) ** 2).mean()


def explained_variance(values, targets):
    """1 - Var(targets - values) / Var(targets): 1 is a perfect critic, 0 one that knows no more than the mean. -> float"""
    variance = targets.var(unbiased=False)
    return (1 - (targets - values).var(unbiased=False) / variance).item() if variance > 0 else 0.0


def update_critic(critic, optimizer, turns, old_values, targets, cfg):
    """One pass over the step's turns in cfg.critic_minibatches updates. -> what is logged."""
    total, norms = 0.0, []
    with critic.switched_on():
        for part in torch.randperm(len(turns)).chunk(cfg.critic_minibatches):
            for m in by_length(turns, part.tolist(), cfg.tokens_per_batch):
                values = critic([turns[i] for i in m])
                loss = value_loss(values, old_values[m].to(values), targets[m].to(values), cfg.value_clip) * len(m) / len(part)
                loss.backward()
                total += loss.item() * len(part) / len(turns)
            norms.append(torch.nn.utils.clip_grad_norm_(critic.trained().values(), cfg.grad_clip).item())
            optimizer.step()
            optimizer.zero_grad()
    return {"value_loss": total, "value_grad_norm": sum(norms) / len(norms), "value": old_values.mean().item(),
            "explained_variance": explained_variance(old_values, targets)}
