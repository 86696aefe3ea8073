"""Named settings: `python train.py --preset NAME`; a flag given beside it wins. The paper's (its Tables 2 and 3), and tiny ones
for a CPU. Each differs from its neighbour by what its name says.

The paper counts mini-batches in turns (64 for PPO, 128 for GRPO, 256 on ALFWorld), we count updates: with 128 episodes of
about 20 turns that is near to what stands here.
"""
PAPER = {"steps": 125, "turns": 30, "max_tokens": 512, "tasks_per_step": 16, "group_size": 8, "weight_decay": 0.01, "warmup": 0.1,
         "min_lr": 0.2, "kl_coef": 0.01, "invalid_penalty": 0.01, "eval_every": 5, "eval_temperature": 0.4}
WORLDS = {
    "scienceworld": {"env": "scienceworld", "model": "Qwen/Qwen2.5-7B-Instruct", **PAPER, "alpha": 0.05},
    "alfworld": {"env": "alfworld", "model": "Qwen/Qwen2.5-3B-Instruct", **PAPER, "steps": 150, "turns": 50, "alpha": 0.1,
                 "lr": 5e-6, "minibatches": 16}}
ALGORITHMS = {"ppo": {"algo": "ppo", "lr": 3e-6, "minibatches": 32, "critic_lr": 1e-5, "critic_minibatches": 32},
              "grpo": {"algo": "grpo", "lr": 5e-6, "minibatches": 16}}
EPO = {"entropy_coef": 0.001, "smoothing": "hinge", "kappa_l": 0.0, "kappa_r": 2.0, "gamma": 3.0}
PLAIN = {"entropy_coef": 0.0, "smoothing": "off"}
ABLATIONS = {                                # what is changed of EPO
    "plain": PLAIN, "epo": {}, "base": {"smoothing": "off"}, "indicator": {"smoothing": "indicator"}, "constant": {"dynamic_weight": "off"},
    "window": {"window": 10}, "decay": {"smoothing": "off", "entropy_decay": 0.5}, "ea": {**PLAIN, "shaping": 0.4}}

PRESETS = {f"{world}-{algo}-{name}": {**ALGORITHMS[algo], **WORLDS[world], **EPO, **ABLATIONS[name]}
           for world in WORLDS for algo in ALGORITHMS for name in ("plain", "epo")}
PRESETS |= {f"tiny-{algo}-{name}": {"env": "scienceworld", "model": "tiny", "algo": algo, **EPO, **ABLATIONS[name]}
            for algo in ("ppo", "grpo") for name in ABLATIONS}
