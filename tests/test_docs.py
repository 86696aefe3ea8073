"""The documentation is true: its links, commands, flags, metrics, tests and numbers.

A reader's new file or other loss needs no change here. Tables of the study: tests/test_study.py.
"""

import json
import re
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_faults import call

import train
from config import decide
from support import report
from support.run_folder import read_log
from tools import memory

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
GPU, METRICS = DOCS / "gpu.md", DOCS / "metrics.md"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
FLAG = r"(?<![\w-])--[a-z][\w-]*"
LAUNCHER = r"(?:python |accelerate launch [^\n`]*?(?=-m ))"
COMMAND = re.compile(LAUNCHER + r"(-m )?([\w./]+)([^\n`#|]*)")
# they are no part of this project
FOREIGN_MODULES = {"pip", "pytest", "venv"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def read(path):
    return path.read_text(encoding="utf-8")


def text_of(page):
    """The page, with the continued lines of its commands joined."""
    return read(page).replace("\\\n", "")


def on_one_line(page):
    return " ".join(read(page).split())


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)", without_code(read(page)), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@each_page
def test_links_and_pictures_lead_to_files_and_headings(page):
    text = without_code(read(page))
    named = dict(re.findall(r"^\[([^\]]+)\]: (\S+)", text, re.M))
    # ![text][name], where a name stands for the path
    assert set(re.findall(r"\]\[(\w+)\]", text)) <= named.keys()
    for link in [*re.findall(r"\]\(([^)\s]+)\)", text), *named.values()]:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" not in link:
            assert target.exists(), link
            # a line number would soon be wrong
            assert not anchor or anchor in anchors(target), link


@cache
def flags_of(module):
    _, text, _ = call(import_module(module), "--help")
    return set(re.findall(FLAG, text))


@each_page
def test_files_and_flags_of_commands_exist(page):
    text, known = text_of(page), flags_of("train")
    for is_module, name, arguments in COMMAND.findall(text):
        path = name.replace(".", "/") + ".py" if is_module else name
        if name in FOREIGN_MODULES or not path.endswith(".py"):
            continue
        assert (ROOT / path).exists(), path
        flags = set(re.findall(FLAG, arguments))
        module = path[:-3].replace("/", ".")
        if flags and (module != "integrations.epo_trl" or find_spec("trl")):
            assert flags <= flags_of(module), (module, flags - flags_of(module))
            known = known | flags_of(module)
    # in `--code`, and in the variables of a shell
    codes = re.findall(r"`--[^`]*`|^[A-Z]+=\".*\"", text, re.M)
    assert set(re.findall(FLAG, " ".join(codes))) <= known


@each_page
def test_files_targets_tests_and_functions_that_it_names_exist(page):
    text = text_of(page)
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert any((ROOT / place / name).exists() for place in ("", "tests", "results")), name
    for name in re.findall(r"\bresults/[\w.*/-]+", text):
        assert list(ROOT.glob(name.rstrip("./").replace("NAME", "*"))), name
    targets = re.findall(r"^(\w+):", read(ROOT / "Makefile"), re.M)
    assert set(re.findall(r"(?:^|`|\$ )make (\w+)", text, re.M)) <= set(targets)
    for path, name in re.findall(r"(tests/test_\w+\.py)::(\w+)", text):
        assert f"def {name}(" in read(ROOT / path), (path, name)
    for name, path in re.findall(r"`(\w+)` (?:in|of) \[?`([\w/]+\.py)`", text):
        defined = rf"^\s*(def |class )?{name}\s*[(:=]"
        assert re.search(defined, read(ROOT / path), re.M), (path, name)


def test_files_of_the_lists_exist_and_have_about_as_many_lines():
    in_order = re.findall(r"^\| \[`([\w/.]+)`\]\(\1\) \| (\d+) \|", read(README), re.M)
    for name, lines in in_order:
        assert len(read(ROOT / name).splitlines()) == pytest.approx(int(lines), rel=0.1), name
    section = read(README).split("## The other files\n")[1]
    listed = re.findall(r"^([\w./]+) {2,}(.*)", section, re.M)
    assert len(in_order) > 5 and len(listed) > 10
    for name, text in listed:
        assert (ROOT / name).exists(), name
        suffix = {"tools/": ".py", "docs/": ".md"}.get(name)
        for file in re.findall(r"\w+", text) if suffix else []:
            assert (ROOT / name / (file + suffix)).exists(), file


def test_each_difference_names_its_test():
    section = read(DOCS / "paper.md").split("## Where this code differs\n")[1]
    header, _, *rows = re.findall(r"^\|.*", section.split("\n## ")[0], re.M)
    assert header.endswith("| test |") and len(rows) >= 10
    assert all(re.search(r"\| `test_\w+\.py` \|$", row) for row in rows)


def test_quoted_code_is_that_of_the_loss():
    quoted = re.findall(r"^```python\n(.*?)^```", read(README), re.M | re.S)
    lines = "\n".join(quoted).splitlines()
    assert len(lines) >= 6
    for line in lines:
        assert line.strip() in ("", "...", "…") or line in read(ROOT / "epo.py"), line


def test_every_logged_metric_is_explained_and_no_other(tmp_path):
    given = dict(env="keyquest", algo="ppo", steps=1, turns=2, eval_episodes=2, device="cpu")
    given |= dict(tasks_per_step=2, group_size=2, out=str(tmp_path / "run"))
    train.train(decide(given))
    logged = {name for row in read_log(given["out"]) for name in row}
    section = read(METRICS).split("## Every metric\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.M)
    explained = re.findall(r"`(\w+)`", " ".join(cells))
    assert len(logged) > 40
    assert sorted(explained) == sorted(logged)


def test_output_of_the_main_command_is_that_of_its_log():
    log = read_log(ROOT / "results" / "make-train")
    assert f"{report.line(log[-1])}\n{report.last_line(log)}\n" in read(README)


def test_the_finding_counts_the_comparisons_of_the_studies():
    tables = read(ROOT / "results" / "study" / "tables.md")
    rows = re.findall(r"^\| [12] \|.*\| success \|.*", tables, re.M)
    won = sum("| holds |" in row for row in rows)
    lost = sum("| fails |" in row for row in rows)
    text = f"in {len(rows)} comparisons over four studies it won more in training in {won}"
    assert f"{text}, narrowly, less in {lost}," in on_one_line(README)


def test_the_policy_loss_is_as_small_as_the_page_says():
    assert "`policy_loss` is below 0.01 in every step" in on_one_line(METRICS)
    log = read_log(ROOT / "results" / "make-train")
    losses = [row["policy_loss"] for row in log if "policy_loss" in row]
    assert len(losses) == 40 and max(map(abs, losses)) < 0.01


# what docs/gpu.md says; the names are those of the file
OF_THE_CPU = """
{environment[0][turns/s]:.0f} turns/s, {environment[0][MB]:.0f} MiB
{environment[2][turns/s]:.1f} turns/s, {environment[2][MB for 32 (extrapolated)]:,.0f} MiB
{environment[0][speed]:.0f} × the speed
{alfworld[2][turns/s]:.0f} turns/s, {alfworld[2][MB]:.0f} MiB
{alfworld[3][turns/s]:.0f} turns/s, {alfworld[3][MB]:,.0f} MiB
{alfworld[2][speed]:.0f} × the speed, {smaller:.0f} % of the memory
{rollout[0][turns/s]:.0f} turns/s | {faster[0]:.1f} × the speed
{rollout[2][turns/s]:.1f} turns/s | {faster[2]:.1f} × the speed
"""
OF_THE_GPU = """
{models[1][generated tokens/s]:,.0f} / {models[0][generated tokens/s]:,.0f} tokens/s
{models[2][generated tokens/s]:,.0f} tokens/s
{models[1][trained tokens/s]:,.0f} / {models[0][trained tokens/s]:,.0f} tokens/s
{models[2][trained tokens/s]:,.0f} tokens/s
peak, Qwen2.5-1.5B, LoRA 32 | {GiB[0]:.2f} GiB
peak, Qwen2.5-1.5B, all weights | {GiB[1]:.2f} GiB
peak, Qwen2.5-7B, LoRA 32 | {GiB[2]:.2f} GiB
{ratios[0]:.2f} to {ratios[7]:.2f} for eight small cases
"""


@pytest.mark.parametrize(
    "path, claims", [("bench.json", OF_THE_CPU), ("gpu/bench.json", OF_THE_GPU)], ids=["CPU", "GPU"]
)
def test_speeds_and_peaks_are_those_of_the_benchmark(path, claims):
    numbers = json.loads(read(ROOT / "results" / path))
    if path == "bench.json":
        speeds = [row["turns/s"] for row in numbers["rollout"]]
        numbers["faster"] = [speeds[-1] / speed for speed in speeds]
        fast, usual = numbers["alfworld"][2:]
        numbers["smaller"] = 100 * fast["MB"] / usual["MB"]
    numbers["ratios"] = sorted(row["ratio"] for row in numbers["memory"])
    numbers["GiB"] = [row["peak GB"] * 1e9 / 2**30 for row in numbers["models"]]
    for claim in claims.strip().splitlines():
        assert claim.format(**numbers) in on_one_line(GPU), claim


def test_what_fits_is_what_the_memory_tool_predicts():
    row = r"^(\S+) +(all|LoRA 32) +grpo .* ([\d.]+)  (.+)$"
    predicted = re.findall(row, call(memory)[1], re.M)
    cells = re.findall(r"^\| (\S+) \| (all|LoRA 32) \| ([\d.]+) \| (.+) \|$", read(GPU), re.M)
    assert len(cells) > 5 and set(cells) <= set(predicted)


def test_pages_are_short():
    words = {page.name: len(read(page).split()) for page in PAGES}
    assert words["README.md"] <= 1100 and words["results.md"] <= 3000
    assert sum(words.values()) <= 9000


@each_page
def test_lines_are_short(page):
    lines = [line for line in read(page).splitlines() if not line.startswith("|")]
    assert max(map(len, lines)) <= 130
    if page == README:
        # code fits in a terminal
        blocks = re.findall(r"^```.*?^```", read(page), re.M | re.S)
        assert max(map(len, "\n".join(blocks).splitlines())) <= 80
