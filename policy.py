"""The policy: load a language model, give it LoRA, write its prompts, score what it wrote, save it.

A model that cannot be trained by this code is refused before any work starts.
"""

import copy
import os
import shutil
import warnings
from contextlib import suppress
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from envs import spoken, templated
from epo import token_logp_and_entropy
from support.architecture import is_told_positions, logits_of, switch_off_dropout
from support.forward import last_hidden, precision, states_at
from support.run_folder import ROOT, SetupError, form, one_line

# a chat model's response ends here
ACTION_END = "</action>"
# entries of a model's config.json that are this project's: settings that it asks for. lora_lr is
# its lr where only an adapter learns
ASKS = ("think", "tasks", "turns", "lr", "lora_lr", "max_tokens")


@dataclass
class Policy:
    """A causal language model with what it takes to play.

    end: the tokens that end a turn. compact: it reads World.compact_prompt and writes the bare
    action; else World.chat_prompt, where think: it reasons first. Of its chat template,
    system_role: it has one; opening: what of the reply it has written already. reference: a frozen
    copy of the policy as it was, for the KL; None with LoRA, where the model without its adapter is
    it. tokens_per_batch: the most that a forward pass reads.
    """

    model: torch.nn.Module
    tokenizer: object
    end: list[int]
    compact: bool
    think: bool = True
    system_role: bool = True
    opening: str = ""
    reference: torch.nn.Module | None = None
    tokens_per_batch: int = 16384

    def prompt(self, world, past, now):
        """The text of a turn's prompt. past: (Observation, action) of the turns before."""
        if self.compact:
            return world.compact_prompt(past, now)
        messages = world.chat_prompt(past, now, self.think)
        return templated(self.tokenizer, messages, self.system_role, self.think)

    def encode(self, text):
        """A prompt as token ids. A chat template has put the special tokens there already."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def unfinished(self, token, responses):
        """(n,) of bool: which responses go on after `token` (n,). responses: their ids so far."""
        go_on = ~torch.isin(token, torch.tensor(self.end, device=token.device))
        if self.compact:
            return go_on
        # nothing is sampled, paid for or trained on after the action; a thought may quote one
        decode = self.tokenizer.decode
        acted = [
            ACTION_END in decode(ids[-len(ACTION_END) :])
            and ACTION_END in spoken(self.opening + decode(ids))
            for ids in responses
        ]
        return go_on & ~torch.tensor(acted, device=token.device)

    @torch.no_grad()
    def reference_states(self, turns):
        """`response_states` of the reference policy."""
        if self.reference is not None:
            return response_states(self.reference, turns)
        self.model.disable_adapters()
        try:
            return response_states(self.model, turns)
        finally:
            self.model.enable_adapters()

    @torch.no_grad()
    def reference_logp(self, states, tokens, temperature):
        """log π_ref of tokens (T,), from their `reference_states` (T, d)."""
        logp, _ = score_tokens(self.reference or self.model, states, tokens, temperature)
        return logp


def response_states(model, turns):
    """The hidden states just before each response token, (T, d), turn after turn.

    They alone meet the output matrix (`score_tokens`): with a vocabulary of 152,000 the logits of
    the prompts would be most of the memory.
    """
    hidden, number = last_hidden(model.base_model, [t.prompt + t.response for t in turns])
    row, column = [], []
    for i, turn in enumerate(turns):
        row += [number[i]] * len(turn.response)
        first = len(turn.prompt) - 1
        column += range(first, first + len(turn.response))
    return states_at(hidden, row, column)


def score_tokens(model, hidden, tokens, temperature=1.0):
    """Log-prob and entropy of response tokens: states (T, d), tokens (T,) -> (T,), (T,)."""
    with precision(model):
        logits = logits_of(model, hidden)
    return token_logp_and_entropy(logits, tokens, temperature)


# ---- Loading


def choose_device(device, dtype):
    """ "auto" made definite: a CUDA GPU if there is one, with bfloat16 -> device, dtype"""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    has_bfloat16 = device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" and not has_bfloat16:
        raise SetupError(f"{torch.cuda.get_device_name()} has no bfloat16: --dtype float32")
    return device, dtype


def read(kind, name, env, **more):
    """kind: a class of transformers -> its object. "tiny" is the policy in models/<env>."""
    path = os.path.join(ROOT, "models", env) if name == "tiny" else name
    if name == "tiny" and not os.path.isdir(path):
        raise SetupError(f"there is no tiny policy for {env}: give a model with --model")
    try:
        return kind.from_pretrained(path, trust_remote_code=False, **more)
    except Exception as error:
        # of many kinds
        mend = "give a local folder, a name on the hub, or tiny"
        raise SetupError(f"model {name!r} cannot be loaded ({one_line(error)}); {mend}") from error


def is_compact(config):
    return getattr(config, "prompt", "chat") == "compact"


def asked_for(name, env):
    """The settings that a model's config.json asks for, None where it does not, and "compact".

    No weight is read. Raises SetupError.
    """
    config = read(AutoConfig, name, env)
    settings = {key: getattr(config, key, None) for key in ASKS}
    settings["compact"] = is_compact(config)
    if settings["think"] is None and not settings["compact"]:
        # on the meta device a model has shapes alone
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(config).num_parameters()
        settings["think"] = "on" if size >= 1.5e9 else "off"
    return settings


def load_policy(name, env, device="cpu", dtype="float32", lora_rank=0, think="on", at_once=16384):
    """name: "tiny", a folder, or a name on the hub -> Policy. Raises SetupError.

    dtype "bfloat16" is that of matrix products. Weights that are trained stay float32: at a rate of
    5e-6 an update is less than a bfloat16 weight can hold. Under LoRA they are frozen and bfloat16.
    """
    logging.disable_progress_bar()
    weights = torch.bfloat16 if lora_rank and dtype == "bfloat16" else torch.float32
    tokenizer = read(AutoTokenizer, name, env)
    model, info = read(AutoModelForCausalLM, name, env, dtype=weights, output_loading_info=True)
    head, end = model.get_output_embeddings(), end_tokens(model, tokenizer)
    if info["missing_keys"]:
        raise unusable(name, f"its folder lacks weights, such as {min(info['missing_keys'])}")
    if head is None or len(head.weight) < len(tokenizer):
        raise unusable(name, f"it has no output matrix for its {len(tokenizer)} tokens")
    if None in end:
        raise unusable(name, "it has no end token (eos_token_id)")
    policy = Policy(model, tokenizer, end, is_compact(model.config), think == "on")
    policy.tokens_per_batch = at_once
    if not policy.compact:
        read_template(policy, name)
        if model.supports_gradient_checkpointing:
            model.activation_checkpointing_enable()
    switch_off_dropout(model)
    model.shortcuts = model.base_model.shortcuts = is_told_positions(model)
    model.mixed = model.base_model.mixed = dtype == "bfloat16"
    if lora_rank:
        try:
            add_lora(model, "policy", lora_rank)
        except ValueError as error:
            raise unusable(name, f"it takes no adapter ({one_line(error)})") from error
    policy.model = model.to(device).eval()
    return policy


def unusable(name, why):
    return SetupError(f"model {name!r} cannot be trained here: {why}; use another")


def read_template(policy, name):
    """What the chat template has: a system role (some refuse it), an opened thought."""
    told = [{"role": role, "content": f"of {role}"} for role in ("system", "user")]
    for policy.system_role in (True, False):
        # a template is a program
        with suppress(Exception):
            text = templated(policy.tokenizer, told, policy.system_role, policy.think)
            if "of system" in text and "of user" in text:
                policy.opening = "<think>" if text.rstrip().endswith("<think>") else ""
                return
    raise unusable(name, "it has no chat template that writes down what is said")


def end_tokens(model, tokenizer):
    """The ids that end a turn; some models have several."""
    end = model.generation_config.eos_token_id
    if end is None:
        end = tokenizer.eos_token_id
    return end if isinstance(end, list) else [end]


# ---- What learns, and how it is saved


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


def trained(model, adapter="policy"):
    """The parameters that learn, by name: the adapter's, or all of a model without LoRA."""
    adapters = {name: p for name, p in model.named_parameters() if f".{adapter}." in name}
    return adapters or dict(model.named_parameters())


def load_weights(parameters, saved):
    """Put a checkpoint's values into parameters, by name. Raises SetupError for another model's."""
    if form(saved) != form(parameters):
        mend = "leave out --model and --lora-rank, the run has them in its config.json"
        raise SetupError(f"the checkpoint's parameters are not this model's; {mend}")
    for name, p in parameters.items():
        p.data.copy_(saved[name])


def merged_weights(model, device):
    """The weights by name as if there had never been an adapter, in float32."""
    plain = lambda name: name.replace(".base_layer", "")
    state = model.state_dict()
    weights = {plain(name): w for name, w in state.items() if ".lora_" not in name}
    weights = {name: w.to(device, torch.float32) for name, w in weights.items()}
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            # fused experts have other names
            weight = f"{plain(name)}.{getattr(layer, 'parameter_name', 'weight')}"
            change = layer.get_delta_weight("policy").to(device, torch.float32)
            weights[weight] = weights[weight] + change
    return weights


def merged_model(model, device, **settings):
    """A model of these weights, without an adapter. settings: of its config.json"""
    config = copy.deepcopy(model.config)
    config.update({"dtype": torch.float32, **settings})
    with torch.device("meta"):
        merged = AutoModelForCausalLM.from_config(config)
    merged.load_state_dict(merged_weights(model, device), assign=True)
    merged.tie_weights()
    return merged


def save_model(policy, settings, folder):
    """Write a folder that transformers and --model take, adapters merged, whole or not at all.

    settings: those of ASKS that the model is to ask for. Raises SetupError.
    """
    model = merged_model(policy.model, "cpu", **settings)
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
