"""The study: its tables are those of its logs, its statistics are right, its runner goes on."""

import csv
import json
import re
import shutil
import signal
import time
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from test_faults import no_process_is_left, refuses  # noqa: F401

import plot
import train
from config import decide, parse_flags
from support.run_folder import SetupError, read_log
from tools import study

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "results" / "study"
AT = {name: str(FOLDER / name) for name in ("alfworld", "coin", "main", "scienceworld", "short")}
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
SENTENCES = " ".join(PAGE.split())
NEW = "confident", "scienceworld-confident", "scienceworld-long"
CONFIDENT, ON_SCIENCEWORLD, LONG = NEW = [str(FOLDER / name) for name in NEW]
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")


def rows_of(column, page=PAGE):
    """The rows {column: cell} of the page's table that has a column of that name."""
    page = re.sub(r" *\| *", "|", page.replace("`", ""))
    for text in re.findall(r"(?:^\|.*\n)+", page, re.M):
        _, *rows = csv.DictReader(text.splitlines(), delimiter="|")
        if column in rows[0]:
            return rows
    raise LookupError(column)


@cache
def compared(outcome="success"):
    """All comparisons, with another outcome in the place of success."""
    declared = study.load

    def load(at):
        texts = [c.replace(" success ", f" {outcome} ") for c in declared(at).comparisons]
        return declared(at)._replace(comparisons=texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "load", load)
        return [row for at in AT.values() for row in study.compared(at)]


def test_tables_of_the_study_are_those_of_its_logs():
    text = (FOLDER / "tables.md").read_text(encoding="utf-8")
    assert text == study.tables(AT.values())
    # Holm: the smallest of n counts n times, the next n - 1 times, and none less than one before
    p = np.array([row["p"] for row in compared()])
    rows = np.array(rows_of("Holm", text))[p.argsort()]
    holm = np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1))
    found = [float(row["Holm"]) for row in rows]
    assert found == pytest.approx(holm.clip(max=1), abs=5e-4)
    kept = [row["study"] for row in rows if float(row["Holm"]) < 0.05]
    assert f"and {len(kept)} after Holm's correction, all in KeyQuest" in SENTENCES
    assert set(kept) == {"short", "coin"}


# an outcome in the place of success; claim, study, outcome and comparison; what the page says
COUNTS = """success | 1 | in {holds} of {all} comparisons, less in {fails}, and {undecided} are
success | 2 | wins more in {some} of {all} and less in {fails};
success | 2 scienceworld | and Student's t leaves it {by_t}.
success | 5 | alone in {some} of {all} comparisons, with α
success | 4 | with α 0.05 in {holds} of {all}.
success | . | Of the {all} comparisons {significant} have p < 0.05
iid_after | [12] | the same {all} comparisons: {gains}; {fails} losses on IID and
ood_after | [12] | comparisons: {gains}; 8 losses on IID and {sure} on OOD
ood_after | [12] | The bootstrap adds a ninth on OOD, PPO on ScienceWorld"""


@pytest.mark.parametrize("line", COUNTS.splitlines())
def test_sentences_of_the_comparisons(line):
    outcome, pattern, says = line.split(" | ")
    name = "{claim} {study} {outcome} {comparison}"
    rows = [row for row in compared(outcome) if re.match(pattern, name.format(**row))]
    counts = Counter(row["verdict"] for row in rows)
    of_none = {name: counts[name] or "none" for name in ("holds", "fails", "undecided")}
    decided = [row for row in rows if row["verdict"] != "undecided"]
    weak = [row["verdict"] for row in decided if row["t low"] <= 0 <= row["t high"]]
    numbers = {
        "all": len(rows),
        "some": counts["holds"],
        "gains": "a gain" if counts["holds"] else "no gain",
        "weak": len(weak),
        "by_t": "undecided" if weak else "decided",
        "sure": counts["fails"] - weak.count("fails"),
        "significant": sum(row["p"] < 0.05 for row in rows),
    }
    assert says.format(**rows[0], **of_none, **numbers) in SENTENCES


def test_arms_are_rows_of_all_tables():
    found = {}
    for name, at in AT.items():
        for row in study.arms_table(at):
            arm = re.sub("grpo-epo(.*)-(.*)", r"EPO, λ \2, α \1", row[name])
            arm = arm.replace("grpo-base-", "bonus, λ ").replace("grpo-plain", "GRPO")
            found[name, arm] = row
    outcomes = "seeds iid_after ood_after success highest".split()
    for row in rows_of("success in training"):
        _, world, arm, *cells = row.values()
        assert cells == [str(found[world, arm][name]) for name in outcomes]


ESCAPES = """have no advantage; {grpo_plain} seeds escape.
drifts:** {grpo_base_001} seeds with λ 0.01
With λ 0.03 {grpo_base_003} escape
nats. {grpo_epo3_001} seeds escape, late
published:** {grpo_epo005_0001} seeds escape
target: {grpo_adaptive} seeds escape
plain {ppo_plain}, the bonus {ppo_base_001}, α 3: {ppo_epo3_001}
success of any step is {highest:.2f}
first ten: in {plain} of plain, {published} of EPO as published, {strong} with α 3"""


def test_tables_of_the_confident_start():
    assert study.tables(NEW) == (FOLDER / "confident.md").read_text(encoding="utf-8")
    rows = [row for at in NEW for row in study.arms_table(at)]
    arms = [row for row in rows if not row.get("confident", "").startswith("ppo")]
    names = "seeds iid_after ood_after area highest".split()
    found = [[str(arm[name]) for name in names] for arm in arms]
    assert [[*row.values()][2:] for row in rows_of("area")] == found


def fail(runs):
    """How many of these runs do, by the protocol's rule for the pilots of experiment D."""
    # the last row is an evaluation
    success, entropy = (plot.stack(runs, name)[:, :-1] for name in ("success", "entropy"))
    lower = success[:, -20:].mean(1) < success[:, :10].mean(1)
    return f"{(lower | (entropy.max(1) > 2 * entropy[:, 0])).sum()} of {len(runs)} runs"


def test_how_many_seeds_escape_or_fail():
    """Three steps in a row with success of at least 0.5."""
    assert fail(*plot.load(FOLDER / "pilots-long.csv").values()) == "3 of 3 runs"
    long = [fail(*plot.load(f"{LONG}.csv/{arm}").values()) for arm in study.load(LONG).arms]
    escaped = dict(zip(("plain", "published", "strong"), long, strict=True))
    for arm in study.load(CONFIDENT).arms:
        (runs,) = plot.load(f"{CONFIDENT}.csv/{arm}").values()
        trios = np.lib.stride_tricks.sliding_window_view(plot.stack(runs, "success")[:, :60], 3, 1)
        name = arm.replace("-", "_").replace(".", "")
        escaped[name] = f"{(trios.min(2) >= 0.5).any(1).sum()} of {len(runs)}"
    runs = [run for arm in plot.load(f"{ON_SCIENCEWORLD}.csv").values() for run in arm]
    highest = np.nanmax(plot.stack(runs, "success"))
    for says in ESCAPES.format(highest=highest, **escaped).splitlines():
        assert says in SENTENCES


def means(runs, name):
    """Over the runs, of the steps that have such a number."""
    steps = plot.mean(plot.stack(runs, name))
    return steps[np.isfinite(steps)]


def test_table_of_the_main_command():
    arms = "scienceworld", "alfworld-generated", "alfworld-real"
    for row, arm in zip(rows_of("minutes"), arms, strict=True):
        (runs,) = plot.load(f"{AT['main']}.csv/{arm}").values()
        success = means(runs, "success")
        shares = [[success[:10].mean(), success[-10:].mean()]]
        shares += [means(runs, f"{split}_success") for split in ("iid", "ood")]
        minutes = np.nansum(plot.stack(runs, "seconds"), 1) / 60
        cells = [" → ".join(f"{share:.2f}" for share in column) for column in shares]
        assert [*row.values()][2:] == [", ".join(f"{x:.0f}" for x in minutes), *cells]


def test_table_of_the_pre_trained_model():
    for row in rows_of("runs"):
        (runs,) = plot.load(ROOT / "results" / row["runs"]).values()
        iid, ood = (means(runs, f"{split}_success") for split in ("iid", "ood"))
        before, after = (iid[0] + ood[0]) / 2, (iid[-1] + ood[-1]) / 2
        episodes = sum(2 * config["eval_episodes"] for config, _ in runs)
        error = sum(p * (1 - p) / episodes for p in (before, after)) ** 0.5
        highest = np.nanmax(plot.stack(runs, "entropy"), 1)
        hours = np.nansum(plot.stack(runs, "seconds")) / 3600
        assert row["cloned"] == f"{iid[0]:.2f} / {ood[0]:.2f}"
        assert row["after RL"] == f"{iid[-1]:.2f} / {ood[-1]:.2f}"
        assert row["gain"] == f"{after - before:+.2f} ±{error:.2f}"
        assert row["highest H̄"] == ", ".join(f"{nats:.2f}" for nats in highest)
        assert row["hours"] == f"{hours:.1f}"


def test_what_is_declared_is_what_the_protocol_says():
    arms = Counter()
    rows = re.findall(r"^\| \w, `([\w-]+)` \|.*\| (.*) \| (\d+) \|$", PROTOCOL, re.M)
    for name, names, seeds in rows:
        arms[name] += len(names.split(";"))
        assert study.load(FOLDER / name).seeds == [200, 200 + int(seeds)]
    for name in ["confident", *arms]:
        assert arms[name] == len(study.load(FOLDER / name).arms)
    # and its flags still come to the settings of the runs
    for name in ("alfworld", "coin", "scienceworld", "short"):
        # a newer Python has no ALFWorld
        if name != "alfworld" or find_spec("textworld"):
            study.settle(AT[name])


# seed 2 has one of the runs alone; entropies 1, 3, 2: jumps 2 and -1, deviation 1.5
TABLE = """arm,seed,step,success,entropy,iid_success,ood_success
a,0,0,0.5,1,,
a,1,0,0.75,1,,
a,1,1,0.75,3,,
a,1,2,0.75,2,,
a,1,3,,,0.75,0
a,2,0,0.25,1,,
b,0,0,0.25,1,,
b,1,0,0.25,1,,
"""


def test_in_how_many_runs_the_variance_of_entropy_falls():
    """Over four quarters, as v1's abstract has it."""
    falls = {True: [], False: []}
    for name in ("short", "coin", "scienceworld", "alfworld"):
        for config, rows in plot.read_study(f"{AT[name]}.csv").values():
            entropy = [row["entropy"] for row in rows if "entropy" in row]
            variances = [quarter.var() for quarter in np.array_split(entropy, 4)]
            plain = config["entropy_coef"] == 0
            if plain or (config["smoothing"] == "hinge" and config["alpha"] < 1):
                falls[plain].append(variances == sorted(set(variances), reverse=True))
    says = "falls in {} of {} runs with the paper's α in our earlier study, and in {} of {} plain"
    counts = [f(falls[plain]) for plain in (False, True) for f in (sum, len)]
    paper = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    assert says.format(*counts) in " ".join(paper.split())


def test_comparisons_by_hand(tmp_path):
    (tmp_path / "x.csv").write_text(TABLE)
    texts = ["1 success a < b", "1 success a > b", "1 jump a < b", "1 jump a > b"]
    at = declare(tmp_path, comparisons=texts, settings={"a": {}, "b": {}})
    rows = list(study.compared(at))
    assert [row["verdict"] for row in rows] == ["fails", "holds", "undecided", "undecided"]
    more = rows[1]
    assert [more[name] for name in ("seeds", "mean", "low", "high")] == [2, 0.375, 0.25, 0.5]
    # half the range times the 97.5th percentile of Student's t
    assert more["t high"] == pytest.approx(0.375 + 0.125 * 12.706, rel=1e-4)
    expected = {"jump": 1.5, "highest": 3, "iid_after": 0.75, "after": 0.375, "area": 0.75}
    assert expected.items() <= study.outcomes(at)["a"][1].items()


# ---- The runner

FLAGS = "--env keyquest --turns 5 --tasks-per-step 2 --group-size 2 --eval-episodes 2 --steps 4"


def declare(folder, **changes):
    declared = {"flags": FLAGS, "arms": {"a": "", "b": "--lr 0.01"}, "seeds": [0, 1]}
    (folder / "x.json").write_text(json.dumps(declared | changes))
    return str(folder / "x")


def test_a_table_that_is_read_and_written_is_the_same(tmp_path):
    runs = plot.read_study(AT["main"] + ".csv")
    study.write_table(str(tmp_path / "main"), {run: rows for run, (_, rows) in runs.items()})
    assert (tmp_path / "main.csv").read_bytes() == (FOLDER / "main.csv").read_bytes()


def test_a_stopped_study_goes_on(tmp_path, monkeypatch):
    at, running = declare(tmp_path, drawn=["a"]), tmp_path / "x.running"
    sleep, stopped = time.sleep, []

    def stop_after_a_step(seconds):
        if list(running.glob("a-seed0/log.jsonl")):
            with pytest.raises(SetupError, match="another process is writing"):
                study.run(at, 1)
            signal.raise_signal(signal.SIGTERM)
        sleep(seconds)

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", stop_after_a_step)
        note = lambda process: stopped.append(process.send_signal(signal.SIGTERM))
        patch.setattr("subprocess.Popen.terminate", note)
        refuses(study, "run", f"{at}.json", says="study.py: stopped; the same command goes on")
    assert len(stopped) == 1
    # another one of its runs is damaged
    (running / "b-seed0").mkdir()
    (running / "b-seed0" / "config.json").write_text("{")
    assert study.run(at, 2) == 1
    assert "cannot be read" in (running / "b-seed0.txt").read_text()
    (_, rows), *_ = plot.read_study(f"{at}.csv").values()
    assert len(rows[0]["entropy_by_turn"]) == 5
    train.train(decide(parse_flags([*FLAGS.split(), "--out", str(tmp_path / "whole")])))
    at_once = [row["entropy"] for row in read_log(tmp_path / "whole")[:-1]]
    assert [row["entropy"] for row in rows[:-1]] == pytest.approx(at_once, rel=1e-3)
    # nothing is run again, and nothing under other settings
    kept, before = study.load(at)._asdict(), Path(f"{at}.csv").read_bytes()
    assert kept["commits"]
    shutil.rmtree(running / "b-seed0")
    declare(tmp_path, **kept | {"arms": {"a": ""}})
    assert study.run(at, 1) == 0
    assert Path(f"{at}.csv").read_bytes() == before and not running.exists()
    declare(tmp_path, **kept | {"arms": {"a": "--lr 0.1"}})
    with pytest.raises(SetupError, match="a in .* has --lr 0.003, not 0.1; give"):
        study.run(at, 1)


BAD = {"no such": {"no such": 1}, "--clip must be": {"arms": {"a": "--clip 0"}}}
BAD |= {"unrecognized arguments: --no": {"arms": {"a": "--no 1"}}}


@pytest.mark.parametrize("says", BAD)
def test_bad_declarations_are_one_line(says, tmp_path):
    at = declare(tmp_path, **BAD[says])
    refuses(study, "run", f"{at}.json", says=says)
    assert not Path(f"{at}.running").exists()
