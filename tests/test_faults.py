"""What a user can get wrong, what can break around a run, and who else is on the machine.

Each fault ends in one line and a status that is not 0; nothing is overwritten, no process is left.
"""

import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import config
import envs
import plot
import train
from support import report, run_folder
from support.loading import load_policy
from support.run_folder import SetupError, load_checkpoint, locked, read_log
from tools import harass, sweep
from worlds.alfworld_engine import compile_expression
from worlds.alfworld_generate import generate

ROOT = Path(__file__).parent.parent
SMALL = (
    "--env keyquest --tasks short --tasks-per-step 2 --group-size 2 --minibatches 2 --turns 4 "
    "--eval-episodes 2 --eval-every 2 --steps 3"
).split()
# the same examples every time, and no folder of them
settings.register_profile("faults", derandomize=True, database=None, deadline=None)
settings.load_profile("faults")


def call(program, *arguments):
    """main() of a program in this process -> (status, stdout, stderr); a new one costs seconds."""
    output, error, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program.__name__, *map(str, arguments)])
        with redirect_stdout(output), redirect_stderr(error):
            try:
                program.main()
            except SystemExit as stop:
                status = stop.code
    if isinstance(status, str):
        return 1, output.getvalue(), error.getvalue() + status
    return status, output.getvalue(), error.getvalue()


def refuses(program, *arguments, says, status=1):
    got, _, error = call(program, *arguments)
    assert got == status, error
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in error
    assert says in error, error


def children():
    tasks = Path("/proc/self/task").glob("*/children")
    return {pid for task in tasks for pid in task.read_text().split()}


@pytest.fixture(autouse=True)
def no_process_is_left():
    before, handler = children(), signal.getsignal(signal.SIGTERM)
    yield
    assert len(children()) <= len(before)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of each algorithm -> their folders."""
    folders = {}
    for algo in ("grpo", "ppo"):
        folders[algo] = tmp_path_factory.mktemp("finished") / algo
        status, _, error = call(train, *SMALL, "--algo", algo, "--out", folders[algo])
        assert status == 0, error
    return folders


@pytest.fixture
def damaged(finished, tmp_path):
    """A copy of the finished GRPO run, to be damaged."""
    return Path(shutil.copytree(finished["grpo"], tmp_path / "tiny-grpo-epo-seed0"))


def contents(folder):
    """{path: bytes} of all but the lock, which is empty."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path): path.read_bytes() for path in files}


def without_clock(folder):
    rows = read_log(folder)
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


# ---- flags


NO_VALUES = """
--env nowhere|--env KeyQuest|--env ''|--algo EPO|--algo ''|--dtype float64|--games all
--average mean|--reward dense|--dynamic-weight yes|--smoothing ''|--device ''|--device gpu
--steps ''|--steps 1e3|--steps 2.0|--steps --|--steps many|--step 3|--steps --resume
--kappa-r -inf|--lr ''|--lr one|--lr 1,0|--temperature|--group-size 8.5|--seed 0x1|--turns ∞
--window none|--lora-rank r|--out|--evaluate|--model|--resume maybe|--no-resume|extra|--colour red
-x|--minibatches '1 2'
""".strip()


@pytest.mark.parametrize("flags", NO_VALUES.replace("\n", "|").split("|"))
def test_what_is_no_flag_or_no_value_is_one_line(flags, tmp_path):
    out = tmp_path / "new"
    refuses(train, "--out", out, *shlex.split(flags), says="; see --help", status=2)
    assert not out.exists()


FIELDS = {f.name: f for f in config.fields(config.Config)}
FLOATS = [name for name, f in FIELDS.items() if f.type in (float, float | None)]
INTS = [name for name, f in FIELDS.items() if f.type in (int, int | None)]
BAD_NUMBERS = [(name, value) for name in FLOATS for value in ("nan", "-inf", "-1e300", "1e300")]
BAD_NUMBERS += [(name, "inf") for name in FLOATS if name != "kappa_r"]
BAD_NUMBERS += [(name, value) for name in INTS for value in ("-1", "1" + 400 * "0")]
BAD_NUMBERS += [(name, "0") for name in INTS if name not in ("seed", "lora_rank")]
BAD_NUMBERS += [(name, "-0.1") for name in FLOATS if name != "eval_temperature"]
BAD_NUMBERS += [(name, "1.01") for name in config.SHARES]


@pytest.mark.parametrize("name, value", BAD_NUMBERS)
def test_a_number_that_cannot_work_is_one_line(name, value, tmp_path):
    out, flag = tmp_path / "new", name.replace("_", "-")
    more = ["--algo", "ppo"] if name in ("discount", "gae_lambda") else []
    says = name if name in ("alpha", "gamma", "kappa_l", "kappa_r") else f"--{flag}"
    got, _, error = call(train, *SMALL, *more, "--out", out, f"--{flag}={value}")
    assert got == 1
    assert len(error.splitlines()) == 1
    assert says in error.replace("-", "_") or says in error
    assert not out.exists()


WRONG = {
    "--evaluate ''": "--evaluate is empty",
    "--out ''": "--out is empty",
    "--evaluate /": "is not a run folder",
    "--evaluate .": "is not a run folder",
    "--evaluate checkpoint.pt": "is not a run folder",
    "--evaluate no/such/checkpoint.pt": "no/such is not a run folder",
    "--resume": "is not a run folder",
    "--resume --preset tiny-grpo-epo": "is not a run folder",
    "--steps=--": "--steps",
    "--minibatches 3": "doesn't divide",
    "--kappa-l 3": "kappa_l",
    "--kappa-l 0.5 --kappa-r 0.4": "kappa_l",
    "--group-size 1 --minibatches 1": "--group-size",
    "--discount 0.9": "--algo ppo",
    "--gae-lambda 0.9": "--algo ppo",
    "--smoothing indicator --entropy-coef 0": "without λ",
    "--temperature 1e-5": "--temperature",
    "--temperature 1e-40": "--temperature",
    "--temperature 0.049": "--temperature",
    "--temperature 101": "--temperature",
    "--eval-temperature 0": "--eval-temperature",
    "--warmup 1e5": "--warmup",
    "--seed 1000000000000": "--seed",
    "--eval-episodes 1000001": "--eval-episodes",
    "--tasks-per-step 1000 --group-size 1002": "--tasks-per-step",
    "--lora-rank 100001": "--lora-rank",
    "--preset ''": "unknown --preset ''",
    "--preset tiny": "unknown --preset 'tiny'",
    "--tasks no-such": "'no-such'; there are: short, long",
    "--tasks 'short, no-such'": "'no-such'",
    "--tasks Short": "'Short'",
    "--env scienceworld": "unknown ScienceWorld task 'short'",
    "--env alfworld": "unknown ALFWorld task 'short'",
    "--env scienceworld --tasks boil --simplifications hard": "'hard'",
    "--model ''": "model ''",
    "--model no/such": "model 'no/such'",
    "--model /": "model '/'",
    "--model tests": "model 'tests'",
    "--out /dev/null": "is a file",
    "--out /dev/null/x": "is a file",
    "--out /proc/x": "/proc/x",
    "--out README.md": "is a file",
    "--out tests": "tests exists already",
    "--out /": "/ exists already",
    f"--out {300 * 'x'}": "File name too long",
}


@pytest.mark.parametrize("flags", WRONG)
def test_flags_that_cannot_work_are_one_line(flags, tmp_path):
    before = os.listdir(ROOT / "tests")
    refuses(train, *SMALL, "--out", tmp_path / "new", *shlex.split(flags), says=WRONG[flags])
    assert os.listdir(tmp_path) == []
    assert os.listdir(ROOT / "tests") == before


ODD = (
    "--kappa-r inf",
    "--tasks 'short, long'",
    "--temperature 0.05 --eval-temperature 0.01",
    "--warmup 1 --min-lr 0",
    "--eval-every 1000000000 --window 1000000000",
    "--max-tokens 1",
    "--turns 1",
    "--tokens-per-batch 1",
    "--gamma 1e6",
    "--clip 1000000 --value-clip 1e-300 --grad-clip 1e-300",
)


@pytest.mark.parametrize("flags", ODD)
def test_odd_flags_that_can_work_do(flags, tmp_path):
    # a folder that is there, but empty
    status, _, error = call(train, *SMALL, "--out", tmp_path, "--steps", 2, *shlex.split(flags))
    assert (status, error) == (0, "")
    assert [row["step"] for row in read_log(tmp_path)] == [0, 1, 2]
    plot.load(tmp_path)


def test_without_a_cap_the_pages_are_drawn(tmp_path):
    out = tmp_path / "run"
    status, _, error = call(train, *SMALL, "--kappa-r", "inf", "--kappa-l", 0.5, "--out", out)
    assert status == 0, error
    assert [row["corridor_high"] for row in read_log(out)[:-1]] == [None] * 3
    assert read_log(out)[2]["corridor_low"] > 0
    assert call(plot, out, "--out", tmp_path / "figures")[0] == 0
    # it can be read again: Infinity is in config.json
    assert call(train, "--resume", "--out", out)[0] == 0


def test_a_million_evaluation_tasks_are_drawn_in_seconds():
    tasks = [envs.Task(name, i) for name in "abc" for i in range(100)]
    begin = time.process_time()
    assert len(train.draw(tasks, 10**6, 0)) == 10**6
    assert time.process_time() - begin < 20


@settings(max_examples=150)
@given(
    st.sampled_from([name for name in FIELDS if name not in ("resume", "device")]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
)
def test_any_text_for_any_flag_is_taken_or_one_line(name, text):
    error = io.StringIO()
    arguments = ["--out=no/such/folder", f"--{name}={text}"]
    with redirect_stdout(io.StringIO()), redirect_stderr(error):
        try:
            config.parse(arguments)
        except SetupError as stop:
            assert "\n" not in str(stop)
        except SystemExit as stop:
            assert stop.code == 2
            assert error.getvalue().count("\n") == 1


# ---- damaged files


NO_CONFIGS = {
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"5",
    "a text": b'"grpo"',
    "an empty object": b"{}",
    "half": b'{"env": "keyquest", ',
    "no text": b"\xff\xfe\x00",
    "zeros": bytes(4096),
    "deep": b"[" * 10**5,
    "no steps": b'{"env": "keyquest", "model": "tiny", "algo": "grpo"}',
    "steps is null": b'{"env": "keyquest", "model": "tiny", "algo": "grpo", "steps": null}',
    "env is a number": b'{"env": 5, "model": "tiny", "algo": "grpo", "steps": 3}',
}


def sweep_over(folder):
    more = SMALL[2:]
    return "tiny-grpo-epo", "--seeds", 1, "--out", folder.parent, "--env", "keyquest", *more


@pytest.mark.parametrize("damage", NO_CONFIGS)
def test_a_damaged_config_is_one_line_for_every_program(damage, damaged):
    (damaged / "config.json").write_bytes(NO_CONFIGS[damage])
    before = contents(damaged)
    says = f"{damaged}/config.json cannot be read ("
    refuses(train, "--resume", "--out", damaged, says=says)
    refuses(train, "--evaluate", damaged / "checkpoint.pt", says=says)
    refuses(plot, damaged, "--out", damaged, says=says)
    refuses(sweep, *sweep_over(damaged), says=says)
    assert contents(damaged) == before


CHANGES = {
    "another algorithm": ({"algo": "ppo"}, "checkpoint.pt cannot be read (it is not of --algo ppo"),
    "no algorithm": ({"algo": "EPO"}, "config.json cannot be read (--algo: 'EPO'"),
    "another world": ({"env": "alfworld"}, "unknown ALFWorld task"),
    "no world": ({"env": "x"}, "config.json cannot be read (--env: 'x'"),
    "another model": ({"model": str(ROOT / "models" / "scienceworld")}, "not this model's"),
    "no model": ({"model": "no/such"}, "model 'no/such'"),
    "an adapter": ({"lora_rank": 2}, "not this model's"),
    "an unknown setting": ({"colour\n": "red"}, r"config.json cannot be read ('colour\n' is no"),
    "turns in a list": ({"turns": [4]}, "config.json cannot be read (--turns: [4]"),
    "no steps": ({"steps": 0}, "config.json cannot be read (--steps must be positive"),
    "steps of true": ({"steps": True}, "config.json cannot be read (its steps"),
    "a rate in words": ({"lr": "high"}, "config.json cannot be read (--lr: 'high'"),
    "a large integer": ({"seed": 10**400}, "config.json cannot be read (--seed: 1000"),
    "nan": ({"clip": float("nan")}, "config.json cannot be read (--clip: nan"),
    "another GPU": ({"device": "cuda"}, "--device cuda"),
    "a number as a folder": ({"out": 5}, "config.json cannot be read (--out: 5"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_edited_config_is_one_line(change, damaged):
    edited, says = CHANGES[change]
    path = damaged / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edited))
    before = contents(damaged)
    refuses(train, "--resume", "--out", damaged, says=says)
    assert contents(damaged) == before


def test_what_to_do_is_never_read_from_a_file(damaged):
    path = damaged / "config.json"
    own = {"evaluate": "no/such.pt", "resume": True, "out": "elsewhere", "device": "auto"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    cfg = config.parse(["--resume", "--out", str(damaged)])
    assert (cfg.evaluate, cfg.resume, cfg.out) == (None, True, str(damaged))
    cfg = config.parse(["--evaluate", f"{damaged}/checkpoint.pt", "--device", "cpu"])
    assert (cfg.resume, cfg.out, cfg.device) == (False, str(damaged), "cpu")


def edit_row(text, number, **changes):
    rows = [json.loads(line) for line in text.splitlines()]
    rows[number] |= changes
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


NO_LOGS = {
    "a blank row first": lambda text: b"\n" + text,
    "a blank row last": lambda text: text + b"\n",
    "blank rows between": lambda text: text.replace(b"\n", b"\n\n"),
    "the first byte lost": lambda text: text[1:],
    "a row of zeros": lambda text: bytes(100) + b"\n" + text,
    "a row twice": lambda text: text.splitlines(keepends=True)[0] + text,
    "all rows twice": lambda text: text + text,
    "a row lost": lambda text: b"".join(text.splitlines(keepends=True)[1:]),
    "half a row between": lambda text: text[:40] + b"\n" + text,
    "a list": lambda text: b"[]\n" + text,
    "null": lambda text: b"null\n",
    "no UTF-8": lambda text: b"\xc3\x28\n" + text,
    "deep": lambda text: b"[" * 10**5 + b"\n",
    "a text for a number": lambda text: edit_row(text, 0, entropy="x"),
    "a list for a number": lambda text: edit_row(text, 1, loss=[0.5]),
    "true for a number": lambda text: edit_row(text, 1, success=True),
    "nan": lambda text: edit_row(text, 0, iid_success=float("nan")),
    "infinity": lambda text: edit_row(text, 2, kl=float("inf")),
    "a number without end": lambda text: edit_row(text, 2, turns=10**400),
    "a list for an object": lambda text: edit_row(text, 0, iid_by_task=[0.5]),
    "a text in an object": lambda text: edit_row(text, 0, ood_by_task={"short": "x"}),
    "a number for a list": lambda text: edit_row(text, 0, entropy_by_turn=0.5),
}


@pytest.mark.parametrize("damage", NO_LOGS)
def test_a_damaged_log_is_one_line_for_every_program(damage, damaged):
    path = damaged / "log.jsonl"
    path.write_bytes(NO_LOGS[damage](path.read_bytes()))
    before = contents(damaged)
    says = f"{path} cannot be read (line "
    refuses(train, "--resume", "--out", damaged, says=says)
    refuses(plot, damaged, "--out", damaged, says=says)
    refuses(sweep, *sweep_over(damaged), says=says)
    assert contents(damaged) == before


@pytest.mark.parametrize("rows", [None, 0, 1, 3, 6])
def test_a_log_of_another_length_than_the_checkpoint_is_refused_and_not_shortened(rows, damaged):
    path = damaged / "log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines += [json.dumps({"step": step}).encode() + b"\n" for step in (4, 5)]
    path.unlink()
    if rows is not None:
        path.write_bytes(b"".join(lines[:rows]))
    before = contents(damaged)
    says = f"{path} cannot be read (it has {rows or 0} rows, but the checkpoint goes on at step 4)"
    refuses(train, "--resume", "--out", damaged, says=says)
    assert contents(damaged) == before


def state_of(path, **changes):
    torch.save(torch.load(path) | changes, path)


def write(data):
    return lambda path: path.write_bytes(data)


PICKLE = b"\x80\x02cos\nsystem\n(S'touch PWNED'\ntR."
NO_CHECKPOINTS = {
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "of zero bytes": write(b""),
    "of one byte": write(b"x"),
    "text": write(b"checkpoint\n"),
    "a ZIP's head": write(b"PK\x03\x04"),
    "a program": write(PICKLE),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "without its last byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "without its head": lambda path: path.write_bytes(path.read_bytes()[5000:]),
    "a number": lambda path: torch.save(5, path),
    "nothing": lambda path: torch.save(None, path),
    "a list": lambda path: torch.save([], path),
    "an empty object": lambda path: torch.save({}, path),
    "another program's": lambda path: torch.save({"step": 1, "model": {}}, path),
    "with a text for the step": lambda path: state_of(path, step="x"),
    "with a list for the model": lambda path: state_of(path, model=[]),
    "with a history of texts": lambda path: state_of(path, history=["x"]),
    "with an empty optimizer": lambda path: state_of(path, optimizer={}),
    "with an odd optimizer": lambda path: state_of(path, optimizer={"param_groups": 5, "state": 5}),
    "with a critic": lambda path: state_of(path, critic={}),
}
OTHERS = {
    "of a later step": {"step": 99},
    "of a step before the first": {"step": -5},
    "with no parameters": {"model": {}},
    "with a number for a parameter": {"model": {"model.norm.weight": 5}},
}


@pytest.mark.parametrize("damage", NO_CHECKPOINTS)
def test_a_damaged_checkpoint_is_one_line(damage, damaged, monkeypatch):
    path = damaged / "checkpoint.pt"
    NO_CHECKPOINTS[damage](path)
    monkeypatch.chdir(damaged)
    before = contents(damaged)
    missing = damage == "missing"
    says = f"{path} is missing, but" if missing else f"{path} cannot be read ("
    refuses(train, "--resume", "--out", damaged, says=says)
    assert contents(damaged) == before


@pytest.mark.parametrize("change", OTHERS)
def test_a_checkpoint_of_another_run_is_one_line(change, damaged):
    state_of(damaged / "checkpoint.pt", **OTHERS[change])
    before = contents(damaged)
    says = "the checkpoint's parameters" if "model" in OTHERS[change] else "log.jsonl cannot"
    refuses(train, "--resume", "--out", damaged, says=says)
    assert contents(damaged) == before


def test_a_critic_that_is_not_there_is_one_line(finished, tmp_path):
    folder = shutil.copytree(finished["ppo"], tmp_path / "ppo")
    state_of(folder / "checkpoint.pt", critic={})
    refuses(train, "--resume", "--out", folder, says="the checkpoint's parameters")
    state = torch.load(folder / "checkpoint.pt")
    del state["critic"]
    torch.save(state, folder / "checkpoint.pt")
    refuses(train, "--resume", "--out", folder, says="not of --algo ppo")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def spare(finished, tmp_path_factory):
    return shutil.copytree(finished["grpo"], tmp_path_factory.mktemp("spare") / "run")


@settings(max_examples=150)
@given(st.sampled_from(sorted(FIELDS)), JSON)
def test_any_value_of_any_setting_is_read_or_one_line(spare, finished, name, value):
    saved = json.loads((finished["grpo"] / "config.json").read_text())
    (spare / "config.json").write_text(json.dumps(saved | {name: value}))
    try:
        with redirect_stdout(io.StringIO()):
            cfg = config.parse(["--resume", "--out", str(spare)])
    except SetupError as error:
        assert "\n" not in str(error)
    else:
        config.check(cfg)
    with suppress(SetupError):
        plot.load(spare)


def use_log(folder):
    """Read a log as every program does. A SetupError must be one line."""
    try:
        rows = read_log(folder)
        report.summary(rows, 2)
        report.last_line(rows)
        plot.load(folder)
    except SetupError as error:
        assert "\n" not in str(error)


@settings(max_examples=150)
@given(st.binary(max_size=30), st.integers(0, 10**5), st.integers(0, 200))
def test_any_bytes_in_a_log_are_read_or_one_line(spare, finished, data, place, length):
    shutil.copy(finished["grpo"] / "config.json", spare)
    text = (finished["grpo"] / "log.jsonl").read_bytes()
    place %= len(text)
    (spare / "log.jsonl").write_bytes(text[:place] + data + text[place + length :])
    use_log(spare)
    (spare / "log.jsonl").write_bytes(data)
    use_log(spare)


METRICS = "entropy iid_success iid_by_task ood_by_task ood_success entropy_by_turn kl x".split()
NUMBERS = st.none() | st.integers() | st.floats()
VALUES = JSON | NUMBERS | st.lists(NUMBERS) | st.dictionaries(st.text(), NUMBERS)


@settings(max_examples=150)
@given(st.lists(st.dictionaries(st.sampled_from(METRICS), VALUES), max_size=4))
def test_any_rows_of_a_log_are_read_or_one_line(spare, finished, rows):
    shutil.copy(finished["grpo"] / "config.json", spare)
    rows = [row | {"step": step} for step, row in enumerate(rows)]
    (spare / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    use_log(spare)


@settings(max_examples=60)
@given(st.binary(max_size=30), st.integers(0, 10**7), st.booleans())
def test_any_bytes_in_a_checkpoint_are_read_or_one_line(spare, finished, data, place, whole):
    text = (finished["grpo"] / "checkpoint.pt").read_bytes()
    place %= len(text)
    rest = text[place + len(data) :] if whole else b""
    (spare / "checkpoint.pt").write_bytes(text[:place] + data + rest)
    try:
        load_checkpoint(str(spare / "checkpoint.pt"))
    except SetupError as error:
        assert "\n" not in str(error)


# ---- two processes on a folder, and a full disk


def test_the_second_process_on_a_folder_is_refused_and_loses_nothing(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, ROOT / "train.py", *SMALL, "--steps", "100000", "--out", out]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert any(line.startswith("step   0") for line in first.stdout)
        says = f"another process is writing to {out}"
        refuses(train, "--resume", "--out", out, says=says)
        refuses(train, *SMALL, "--out", out, says="exists already")
        # to read is allowed
        assert call(train, "--evaluate", out / "checkpoint.pt")[0] == 0
        assert any(line.startswith("step   2") for line in first.stdout)
    finally:
        first.terminate()
        first.stdout.read()
        first.stdout.close()
    assert first.wait() == 1
    steps = [row["step"] for row in read_log(out)]
    assert steps == list(range(len(steps)))
    # the lock ends with its process
    with locked(out):
        refuses(train, "--resume", "--out", out, says=says)
    train_on = config.parse(["--resume", "--out", str(out)])
    assert train_on.steps == 100000


def test_of_two_that_begin_at_once_the_second_overwrites_nothing(tmp_path):
    """It parsed its flags while the folder was still new."""
    cfg = config.parse([*SMALL, "--out", str(tmp_path / "run")])
    assert call(train, *SMALL, "--out", cfg.out)[0] == 0
    before = contents(cfg.out)
    with redirect_stdout(io.StringIO()), pytest.raises(SetupError, match="choose another folder"):
        train.train(cfg)
    assert contents(cfg.out) == before


def test_a_run_that_harass_kills_ends_with_the_log_of_an_undisturbed_one(tmp_path, finished):
    flags = " ".join(SMALL)
    results = harass.killed(str(tmp_path / "run"), flags, 1, random.Random(1), 0.1)
    assert [log for log, _ in results] == [without_clock(finished["grpo"])] * len(results)


def test_a_folder_killed_before_its_config_is_new(tmp_path, finished):
    (tmp_path / "transcripts").mkdir()
    for name in ("lock", "tasks.json", "config.json.new"):
        (tmp_path / name).touch()
    refuses(train, "--resume", "--out", tmp_path, says="has no config.json")
    assert call(train, *SMALL, "--out", tmp_path)[0] == 0
    assert without_clock(tmp_path) == without_clock(finished["grpo"])


@pytest.fixture
def largest_file():
    """largest_file(n): what is written beyond n bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "file, room", {"tasks.json": 10, "config.json": 600, "checkpoint.pt": 30_000}.items()
)
def test_a_disk_that_is_full_at_a_file_is_one_line(file, room, tmp_path, finished, largest_file):
    out = tmp_path / "run"
    largest_file(room)
    refuses(train, *SMALL, "--out", out, says=f"could not write {out}/{file} (File too large)")
    largest_file(resource.RLIM_INFINITY)
    assert not list(out.rglob("*.new"))
    again = ["--resume"] if file == "checkpoint.pt" else SMALL
    assert call(train, *again, "--out", out)[0] == 0
    assert without_clock(out) == without_clock(finished["grpo"])


def test_a_disk_that_is_full_at_a_row_is_one_line(tmp_path, finished, largest_file, monkeypatch):
    """Half of the row of step 2 is written."""
    out, append_row = tmp_path / "run", run_folder.append_row

    def append_on_a_full_disk(folder, row):
        log = Path(folder, "log.jsonl")
        if row["step"] == 2:
            largest_file(log.stat().st_size + 100)
        try:
            append_row(folder, row)
        finally:
            largest_file(resource.RLIM_INFINITY)

    monkeypatch.setattr(run_folder, "append_row", append_on_a_full_disk)
    refuses(train, *SMALL, "--out", out, says=f"could not write {out}/log.jsonl (File too large)")
    monkeypatch.undo()
    assert (out / "log.jsonl").read_bytes().count(b"\n") == 2
    assert not (out / "log.jsonl").read_bytes().endswith(b"\n")
    assert call(train, "--resume", "--out", out)[0] == 0
    assert without_clock(out) == without_clock(finished["grpo"])


def test_a_row_that_is_not_finite_is_one_line_and_not_written(tmp_path):
    with pytest.raises(SetupError, match="step 3: value_loss is not a finite number"):
        run_folder.append_row(tmp_path, {"step": 3, "value_loss": float("inf")})
    assert os.listdir(tmp_path) == []


def test_a_policy_that_diverged_is_one_line_also_when_resumed(tmp_path):
    """Its loss and its weights are finite still, and the products of its weights are not."""
    out = tmp_path / "diverged"
    flags = [*SMALL, "--lr", "1e6", "--warmup", "0", "--reward", "score", "--out", out]
    lower = "it has diverged; begin a new run with a lower --lr"
    refuses(train, *flags, says=lower)
    refuses(train, "--resume", "--out", out, says=lower)


# ---- hostile folders and games


@pytest.mark.parametrize("model_type", ["llama", "hostile"])
def test_the_code_in_a_model_folder_never_runs(model_type, tmp_path, monkeypatch):
    """Not even if someone answers the question of transformers with yes."""
    folder = Path(shutil.copytree(ROOT / "models" / "keyquest", tmp_path / "model"))
    (folder / "hostile.py").write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')\n")
    names = {"AutoConfig": "A", "AutoModelForCausalLM": "B", "AutoTokenizer": ["C", None]}
    code = {name: f"hostile.{value}" for name, value in names.items()}
    for name in ("config.json", "tokenizer_config.json"):
        changes = {"auto_map": code, "tokenizer_class": "C"}
        if name == "config.json":
            changes = {"auto_map": code, "model_type": model_type}
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (folder / "pytorch_model.bin").write_bytes(PICKLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 100))
    with suppress(SetupError):
        load_policy(str(folder), "keyquest")
    with suppress(SetupError):
        sweep.refuse_other_settings(config.Config(env="keyquest", model=str(folder), lr=1.0), {})
    (folder / "model.safetensors").unlink()
    with pytest.raises(SetupError, match="cannot be loaded"):
        load_policy(str(folder), "keyquest")
    assert not list(tmp_path.glob("PWNED"))


PROGRAMS = (
    "open('PWNED', 'w')",
    "__import__('os').system('touch PWNED')",
    "().__class__.__base__.__subclasses__()",
    "r.__class__",
    "r.name.__class__",
    "[x for x in (1,)]",
    "(lambda: 1)()",
    "r.name if r else o",
    "f'{r.name}'",
    "r.name * 10 ** 9",
    "r['name']",
    "(r := o)",
    "r.name.upper()",
    "not r",
    "r and o",
    "",
    "r.name; o",
)


@pytest.mark.parametrize("text", PROGRAMS)
def test_a_program_in_a_grammar_is_refused(text):
    with pytest.raises((ValueError, SyntaxError)):
        compile_expression(text)


def test_a_crafted_game_runs_no_code(tmp_path, monkeypatch):
    kind, marker = "look_at_obj_in_light", tmp_path / "PWNED"
    game = generate("train", kind, 0)
    assert "{r.name or r.id}" in game["grammar"]
    program = f"{{open('{marker}', 'w') and r.name}}"
    crafted = {**game, "grammar": game["grammar"].replace("{r.name or r.id}", program)}
    folder = tmp_path / "json_2.1.1" / "valid_unseen" / f"{kind}-Book-None-DeskLamp-302"
    for name, data in (("trial0", crafted), ("trial1", game)):
        (folder / name).mkdir(parents=True)
        (folder / name / "game.tw-pddl").write_text(json.dumps(data))
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    with envs.ALFWorld((kind,), workers=1) as world:
        bad, good = world.tasks("ood")
        with pytest.raises(SetupError, match="can't be played .*its grammar has code in it"):
            world.reset([bad])
        assert world.reset([good])[0].look.startswith("In the room are ")
    assert not marker.exists()


# ---- simulators


@pytest.fixture(scope="module")
def world():
    with envs.ScienceWorld(("find-plant",), jvms=1) as world:
        yield world


def goals(observations):
    """What stays the same in another process: it puts things in an order of its own."""
    return [now and now.goal for now in observations]


def test_a_stranger_at_the_simulators_port_is_refused_and_the_world_plays_on(world):
    from py4j.java_gateway import GatewayParameters, JavaGateway
    from py4j.protocol import Py4JError

    (jvm,) = world.simulators.jvms
    ours = jvm.gateway.gateway_parameters
    tasks = world.tasks("train")[:1]
    before = goals(world.reset(tasks))
    for token in (None, "", "guess", ours.auth_token[:-1] + "!"):
        parameters = GatewayParameters(port=ours.port, auth_token=token, read_timeout=60)
        stranger = JavaGateway(gateway_parameters=parameters)
        with pytest.raises(Py4JError, match="(?i)authenticat"):
            stranger.jvm.java.lang.Runtime.getRuntime()
        with suppress(Py4JError):
            # to end it is not allowed either
            stranger.shutdown()
    # another user can read a command line
    assert ours.auth_token not in Path(f"/proc/{jvm.process.pid}/cmdline").read_text()
    assert world.step({0: "look around"})[0].reply
    assert goals(world.reset(tasks)) == before


def test_a_simulator_that_dies_while_tasks_are_listed_is_replaced(world, caplog):
    (jvm,) = world.simulators.jvms
    tasks, ask = world.tasks("iid"), jvm.strings
    victims = [jvm.process]

    def ask_the_dead(java_list):
        if victims:
            victims.pop().kill()
        return ask(java_list)

    jvm.strings = ask_the_dead
    assert world.tasks("iid") == tasks
    del jvm.strings
    assert not victims
    assert caplog.records == []


def test_an_evaluation_that_was_lost_is_no_failure(world, caplog):
    (jvm,) = world.simulators.jvms
    policy, step = load_policy("tiny", "scienceworld"), world.step
    tasks = {split: world.tasks(split)[:2] for split in ("iid", "ood")}
    cfg = config.Config(evaluate="checkpoint.pt", turns=2, max_tokens=8)

    def step_of_the_dead(actions):
        jvm.process.kill()
        return step(actions)

    world.step = step_of_the_dead
    row = train.evaluate(world, policy, tasks, cfg, 5)
    del world.step
    assert (row["iid_success"], row["iid_lost"], row["iid_by_task"]) == (None, 2, {})
    assert (row["ood_success"], row["ood_lost"], row["ood_by_task"]) == (None, 2, {})
    assert caplog.records == []
    row |= {"step": 5, "seconds": 1.0}
    assert "evaluation: IID lost, OOD lost" in report.line(row)
    # left out of every mean
    won = {f"{split}_success": 0.5 for split in tasks} | {f"{s}_by_task": {} for s in tasks}
    numbers = report.summary([won, row], 2)
    assert [numbers[f"iid_{name}"] for name in ("before", "after", "best", "last")] == [0.5] * 4
    assert "after IID lost" in report.last_line([row])
    assert None not in world.reset(tasks["iid"])


def hang(jvm):
    """Stop a process, and lose patience with it in 2 seconds, not 120 -> the process"""
    for connection in jvm.gateway._gateway_client.deque:
        connection.socket.settimeout(2)
    jvm.gateway.gateway_parameters.read_timeout = 2
    os.kill(jvm.process.pid, signal.SIGSTOP)
    return jvm.process


def test_a_simulator_that_hangs_is_replaced_and_its_episodes_are_lost(world, caplog):
    (jvm,) = world.simulators.jvms
    tasks = world.tasks("train")[:6]
    first, stopped = goals(world.reset(tasks)), hang(jvm)
    begin = time.perf_counter()
    # the first episode waits, the others do not wait again
    assert world.step(dict.fromkeys(range(6), "look around")) == dict.fromkeys(range(6))
    assert time.perf_counter() - begin < 10
    assert stopped.poll() == -signal.SIGKILL
    # between two steps nothing is lost
    assert goals(world.reset(tasks)) == first
    stopped = hang(jvm)
    assert goals(world.reset(tasks)) == first
    assert stopped.poll() == -signal.SIGKILL
    assert caplog.records == []
