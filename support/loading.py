"""Load a policy: a tiny one from models/, a local folder, or a name on the hub; with LoRA or not.

A model that cannot be trained by this code is refused before any work starts.
"""

import copy
import os
import shutil
import warnings

import jinja2
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from rollout import Policy
from support.run_folder import SetupError, one_line

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# entries of a model's config.json that are this project's: what it is made for. lora_lr: its lr
# where only an adapter learns
MADE_FOR = ("think", "tasks", "turns", "lr", "lora_lr", "max_tokens")


def choose_device(device, dtype):
    """ "auto" made definite: a CUDA GPU if there is one; bfloat16 products on it. -> device, dtype

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
    policy = Policy(model.to(device).eval(), tokenizer, end_tokens(model, tokenizer), compact)
    policy.made_for = made_for(model.config)
    policy.system_role = compact or has_system_role(tokenizer)
    return policy


def made_for(config):
    """The settings that a model's configuration asks for, None where it does not."""
    settings = {key: getattr(config, key, None) for key in MADE_FOR}
    if settings["think"] is None and getattr(config, "prompt", "chat") == "chat":
        # on the meta device a model has shapes alone
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(config).num_parameters()
        settings["think"] = "on" if size >= 1.5e9 else "off"
    return settings


def has_system_role(tokenizer):
    """Some chat templates refuse a system message or leave it out."""
    messages = [{"role": "system", "content": "the rules"}, {"role": "user", "content": "now"}]
    try:
        return "the rules" in tokenizer.apply_chat_template(messages, tokenize=False)
    except jinja2.TemplateError:
        return False


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
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            # peft makes inputs float32 and autocast makes them bfloat16 again, to the same numbers
            module.cast_input_dtype_enabled = False


def merged_weights(model):
    """The weights by name as if there had never been an adapter, in float32 on the CPU."""
    state = model.state_dict()
    weights = {name: w.float().cpu() for name, w in state.items() if ".lora_" not in name}
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            change = layer.get_delta_weight("policy").float().cpu()
            weights[f"{name}.base_layer.weight"] = weights[f"{name}.base_layer.weight"] + change
    return {name.replace(".base_layer.", "."): w for name, w in weights.items()}


def save_model(policy, settings, folder):
    """Write a folder that transformers and --model take, adapters merged, whole or not at all.

    settings: those of MADE_FOR that the model is to ask for. Raises SetupError.
    """
    config = copy.deepcopy(policy.model.config)
    config.dtype = torch.float32
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(merged_weights(policy.model), assign=True)
    model.tie_weights()
    model.generation_config = policy.model.generation_config
    shutil.rmtree(folder + ".new", ignore_errors=True)
    try:
        model.save_pretrained(folder + ".new")
        policy.tokenizer.save_pretrained(folder + ".new")
        if os.path.isdir(folder):
            shutil.rmtree(folder)
        os.rename(folder + ".new", folder)
    except (OSError, SafetensorError) as error:
        raise SetupError(f"could not write {folder} ({one_line(error)})") from error


def trained(model, adapter="policy"):
    """The parameters that learn, by name: the adapter's, or all of a model without LoRA."""
    adapters = {name: p for name, p in model.named_parameters() if f".{adapter}." in name}
    return adapters or dict(model.named_parameters())
