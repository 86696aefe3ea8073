"""The documentation is true: its links, commands, flags, presets, metrics, tests and numbers.

A reader's new file or other loss needs no change here.
"""

import io
import json
import re
import runpy
import statistics
import sys
from contextlib import redirect_stdout, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from config import PRESETS
from support import report
from support.report import summary
from support.run_folder import read_log
from tools import study

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS]
RESULTS, GPU = ROOT / "docs" / "results.md", ROOT / "docs" / "gpu.md"
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


def on_one_line(page):
    return " ".join(text_of(page).split())


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)", without_code(text_of(page)), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


# ---- links, files, flags, names


@each_page
def test_links_lead_to_files_and_headings(page):
    text = without_code(text_of(page))
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    links += re.findall(r"^\[[^\]]+\]: (\S+)", text, re.M)
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert "://" in link or target.exists(), link
        if anchor and "://" not in link:
            assert target.suffix == ".md", f"{link}: a line number would soon be wrong"
            assert anchor in anchors(target), link


@each_page
def test_pictures_are_there(page):
    """Also where a reference stands for the path: ![text][name]."""
    text = text_of(page)
    names = re.findall(r"!\[[^\]]*\]\[(\w+)\]", text)
    assert set(names) <= set(re.findall(r"^\[(\w+)\]: figures/", text, re.M))


def printed(module, *arguments):
    """What `python -m module` prints."""
    text, before = io.StringIO(), sys.argv
    sys.argv = [module, *arguments]
    path = ROOT / (module.replace(".", "/") + ".py")
    try:
        with redirect_stdout(text), suppress(SystemExit):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before
    return text.getvalue()


@cache
def flags_of(module):
    flags = set(re.findall(FLAG, printed(module, "--help")))
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
    in_variables = re.findall(FLAG, " ".join(variables(text).values()))
    assert in_text | set(in_variables) <= set.union(*map(flags_of, modules))


@each_page
def test_files_that_it_names_exist(page):
    text = text_of(page)
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\bresults/[\w.*/-]+", text):
        assert list(ROOT.glob(name.rstrip("./"))), name


def test_files_of_the_list_exist():
    section = text_of(README).split("## Files\n")[1]
    listed = re.findall(r"^([\w./]+) {2,}", section, re.M)
    assert len(listed) > 10
    for name in listed:
        assert (ROOT / name).exists(), name
    for folder, suffix in (("tools", ".py"), ("docs", ".md")):
        names = re.search(rf"^{folder}/ +(.*)", section, re.M)[1]
        for name in re.findall(r"\w+", names):
            assert (ROOT / folder / (name + suffix)).exists(), name


@each_page
def test_make_targets_and_presets_exist(page):
    text = text_of(page)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"(?:^|`|\$ )make (\w+)", text, re.M)) <= set(targets)
    named = re.findall(r"(?:tiny|scienceworld|alfworld)-(?:ppo|grpo)-\w+", text)
    assert set(named) <= PRESETS.keys()


@each_page
def test_tests_and_functions_that_it_names_exist(page):
    text = text_of(page)
    for path, name in re.findall(r"(tests/test_\w+\.py)::(\w+)", text):
        assert f"def {name}(" in (ROOT / path).read_text(), (path, name)
    for name, path in re.findall(r"`(\w+)` (?:in|of) \[?`([\w/]+\.py)`", text):
        code = (ROOT / path).read_text()
        assert re.search(rf"^\s*(def |class )?{name}\s*[(:=]", code, re.M), (path, name)


def test_each_difference_names_its_test():
    text = text_of(ROOT / "docs" / "paper.md")
    section = text.split("## Where this code differs\n")[1].split("\n## ")[0]
    differences = section.split("\n- ")[1:]
    assert len(differences) >= 14
    assert all("`tests/test_" in difference for difference in differences)


def test_every_logged_metric_is_explained():
    logs = list(ROOT.glob("results/**/log.jsonl"))
    logged = {name for log in logs for row in log.open() for name in json.loads(row)}
    explained = re.findall(r"^\| `(\w+)` \|", text_of(ROOT / "docs" / "metrics.md"), re.M)
    assert len(logged) > 40
    assert not logged - set(explained)


# ---- numbers


def logs_of(runs):
    """Of a run folder in results/, of a folder of runs, or of a preset's runs in such a folder."""
    path = ROOT / "results" / runs
    folders = [path] if (path / "config.json").exists() else sorted(path.glob("*-seed*"))
    folders = folders or sorted(path.parent.glob(path.name + "-seed*"))
    return [read_log(folder) for folder in folders]


def success(logs, split, name):
    """A number of `summary` for each run, such as "best"."""
    return [summary(log, last=2)[f"{split}_{name}"] for log in logs]


def highest(log):
    return summary(log, last=2)["highest"]


def training(log, steps):
    """The share of training episodes won in some steps, a slice."""
    return statistics.mean([row["success"] for row in log if "success" in row][steps])


def each_seed(number):
    return lambda logs: ", ".join(f"{number(log):.2f}" for log in logs)


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


def pooled(name):
    """The share of won evaluations of all seeds together."""
    share = lambda logs, split: statistics.mean(success(logs, split, name))
    return lambda logs: " / ".join(f"{share(logs, split):.2f}" for split in SPLITS)


def gain(logs):
    """From the first to the last evaluation, IID and OOD together, and its standard error."""
    episodes = 2 * 36 * len(logs)
    shares = [
        statistics.mean(success(logs, "iid", name) + success(logs, "ood", name))
        for name in ("before", "after")
    ]
    error = sum(share * (1 - share) / episodes for share in shares) ** 0.5
    return f"{shares[1] - shares[0]:+.2f} ±{error:.2f}"


def core_hours(logs):
    return f"{sum(row['seconds'] for log in logs for row in log) / 3600:.1f}"


# what a column of a table is, from the logs of the runs of its row
COLUMNS = {
    "highest H̄": each_seed(highest),
    "training, steps 0–9 → 30–39": first_and_last_ten,
    "IID after 0 → 20 → 40 steps": evaluations("iid"),
    "OOD after 0 → 20 → 40 steps": evaluations("ood"),
    "cloned": pooled("before"),
    "after RL": pooled("after"),
    "gain": gain,
    "hours": core_hours,
    "minutes": lambda logs: f"{sum(row['seconds'] for row in logs[0]) / 60:.0f}",
}


def tables(text):
    """The rows of every table -> {column: cell} one by one."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        header, _, *rows = map(cells, table.splitlines())
        for row in rows:
            yield dict(zip(header, row, strict=True))


def cells(line):
    parts = re.split(r"(?<!\\)\|", line.strip())[1:-1]
    return [part.replace("\\", "").replace("`", "").strip() for part in parts]


@each_page
def test_tables_are_those_of_the_logs(page):
    for row in tables(text_of(page)):
        if "runs" in row:
            logs = logs_of(row["runs"])
            assert logs, row
            known = row.keys() & COLUMNS.keys()
            assert known, row
            assert {name: row[name] for name in known} == {n: COLUMNS[n](logs) for n in known}


def average(number, logs):
    return statistics.mean(map(number, logs))


def test_output_of_the_main_command_is_that_of_its_log():
    log = read_log(ROOT / "results" / "make-train")
    quoted = report.last_line(log).split("; Succ.*")[0] + "; …"
    assert f"{report.line(log[-1])}\n{quoted}\n" in text_of(README)


@pytest.mark.parametrize(
    "where, first, others",
    [
        ("ScienceWorld", "make-train", "scienceworld"),
        ("generated games of ALFWorld", "alfworld-generated-seed0", "alfworld-generated"),
        ("real games of ALFWorld", "alfworld-real-seed0", "alfworld-real"),
    ],
)
def test_the_rises_of_the_main_command(where, first, others):
    logs = [logs_of(run)[0] for run in (first, f"{others}-seed1", f"{others}-seed2")]
    text = f"- On {where} "
    for split, words in (("iid", "IID rises from {} to {} and "), ("ood", "OOD from {} to {}.")):
        shares = [statistics.mean(success(logs, split, name)) for name in ("before", "after")]
        text += words.format(*(f"{share * 100:.0f} %" for share in shares))
        error = sum(share * (1 - share) / (3 * 128) for share in shares) ** 0.5
        assert f"{error:.2f}" == "0.03"
    assert text in on_one_line(RESULTS)


def test_the_policy_loss_is_as_small_as_the_page_says():
    assert "`policy_loss` is below 0.01 in every step" in on_one_line(ROOT / "docs" / "metrics.md")
    for run in ("make-train", "alfworld-real-seed0"):
        losses = [row["policy_loss"] for row in logs_of(run)[0] if "policy_loss" in row]
        assert len(losses) == 40 and max(map(abs, losses)) < 0.01


def test_the_numbers_of_the_finding():
    outcome = lambda arm, name, world="short": average(
        lambda log: study.outcomes(log)[name], study.finished_runs(world, arm).values()
    )
    both = lambda arm: (outcome(arm, "highest"), outcome(arm, "success"))
    science_arms = ("grpo-base-0.02", "grpo-epo3-0.02")
    science = [outcome(arm, "highest", "scienceworld") for arm in science_arms]
    rows = [row for row in study.decided() if row[0].number in (1, 2)]
    words = [row[-1] for row in rows]
    n, won, lost = len(words), words.count("holds"), words.count("fails")
    lost_arms = [row[0].arm for row in rows if row[-1] == "fails"]
    assert all(0.02 <= float(arm.split("-")[2]) <= 0.1 for arm in lost_arms)
    for text in (
        "its highest entropy is {:.1f} nats, and it wins {:.2f}".format(*both("grpo-plain")),
        "drives entropy to {:.1f} nats and training success to {:.2f}.".format(
            *both("grpo-base-0.1")
        ),
        "the published α these are {:.1f} and {:.2f};".format(*both("grpo-epo0.05-0.1")),
        "with α 3 they are {:.1f} and {:.2f}.".format(*both("grpo-epo3-0.1")),
        "entropy to {:.1f} nats, and with α 3 to {:.1f}.".format(*science),
        f"In {n} comparisons with plain GRPO or PPO, EPO won more in {won}, narrowly,",
        f"and less in {lost} (all with 20 to 100 times the paper's λ); the others are",
    ):
        assert text in on_one_line(README)


def test_rows_of_the_study_in_the_readme_are_those_of_its_logs():
    rows = re.findall(r"^\| (?:GRPO|PPO).* ±.*$", text_of(README), re.M)
    assert len(rows) > 4
    assert set(rows) <= set(study.arms("short"))


def variables(text):
    """The variables of the commands: {name: value}."""
    return dict(re.findall(r'^([A-Z]+)="(.*)"', text, re.M))


def test_speeds_are_those_of_the_benchmark():
    bench, text = json.loads((ROOT / "results" / "bench.json").read_text()), on_one_line(GPU)
    compact, objects, stock = bench["environment"]
    *_, fast, usual = bench["alfworld"]
    single, padded, growing, ours = (row["turns/s"] for row in bench["rollout"])
    direct, trl, chunks = bench["loss"]
    small, large = (row for row in bench["step"] if row["episodes"] in (8, 64))
    share = lambda part: f"{large[part] / large['step'] * 100:.0f} %"
    for claim in (
        f"takes {small['step']:.1f} s for 8 episodes of up to 12 turns, and {large['step']:.0f} s",
        f"the update takes {share('train')}, the simulator {share('environment')}, and generation",
        f"generation {share('generate')}.",
        f"{compact['turns/s']:.0f} turns/s, {compact['MB']:.0f} MiB",
        f"{stock['turns/s']:.1f} turns/s, {stock['MB for 32 (extrapolated)']:,.0f} MiB",
        f"{compact['speed']:.0f} × the speed",
        f"with names in sight | {objects['turns/s']:.0f} turns/s",
        f"{objects['speed']:.0f} × the speed",
        f"{fast['turns/s']:.0f} turns/s, {fast['MB']:.0f} MiB",
        f"{usual['turns/s']:.0f} turns/s, {usual['MB']:,.0f} MiB",
        f"{fast['speed']:.0f} × the speed, {fast['MB'] / usual['MB']:.0%}".replace("%", " %"),
        f"{single:.0f} turns/s | {ours / single:.1f} × the speed",
        f"{padded:.0f} turns/s | {ours / padded:.1f} × the speed",
        f"{growing:.1f} turns/s | {ours / growing:.1f} × the speed",
        f"direct: {direct['seconds']:.0f} s, {direct['peak MB']:,.0f} MiB",
        f"TRL's functions: {trl['seconds']:.0f} s, {trl['peak MB']:,.0f} MiB",
        f"{chunks['seconds']:.0f} s, {chunks['peak MB']:,.0f} MiB",
        f"{chunks['time']:.2f} × the time, {chunks['memory']:.0%}".replace("%", " %"),
        f"{chunks['seconds'] / trl['seconds']:.2f} × the time",
    ):
        assert claim in text, claim


def test_speeds_and_peaks_of_the_gpu_are_those_of_its_log():
    bench, text = (
        json.loads((ROOT / "results" / "gpu" / "bench.json").read_text()),
        on_one_line(GPU),
    )
    assert bench["device"].removeprefix("NVIDIA ") in text
    lora, every, seven = bench["models"]
    speed = lambda row, name: f"{row[f'{name} tokens/s']:,.0f}"
    peak = lambda row: f"{row['peak GB'] * 1e9 / 2**30:.2f} GiB"
    for claim in (
        f"{speed(every, 'generated')} / {speed(lora, 'generated')} tokens/s",
        f"{speed(seven, 'generated')} tokens/s",
        f"{speed(every, 'trained')} / {speed(lora, 'trained')} tokens/s",
        f"{speed(seven, 'trained')} tokens/s, {seven['of matrix throughput']:.0%}".replace(
            "%", " %"
        ),
        f"peak, Qwen2.5-1.5B, LoRA 32 | {peak(lora)}",
        f"peak, Qwen2.5-1.5B, all weights | {peak(every)}",
        f"peak, Qwen2.5-7B, LoRA 32 | {peak(seven)}",
        "{:.2f} to {:.2f} for eight small cases".format(
            *(extreme(row["ratio"] for row in bench["memory"]) for extreme in (min, max))
        ),
    ):
        assert claim in text, claim


def test_what_fits_is_what_the_memory_tool_predicts():
    row = r"^(\S+) +(all|LoRA 32) +grpo((?: +[\d.,]+){8})$"
    predicted = {}
    for model, trained, numbers in re.findall(row, printed("tools.memory"), re.M):
        *_, peak, tokens_24, episodes_24, tokens_80, _ = numbers.split()
        card = "24 GB" if tokens_24 != "0" else "80 GB" if tokens_80 != "0" else "neither"
        if card == "80 GB" and episodes_24 != "0":
            card += f", or 24 GB with {episodes_24} episodes"
        predicted[model, trained] = peak, card
    rows = [row for row in tables(text_of(GPU)) if "card" in row]
    assert len(rows) > 5
    for row in rows:
        model, trained, *numbers = row.values()
        assert tuple(numbers) == predicted[model, trained], row


# ---- length


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1300
    assert not [line for line in text.splitlines() if len(line) > 120]


@each_page
def test_no_line_of_text_is_too_long(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]
