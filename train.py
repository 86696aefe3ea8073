"""Train an agent with EPO on one GPU or on a CPU. Everything happens in the loop of `train`:

    evaluate (now and then) → collect episodes → advantages → update → append H̄_k to the history → log → save

    python train.py --env scienceworld                      # the tiny policy on a CPU, no download
    python train.py --env scienceworld --model HuggingFaceTB/SmolLM2-360M-Instruct --device cuda

A run folder (--out) holds config.json, tasks.json (the evaluation tasks), log.jsonl (a row per step), transcripts/ and
checkpoint.pt. Every random choice of step k is seeded by (seed, k), so a resumed run continues as if it had never stopped.
"""
import copy
import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict

import torch
from tqdm import tqdm

from config import INSTRUCT, parse
from critic import Critic, update_critic
from envs import ALFWorld, ScienceWorld, SetupError
from epo import EntropyHistory, beta, epo_loss, gae, group_advantages, token_weights
from keyquest import KeyQuest
from rollout import by_length, collect, load_policy, pad_right, score, token_transcript, trained, transcript, written_states
from sweep import rows as rows_of, summary
from variants import decayed_weights, shaped_advantages


def make_world(cfg, policy):
    names = tuple(filter(None, cfg.tasks.split(","))) or policy.tasks
    if cfg.env == "keyquest":
        return KeyQuest(names)
    if cfg.env == "alfworld":
        world = ALFWorld(names, cfg.games)
        cfg.games = world.games                        # config.json and a resumed run have what was found, not "auto"
        return world
    return ScienceWorld(names, "" if cfg.simplifications == "none" else cfg.simplifications, objects=not policy.compact)


def draw(tasks, n, seed):
    """n tasks, the task types in turn and a random variation of each, without repeats while there are any left."""
    rng, by_type = random.Random(seed), {}
    for task in tasks:
        by_type.setdefault(task.name, []).append(task)
    drawn, types = [], []
    while len(drawn) < n:
        types = types or rng.sample(sorted(by_type), len(by_type))
        pool = by_type[types.pop()]
        drawn.append(rng.choice([t for t in pool if t not in drawn] or pool))
    return drawn


def learning_rate(step, cfg):
    """Linear warm-up, then a cosine from lr to min_lr · lr."""
    rise = cfg.warmup * cfg.steps
    if step + 1 <= rise:
        return cfg.lr * (step + 1) / rise
    done = (step - rise) / max(cfg.steps - rise, 1)
    return cfg.lr * (cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + torch.tensor(torch.pi * done).cos().item()))


def set_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def outcome(episode, cfg):
    """What an episode earns at its end."""
    return float(episode.success) if cfg.reward == "sparse" else max(episode.score, 0) / 100


LOGITS_AT_ONCE = 2 ** 25       # 128 MB of float32; the loss and its gradient hold about six times that


def kl_loss(logp, reference_logp, weights):
    """KL(π_θ ‖ π_start), the k3 estimator per token: e^d - d - 1 with d = log π_start - log π_θ; never negative. -> scalar"""
    d = reference_logp - logp
    return ((d.exp() - d - 1) * weights).sum()


def update(policy, optimizer, episodes, advantages, reference, beta_k, cfg, progress):
    """One pass over the step's episodes in cfg.minibatches optimizer updates. -> the log of the losses, summed over the batch.

    advantages (N,): one for each turn, in the order of the episodes and their turns.
    Weights are made once for the whole batch. A mini-batch takes its share of them times the number of mini-batches: an
    unbiased estimate of the batch's gradient, the same for every micro-batch size.
    Memory: the loss is a sum over tokens, so it can be taken, and sent back as far as the last hidden states, for a few hundred
    tokens at a time; only then does the gradient of those states go through the model. A (tokens × vocabulary) matrix and
    the softmax of the entropy never exist whole, and no logit is computed twice.
    """
    turns, owner = [t for e in episodes for t in e.turns], [number for number, e in enumerate(episodes) for _ in e.turns]
    _, mask = pad_right([t.written for t in turns], "cpu")
    weights = token_weights(mask, torch.tensor(owner), cfg.average)                                                       # (N, L)
    order, parts = torch.randperm(len(episodes)).tolist(), min(cfg.minibatches, len(episodes))
    head_rows = max(LOGITS_AT_ONCE // len(policy.model.get_output_embeddings().weight), 1)
    logged, norms = {}, []
    for part in range(parts):
        chosen = set(order[part::parts])
        for micro in by_length(turns, [i for i, number in enumerate(owner) if number in chosen], cfg.tokens_per_batch):
            mine, device = [turns[i] for i in micro], policy.model.device
            start_hidden = policy.start_states(mine)[0] if cfg.kl_coef else None
            hidden, tokens, turn = written_states(policy.model, mine)                                  # (T, d), (T,), (T,)
            old_logp = torch.tensor([x for t in mine for x in t.logp], device=device).unsqueeze(1)     # (T, 1): a token per row
            w = weights[micro][mask[micro] > 0].to(device).unsqueeze(1) * parts                        # (T, 1)
            a, index = advantages[micro].to(device)[turn], torch.tensor([t.index for t in mine], device=device)[turn]      # (T,)
            states = hidden.detach().requires_grad_()
            for c in (slice(i, i + head_rows) for i in range(0, len(tokens), head_rows)):
                if cfg.kl_coef:                            # before the graph of the policy's own log-probs takes memory
                    with torch.no_grad():
                        start_logp, _ = score(policy.start or policy.model, start_hidden[c], tokens[c], cfg.temperature)
                logp, entropy = score(policy.model, states[c], tokens[c], cfg.temperature)             # (c, 1)
                loss, log = epo_loss(
                    logp, old_logp[c], entropy, shaped_advantages(a[c], entropy, cfg.shaping) if cfg.shaping else a[c], w[c], reference, beta_k,
                    cfg.entropy_coef, cfg.kappa_l, cfg.kappa_r, cfg.alpha, cfg.smoothing, cfg.clip,
                    decayed_weights(w[c], index[c], cfg.turns, cfg.entropy_decay) if cfg.entropy_decay else None)
                if cfg.kl_coef:
                    kl = kl_loss(logp, start_logp, w[c])
                    loss = loss + cfg.kl_coef * kl
                    log["kl"], log["loss"] = kl.item(), loss.item()
                loss.backward()
                for name, value in log.items():
                    logged[name] = logged.get(name, 0.0) + value / parts
            hidden.backward(states.grad)
            progress.update(len(micro))
        norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), cfg.grad_clip).item()
        if not all(value == value and abs(value) != float("inf") for value in (norm, logged["loss"])):
            bad = {"turns": [asdict(t) for t in turns], "episode": owner, "advantages": advantages}
            write(os.path.join(cfg.out, "bad-batch.pt"), lambda file: torch.save(bad, file))
            raise SetupError(f"the loss or its gradient is not finite (loss {logged['loss']}, gradient norm {norm}); the last checkpoint is "
                             "untouched, the step's batch is in bad-batch.pt there: lower --lr or --entropy-coef")
        norms.append(norm)
        optimizer.step()
        optimizer.zero_grad()
    return {**logged, "grad_norm": sum(norms) / len(norms)}


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def evaluate(world, policy, tasks, cfg, limit, step, progress):
    """Success on the fixed evaluation tasks of both splits -> log entries and transcripts (2 per split)."""
    row, texts, start = {}, [], time.perf_counter()
    for split in ("iid", "ood"):
        generator = torch.Generator(policy.model.device).manual_seed(cfg.seed * 1_000_003 + step)
        episodes, lost, _ = collect(world, policy, tasks[split], cfg.turns, cfg.eval_temperature, limit, generator, progress)
        row[f"{split}_success"] = mean(e.success for e in episodes)
        row[f"{split}_by_task"] = {name: mean(e.success for e in episodes if e.task.name == name)
                                   for name in sorted({e.task.name for e in episodes})}
        row[f"{split}_lost"] = lost
        texts += [f"[{split}] {transcript(e)}" for e in episodes[:2]]
    return {**row, "seconds_eval": time.perf_counter() - start}, "\n".join(texts)


def write(path, save):
    """Write a file whole or not at all: a kill or a full disk leaves the old one. save(file) does the writing."""
    try:
        with open(path + ".new", "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".new", path)
    except (OSError, RuntimeError) as error:           # torch.save can make the one into the other
        cause = error if isinstance(error, OSError) else error.__context__ or error
        with suppress(OSError):
            os.remove(path + ".new")
        raise SetupError(f"could not write {path} ({getattr(cause, 'strerror', None) or str(cause).splitlines()[0]}); the file there before is untouched") from error


def load_checkpoint(path):
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved["step"], saved["model"]
        return saved
    except Exception as error:                         # torch.load raises many kinds for a damaged file
        raise SetupError(f"{path} can't be read ({str(error).splitlines()[0][:100]}); resume or evaluate another run, or start again "
                         "with another --out") from error


def restore(parameters, saved):
    """Put a checkpoint's values into the parameters, by name. Raises SetupError if they are another model's."""
    if {name: p.shape for name, p in parameters.items()} != {name: p.shape for name, p in saved.items()}:
        raise SetupError("the checkpoint's parameters are not this model's; leave out --model and --lora-rank, the run has them in its config.json")
    for name, p in parameters.items():
        p.data.copy_(saved[name])


def train(cfg):
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    path = lambda name: os.path.join(cfg.out, name)
    saved = load_checkpoint(cfg.evaluate) if cfg.evaluate else \
        load_checkpoint(path("checkpoint.pt")) if cfg.resume and os.path.exists(path("checkpoint.pt")) else None
    cfg.model = cfg.model or ("tiny" if device == "cpu" else INSTRUCT)
    dtype = ("float32" if device == "cpu" else "bfloat16") if cfg.dtype == "auto" else cfg.dtype
    if dtype == "bfloat16" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise SetupError(f"{torch.cuda.get_device_name()} has no bfloat16: use --dtype float32")
    torch.manual_seed(cfg.seed)                        # LoRA's adapters start at random
    policy = load_policy(cfg.model, cfg.env, device, dtype, cfg.lora_rank)
    cfg.lr, cfg.critic_lr = cfg.lr or policy.lr or 5e-6, cfg.critic_lr or (1e-3 if policy.compact else 1e-5)
    limit = cfg.max_tokens or (24 if policy.compact else 512)
    policy.start = copy.deepcopy(policy.model).requires_grad_(False) if cfg.kl_coef and not (cfg.lora_rank or cfg.evaluate) else None
    optimizer = torch.optim.AdamW(trained(policy.model).values(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    critic = Critic(policy.model, cfg.lora_rank) if cfg.algo == "ppo" and not cfg.evaluate else None
    critic_optimizer = torch.optim.AdamW(critic.trained().values(), lr=cfg.critic_lr, weight_decay=cfg.weight_decay, fused=True) if critic else None
    history, first = EntropyHistory(cfg.window or None), 0

    with make_world(cfg, policy) as world:
        cfg.turns = cfg.turns or policy.turns or world.turns
        train_tasks = world.tasks("train")
        eval_tasks = {split: draw(world.tasks(split), cfg.eval_episodes, 0) for split in ("iid", "ood")}   # the same for every seed
        step_tasks = lambda step: [t for t in draw(train_tasks, cfg.tasks_per_step, f"{cfg.seed} {step}") for _ in range(cfg.group_size)]
        if saved:
            restore(trained(policy.model), saved["model"])
            first = saved["step"]
        if cfg.evaluate:
            values, _ = evaluate(world, policy, eval_tasks, cfg, limit, first - 1, bar("evaluate", 2 * cfg.eval_episodes))
            print(table(values))
            return
        if saved:
            optimizer.load_state_dict(saved["optimizer"])
            history.load_state_dict(saved["history"])
            if critic:
                restore(critic.trained(), saved["critic"])
                critic_optimizer.load_state_dict(saved["critic_optimizer"])
            saved = None
        if cfg.resume:                                 # drop rows of steps that the checkpoint doesn't hold, and half a row
            with open(path("log.jsonl"), "ab+") as log:
                log.seek(0)
                kept = [line for line in log if line.endswith(b"\n") and json.loads(line)["step"] < first]
            write(path("log.jsonl"), lambda file: file.writelines(kept))
        else:
            os.makedirs(path("transcripts"))
            write(path("config.json"), lambda file: file.write(json.dumps({**asdict(cfg), "resume": False}, indent=1).encode()))
            write(path("tasks.json"), lambda file: file.write(json.dumps(eval_tasks).encode()))
        log = open(path("log.jsonl"), "a")
        print(f"{cfg.env + f' ({cfg.games} games)' * (cfg.env == 'alfworld')}, {len(train_tasks)} train tasks of "
              f"{len({t.name for t in train_tasks})} types; {cfg.model} "
              f"({policy.model.num_parameters() / 1e6:.1f} M parameters) on {device}; writing to {cfg.out}", flush=True)

        for step in range(first, cfg.steps + 1):       # the row after the last step only evaluates
            clock, row = time.perf_counter(), {"step": step}
            last = step == cfg.steps
            if last or step % cfg.eval_every == 0:
                with bar(f"step {step} evaluate", 2 * cfg.eval_episodes) as progress:
                    values, texts = evaluate(world, policy, eval_tasks, cfg, limit, step, progress)
                row.update(values)
                write(path(f"transcripts/step-{step:04d}.txt"), lambda file: file.write(texts.encode()))
            if not last:
                # collect with π_old
                torch.manual_seed(cfg.seed * 1_000_003 + step)
                generator = torch.Generator(device).manual_seed(cfg.seed * 1_000_003 + step)
                tasks = step_tasks(step)
                with bar(f"step {step} collect", len(tasks)) as progress:
                    episodes, lost, seconds = collect(world, policy, tasks, cfg.turns, cfg.temperature, limit, generator, progress)
                if not episodes:
                    raise SetupError("every episode of this step was lost with its simulator; is memory short?")
                if (step + 1) % cfg.eval_every and step + 1 < cfg.steps:
                    world.prefetch(step_tasks(step + 1))

                # advantages, one for each turn: GRPO's is the same for all turns of an episode
                turns = [t for e in episodes for t in e.turns]
                owner = torch.tensor([i for i, e in enumerate(episodes) for _ in e.turns])                  # (N,)
                last_turn = torch.cat([owner[1:] != owner[:-1], torch.tensor([True])])                      # (N,)
                rewards = torch.tensor([-cfg.invalid_penalty * t.invalid for t in turns], dtype=torch.double)   # (N,), so that equal
                rewards[last_turn] += torch.tensor([outcome(e, cfg) for e in episodes], dtype=torch.double)     # returns are equal
                returns = torch.zeros(len(episodes), dtype=torch.double).index_add(0, owner, rewards)           # (B,)
                if critic is None:
                    groups = {task: number for number, task in enumerate(dict.fromkeys(tasks))}
                    advantages = group_advantages(returns, torch.tensor([groups[e.task] for e in episodes])).float()[owner]
                else:
                    values = critic.values(turns, cfg.tokens_per_batch)
                    raw = gae(values, rewards.float(), last_turn, cfg.discount, cfg.gae_lambda)
                    share = 1 / (len(episodes) * torch.bincount(owner)[owner])       # of a turn in Eq. 2's average: it must not
                    centred = raw - (raw * share).sum()                              # matter here that lost episodes are longer
                    advantages = centred / ((centred ** 2 * share).sum().sqrt() + 1e-6)

                # update, with the history of the steps before (Algorithm 1)
                middle, reference, beta_k = time.perf_counter(), history.mean, beta(step, cfg.steps, cfg.gamma) if cfg.dynamic_weight == "on" else 1.0
                lr = learning_rate(step, cfg)
                set_rate(optimizer, lr)
                with bar(f"step {step} update", len(turns)) as progress:
                    losses = update(policy, optimizer, episodes, advantages, reference, beta_k, cfg, progress)
                if critic is not None:
                    set_rate(critic_optimizer, lr / cfg.lr * cfg.critic_lr)
                    losses.update(update_critic(critic, critic_optimizer, turns, values, raw + values, cfg))
                seconds["train"] = time.perf_counter() - middle

                # H̄_k: the entropy of the batch just collected, under the policy that wrote it
                by_turn = [[mean(e.turns[t].entropy) for e in episodes if len(e.turns) > t] for t in range(cfg.turns)]
                entropy = mean(mean(mean(t.entropy) for t in e.turns) for e in episodes) if cfg.average == "episode" else \
                    mean(h for t in turns for h in t.entropy)
                history.append(entropy)
                row.update(
                    reward=returns.mean().item(), success=mean(e.success for e in episodes), score=mean(e.score for e in episodes),
                    invalid=mean(t.invalid for t in turns), entropy=entropy, entropy_by_turn=[mean(h) for h in by_turn if h], reference=reference,
                    corridor_low=None if reference is None else cfg.kappa_l * reference,
                    corridor_high=None if reference is None else cfg.kappa_r * reference,
                    outside=losses["below"] + losses["above"], beta=beta_k,
                    net_above_cap=1 - cfg.alpha * beta_k * (cfg.smoothing == "hinge" and cfg.entropy_coef > 0 and reference is not None), **losses,
                    lr=lr, episodes=len(episodes), lost=lost, turns=len(turns),
                    tokens=sum(len(t.written) for t in turns), prompt_tokens=sum(len(t.prompt) for t in turns),
                    **{f"seconds_{name}": value for name, value in seconds.items()})
                if step % cfg.eval_every == 0:             # a won and a lost episode of this step, token by token
                    shown = [token_transcript(e, policy.tokenizer) for e in {e.success: e for e in episodes}.values()]
                    told = {"step": step, "corridor": None if reference is None else [row["corridor_low"], row["corridor_high"]], "episodes": shown}
                    write(path(f"transcripts/step-{step:04d}.json"), lambda file: file.write(json.dumps(told).encode()))
            row["seconds"] = time.perf_counter() - clock
            log.write(json.dumps(row) + "\n")          # the row first, then the checkpoint: --resume drops a row too many
            log.flush()
            os.fsync(log.fileno())
            state = {"step": step + 1, "model": trained(policy.model), "optimizer": optimizer.state_dict(), "history": history.state_dict()}
            if critic:
                state.update(critic=critic.trained(), critic_optimizer=critic_optimizer.state_dict())
            write(path("checkpoint.pt"), lambda file: torch.save(state, file))
            print(report(row), flush=True)
    found = summary(rows_of(cfg.out), 2)
    print("; ".join(f"{name} IID {found[f'iid_{key}']:.2f}, OOD {found[f'ood_{key}']:.2f}" for name, key in (
        ("success before", "before"), ("after", "after"), ("Succ.* (best)", "best"), ("Succ. (last two evaluations)", "last"))))


def bar(title, total):
    """A progress bar within a step, for terminals only."""
    return tqdm(desc=title, total=total, leave=False, disable=None)


def table(values):
    """The success of an evaluation on each split and task type, as text."""
    names = sorted(values["iid_by_task"].keys() | values["ood_by_task"].keys())
    lines = [f"{'success':32}   IID    OOD"] + [
        f"{name:32} " + " ".join(f"{values[f'{split}_by_task'].get(name, float('nan')):6.3f}" for split in ("iid", "ood")) for name in names]
    return "\n".join([*lines, f"{'all':32} {values['iid_success']:6.3f} {values['ood_success']:6.3f}"])


def report(row):
    """The line printed after a step."""
    text = f"step {row['step']:3d}"
    if "success" in row:
        text += (f" | success {row['success']:.2f} | entropy {row['entropy']:.3f}"
                 + (f" in [{row['corridor_low']:.3f}, {row['corridor_high']:.3f}]" if row["reference"] is not None else "")
                 + f", {row['outside']:.0%} of tokens outside | kl {row.get('kl', 0):.4f} | invalid {row['invalid']:.0%}"
                 + f" | {row['turns']} turns" + (f" | {row['lost']} episodes lost" if row["lost"] else ""))
    if "iid_success" in row:
        text += f" | evaluation: IID {row['iid_success']:.2f}, OOD {row['ood_success']:.2f}"
    return text + f" | {row['seconds']:.0f} s"


def main():
    def stop(*_):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, stop)
    try:
        train(parse(sys.argv[1:], __doc__))
    except (SetupError, OSError) as error:             # an OSError here is a disk that can't be written
        sys.exit(f"train.py: {error}")
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        sys.exit("train.py: out of memory; lower --tokens-per-batch (in the update), --group-size or --max-tokens (in the rollout), or use "
                 f"--lora-rank or a smaller --model; --resume goes on, with another --tokens-per-batch if need be ({str(error).splitlines()[0][:100]})")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; a run that has written its config.json goes on with --resume (and the same --out): at most the step in progress "
                 "is lost")


if __name__ == "__main__":
    main()
