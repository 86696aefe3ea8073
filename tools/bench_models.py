"""Training beside the usual ways, and how large its parts are: loss, memory, models, step."""

import os
import subprocess
import sys
import tempfile

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from config import Config
from critic import update_critic
from epo import epo_loss, token_logp_and_entropy
from rollout import Policy, Turn, generate
from support.learner import make_learner
from support.loading import ROOT, add_lora
from support.run_folder import read_log
from tools.measure import DEVICE, alone, clock, forget_peak, memory_used, table
from tools.memory import SHAPES, count, parts, qwen, total
from update import LOGITS_AT_ONCE, make_batch, update

# ---- loss: from the last hidden states to their gradient


def loss_once(way, tokens, width, vocabulary):
    """Log-prob, entropy and EPO loss, forward and backward. -> seconds, peak MB, Σ|∂L/∂h|"""
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(vocabulary, width, device=DEVICE)).requires_grad_()
    hidden = torch.randn(tokens, width, device=DEVICE, requires_grad=True)
    response = torch.randint(vocabulary, (tokens,), device=DEVICE)
    advantages = torch.randn(tokens, device=DEVICE)

    def backward(states, rows):
        logits = states @ weight.T
        if way == "trl":
            logp, entropy = trl_logp_and_entropy(logits, response[rows])
        else:
            logp, entropy = token_logp_and_entropy(logits, response[rows])
        loss, _ = epo_loss(
            logp=logp,
            old_logp=logp.detach(),
            entropy=entropy,
            advantages=advantages[rows],
            weights=torch.full_like(logp, 1 / tokens),
            history_mean=5.0,
            beta_k=1.5,
        )
        loss.backward()

    forget_peak()
    before, begin = memory_used(), clock()
    if way == "ours":
        # the loop of update.add_gradient
        states = hidden.detach().requires_grad_()
        for rows in torch.arange(tokens).split(LOGITS_AT_ONCE // vocabulary):
            backward(states[rows], rows)
        hidden.backward(states.grad)
    else:
        backward(hidden, slice(None))
    # this also waits for a GPU
    checksum = hidden.grad.abs().sum().item()
    return clock() - begin, memory_used(peak=True) - before, checksum


def trl_logp_and_entropy(logits, tokens):
    """As TRL's GRPOTrainer computes them, with the gradient of the entropy."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits = logits.unsqueeze(0)
    logp = selective_log_softmax(logits, tokens.unsqueeze(0))
    return logp[0], entropy_from_logits(logits)[0]


def loss(tokens=2048, width=896, vocabulary=151_936):
    """The width and the vocabulary are Qwen2.5-0.5B's."""
    rows = []
    for way in ("direct", "trl", "ours"):
        if result := alone("loss_once", way, tokens, width, vocabulary):
            seconds, peak, checksum = result
            row = {"way": way, "tokens": tokens, "seconds": seconds, "peak MB": peak}
            rows.append(row | {"|∂L/∂h|": checksum})
    for row in rows:
        row["time"] = row["seconds"] / rows[0]["seconds"]
        row["memory"] = row["peak MB"] / rows[0]["peak MB"]
    return table(f"Loss, forward and backward, V = {vocabulary}, d = {width}", rows)


# ---- memory, models: random weights of a model's shape


def random_learner(config, cfg):
    """What train.py trains, with random weights. cfg: of its settings."""
    half = cfg.lora_rank and cfg.dtype == "bfloat16"
    dtype = torch.bfloat16 if half else torch.float32
    # drawn where they stay: a CPU takes minutes to draw 7 billion numbers
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.activation_checkpointing_enable()
    model.mixed = model.base_model.mixed = cfg.dtype == "bfloat16"
    if cfg.lora_rank:
        add_lora(model, "policy", cfg.lora_rank)
    # a compact policy needs no tokenizer to see where a response ends
    policy = Policy(model.eval(), None, [], compact=True, tokens_per_batch=cfg.tokens_per_batch)
    return make_learner(cfg, policy)


def random_turns(rows, prompt, response, vocabulary):
    """`rows` turns with prompts and responses of these lengths."""
    prompts = torch.randint(vocabulary, (rows, prompt)).tolist()
    numbers = [5] * response, [-9.0] * response, [9.0] * response
    return [Turn(0, ids, *numbers) for ids in prompts]


def update_once(learner, turns, cfg):
    """A step's update, as if each turn were an episode."""
    rows = len(turns)
    batch = make_batch(turns, torch.arange(rows), torch.randn(rows), cfg)
    with tqdm(disable=True) as bar:
        update(learner, turns, batch, 5.0, 1.5, cfg, bar)
    if learner.critic is not None:
        values, targets = torch.zeros(rows), torch.ones(rows)
        update_critic(learner.critic, learner.critic_optimizer, turns, values, targets, cfg)


def memory_once(phase, layers, width, ffn, vocabulary, rank, algo, dtype):
    """Two updates, or two rollouts: the second has all that lasts. -> MB, measured and predicted"""
    rows, prompt, response = 8, 500, 16
    config = qwen(layers, width, 8, 2, ffn, vocabulary)
    cfg = Config(lora_rank=rank, algo=algo, dtype=dtype, lr=1e-5, critic_lr=1e-5)
    cfg.minibatches = cfg.critic_minibatches = 1
    # two micro-batches
    cfg.tokens_per_batch = rows // 2 * (prompt + response)
    # the libraries' own memory comes before
    torch.ones(64, 64, requires_grad=True).matmul(torch.ones(64, 64)).sum().backward()
    before = memory_used()
    learner, turns = random_learner(config, cfg), random_turns(rows, prompt, response, vocabulary)
    for _ in range(2):
        forget_peak()
        if phase == "update":
            update_once(learner, turns, cfg)
        else:
            generate(learner.policy, [turn.prompt for turn in turns], 1.0, response)
    always, *phases = parts(
        config,
        lora_rank=rank,
        ppo=algo == "ppo",
        mixed=dtype == "bfloat16",
        tokens=cfg.tokens_per_batch,
        response_tokens=rows // 2 * response,
        episodes=rows,
        context=prompt + response,
    )
    if phase == "rollout":
        # no step was taken
        always["Adam"] = 0
    predicted = total(always, phases[phase == "rollout"])
    return memory_used(peak=True) - before, predicted / 2**20


def memory():
    """The predictions of tools/memory.py beside measured peaks."""
    smollm2, wide = (30, 576, 1536, 49152), (8, 512, 2816, 151936)
    cases = (
        ("update", *smollm2, 0, "grpo", "float32"),
        ("update", *smollm2, 16, "grpo", "float32"),
        ("update", *smollm2, 16, "grpo", "bfloat16"),
        ("update", *wide, 0, "grpo", "float32"),
        ("update", *wide, 0, "ppo", "float32"),
        ("update", *wide, 16, "ppo", "float32"),
        ("rollout", *smollm2, 0, "grpo", "float32"),
        ("rollout", *smollm2, 0, "grpo", "bfloat16"),
    )
    rows = []
    for case in cases:
        if result := alone("memory_once", *case):
            phase, layers, width, _, vocabulary, rank, algo, dtype = case
            row = {"phase": phase, "layers": layers, "d": width, "V": vocabulary}
            row |= {"trained": trained_text(rank), "algo": algo, "dtype": dtype}
            row["measured MB"], row["predicted MB"] = result
            rows.append(row | {"ratio": row["predicted MB"] / row["measured MB"]})
    return table("Memory: measured peaks, and the prediction", rows)


def trained_text(rank):
    return f"LoRA {rank}" if rank else "all"


def second(work):
    """Seconds of the second time, when all is warm."""
    for _ in range(2):
        begin = clock()
        work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    return clock() - begin


def matrix_throughput(dtype):
    """Operations per second of a large matrix product."""
    n = 4096 if DEVICE == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=getattr(torch, dtype))
    return 10 * 2 * n**3 / second(lambda: [a @ b for _ in range(10)])


def model_once(name, rank, rows, prompt, response):
    """Generation and an update with random weights of a model's exact shape. -> a row"""
    dtype = "bfloat16" if DEVICE == "cuda" else "float32"
    cfg = Config(lora_rank=rank, dtype=dtype, lr=1e-5, minibatches=1)
    config = SHAPES[name]
    learner = random_learner(config, cfg)
    turns = random_turns(rows, prompt, response, config.vocab_size)
    prompts = [turn.prompt for turn in turns]
    throughput = matrix_throughput(dtype)
    forget_peak()
    generation = second(lambda: generate(learner.policy, prompts, 1.0, response))
    training = second(lambda: update_once(learner, turns, cfg))
    parameters, head, _ = count(config)
    body = parameters - head * (1 if config.tie_word_embeddings else 2)
    products = body * rows * (prompt + response) + head * rows * response
    # 2 for the reference policy, the forward pass, and this again; the backward pass takes 4, and
    # with LoRA, where the model's weights get no gradient, 2
    operations = (8 if rank else 10) * products
    row = {"model": name, "trained": trained_text(rank), "rows": rows, "prompt": prompt}
    row |= {"response": response, "dtype": dtype}
    row["generated tokens/s"] = rows * response / generation
    row["trained tokens/s"] = rows * (prompt + response) / training
    row["peak GB"] = memory_used(peak=True) * 2**20 / 1e9
    return row | {"of matrix throughput": operations / training / throughput}


def models():
    """The models that train.py is for; on a CPU, the smallest."""
    names, size = ("SmolLM2-135M",), (4, 250, 16)
    if DEVICE == "cuda":
        names, size = tuple(SHAPES), (64, 1024, 128)
    results = [alone("model_once", name, rank, *size) for name in names for rank in (0, 32)]
    return table("Models: generation and update, random weights", list(filter(None, results)))


# ---- step: the whole program


def step():
    """RL steps of train.py on ScienceWorld with the tiny policy: seconds by part."""
    rows = []
    for episodes, turns in ((8, 12), (16, 12), (32, 12), (64, 12), (32, 6), (32, 24)):
        log = short_run(episodes // 8, turns)[1:3]
        mean = lambda name, log=log: sum(row[name] for row in log) / len(log)
        row = {"episodes": episodes, "turn limit": turns, "turns": mean("turns")}
        for part in ("load", "generate", "environment", "train"):
            row[part] = mean(f"seconds_{part}")
        row["step"] = mean("seconds")
        rows.append(row | {"ms a turn": 1000 * row["step"] / row["turns"]})
    return table("One RL step, seconds (means of two steps)", rows)


def short_run(tasks, turns):
    """-> the log of three steps"""
    command = [sys.executable, os.path.join(ROOT, "train.py"), "--steps", "3"]
    command += ["--tasks-per-step", str(tasks), "--turns", str(turns), "--eval-episodes", "1"]
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "run")
        subprocess.run([*command, "--out", out], check=True, stdout=subprocess.DEVNULL)
        return read_log(out)
