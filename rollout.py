"""Rollouts: load a policy, let it play many episodes at once, and score what it wrote.

The distribution that is sampled is the distribution that is scored: softmax(logits / temperature) over the whole vocabulary,
with no top-k, no top-p and nothing from a model's generation config. That is why sampling is a loop of a few lines here and
not `model.generate`. Every turn is a fresh prompt (the paper's setting), not one growing conversation.
"""
import os
import time
import warnings
from dataclasses import dataclass, field

import torch

from envs import SetupError, Task, parse_chat, parse_compact
from epo import token_logp_and_entropy

HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass
class Turn:
    """One turn: what the policy read and wrote. written ends with the end token unless the length limit cut it."""
    index: int                      # t, counted from 0
    prompt: list[int]
    written: list[int]
    logp: list[float]               # of each written token, as it was sampled
    entropy: list[float]            # of the distribution each was sampled from, nats
    text: str                       # written, decoded
    action: str | None              # what was sent to the world; None: no valid action was written
    observation: str                # what it was shown, for transcripts
    invalid: bool = False           # no action in the text, or the world did not know it


@dataclass
class Episode:
    task: Task
    turns: list[Turn] = field(default_factory=list)
    success: bool = False
    score: int = 0                  # 0 to 100, as the world says
    goal: str = ""                  # the task in the world's words


@dataclass
class Policy:
    """A causal LM with what it takes to play: its tokenizer, the tokens that end a turn, and which prompt it reads."""
    model: torch.nn.Module
    tokenizer: object
    end: list[int]
    compact: bool                   # True: World.prompt; False: World.chat through the tokenizer's chat template
    tasks: tuple = ()               # a tiny policy's: the task types, turn limit and learning rate that it is made for
    turns: int = 0
    lr: float = 0.0
    start: torch.nn.Module | None = None       # a frozen copy of the model as it was, for the KL; with LoRA there is no need of one

    def encode(self, world, past, now):
        if self.compact:
            return self.tokenizer.encode(world.prompt(past, now), add_special_tokens=False)
        return self.tokenizer.apply_chat_template([{"role": "user", "content": world.chat(past, now)}],
                                                  add_generation_prompt=True, return_dict=False)

    def start_states(self, turns):
        """`written_states` of the policy as it started: of the copy, or of the same model with its adapter off. No gradient."""
        with torch.no_grad():
            if self.start is not None:
                return written_states(self.start, turns)
            self.model.disable_adapters()
            try:
                return written_states(self.model, turns)
            finally:
                self.model.enable_adapters()


def load_policy(name, env, device="cpu", dtype="float32", lora_rank=0):
    """name: "tiny" (the warm-started policy in models/<env>), a folder, or a name on the hub.

    dtype "bfloat16": matrix products in bfloat16. Weights that are trained stay float32 all the same: at a learning rate of 5e-6
    an update is less than a bfloat16 weight can hold; only under LoRA, where they are frozen, are the model's own kept in it.
    Dropout stays off for good: log-probs of a rollout and of the update must agree. Raises SetupError in one line.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
    logging.disable_progress_bar()
    path = os.path.join(HERE, "models", env) if name == "tiny" else name
    if name == "tiny" and not os.path.isdir(path):
        raise SetupError(f"there is no tiny policy for {env}; make one with `python warmstart.py --env {env}`")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if lora_rank and dtype == "bfloat16" else torch.float32)
    except Exception as error:                                       # transformers raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SetupError(f"model {name!r} can't be had ({reason[:150]}); give a local folder, a name on the hub, or --model tiny") from error
    compact = getattr(model.config, "prompt", "chat") == "compact"
    if not compact and tokenizer.chat_template is None:
        raise SetupError(f"model {name!r} has no chat template; use an instruction-tuned model, or --model tiny")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    head, ids = model.get_output_embeddings(), torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        logits = model(ids).logits
        product = head(model.base_model(ids).last_hidden_state) if head is not None else None
        training_logits = model.train()(ids).logits
    if head is None or len(tokenizer) > len(head.weight) or not torch.allclose(logits, product, atol=1e-3):
        raise SetupError(f"model {name!r} can't be trained here: its logits must be an output matrix times the last hidden states, one row for "
                         f"each of the tokenizer's {len(tokenizer)} tokens; use another model")
    if not torch.equal(logits, training_logits):
        raise SetupError(f"model {name!r} can't be trained here: it has a dropout that can't be switched off; use another model")
    if not compact and model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.mixed = dtype == "bfloat16"
    if lora_rank:
        add_lora(model, "policy", lora_rank)
    end = model.generation_config.eos_token_id                       # some models end a turn with one of several tokens
    end = end if isinstance(end, list) else [tokenizer.eos_token_id if end is None else end]
    return Policy(model.to(device).eval(), tokenizer, end, compact, tuple(getattr(model.config, "tasks", ())),
                  getattr(model.config, "turns", 0), getattr(model.config, "lr", 0.0))


def add_lora(model, adapter, rank):
    """Freeze the model and give all its linear layers but the output matrix a float32 LoRA adapter, which starts as nothing."""
    from peft import LoraConfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                              # peft warns of a second adapter
        model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), adapter)
    for p in trained(model, adapter).values():
        p.data = p.data.float()


def trained(model, adapter="policy"):
    """The parameters that learn, by name: those of the adapter, or all of a model without LoRA."""
    return {n: p for n, p in model.named_parameters() if f".{adapter}." in n} or dict(model.named_parameters())


def precision(model):
    """The context in which a model's matrix products are made: bfloat16 if `load_policy` was asked for it."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=getattr(model, "mixed", False))


def pad_left(rows, device):
    """Token lists -> ids (N, P), attention mask (N, P), padded on the left so that all rows end in the same column."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask


def pad_right(rows, device):
    """Lists of numbers -> values (N, L), mask (N, L), padded with 0 on the right."""
    width = max(map(len, rows))
    values = torch.tensor([[*r] + [0] * (width - len(r)) for r in rows], device=device)
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=device)
    return values, mask


@torch.no_grad()
def generate(policy, prompts, temperature, max_tokens, generator=None):
    """Sample one turn for each prompt (lists of ids), all together; a finished row drops out of the batch.

    -> a list of (written ids, log-probs, entropies). generator: a torch.Generator on the model's device.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer
    model, device = policy.model.eval(), policy.model.device
    end = torch.tensor(policy.end, device=device)
    live, cache = torch.arange(len(prompts), device=device), DynamicCache(config=model.config)
    results = [([], [], []) for _ in prompts]
    shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)                    # each row keeps a token to read
    if shared >= 64 and all(type(layer) is DynamicLayer for layer in cache.layers):      # the rules of the world: read once for all
        # rows; not under a sliding window, which would count the padding that then stands in the middle
        with precision(model):
            model(input_ids=torch.tensor([prompts[0][:shared]], device=device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(prompts))
    else:
        shared = 0
    ids, attention = pad_left([p[shared:] for p in prompts], device)
    attention = torch.cat([attention.new_ones(len(prompts), shared), attention], 1)
    position = (attention.cumsum(1) - 1).clamp(min=0)[:, shared:]
    for _ in range(max_tokens):
        with precision(model):
            logits = model(input_ids=ids, attention_mask=attention, position_ids=position, past_key_values=cache,
                           use_cache=True, logits_to_keep=1).logits                           # (n, 1, V)
        token = (logits[:, 0].float() / temperature).softmax(-1).multinomial(1, generator=generator)   # (n, 1)
        logp, entropy = token_logp_and_entropy(logits, token, temperature)
        for i, *values in zip(live.tolist(), token[:, 0].tolist(), logp[:, 0].tolist(), entropy[:, 0].tolist()):
            for column, value in zip(results[i], values):
                column.append(value)
        going = ~torch.isin(token[:, 0], end)
        if not going.any():
            break
        if not going.all():
            live, token, attention, position = live[going], token[going], attention[going], position[going]
            cache.batch_select_indices(going.nonzero()[:, 0])
        ids, position = token, position[:, -1:] + 1
        attention = torch.cat([attention, attention.new_ones(len(attention), 1)], 1)
    return results


def written_states(model, turns):
    """What the model holds just before each token that it wrote: hidden (T, d), with the tokens (T,) and their turns' numbers
    (T,), turn after turn, without padding.

    Rows are [left padding | prompt | written | right padding], so the states wanted are the L columns before the last. They
    alone meet the output matrix (`score`): with a vocabulary of 152,000 the logits of the prompts would be most of the memory.
    """
    ids, attention = pad_left([t.prompt for t in turns], model.device)
    written, mask = pad_right([t.written for t in turns], model.device)                                # (N, L)
    ids, attention = torch.cat([ids, written], 1), torch.cat([attention, mask], 1)                     # (N, P + L)
    model.train(torch.is_grad_enabled())                 # nothing drops out; this only switches gradient checkpointing
    with precision(model):
        hidden = model.base_model(input_ids=ids, attention_mask=attention, position_ids=(attention.cumsum(1) - 1).clamp(min=0),
                                  use_cache=False).last_hidden_state[:, -1 - written.shape[1]:-1]      # (N, L, d)
    turn, column = mask.nonzero(as_tuple=True)
    return hidden[turn, column], written[turn, column], turn


def score(model, hidden, tokens, temperature=1.0):
    """Log-prob and entropy of written tokens, from `written_states`: (T, d), (T,) -> (T, 1), (T, 1): every token a row of its own."""
    with precision(model):
        logits = model.get_output_embeddings()(hidden)
    return token_logp_and_entropy(logits.unsqueeze(1), tokens.unsqueeze(1), temperature)


def by_length(turns, indices, budget):
    """`indices` of turns in micro-batches of at most `budget` tokens, padding counted; a turn longer than that is alone."""
    parts = []
    for i in sorted(indices, key=lambda i: len(turns[i].prompt) + len(turns[i].written)):
        together = [turns[j] for j in [*parts[-1], i]] if parts else []
        if not together or len(together) * (max(len(t.prompt) for t in together) + max(len(t.written) for t in together)) > budget:
            parts.append([])
        parts[-1].append(i)
    return parts


def collect(world, policy, tasks, turn_limit, temperature, max_tokens, generator=None, progress=None):
    """Play one episode per task, all at once, to its end or the turn limit.

    -> (episodes, lost, seconds): lost counts the episodes dropped because their simulator died (with no outcome they can't be
    scored); seconds holds those spent on load, generate and environment. progress: a tqdm bar that counts finished episodes.
    """
    clock, seconds = time.perf_counter, dict.fromkeys(("load", "generate", "environment"), 0.0)
    start = clock()
    now = dict(enumerate(world.reset(tasks)))                        # slot -> what it sees, None: lost
    seconds["load"] = clock() - start
    episodes, past = [Episode(task, goal=now[slot].goal if now[slot] else "") for slot, task in enumerate(tasks)], [[] for _ in tasks]
    live = [slot for slot in now if now[slot] is not None]
    for t in range(turn_limit):
        if not live:
            break
        start = clock()
        prompts = [policy.encode(world, past[slot], now[slot]) for slot in live]
        turns = {}
        for slot, prompt, sample in zip(live, prompts, generate(policy, prompts, temperature, max_tokens, generator)):
            text = policy.tokenizer.decode(sample[0], skip_special_tokens=True)
            action = (parse_compact if policy.compact else parse_chat)(text)
            o = now[slot]
            turns[slot] = Turn(t, prompt, *sample, text, action, "\n".join((o.reply, o.look, o.inventory)))
        middle = clock()
        seen = world.step({slot: turns[slot].action for slot in live})
        for slot in live:
            past[slot].append((now[slot], turns[slot].action))
            now[slot] = seen[slot]
            if seen[slot] is not None:
                turns[slot].invalid = seen[slot].invalid
                episodes[slot].turns.append(turns[slot])
                episodes[slot].score, episodes[slot].success = seen[slot].score, seen[slot].success
        going = [slot for slot in live if now[slot] is not None and not now[slot].done]
        if progress is not None:
            progress.update(len(live) - len(going))
        live = going
        seconds["generate"] += middle - start
        seconds["environment"] += clock() - middle
    kept = [episode for slot, episode in enumerate(episodes) if now[slot] is not None]
    return kept, len(episodes) - len(kept), seconds


def transcript(episode):
    """One episode as readable text."""
    lines = [f"task {episode.task.name} {episode.task.variation}: {'success' if episode.success else 'failure'}, score {episode.score}", episode.goal]
    for turn in episode.turns:
        lines += ["", f"--- turn {turn.index + 1}", turn.observation, f"> {turn.text}" + ("   [invalid]" if turn.invalid else "")]
    return "\n".join(lines) + "\n"


def token_transcript(episode, tokenizer):
    """One episode with the entropy of every token that the policy wrote, for `plot.py`."""
    turns = [{"observation": t.observation, "tokens": [tokenizer.decode([token]) for token in t.written],
              "entropy": t.entropy, "action": t.action, "invalid": t.invalid} for t in episode.turns]
    return {"task": episode.task.name, "variation": episode.task.variation, "goal": episode.goal, "success": episode.success,
            "score": episode.score, "turns": turns}
