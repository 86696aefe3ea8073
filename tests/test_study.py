"""The study: its tables are those of its logs, its statistics are right, its runner goes on."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import train
from config import decide, parse_flags
from metrics import summary
from plot import read_study
from support.run_folder import SetupError, read_log
from tools import study

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "results" / "study"
AT = {name: str(FOLDER / name) for name in ("alfworld", "coin", "main", "scienceworld", "short")}
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")

# ---- The pages


def rows_of(column, page=PAGE):
    """The rows {column: cell} of the page's table that has a column of that name."""
    for table in re.findall(r"(?:^\|.*\n)+", page, re.M):
        lines = [line.split("|")[1:-1] for line in table.splitlines()]
        header, _, *rows = [[cell.strip(" `") for cell in line] for line in lines]
        if column in header:
            return [dict(zip(header, row, strict=True)) for row in rows]
    raise LookupError(column)


def compared():
    return [row for at in AT.values() for row in study.compared(at)]


def says(*texts):
    for text in texts:
        assert text in " ".join(PAGE.split()), text


def test_tables_of_the_study_are_those_of_its_logs():
    text = (FOLDER / "tables.md").read_text(encoding="utf-8")
    assert text == study.tables(AT.values())
    p = [row["p"] for row in compared()]
    holm = [max((len(p) - sorted(p).index(q)) * q for q in p if q <= each) for each in p]
    assert [row["Holm"] for row in rows_of("Holm", text)] == [f"{min(x, 1):.3f}" for x in holm]


def test_claims_are_those_of_the_comparisons():
    for row in rows_of("claim"):
        number = row.pop("claim")[0]
        for name, text in row.items():
            found = [r["verdict"] for r in study.compared(AT[name]) if r["claim"] == number]
            counts = [f"{word} {n}" for word, n in Counter(found).items()]
            assert sorted(text.split(", ")) == sorted(counts or ["-"])


def test_arms_are_rows_of_all_tables():
    for row in rows_of("success in training"):
        name, *rest = re.findall(r"[\d.]+|\w+", row["arm"])
        numbers = dict(zip(rest[::2], rest[1::2], strict=True))
        arm = {"GRPO": "grpo-plain", "bonus": "grpo-base"}.get(name, f"grpo-epo{numbers.get('α')}")
        arm += f"-{numbers['λ']}" if numbers else ""
        (found,) = [r for r in study.arms_table(AT[row["world"]]) if r[row["world"]] == arm]
        outcomes = "seeds iid_after ood_after success highest".split()
        assert list(row.values())[2:] == [str(found[name]) for name in outcomes]


def test_table_of_the_main_command():
    logs = {}
    for (arm, _), (_, rows) in read_study(AT["main"] + ".csv").items():
        logs.setdefault(arm, []).append(rows)
    for row, runs in zip(rows_of("minutes"), logs.values(), strict=True):
        column = lambda name, runs=runs: np.array([[r[name] for r in x if name in r] for x in runs])
        success = column("success").mean(0)
        numbers = [[success[:10].mean(), success[-10:].mean()]]
        numbers += [column(f"{split}_success").mean(0) for split in ("iid", "ood")]
        cells = [" → ".join(f"{share:.2f}" for share in shares) for shares in numbers]
        minutes = ", ".join(f"{total / 60:.0f}" for total in column("seconds").sum(1))
        assert list(row.values())[1:] == [minutes, *cells]


def test_table_of_the_pre_trained_model():
    for row in rows_of("runs"):
        logs = [read_log(run) for run in sorted((ROOT / "results" / row["runs"]).glob("run-*"))]
        runs = [summary(log, last=1) for log in logs]
        share = lambda split, when, runs=runs: np.mean([run[f"{split}_{when}"] for run in runs])
        before, after = [[share(s, when) for s in ("iid", "ood")] for when in ("before", "after")]
        episodes = 4 * (128 if row["runs"].startswith("gpu") else 36)
        error = sum(np.mean(x) * (1 - np.mean(x)) / episodes for x in (before, after)) ** 0.5
        seconds = sum(step["seconds"] for log in logs for step in log)
        assert list(row.values())[2:] == [
            "{:.2f} / {:.2f}".format(*before),
            "{:.2f} / {:.2f}".format(*after),
            f"{np.mean(after) - np.mean(before):+.2f} ±{error:.2f}",
            ", ".join(f"{run['highest']:.2f}" for run in runs),
            f"{seconds / 3600:.1f}",
        ]


def test_sentences_of_the_comparisons(monkeypatch):
    of = lambda claims, rows: [row for row in rows if row["claim"] in claims]
    count = lambda rows, verdict="holds": [row["verdict"] for row in rows].count(verdict)
    by_t = lambda row: not row["t low"] <= 0 <= row["t high"]
    found = compared()
    one, two, three, four, five = (of(claim, found) for claim in "12345")
    papers = [row for row in one if "-0.001 >" in row["comparison"]]
    assert count(one) == count(four) == count(three, "fails") == 0
    (gain,) = [row for row in two if row["verdict"] == "holds"]
    weak = [row for row in found if row["verdict"] != "undecided" and not by_t(row)]
    lower = [row for row in of("6", found) if row["outcome"] == "highest"]
    table = rows_of("Holm", study.tables(AT.values()))
    kept = [row["comparison"] for row in table if float(row["Holm"]) < 0.05]
    assert gain in weak and all(re.search("-(0.1|0.03) ", text) for text in kept)
    interval = f"[{gain['low']:.3f}, {gain['high']:.3f}]"
    says(
        f"none of {len(one)} comparisons, less in {count(one, 'fails')}, and",
        f"wins more in {count(two)} of {len(two)} and less in {count(two, 'fails')}.",
        f"With the paper's own λ all {count(papers, 'undecided')} are undecided",
        f"wins {gain['mean']:.3f} more than GRPO in training, {interval}",
        f"alone in {count(five)} of {len(five)} comparisons, with α 0.05 in none of {len(four)}.",
        f"lower in {count(lower)} of {len(lower)} comparisons elsewhere",
        f"in training in {count(three)} of {len(three)} comparisons on KeyQuest",
        f"Of the {len(found)} comparisons {sum(row['p'] < 0.05 for row in found)} have p < 0.05",
        f"and {len(kept)} after Holm's correction",
        f"{len(weak)} of these verdicts would be undecided",
    )
    # the same comparisons, of the evaluations
    declared, evaluated = study.load, []
    for outcome in (" iid_after ", " ood_after "):
        texts = lambda at: [c.replace(" success ", outcome) for c in declared(at).comparisons]
        other = lambda at: declared(at)._replace(comparisons=texts(at))
        monkeypatch.setattr(study, "load", other)
        evaluated.append(of("12", compared()))
    iid, ood = evaluated
    fails = [row for row in ood if row["verdict"] == "fails"]
    assert [r["comparison"] for r in fails if not by_t(r)] == ["ppo-epo0.05-0.001 > ppo-plain"]
    assert count(iid) == count(ood) == 0
    losses = f"{count(iid, 'fails')} losses on IID and {len(fails) - 1} on OOD"
    says(f"same {len(iid)} comparisons: no gain; {losses}")


def test_sentences_of_the_arms():
    runs = {name: study.outcomes(at) for name, at in AT.items()}
    of = lambda name, arm, outcome: [run[outcome] for run in runs[name][arm].values()]
    mean = lambda name, arm, outcome="highest": np.mean(of(name, arm, outcome))
    epo = [(name, arm) for name in ("short", "coin") for arm in runs[name] if "-epo" in arm]
    assert all(mean(n, arm) > mean(n, arm.split("-")[0] + "-plain") for n, arm in epo)
    arms = ("grpo-base-0.03", "grpo-epo0.05-0.03", "grpo-epo3-0.03", "grpo-plain")
    few = [sum(share < 0.05 for share in of("coin", arm, "success")) for arm in arms]
    bonus, steady = "grpo-base-0.02", max(of("scienceworld", "grpo-epo3-0.02", "highest"))
    assert sum(nats > steady for nats in of("scienceworld", "grpo-plain", "highest")) == 1

    def span(outcome, large):
        arms = [arm for arm in runs["short"] if arm.endswith("-0.1") == large]
        values = sorted(mean("short", arm, outcome) for arm in arms)
        return f"{values[0]:.2f} to {values[-1]:.2f} of"

    says(
        f"in the means of all {len(epo)} arms",
        "in {} of 20 seeds with the bonus alone, {} with α 0.05, {} with α 3, and {}".format(*few),
        f"0.8 nats in {sum(x > 0.8 for x in of('scienceworld', bonus, 'highest'))} of 8 seeds",
        f"with α 3 no seed passes {steady:.2f}",
        f"{span('first_above', False)} the first tokens are above it",
        f"{span('first_above', True)} the first tokens and {span('rest_above', True)} the rest",
        f"ends at {span('rest_entropy', True).removesuffix(' of')} nats",
        f"and {span('invalid', True)} the turns are invalid",
        f"to {mean('scienceworld', bonus, 'rest_entropy'):.2f} nats and the first token from 0.21 "
        f"to {mean('scienceworld', bonus, 'first_entropy'):.2f}.",
    )


def test_the_protocol_is_what_is_declared():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \| (\d+) to (\d+) \|$", PROTOCOL, re.M)
    for name, arms, low, high in rows:
        declared = study.load(AT[name])
        assert declared.seeds == [int(low), int(high) + 1]
        # the option of the arm over turns has gone
        assert len(declared.arms) == int(arms) - (name != "alfworld")
        assert study.settle(AT[name]).settings == declared.settings


# ---- Statistics


def test_comparisons_by_hand(tmp_path):
    """Seed 2 has one of the runs alone. Entropies 1, 3, 2: jumps 2 and -1, deviation 1.5."""
    lines = ["arm,seed,step,success,entropy,iid_success,ood_success"]
    for arm, shares in {"a": (0.5, 0.75, 0.25), "b": (0.25, 0.25)}.items():
        for seed, share in enumerate(shares):
            lines += [f"{arm},{seed},{k},{share},{nats},," for k, nats in enumerate((1, 3, 2))]
            lines.append(f"{arm},{seed},3,,,{share},0")
    (tmp_path / "x.csv").write_text("\n".join(lines) + "\n")
    texts = [f"1 {outcome} a {sign} b" for outcome in ("success", "jump") for sign in "<>"]
    at = declare(tmp_path, comparisons=texts, settings={"a": {}, "b": {}})
    less, more, *equal = study.compared(at)
    assert (less["verdict"], more["verdict"], less["seeds"]) == ("fails", "holds", 2)
    assert (more["mean"], more["low"], more["high"]) == (0.375, 0.25, 0.5)
    # half the range times the 97.5th percentile of Student's t
    assert more["t high"] == pytest.approx(0.375 + 0.125 * 12.706, rel=1e-4)
    assert [row["verdict"] for row in equal] == ["undecided"] * 2
    numbers = study.outcomes(at)["a"][1]
    assert (numbers["jump"], numbers["highest"], numbers["iid_after"]) == (1.5, 3, 0.75)


# ---- The runner

FLAGS = "--env keyquest --turns 5 --tasks-per-step 2 --group-size 2 --eval-episodes 2 --steps "


def declare(folder, **changes):
    declared = {"flags": FLAGS + "2", "arms": {"a": "", "b": "--lr 0.01"}, "seeds": [0, 1]}
    (folder / "x.json").write_text(json.dumps(declared | changes))
    return str(folder / "x")


def test_a_table_that_is_read_and_written_is_the_same(tmp_path):
    table = {run: rows for run, (_, rows) in read_study(AT["main"] + ".csv").items()}
    study.write_table(str(tmp_path / "main"), table)
    assert (tmp_path / "main.csv").read_bytes() == (FOLDER / "main.csv").read_bytes()


def test_a_stopped_study_goes_on(tmp_path, monkeypatch, capsys):
    at, running = declare(tmp_path, drawn=["a"]), tmp_path / "x.running"
    given = parse_flags(study.load(at).given("a"))
    train.train(decide({**given, "out": str(tmp_path / "whole")}))
    # one of its runs was stopped after the first step, another one is damaged
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.report, "print_step", lambda *_: signal.default_int_handler(2, None))
        train.train(decide({**given, "out": str(running / "a-seed0")}))
    (running / "b-seed0").mkdir()
    (running / "b-seed0" / "config.json").write_text("{")
    assert study.run(at, 2) == 1
    assert "b-seed0 failed; see" in capsys.readouterr().out
    assert "cannot be read" in (running / "b-seed0.txt").read_text()
    ((run, (settings, rows)),) = read_study(f"{at}.csv").items()
    assert run == ("a", 0) and settings["lr"] == 0.003 and study.load(at).commits
    assert len(rows[0]["entropy_by_turn"]) == 5
    for row, whole in zip(rows, read_log(tmp_path / "whole"), strict=True):
        for name in row.keys() - {"seed", "seconds"}:
            assert row[name] == pytest.approx(whole[name], rel=1e-3), name
    # nothing is run again, and nothing under other settings
    before, kept = Path(f"{at}.csv").read_bytes(), study.load(at)._asdict()
    shutil.rmtree(running / "b-seed0")
    declare(tmp_path, **kept | {"arms": {"a": ""}})
    assert study.run(at, 1) == 0
    assert Path(f"{at}.csv").read_bytes() == before and not running.exists()
    declare(tmp_path, **kept | {"arms": {"a": "--lr 0.1"}})
    with pytest.raises(SetupError, match="a in .* has --lr 0.003, not 0.1; give"):
        study.run(at, 1)


def test_a_study_that_is_stopped_leaves_no_run(tmp_path, gone):
    at = declare(tmp_path, flags=FLAGS + "10000")
    command = [sys.executable, "-m", "tools.study", "run", f"{at}.json"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("*/*/log.jsonl")):
        assert process.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    runs = [int(child) for child in children.read_text().split()] if children.exists() else []
    with pytest.raises(SetupError, match="another process is writing"):
        study.run(at, 1)
    process.terminate()
    assert process.communicate()[1] == "study.py: stopped; the same command goes on from there\n"
    assert process.returncode == 1 and gone(runs)


BAD = {"no such": {"no such": 1}, "--clip must be": {"arms": {"a": "--clip 0"}}}
BAD |= {"unrecognized arguments: --no": {"arms": {"a": "--no 1"}}}


@pytest.mark.parametrize("text, changes", BAD.items(), ids=BAD)
def test_bad_declarations_are_one_line(text, changes, tmp_path, monkeypatch, capsys):
    at = declare(tmp_path, **changes)
    monkeypatch.setattr(sys, "argv", ["study.py", "run", f"{at}.json"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        study.main()
    err = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert text in err and len(err.splitlines()) == 1
    assert not Path(f"{at}.running").exists()
