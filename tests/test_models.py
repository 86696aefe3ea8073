"""Real language models' machinery on a small random Qwen2.

The chat prompt, LoRA, bfloat16, gradient checkpointing, the shared prefix.
"""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoTokenizer,
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import config
import update
from critic import Critic, update_critic
from rollout import Turn, collect, generate, response_states, score_tokens
from support import forward
from support.learner import Learner
from support.loading import ROOT, load_policy, trained
from support.report import progress
from support.run_folder import SetupError
from worlds.keyquest import KeyQuest

TEMPLATE = (
    "{% for m in messages %}user {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}agent {% endif %}"
)


def save(folder, vocab=0, template=TEMPLATE, dropout=0.3):
    """A random two-layer Qwen2 with grouped heads and the ScienceWorld policy's tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(ROOT, "models", "scienceworld"))
    tokenizer.chat_template = template
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab or len(tokenizer) + 8,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            initializer_range=0.1,
            attention_dropout=dropout,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("qwen2"))


def play(policy, turns=3, tokens=12, n=6):
    world = KeyQuest()
    return collect(
        world,
        policy,
        world.tasks("train")[:n],
        turns,
        1.0,
        tokens,
        torch.Generator().manual_seed(0),
    )[0]


def gradient(policy, episodes, **options):
    """The gradients, by name, that `update` hands to the optimizer, and its log."""
    taken = {}

    class Record:
        def step(self):
            taken.update(
                {
                    n: p.grad.clone()
                    for n, p in policy.model.named_parameters()
                    if p.grad is not None
                }
            )

        def zero_grad(self):
            policy.model.zero_grad()

    turns = [turn for e in episodes for turn in e.turns]
    owner = torch.tensor([i for i, e in enumerate(episodes) for _ in e.turns])
    advantages = torch.linspace(-1, 1, len(turns))
    cfg = config.Config(minibatches=1, grad_clip=1e9, entropy_coef=0.1, **options)
    batch = update.make_batch(turns, owner, advantages, cfg)
    learner = Learner(policy, Record(), None, None, [])
    log = update.update(learner, turns, batch, 3.0, 1.5, cfg, progress("", 1))
    return taken, log


def move(policy, adapter="policy"):
    """As if it had learnt something."""
    for n, p in trained(policy.model, adapter).items():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n)))


def scored(policy, turns, temperature=1.0):
    """-> the log-probs (T,) and entropies (T,) of all response tokens."""
    tokens = torch.tensor([token for t in turns for token in t.response])
    return score_tokens(policy.model, response_states(policy.model, turns), tokens, temperature)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("tokens_per_batch", [16384, 40])
def test_sampled_logp_equals_the_scored_one_behind_a_shared_prefix_with_and_without_lora(
    folder, rank, tokens_per_batch
):
    policy = load_policy(folder, "keyquest", lora_rank=rank)
    policy.tokens_per_batch = tokens_per_batch
    move(policy)
    prompts = [
        policy.encode(policy.prompt(KeyQuest(), [], o))
        for o in KeyQuest().reset(KeyQuest().tasks("train")[:5])
    ]
    prompts[1] = prompts[1] + prompts[1][-40:]  # of other lengths
    assert len(os.path.commonprefix(prompts)) > 64
    samples = generate(policy, prompts, 0.7, 9, torch.Generator().manual_seed(1))
    turns = [Turn(0, p, *s) for p, s in zip(prompts, samples)]
    logp, entropy = scored(policy, turns, 0.7)
    assert (logp - torch.tensor([x for t in turns for x in t.logp])).abs().max() < 1e-4
    assert (entropy - torch.tensor([x for t in turns for x in t.entropy])).abs().max() < 1e-4


def test_a_response_of_a_chat_model_ends_with_its_action(folder):
    """Nothing is sampled after </action>, and what was sampled is scored to its last token."""
    policy = load_policy(folder, "keyquest")
    tokenizer = policy.tokenizer
    ids = tokenizer.encode("<action>east</action>", add_special_tokens=False)
    inside = torch.full((5,), ids[-1])
    responses = [ids, ids[:-1], [*ids, ids[0]], ids[-1:], [ids[0]] * 20 + ids]
    assert policy.unfinished(inside, responses).tolist() == [False, True, False, True, False]
    ended = torch.tensor([policy.end[0]] * 5)
    assert not policy.unfinished(ended, [[1]] * 5).any()


@pytest.mark.parametrize("tokens_per_batch", [16384, 40])
def test_a_sliding_window_shares_no_prefix(tokens_per_batch, tmp_path):
    """Its mask counts the padding that would stand between the shared part and the rest."""
    save(tmp_path)
    MistralForCausalLM(
        MistralConfig(
            vocab_size=850,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=40,
            initializer_range=0.2,
            eos_token_id=0,
            bos_token_id=None,
            pad_token_id=0,
        )
    ).save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), "keyquest")
    policy.tokens_per_batch = tokens_per_batch
    prompts = [[5] * 70 + [7, 8, 9] * n for n in (1, 4, 12, 30)]
    samples = generate(policy, prompts, 1.0, 6, torch.Generator().manual_seed(0))
    turns = [Turn(0, p, *s) for p, s in zip(prompts, samples)]
    logp, _ = scored(policy, turns)
    assert (logp - torch.tensor([x for t in turns for x in t.logp])).abs().max() < 1e-4


def test_gradient_checkpointing_changes_no_gradient_and_dropout_is_off(folder, monkeypatch):
    """As on a GPU. On a CPU a batch as small as this one is read once."""
    monkeypatch.setattr(forward, "RECOMPUTE_ABOVE", 0)
    policy = load_policy(folder, "keyquest")
    policy.reference = copy.deepcopy(policy.model).requires_grad_(False)
    episodes = play(policy)
    move(policy)
    assert policy.model.is_activation_checkpointing
    layer, times = policy.model.base_model.layers[0], []
    layer.self_attn.register_forward_hook(lambda *_: times.append(torch.is_grad_enabled()))
    with_it, log = gradient(policy, episodes)
    recomputed = len(times)
    times.clear()
    policy.model.activation_checkpointing_disable()
    without, _ = gradient(policy, episodes)
    assert policy.model.base_model.training
    assert recomputed > len(times) > 0
    assert log["kl"] > 0 and all(torch.allclose(with_it[n], without[n], atol=1e-6) for n in without)
    assert max(g.abs().max() for g in without.values()) > 1e-3


def test_lora_trains_the_adapter_alone_and_its_start_is_the_model_without_it(folder):
    """At the start KL and all gradients of A are 0 (B is 0). Later, KL and gradients are those of
    the same model written out in full."""
    plain, policy = load_policy(folder, "keyquest"), load_policy(folder, "keyquest", lora_rank=4)
    episodes = play(policy)
    assert [t.logp for e in episodes for t in e.turns] == [
        t.logp for e in play(plain) for t in e.turns
    ], "an adapter starts as nothing"
    taken, log = gradient(policy, episodes, kl_coef=0.5)
    assert (
        log["kl"] == 0
        and taken.keys() == trained(policy.model).keys()
        and all("lora" in n for n in taken)
    )
    assert not any(g.any() for n, g in taken.items() if "lora_A" in n) and any(
        g.any() for n, g in taken.items() if "lora_B" in n
    )
    move(policy)
    _, log = gradient(policy, episodes, kl_coef=0.5)
    plain.reference = copy.deepcopy(plain.model)
    adapters = dict(policy.model.named_parameters())
    for name, p in plain.model.named_parameters():  # W + 2·B·A
        base = name.removesuffix(".weight")
        if f"{base}.lora_A.policy.weight" in adapters:
            p.data += (
                2
                * adapters[f"{base}.lora_B.policy.weight"].data
                @ adapters[f"{base}.lora_A.policy.weight"].data
            )
    full, full_log = gradient(plain, episodes, kl_coef=0.5)
    assert log["kl"] > 1e-4 and all(
        log[k] == pytest.approx(full_log[k], abs=1e-5) for k in log if k != "grad_norm"
    )


def test_the_critic_is_a_second_adapter_and_the_two_do_not_mix(folder):
    policy = load_policy(folder, "keyquest", lora_rank=4)
    critic = Critic(policy.model, 4)
    assert not {id(p) for p in critic.trained().values()} & {
        id(p) for p in trained(policy.model).values()
    }
    assert (
        all("critic" in n or n.startswith("head") for n in critic.trained())
        and len(critic.trained()) == len(trained(policy.model)) + 2
    )
    episodes = play(policy)
    turns = [t for e in episodes for t in e.turns]
    before = {n: p.clone() for n, p in policy.model.named_parameters() if "critic" not in n}
    optimizer = torch.optim.AdamW(critic.trained().values(), lr=0.01)
    targets = torch.tensor([float(len(t.prompt) % 2) for t in turns])
    cfg = config.Config(critic_minibatches=3)
    losses = [
        update_critic(critic, optimizer, turns, torch.zeros(len(turns)), targets, cfg)["value_loss"]
        for _ in range(8)
    ]
    assert losses[-1] < losses[0] and any(
        p.any() for n, p in critic.trained().items() if "lora_B" in n
    )
    assert all(torch.equal(p, before[n]) for n, p in policy.model.named_parameters() if n in before)
    values = critic.values(turns, 10**6)
    assert torch.allclose(values, critic.values(turns, 300), atol=1e-5) and values.abs().max() > 0
    with torch.no_grad(), critic.adapter():
        assert torch.allclose(values, critic(turns), atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(values, critic(turns), atol=1e-3)
    taken, _ = gradient(policy, episodes, kl_coef=0.1)
    assert taken.keys() == trained(policy.model).keys(), (
        "after the critic's turn the policy's adapter learns again"
    )


def test_bfloat16_keeps_what_is_trained_in_float32_and_stays_near(folder):
    full, lora = (
        load_policy(folder, "keyquest", dtype="bfloat16"),
        load_policy(folder, "keyquest", dtype="bfloat16", lora_rank=4),
    )
    assert all(
        p.dtype == torch.float32 for policy in (full, lora) for p in trained(policy.model).values()
    )
    assert next(lora.model.parameters()).dtype == torch.bfloat16
    turns = [t for e in play(load_policy(folder, "keyquest")) for t in e.turns]
    sampled = torch.tensor([x for t in turns for x in t.logp])
    for policy in (full, lora):
        logp, _ = scored(policy, turns)
        assert logp.dtype == torch.float32 and 0 < (logp - sampled).abs().mean() < 0.05


@pytest.mark.parametrize("more", [["--lora-rank", "2", "--algo", "ppo"], ["--dtype", "bfloat16"]])
def test_steps_with_the_chat_prompt_and_the_same_after_a_kill(folder, more, tmp_path):
    """Also that a checkpoint of LoRA holds the adapters, and not the model."""
    command = [
        sys.executable,
        os.path.join(ROOT, "train.py"),
        "--env",
        "keyquest",
        "--device",
        "cpu",
        "--model",
        folder,
        "--steps",
        "2",
        "--turns",
        "2",
        "--tasks-per-step",
        "2",
        "--group-size",
        "2",
        "--minibatches",
        "1",
        "--max-tokens",
        "8",
        "--lr",
        "1e-3",
        "--eval-episodes",
        "2",
        *more,
    ]
    logs = []
    for name in ("whole", "killed"):
        out = str(tmp_path / name)
        process = subprocess.Popen([*command, "--out", out], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("step   0") and name == "killed":
                process.kill()
        if process.wait():
            assert (
                name == "killed"
                and subprocess.run([*command[:2], "--out", out, "--resume"]).returncode == 0
            )
        logs.append(
            [
                {k: v for k, v in json.loads(line).items() if not k.startswith("seconds")}
                for line in open(os.path.join(out, "log.jsonl"))
            ]
        )
    assert logs[0] == logs[1] and len(logs[0]) == 3
    assert logs[0][0]["entropy"] > 3 and logs[0][0]["kl"] == 0 < logs[0][1]["kl"]
    assert os.path.getsize(os.path.join(out, "checkpoint.pt")) < (
        3e5 if "--lora-rank" in more else 3e6
    )


def test_a_model_that_does_not_fit_is_refused_in_one_line(tmp_path):
    with pytest.raises(SetupError, match="no chat template"):
        load_policy(save(tmp_path / "template", template=None), "keyquest")
    with pytest.raises(SetupError, match="tokens"):
        load_policy(save(tmp_path / "vocabulary", vocab=500), "keyquest")


def test_without_pefts_round_trip_over_float32_no_bit_changes(folder):
    """Log-probs and gradients of LoRA in bfloat16, with the casts that peft makes and without."""
    policy = load_policy(folder, "keyquest", dtype="bfloat16", lora_rank=4)
    move(policy)
    episodes = play(policy)
    turns = [turn for episode in episodes for turn in episode.turns]
    layers = [m for m in policy.model.modules() if hasattr(m, "cast_input_dtype_enabled")]
    assert len(layers) == 14 and not any(m.cast_input_dtype_enabled for m in layers)
    results = []
    for cast in (False, True):
        for layer in layers:
            layer.cast_input_dtype_enabled = cast
        torch.manual_seed(0)
        taken, _ = gradient(policy, episodes, kl_coef=0.1)
        results.append([*scored(policy, turns), *taken.values()])
    without, with_casts = results
    assert len(without) == 2 + 2 * len(layers)
    assert all(torch.equal(a, b) for a, b in zip(without, with_casts, strict=True))
    assert all(gradient.any() for gradient in without)


@pytest.mark.parametrize("rank", [0, 4])
def test_bfloat16_copies_of_weights_are_made_once_in_a_rollout(folder, rank):
    policy = load_policy(folder, "keyquest", dtype="bfloat16", lora_rank=rank)
    policy.end = []
    weights = {p.data_ptr() for p in trained(policy.model).values()}

    class Copies(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                self.made += args[0].data_ptr() in weights
            return function(*args, **(kwargs or {}))

    made = []
    for tokens in (1, 5):
        with Copies() as copies:
            generate(policy, [[5, 6, 7], [8]], 1.0, tokens)
        made.append(copies.made)
    # A and B of 14 layers; or 14 matrices, 6 biases and the output matrix
    assert made == [28, 28] if rank else made == [21, 21]


def test_the_cache_is_copied_only_when_its_rows_change(folder, monkeypatch):
    policy = load_policy(folder, "keyquest")
    copied, select = [], DynamicCache.batch_select_indices
    count = lambda cache, indices: copied.append(len(indices)) or select(cache, indices)
    monkeypatch.setattr(DynamicCache, "batch_select_indices", count)
    prompts = [[5, i] for i in range(12)]
    policy.end = []
    generate(policy, prompts, 1.0, 12)
    assert not copied
    # now some end: once for all that end with the same token of their response
    policy.end = list(range(0, 800, 8))
    samples = generate(policy, prompts, 1.0, 12, torch.Generator().manual_seed(0))
    lengths = sorted(len(response) for response, _, _ in samples)
    assert 2 < len(set(lengths)) < 12
    ends = sorted(set(lengths))[:-1]
    assert copied == [sum(length > end for length in lengths) for end in ends]
