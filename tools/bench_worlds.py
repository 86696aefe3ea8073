"""The simulators and the rollout beside the usual ways: environment, alfworld, rollout."""

import copy
import importlib.util
import os
import random
import tempfile

import torch

from envs import ALFWorld, ScienceWorld
from rollout import collect
from support.loading import load_policy
from tools.measure import clock, descendants, pss, table, timed
from worlds.alfworld import find_alfworld
from worlds.scienceworld import find_java

# ---- environment, alfworld: stepping


def environment(episodes=32, processes=4, turns=10):
    """The same gold actions in our simulators, and in `ScienceWorldEnv`, a process an episode."""
    rows = []
    names = ("find-animal", "find-plant", "boil")
    ways = {"ours, compact prompt": False, "ours, chat prompt (objects in sight)": True}
    for way, objects in ways.items():
        with ScienceWorld(names, objects=objects, jvms=1) as world:
            tasks = world.tasks("train")[::10][:episodes]
            plans = [(world.gold(task) + ["look around"] * turns)[:turns] for task in tasks]
            world.reset(tasks)
            seconds, steps = timed(lambda: play_plans(world, plans))
            row = {"way": way, "episodes": len(tasks), "processes": 1, "turns/s": steps / seconds}
            rows.append(row | {"MB": pss(descendants("java"))})
    rows.append(package_environment(tasks[:processes], plans))
    for row in rows:
        extrapolated = episodes / row["episodes"] if row["processes"] > 1 else 1
        row[f"MB for {episodes} (extrapolated)"] = row["MB"] * extrapolated
        row["speed"] = row["turns/s"] / rows[-1]["turns/s"]
    return table("ScienceWorld: stepping", rows)


def play_plans(world, plans):
    """Play all plans side by side. -> the number of turns"""
    steps, active = 0, set(range(len(plans)))
    for t in range(len(plans[0])):
        after = world.step({slot: plans[slot][t] for slot in active})
        steps += len(after)
        active -= {slot for slot, now in after.items() if now.done}
    return steps


def package_environment(tasks, plans):
    """A row: the first plans in the package's own environments, one after the other."""
    from scienceworld import ScienceWorldEnv

    os.environ["PATH"] = os.path.dirname(find_java()) + os.pathsep + os.environ["PATH"]
    envs = [ScienceWorldEnv("", envStepLimit=100) for _ in tasks]
    for env, task in zip(envs, tasks, strict=True):
        env.load(task.name, task.variation, "easy")
        env.reset()
    begin, steps = clock(), 0
    for env, plan in zip(envs, plans, strict=False):
        for action in plan:
            steps += 1
            _, _, done, _ = env.step(action)
            if done:
                break
    speed, megabytes = steps / (clock() - begin), pss(descendants("java"))
    for env in envs:
        env.close()
    row = {"way": "ScienceWorldEnv, a process per episode", "episodes": len(tasks)}
    return row | {"processes": len(tasks), "turns/s": speed, "MB": megabytes}


def alfworld():
    """Random admissible commands in real games, ours and in the package's `AlfredTWEnv`."""
    folder = find_alfworld()
    if folder is None:
        return print("\nALFWorld: left out, there are no real games (`alfworld-download`)")
    rows = []
    for episodes, turns in ((16, 12), (64, 3)):
        ours = our_alfworld(episodes, 10 * turns)
        package = package_alfworld(folder, episodes, turns)
        for row in (ours, package):
            rows.append(row | {"speed": row["turns/s"] / package["turns/s"]})
    return table("ALFWorld: stepping", rows)


def our_alfworld(episodes, turns):
    rng, before = random.Random(0), descendants("python")
    with ALFWorld(games="real") as world:
        tasks = world.tasks("iid")[:episodes]

        def play():
            steps = 0
            for _ in range(turns):
                active = [slot for slot, now in world.last.items() if not now.done]
                steps += len(active)
                world.step({slot: rng.choice(world.last[slot].objects) for slot in active})
            return steps

        return alfworld_row("ours", episodes, before, lambda: world.reset(tasks), play)


def package_alfworld(folder, episodes, turns):
    """It finds its games by reading them all."""
    from alfworld.agents.environment.alfred_tw_env import AlfredTWEnv

    data = {"data_path": f"{folder}/train", "num_train_games": -1, "num_eval_games": -1}
    data["eval_id_data_path"] = f"{folder}/valid_seen"
    data["eval_ood_data_path"] = f"{folder}/valid_unseen"
    rules = {"goal_desc_human_anns_prob": 0, "task_types": [1, 2, 3, 4, 5, 6]}
    rules |= {"domain_randomization": False, "expert_type": "handcoded"}
    config = {"dataset": data, "env": rules, "general": {"training_method": "dqn"}}
    config["rl"] = {"training": {"max_nb_steps_per_episode": 50}}
    rng, before = random.Random(0), descendants("python")
    env = AlfredTWEnv(config, "eval_in_distribution").init_env(batch_size=episodes)
    admissible = None

    def reset():
        nonlocal admissible
        _, info = env.reset()
        admissible = info["admissible_commands"]

    def play():
        nonlocal admissible
        for _ in range(turns):
            *_, info = env.step([rng.choice(commands) for commands in admissible])
            admissible = info["admissible_commands"]
        return turns * episodes

    row = alfworld_row("AlfredTWEnv", episodes, before, reset, play)
    env.close()
    return row


def alfworld_row(way, episodes, before, reset, play):
    """before: processes that are not to be counted; play() -> the number of turns it played."""
    first, _ = timed(reset)
    seconds, turns = timed(play)
    megabytes = pss(descendants("python") - before)
    again, _ = timed(reset)
    row = {"way": way, "episodes": episodes, "turns/s": turns / seconds, "MB": megabytes}
    return row | {"first reset s": first, "again s": again}


# ---- rollout: whole episodes of the tiny policy


def padded_generate(policy, prompts, max_tokens):
    """`model.generate` on one batch with left padding, from the whole softmax -> texts"""
    tokenizer = policy.tokenizer
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": max_tokens}
    with torch.no_grad():
        ids = policy.model.generate(**batch, **sampling)
    responses = ids[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(responses, skip_special_tokens=True)


def play_padded(policy, world, tasks, turn_limit):
    """Finished episodes stay in the batch until all are done. -> turns, seconds without reset"""
    now, past = dict(enumerate(world.reset(tasks))), [[] for _ in tasks]
    begin, turns, active = clock(), 0, set(now)
    for _ in range(turn_limit):
        prompts = [policy.prompt(world, past[slot], now[slot]) for slot in now]
        texts = padded_generate(policy, list(map(policy.encode, prompts)), 24)
        actions = {slot: world.parse_compact(texts[slot]) for slot in active}
        for slot, after in world.step(actions).items():
            past[slot].append((now[slot], actions[slot]))
            now[slot] = after
            turns += 1
        active = {slot for slot in active if not now[slot].done}
        if not active:
            break
    return turns, clock() - begin


def play_alone(policy, world, tasks, turn_limit):
    results = [play_padded(policy, world, [task], turn_limit) for task in tasks]
    return tuple(map(sum, zip(*results, strict=True)))


def play_ours(policy, world, tasks, turn_limit):
    generator = torch.Generator().manual_seed(0)
    episodes, _, seconds = collect(world, policy, tasks, turn_limit, 1.0, 24, generator)
    turns = sum(len(episode.turns) for episode in episodes)
    return turns, seconds["generate"] + seconds["environment"]


# a tiny policy's prompt ends with ">"; the prompt "task over" does not, so no action follows it
RESPONSE_TEMPLATE = {
    "start_anchor": "task ",
    "defaults": {"role": "assistant"},
    "fields": {
        "tool_calls": {
            "open": "\n>",
            "content": "text",
            "transform": [
                {
                    "type": "function",
                    "function": {"name": "act", "arguments": {"action": "{content}"}},
                }
            ],
        }
    },
}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c | tojson }}{% endfor %}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
)


def play_trl(policy, world, tasks, turn_limit):
    """TRL's GRPOTrainer, with this world as its environment and our prompts as replies of a tool.

    The policy plays worse than it was trained to: it reads all prompts so far, and not only one.
    """
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl import GRPOConfig, GRPOTrainer

    # slot -> past, now
    state = {}

    class Play:
        def reset(self, slot, **_):
            self._slot = slot
            return world.compact_prompt(*state[slot])

        def act(self, action: str) -> str:
            """Act.

            Args:
                action: The action.
            """
            past, now = state[self._slot]
            past.append((now, world.parse_compact(action)))
            now = world.step({self._slot: past[-1][1]})[self._slot]
            state[self._slot] = past, now
            over = now.done or len(past) == turn_limit
            return "task over" if over else world.compact_prompt(past, now)

        def get_reward(self):
            return 0.0

    model, tokenizer = copy.deepcopy(policy.model), copy.deepcopy(policy.tokenizer)
    # nothing is to be cut
    model.config.max_position_embeddings = 8192
    tokenizer.padding_side = "left"
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = copy.deepcopy(RESPONSE_TEMPLATE)
    tokenizer.response_template["fields"]["tool_calls"]["close"] = tokenizer.eos_token
    arguments = GRPOConfig(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=len(tasks),
        num_generations=2,
        max_steps=1,
        report_to="none",
        bf16=False,
        use_cpu=True,
        max_completion_length=8000,
        max_tool_calling_iterations=turn_limit,
        generation_kwargs={"max_new_tokens": 24},
    )
    trainer = GRPOTrainer(
        model, args=arguments, processing_class=tokenizer, environment_factory=Play
    )
    state |= {slot: ([], now) for slot, now in enumerate(world.reset(tasks))}
    trainer.model.train()
    prompt = [{"role": "user", "content": ""}]
    begin = clock()
    trainer._generate_and_score_completions([{"prompt": prompt, "slot": slot} for slot in state])
    return sum(len(past) for past, _ in state.values()), clock() - begin


def rollout(episodes=64, one_by_one=8):
    """Turns per second of whole episodes in ScienceWorld; to load the tasks is left out."""
    policy, rows = load_policy("tiny", "scienceworld"), []
    ways = {
        "one episode at a time, model.generate": (play_alone, one_by_one),
        "padded batch that keeps finished episodes": (play_padded, episodes),
        "TRL: one growing sequence an episode": (play_trl, episodes),
        "ours": (play_ours, episodes),
    }
    if importlib.util.find_spec("trl") is None:
        print("rollout, TRL: left out (pip install -r requirements-trl.txt)")
        del ways["TRL: one growing sequence an episode"]
    with ScienceWorld(policy.made_for["tasks"]) as world:
        tasks = random.Random(0).sample(world.tasks("train"), episodes)
        for way, (play, number) in ways.items():
            turns, seconds = play(policy, world, tasks[:number], policy.made_for["turns"])
            row = {"way": way, "episodes": number, "turns": turns, "turns/s": turns / seconds}
            rows.append(row | {"speed": row["turns/s"] / (rows or [row])[0]["turns/s"]})
    return table("Rollout: the tiny policy in ScienceWorld", rows)
