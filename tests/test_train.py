"""The loop: the same gradient for any split, the log, resuming after a kill, and one clear line
for bad input."""

import contextlib
import copy
import inspect
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import config
import train
import update
from config import PRESETS
from critic import Critic, explained_variance, update_critic, value_loss
from envs import Task
from epo import epo_loss, group_advantages, token_logp_and_entropy
from rollout import Episode, Turn, collect
from support.learner import Learner, make_schedules
from support.loading import ROOT, load_policy
from support.report import ENTROPY_EDGES, progress
from support.run_folder import SetupError, save_tensors, write_whole
from worlds.keyquest import KeyQuest

SMALL = [
    "--env",
    "keyquest",
    "--tasks",
    "short",
    "--steps",
    "4",
    "--turns",
    "8",
    "--tasks-per-step",
    "4",
    "--group-size",
    "4",
    "--minibatches",
    "2",
    "--eval-every",
    "2",
    "--eval-episodes",
    "6",
]


def run(arguments):
    """train.py, in this process: importing torch and transformers anew takes longer than most
    runs here."""
    output, error = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(error),
    ):
        patch.setattr(sys, "argv", ["train.py", *arguments])
        try:
            train.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            error.write("" if isinstance(stop.code, int) else stop.code)
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), error.getvalue())


def rows(out, timing=False):
    """log.jsonl without what a clock decides."""
    return [
        {k: v for k, v in json.loads(line).items() if timing or not k.startswith("seconds")}
        for line in open(os.path.join(out, "log.jsonl"))
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("runs") / "whole")
    result = run([*SMALL, "--out", out])
    assert result.returncode == 0, result.stderr
    return out, result.stdout


@pytest.fixture(scope="module")
def batch():
    policy, world = load_policy("tiny", "keyquest"), KeyQuest()
    episodes, _, _ = collect(
        world, policy, world.tasks("train")[:8], 7, 1.0, 8, torch.Generator().manual_seed(0)
    )
    advantages = torch.randn(8, generator=torch.Generator().manual_seed(1))
    owner = torch.tensor([i for i, e in enumerate(episodes) for _ in e.turns])
    return policy, episodes, advantages[owner]


def flat_batch(episodes, advantages, cfg):
    """-> the turns and their Batch; advantages (N,)"""
    turns = [turn for episode in episodes for turn in episode.turns]
    owner = torch.tensor([i for i, e in enumerate(episodes) for _ in e.turns])
    return turns, update.make_batch(turns, owner, advantages, cfg)


def played(lengths, invalid, wins=()):
    """A group of episodes by their numbers of turns and of invalid turns."""
    group = []
    for i, (turns, bad) in enumerate(zip(lengths, invalid)):
        rows = [Turn(t, [1], [2], [-1.0], [0.5], invalid=t < bad) for t in range(turns)]
        group.append(Episode(Task("find-plant", 0), rows, success=i in wins))
    return group


def group_advantages_of_turns(episodes, cfg):
    """GRPO's advantages as rl_step makes them -> a list for each episode."""
    turns = [turn for episode in episodes for turn in episode.turns]
    owner = torch.tensor([i for i, e in enumerate(episodes) for _ in e.turns])
    returns = train.episode_returns(episodes, cfg)
    tasks = [episode.task for episode in episodes]
    advantages = train.grpo_advantages(episodes, tasks, returns, cfg)[owner]
    advantages = advantages - train.invalid_penalties(turns, cfg)
    return [advantages[owner == i] for i in range(len(episodes))]


def test_an_episode_that_dies_early_never_beats_its_group_for_being_short():
    """Seven play 12 turns, 7 to 12 of them invalid; the eighth dies in its first turn.

    Normalised with the return, as the paper has it, the penalty would give the eighth +2.24.
    """
    invalid, cfg = [10, 8, 12, 9, 10, 11, 7, 0], config.Config()
    normalised = group_advantages(-0.01 * torch.tensor(invalid).double(), torch.zeros(8))
    assert normalised[7].item() == pytest.approx(2.24, abs=0.01)
    lengths = [12] * 7 + [1]
    advantages = group_advantages_of_turns(played(lengths, invalid), cfg)
    for of_episode, bad in zip(advantages, invalid):
        expected = torch.tensor([-0.01 * (t < bad) for t in range(len(of_episode))])
        assert torch.equal(of_episode, expected)
    # beside a winner it has the advantage of all who fail, and the penalty is as small as before
    won = group_advantages_of_turns(played(lengths, invalid, wins=(0,)), cfg)
    failure = (0 - 1 / 8) / (8**-0.5 + 1e-6)
    assert won[7].tolist() == pytest.approx([failure], abs=1e-6)
    assert won[2].tolist() == pytest.approx([failure - 0.01] * 12, abs=1e-6)
    assert won[0][-1].item() == pytest.approx(7 * -failure, abs=1e-5)


def test_returns_by_hand():
    """1 for success; with `--reward score` the points, of which a wrong focus leaves none."""
    episodes = played([2, 3, 1], [0, 0, 0], wins=(1,))
    for episode, score in zip(episodes, (50, 100, -100)):
        episode.score = score
    assert train.episode_returns(episodes, config.Config()).tolist() == [0, 1, 0]
    scores = config.Config(reward="score")
    assert train.episode_returns(episodes, scores).tolist() == [0.5, 1, 0]


def test_ppo_normalises_with_the_weights_of_eq_2():
    """Raw advantages 0 in one turn and 1 in three: an episode counts once, however long it is."""
    owner = torch.tensor([0, 1, 1, 1])
    values, returns = torch.tensor([0.0, -1.0, -1.0, -1.0]), torch.tensor([0.0, 0.0])
    advantages, targets = train.ppo_advantages(values, returns, owner, config.Config())
    # the mean is 1/2 and so is the standard deviation; by turns the mean would be 3/4
    assert advantages.tolist() == pytest.approx([-1, 1, 1, 1], abs=1e-5)
    assert targets.tolist() == [0, 0, 0, 0]


def test_the_reward_of_ppo_is_at_the_last_turn_alone():
    """γ = λ = 1: what each turn is to predict is the return of its episode."""
    owner, values = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0.5, 0.25, 0.75, 0.5, 0.0])
    returns = torch.tensor([1.0, 0.0])
    _, targets = train.ppo_advantages(values, returns, owner, config.Config())
    assert targets.tolist() == pytest.approx([1, 1, 0, 0, 0])
    # γ = 1/2, λ = 0: the next value, halved, and at the last turn the reward
    nearer = config.Config(algo="ppo", discount=0.5, gae_lambda=0.0)
    _, targets = train.ppo_advantages(values, returns, owner, nearer)
    assert targets.tolist() == pytest.approx([0.125, 1, 0.25, 0, 0])


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_an_invalid_turn_of_a_step_has_a_lower_advantage(algo, tmp_path, monkeypatch):
    """All that differs between the turns of a new PPO policy's episode, or of any of GRPO's."""
    batches = []

    def keep(turns, owner, advantages, cfg):
        batches.append((turns, owner, advantages))
        return update.make_batch(turns, owner, advantages, cfg)

    monkeypatch.setattr(train, "make_batch", keep)
    flags = f"--algo {algo} --temperature 3 --steps 1 --out {tmp_path}/run".split()
    train.train(config.Config(**config.parse_flags([*SMALL, *flags], None)))
    ((turns, owner, advantages),) = batches
    invalid = torch.tensor([turn.invalid for turn in turns])
    both = 0
    for i in range(int(owner.max()) + 1):
        own = owner == i
        of_valid, of_invalid = advantages[own & ~invalid], advantages[own & invalid]
        if len(of_valid) and len(of_invalid):
            both += 1
            assert (of_valid - of_valid[0]).abs().max() < 1e-6
            assert (of_invalid - (of_valid[0] - 0.01)).abs().max() < 1e-6
    assert both > 0


def test_each_use_of_chance_has_a_seed_of_its_own():
    seeds = {
        train.seed_of(config.Config(seed=seed), step, purpose)
        for seed in range(3)
        for step in range(5)
        for purpose in ("train", "iid", "ood")
    }
    assert len(seeds) == 3 * 5 * 3


def test_shares_of_tokens_by_hand():
    """Old log-prob 0; ratios of 1, 1.5 and 0.5; the corridor is from 0.25 to 1 nats."""
    x = lambda *values: torch.tensor(values)
    none = torch.zeros(3)
    weights = x(0.5, 0.3, 0.2)
    batch = update.Batch(none, none, none, none, none, none, none, weights)
    cfg = config.Config(kappa_l=0.5, kappa_r=2.0)
    logp, entropy = x(1.0, 1.5, 0.5).log(), x(0.1, 1.5, 0.5)
    _, terms = update.batch_loss(logp, entropy, batch, None, 0.5, 1.5, cfg)
    assert terms["below"] == pytest.approx(0.5)
    assert terms["above"] == pytest.approx(0.3)
    assert terms["clip_fraction"] == pytest.approx(0.3 + 0.2)


def test_episodes_that_failed_early_are_counted():
    episodes = played([12, 1, 5, 12], [0, 0, 2, 3], wins=(2,))
    assert train.episode_metrics(episodes, 12)["failed_early"] == 0.25


def test_the_distribution_of_token_entropies_is_weighted_as_eq_2():
    """Two episodes: one turn of two tokens; two turns of one token, and of three."""
    episodes = played([1, 2], [0, 0])
    lengths = iter((2, 1, 3))
    for turn in (turn for episode in episodes for turn in episode.turns):
        n = next(lengths)
        turn.response, turn.logp, turn.entropy = [2] * n, [-1.0] * n, [1.0, 0.0, 20.0][:n]
    _, flat = flat_batch(episodes, torch.zeros(3), config.Config())
    row = update.token_metrics(flat, 0.5)
    # the bin that has 1.0, the first one and the last one
    assert ENTROPY_EDGES[9] < 1.0 < ENTROPY_EDGES[10]
    zero, one, twenty = 1 / 4 + 1 / 12, 1 / 4 + 1 / 4 + 1 / 12, 1 / 12
    expected = {0: zero, 9: one, 31: twenty}
    histogram = [expected.get(i, 0.0) for i in range(32)]
    assert row["entropy_histogram"] == pytest.approx(histogram, abs=1e-6)
    assert row["first_entropy"] == pytest.approx(1.0) and row["first_above"] == pytest.approx(1.0)
    rest = zero + twenty
    assert row["rest_entropy"] == pytest.approx(20 * twenty / rest)
    assert row["rest_above"] == pytest.approx(twenty / rest)


def test_responses_of_one_token_have_no_rest():
    _, flat = flat_batch(played([2, 1], [0, 0]), torch.zeros(3), config.Config())
    row = update.token_metrics(flat, float("inf"))
    assert row["rest_entropy"] is None and row["rest_above"] is None and row["first_above"] == 0


def gradient(batch, **options):
    """The gradients that `update` hands to the optimizer, and its log."""
    policy, episodes, advantages = batch
    policy = copy.copy(policy)
    policy.model = copy.deepcopy(policy.model).double()
    policy.reference = copy.deepcopy(policy.model).requires_grad_(False)
    for p in policy.model.parameters():
        p.data += 0.01 * torch.randn(
            p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype
        )
    taken = []

    class Record:
        def step(self):
            taken.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))

        def zero_grad(self):
            policy.model.zero_grad()

    cfg = config.Config(
        **{
            "minibatches": 1,
            "grad_clip": 1e9,
            "kl_coef": 0.3,
            "entropy_coef": 0.5,
            "kappa_l": 0.5,
            "kappa_r": 1.2,
            "alpha": 1.0,
            **options,
        }
    )
    torch.manual_seed(0)
    learner = Learner(policy, Record(), None, None, [])
    turns, flat = flat_batch(episodes, advantages, cfg)
    log = update.update(learner, turns, flat, 0.4, 1.5, cfg, progress("", 1))
    return taken, log


def test_gradient_is_the_same_for_any_micro_batch_size(batch, monkeypatch):
    """The loss is divided by the whole batch's weights, so memory settings can't change what is
    learnt."""
    (whole,), log = gradient(batch, tokens_per_batch=10**6)
    assert whole.abs().max() > 1e-3
    for size, at_once in ((1, 2**25), (50, 27), (300, 100), (10**6, 27 * 5)):
        monkeypatch.setattr(
            update, "LOGITS_AT_ONCE", at_once
        )  # 1, 3 and 5 tokens, of a vocabulary of 27
        (split,), other = gradient(batch, tokens_per_batch=size)
        assert (split - whole).abs().max() < 1e-5 * whole.abs().max()
        assert all(abs(other[k] - log[k]) < 1e-5 for k in log)


def test_gradient_is_that_of_the_direct_formula(batch):
    """`update` goes through the output matrix a few tokens at a time; here all logits of all
    tokens, one turn after another."""
    (taken,), log = gradient(batch)
    policy, episodes, advantages = batch
    model = copy.deepcopy(policy.model).double()
    start = copy.deepcopy(model)
    for p in model.parameters():
        p.data += 0.01 * torch.randn(
            p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype
        )
    loss, number = 0.0, 0
    for e in episodes:
        for t in e.turns:
            ids, n = torch.tensor([t.prompt + t.response]), len(t.response)
            logits = model(ids).logits[0, -n - 1 : -1]
            reference_logits = start(ids).logits[0, -n - 1 : -1].detach()
            tokens = torch.tensor(t.response)
            w = torch.full((n,), 1 / (n * len(e.turns) * len(episodes)), dtype=torch.float64)
            logp, entropy = token_logp_and_entropy(logits, tokens)
            part, _ = epo_loss(
                logp=logp,
                old_logp=torch.tensor(t.logp),
                entropy=entropy,
                advantages=advantages[number],
                weights=w,
                history_mean=0.4,
                beta_k=1.5,
                entropy_coef=0.5,
                kappa_l=0.5,
                kappa_r=1.2,
                alpha=1.0,
                reference_logp=token_logp_and_entropy(reference_logits, tokens)[0],
                kl_coef=0.3,
            )
            loss = loss + part
            number += 1
    loss.backward()
    direct = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (taken - direct).abs().max() < 1e-5 * direct.abs().max() and abs(
        loss.item() - log["loss"]
    ) < 1e-6


def test_the_gradient_is_clipped(batch):
    (clipped,), log = gradient(batch, grad_clip=0.01)
    assert log["grad_norm"] > 0.02
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_mini_batches_are_an_unbiased_split_of_the_batch(batch):
    """Without a step in between, the mean of the mini-batches' gradients is the gradient of the
    batch (Eq. 2's weights)."""
    (whole,), log = gradient(batch)
    parts, other = gradient(batch, minibatches=4)
    assert len(parts) == 4 and (sum(parts) / 4 - whole).abs().max() < 1e-5 * whole.abs().max()
    assert abs(other["loss"] - log["loss"]) < 1e-5


def test_logged_terms_add_up_to_the_loss(batch):
    _, log = gradient(batch)
    total = (
        log["policy_loss"]
        - 0.5 * (log["entropy_loss"] - 1.5 * log["smoothing_loss"])
        + 0.3 * log["kl"]
    )
    assert abs(total - log["loss"]) < 1e-6 and log["smoothing_loss"] > 0 and log["kl"] > 0


@pytest.mark.parametrize(
    "options,changed",
    [
        ({"entropy_decay": 0.5}, True),
        ({"shaping": 0.4}, True),
        ({"entropy_decay": 0.0, "shaping": 0.0}, False),
    ],
)
def test_variants_reach_the_gradient_and_are_nothing_at_zero(batch, options, changed):
    (plain,), log = gradient(batch, turns=7)
    (other,), other_log = gradient(batch, turns=7, **options)
    assert torch.equal(plain, other) != changed
    assert other_log["smoothing_loss"] == log["smoothing_loss"]


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_indicator_equals_base_in_every_weight_and_the_hinge_does_not(algo, tmp_path):
    """v1's smoothing after 3 steps on KeyQuest: bit for bit the weights of a run without
    smoothing. Under PPO too: the published
    launcher passed its smoothing flags for GRPO only."""
    weights = {}
    for form in ("off", "indicator", "hinge"):
        out = str(tmp_path / form)
        assert (
            run(
                [
                    *SMALL,
                    "--algo",
                    algo,
                    "--steps",
                    "3",
                    "--smoothing",
                    form,
                    "--kappa-r",
                    "1",
                    "--alpha",
                    "1",
                    "--entropy-coef",
                    "0.01",
                    "--out",
                    out,
                ]
            ).returncode
            == 0
        )
        weights[form] = torch.load(os.path.join(out, "checkpoint.pt"))["model"]
    same = {
        form: all(torch.equal(weights[form][name], w) for name, w in weights["off"].items())
        for form in weights
    }
    assert same == {"off": True, "indicator": True, "hinge": False}


def test_window_and_constant_weight(tmp_path):
    out = str(tmp_path / "out")
    assert run([*SMALL, "--window", "1", "--dynamic-weight", "off", "--out", out]).returncode == 0
    log = rows(out)[:-1]
    assert [r["beta"] for r in log] == [1.0] * 4 and [r["history_mean"] for r in log[1:]] == [
        r["entropy"] for r in log[:-1]
    ]


def test_a_loss_that_is_not_finite_stops_before_the_update(batch, tmp_path):
    policy, episodes, advantages = batch
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1.0)
    cfg = config.Config(minibatches=1, kl_coef=0.0, out=str(tmp_path))
    learner = Learner(policy, optimizer, None, None, [])
    turns, flat = flat_batch(episodes, advantages * float("nan"), cfg)
    with pytest.raises(SetupError, match="not finite"):
        update.update(learner, turns, flat, None, 2.0, cfg, progress("", 1))
    saved = torch.load(tmp_path / "bad-batch.pt")
    assert saved["turns"][0]["prompt"] == episodes[0].turns[0].prompt
    assert len(saved["advantages"]) == sum(len(t["response"]) for t in saved["turns"])
    assert all(torch.equal(v, before[k]) for k, v in policy.model.state_dict().items())
    policy.model.zero_grad()


def test_the_log_of_a_run(finished):
    out, printed = finished
    log = rows(out, timing=True)
    assert [r["step"] for r in log] == [0, 1, 2, 3, 4]
    assert ["iid_success" in r for r in log] == [
        True,
        False,
        True,
        False,
        True,
    ] and "success" not in log[-1]
    wanted = {
        "step",
        "reward",
        "success",
        "invalid",
        "entropy",
        "entropy_by_turn",
        "history_mean",
        "corridor_low",
        "corridor_high",
        "outside",
        "beta",
        "loss",
        "policy_loss",
        "entropy_loss",
        "smoothing_loss",
        "kl",
        "clip_fraction",
        "grad_norm",
        "lr",
        "turns",
        "tokens",
        "seconds_load",
        "seconds_generate",
        "seconds_environment",
        "seconds_train",
    }
    assert all(wanted <= r.keys() for r in log[:-1])
    # Algorithm 1: no reference in step 0, then the mean of the entropies of the steps before
    assert log[0]["history_mean"] is None and log[0]["smoothing_loss"] == 0
    for k in (1, 2, 3):
        mean = sum(r["entropy"] for r in log[:k]) / k
        # logged numbers have six digits
        assert log[k]["history_mean"] == pytest.approx(mean, rel=5e-6)
        assert log[k]["corridor_high"] == pytest.approx(2 * mean, rel=5e-6)
    assert log[0]["net_above_cap"] == 1 and log[2]["net_above_cap"] == pytest.approx(
        1 - 0.05 * log[2]["beta"]
    )
    assert log[0]["beta"] == 2 and log[2]["beta"] == pytest.approx(1 + math.exp(-3), rel=5e-6)
    assert len(log[0]["entropy_by_turn"]) == 8 and log[0]["clip_fraction"] < 0.2
    assert json.load(open(os.path.join(out, "config.json")))["turns"] == 8
    drawn = json.load(open(os.path.join(out, "tasks.json")))
    for split, tasks in drawn.items():
        assert len(tasks) == 6
        # the splits of KeyQuest have no task in common
        assert {Task(*task) for task in tasks} <= set(KeyQuest().tasks(split))
    assert "step   3" in printed and "evaluation: IID" in printed
    text = open(os.path.join(out, "transcripts", "step-0004.txt")).read()
    assert "[ood] task short" in text and "--- turn 1" in text


def test_a_run_killed_ten_times_at_random_ends_with_the_log_of_an_undisturbed_one(tmp_path):
    """kill -9 at any moment: in the rollout, the update, between the log and the checkpoint,
    while a file is written."""
    whole, out = str(tmp_path / "whole"), str(tmp_path / "killed")
    more = [*SMALL, "--steps", "16", "--eval-every", "4"]
    assert run([*more, "--out", whole]).returncode == 0
    step = sum(r["seconds"] for r in rows(whole, timing=True)) / 17
    for life in range(10):
        process = subprocess.Popen(
            [
                sys.executable,
                os.path.join(ROOT, "train.py"),
                *(["--resume"] if life else more),
                "--out",
                out,
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        # everything before is start-up
        assert any("writing to" in line for line in iter(process.stdout.readline, ""))
        time.sleep(random.uniform(0, 1.5 * step))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    with open(os.path.join(out, "log.jsonl"), "a") as log:
        log.write('{"step": 16, "rew')  # and half a row, as a full disk leaves it
    result = run(["--out", out, "--resume"])
    assert result.returncode == 0, result.stderr
    assert rows(out) == rows(whole) and [r["step"] for r in rows(out)] == list(range(17))


@pytest.mark.parametrize("env,program", [("scienceworld", "java"), ("alfworld", "alfworld_engine")])
def test_a_simulator_killed_from_outside_does_not_end_a_run(env, program, tmp_path):
    out = str(tmp_path / env)
    process = subprocess.Popen(
        [
            sys.executable,
            os.path.join(ROOT, "train.py"),
            "--env",
            env,
            "--games",
            "generated",
            "--steps",
            "3",
            "--turns",
            "8",
            "--tasks-per-step",
            "2",
            "--group-size",
            "4",
            "--eval-episodes",
            "2",
            "--out",
            out,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step   0"):
            time.sleep(0.3)  # into the next step
            found = subprocess.run(
                ["pgrep", "-P", str(process.pid), "-f", program], capture_output=True, text=True
            ).stdout.split()
            os.kill(int(found[0]), signal.SIGKILL)
    log = rows(out)
    assert (
        found
        and process.wait() == 0
        and len(log) == 4
        and all(r["episodes"] + r["lost"] == 8 for r in log[:3])
        and log[3]["iid_lost"] == 0
    )


def test_a_ppo_run_resumes_with_its_critic(tmp_path):
    """2 of 4 steps, then the rest, end with the log of 4: the critic and its optimizer are in the
    checkpoint."""
    whole, out = str(tmp_path / "whole"), str(tmp_path / "parts")
    assert run([*SMALL, "--algo", "ppo", "--group-size", "1", "--out", whole]).returncode == 0
    process = subprocess.Popen(
        [
            sys.executable,
            os.path.join(ROOT, "train.py"),
            *SMALL,
            "--algo",
            "ppo",
            "--group-size",
            "1",
            "--out",
            out,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step   1"):
            process.send_signal(signal.SIGKILL)
    process.wait()
    assert run(["--out", out, "--resume"]).returncode == 0
    assert rows(out) == rows(whole)
    assert all(
        {"value", "value_loss", "value_grad_norm", "explained_variance"} <= row.keys()
        for row in rows(out)[:-1]
    )


def test_critic_reads_the_last_prompt_token_whatever_the_batch(batch):
    policy, episodes, _ = batch
    torch.manual_seed(0)
    critic = Critic(policy.model)
    turns = [t for e in episodes for t in e.turns][:12]
    assert critic.values(turns, 5).tolist() == [0.0] * 12  # before it has learnt anything
    torch.nn.init.normal_(critic.head.weight)
    whole = critic.values(turns, 12)
    assert torch.allclose(critic.values(turns, 1), whole, atol=1e-5) and whole.std() > 0.1
    hidden = policy.model.model(torch.tensor([turns[3].prompt])).last_hidden_state[0, -1]
    assert torch.allclose(critic.head(hidden), whole[3], atol=1e-5)


def test_value_loss_by_hand():
    """Old 0, clip 0.5. Value 1: held at 0.5; towards a target of 2 the held error counts (1.5²),
    away from one of -1 the free one (2²)."""
    x = lambda *v: torch.tensor(v)
    assert value_loss(x(1.0, 1.0), x(0.0, 0.0), x(2.0, -1.0), 0.5).item() == pytest.approx(
        0.5 * (1.5**2 + 2**2) / 2
    )
    assert value_loss(x(0.25), x(0.0), x(1.0), 0.5).item() == pytest.approx(0.5 * 0.75**2)
    assert (
        explained_variance(x(1.0, 2.0, 3.0), x(1.0, 2.0, 3.0)) == 1
        and explained_variance(x(2.0, 2.0, 2.0), x(1.0, 2.0, 3.0)) == 0
    )
    assert explained_variance(x(1.0, 2.0), x(5.0, 5.0)) == 0


def test_critic_learns_the_same_for_any_micro_batch(batch):
    policy, episodes, _ = batch
    turns, heads = [t for e in episodes for t in e.turns], []
    targets = torch.tensor([float(len(t.prompt) % 3) for t in turns])
    for size in (10**6, 60):
        torch.manual_seed(0)
        critic = Critic(policy.model)
        optimizer = torch.optim.SGD(critic.parameters(), lr=0.01)
        log = update_critic(
            critic,
            optimizer,
            turns,
            torch.zeros(len(turns)),
            targets,
            config.Config(critic_minibatches=2, tokens_per_batch=size),
        )
        heads.append(critic.head.weight.detach())
    assert log["value_loss"] == pytest.approx(0.5 * (targets**2).mean().item(), rel=0.1)
    assert heads[0].abs().max() > 1e-3 and torch.allclose(*heads, atol=1e-6)


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_it_learns(algo, tmp_path):
    """From a start that can write and walk and has no idea what for, to 90 % on layouts it never
    saw, within a minute."""
    out = str(tmp_path / algo)
    result = run(
        [
            "--env",
            "keyquest",
            "--tasks",
            "short",
            "--algo",
            algo,
            "--steps",
            "32",
            "--turns",
            "20",
            "--minibatches",
            "4",
            "--kl-coef",
            "0.01",
            "--eval-every",
            "8",
            "--eval-episodes",
            "50",
            "--out",
            out,
        ]
    )
    assert result.returncode == 0, result.stderr
    evaluations = [r["iid_success"] for r in rows(out) if "iid_success" in r]
    assert evaluations[0] < 0.5 and max(evaluations[1:]) > 0.9, evaluations


def test_a_run_killed_before_its_first_checkpoint_starts_over(finished, tmp_path):
    out = str(tmp_path / "early")
    shutil.copytree(finished[0], out)
    os.remove(os.path.join(out, "checkpoint.pt"))
    result = run(["--out", out, "--resume"])
    assert result.returncode == 1 and one_line(result.stderr) and "log of several" in result.stderr
    log = os.path.join(out, "log.jsonl")
    first_row = open(log).readline()
    with open(log, "w") as file:
        file.write(first_row)
    result = run(["--out", out, "--resume"])
    assert result.returncode == 0, result.stderr
    assert rows(out) == rows(finished[0])


def test_a_saved_policy_scores_as_at_the_end_of_its_run(finished):
    result = run(["--evaluate", os.path.join(finished[0], "checkpoint.pt")])
    assert result.returncode == 0, result.stderr
    last = rows(finished[0])[-1]
    assert result.stdout.splitlines()[-1].split() == [
        "all",
        f"{last['iid_success']:.3f}",
        f"{last['ood_success']:.3f}",
    ]
    assert (
        run(
            ["--evaluate", os.path.join(finished[0], "checkpoint.pt"), "--eval-episodes", "3"]
        ).returncode
        == 0
    )
    for flag, value in (
        ("--lora-rank", "4"),
        ("--model", os.path.join(ROOT, "models", "scienceworld")),
    ):
        result = run(["--evaluate", os.path.join(finished[0], "checkpoint.pt"), flag, value])
        assert (
            result.returncode == 1
            and one_line(result.stderr)
            and "leave out --model" in result.stderr
        )


def test_resume_refuses_a_changed_flag_and_a_damaged_checkpoint(finished, tmp_path):
    out = str(tmp_path / "damaged")
    shutil.copytree(finished[0], out)
    result = run(["--out", out, "--resume", "--lr", "0.5"])
    assert result.returncode == 1 and one_line(result.stderr) and "--lr" in result.stderr
    path = os.path.join(out, "checkpoint.pt")
    torch.save({"turns": []}, os.path.join(out, "bad-batch.pt"))
    result = run(["--evaluate", os.path.join(out, "bad-batch.pt")])
    assert result.returncode == 1 and one_line(result.stderr) and "cannot be read" in result.stderr
    os.truncate(path, os.path.getsize(path) // 2)
    before = open(os.path.join(out, "log.jsonl")).read()
    result = run(["--out", out, "--resume"])
    assert result.returncode == 1 and one_line(result.stderr) and "cannot be read" in result.stderr
    assert open(os.path.join(out, "log.jsonl")).read() == before


def test_ctrl_c_stops_in_one_line_and_can_be_resumed(tmp_path):
    out = str(tmp_path / "stopped")
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, "train.py"), *SMALL, "--out", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step   0"):
            process.send_signal(signal.SIGINT)
            break
    process.stdout.read()
    error = process.stderr.read()
    assert process.wait() != 0 and one_line(error) and "--resume" in error
    assert run(["--out", out, "--resume"]).returncode == 0


def one_line(text):
    return len(text.strip().splitlines()) == 1 and "Traceback" not in text


@pytest.mark.parametrize(
    "arguments,says",
    [
        (["--env", "nowhere"], "nowhere"),
        (["--colour", "red"], "--colour"),
        (["--steps", "many"], "--steps"),
        (["--env", "scienceworld", "--tasks", "no-such-task"], "no-such-task"),
        (["--env", "keyquest", "--tasks", "no-such-task"], "no-such-task"),
        (["--simplifications", "hard"], "hard"),
        (["--group-size", "1"], "--group-size"),
        (["--algo", "ppo", "--group-size", "0"], "--group-size"),
        (["--gae-lambda", "0.9"], "--algo ppo"),
        (["--model", "missing/path"], "missing/path"),
        (["--minibatches", "3"], "doesn't divide"),
        (["--kappa-l", "3"], "kappa_l"),
        (["--alpha", "-1"], "alpha"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--steps", "0"], "--steps"),
        (["--resume"], "not a run folder"),
        (["--smoothing", "soft"], "soft"),
        (["--preset", "best"], "'best'"),
        (["--evaluate", "no/such/checkpoint.pt"], "no/such"),
        (["--algo", "ppo", "--gae-lambda", "1.5"], "--gae-lambda"),
        (["--smoothing", "indicator", "--entropy-coef", "0"], "indicator"),
        (["--device", "cuda"], "GPU"),
        (["--device", "gpu"], "'gpu'"),
        (["--seed", "1000000000000"], "--seed"),
        (["--critic-lr", "-1"], "--critic-lr"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, says, tmp_path):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = tmp_path / "new"
    result = run([*arguments, "--out", str(out)])
    assert (
        result.returncode and one_line(result.stderr) and says in result.stderr and not out.exists()
    )


def test_presets_differ_by_what_their_names_say(capsys):
    defaults = {f.name: f.default for f in config.fields(config.Config)}
    full = {name: {**defaults, **preset} for name, preset in PRESETS.items()}
    differ = lambda a, b: {key for key in defaults if full[a][key] != full[b][key]}
    assert all(preset.keys() <= defaults.keys() for preset in PRESETS.values())
    for world in ("scienceworld", "alfworld"):
        for algo in ("ppo", "grpo"):
            assert differ(f"{world}-{algo}-epo", f"{world}-{algo}-plain") == {
                "entropy_coef",
                "smoothing",
            }
            config.check(config.Config(**full[f"{world}-{algo}-epo"]))
    assert {
        name: differ("tiny-grpo-epo", f"tiny-grpo-{name}")
        for name in ("base", "indicator", "constant", "window", "plain", "ea")
    } == {
        "base": {"smoothing"},
        "indicator": {"smoothing"},
        "constant": {"dynamic_weight"},
        "window": {"window"},
        "plain": {"entropy_coef", "smoothing"},
        "ea": {"entropy_coef", "smoothing", "shaping"},
    }
    assert differ("tiny-ppo-epo", "tiny-grpo-epo") == {"algo"} and differ(
        "tiny-grpo-decay", "tiny-grpo-base"
    ) == {"entropy_decay"}
    cfg = config.parse(["--preset", "tiny-grpo-base", "--kappa-r", "3", "--out", "nowhere/yet"])
    assert (cfg.smoothing, cfg.kappa_r, cfg.env) == ("off", 3.0, "scienceworld")
    assert (
        "preset tiny-grpo-base: " in (text := capsys.readouterr().out)
        and "smoothing off" in text
        and "kappa_r 3.0" in text
    )


def test_an_existing_run_is_not_overwritten(finished):
    before = {f: os.path.getmtime(os.path.join(finished[0], f)) for f in os.listdir(finished[0])}
    result = run([*SMALL, "--out", finished[0]])
    assert result.returncode == 1 and one_line(result.stderr) and "--resume" in result.stderr
    assert before == {
        f: os.path.getmtime(os.path.join(finished[0], f)) for f in os.listdir(finished[0])
    }


def test_a_full_disk_keeps_the_old_file(tmp_path):
    path = str(tmp_path / "checkpoint.pt")
    write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of")
        raise OSError(28, "No space left on device")

    with pytest.raises(SetupError, match="No space left"):
        write_whole(path, fail)
    limit = resource.getrlimit(
        resource.RLIMIT_FSIZE
    )  # torch.save makes the error of a full disk into one of its own
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(SetupError, match="File too large"):
            save_tensors(path, torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert open(path).read() == "old" and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_every_option_is_used():
    """A coefficient that is defined and never read is a bug."""
    files = ["config.py", "train.py", "update.py", "critic.py", "envs.py"]
    files += ["support/learner.py", "support/loading.py"]
    source = "".join(open(os.path.join(ROOT, name)).read() for name in files)
    # to check a value is not to use it
    check = inspect.getsource(config.check)
    assert source.count(check) == 1
    source = source.replace(check, "")
    to_the_loss = config.settings_of(config.Config(), epo_loss)
    read = lambda name: re.search(rf"cfg\.{name}\b", source) or name in to_the_loss
    # the preset is read from the command line alone, before there is a Config
    unused = {f.name for f in config.fields(config.Config) if not read(f.name)}
    assert unused == {"preset"} and 'given.get("preset")' in source


def test_tasks_are_drawn_by_type_in_turn_and_from_the_seed():
    tasks = [Task("a", v) for v in range(100)] + [Task("b", v) for v in range(5)]
    drawn = train.draw(tasks, 8, "0 3")
    assert drawn == train.draw(tasks, 8, "0 3") != train.draw(tasks, 8, "0 4")
    assert sum(t.name == "b" for t in drawn) == 4 and len(set(drawn)) == 8
    assert len(train.draw([Task("a", 0)], 3, 0)) == 3


def test_learning_rate_rises_then_falls_and_a_resumed_schedule_goes_on():
    cfg = config.Config(steps=100, lr=1.0, warmup=0.1, min_lr=0.2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    learner = Learner(None, optimizer, None, None, [])
    rates, (schedule,) = [], make_schedules(cfg, learner, 0)
    for step in range(100):
        if step == 40:
            (schedule,) = make_schedules(cfg, learner, 40)
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[54] == pytest.approx(0.6, abs=0.01) and rates[99] == pytest.approx(0.2)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_an_evaluation_plays_every_task_a_part_at_a_time(monkeypatch, tmp_path):
    policy, world = load_policy("tiny", "keyquest"), KeyQuest()
    sizes, played = [], []

    def counted(world, policy, tasks, *more):
        episodes, lost, seconds = collect(world, policy, tasks, *more)
        sizes.append(len(tasks))
        played.extend(episode.task for episode in episodes)
        return episodes, lost + 1, seconds

    monkeypatch.setattr(train, "collect", counted)
    cfg = config.Config(env="keyquest", turns=4, max_tokens=4, out=str(tmp_path))
    (tmp_path / "transcripts").mkdir()
    tasks = {split: world.tasks(split)[:5] for split in ("iid", "ood")}
    row = train.evaluate(world, policy, tasks, cfg, 0, at_once=2)
    assert sizes == [2, 2, 1, 2, 2, 1]
    assert played == tasks["iid"] + tasks["ood"]
    assert row["iid_lost"] == row["ood_lost"] == 3
