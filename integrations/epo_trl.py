"""EPO on TRL's GRPOTrainer, for several GPUs: accelerate, DeepSpeed, FSDP and vLLM are TRL's.

    python -m integrations.epo_trl --env scienceworld --lora-rank 32
    # eight GPUs, all weights; accelerate also takes --num_machines and --machine_rank
    accelerate launch --num_processes 8 -m integrations.epo_trl --use_vllm --deepspeed zero3.json

The flags are EPOConfig's, and with them all of TRL's GRPOConfig. An RL step plays
--generation_batch_size episodes. An update learns from --gradient_accumulation_steps of them on
each GPU, and --max_steps counts updates. docs/gpu.md says what differs from train.py.
"""

import itertools
import os
import sys
from dataclasses import dataclass, field
from functools import partial

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, HfArgumentParser
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import supports_tool_calling

from config import Env
from envs import Task, world_class
from epo import beta, mean_of_history, smoothing_loss, token_weights
from support.report import read_arguments
from support.run_folder import SetupError, one_line
from train import draw_tasks

option = lambda default, text: field(default=default, metadata={"help": text})
# what must stay: a micro-batch is an episode, the history is read from the log, λ is for all
# tokens, what is sampled is what is scored; --turns and --turn_tokens set the last two
FIXED = dict(per_device_train_batch_size=1, loss_type="grpo", num_iterations=1, logging_steps=1)
FIXED |= dict(top_entropy_quantile=1, use_liger_kernel=False)
FIXED |= dict(top_p=1, top_k=0, min_p=None, repetition_penalty=1, trust_remote_code=False)
FIXED |= dict(shuffle_dataset=False, eval_strategy="no")
FIXED |= dict(max_tool_calling_iterations=None, generation_kwargs=None)
# 125 RL steps of 16 × 8 episodes in 4 updates; the paper's settings, where it has them
PAPER = dict(max_steps=500, generation_batch_size=128, num_generations=8, save_steps=20, beta=0.01)
PAPER |= dict(gradient_accumulation_steps=32 // int(os.environ.get("WORLD_SIZE", 1)) or 1)
PAPER |= dict(learning_rate=5e-6, weight_decay=0.01, warmup_steps=0.1, max_completion_length=16384)
PAPER |= dict(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.2})
PAPER |= dict(use_bias_correction_kl=False, bf16=torch.cuda.is_available(), output_dir="runs/trl")


@dataclass
class EPOConfig(GRPOConfig):
    """GRPOConfig, whose beta is the weight of the KL, with EPO's settings. Raises ValueError."""

    env: Env = option("scienceworld", "the world")
    tasks: str = option("", "task types, comma-separated; none: all")
    turns: int = option(0, "turn limit; 0: the world's")
    turn_tokens: int = option(512, "most tokens that the policy may write in a turn")
    model: str = option("Qwen/Qwen2.5-7B-Instruct", "an instruct model: a folder, or on the hub")
    lora_rank: int = option(0, "rank of LoRA adapters; 0: all weights learn, in float32")
    entropy_coef: float = option(0.001, "λ")
    kappa_l: float = option(0.0, "κ_l")
    kappa_r: float = option(2.0, "κ_r")
    alpha: float = option(0.05, "α")
    gamma: float = option(3.0, "γ")
    smoothing: str = option("hinge", "form of Eq. 3: hinge, indicator, off")

    def __post_init__(self):
        for name, value in FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(f"--{name} must stay {value} for EPO")
        self.turns = self.max_tool_calling_iterations = self.turns or world_class(self.env).turns
        limit = "max_tokens" if self.use_vllm else "max_new_tokens"
        self.generation_kwargs = {limit: self.turn_tokens}
        super().__post_init__()
        if min(self.turns, self.turn_tokens, self.max_steps) < 1:
            raise ValueError("--turns, --turn_tokens and --max_steps must be at least 1")
        self.updates, rest = divmod(self.steps_per_generation, self.gradient_accumulation_steps)
        if rest:
            raise ValueError("an RL step must be whole updates: see --gradient_accumulation_steps")
        beta(0, 1, self.gamma)
        corridor = dict(kappa_l=self.kappa_l, kappa_r=self.kappa_r)
        self.penalty = partial(smoothing_loss, **corridor, alpha=self.alpha, form=self.smoothing)
        self.penalty(torch.zeros(1), None, torch.ones(1))


class EPOTrainer(GRPOTrainer):
    """GRPOTrainer, whose loss L_MT - λ·L_H gets the other term of Eq. 6, λ·β_k·L_smooth.

    With --use_adaptive_entropy both terms have TRL's λ. It is `epo.adaptive_coef` from
    --entropy_coef on, a step for each update and within TRL's bounds; but as in Skywork-OR1's code
    it is 0 in an update after one with an entropy above --entropy_target, and in the first.

    It also logs smoothing_loss (L_smooth), applied_coef (λ), beta_k and history_mean (H̄_W, or 0).
    """

    def rl_step(self):
        """k, K and H̄_W as this update has them. May raise SetupError.

        H̄_m is the mean of the `entropy` that TRL logs in the updates of RL step m. It is reduced
        over ranks, and part of a checkpoint, so a resumed run has it too.
        """
        rows, done, updates = self.state.log_history, self.state.global_step, self.args.updates
        entropies = [row["entropy"] for row in rows if row.get("entropy") is not None]
        if len(entropies) < done:
            raise SetupError(f"the log has {len(entropies)} of {done} entropies; begin anew")
        k, total_steps = done // updates, self.state.max_steps // updates
        return k, total_steps, mean_of_history(entropies[: k * updates])

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.entropies = result[1]  # (1, L), with a gradient
        return result

    def _compute_loss(self, model, inputs):
        above = self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target
        # of this update: TRL moves its λ after the last micro-batch
        coef = 0.0 if above else self.entropy_coef
        loss = super()._compute_loss(model, inputs)
        # tool_mask is 0 for what the world wrote
        written = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()  # (1, L)
        entropy, self.entropies = self.entropies[written].float(), None  # (T,)
        # one turn of one episode
        zeros = torch.zeros_like(entropy).long()
        weights = token_weights(turn=zeros, episode=zeros).float()
        k, total_steps, history_mean = self.rl_step()
        beta_k = beta(k, total_steps, self.args.gamma)
        l_smooth = self.args.penalty(entropy, history_mean, weights)
        metrics, all_ranks = self._metrics["train"], self.accelerator.gather(l_smooth.detach())
        metrics["smoothing_loss"].append(all_ranks.mean().item())
        metrics["applied_coef"].append(coef)
        metrics["beta_k"].append(beta_k)
        metrics["history_mean"].append(history_mean or 0.0)
        # TRL has divided its loss by the number of accumulated micro-batches
        term = coef * beta_k * l_smooth
        return loss + term / self.current_gradient_accumulation_steps


class Episode:
    """An episode in a slot of a world of envs.py, as TRL's `environment_factory` wants it.

    TRL does not know that an episode can end: one that has ended says so, and sends nothing more to
    the world. A reply leaves out what would only repeat the last one.
    """

    _slots = itertools.count()

    def __init__(self, world, turns):
        self._world, self._turns, self._slot = world, turns, next(self._slots)

    def reset(self, name, variation, **_):
        self._turns_left, self._last_parts = self._turns, ()
        now = self._world.last[self._slot] = self._world.start(self._slot, Task(name, variation))
        text = self._told(now)
        return f"\n\nTask: {self._now.goal}\n\n{text}" if self._now else "\n\n" + text

    def act(self, action: str) -> str:
        """Take one action in the world and see what it does.

        Args:
            action: The action, in one of the forms that you were told.
        """
        if self._is_over:
            return "Nothing happens: the episode is over."
        self._turns_left -= 1
        text = " ".join(str(action).lower().split()) or None
        return self._told(self._world.step({self._slot: text})[self._slot])

    def get_reward(self):
        """1 for success, else 0; None if the simulator died: TRL leaves such an episode out."""
        return None if self._now is None else float(self._now.success)

    def _told(self, now):
        self._now, self._is_over = now, now is None or now.done or not self._turns_left
        if now is None:
            return "The world broke down: the episode is over."
        # ALFWorld's `help` is of no use
        objects = ", ".join(name for name in now.objects if name != "help")
        parts = (now.look, now.inventory, objects and f"{self._world.chat_objects}: {objects}")
        new = [part.strip() for part in parts if part and part not in self._last_parts]
        self._last_parts = parts
        if self._is_over:
            new.append("\nThe episode is over. Say so in a few words, and call no tool.")
        return "\n".join([now.reply.strip(), *new])


# before a chat template without tools: calls become text, and what a tool says is the user's
CALLS_AS_TEXT = """{% set all = namespace(messages=[]) %}{% for m in messages %}
{% set role, text = 'user' if m.role == 'tool' else m.role, m.content ~ m.tool_calls %}
{% set all.messages = all.messages + [{'role': role, 'content': text}] %}
{% endfor %}{% set messages = all.messages %}"""
# to TRL, the rest of a line that begins with "Action:" is a call of `act`
ACT = {"type": "function", "function": {"name": "act", "arguments": {"action": "{content}"}}}
CALL = {"open": "Action:", "content": "text", "transform": ACT, "repeats": True}


def load_tokenizer(name):
    """A model's tokenizer. Where its chat template has no tools, a line of text is an action."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    except (OSError, ValueError) as error:
        raise SetupError(f"--model {name} cannot be loaded: {one_line(error)}") from error
    if tokenizer.chat_template is None:
        raise SetupError(f"--model {name} has no chat template; use an instruction-tuned model")
    if not supports_tool_calling(tokenizer):
        question = [{"role": "user", "content": "x"}]
        prompt = partial(tokenizer.apply_chat_template, question, tokenize=False)
        turn_begins = prompt(add_generation_prompt=True).removeprefix(prompt())
        opening = "{{ 'Action:' if add_generation_prompt }}"
        tokenizer.chat_template = CALLS_AS_TEXT + tokenizer.chat_template + opening
        call = {**CALL, "close": ["\n", tokenizer.eos_token]}
        start = {"defaults": {"role": "assistant"}, "start_anchor": turn_begins}
        tokenizer.response_template = {**start, "fields": {"tool_calls": call}}
    return tokenizer


def train(config):
    tokenizer, rank = load_tokenizer(config.model), config.lora_rank
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear") if rank else None
    if rank and config.bf16:
        config.model_init_kwargs = config.model_init_kwargs or {"dtype": "bfloat16"}
    names = config.tasks.replace(",", " ").split()
    with world_class(config.env)(names) as world:
        advice = "\n\nTake one action after the other until you are told that the episode is over."
        prompt = [{"role": "user", "content": world.chat_rules + advice}]
        # the tasks that train.py would draw
        tasks, n = world.tasks("train"), config.generation_batch_size // config.num_generations
        steps = range(config.max_steps // config.updates)
        drawn = [task for k in steps for task in draw_tasks(tasks, n, f"{config.seed} {k}")]
        rows = Dataset.from_list([{"prompt": prompt, **task._asdict()} for task in drawn])
        play = partial(Episode, world, config.turns)
        more = dict(processing_class=tokenizer, peft_config=lora, environment_factory=play)
        trainer = EPOTrainer(config.model, args=config, train_dataset=rows, **more)
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        trainer.save_model()
        # trainer_state.json, which holds the log
        trainer.save_state()


def main():
    parser = HfArgumentParser(EPOConfig, allow_abbrev=False)
    parser.set_defaults(**PAPER | FIXED)
    try:
        train(EPOConfig(**vars(read_arguments(parser, "epo_trl.py"))))
    # TRL's own are ValueErrors; a flag of its can need a package, such as vLLM
    except (SetupError, ValueError, OSError, ImportError) as error:
        sys.exit(f"epo_trl.py: {one_line(error)}")


if __name__ == "__main__":
    main()
