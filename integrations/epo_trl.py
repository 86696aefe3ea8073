"""EPO on TRL's GRPOTrainer, for several GPUs: accelerate, DeepSpeed, FSDP and vLLM are TRL's.

    pip install -r requirements-trl.txt
    # one GPU
    python -m integrations.epo_trl --env scienceworld --lora-rank 32
    # eight GPUs
    accelerate launch --num_processes 8 -m integrations.epo_trl --env scienceworld \\
        --lora-rank 32 --use_vllm --vllm_mode colocate
    # two machines of eight GPUs, all weights; --machine_rank 1 on the other one
    accelerate launch --num_machines 2 --num_processes 16 --machine_rank 0 \\
        --main_process_ip 10.0.0.1 --main_process_port 29500 \\
        -m integrations.epo_trl --env scienceworld --deepspeed zero3.json

Flags that --help does not list are those of GRPOConfig; its --beta is the weight of the KL.

The penalty of a token, β_k, the worlds, the tasks of each step, success and the return are those of
train.py. These things differ:

- TRL has no critic, so there is no PPO + EPO. There are no evaluations.
- An episode is one growing sequence, in which an observation is the reply of a tool; in train.py
  each turn has a fresh prompt. So an episode counts as one turn in Eq. 2: the mean is over the
  tokens of an episode, then over episodes. Names in sight are not listed.
- L_H is TRL's entropy bonus, a mean over the tokens of a micro-batch. It is the average above if a
  micro-batch is one episode, and the command line allows no other.
- H̄_m is the entropy that TRL logs, a mean over the optimizer steps of the first pass over the
  episodes. So it is of policies that have begun to learn.

Each process starts simulators of its own, up to four Java machines of half a GB or more.
"""

import argparse
import itertools
import os
import sys
from dataclasses import dataclass
from functools import partial

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import supports_tool_calling

from config import option
from envs import WORLDS, Task, world_class
from epo import beta, mean_of_history, smoothing_loss, token_weights
from support.run_folder import SetupError, one_line
from train import draw


# ---- the loss
def check(args, kappa_l, kappa_r, alpha, gamma, smoothing):
    """Refuse what cannot work, before anything is loaded. Raises ValueError."""
    if args is None or not args.entropy_coef:
        raise ValueError("EPOTrainer: λ is GRPOConfig's entropy_coef, and it must be set")
    if args.use_adaptive_entropy or args.top_entropy_quantile != 1:
        flags = "use_adaptive_entropy or top_entropy_quantile"
        raise ValueError(f"EPOTrainer: λ is constant and for all tokens, so no {flags}")
    if args.logging_strategy != "steps" or args.logging_steps != 1:
        raise ValueError("EPOTrainer: the history is read from the log; it needs logging_steps=1")
    if args.use_liger_kernel:
        raise ValueError("EPOTrainer: entropy needs a gradient, so no use_liger_kernel=True")
    beta(0, 1, gamma)
    smoothing_loss(torch.zeros(1), None, torch.ones(1), kappa_l, kappa_r, alpha, smoothing)


def episode_weights(written):
    """The weight of each token in the mean over the tokens of an episode, then over episodes.

    written (B, L): True where the policy wrote -> (T,), row after row. An episode without such a
    token counts in B. All micro-batches and ranks have equally many episodes, so the mean of
    their averages is the batch's average.
    """
    episode, _ = written.nonzero(as_tuple=True)  # (T,)
    # an episode is one growing sequence, so it is one turn
    weights = token_weights(turn=episode, episode=episode)
    return weights * len(episode.unique()) / len(written)


class EPOTrainer(GRPOTrainer):
    """GRPOTrainer, whose loss is L_MT - λ·L_H with λ = entropy_coef, plus λ·β_k·L_smooth: Eq. 6.

    smoothing: "hinge", "indicator" or "off", as in `epo.smoothing_loss`. It logs, beside TRL's
    metrics: smoothing_loss (L_smooth), beta_k (β_k) and history_mean (H̄_W, 0 without a history).
    """

    def __init__(
        self, model, reward_funcs=None, args=None, *,
        kappa_l=0.0, kappa_r=2.0, alpha=0.05, gamma=3.0, smoothing="hinge",
        **more,
    ):  # fmt: skip
        check(args, kappa_l, kappa_r, alpha, gamma, smoothing)
        self.smoothing = dict(kappa_l=kappa_l, kappa_r=kappa_r, alpha=alpha, form=smoothing)
        # `self.beta` is TRL's, the weight of its KL
        self.beta_gamma = gamma
        super().__init__(model, reward_funcs, args, **more)

    def rl_step(self):
        """k, K and W_k as this optimizer step has them -> int, int, list. May raise SetupError.

        An RL step is a generation with all the optimizer steps that learn from it; they have the
        same β_k and W_k. H̄_m is the `entropy` that TRL logged in its first pass over the episodes.
        The log is reduced over ranks, and part of a checkpoint, so a resumed run has it too.
        """
        accumulated = self.args.gradient_accumulation_steps
        one_pass = self.args.steps_per_generation // accumulated or 1
        updates = self.args.steps_per_generation * self.num_iterations // accumulated or 1
        rows = self.state.log_history
        entropies = [row["entropy"] for row in rows if row.get("entropy") is not None]
        done = self.state.global_step
        if len(entropies) < done:
            message = f"the log has the entropy of {len(entropies)} of {done} steps"
            raise SetupError(f"{message}, so there is no history; begin anew with logging_steps=1")
        k = done // updates
        first_passes = [entropies[m * updates :][:one_pass] for m in range(k)]
        history = [sum(first_pass) / one_pass for first_pass in first_passes]
        return k, self.state.max_steps // updates, history

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        # (B, L), with a gradient
        self.entropies = result[1]
        return result

    def _compute_loss(self, model, inputs):
        # divided by the number of accumulated micro-batches already
        loss = super()._compute_loss(model, inputs)
        entropy, self.entropies = self.entropies, None
        if not self.model.training:
            return loss
        # tool_mask is 0 for what the world wrote
        written = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()  # (B, L)
        entropy, weights = entropy[written].float(), episode_weights(written).float()  # (T,)
        k, total_steps, history = self.rl_step()
        beta_k = beta(k, total_steps, self.beta_gamma)
        history_mean = mean_of_history(history)
        l_smooth = smoothing_loss(entropy, history_mean, weights, **self.smoothing)
        metrics = self._metrics["train"]
        all_ranks = self.accelerator.gather(l_smooth.detach())
        metrics["smoothing_loss"].append(all_ranks.mean().item())
        metrics["beta_k"].append(beta_k)
        metrics["history_mean"].append(history_mean or 0.0)
        term = self.entropy_coef * beta_k * l_smooth
        return loss + term / self.current_gradient_accumulation_steps


# ---- the worlds
class Episode:
    """An episode in a slot of a world of envs.py, as TRL's `environment_factory` wants it.

    Every public method but `reset` and `get_reward` is a tool. TRL resets and steps its
    environments one after the other, in one thread. The row of the data set says which task; GRPO
    repeats the row, so a group plays the same one.

    TRL does not know that an episode can end. An episode that has ended says so, and sends nothing
    more to the world. The policy ends it by a message without a call, also when it is not won. The
    turn limit counts actions. What would only repeat the last reply is left out of a reply: the
    look, the inventory and the list of actions.
    """

    _slots = itertools.count()

    def __init__(self, world, turns=None):
        self._world, self._slot = world, next(self._slots)
        self._turn_limit = turns or world.turns

    def reset(self, task, variation, **_):
        self._now = self._world.restart(self._slot, Task(task, variation))
        self._turns, self._last_parts = 0, ()
        if self._now is None:
            return "\n\nThis task can't be played."
        return f"\n\nTask: {self._now.goal}\n\n{self._news()}"

    def act(self, action: str) -> str:
        """
        Take one action in the world and see what it does.

        Args:
            action: The action, in one of the forms that you were told.
        """
        if self._is_over():
            return "Nothing happens: the episode is over."
        text = " ".join(str(action).lower().split())
        self._now = self._world.step({self._slot: text or None})[self._slot]
        self._turns += 1
        if self._now is None:
            return "The world broke down: the episode is over."
        reply = self._news()
        if self._is_over():
            reply += "\n\nThe episode is over. Say so in a few words, and call no tool."
        return reply

    def get_reward(self):
        """1 for success, else 0; None if the simulator died: TRL leaves such an episode out.

        There is no penalty for invalid actions: TRL would normalise it with the reward, and where
        all of a group fail the shortest episode would be the best.
        """
        if self._now is None:
            return None
        return float(self._now.success)

    def _is_over(self):
        return self._now is None or self._now.done or self._turns == self._turn_limit

    def _news(self):
        # ALFWorld's `help` is of no use
        objects = ", ".join(name for name in self._now.objects if name != "help")
        listed = f"{self._world.chat_objects}: {objects}" if objects else ""
        parts = (self._now.look, self._now.inventory, listed)
        new = [part for part in parts if part not in self._last_parts]
        self._last_parts = parts
        return "\n".join(part.strip() for part in (self._now.reply, *new) if part)


def rows(world, tasks):
    """The rows of the data set: the rules as the prompt, which `reset` completes, and the task."""
    advice = "Take one action after the other until you are told that the episode is over."
    prompt = [{"role": "user", "content": f"{world.chat_rules}\n\n{advice}"}]
    return [{"prompt": prompt, "task": name, "variation": number} for name, number in tasks]


# ---- the chat template
# goes before a template without tools: calls become text, and what a tool says is the user's
CALLS_AS_TEXT = """\
{% set all = namespace(messages=[]) %}
{% for m in messages %}
{% set role = 'user' if m.role == 'tool' else m.role %}
{% set calls = m.tool_calls | tojson if m.tool_calls else '' %}
{% set all.messages = all.messages + [{'role': role, 'content': m.content + calls}] %}
{% endfor %}
{% set messages = all.messages %}
"""
ACTION = "Action:"
CALL = {"name": "act", "arguments": {"action": "{content}"}}


def plain_actions(tokenizer):
    """For a model whose chat template has no tools: a line of text is the action.

    Its turn begins with "Action:". To TRL, the rest of that line is a call of `act`. Such a policy
    cannot end an episode, but writes on up to the turn limit.
    """
    prompt = partial(tokenizer.apply_chat_template, [{"role": "user", "content": "x"}])
    without = prompt(tokenize=False, add_generation_prompt=False)
    turn_begins = prompt(tokenize=False, add_generation_prompt=True).removeprefix(without)
    opening = "{{ '" + ACTION + "' if add_generation_prompt }}"
    tokenizer.chat_template = CALLS_AS_TEXT + tokenizer.chat_template + opening
    tool_calls = {
        "open": ACTION,
        "close": ["\n", tokenizer.eos_token],
        "content": "text",
        "transform": {"type": "function", "function": CALL},
        "repeats": True,
    }
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": turn_begins,
        "fields": {"tool_calls": tool_calls},
    }


def load_tokenizer(name):
    """The tokenizer of a model, with a chat template that has tools. Raises SetupError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, padding_side="left", trust_remote_code=False
        )
    except Exception as error:
        # transformers raises many kinds
        message = f"--model {name} cannot be loaded ({one_line(error)})"
        raise SetupError(f"{message}; give a folder, or a name on the hub") from error
    if tokenizer.chat_template is None:
        raise SetupError(f"--model {name} has no chat template; use an instruction-tuned model")
    if not supports_tool_calling(tokenizer):
        print(f"{name}: its chat template has no tools; a line that it writes is an action")
        plain_actions(tokenizer)
    return tokenizer


# ---- the command line
@dataclass
class Options:
    """The flags that are not GRPOConfig's."""

    env: str = option("scienceworld", "the world", choices=tuple(WORLDS))
    tasks: str | None = option(None, "task types, comma-separated; else all")
    turns: int | None = option(None, "turn limit; else the world's")
    turn_tokens: int = option(512, "most tokens the policy may write in a turn")
    model: str = option("Qwen/Qwen2.5-7B-Instruct", "an instruct model: a folder, or on the hub")
    lora_rank: int = option(0, "rank of LoRA adapters; 0: all weights learn")
    steps: int = option(125, "RL steps K")
    updates: int = option(4, "optimizer steps per RL step, each on a share of its episodes")
    tasks_per_step: int = option(16, "different tasks per step")
    group_size: int = option(8, "episodes of each task")
    kappa_l: float = option(0.0, "κ_l")
    kappa_r: float = option(2.0, "κ_r")
    alpha: float = option(0.05, "α")
    gamma: float = option(3.0, "γ")
    smoothing: str = option("hinge", "form of Eq. 3", choices=("hinge", "indicator", "off"))
    resume: bool = option(False, "go on from the last checkpoint in --output_dir")

    def of_trainer(self):
        """EPOTrainer's keywords."""
        names = ("kappa_l", "kappa_r", "alpha", "gamma", "smoothing")
        return {name: getattr(self, name) for name in names}


def trl_defaults(options):
    """The defaults of GRPOConfig's flags: the paper's settings, where it has them."""
    gpu = torch.cuda.is_available()
    # weights that learn are float32, as in support/loading.py
    dtype = "bfloat16" if options.lora_rank and gpu else "float32"
    episodes = options.tasks_per_step * options.group_size
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if episodes % (processes * options.updates):
        parts = f"{processes} processes in {options.updates} updates"
        raise SetupError(f"{episodes} episodes a step can't be shared by {parts}; see --updates")
    return dict(
        output_dir=f"runs/trl-{options.env}",
        learning_rate=5e-6,
        weight_decay=0.01,
        warmup_steps=0.1,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.2},
        entropy_coef=0.001,
        beta=0.01,
        loss_type="grpo",
        bf16=gpu,
        model_init_kwargs={"dtype": dtype, "trust_remote_code": False},
        max_steps=options.steps * options.updates,
        num_generations=options.group_size,
        generation_batch_size=episodes,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=episodes // processes // options.updates,
        shuffle_dataset=False,
        max_completion_length=16384,
        max_tool_calling_iterations=options.turns or world_class(options.env).turns,
        # the history is read from the log
        logging_steps=1,
        save_steps=5 * options.updates,
        report_to="none",
    )


def make_parser(kind, **more):
    """The flags of a dataclass; a wrong one ends the program in one line, not a page of usage."""
    parser = HfArgumentParser(kind, allow_abbrev=False, **more)
    parser.error = lambda message: parser.exit(2, f"epo_trl.py: {message}\n")
    return parser


def parse(arguments):
    """Command line -> Options, GRPOConfig. Raises SetupError."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = make_parser(Options, description=__doc__, formatter_class=raw)
    values, trl_flags = parser.parse_known_args(arguments)
    options = Options(**vars(values))
    for name, value in vars(options).items():
        least = 0 if name == "lora_rank" else 1
        if type(value) is int and value < least:
            flag = "--" + name.replace("_", "-")
            raise SetupError(f"{flag} must be at least {least}, not {value}")
    parser = make_parser(GRPOConfig)
    parser.set_defaults(**trl_defaults(options))
    values = parser.parse_args(trl_flags)
    if values.generation_kwargs is None:
        limit = "max_tokens" if values.use_vllm else "max_new_tokens"
        values.generation_kwargs = {limit: options.turn_tokens}
    try:
        config = GRPOConfig(**vars(values))
        check_config(options, config)
    except ValueError as error:
        raise SetupError(one_line(error)) from error
    return options, config


def check_config(options, config):
    """Refuse what cannot work. Raises ValueError or SetupError."""
    check(config, **options.of_trainer())
    if config.per_device_train_batch_size != 1:
        message = "only then are L_H and L_smooth the same average, and K is --steps"
        raise SetupError(f"--per_device_train_batch_size must stay 1: {message}")
    if config.trust_remote_code or (config.model_init_kwargs or {}).get("trust_remote_code"):
        raise SetupError("trust_remote_code: the code of a model is not run here")
    folder = config.output_dir
    if options.resume and not (os.path.isdir(folder) and get_last_checkpoint(folder)):
        raise SetupError(f"--resume: there is no checkpoint in {folder}")


def make_trainer(options, config, tokenizer, world):
    """The trainer, with the tasks that train.py would draw for each step."""
    train_tasks = world.tasks("train")
    drawn = []
    for step in range(options.steps):
        drawn += draw(train_tasks, options.tasks_per_step, f"{config.seed} {step}")
    lora = None
    if options.lora_rank:
        rank = options.lora_rank
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return EPOTrainer(
        options.model,
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows(world, drawn)),
        environment_factory=partial(Episode, world, options.turns),
        peft_config=lora,
        **options.of_trainer(),
    )


def train(options, config):
    tokenizer = load_tokenizer(options.model)
    names = [name.strip() for name in (options.tasks or "").split(",")]
    with world_class(options.env)(tuple(filter(None, names))) as world:
        trainer = make_trainer(options, config, tokenizer, world)
        trainer.train(resume_from_checkpoint=options.resume or None)
        trainer.save_model()
        # trainer_state.json, which holds the log
        trainer.save_state()


def main():
    try:
        train(*parse(sys.argv[1:]))
    # a flag of TRL's can need a package of its own, such as vLLM
    except (SetupError, OSError, ImportError) as error:
        sys.exit(f"epo_trl.py: {one_line(error)}")


if __name__ == "__main__":
    main()
