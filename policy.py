"""The policy: load a language model, give it LoRA, write its prompts, score what it wrote, save it.

A model that cannot be trained by this code is refused before any work starts.
"""

import copy
import os
import shutil
import warnings
from dataclasses import dataclass

import jinja2
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from envs import templated
from epo import token_logp_and_entropy
from support.forward import last_hidden, precision, states_at
from support.run_folder import ROOT, SetupError, one_line

# a chat model's response ends here
ACTION_END = "</action>"
# entries of a model's config.json that are this project's: settings that it asks for. lora_lr is
# its lr where only an adapter learns
ASKS = ("think", "tasks", "turns", "lr", "lora_lr", "max_tokens")


@dataclass
class Policy:
    """A causal language model with what it takes to play.

    end: the tokens that end a turn. compact: it reads World.compact_prompt and writes the bare
    action; else World.chat_prompt, where think: it reasons first. system_role: its template has
    one. reference: a frozen copy of the policy as it was, for the KL; None with LoRA, where the
    model without its adapter is it. tokens_per_batch: the most that a forward pass reads.
    """

    model: torch.nn.Module
    tokenizer: object
    end: list[int]
    compact: bool
    think: bool = True
    system_role: bool = True
    reference: torch.nn.Module | None = None
    tokens_per_batch: int = 16384

    def prompt(self, world, past, now):
        """The text of a turn's prompt. past: (Observation, action) of the turns before."""
        if self.compact:
            return world.compact_prompt(past, now)
        messages = world.chat_prompt(past, now, self.think)
        return templated(self.tokenizer, messages, self.system_role)

    def encode(self, text):
        """A prompt as token ids. A chat template has put the special tokens there already."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def unfinished(self, token, responses):
        """(n,) of bool: which responses go on after `token` (n,). responses: their ids so far."""
        go_on = ~torch.isin(token, torch.tensor(self.end, device=token.device))
        if self.compact:
            return go_on
        # nothing is sampled, paid for or trained on after the action
        ends = self.tokenizer.batch_decode([ids[-len(ACTION_END) :] for ids in responses])
        acted = [ACTION_END in text for text in ends]
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
        logits = model.get_output_embeddings()(hidden)
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
    model = read(AutoModelForCausalLM, name, env, dtype=weights)
    compact = is_compact(model.config)
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
    policy.think, policy.tokens_per_batch = think == "on", at_once
    policy.system_role = compact or has_system_role(tokenizer)
    return policy


def has_system_role(tokenizer):
    """Some chat templates refuse a system message or leave it out."""
    messages = [{"role": role, "content": f"of {role}"} for role in ("system", "user")]
    try:
        return "of system" in tokenizer.apply_chat_template(messages, tokenize=False)
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
        rule = "its logits must be an output matrix times the last hidden states, a row for each"
        tokens = f"of the {len(tokenizer)} tokens"
        raise SetupError(f"model {name!r} cannot be trained here: {rule} {tokens}; use another")
    if not torch.equal(logits, model.train()(ids).logits):
        raise SetupError(f"model {name!r} has a dropout that cannot be switched off; use another")


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
    shapes = {name: p.shape for name, p in parameters.items()}
    if shapes != {name: getattr(p, "shape", None) for name, p in saved.items()}:
        mend = "leave out --model and --lora-rank, the run has them in its config.json"
        raise SetupError(f"the checkpoint's parameters are not this model's; {mend}")
    for name, p in parameters.items():
        p.data.copy_(saved[name])


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

    settings: those of ASKS that the model is to ask for. Raises SetupError.
    """
    config = copy.deepcopy(policy.model.config)
    config.update({"dtype": torch.float32, **settings})
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
