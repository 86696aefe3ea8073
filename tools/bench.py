"""Speed and memory of each part, a line of JSON for each measurement.

    python -m tools.bench environment rollout | tee bench.jsonl
    python -m tools.bench Qwen2.5-1.5B --lora-rank 32         # random weights of its shape
    MALLOC_MMAP_THRESHOLD_=65536 python -m tools.bench SmolLM2-135M     # an exact peak of a CPU's

A run's log has the seconds of its steps. Other ways: results/bench.json, of commit c0df856.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from time import perf_counter as clock

import torch
from transformers import AutoModelForCausalLM

from config import checked, decide
from policy import Policy, add_lora, load_policy, response_states, score_tokens
from rollout import Turn, collect, generate
from support import replay
from support.forward import prepare, recomputes
from support.report import read_arguments
from support.run_folder import SetupError
from tools.memory import SHAPES, predict
from update import make_batch, make_learner, update
from worlds.scienceworld import ScienceWorld

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def peak_memory(forget=False):
    """The most MB of this process, or of its tensors on a GPU, so far; forget: now, and from now"""
    if DEVICE == "cuda":
        if forget:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def environment(turns=10):
    """ScienceWorld's own solutions of 32 tasks, played side by side in one simulator."""
    with ScienceWorld(("find-animal", "find-plant", "boil"), jvms=1) as world:
        tasks = world.tasks("train")[:320:10]
        plans = [[*world.gold(task), *["look around"] * turns] for task in tasks]
        world.reset(tasks)
        begin, played = clock(), 0
        for t in range(turns):
            playing = [slot for slot, now in world.last.items() if not now.done]
            played += len(world.step({slot: plans[slot][t] for slot in playing}))
        yield {"episodes": len(tasks), "turns/s": played / (clock() - begin)}


def rollout(episodes=64):
    """Whole episodes of the tiny policy in ScienceWorld; to load the tasks is left out."""
    cfg, policy = decide({"env": "scienceworld"}), load_policy("tiny", "scienceworld", DEVICE)
    with ScienceWorld.from_config(cfg, compact=True) as world:
        tasks = random.Random(0).sample(world.tasks("train"), episodes)
        generator = torch.Generator(DEVICE).manual_seed(0)
        done, _, seconds = collect(world, policy, tasks, cfg.turns, 1.0, 24, generator)
    turns = sum(len(episode.turns) for episode in done)
    speed = turns / (seconds["generate"] + seconds["environment"])
    yield {"episodes": episodes, "turns": turns, "turns/s": speed}


def model(name, rank, dtype="bfloat16"):
    """A rollout and an update of random weights of a model's shape: the slower way, and ours."""
    rows, prompt, response = (64, 1024, 128) if DEVICE == "cuda" else (20, 200, 48)
    config, tokens = SHAPES[name], rows * (prompt + response)
    # micro-batches so large that a CPU, too, computes layers again
    settings = {"lr": 1e-5, "minibatches": 1, "tokens_per_batch": 16384}
    cfg = checked({"lora_rank": rank, "dtype": dtype, **settings})
    prompts = torch.randint(config.vocab_size, (rows, prompt)).tolist()
    for devices, recompute in (([], "on"), (["cuda"], "auto")):
        replay.DEVICES[:] = devices
        # that of the other way is freed before this one is measured
        learner = None
        before = peak_memory(forget=True)
        learner = random_learner(config, cfg)
        learner.policy.model.base_model.recompute = recompute
        # the second time all is warm
        for _ in range(2):
            begin = clock()
            written = generate(learner.policy, prompts, 1.0, response)
            middle = clock()
            turns = [Turn(0, ids, *sample) for ids, sample in zip(prompts, written, strict=True)]
            batch = make_batch(turns, torch.arange(rows), torch.randn(rows), cfg)
            # is what was sampled what is scored?
            few, n = turns[:8], 8 * response
            with torch.no_grad():
                states = response_states(learner.policy.model, few)
                scores = score_tokens(learner.policy.model, states, batch.tokens[:n].to(DEVICE))
            off = (scores[0].cpu() - batch.old_logp[:n]).abs().mean().item()
            scored = clock()
            update(learner, turns, batch, 5.0, 1.5, cfg)
            end = clock()
        part = min(tokens, cfg.tokens_per_batch)
        keep = not recomputes(learner.policy.model.base_model, part)
        always, *phases = predict(config, rank, keep=keep, tokens=part, cached=tokens)
        yield {
            "LoRA rank": rank,
            "decoding": "replayed" if DEVICE in replay.DEVICES else "growing",
            "generated tokens/s": rows * response / (middle - begin),
            "layers kept": keep,
            "trained tokens/s": tokens / (end - scored),
            "sampled - scored, nats": off,
            "peak MB": peak_memory() - before,
            "predicted MB": (always + max(phases)) / 2**20,
        }


def random_learner(config, cfg):
    """What train.py trains, with random weights of a model's shape."""
    mixed = cfg.dtype == "bfloat16"
    dtype = torch.bfloat16 if mixed and cfg.lora_rank else torch.float32
    # drawn where they stay: a CPU takes minutes to draw 7 billion numbers
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.activation_checkpointing_enable()
    prepare(model, cfg.dtype)
    if cfg.lora_rank:
        add_lora(model, "policy", cfg.lora_rank)
    # a compact policy needs no tokenizer to see where a response ends
    policy = Policy(model.eval(), None, [], compact=True, tokens_per_batch=cfg.tokens_per_batch)
    return make_learner(cfg, policy)


def main():
    functions = {f.__name__: f for f in (environment, rollout)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("parts", nargs="+", choices=[*functions, *SHAPES], metavar="part or model")
    parser.add_argument("--lora-rank", type=int, default=0, help="of a model; 0: none")
    args = read_arguments(parser, "bench.py")
    cpu = f"cpu, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else cpu
    try:
        for part in args.parts:
            rows = functions[part]() if part in functions else model(part, args.lora_rank)
            for row in rows:
                print(json.dumps({"part": part, "device": device} | row), flush=True)
    except SetupError as error:
        sys.exit(f"bench.py: {error}")


if __name__ == "__main__":
    main()
