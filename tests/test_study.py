"""The study: arms and claims are those of the protocol, intervals and verdicts are right."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from config import Config, parse_flags
from support.run_folder import SetupError, locked, read_log
from tools import study

ROOT = Path(__file__).parent.parent
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
CLAIM = study.Claim(1, "short", "success", "grpo-epo3-0.1", "grpo-plain", 1)
LESS = CLAIM._replace(sign=-1)


@pytest.mark.parametrize("world", study.WORLDS)
def test_flags_of_every_arm_are_those_that_its_name_says(world):
    flags = study.WORLDS[world][0].split()
    for name, more in study.ARMS[world].items():
        cfg = Config(**parse_flags([*flags, *more.split()], None))
        algo, kind, *coefficient = name.split("-")
        assert cfg.algo == algo
        assert cfg.entropy_coef == (float(coefficient[0]) if coefficient else 0)
        assert (cfg.smoothing == "off") == (kind in ("plain", "base"))
        if alpha := re.sub("[a-z]*", "", kind):
            assert cfg.alpha == float(alpha)
        # the paper's corridor
        assert (cfg.kappa_l, cfg.kappa_r, cfg.gamma) == (0, 2, 3)


def test_arms_seeds_and_claims_are_as_many_as_the_protocol_says():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \| (\d+) to (\d+) \|$", PROTOCOL, re.M)
    assert [row[0] for row in rows] == list(study.WORLDS)
    for world, arms, low, high in rows:
        _, first, seeds = study.WORLDS[world]
        assert len(study.ARMS[world]) + bool(study.GONE[world]) == int(arms)
        assert (first, first + seeds - 1) == (int(low), int(high))
    assert f"There are {len(study.CLAIMS)} comparisons" in PROTOCOL
    assert len(set(study.CLAIMS)) == len(study.CLAIMS)
    numbers = re.findall(r"^(\d)\. ", PROTOCOL, re.M)
    assert [int(number) for number in numbers] == list(study.SENTENCES)
    assert {claim.number for claim in study.CLAIMS} == study.SENTENCES.keys()


def test_a_study_that_is_killed_leaves_no_run(tmp_path):
    folder = str(tmp_path / "run")
    arguments = ["--env", "keyquest", "--steps", "500", "--out", folder]
    code = f"from tools import study; study.run_all({{{folder!r}: {arguments}}}, 1)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.time() + 60
    while not (tmp_path / "run" / "log.jsonl").exists() and time.time() < deadline:
        time.sleep(0.1)
    process.terminate()
    process.wait(30)
    # the lock of a folder ends with the process that has it
    with locked(folder):
        rows = len(read_log(folder))
    assert 0 < rows < 500


def test_a_study_goes_on_with_its_own_runs_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "FOLDER", str(tmp_path))
    monkeypatch.setitem(study.WORLDS, "short", (study.WORLDS["short"][0], 100, 1))
    monkeypatch.setitem(study.ARMS, "short", {"grpo-plain": study.ARMS["short"]["grpo-plain"]})
    (folder,) = study.waiting_runs(["short"])
    whole = ROOT / "results" / "study" / "short" / "grpo-plain-seed100"
    shutil.copytree(whole, folder)
    assert study.waiting_runs(["short"]) == {}
    # killed when it was finished, and before it was tidied
    for leftover in (Path(folder) / "checkpoint.pt", Path(f"{folder}.txt")):
        leftover.write_text("")
    assert study.waiting_runs(["short"]) == {}
    assert sorted(os.listdir(folder)) == ["config.json", "log.jsonl"]
    # killed before it was finished
    log = Path(folder) / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))
    assert study.waiting_runs(["short"]) == {folder: ["--resume", "--out", folder]}
    flags = study.WORLDS["short"][0] + " --lr 0.1"
    monkeypatch.setitem(study.WORLDS, "short", (flags, 100, 1))
    with pytest.raises(SetupError, match="has --lr 0.003, not 0.1"):
        study.waiting_runs(["short"])


def test_a_failed_run_of_the_study_is_counted(tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert study.run_all({folder: ["--env", "nowhere"]}, 1) == 1
    assert "failed; see" in capsys.readouterr().err


def test_arms_of_every_claim_exist():
    for claim in study.CLAIMS:
        arms = {*study.ARMS[claim.world], study.GONE[claim.world]}
        assert {claim.arm, claim.baseline} <= arms
        assert claim.arm != claim.baseline
        assert claim.outcome in study.OUTCOMES


def test_interval_is_near_the_normal_one_for_many_seeds():
    values = np.random.default_rng(1).normal(0.3, 2, 400)
    mean, low, high = study.interval(values)
    error = values.std(ddof=1) / 20
    assert mean == values.mean()
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
    assert study.interval(values) == (mean, low, high)


def test_interval_of_equal_differences_is_a_point():
    assert study.interval(np.full(5, 0.25)) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("low", "high", "more", "less"),
    [
        (0.1, 0.3, "holds", "fails"),
        (-0.3, -0.1, "fails", "holds"),
        (-0.1, 0.3, "undecided", "undecided"),
        (0.0, 0.3, "undecided", "undecided"),
    ],
)
def test_verdict(low, high, more, less):
    assert study.verdict(CLAIM, low, high) == more
    assert study.verdict(LESS, low, high) == less


def write_run(folder, success, entropy):
    folder.mkdir(parents=True)
    config = {**vars(Config()), "steps": len(success)}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [
        {"step": step, "success": won, "entropy": nats, "kl": 0.1, "iid_success": 1.0}
        for step, (won, nats) in enumerate(zip(success, entropy, strict=True))
    ]
    rows.append({"step": len(success), "iid_success": 1.0, "ood_success": 1.0})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_outcomes_by_hand(tmp_path):
    write_run(tmp_path / "run", [0.5, *[0.2] * 5, *[0.4] * 5], [1.0, 3.0, *[2.0] * 9])
    numbers = study.outcomes(study.finished(tmp_path / "run"))
    # the last ten of eleven steps
    assert numbers["success"] == pytest.approx(0.3)
    assert numbers["highest"] == 3
    # changes +2, -1, and eight times 0
    assert numbers["jump"] == pytest.approx((5 / 10 - 0.1**2) ** 0.5)


def test_differences_are_of_equal_seeds_and_finished_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "FOLDER", str(tmp_path))
    for seed, arm, plain in ((100, 0.75, 0.5), (101, 0.5, 0.5), (103, 1.0, None)):
        for name, success in ((CLAIM.arm, arm), (CLAIM.baseline, plain)):
            if success is not None:
                write_run(tmp_path / "short" / f"{name}-seed{seed}", [success] * 3, [1.0] * 3)
    assert study.differences(CLAIM).tolist() == [0.25, 0.0]


def test_tidying_keeps_the_outcomes(tmp_path):
    for name in ("arm-seed100", "arm-seed101"):
        folder = tmp_path / name
        write_run(folder, [0.2, 0.4], [1.0, 2.0])
        before = study.outcomes(study.finished(folder))
        (folder / "model").mkdir()
        (folder / "checkpoint.pt").write_text("")
        Path(f"{folder}.txt").write_text("")
        study.tidy(str(folder))
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "log.jsonl"]
        assert study.outcomes(study.finished(folder)) == before
        assert ("kl" in (folder / "log.jsonl").read_text()) == name.endswith("seed100")
        assert not Path(f"{folder}.txt").exists()


def test_page_has_what_the_study_prints():
    rows = study.decided()
    # which is why the option of the variant has gone
    assert [row[-1] for row in rows if row[0].number == 7] == ["fails", "fails"]
    for lines in study.blocks(rows):
        assert "\n".join(lines) in RESULTS


def test_sentences_of_the_short_answer():
    page, rows = " ".join(RESULTS.split()), study.decided()

    def counts(number):
        words = [row[-1] for row in rows if row[0].number == number]
        return [len(words), *map(words.count, ("holds", "fails", "undecided"))]

    def both(number):
        """In how many pairs of arms both outcomes hold, and how many pairs there are."""
        pairs = {}
        for claim, *_, word in rows:
            if claim.number == number:
                pairs.setdefault((claim.world, claim.arm), []).append(word)
        return list(pairs.values()).count(["holds", "holds"]), len(pairs)

    of_world = {row[0].number: row for row in rows if row[0].world == "scienceworld"}
    _, _, mean, low, high, _ = of_world[2]
    assert f"α 3 wins {mean:.3f} more than plain GRPO in training." in page
    assert f"The interval, {low:.3f} to {high:.3f}, ends near 0" in page
    (alfworld,) = [row[2] for row in rows if row[0][:2] == (2, "alfworld")]
    assert f"On ALFWorld the same arm wins {-alfworld:.3f} less, which Student's t" in page
    after = of_world[8][0]._replace(outcome="iid_after")
    _, _, high = study.interval(study.differences(after))
    less = -study.differences(after).mean()
    text = f"wins {of_world[8][2]:.3f} more than it in training, and {less:.3f} less in the IID"
    assert text in page and high < 0
    after = after._replace(outcome="ood_after")
    mean, low, high = study.interval(study.differences(after))
    assert f"On OOD it wins {-mean:.3f} less, with an interval around 0." in page
    assert low < 0 < high
    text = "Both together hold in {} of {} pairs of arms for claim 5, and in none of {} for claim 6"
    assert text.format(*both(5), both(6)[1]) in page and both(6)[0] == 0
    total, won, lost, undecided = counts(1)
    assert (
        f"In {total} comparisons it wins more in none, less in {lost}, and {undecided} are" in page
    )
    assert won == 0
    total, won, more_lost, undecided = counts(2)
    assert f"more in {won} of {total}, less in {more_lost}, and {undecided} are undecided." in page
    large = [row for row in rows if row[0].number in (1, 2) and row[-1] == "fails"]
    large = [row for row in large if row[0].arm.endswith(("-0.1", "-0.03"))]
    text = f"Of the {lost + more_lost} losses, {len(large)} are in KeyQuest with a λ that is 30 or"
    assert text in page
    papers = [row[-1] for row in rows if row[0].number == 1 and row[0].arm.endswith("-0.001")]
    assert papers == ["undecided"] * 3
    assert f"With the paper's own λ, all {len(papers)} comparisons are undecided." in page
    total, won, lost, _ = counts(3)
    assert (
        f"costs success in training** in {won} of {total} comparisons on KeyQuest, and helps"
        in page
    )
    assert lost == 0
    total, won, *_ = counts(5)
    assert f"With α 3 this holds in {won} of {total} comparisons" in page
    for outcome, text in (("highest", "it is lower in"), ("jump", "jumps are smaller in none")):
        words = [row[-1] for row in rows if row[0].number == 6 and row[0].outcome == outcome]
        assert f"{text} {words.count('holds') or ''} of {len(words)}".replace("  ", " ") in page
    doubtful = len(list(study.weak(rows))) - 2
    assert f"which is wider, these {doubtful} verdicts would be undecided" in page
    total, won, _, undecided = counts(4)
    assert f"it holds in none of {total}, and {undecided} are undecided" in page
    assert won == 0
    assert f"There are {len(rows)} comparisons here" in page


def test_on_keyquest_epo_has_more_entropy_than_plain():
    mean = lambda world, arm: np.mean(
        [study.outcomes(log)["highest"] for log in study.finished_runs(world, arm).values()]
    )
    arms = [(world, arm) for world in ("short", "coin") for arm in study.ARMS[world]]
    arms = [(world, arm) for world, arm in arms if "-epo" in arm]
    assert all(mean(world, arm) > mean(world, f"{arm[:4].strip('-')}-plain") for world, arm in arms)
    assert f"above plain's in the means of all {len(arms)} arms" in " ".join(RESULTS.split())


def test_where_episodes_of_coin_end():
    """The coin is worth 50 points, the chest 100."""
    page = " ".join(RESULTS.split())
    shares = []
    for algo in ("grpo", "ppo"):
        logs = study.finished_runs("coin", f"{algo}-plain").values()
        steps = [row for log in logs for row in log[-11:-1]]
        mean = lambda name, steps=steps: np.mean([row[name] for row in steps])
        shares += [(mean("score") - 100 * mean("success")) / 50, mean("success")]
    text = (
        "plain GRPO ends {:.2f} of its episodes at the coin and {:.2f} at the chest, "
        "plain PPO {:.2f} and {:.2f} (last ten steps)"
    )
    assert text.format(*shares) in page
    few = lambda arm: sum(
        study.outcomes(log)["success"] < 0.05 for log in study.finished_runs("coin", arm).values()
    )
    names = ("grpo-base-0.03", "grpo-epo0.05-0.03", "grpo-epo3-0.03", "grpo-plain")
    of_ppo = [few(name.replace("grpo", "ppo")) for name in names]
    assert "any term; PPO in {}, {}, {} and {}.".format(*of_ppo) in page
    text = (
        "{} of 20 seeds with the bonus alone, in {} with α 0.05, in {} with α 3, and in {} without"
    )
    assert text.format(*map(few, names)) in page


def test_runs_are_whole_and_those_of_the_protocol():
    """The settings of every committed run are those of its arm."""
    folders = sorted((ROOT / "results" / "study").glob("*/*-seed*"))
    for folder in folders:
        world, (arm, seed) = folder.parent.name, folder.name.split("-seed")
        # the runs of the variant differ from this arm in its option
        arm = arm.replace("turn3", "epo3")
        flags = [*study.WORLDS[world][0].split(), *study.ARMS[world][arm].split()]
        cfg = Config(**parse_flags([*flags, "--seed", seed], None))
        config = json.loads((folder / "config.json").read_text())
        names = "env algo tasks steps turns eval_episodes lr kl_coef entropy_coef smoothing alpha"
        given = {name: getattr(cfg, name) for name in names.split()}
        # None is for a default of the world
        given = {name: value for name, value in given.items() if value is not None}
        assert {name: config[name] for name in given} == given, folder
        assert config["seed"] == int(seed)
        assert not Path(config["out"]).is_absolute()
        assert study.finished(str(folder)), folder
