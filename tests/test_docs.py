"""The documentation is true: its links, commands, flags, presets, metrics, tests and numbers."""

import io
import json
import re
import runpy
import statistics
import sys
from contextlib import redirect_stdout
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from config import PRESETS
from support.report import summary
from support.run_folder import read_log

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS]
SPLITS = ("iid", "ood")
FLAG = r"(?<![\w-])--[a-z][\w-]*"
LAUNCHER = r"(?:python |accelerate launch [^\n`]*?(?=-m ))"
COMMAND = re.compile(LAUNCHER + r"(-m )?([\w./]+)([^\n`#|]*)")
# they are no part of this project
FOREIGN_MODULES = {"pip", "pytest", "venv"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(page):
    """The page, with the continued lines of its commands joined."""
    return page.read_text(encoding="utf-8").replace("\\\n", "")


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)", without_code(text_of(page)), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@each_page
def test_links_lead_to_files_and_headings(page):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(text_of(page)))
    local = [link for link in links if "://" not in link]
    assert local
    for link in local:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert target.suffix == ".md", f"{link}: a line number would soon be wrong"
            assert anchor in anchors(target), link


@cache
def flags_of(module):
    """The flags that `python -m module --help` lists."""
    printed, arguments = io.StringIO(), sys.argv
    sys.argv = [module, "--help"]
    try:
        with redirect_stdout(printed), pytest.raises(SystemExit):
            runpy.run_module(module, run_name="__main__")
    finally:
        sys.argv = arguments
    flags = set(re.findall(FLAG, printed.getvalue()))
    # the sweep passes on what it does not know
    return flags | flags_of("train") if module == "tools.sweep" else flags


def commands(text):
    """-> (module, its flags) of every command that runs a program of this project."""
    for is_module, name, arguments in COMMAND.findall(text):
        own_module = is_module and name not in FOREIGN_MODULES
        if own_module or name.endswith(".py"):
            module = name.removesuffix(".py").replace("/", ".")
            yield module, set(re.findall(FLAG, arguments))


@each_page
def test_files_and_flags_of_commands_exist(page):
    text = text_of(page)
    modules = {"train"}
    for module, flags in commands(text):
        path = module.replace(".", "/") + ".py"
        assert (ROOT / path).exists(), path
        if module == "integrations.epo_trl" and find_spec("trl") is None:
            continue
        if flags:
            modules.add(module)
            assert flags <= flags_of(module), (module, flags - flags_of(module))
    in_text = {flag for code in re.findall(r"`(--[^`]*)`", text) for flag in re.findall(FLAG, code)}
    in_variables = set(re.findall(FLAG, " ".join(re.findall(r'^[A-Z]+="(.*)"', text, re.M))))
    assert in_text | in_variables <= set.union(*map(flags_of, modules))


@each_page
def test_files_that_it_names_exist(page):
    text = text_of(page)
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\bresults/[\w.*/-]+", text):
        assert list(ROOT.glob(name.rstrip("./"))), name


@each_page
def test_make_targets_and_presets_exist(page):
    text = text_of(page)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"(?:^|`)make (\w+)", text, re.M)) <= set(targets)
    named = re.findall(r"(?:tiny|scienceworld|alfworld)-(?:ppo|grpo)-\w+", text)
    assert set(named) <= PRESETS.keys()


@each_page
def test_tests_and_functions_that_it_names_exist(page):
    text = text_of(page)
    for path, name in re.findall(r"(tests/test_\w+\.py)::(\w+)", text):
        assert f"def {name}(" in (ROOT / path).read_text(), (path, name)
    for name, path in re.findall(r"`(\w+)` in `([\w/]+\.py)`", text):
        code = (ROOT / path).read_text()
        assert re.search(rf"^\s*(def |class )?{name}\s*[(:=]", code, re.M), (path, name)


def test_each_difference_from_the_published_code_names_its_test():
    text = text_of(ROOT / "docs" / "paper.md")
    section = text.split("From the published code:\n")[1].split("From the paper:\n")[0]
    differences = section.split("\n- ")[1:]
    assert len(differences) >= 8
    assert all("`tests/test_" in difference for difference in differences)


def test_every_logged_metric_is_explained():
    logs = list(ROOT.glob("results/**/log.jsonl"))
    logged = {name for log in logs for row in log.open() for name in json.loads(row)}
    explained = re.findall(r"^\| `(\w+)` \|", text_of(ROOT / "docs" / "metrics.md"), re.M)
    assert len(logged) > 40
    assert not logged - set(explained)


def spread(values, digits=2):
    """The mean and its standard error over the seeds, as text."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.{digits}f} ±{error:.{digits}f}"


def both(name):
    """A number of `summary` on IID and on OOD."""

    def cell(logs):
        values = [[summary(log, last=2)[f"{split}_{name}"] for log in logs] for split in SPLITS]
        return " / ".join(map(spread, values))

    return cell


def each_seed(number):
    return lambda logs: ", ".join(f"{number(log):.2f}" for log in logs)


def training(log, steps):
    """The share of training episodes won in some steps, a slice."""
    return statistics.mean([row["success"] for row in log if "success" in row][steps])


def evaluations(split):
    """The evaluations of a single run, one after the other."""

    def cell(logs):
        (log,) = logs
        values = [row[f"{split}_success"] for row in log if f"{split}_success" in row]
        return " → ".join(f"{value:.2f}" for value in values)

    return cell


def first_and_last_ten(logs):
    (log,) = logs
    return f"{training(log, slice(10)):.2f} → {training(log, slice(-10, None)):.2f}"


# what a column of a table is, from the logs of the runs of its row
COLUMNS = {
    "before": both("before"),
    "after": both("after"),
    "Succ.*": both("best"),
    "Succ.": both("last"),
    "std(ΔH̄)": lambda logs: spread([summary(log, last=2)["jump"] for log in logs], 3),
    "max H̄": lambda logs: spread([summary(log, last=2)["highest"] for log in logs]),
    "highest H̄": each_seed(lambda log: summary(log, last=2)["highest"]),
    "training, last 5 steps": each_seed(lambda log: training(log, slice(-5, None))),
    "training, steps 0–9 → 30–39": first_and_last_ten,
    "IID after 0 → 20 → 40 steps": evaluations("iid"),
    "OOD after 0 → 20 → 40 steps": evaluations("ood"),
    "minutes": lambda logs: f"{sum(row['seconds'] for row in logs[0]) / 60:.0f}",
}


def cells(line):
    parts = re.split(r"(?<!\\)\|", line.strip())[1:-1]
    return [part.replace("\\", "").replace("`", "").strip() for part in parts]


def rows_of_runs(text):
    """The rows of the tables that have a column `runs` -> {column: cell} one by one."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        header, _, *rows = map(cells, table.splitlines())
        for row in rows if "runs" in header else []:
            yield dict(zip(header, row, strict=True))


def logs_of(runs):
    """A run folder in results/, or a folder and preset of which there are runs with seeds."""
    path = ROOT / "results" / runs.removeprefix("results/")
    folders = [path] if path.exists() else sorted(path.parent.glob(path.name + "-seed*"))
    return [read_log(folder) for folder in folders]


@each_page
def test_tables_are_those_of_the_logs(page):
    for row in rows_of_runs(text_of(page)):
        logs = logs_of(row["runs"])
        assert len(logs) in (1, 3), row
        known = row.keys() & COLUMNS.keys()
        assert known, row
        assert {name: row[name] for name in known} == {name: COLUMNS[name](logs) for name in known}


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1300


@each_page
def test_no_line_is_too_long(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120]
