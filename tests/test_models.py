"""Real language models' machinery on small random models.

The chat prompt, LoRA, bfloat16, gradient checkpointing, the shared prefix, the cache.
"""

import copy
import os
from types import SimpleNamespace

import pytest
import torch
from test_rollout import check_sampled_is_scored, close, play, scored, turns_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import train
from config import Config, decide
from critic import Critic, update_critic
from policy import load_policy, save_model, trained
from rollout import generate
from support import forward, replay
from support.run_folder import ROOT, SetupError, read_log
from update import Learner, make_batch, update

TEMPLATE = (
    "{% for m in messages %}user {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}agent {% endif %}"
)
# two layers with grouped heads
SHAPE = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
SHAPE |= dict(num_key_value_heads=2, initializer_range=0.1, tie_word_embeddings=True)


def save(folder, vocab=None, template=TEMPLATE, architecture="qwen2", **more):
    """A random model with the ScienceWorld policy's tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(ROOT, "models", "scienceworld"))
    tokenizer.chat_template = template
    end = tokenizer.eos_token_id
    more |= dict(vocab_size=vocab or len(tokenizer) + 8, eos_token_id=end, pad_token_id=end)
    config = AutoConfig.for_model(architecture, **SHAPE | more, bos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("qwen2"), attention_dropout=0.3)


def gradient(policy, episodes, **options):
    """The gradients, by name, that `update` hands to the optimizer, and its log."""
    taken = {}

    class Record:
        def step(self):
            for name, p in policy.model.named_parameters():
                if p.grad is not None:
                    taken[name] = p.grad.clone()

        def zero_grad(self):
            policy.model.zero_grad()

    turns = turns_of(episodes)
    owner = torch.tensor([i for i, e in enumerate(episodes) for _ in e.turns])
    cfg = Config(minibatches=1, grad_clip=1e9, entropy_coef=0.1, **options)
    batch = make_batch(turns, owner, torch.linspace(-1, 1, len(turns)), cfg)
    learner = Learner(policy, Record(), None, None, [])
    log = update(learner, turns, batch, 3.0, 1.5, cfg)
    return taken, log


def move(policy, adapter="policy"):
    """As if it had learnt something."""
    for name, p in trained(policy.model, adapter).items():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))


@pytest.mark.parametrize("tokens_per_batch", [16384, 40])
@pytest.mark.parametrize(
    "lora_rank, more",
    [
        (0, {}),
        (4, {}),
        # such a mask counts the padding that would stand between a shared prefix and the rest
        (0, dict(architecture="mistral", sliding_window=40, initializer_range=0.2)),
    ],
    ids=["all", "lora", "window"],
)
def test_sampled_is_scored_behind_a_shared_prefix(lora_rank, more, tokens_per_batch, tmp_path):
    policy = load_policy(save(tmp_path, **more), "keyquest", lora_rank=lora_rank)
    policy.tokens_per_batch = tokens_per_batch
    move(policy)
    prompts = [[*range(20, 90), *[7, 8, 9] * n] for n in (1, 4, 12, 30)]
    check_sampled_is_scored(policy, prompts, 0.7)


@pytest.mark.parametrize(
    "text, goes_on",
    [
        ("<action>east</action>", False),
        ("<action>east</action", True),
        ("no thought, no tag, " * 9 + "<action>east</action>", False),
        ("", False),
    ],
)
def test_a_response_of_a_chat_model_ends_with_its_action_or_the_end_token(folder, text, goes_on):
    """Nothing is sampled after </action>, and what was sampled is scored to its last token."""
    policy = load_policy(folder, "keyquest")
    ids = policy.tokenizer.encode(text, add_special_tokens=False) or policy.end
    assert policy.unfinished(torch.tensor(ids[-1:]), [ids]).tolist() == [goes_on]


def test_gradient_checkpointing_changes_no_gradient_and_dropout_is_off(folder, monkeypatch):
    """As on a GPU. On a CPU a batch as small as this one is read once."""
    monkeypatch.setattr(forward, "RECOMPUTE_ABOVE", 0)
    policy = load_policy(folder, "keyquest")
    policy.reference = copy.deepcopy(policy.model).requires_grad_(False)
    episodes = play(policy, turns=3)
    move(policy)
    read = []
    layer = policy.model.base_model.layers[0].self_attn
    layer.register_forward_hook(lambda *_: read.append(torch.is_grad_enabled()))
    recomputed, log = gradient(policy, episodes)
    times = len(read)
    policy.model.activation_checkpointing_disable()
    kept, _ = gradient(policy, episodes)
    assert policy.model.base_model.training
    # the layers are read again on the way back
    assert times > len(read) - times > 0
    assert log["kl"] > 0
    assert max(g.abs().max() for g in kept.values()) > 1e-3
    close(recomputed, kept, atol=1e-6)


def test_recompute_is_a_setting_or_what_the_card_has_no_room_for(folder, monkeypatch):
    body = load_policy(folder, "keyquest").model.base_model
    for body.recompute, answer in (("on", True), ("off", False)):
        assert forward.recomputes(body, 1) == forward.recomputes(body, 10**9) == answer
    # 2 layers of 8 · 48 + 4 · 96 numbers of two bytes
    assert forward.kept(body.config, 10) == 2 * 10 * 2 * 768
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * 30_720, 10**6))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 30_720)
    for mixed, most in ((True, 10), (False, 5)):
        card = SimpleNamespace(device=torch.device("cuda"), config=body.config, mixed=mixed)
        assert [forward.recomputes(card, tokens) for tokens in (most, most + 1)] == [False, True]


class Graph(TorchDispatchMode):
    """A stand-in for a CUDA graph: what it records changes nothing, and refuses read-backs."""

    def __init__(self, work):
        super().__init__()
        self.recorded, self.before = [], []
        with self:
            work()
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # item(), or nonzero()
        assert not str(function).startswith(("aten._local_scalar", "aten.nonzero"))
        if function._schema.is_mutable:
            self.before.append((args[0], args[0].clone()))
        out = function(*args, **kwargs or {})
        self.recorded.append((function, args, kwargs or {}, tree_leaves(out)))
        return out

    def __call__(self):
        """Do it again, into the same memory."""
        for function, args, kwargs, out in self.recorded:
            for old, value in zip(out, tree_leaves(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != value.data_ptr():
                    old.copy_(value)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "gemma"])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("shared", [0, 40])
def test_a_replayed_step_writes_the_same_tokens(kind, rank, shared, tmp_path, monkeypatch):
    folder = save(tmp_path, architecture=kind, head_dim=12, initializer_range=0.3)
    policy = load_policy(folder, "keyquest", lora_rank=rank)
    move(policy)
    policy.compact, policy.end = True, list(range(200))
    prompts = [[7] * shared + [5, 6, 7, 8][: 2 + i % 3] for i in range(5)]
    graphs, written = [], []
    monkeypatch.setattr(replay, "capture", lambda work: graphs.append(Graph(work)) or graphs[-1])
    for devices in ([], ["cpu"]):
        monkeypatch.setattr(replay, "DEVICES", devices)
        generator = torch.Generator().manual_seed(1)
        written.append(generate(policy, prompts, 1.0, 20, generator))
    grown, replayed = written
    assert len(graphs) == 1 and len({len(ids) for ids, *_ in grown}) > 1
    for one, other in zip(grown, replayed, strict=True):
        assert one[0] == other[0]
        close(torch.tensor(one[1:]), torch.tensor(other[1:]), atol=2e-5)


def test_what_cannot_be_recorded_is_decoded_launch_by_launch(folder, monkeypatch, capsys):
    policy, written = load_policy(folder, "keyquest"), []
    for devices in ([], ["cpu"]):
        monkeypatch.setattr(replay, "DEVICES", devices)
        generator = torch.Generator().manual_seed(1)
        written.append(generate(policy, [[5, 6, 7]], 1.0, 8, generator)[0])
    assert written[0][0] == written[1][0] and not devices
    assert "no CUDA graph of decoding: " in capsys.readouterr().out


def test_lora_trains_the_adapter_alone_and_its_start_is_the_model_without_it(folder, tmp_path):
    """At the start KL and all gradients of A are 0 (B is 0). Later, KL and losses are those of the
    same model saved in full."""
    plain, policy = load_policy(folder, "keyquest"), load_policy(folder, "keyquest", lora_rank=4)
    episodes = play(policy, turns=3)
    logp, _ = scored(plain, turns_of(episodes))
    sampled = torch.tensor([x for turn in turns_of(episodes) for x in turn.logp])
    close(logp, sampled, atol=1e-5)
    taken, log = gradient(policy, episodes, kl_coef=0.5)
    assert abs(log["kl"]) < 1e-6
    assert taken.keys() == trained(policy.model).keys()
    moved = {name.split(".")[-3] for name, g in taken.items() if g.any()}
    assert moved == {"lora_B"}
    move(policy)
    _, log = gradient(policy, episodes, kl_coef=0.5)
    save_model(policy, {}, str(tmp_path / "full"))
    full = load_policy(str(tmp_path / "full"), "keyquest")
    full.reference = plain.model
    _, full_log = gradient(full, episodes, kl_coef=0.5)
    # the gradients are of other parameters
    assert log["kl"] > 1e-4
    assert log | {"grad_norm": 0} == pytest.approx(full_log | {"grad_norm": 0}, abs=1e-5)


def test_the_critic_is_a_second_adapter_and_the_two_do_not_mix(folder):
    policy = load_policy(folder, "keyquest", lora_rank=4)
    critic = Critic(policy.model, 4)
    of_policy, of_critic = trained(policy.model), critic.trained()
    # the head has two
    parameters = {*of_policy.values(), *of_critic.values()}
    assert len(parameters) == len(of_policy) + len(of_critic) == 2 * len(of_policy) + 2
    episodes = play(policy, turns=3)
    turns = turns_of(episodes)
    before = {name: p.clone() for name, p in of_policy.items()}
    optimizer = torch.optim.AdamW(of_critic.values(), lr=0.01)
    targets = torch.tensor([float(len(turn.prompt) % 2) for turn in turns])
    learn = (critic, optimizer, turns, torch.zeros(len(turns)), targets)
    losses = [update_critic(*learn, Config(critic_minibatches=3)) for _ in range(8)]
    assert losses[-1]["value_loss"] < losses[0]["value_loss"]
    assert all(torch.equal(of_policy[name], p) for name, p in before.items())
    values = critic.values(turns, 10**6)
    close(critic.values(turns, 300), values, atol=1e-5)
    # without its adapter it says something else
    assert values.abs().max() > 0
    assert (critic(turns) - values).abs().max() > 1e-3
    # after the critic's turn the policy's adapter learns again
    taken, _ = gradient(policy, episodes, kl_coef=0.1)
    assert taken.keys() == of_policy.keys()


@pytest.mark.parametrize("lora_rank, own", [(0, torch.float32), (4, torch.bfloat16)])
def test_bfloat16_keeps_what_is_trained_in_float32_and_stays_near(folder, lora_rank, own):
    policy = load_policy(folder, "keyquest", dtype="bfloat16", lora_rank=lora_rank)
    assert {p.dtype for p in trained(policy.model).values()} == {torch.float32}
    assert policy.model.get_output_embeddings().weight.dtype == own
    turns = turns_of(play(load_policy(folder, "keyquest"), turns=3))
    logp, _ = scored(policy, turns)
    sampled = torch.tensor([x for turn in turns for x in turn.logp])
    assert logp.dtype == torch.float32
    assert 0 < (logp - sampled).abs().mean() < 0.05


STEPS = dict(env="keyquest", steps=2, turns=2, tasks_per_step=2, group_size=2, minibatches=1)
STEPS |= dict(max_tokens=8, lr=1e-3, eval_episodes=2)


@pytest.mark.parametrize(
    "more, megabytes",
    [({"lora_rank": 2, "algo": "ppo"}, 0.3), ({"dtype": "bfloat16"}, 3)],
    ids=["lora", "bfloat16"],
)
def test_a_chat_model_steps_and_resumes(folder, more, megabytes, tmp_path, monkeypatch):
    """A stopped run ends with the log of a whole one; a checkpoint of LoRA holds adapters alone."""
    whole, stopped = str(tmp_path / "whole"), str(tmp_path / "stopped")
    given = STEPS | more | {"model": folder}
    train.train(decide(given | {"out": whole}))

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.report, "line", stop)
        train.train(decide(given | {"out": stopped}))
    train.train(decide({"out": stopped, "resume": True}))
    logs = [read_log(whole), read_log(stopped)]
    for row in logs[0] + logs[1]:
        for key in [key for key in row if key.startswith("seconds")]:
            del row[key]
    assert logs[0] == logs[1]
    first, second, _ = logs[0]
    assert first["entropy"] > 3
    assert abs(first["kl"]) < 1e-6 < second["kl"]
    assert os.path.getsize(tmp_path / "whole" / "checkpoint.pt") < megabytes * 1e6


@pytest.mark.parametrize(
    "options, word", [({"template": None}, "no chat template"), ({"vocab": 500}, "tokens")]
)
def test_a_model_that_does_not_fit_is_refused_in_one_line(options, word, tmp_path):
    with pytest.raises(SetupError, match=word) as error:
        load_policy(save(tmp_path, **options), "keyquest")
    assert "\n" not in str(error.value)


def test_without_pefts_round_trip_over_float32_no_bit_changes(folder):
    """Log-probs and gradients of LoRA in bfloat16, with the casts that peft makes and without."""
    policy = load_policy(folder, "keyquest", dtype="bfloat16", lora_rank=4)
    move(policy)
    episodes = play(policy, turns=3)
    layers = [m for m in policy.model.modules() if hasattr(m, "cast_input_dtype_enabled")]
    assert len(layers) == 14 and not any(m.cast_input_dtype_enabled for m in layers)
    results = []
    for cast in (False, True):
        for layer in layers:
            layer.cast_input_dtype_enabled = cast
        torch.manual_seed(0)
        taken, _ = gradient(policy, episodes, kl_coef=0.1)
        results.append([*scored(policy, turns_of(episodes)), *taken.values()])
    without, with_casts = results
    assert len(without) == 2 + 2 * len(layers)
    assert all(torch.equal(a, b) for a, b in zip(without, with_casts, strict=True))
    assert all(numbers.any() for numbers in without)


class Calls(TorchDispatchMode):
    """Records what torch computes: (name of the operator, its arguments, what it gave)."""

    def __enter__(self):
        self.made = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.made.append((str(function.overloadpacket), args, result))
        return result


# A and B of 14 layers; or 14 matrices, 6 biases and the output matrix
@pytest.mark.parametrize("lora_rank, copies", [(0, 21), (4, 28)])
def test_bfloat16_copies_of_weights_are_made_once_in_a_rollout(folder, lora_rank, copies):
    policy = load_policy(folder, "keyquest", dtype="bfloat16", lora_rank=lora_rank)
    policy.end = []
    weights = {p.data_ptr() for p in trained(policy.model).values()}
    for tokens in (1, 5):
        with Calls() as calls:
            generate(policy, [[5, 6, 7], [8]], 1.0, tokens)
        cast = [args[0].data_ptr() for name, args, _ in calls.made if name == "aten._to_copy"]
        assert sum(pointer in weights for pointer in cast) == copies


def test_the_cache_is_copied_only_when_its_rows_change(folder):
    """Once for all responses that end with the same token, and not at other tokens."""
    policy = load_policy(folder, "keyquest")
    policy.end = list(range(0, 800, 8))
    prompts = [[5, i] for i in range(12)]
    with Calls() as calls:
        samples = generate(policy, prompts, 1.0, 12, torch.Generator().manual_seed(0))
    # keys and values are (rows, heads, tokens, width), of two layers
    selected = [made for made in calls.made if made[0] in ("aten.index", "aten.index_select")]
    copied = [len(result) for _, args, result in selected if args[0].dim() == 4]
    lengths = [len(response) for response, _, _ in samples]
    ends = sorted(set(lengths))
    assert 2 < len(ends) < 12
    left = [sum(length > end for length in lengths) for end in ends[:-1]]
    assert copied == [rows for rows in left for _ in range(4)]
