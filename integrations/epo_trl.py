"""EPO on TRL's GRPOTrainer, for those who need more than one GPU: accelerate, DeepSpeed, FSDP, vLLM and LoRA are TRL's.

    pip install -r requirements-trl.txt
    python epo_trl.py --env scienceworld --model Qwen/Qwen2.5-7B-Instruct --lora-rank 32                          # one GPU
    accelerate launch --num_processes 8 epo_trl.py --env scienceworld --lora-rank 32 --use_vllm --vllm_mode colocate      # eight
    accelerate launch --num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip 10.0.0.1 --main_process_port 29500 \\
        epo_trl.py --env scienceworld --deepspeed zero3.json          # two machines, all weights; --machine_rank 1 on the other

Flags that --help does not list are GRPOConfig's (`--use_vllm`, `--deepspeed`, `--beta 0`: the KL's weight).

What is the same as in train.py: a token's penalty, β_k, the worlds, the tasks of each step, success and the return. What is not:
TRL has no critic, so there is no PPO + EPO. An episode is one growing sequence, in which observations are the replies of a tool,
rather than a fresh prompt for each turn (and the names in sight are not listed), so averages are over the tokens of an episode, then
episodes, without Eq. 2's turns. L_H is TRL's entropy bonus, a mean over the tokens of a micro-batch: with one episode in each (`main`
insists) it is that average too. H̄_m is TRL's log, the mean over the optimizer steps of the first pass, so of policies that have begun
to learn. There are no evaluations.
A process starts simulators of its own, up to four Java machines of half a GB or more.
"""
import argparse
import functools
import itertools
import os

import torch
from trl import GRPOTrainer

from envs import ALFWorld, ScienceWorld, SetupError, Task
from epo import EntropyHistory, beta, smoothing_loss
from keyquest import KeyQuest


def check(args, kappa_l, kappa_r, alpha, gamma, smoothing):
    """Refuse what can't be, before anything is loaded. Raises ValueError."""
    if args is None or not args.entropy_coef or args.use_adaptive_entropy or args.top_entropy_quantile != 1:
        raise ValueError("EPOTrainer: λ is GRPOConfig's entropy_coef: it must be set, and constant, and act on all tokens "
                         "(no use_adaptive_entropy, no top_entropy_quantile)")
    if args.logging_strategy != "steps" or args.logging_steps != 1:
        raise ValueError(f"EPOTrainer: the entropy history is the log's, so it needs logging_steps=1, not {args.logging_steps}")
    if args.use_liger_kernel:
        raise ValueError("EPOTrainer: use_liger_kernel=True can't be used: entropies must come with a gradient")
    beta(0, 1, gamma)
    smoothing_loss(torch.zeros(1, 1), None, torch.ones(1, 1), kappa_l, kappa_r, alpha, smoothing)


class EPOTrainer(GRPOTrainer):
    """GRPOTrainer, its loss L_MT - λ·L_H (λ is `entropy_coef`), and λ·β_k·L_smooth: Eq. 6. smoothing: "hinge" or "indicator".

    Logged beside TRL's metrics: smoothing_loss (L_smooth), beta_k (β_k) and reference (H̄_W, 0 while there is no history).
    """

    def __init__(self, model, reward_funcs=None, args=None, *, kappa_l=0.0, kappa_r=2.0, alpha=0.05, gamma=3.0, smoothing="hinge", **more):
        check(args, kappa_l, kappa_r, alpha, gamma, smoothing)
        self.smoothing = {"kappa_l": kappa_l, "kappa_r": kappa_r, "alpha": alpha, "form": smoothing}
        self.beta_gamma = gamma                          # `self.beta` is TRL's: the weight of its KL
        super().__init__(model, reward_funcs, args, **more)

    def rl_step(self):
        """k, K and W_k. An RL step is a generation with the optimizer steps that learn from it, which all see the same β_k
        and W_k. H̄_m is what TRL logged as `entropy` in its first pass over the episodes: reduced over ranks, and in the
        trainer's state, so that a resumed run has it. -> int, int, EntropyHistory"""
        passes = self.args.steps_per_generation // self.args.gradient_accumulation_steps or 1       # optimizer steps per pass
        updates = self.args.steps_per_generation * self.num_iterations // self.args.gradient_accumulation_steps or 1
        k, history = self.state.global_step // updates, EntropyHistory()
        logged = {row["step"]: row["entropy"] for row in self.state.log_history if row.get("entropy") is not None}
        if len(logged) < self.state.global_step:
            raise RuntimeError(f"EPOTrainer: the log holds the entropy of {len(logged)} of {self.state.global_step} steps, so there is no history; "
                               "begin the run anew, with logging_steps=1")
        for m in range(k):
            history.append(sum(logged[m * updates + i + 1] for i in range(passes)) / passes)
        return k, self.state.max_steps // updates, history

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.entropies = result[1]                       # (B, L), with gradient
        return result

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)      # divided by the number of accumulated micro-batches already
        entropy, self.entropies = self.entropies, None
        if not self.model.training:
            return loss
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)                     # (B, L): not what the world wrote
        # Mean over the tokens of an episode, then episodes: as those are equally many in every micro-batch and on every rank,
        # the terms add up to the batch's however it is split. (It is epo.token_weights with an episode as one turn.)
        weights = mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
        k, total, history = self.rl_step()
        beta_k = beta(k, total, self.beta_gamma)
        smooth = smoothing_loss(entropy, history.mean, weights, **self.smoothing)
        for name, value in {"smoothing_loss": self.accelerator.gather(smooth.detach()).mean().item(), "beta_k": beta_k,
                            "reference": history.mean or 0.0}.items():
            self._metrics["train"][name].append(value)
        return loss + self.entropy_coef * beta_k * smooth / self.current_gradient_accumulation_steps


# ------------------------------------------------------------------------------------------------------ environments
class Episode:
    """One episode in a slot of a world of envs.py, as TRL's `environment_factory` wants it: every public method but `reset`
    and `get_reward` is a tool. TRL resets and steps its environments one after the other, in one thread.

    The row of the data set says which task: GRPO repeats the row, so a group plays the same one. TRL knows no "done": an
    episode that has ended says so, and sends nothing more to the world; a policy ends by a message without a call, which also
    ends an episode that is not won. The turn limit counts actions. What a reply would repeat of the last (the look, the
    inventory, the list of admissible actions) is left out.
    """
    _slots = itertools.count()
    invalid_penalty = 0.01

    def __init__(self, world, turns=0):
        self._world, self._slot, self._limit = world, next(self._slots), turns or world.turns

    def reset(self, task, variation, **_):
        self._now, self._turns, self._invalid, self._told = self._world.restart(self._slot, Task(task, variation)), 0, 0, ()
        return "\n\nThis task can't be played." if self._now is None else f"\n\nTask: {self._now.goal}\n\n{self._tell()}"

    def act(self, action: str) -> str:
        """
        Take one action in the world and see what it does.

        Args:
            action: The action, in one of the forms that you were told.
        """
        if self._over():
            return "Nothing happens: the episode is over."
        self._now = self._world.step({self._slot: " ".join(str(action).lower().split()) or None})[self._slot]
        self._turns += 1
        if self._now is None:
            return "The world broke down: the episode is over."
        self._invalid += self._now.invalid
        return self._tell() + ("\n\nThe episode is over. Say so in a few words, and call no tool." if self._over() else "")

    def get_reward(self):
        """1 for success, less 0.01 for each invalid action. None if the simulator died: TRL leaves such an episode out."""
        return None if self._now is None else float(self._now.success) - self.invalid_penalty * self._invalid

    def _over(self):
        return self._now is None or self._now.done or self._turns == self._limit

    def _tell(self):
        objects = ", ".join(o for o in self._now.objects if o != "help")               # ALFWorld's `help` is of no use
        parts = [self._now.reply, self._now.look, self._now.inventory, objects and f"{self._world.chat_objects}: {objects}"]
        told, self._told = self._told, parts[1:]
        return "\n".join(part.strip() for part in parts if part and part not in told)


WORLDS = {"scienceworld": ScienceWorld, "alfworld": ALFWorld, "keyquest": KeyQuest}


def rows(world, drawn):
    """The data set's rows: the rules as the prompt, which `reset` completes, and the task."""
    rules = f"{world.chat_rules}\n\nTake one action after the other until you are told that the episode is over."
    return [{"prompt": [{"role": "user", "content": rules}], "task": task.name, "variation": task.variation} for task in drawn]


def plain_actions(tokenizer):
    """For a model whose chat template knows no tools: its turn is begun with "Action:", what it writes in that line is the action (to
    TRL, a call of `act`), and replies are messages of the user. It can't end an episode, but writes on up to the turn limit."""
    user, begin = [{"role": "user", "content": "x"}], "Action:"
    bare, whole = (tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=prompt) for prompt in (False, True))
    tokenizer.chat_template = (
        "{% set all = namespace(m=[]) %}{% for m in messages %}{% set all.m = all.m + [{'role': 'user' if m.role == 'tool' else m.role, "
        "'content': m.content + (m.tool_calls | tojson if m.tool_calls else '')}] %}{% endfor %}{% set messages = all.m %}"
        + tokenizer.chat_template + "{{ '" + begin + "' if add_generation_prompt }}")
    call = {"type": "function", "function": {"name": "act", "arguments": {"action": "{content}"}}}
    tokenizer.response_template = {"defaults": {"role": "assistant"}, "start_anchor": whole.removeprefix(bare), "fields": {"tool_calls": {
        "open": begin, "close": ["\n", tokenizer.eos_token], "content": "text", "transform": call, "repeats": True}}}


# -------------------------------------------------------------------------------------------------------------- main
def main():
    import json

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, HfArgumentParser
    from transformers.trainer_utils import get_last_checkpoint
    from trl import GRPOConfig
    from trl.chat_template_utils import supports_tool_calling

    from train import draw
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    option = lambda flag, default, help, **more: parser.add_argument(flag, default=default, type=type(default), help=f"{help} ({default!r})", **more)
    option("--env", "scienceworld", "the world", choices=tuple(WORLDS))
    option("--tasks", "", "task types, comma-separated; default: all")
    option("--turns", 0, "turn limit; 0: the world's")
    option("--turn-tokens", 512, "most tokens the policy may write in a turn")
    option("--model", "Qwen/Qwen2.5-7B-Instruct", "an instruct model: a folder, or a name on the hub")
    option("--lora-rank", 0, "rank of LoRA adapters; 0: all weights learn")
    option("--steps", 125, "RL steps K")
    option("--updates", 4, "optimizer steps per RL step; times the number of processes it must divide the episodes of a step")
    option("--tasks-per-step", 16, "different tasks per step")
    option("--group-size", 8, "episodes of each task")
    option("--kappa-l", 0.0, "κ_l")
    option("--kappa-r", 2.0, "κ_r")
    option("--alpha", 0.05, "α")
    option("--gamma", 3.0, "γ")
    option("--smoothing", "hinge", "form of Eq. 3", choices=("hinge", "indicator"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output_dir")
    args, trl_flags = parser.parse_known_args()
    episodes, processes = args.tasks_per_step * args.group_size, int(os.environ.get("WORLD_SIZE", 1))
    if episodes % (processes * args.updates):
        parser.exit(2, f"epo_trl.py: {episodes} episodes a step can't be shared by {processes} processes in {args.updates} updates; see --updates\n")
    turns = args.turns or WORLDS[args.env].turns
    defaults = {                                         # the paper's, where there is one; a flag given beside them wins
        "output_dir": f"runs/trl-{args.env}", "learning_rate": 5e-6, "weight_decay": 0.01, "entropy_coef": 0.001, "beta": 0.01,
        "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": json.dumps({"min_lr_rate": 0.2}), "warmup_steps": 0.1,
        "loss_type": "grpo", "logging_steps": 1, "report_to": "none", "save_steps": 5 * args.updates, "bf16": torch.cuda.is_available(),
        "max_completion_length": 16384, "max_tool_calling_iterations": turns, "max_steps": args.steps * args.updates,
        "per_device_train_batch_size": 1, "num_generations": args.group_size, "generation_batch_size": episodes,
        "gradient_accumulation_steps": episodes // processes // args.updates, "shuffle_dataset": False,
        "generation_kwargs": json.dumps({"max_tokens" if {"--use_vllm", "--use-vllm"} & set(trl_flags) else "max_new_tokens": args.turn_tokens}),
        "model_init_kwargs": json.dumps({"dtype": "bfloat16" if args.lora_rank and torch.cuda.is_available() else "float32"})}   # as in rollout.py
    corridor = {"kappa_l": args.kappa_l, "kappa_r": args.kappa_r, "alpha": args.alpha, "gamma": args.gamma, "smoothing": args.smoothing}
    try:
        config, = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(
            [word for name, value in defaults.items() for word in (f"--{name}", str(value))] + trl_flags)
        check(config, **corridor)
        if args.resume and not (os.path.isdir(config.output_dir) and get_last_checkpoint(config.output_dir)):
            raise SetupError(f"--resume: there is no checkpoint in {config.output_dir}")
        tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    except ValueError as error:
        raise SetupError(str(error).splitlines()[0]) from error
    except OSError as error:
        raise SetupError(f"--model {args.model} can't be had; give a folder, or a name on the hub ({str(error).splitlines()[0]})") from error
    if config.per_device_train_batch_size != 1:
        parser.exit(2, "epo_trl.py: --per_device_train_batch_size must stay 1: only then are L_H and L_smooth the same average, and K is --steps\n")
    if not supports_tool_calling(tokenizer):
        print(f"{args.model}: its chat template has no tools; a line that it writes is taken for an action")
        plain_actions(tokenizer)
    with WORLDS[args.env](tuple(filter(None, args.tasks.split(",")))) as world:
        train_tasks = world.tasks("train")
        drawn = [task for step in range(args.steps) for task in draw(train_tasks, args.tasks_per_step, f"{config.seed} {step}")]
        trainer = EPOTrainer(
            args.model, args=config, processing_class=tokenizer, train_dataset=Dataset.from_list(rows(world, drawn)),
            environment_factory=functools.partial(Episode, world, turns),
            peft_config=LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear") if args.lora_rank else None, **corridor)
        trainer.train(resume_from_checkpoint=args.resume or None)
        trainer.save_model()
        trainer.save_state()                             # trainer_state.json: the log


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        raise SystemExit(f"epo_trl.py: {error}") from None
