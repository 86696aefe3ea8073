"""Train an agent with EPO on one GPU or on a CPU. `train` and `rl_step` are Algorithm 1:

    evaluate (now and then) → collect episodes → advantages → β_k and H̄_W → update → append H̄_k
    → log → save

    python train.py --env scienceworld        # the tiny policy, no download
    python train.py --env scienceworld --model Qwen/Qwen2.5-1.5B-Instruct --lora-rank 32

support/run_folder.py says what a run leaves in its folder (--out). Every random choice of step k is
seeded by (seed, k), so a resumed run continues as if it had never stopped.
"""

import math
import os
import random
import signal
import sys
import time

import torch

from config import asked_for, parse, resolve, settings_of, task_names
from critic import gae, update_critic
from envs import make_world
from epo import beta, corridor, entropy_loss, group_advantages, mean_of_history
from rollout import collect
from support import report, run_folder
from support.learner import begin_or_resume, make_learner, make_schedules, save
from support.loading import choose_device, load_policy, save_model, trained
from support.report import progress
from support.run_folder import SetupError
from update import make_batch, token_metrics, update


def train(cfg):
    """Run Algorithm 1 from step 0, or from the checkpoint of the run in cfg.out."""
    # LoRA's adapters begin at random
    torch.manual_seed(cfg.seed)
    device, dtype = choose_device(cfg.device, cfg.dtype)
    policy = load_policy(cfg.model, cfg.env, device, dtype, cfg.lora_rank)
    policy.tokens_per_batch = cfg.tokens_per_batch
    with make_world(cfg, task_names(cfg, policy), policy.compact) as world:
        resolve(cfg, policy, world.turns)
        train_tasks = world.tasks("train")
        eval_tasks = {s: draw(world.tasks(s), cfg.eval_episodes, 0) for s in ("iid", "ood")}
        if cfg.evaluate is not None:
            return evaluate_checkpoint(cfg, policy, world, eval_tasks)
        os.makedirs(cfg.out, exist_ok=True)
        with run_folder.locked(cfg.out):
            learner = make_learner(cfg, policy)
            first = begin_or_resume(cfg, learner, eval_tasks)
            schedules = make_schedules(cfg, learner, first)
            report.print_header(cfg, policy, train_tasks)
            for step in range(first, cfg.steps + 1):
                begin, row = time.perf_counter(), {"step": step}
                if step % cfg.eval_every == 0 or step == cfg.steps:
                    row |= evaluate(world, policy, eval_tasks, cfg, step)
                if step < cfg.steps:
                    row |= rl_step(world, learner, train_tasks, schedules, cfg, step)
                row["seconds"] = time.perf_counter() - begin
                run_folder.append_row(cfg.out, row)
                save(cfg, learner, step + 1)
                report.print_step(cfg, row)
            save_model(policy, asked_for(cfg, policy), os.path.join(cfg.out, "model"))
    print(report.last_line(run_folder.read_log(cfg.out)))


def rl_step(world, learner, train_tasks, schedules, cfg, step):
    """Step k of Algorithm 1. -> what is logged"""
    # collect with π_old
    tasks = step_tasks(train_tasks, cfg, step)
    episodes, lost, seconds = collect_step(world, learner.policy, tasks, cfg, step)
    if (step + 1) % cfg.eval_every and step + 1 < cfg.steps:
        world.prefetch(step_tasks(train_tasks, cfg, step + 1))

    begin = time.perf_counter()
    turns = [turn for episode in episodes for turn in episode.turns]
    owner = torch.tensor([i for i, e in enumerate(episodes) for _ in e.turns])
    returns = episode_returns(episodes, cfg)
    if learner.critic is None:
        advantages = grpo_advantages(episodes, tasks, returns, cfg)[owner]
    else:
        values = learner.critic.values(turns, cfg.tokens_per_batch)
        advantages, targets = ppo_advantages(values, returns.float(), owner, cfg)
    advantages = advantages - invalid_penalties(turns, cfg)

    # update, with β_k and the history of the steps before; update.py calls epo_loss
    beta_k = beta(step, cfg.steps, cfg.gamma) if cfg.dynamic_weight == "on" else 1.0
    history_mean = mean_of_history(learner.history, cfg.window)
    batch = make_batch(turns, owner, advantages, cfg)
    lr = schedules[0].get_last_lr()[0]
    with progress(f"step {step} update", len(turns)) as bar:
        losses = update(learner, turns, batch, history_mean, beta_k, cfg, bar)
    if learner.critic is not None:
        optimizer = learner.critic_optimizer
        losses |= update_critic(learner.critic, optimizer, turns, values, targets, cfg)
    for schedule in schedules:
        schedule.step()
    seconds["train"] = time.perf_counter() - begin

    # append H̄_k: the average entropy of the batch, under the policy that wrote it
    entropy = entropy_loss(batch.entropy, batch.weights).item()
    learner.history.append(entropy)
    bounds = corridor(history_mean, cfg.kappa_l, cfg.kappa_r)
    if step % cfg.eval_every == 0:
        report.save_token_transcripts(cfg.out, step, episodes, bounds, learner.policy.tokenizer)
    row = {
        "reward": returns.mean().item(),
        "lost": lost,
        "entropy": entropy,
        "history_mean": history_mean,
        "beta": beta_k,
        "lr": lr,
    }
    row |= episode_metrics(episodes, cfg.turns) | token_metrics(batch, bounds[1])
    row |= corridor_metrics(row, losses, cfg) | losses
    return row | {f"seconds_{part}": value for part, value in seconds.items()}


def seed_of(cfg, step, purpose):
    """Each use of chance in a step has its own seed."""
    return random.Random(f"{cfg.seed} {step} {purpose}").getrandbits(63)


def draw(tasks, n, seed):
    """n tasks: the task types one after the other, each with a variation that is not yet drawn."""
    rng, by_type = random.Random(seed), {}
    for task in tasks:
        by_type.setdefault(task.name, []).append(task)
    unused = {name: list(pool) for name, pool in by_type.items()}
    drawn, types = [], []
    while len(drawn) < n:
        types = types or rng.sample(sorted(by_type), len(by_type))
        name = types.pop()
        drawn.append(rng.choice(unused[name] or by_type[name]))
        if unused[name]:
            unused[name].remove(drawn[-1])
    return drawn


def step_tasks(train_tasks, cfg, step):
    """The task of each episode of a step; the members of a group share theirs."""
    drawn = draw(train_tasks, cfg.tasks_per_step, f"{cfg.seed} {step}")
    return [task for task in drawn for _ in range(cfg.group_size)]


def collect_step(world, policy, tasks, cfg, step):
    """Play the step's episodes. Raises SetupError if all were lost with their simulators."""
    torch.manual_seed(seed_of(cfg, step, "train"))
    generator = torch.Generator(policy.model.device).manual_seed(seed_of(cfg, step, "train"))
    with progress(f"step {step} collect", len(tasks)) as bar:
        episodes, lost, seconds = collect(
            world, policy, tasks, cfg.turns, cfg.temperature, cfg.max_tokens, generator, bar
        )
    if not episodes:
        raise SetupError(
            f"step {step}: no episode could be played, all {lost} were lost; a simulator died, or "
            "the games are marked unsolvable"
        )
    return episodes, lost, seconds


def episode_returns(episodes, cfg):
    """The reward at the end of each episode (B,), in float64 so that equal returns are equal."""
    sparse = cfg.reward == "sparse"
    returns = [float(e.success) if sparse else max(e.score, 0) / 100 for e in episodes]
    return torch.tensor(returns, dtype=torch.double)


def invalid_penalties(turns, cfg):
    """What each turn loses of its advantage if it has no valid action (N,).

    The paper takes this penalty from the return, before GRPO divides by the standard deviation. In
    a group in which all fail, the penalty is then the only difference, so 0.01 grows to a full
    advantage. The best one goes to the shortest episode, which failed first.
    """
    return cfg.invalid_penalty * torch.tensor([float(turn.invalid) for turn in turns])


def grpo_advantages(episodes, tasks, returns, cfg):
    """GRPO's advantage of each episode (B,): its return against those of its group."""
    # a group is the episodes of one task
    numbers = {task: number for number, task in enumerate(dict.fromkeys(tasks))}
    group = torch.tensor([numbers[episode.task] for episode in episodes])
    return group_advantages(returns, group, **settings_of(cfg, group_advantages)).float()


def ppo_advantages(values, returns, owner, cfg):
    """PPO's advantage of each turn (N,), normalised over the batch, and the critic's targets (N,).

    Each episode has the same share of the mean and the standard deviation, as it has in Eq. 2.
    """
    # True at the last turn of an episode
    last = torch.cat([owner[1:] != owner[:-1], torch.tensor([True])])
    rewards = torch.zeros_like(values)
    rewards[last] = returns
    raw = gae(values, rewards, last, cfg.discount, cfg.gae_lambda)
    turns_of = torch.bincount(owner)
    share = 1 / (len(turns_of) * turns_of[owner])
    centred = raw - (raw * share).sum()
    std = (centred**2 * share).sum().sqrt()
    return centred / (std + 1e-6), raw + values


def mean(values):
    """The mean, or None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None


def episode_metrics(episodes, turn_limit):
    """What the episodes of a step say of the policy that played them."""
    failed_early = lambda e: not e.success and len(e.turns) < turn_limit
    turns = [turn for episode in episodes for turn in episode.turns]
    by_turn = {}
    for turn in turns:
        by_turn.setdefault(turn.index, []).append(mean(turn.entropy))
    return {
        "success": mean(episode.success for episode in episodes),
        "failed_early": mean(failed_early(episode) for episode in episodes),
        "score": mean(episode.score for episode in episodes),
        "invalid": mean(turn.invalid for turn in turns),
        "entropy_by_turn": [mean(by_turn[t]) for t in sorted(by_turn)],
        "episodes": len(episodes),
        "turns": len(turns),
        "tokens": sum(len(turn.response) for turn in turns),
        "prompt_tokens": sum(len(turn.prompt) for turn in turns),
    }


def corridor_metrics(row, losses, cfg):
    """The corridor as the step used it, and the share of tokens outside it.

    net_above_cap is 1 - α·β_k, which is positive where the loss still rewards more entropy.
    """
    floor, cap = corridor(row["history_mean"], cfg.kappa_l, cfg.kappa_r)
    hinge = cfg.smoothing == "hinge" and cfg.entropy_coef > 0 and row["history_mean"] is not None
    return {
        "corridor_low": floor if math.isfinite(floor) else None,
        "corridor_high": cap if math.isfinite(cap) else None,
        "outside": losses["below"] + losses["above"],
        "net_above_cap": 1 - cfg.alpha * row["beta"] if hinge else 1.0,
    }


def evaluate(world, policy, tasks, cfg, step, at_once=64):
    """Success on the fixed evaluation tasks of both splits. -> what is logged

    A split whose episodes were all lost with their simulators has no success: None. at_once: the
    episodes that are played side by side, as the simulators hold each of them in memory.
    """
    row, texts, begin = {}, [], time.perf_counter()
    for split in ("iid", "ood"):
        seed = seed_of(cfg, step, split)
        generator = torch.Generator(policy.model.device).manual_seed(seed)
        limits = (cfg.turns, cfg.eval_temperature, cfg.max_tokens)
        episodes, lost = [], 0
        with progress(f"step {step} evaluate {split}", len(tasks[split])) as bar:
            for first in range(0, len(tasks[split]), at_once):
                part = tasks[split][first : first + at_once]
                played, gone, _ = collect(world, policy, part, *limits, generator, bar)
                episodes += played
                lost += gone
        by_task = {}
        for episode in sorted(episodes, key=lambda episode: episode.task.name):
            by_task.setdefault(episode.task.name, []).append(episode.success)
        row[f"{split}_success"] = mean(episode.success for episode in episodes)
        row[f"{split}_by_task"] = {name: mean(values) for name, values in by_task.items()}
        row[f"{split}_lost"] = lost
        row[f"{split}_invalid"] = mean(turn.invalid for e in episodes for turn in e.turns)
        texts += [f"[{split}] {report.transcript(episode)}" for episode in episodes[:2]]
    if cfg.evaluate is None:
        report.save_transcripts(cfg.out, step, texts)
    return {**row, "seconds_eval": time.perf_counter() - begin}


def evaluate_checkpoint(cfg, policy, world, eval_tasks):
    """--evaluate: print the success of a saved policy by task type."""
    saved = run_folder.load_checkpoint(cfg.evaluate)
    run_folder.restore(trained(policy.model), saved["model"])
    # saved["step"] is the first step that is still to do
    report.print_success(evaluate(world, policy, eval_tasks, cfg, saved["step"] - 1))


def main():
    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        train(parse(sys.argv[1:], __doc__))
    except (SetupError, OSError) as error:
        # an OSError here is a disk that cannot be written
        sys.exit(f"train.py: {error}")
    except RuntimeError as error:
        memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not memory:
            raise
        sys.exit(
            "train.py: out of memory; lower --tokens-per-batch (also with --resume), --group-size "
            "or --max-tokens, or use --lora-rank or a smaller --model "
            f"({run_folder.one_line(error)})"
        )
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; --resume with the same --out goes on from the last step")


if __name__ == "__main__":
    main()
