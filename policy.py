"""The policy: load a language model, prompt it, score what it wrote, give it LoRA, save it."""

import copy
import os
import shutil
import warnings
from contextlib import suppress
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging

from envs import spoken
from epo import token_logp_and_entropy
from support.forward import last_hidden, logits_of, precision, prepare
from support.run_folder import ROOT, SetupError, form, one_line

ACTION_END = "</action>"
# the settings that a model's config.json can ask for; lora_lr is its lr where an adapter learns
ASKS = ("think", "tasks", "turns", "lr", "lora_lr", "max_tokens")


@dataclass
class Policy:
    """A causal language model with what it takes to play."""

    model: torch.nn.Module
    tokenizer: object
    end: list[int]  # the tokens that end a turn
    compact: bool  # it reads World.compact_prompt and writes the bare action; else chat_prompt
    think: bool = True  # a chat model reasons first
    system_role: bool = True  # its chat template has one
    opening: str = ""  # what of a reply its chat template has written already
    reference: torch.nn.Module | None = None  # for the KL; None: model without its LoRA adapter
    tokens_per_batch: int = 16384  # the most that a forward pass reads

    def prompt(self, world, past, now):
        """The text of a turn's prompt. past: (Observation, action) of the turns before."""
        if self.compact:
            return world.compact_prompt(past, now)
        return self.templated(*world.chat_prompt(past, now, self.think))

    def templated(self, rules, state):
        """The text of a chat, up to where the reply begins."""
        messages = [{"role": "system", "content": rules}, {"role": "user", "content": state}]
        if not self.system_role:
            messages = [{"role": "user", "content": f"{rules}\n\n{state}"}]
        # the switch of Qwen3 and others; a template that has none does not read it
        more = {"add_generation_prompt": True, "enable_thinking": self.think}
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **more)

    def read_template(self, name):
        """What the chat template has: a system role (some refuse it), an opened thought."""
        for self.system_role in (True, False):
            # a template is a program
            with suppress(Exception):
                text = self.templated("of system", "of user")
                if "of system" in text and "of user" in text:
                    self.opening = "<think>" if text.rstrip().endswith("<think>") else ""
                    return
        raise unusable(name, "it has no chat template that writes down what is said")

    def unfinished(self, token, responses):
        """(n,) of bool: which responses go on after `token` (n,). responses: their ids so far."""
        ended = torch.isin(token, torch.tensor(self.end))
        if self.compact:
            return ~ended
        # nothing is sampled, paid for or trained on after the action; a thought may quote one
        for i, ids in enumerate(responses):
            last = self.tokenizer.convert_ids_to_tokens(ids[-1]) or ""
            if ">" in last and ACTION_END in self.tokenizer.decode(ids[-len(ACTION_END) :]):
                ended[i] |= ACTION_END in spoken(self.opening + self.tokenizer.decode(ids))
        return ~ended

    @torch.no_grad()
    def reference_states(self, turns):
        """`response_states` of the reference policy."""
        if self.reference is not None:
            return response_states(self.reference, turns)
        self.model.disable_adapters()
        states = response_states(self.model, turns)
        self.model.enable_adapters()
        return states


def response_states(model, turns):
    """The hidden states just before each response token, (T, d), turn after turn."""
    hidden, number = last_hidden(model.base_model, [t.prompt + t.response for t in turns])
    row = [n for n, turn in zip(number, turns) for _ in turn.response]
    column = [len(turn.prompt) - 1 + i for turn in turns for i in range(len(turn.response))]
    return states_at(hidden, row, column)


def states_at(hidden, row, column):
    """hidden[row, column], (n, L, d) -> (T, d), with a gradient that adds up in one order."""
    # that of an index of two dimensions adds in any order, where torch has several threads
    place = torch.tensor(row) * hidden.shape[1] + torch.tensor(column)
    return torch.nn.functional.embedding(place.to(hidden.device), hidden.flatten(0, 1))


def score_tokens(model, hidden, tokens, temperature=1.0):
    """Log-prob and entropy of response tokens: states (T, d), tokens (T,) -> (T,), (T,)."""
    # the logits of prompts are never made: of a vocabulary of 152,000 they would fill the memory
    with precision(model):
        logits = logits_of(model, hidden)
    return token_logp_and_entropy(logits, tokens, temperature)


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


def asked_for(name, env):
    """{setting: what the model's config.json asks for, or None}, and "compact". SetupError."""
    config = read(AutoConfig, name, env)
    settings = {key: getattr(config, key, None) for key in ASKS}
    settings["compact"] = getattr(config, "prompt", None) == "compact"
    if settings["think"] is None and not settings["compact"]:
        # on the meta device a model has shapes and no weights
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(config).num_parameters()
        settings["think"] = "on" if size >= 1.5e9 else "off"
    return settings


def load_policy(name, env, device="cpu", dtype="float32", lora_rank=0, think="on", at_once=16384):
    """name: "tiny", a folder, a name on the hub; dtype: of matrix products. Raises SetupError."""
    device, dtype = choose_device(device, dtype)
    logging.disable_progress_bar()
    # what is trained is float32: at a rate of 5e-6 an update is less than bfloat16 can hold
    weights = torch.bfloat16 if lora_rank and dtype == "bfloat16" else torch.float32
    tokenizer = read(AutoTokenizer, name, env)
    model, info = read(AutoModelForCausalLM, name, env, dtype=weights, output_loading_info=True)
    if info["missing_keys"]:
        raise unusable(name, f"its folder lacks weights, such as {min(info['missing_keys'])}")
    head = model.get_output_embeddings()
    if head is None or len(head.weight) < len(tokenizer):
        raise unusable(name, f"it has no output matrix for its {len(tokenizer)} tokens")
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    end = end if isinstance(end, list) else [end]
    if None in end:
        raise unusable(name, "it has no end token (eos_token_id)")
    compact = getattr(model.config, "prompt", None) == "compact"
    policy = Policy(model, tokenizer, end, compact, think == "on", tokens_per_batch=at_once)
    if not compact:
        policy.read_template(name)
        if model.supports_gradient_checkpointing:
            model.activation_checkpointing_enable()
    prepare(model, dtype)
    if lora_rank:
        try:
            add_lora(model, "policy", lora_rank)
        except ValueError as error:
            raise unusable(name, f"it takes no adapter ({one_line(error)})") from error
    model.to(device).eval()
    return policy


def choose_device(device, dtype):
    """ "auto" made definite: a CUDA GPU if there is one, with bfloat16 -> device, dtype"""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    has_it = device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" and not has_it:
        raise SetupError(f"{torch.cuda.get_device_name()} has no bfloat16: --dtype float32")
    return device, dtype


def unusable(name, why):
    return SetupError(f"model {name!r} cannot be trained here: {why}; use another")


def add_lora(model, adapter, rank):
    """Freeze the model; its linear layers but the output matrix get an adapter, which is 0 yet."""
    from peft import LoraConfig

    # peft warns of a second adapter
    with warnings.catch_warnings(action="ignore"):
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
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
        raise SetupError("the checkpoint's parameters are not this model's; begin anew")
    for name, p in parameters.items():
        p.data.copy_(saved[name])


def merged_model(model, device, **settings):
    """A float32 model as if there had never been an adapter. settings: of its config.json"""
    plain = lambda name: name.replace(".base_layer", "")
    own = {name: w for name, w in model.state_dict().items() if ".lora_" not in name}
    weights = {plain(name): w.to(device, torch.float32) for name, w in own.items()}
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            # fused experts have other names
            weight = f"{plain(name)}.{getattr(layer, 'parameter_name', 'weight')}"
            change = layer.get_delta_weight("policy").to(device, torch.float32)
            weights[weight] = weights[weight] + change
    with torch.device("meta"):
        merged = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=torch.float32)
    merged.config.update(settings)
    merged.load_state_dict(weights, assign=True)
    merged.tie_weights()
    return merged


def save_model(policy, settings, folder):
    """Write a folder for --model, whole or not at all. settings: those of ASKS. SetupError."""
    model = merged_model(policy.model, "cpu", **settings)
    model.generation_config = policy.model.generation_config
    shutil.rmtree(folder + ".new", ignore_errors=True)
    try:
        model.save_pretrained(folder + ".new")
        policy.tokenizer.save_pretrained(folder + ".new")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(folder + ".new", folder)
    except (OSError, SafetensorError) as error:
        raise SetupError(f"could not write {folder} ({one_line(error)})") from error
