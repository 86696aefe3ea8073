"""Train an agent with EPO on one GPU or on a CPU. `train` and `rl_step` are Algorithm 1.

    python train.py --env scienceworld        # the tiny policy, no download
    python train.py --env scienceworld --model Qwen/Qwen2.5-1.5B-Instruct --lora-rank 32

support/run_folder.py says what a run leaves in its folder (--out). Every random choice of step k is
seeded by (seed, k), so a resumed run continues as if it had never stopped.
"""

import os
import random
import signal
import sys
import time
from dataclasses import asdict, replace

import torch

import metrics
from config import decide, parse_flags
from critic import ppo_advantages, update_critic
from envs import make_world
from epo import adaptive_coef, beta, corridor, entropy_loss, group_advantages, mean_of_history
from policy import load_policy, load_weights, save_model, trained
from rollout import collect, prove
from support import report, run_folder
from support.report import SPLITS
from support.run_folder import SetupError, damaged, one_line
from update import load_optimizer, make_batch, make_learner, make_schedules, update


def train(cfg):
    """Run Algorithm 1 from step 0, or from the checkpoint of the run in cfg.out."""
    if not cfg.resume:
        run_folder.refuse_existing(cfg.out)
    # LoRA's adapters begin at random
    torch.manual_seed(cfg.seed)
    how = (cfg.device, cfg.dtype, cfg.lora_rank, cfg.think, cfg.tokens_per_batch)
    policy = load_policy(cfg.model, cfg.env, *how)
    policy.model.base_model.recompute = cfg.recompute
    prove(policy)
    with make_world(cfg, policy.compact) as world:
        train_tasks = world.tasks("train")
        eval_tasks = {s: draw_tasks(world.tasks(s), cfg.eval_episodes, 0) for s in SPLITS}
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
                run_folder.save_tensors(f"{cfg.out}/checkpoint.pt", state_of(learner, step + 1))
                print(report.line(row), flush=True)
            # policy.ASKS
            asks = {"lora_lr" if cfg.lora_rank else "lr": cfg.lr, "think": cfg.think}
            asks |= {"tasks": list(cfg.task_names) or None}
            asks |= {"turns": cfg.turns, "max_tokens": cfg.max_tokens}
            save_model(policy, asks, os.path.join(cfg.out, "model"))
    print(report.last_line(run_folder.read_log(cfg.out)))
    print(f"draw it: python plot.py {cfg.out} --out figures/mine")


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
        advantages = grpo_advantages(episodes, returns)[owner]
    else:
        values = learner.critic.values(turns, cfg.tokens_per_batch)
        advantages, targets = ppo_advantages(values, returns.float(), owner, cfg)
    advantages = advantages - invalid_penalties(turns, cfg)

    # update, with β_k and the history of the steps before; update.py calls epo_loss
    beta_k = beta(step, cfg.steps, cfg.gamma) if cfg.dynamic_weight == "on" else 1.0
    history_mean = mean_of_history(learner.history, cfg.window)
    if cfg.entropy_target is not None:
        cfg = replace(cfg, entropy_coef=adaptive_coef(learner.history, cfg.entropy_target))
    batch = make_batch(turns, owner, advantages, cfg)
    row = {"lost": lost, "lr": schedules[0].get_last_lr()[0], "entropy_coef": cfg.entropy_coef}
    losses = update(learner, turns, batch, history_mean, beta_k, cfg)
    if learner.critic is not None:
        optimizer = learner.critic_optimizer
        losses |= update_critic(learner.critic, optimizer, turns, values, targets, cfg)
    for schedule in schedules:
        schedule.step()
    seconds["train"] = time.perf_counter() - begin

    # append H̄_k: the average entropy of the batch, under the policy that wrote it
    row["entropy"] = entropy_loss(batch.entropy, batch.weights).item()
    learner.history.append(row["entropy"])
    floor, cap = corridor(history_mean, cfg.kappa_l, cfg.kappa_r)
    row |= metrics.episode_metrics(episodes, cfg.turns)
    row |= metrics.group_metrics(episodes, returns)
    row |= metrics.token_metrics(batch, cap) | losses
    row |= metrics.corridor_metrics(floor, cap, history_mean, beta_k, losses, cfg)
    if step % cfg.eval_every == 0:
        value = {"step": step, "corridor": [row["corridor_low"], row["corridor_high"]]}
        value["episodes"] = metrics.transcripts(episodes, learner.policy.tokenizer)
        path = os.path.join(cfg.out, f"transcripts/step-{step:04d}.json")
        run_folder.write_json(path, value)
    return row | {f"seconds_{part}": value for part, value in seconds.items()}


def seed_of(cfg, step, purpose):
    """Each use of chance in a step has its own seed."""
    return random.Random(f"{cfg.seed} {step} {purpose}").getrandbits(63)


def draw_tasks(tasks, n, seed):
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
    drawn = draw_tasks(train_tasks, cfg.tasks_per_step, f"{cfg.seed} {step}")
    return [task for task in drawn for _ in range(cfg.group_size)]


def collect_step(world, policy, tasks, cfg, step):
    """Play the step's episodes -> as `collect`. Raises SetupError if all of them were lost."""
    torch.manual_seed(seed_of(cfg, step, "train"))
    generator = torch.Generator(policy.model.device).manual_seed(seed_of(cfg, step, "train"))
    limits = (cfg.turns, cfg.temperature, cfg.max_tokens)
    episodes, lost, seconds = collect(world, policy, tasks, *limits, generator)
    if not episodes:
        raise SetupError(f"step {step}: all {lost} episodes were lost with their simulators")
    return episodes, lost, seconds


def episode_returns(episodes, cfg):
    """The reward at the end of each episode (B,), in float64 so that equal returns are equal."""
    if cfg.reward == "sparse":
        return torch.tensor([e.success for e in episodes], dtype=torch.double)
    return torch.tensor([max(e.score, 0) / 100 for e in episodes], dtype=torch.double)


def invalid_penalties(turns, cfg):
    """What each turn loses of its advantage if it has no valid action (N,)."""
    # it is no part of the return: in a group in which all fail GRPO would make it a full advantage
    return cfg.invalid_penalty * torch.tensor([float(turn.invalid) for turn in turns])


def grpo_advantages(episodes, returns):
    """GRPO's advantage of each episode (B,). A group is the episodes of one task."""
    tasks = list(dict.fromkeys(episode.task for episode in episodes))
    group = torch.tensor([tasks.index(episode.task) for episode in episodes])
    return group_advantages(returns, group).float()


def evaluate(world, policy, tasks, cfg, step, at_once=64):
    """Success on the evaluation tasks of both splits, `at_once` side by side -> what is logged"""
    row, begin = {}, time.perf_counter()
    for split in SPLITS:
        seed = seed_of(cfg, step, split)
        generator = torch.Generator(policy.model.device).manual_seed(seed)
        limits = (cfg.turns, cfg.eval_temperature, cfg.max_tokens)
        episodes, lost = [], 0
        for first in range(0, len(tasks[split]), at_once):
            part = tasks[split][first : first + at_once]
            played, gone, _ = collect(world, policy, part, *limits, generator)
            episodes += played
            lost += gone
        row |= metrics.evaluation_metrics(split, episodes, lost)
    return {**row, "seconds_eval": time.perf_counter() - begin}


def state_of(learner, step):
    """What a checkpoint holds. step: the first that is still to do."""
    state = {
        "step": step,
        "history": learner.history,
        "model": trained(learner.policy.model),
        "optimizer": learner.optimizer.state_dict(),
    }
    if learner.critic is not None:
        state["critic"] = learner.critic.trained()
        state["critic_optimizer"] = learner.critic_optimizer.state_dict()
    return state


def begin_or_resume(cfg, learner, eval_tasks):
    """Make the run folder, or load its checkpoint. -> the first step to do"""
    path = os.path.join(cfg.out, "checkpoint.pt")
    if not cfg.resume:
        # another run may have begun a moment ago
        run_folder.refuse_existing(cfg.out)
        run_folder.write_json(os.path.join(cfg.out, "config.json"), asdict(cfg))
        run_folder.write_json(os.path.join(cfg.out, "tasks.json"), eval_tasks)
        return 0
    if not os.path.exists(path):
        # a kill between the first row and the first checkpoint leaves one row
        run_folder.rewind(cfg.out, 0)
        run_folder.write_json(os.path.join(cfg.out, "tasks.json"), eval_tasks)
        return 0
    saved = run_folder.load_checkpoint(path)
    # a number for each step; the last row of a log is an evaluation
    history = [0.0] * min(saved["step"], cfg.steps, len(saved["history"]) + 1)
    expected = state_of(learner, 0) | {"history": history}
    if run_folder.form(saved) != run_folder.form(expected):
        raise damaged(path, "its names, types, lengths or shapes are not those of this run")
    if not run_folder.is_metric(saved["history"]):
        raise damaged(path, "its history is not finite")
    learner.history = saved["history"]
    load_weights(trained(learner.policy.model), saved["model"])
    load_optimizer(learner.optimizer, saved["optimizer"])
    if learner.critic is not None:
        load_weights(learner.critic.trained(), saved["critic"])
        load_optimizer(learner.critic_optimizer, saved["critic_optimizer"])
    run_folder.rewind(cfg.out, saved["step"])
    return saved["step"]


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        train(decide(parse_flags(sys.argv[1:], __doc__)))
    except (SetupError, OSError) as error:
        # an OSError here is a disk that cannot be written
        sys.exit(f"train.py: {error}")
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
            raise
        do = "lower --tokens-per-batch (also with --resume), --group-size or --max-tokens, or use"
        sys.exit(f"train.py: out of memory ({one_line(error)}); {do} --recompute on or --lora-rank")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; --resume with the same --out goes on from the last step")


if __name__ == "__main__":
    main()
