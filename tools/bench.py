"""Speed and memory, side by side: python bench.py [environment] [alfworld] [rollout] [loss] [memory] [models] [step] [--out bench.json]

Each part does the same work in several ways, in one run on this machine, prints a table and adds it to the JSON. Ratios carry
over to other machines, times don't. Without names: all parts that can be run here.
"""
import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import time

import torch

from envs import ALFWorld, ScienceWorld, find_alfworld, parse_compact
from epo import epo_loss, token_logp_and_entropy
from rollout import HERE, collect, load_policy

clock = time.perf_counter


def megabytes(pids):
    """Memory of processes, shared pages divided among their users (Linux)."""
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            total += next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return total / 1024


def used(peak=False):
    """Memory of this process, on the GPU if there is one (else Linux), now or at its peak since `forget_peak`; in MB."""
    if torch.cuda.is_available():
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2 ** 20
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM" if peak else "VmRSS")) / 1024


def forget_peak():
    if torch.cuda.is_available():
        return torch.cuda.reset_peak_memory_stats()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")                                     # VmHWM starts again


def alone(function, arguments, **environment):
    """What a function of this file gives in a process of its own, where nothing else takes memory; None, and a word, if it fails."""
    result = subprocess.run([sys.executable, os.path.abspath(__file__), "--once", function, json.dumps(arguments)], capture_output=True, text=True,
                            env={**os.environ, **environment})
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["it was killed: too little memory?"])[-1][:100]
        return print(f"{function} {arguments}: left out ({reason})")
    return json.loads(result.stdout)


def table(title, rows):
    """Print rows of {column: value} and give them back. Numbers get three digits."""
    columns = list(rows[0])
    text = [[f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *text]) for i in range(len(columns))]
    print(f"\n{title}")
    for line in [columns, *text]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)))
    return rows


# ------------------------------------------------------------------------------------------------------- environment
def environment(episodes=32, stock=4, turns=10):
    """The same gold actions in our many-episodes simulators and in `ScienceWorldEnv`, one process for each episode."""
    from scienceworld import ScienceWorldEnv
    rows = []
    for objects, label in ((False, "ours, compact prompt"), (True, "ours, chat prompt (objects in sight)")):
        with ScienceWorld(("find-animal", "find-plant", "boil"), objects=objects, jvms=1) as world:
            tasks = world.tasks("train")[::10][:episodes]
            plans = [(world.gold(t) + ["look around"] * turns)[:turns] for t in tasks]
            world.reset(tasks)
            start, done = clock(), 0
            live = set(range(len(tasks)))
            for t in range(turns):
                seen = world.step({i: plans[i][t] for i in live})
                done += len(seen)
                live -= {i for i, o in seen.items() if o.done}
            rows.append({"way": label, "episodes": len(tasks), "processes": 1, "turns/s": done / (clock() - start),
                         "MB": megabytes([world.jvms[0].process.pid])})
    os.environ["PATH"] = os.path.dirname(world.jvms[0].java) + os.pathsep + os.environ["PATH"]
    envs, before = [], children("java")
    for task in tasks[:stock]:
        env = ScienceWorldEnv("", envStepLimit=100)
        env.load(task.name, task.variation, "easy")
        env.reset()
        envs.append(env)
    start, done = clock(), 0
    for env, plan in zip(envs, plans):
        for action in plan:
            done += 1
            if env.step(action)[2]:
                break
    seconds = clock() - start
    memory = megabytes(children("java") - before)
    for env in envs:
        env.close()
    rows.append({"way": "ScienceWorldEnv, a process per episode", "episodes": stock, "processes": stock, "turns/s": done / seconds, "MB": memory})
    for row in rows:
        row["MB for 32 (extrapolated)"] = row["MB"] * (32 / row["episodes"] if row["processes"] > 1 else 1)
        row["speed"] = row["turns/s"] / rows[-1]["turns/s"]
    return table("ScienceWorld: stepping", rows)


def alfworld(sizes=(16, 64), turns=(12, 3)):
    """Random admissible commands in the real games, ours and in the stock `AlfredTWEnv` (which finds its games by reading them all)."""
    folder = find_alfworld()
    if folder is None:
        return print("\nALFWorld: left out, there are no real games (`alfworld-download`)")
    from alfworld.agents.environment.alfred_tw_env import AlfredTWEnv
    config = {"dataset": {"data_path": f"{folder}/train", "eval_id_data_path": f"{folder}/valid_seen", "eval_ood_data_path": f"{folder}/valid_unseen",
                          "num_train_games": -1, "num_eval_games": -1},
              "env": {"goal_desc_human_anns_prob": 0, "task_types": [1, 2, 3, 4, 5, 6], "domain_randomization": False, "expert_type": "handcoded"},
              "general": {"training_method": "dqn"}, "rl": {"training": {"max_nb_steps_per_episode": 50}}}
    rows = []
    for n, played in zip(sizes, turns):
        rng = random.Random(0)
        with ALFWorld(games="real") as world:
            tasks, times = world.tasks("iid")[:n], [clock()]
            now = dict(enumerate(world.reset(tasks)))
            times.append(clock())
            done = 0
            for _ in range(10 * played):
                seen = world.step({i: rng.choice(o.objects) for i, o in now.items() if not o.done})
                done += len(seen)
                now.update(seen)
            times.append(clock())
            memory = megabytes(children("python"))
            world.reset(tasks)
            times.append(clock())
            rows.append({"way": "ours", "episodes": n, "turns/s": done / (times[2] - times[1]), "MB": memory, "first reset s": times[1] - times[0],
                         "again s": times[3] - times[2]})
        before = children("python")
        stock = AlfredTWEnv(config, "eval_in_distribution").init_env(batch_size=n)
        times = [clock()]
        commands = stock.reset()[1]["admissible_commands"]
        times.append(clock())
        for _ in range(played):
            commands = stock.step([rng.choice(c) for c in commands])[3]["admissible_commands"]
        times.append(clock())
        memory = megabytes(children("python") - before)
        stock.reset()
        times.append(clock())
        stock.close()
        rows.append({"way": "AlfredTWEnv", "episodes": n, "turns/s": played * n / (times[2] - times[1]), "MB": memory, "first reset s": times[1] - times[0],
                     "again s": times[3] - times[2]})
    for ours, stock in zip(rows[::2], rows[1::2]):
        ours["speed"], stock["speed"] = ours["turns/s"] / stock["turns/s"], 1.0
    return table("ALFWorld: stepping", rows)


def children(name):
    """Process ids of this process's descendants whose command begins with `name`."""
    parents = {}
    for line in subprocess.run(["ps", "-eo", "pid=,ppid=,comm="], capture_output=True, text=True).stdout.splitlines():
        pid, parent, command = line.split(None, 2)
        parents[int(pid)] = int(parent), command
    ours = lambda pid: pid in parents and (parents[pid][0] == os.getpid() or ours(parents[pid][0]))
    return {pid for pid, (_, command) in parents.items() if command.startswith(name) and ours(pid)}


# ----------------------------------------------------------------------------------------------------------- rollout
def stock_generate(policy, prompts, limit):
    """`model.generate`, left padding, whole softmax: the texts."""
    ids = policy.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        out = policy.model.generate(**ids, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=limit)
    return policy.tokenizer.batch_decode(out[:, ids["input_ids"].shape[1]:], skip_special_tokens=True)


def play_stock(policy, world, tasks, turns, keep):
    """Episodes with `model.generate`, together; keep: finished ones stay in the batch until all are done. -> turns played"""
    now, past, played = dict(enumerate(world.reset(tasks))), [[] for _ in tasks], 0
    live = set(now)
    for _ in range(turns):
        rows = list(now) if keep else sorted(live)
        texts = stock_generate(policy, [policy.encode(world, past[i], now[i]) for i in rows], 24)
        actions = {i: parse_compact(text) for i, text in zip(rows, texts) if i in live}
        seen = world.step(actions)
        for i, o in seen.items():
            past[i].append((now[i], actions[i]))
            now[i] = o
        played += len(seen)
        live -= {i for i, o in seen.items() if o.done}
        if not live:
            break
    return played


def trl_player(policy, world, tasks):
    """TRL's GRPOTrainer with this world as its environment and our prompts as the replies of a tool. -> a function that plays the
    tasks and gives the number of turns. It plays worse than it was trained to: what it reads is not one prompt but all so far."""
    import copy
    import tempfile
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl import GRPOConfig, GRPOTrainer
    state, model, tokenizer = {}, copy.deepcopy(policy.model), copy.deepcopy(policy.tokenizer)           # slot -> past, now

    class Play:
        def reset(self, slot, **_):
            self._slot = slot
            return world.prompt(*state[slot])

        def act(self, action: str) -> str:
            """Act.

            Args:
                action: The action."""
            past, now = state[self._slot]
            past.append((now, parse_compact(action)))
            _, now = state[self._slot] = past, world.step({self._slot: past[-1][1]})[self._slot]
            return "task over" if now.done or len(past) == policy.turns else world.prompt(past, now)

        def get_reward(self):
            return 0.0
    tokenizer.padding_side, model.config.max_position_embeddings = "left", 8192                          # so that nothing is cut
    tokenizer.chat_template = ("{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c | tojson }}{% endfor %}"
                               "{{ eos_token if m.role == 'assistant' }}{% endfor %}")
    call = {"type": "function", "function": {"name": "act", "arguments": {"action": "{content}"}}}
    tokenizer.response_template = {"start_anchor": "task ", "defaults": {"role": "assistant"}, "fields": {"tool_calls": {    # a prompt ends with
        "open": "\n>", "close": tokenizer.eos_token, "content": "text", "transform": [call]}}}           # ">", "task over" has none: no call
    trainer = GRPOTrainer(model, args=GRPOConfig(
        output_dir=tempfile.gettempdir(), per_device_train_batch_size=len(tasks), num_generations=2, max_steps=1, report_to="none", bf16=False,
        use_cpu=True, max_completion_length=8000, max_tool_calling_iterations=policy.turns, generation_kwargs={"max_new_tokens": 24}),
        processing_class=tokenizer, environment_factory=Play)

    def play():
        state.update({slot: ([], now) for slot, now in enumerate(world.reset(tasks))})
        trainer.model.train()
        trainer._generate_and_score_completions([{"prompt": [{"role": "user", "content": ""}], "slot": slot} for slot in state])
        return sum(len(past) for past, _ in state.values())
    return play


def rollout(episodes=64, alone=8):
    """Turns per second of whole episodes on real ScienceWorld with the tiny policy; loading is left out."""
    policy, rows = load_policy("tiny", "scienceworld"), []
    with ScienceWorld(policy.tasks) as world:
        tasks = random.Random(0).sample(world.tasks("train"), episodes)
        one = lambda: sum(play_stock(policy, world, [task], policy.turns, False) for task in tasks[:alone])
        batch = lambda: play_stock(policy, world, tasks, policy.turns, True)
        ours = lambda: sum(len(e.turns) for e in collect(world, policy, tasks, policy.turns, 1.0, 24, torch.Generator().manual_seed(0))[0])
        ways = [("one episode at a time, model.generate", one, alone), ("padded batch that keeps finished episodes", batch, episodes)]
        if importlib.util.find_spec("trl"):
            ways.append(("TRL: one growing sequence an episode", trl_player(policy, world, tasks), episodes))
        else:
            print("rollout, TRL: left out (pip install -r requirements-trl.txt)")
        for label, play, n in (*ways, ("ours", ours, episodes)):
            world.reset(tasks[:n])
            loading = clock()
            world.reset(tasks[:n])                          # what `play` will spend on it
            loading = clock() - loading
            start = clock()
            played = play()
            rows.append({"way": label, "episodes": n, "turns": played, "turns/s": played / max(clock() - start - loading, 1e-3)})
    for row in rows:
        row["speed"] = row["turns/s"] / rows[0]["turns/s"]
    return table("Rollout: the tiny policy on ScienceWorld", rows)


# -------------------------------------------------------------------------------------------------------------- loss
def loss_once(way, tokens, width, vocabulary):
    """Forward and backward of log-prob, entropy and EPO loss from hidden states. -> seconds, peak megabytes above the start"""
    from train import LOGITS_AT_ONCE
    if way == "trl":
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = (0.02 * torch.randn(vocabulary, width, device=device)).requires_grad_()
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    written = torch.randint(vocabulary, (tokens,), device=device)
    w, a = torch.full((tokens, 1), 1 / tokens, device=device), torch.randn(tokens, device=device)

    def backward(h, s):
        if way == "trl":                                    # as its GRPOTrainer makes them, with the entropy's gradient
            logits = (h @ weight.T).unsqueeze(0)
            logp, entropy = selective_log_softmax(logits, written[s].unsqueeze(0)).T, entropy_from_logits(logits).T
        else:
            logp, entropy = token_logp_and_entropy((h @ weight.T).unsqueeze(1), written[s].unsqueeze(1))
        epo_loss(logp, logp.detach(), entropy, a[s], w[s], 5.0, 1.5)[0].backward()
    forget_peak()
    before, start = used(), clock()
    if way == "ours":                                       # the loop of train.update
        states = hidden.detach().requires_grad_()
        for i in range(0, tokens, LOGITS_AT_ONCE // vocabulary):
            s = slice(i, i + LOGITS_AT_ONCE // vocabulary)
            backward(states[s], s)
        hidden.backward(states.grad)
    else:
        backward(hidden, slice(None))
    checksum = hidden.grad.abs().sum().item()               # also waits for a GPU
    return clock() - start, used(peak=True) - before, checksum


def loss(tokens=2048, width=896, vocabulary=151_936):
    """Each way in a process of its own. width and vocabulary are Qwen2.5-0.5B's."""
    rows = []
    for way in ("direct", "trl", "ours"):
        if found := alone("loss_once", [way, tokens, width, vocabulary]):
            seconds, peak, checksum = found
            rows.append({"way": way, "tokens": tokens, "seconds": seconds, "peak MB": peak, "|∂L/∂h|": checksum})
    for row in rows:
        row["time"], row["memory"] = row["seconds"] / rows[0]["seconds"], row["peak MB"] / rows[0]["peak MB"]
    return table(f"Loss: log-prob, entropy and EPO, forward and backward, V = {vocabulary}, d = {width}", rows)


# -------------------------------------------------------------------------------------------------------------- step
def step():
    """Whole RL steps of train.py on ScienceWorld with the tiny policy: seconds by part."""
    import tempfile
    rows = []
    for episodes, turns in ((8, 12), (16, 12), (32, 12), (64, 12), (32, 6), (32, 24)):
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "run")
            subprocess.run([sys.executable, os.path.join(HERE, "train.py"), "--model", "tiny", "--steps", "3", "--tasks-per-step",
                            str(episodes // 8), "--turns", str(turns), "--eval-episodes", "1", "--out", out], check=True, stdout=subprocess.DEVNULL)
            log = [json.loads(line) for line in open(os.path.join(out, "log.jsonl"))][1:3]
        mean = lambda key: sum(row[key] for row in log) / len(log)
        rows.append({"episodes": episodes, "turn limit": turns, "turns": mean("turns"),
                     **{part: mean(f"seconds_{part}") for part in ("load", "generate", "environment", "train")}, "step": mean("seconds")})
        rows[-1]["ms a turn"] = 1000 * rows[-1]["step"] / rows[-1]["turns"]
    return table("One RL step, seconds (means of two steps)", rows)


# ------------------------------------------------------------------------------------------------------------ memory
def random_run(config, rank, algo, dtype, rows, prompt, written):
    """What train.py holds, with random weights, and turns of random tokens. -> policy, optimizer, critic, its optimizer, turns"""
    import copy
    from critic import Critic
    from rollout import Policy, Turn, add_lora, trained
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if rank and dtype == "bfloat16" else torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu").activation_checkpointing_enable()
    model.mixed = dtype == "bfloat16"
    if rank:
        add_lora(model, "policy", rank)
    policy = Policy(model.eval(), None, [], False, start=None if rank else copy.deepcopy(model).requires_grad_(False))
    critic = Critic(model, rank) if algo == "ppo" else None
    adam = lambda parameters: torch.optim.AdamW(parameters.values(), lr=1e-5, fused=True)
    turns = [Turn(0, torch.randint(config.vocab_size, (prompt,)).tolist(), [5] * written, [-9.0] * written, [9.0] * written, "", None, "") for _ in range(rows)]
    return policy, adam(trained(model)), critic, critic and adam(critic.trained()), turns


def update_once(policy, optimizer, turns, cfg):
    import train
    from rollout import Episode
    train.update(policy, optimizer, [Episode(None, [t]) for t in turns], torch.randn(len(turns)), 5.0, 1.5, cfg, train.bar("", 1))


def memory_once(case, layers, d, ffn, vocabulary, rank, algo, dtype, rows=8, prompt=500, written=16):
    """Two steps' updates (or rollouts) with a random model, the second in full memory. -> MB measured and predicted"""
    import memory
    from config import Config
    from critic import update_critic
    from rollout import generate
    config, tokens = memory.qwen(layers, d, 8, 2, ffn, vocabulary), rows // 2 * (prompt + written)             # two micro-batches
    torch.ones(64, 64, requires_grad=True).matmul(torch.ones(64, 64)).sum().backward()          # the libraries' own memory
    start = used()
    policy, optimizer, critic, critic_optimizer, turns = random_run(config, rank, algo, dtype, rows, prompt, written)
    cfg = Config(minibatches=1, critic_minibatches=1, tokens_per_batch=tokens)
    for _ in range(2):
        forget_peak()
        if case == "rollout":
            generate(policy, [t.prompt for t in turns], 1.0, written)
            continue
        update_once(policy, optimizer, turns, cfg)
        if critic:
            update_critic(critic, critic_optimizer, turns, torch.zeros(rows), torch.ones(rows), cfg)
    held, update, rollout = memory.parts(config, rank, algo == "ppo", True, dtype == "bfloat16", tokens, rows // 2 * written, rows, prompt + written)
    if case == "rollout":
        held["Adam"] = 0                                    # no step was taken yet
    return used(peak=True) - start, memory.total(held, rollout if case == "rollout" else update) / 2 ** 20


def memory():
    """The memory model of memory.py beside measured peaks, each in a process of its own that gives back what it frees."""
    rows = []
    for case in (("update", 30, 576, 1536, 49152, 0, "grpo", "float32"), ("update", 30, 576, 1536, 49152, 16, "grpo", "float32"),
                 ("update", 30, 576, 1536, 49152, 16, "grpo", "bfloat16"), ("update", 8, 512, 2816, 151936, 0, "grpo", "float32"),
                 ("update", 8, 512, 2816, 151936, 0, "ppo", "float32"), ("update", 8, 512, 2816, 151936, 16, "ppo", "float32"),
                 ("rollout", 30, 576, 1536, 49152, 0, "grpo", "float32"), ("rollout", 30, 576, 1536, 49152, 0, "grpo", "bfloat16")):
        if found := alone("memory_once", case, MALLOC_MMAP_THRESHOLD_="65536"):
            measured, predicted = found
            phase, layers, d, _, vocabulary, rank, algo, dtype = case
            rows.append({"phase": phase, "layers": layers, "d": d, "V": vocabulary, "trained": f"LoRA {rank}" if rank else "all", "algo": algo,
                         "dtype": dtype, "measured MB": measured, "predicted MB": predicted, "ratio": predicted / measured})
    return table("Memory: measured peaks and what memory.py says", rows)


# ------------------------------------------------------------------------------------------------------------ models
def model_once(name, rank, rows, prompt, written):
    """A rollout's generation and an update with random weights of a model's exact shape. -> a row of numbers"""
    import memory
    from config import Config
    from rollout import generate
    gpu = torch.cuda.is_available()
    dtype = "bfloat16" if gpu else "float32"
    policy, optimizer, _, _, turns = random_run(memory.SHAPES[name], rank, "grpo", dtype, rows, prompt, written)
    wait = torch.cuda.synchronize if gpu else lambda: None

    def seconds(work, times=2):                             # of the last time, when all is warm
        for _ in range(times):
            wait()
            start = clock()
            work()
            wait()
        return clock() - start
    a, b = (torch.randn(4096 if gpu else 1024, 4096 if gpu else 1024, device=policy.model.device, dtype=getattr(torch, dtype)) for _ in "ab")
    throughput = 2 * len(a) ** 3 / seconds(lambda: a @ b, 10)                                    # of a large matrix product
    forget_peak()
    cfg = Config(minibatches=1)
    generating = seconds(lambda: generate(policy, [t.prompt for t in turns], 1.0, written))
    updating = seconds(lambda: update_once(policy, optimizer, turns, cfg))
    n, head, _ = memory.count(memory.SHAPES[name])
    body = n - head * (1 if memory.SHAPES[name].tie_word_embeddings else 2)
    operations = (8 if rank else 10) * (body * rows * (prompt + written) + head * rows * written)      # 2 for the start, the forward pass, the
    # forward pass again, and for the backward pass twice, or with LoRA, where weights get no gradient, once
    return {"model": name, "trained": f"LoRA {rank}" if rank else "all", "rows": rows, "prompt": prompt, "written": written, "dtype": dtype,
            "generated tokens/s": rows * written / generating, "trained tokens/s": rows * (prompt + written) / updating,
            "peak GB": used(peak=True) * 2 ** 20 / 1e9,
            "of matrix throughput": operations / updating / throughput}


def models():
    """Generated and trained tokens per second of the models that train.py is for; on a CPU, of the smallest."""
    import memory
    gpu, rows = torch.cuda.is_available(), []
    for name in memory.SHAPES if gpu else ("SmolLM2-135M",):
        for rank in (0, 32):
            if row := alone("model_once", [name, rank, *((64, 1024, 128) if gpu else (4, 250, 16))]):
                rows.append(row)
    return table("Models: generation and update, random weights of their exact shape", rows)


PARTS = {"environment": environment, "alfworld": alfworld, "rollout": rollout, "loss": loss, "memory": memory, "models": models, "step": step}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--out", default="bench.json", help="results of earlier runs in it are kept, part by part")
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)                      # one measurement, for a process of its own
    args = parser.parse_args()
    if args.once:
        return print(json.dumps(globals()[args.once[0]](*json.loads(args.once[1]))))
    if unknown := set(args.parts) - PARTS.keys():
        parser.exit(2, f"bench.py: unknown part {unknown.pop()!r}; there are: {', '.join(PARTS)}\n")
    found = json.load(open(args.out)) if os.path.exists(args.out) else {}
    for part in args.parts or PARTS:
        found[part] = PARTS[part]()
        with open(args.out, "w") as file:
            json.dump({**found, "threads": torch.get_num_threads(), "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"},
                      file, indent=1)


if __name__ == "__main__":
    main()
