"""What differs between architectures, read from a configuration: `prove` cannot see all of it."""

from functools import cache
from inspect import signature

import torch

from support.run_folder import SetupError


def check_room(model, tokens):
    """Raises SetupError if the model's context has no room for a row of so many tokens."""
    config = model.config.get_text_config()
    room = getattr(config, "max_position_embeddings", None) or tokens
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # past this length a row gives all rows of its batch other numbers
        room = min(room, rope["original_max_position_embeddings"])
    if tokens > room:
        need = f"{tokens} are needed: lower --max-tokens, or use another model"
        raise SetupError(f"the model's context has room for {room} tokens, and {need}")


def is_told_positions(model):
    """Whether tokens stand where position_ids says: ALiBi and GPT-Neo's window count columns."""
    config = model.config.get_text_config()
    counts = getattr(config, "alibi", False) or getattr(config, "window_size", None)
    return "position_ids" in signature(model.base_model.forward).parameters and not counts


@cache
def name_of_cache(body):
    """The argument of a class that takes a cache: Mamba 2 has a name of its own."""
    arguments = signature(body.forward).parameters
    return "cache_params" if "cache_params" in arguments else "past_key_values"


def logits_of(model, hidden):
    """Last hidden states (n, d) -> logits (n, V): by an output matrix, which some scale or cap."""
    config = model.config.get_text_config()
    value = lambda name: getattr(config, name, None) or 1
    # Cohere's, Falcon-H1's and Granite's; the states are fewer numbers than the logits
    scale = value("logit_scale") * value("lm_head_multiplier") / value("logits_scaling")
    logits = model.get_output_embeddings()(hidden if scale == 1 else hidden * scale)
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * (logits / cap).tanh() if cap else logits


def switch_off_dropout(model):
    """For good: the log-probs of a rollout and of the update must agree."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "jitter" in name):
                setattr(module, name, 0.0)
