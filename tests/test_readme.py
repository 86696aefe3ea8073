"""The README is true: its links, line numbers, files, flags, presets, metrics, tests and the numbers of its tables."""
import glob
import importlib
import json
import os
import re
import sys

import pytest

import sweep
from presets import PRESETS
from rollout import HERE

TEXT = open(os.path.join(HERE, "README.md")).read()
LINES = {}


def line(path, number):
    LINES[path] = LINES.get(path) or open(os.path.join(HERE, path)).read().splitlines()
    return LINES[path][number - 1]


def test_links_lead_to_files_and_to_the_line_that_defines_what_they_name():
    links = re.findall(r"\[([^\]]*)\]\(([^)#]+)(?:#L(\d+))?\)", TEXT)
    local = [(text, path, number) for text, path, number in links if "://" not in path]
    assert len(local) > 20
    for text, path, number in local:
        assert os.path.exists(os.path.join(HERE, path)), path
        if number:
            name = text.strip("`").split(".")[-1]
            assert re.match(rf"(def|class) {name}\b|{name} =", line(path, int(number)).strip()), f"{text}: line {number} of {path} is {line(path, int(number))!r}"


def test_the_tree_names_every_file_with_its_length():
    tree = dict(re.findall(r"^([\w./]+\.py) +(\d+) ", TEXT, re.M))
    assert tree.keys() == {os.path.basename(path) for path in glob.glob(os.path.join(HERE, "*.py"))}
    assert {path: int(n) for path, n in tree.items()} == {path: len(open(os.path.join(HERE, path)).readlines()) for path in tree}


def help_of(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(script.removesuffix(".py")).main()
    return set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))


def test_flags_and_files_of_its_commands_exist(monkeypatch, capsys):
    known = {script: help_of(script, monkeypatch, capsys) for script in ("train.py", "sweep.py", "plot.py", "bench.py", "warmstart.py")}
    known["sweep.py"] |= known["train.py"]                                       # passes on what it doesn't know
    commands = re.findall(r"python (\w+\.py)([^`\n#|]*)", TEXT)
    assert {script for script, _ in commands} >= known.keys()
    for script, arguments in commands:
        assert os.path.exists(os.path.join(HERE, script)), script
        if script in known:
            assert set(re.findall(r"(?<!\S)--[a-z][a-z-]*", arguments)) <= known[script], (script, arguments)
    assert set(re.findall(r"`(--[a-z][a-z-]*)", TEXT)) <= set.union(*known.values())


def test_targets_and_presets_exist():
    targets = re.findall(r"^(\w+):", open(os.path.join(HERE, "Makefile")).read(), re.M)
    named = re.findall(r"`?make (\w+)", TEXT)
    assert {"train", "test", "figures"} <= set(named) <= set(targets)
    named = set(re.findall(r"(?:tiny|scienceworld|alfworld)-(?:ppo|grpo)-\w+", TEXT))
    assert named and named <= PRESETS.keys()


def test_every_logged_metric_is_explained():
    logged = {key for path in glob.glob(os.path.join(HERE, "results", "**", "log.jsonl"), recursive=True) for row in open(path) for key in json.loads(row)}
    glossary = TEXT[TEXT.index("## Reading the curves"):]
    glossary = glossary[:glossary.index("\n## ")]
    assert len(logged) > 40
    assert not {key for key in logged if f"`{key}`" not in glossary}


def test_tests_that_it_names_exist():
    named = re.findall(r"(tests/test_\w+\.py)::(\w+)", TEXT)
    assert len(named) >= 8
    for path, name in named:
        assert f"def {name}(" in open(os.path.join(HERE, path)).read(), (path, name)


def test_the_tables_are_those_of_the_logs():
    """Rows `| preset or words | folder/preset | … |`: each cell from sweep.summary of the runs that are there."""
    rows = re.findall(r"^\|[^|]*\| `(results/[\w.-]+)/([\w-]+)` \| (\d) \|(.*)\|$", TEXT, re.M)
    assert len(rows) >= 6
    for folder, preset, seeds, cells in rows:
        runs = [sweep.summary(sweep.finished(run), 2) for run in sorted(glob.glob(os.path.join(HERE, folder, preset + "-seed*")))]
        both = lambda name: " / ".join(sweep.spread([r[f"{split}_{name}"] for r in runs]) for split in ("iid", "ood"))
        want = [both("before"), both("best"), both("last"), sweep.spread([r["jump"] for r in runs], 3), sweep.spread([r["highest"] for r in runs])]
        assert int(seeds) == len(runs) and [cell.strip() for cell in cells.split("|")] == want, (folder, preset, want)
