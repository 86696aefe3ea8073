"""Load a policy: a tiny one from models/, a local folder, or a name on the hub; with LoRA or not.

A model that cannot be trained by this code is refused before any work starts.
"""

import os
import warnings

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from rollout import Policy
from support.run_folder import SetupError, one_line

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# entries of a model's config.json that are this project's: what a tiny policy is made for
MADE_FOR = ("tasks", "turns", "lr", "max_tokens")


def choose_device(device, dtype):
    """ "auto" made definite: the GPU if there is one; bfloat16 products on it. -> device, dtype

    Raises SetupError for bfloat16 on a GPU that does not have it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    if device == "cuda" and dtype == "bfloat16":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise SetupError(f"{torch.cuda.get_device_name()} has no bfloat16: --dtype float32")
    return device, dtype


def load_policy(name, env, device="cpu", dtype="float32", lora_rank=0):
    """name: "tiny" (the warm-started policy in models/<env>), a folder, or a name on the hub.

    dtype "bfloat16": matrix products in bfloat16. Weights that are trained stay float32 all the
    same: at a learning rate of 5e-6 an update is less than a bfloat16 weight can hold. Only under
    LoRA, where the model's own weights are frozen, are they bfloat16. Raises SetupError.
    """
    logging.disable_progress_bar()
    path = os.path.join(ROOT, "models", env) if name == "tiny" else name
    if name == "tiny" and not os.path.isdir(path):
        raise SetupError(f"there is no tiny policy for {env}: give an instruct model with --model")
    weights = torch.bfloat16 if lora_rank and dtype == "bfloat16" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=weights, trust_remote_code=False)
    except Exception as error:
        # transformers raises many kinds
        message = f"model {name!r} cannot be loaded ({one_line(error)})"
        raise SetupError(f"{message}; give a local folder, a name on the hub, or tiny") from error
    compact = getattr(model.config, "prompt", "chat") == "compact"
    if not compact and tokenizer.chat_template is None:
        raise SetupError(f"model {name!r} has no chat template; use an instruction-tuned model")
    switch_off_dropout(model)
    refuse_unusable(name, model, tokenizer)
    if not compact and model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.mixed = model.base_model.mixed = dtype == "bfloat16"
    if lora_rank:
        add_lora(model, "policy", lora_rank)
    made_for = {key: getattr(model.config, key, None) for key in MADE_FOR}
    model = model.to(device).eval()
    return Policy(model, tokenizer, end_tokens(model, tokenizer), compact, made_for)


def end_tokens(model, tokenizer):
    """The ids that end a turn; some models have several."""
    end = model.generation_config.eos_token_id
    if end is None:
        end = tokenizer.eos_token_id
    return end if isinstance(end, list) else [end]


def switch_off_dropout(model):
    """For good: the log-probs of a rollout and of the update must agree."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


@torch.no_grad()
def refuse_unusable(name, model, tokenizer):
    """Raises SetupError unless the logits are an output matrix times the last hidden states."""
    head, ids = model.get_output_embeddings(), torch.arange(1, 9).unsqueeze(0)
    logits = model(ids).logits
    usable = head is not None and len(tokenizer) <= len(head.weight)
    if usable:
        hidden = model.base_model(ids).last_hidden_state
        usable = torch.allclose(logits, head(hidden), atol=1e-3)
    if not usable:
        raise SetupError(
            f"model {name!r} cannot be trained here: its logits must be an output matrix times the "
            f"last hidden states, a row for each of the {len(tokenizer)} tokens; use another model"
        )
    if not torch.equal(logits, model.train()(ids).logits):
        raise SetupError(f"model {name!r} has a dropout that cannot be switched off; use another")


def add_lora(model, adapter, rank):
    """Freeze the model and give its linear layers, but the output matrix, a float32 LoRA adapter.

    The adapter adds nothing at first.
    """
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with warnings.catch_warnings():
        # peft warns of a second adapter
        warnings.simplefilter("ignore")
        model.add_adapter(config, adapter)
    for p in trained(model, adapter).values():
        p.data = p.data.float()


def trained(model, adapter="policy"):
    """The parameters that learn, by name: the adapter's, or all of a model without LoRA."""
    adapters = {name: p for name, p in model.named_parameters() if f".{adapter}." in name}
    return adapters or dict(model.named_parameters())
