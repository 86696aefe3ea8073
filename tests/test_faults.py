"""What a user can get wrong, what can break around a run, and who else is on the machine.

A fault is a row of a table: what is done, and what the line says. It ends in that one line and a
status that is not 0; nothing is overwritten, no process is left.
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
from importlib.util import find_spec
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import config
import plot
import train
from envs import World
from policy import asked_for, load_policy
from support import report, run_folder
from support.run_folder import SetupError, is_new, load_checkpoint, locked, read_log
from worlds.alfworld import ALFWorld
from worlds.alfworld_engine import compile_expression
from worlds.alfworld_generate import generate
from worlds.scienceworld import ScienceWorld

ROOT = Path(__file__).parent.parent
SMALL = (
    "--env keyquest --tasks short --tasks-per-step 2 --group-size 2 --minibatches 2 --turns 4 "
    "--eval-episodes 2 --eval-every 2 --steps 3"
).split()
NO_ALFWORLD = find_spec("fast_downward") is None
needs_alfworld = pytest.mark.skipif(NO_ALFWORLD, reason="ALFWorld needs Python 3.11 or 3.12")
# the same examples every time, and no folder of them
settings.register_profile("faults", derandomize=True, database=None, deadline=None)
settings.load_profile("faults")


def call(program, *arguments):
    """main() of a program in this process -> (status, stdout, stderr); a new one costs seconds."""
    output, error, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(error):
        patch.setattr(sys, "argv", [program.__name__, *map(str, arguments)])
        try:
            program.main()
        except SystemExit as stop:
            status = stop.code
    if isinstance(status, str):
        # as Python does with a text
        return 1, output.getvalue(), error.getvalue() + status
    return status, output.getvalue(), error.getvalue()


def refuses(program, *arguments, says):
    status, _, error = call(program, *arguments)
    assert status != 0
    assert len(error.strip().splitlines()) == 1, error
    assert "Traceback" not in error
    # a setting is named as a flag
    assert says in error or says in error.replace("-", "_"), error


def children(pid="self"):
    """The processes that one has started and that have not ended."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


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


def contents(folder):
    """{path: bytes} of all but the lock, which is empty."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path): path.read_bytes() for path in files}


def log_of(folder):
    """The rows of a log without what a clock measured."""
    rows = read_log(folder)
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def rows_of(table):
    """A table as text: several rows in a line, with | between them."""
    return table.strip("\n").replace("\n", "|").split("|")


# ---- flags

NO_VALUES = """
--env nowhere|--env KeyQuest|--env ''|--algo EPO|--algo ''|--dtype float64|--games all
--average mean|--reward dense|--dynamic-weight yes|--smoothing soft|--device ''|--device gpu
--steps ''|--steps 1e3|--steps 2.0|--steps --|--steps many|--step 3|--steps --resume
--kappa-r -inf|--lr ''|--lr one|--lr 1,0|--temperature|--group-size 8.5|--seed 0x1|--turns ∞
--window none|--lora-rank r|--out|--evaluate|--model|--resume maybe|--no-resume|extra|--colour red
-x|--minibatches '1 2'
"""
HINTS = get_type_hints(config.Config)
FLOATS = [name for name, hint in HINTS.items() if hint in (float, float | None)]
INTS = [name for name, hint in HINTS.items() if hint in (int, int | None)]
SHARES = ("discount", "gae_lambda", "entropy_decay", "warmup", "min_lr")
NUMBERS = [(name, value) for name in FLOATS for value in ("nan", "-inf", "-1e300", "1e300")]
NUMBERS += [(name, "inf") for name in FLOATS if name != "kappa_r"]
NUMBERS += [(name, value) for name in INTS for value in ("-1", "1" + 400 * "0")]
NUMBERS += [(name, "0") for name in INTS if name not in ("seed", "lora_rank", "steps")]
NUMBERS += [(name, "-0.1") for name in FLOATS if name != "eval_temperature"]
NUMBERS += [(name, "1.01") for name in SHARES]
NUMBERS += [("temperature", value) for value in ("1e-5", "1e-40", "0.049", "101")]
NUMBERS += [("eval_temperature", "0"), ("seed", "1000000000000"), ("kappa_l", "3")]
NUMBERS += [("eval_episodes", "1000001"), ("lora_rank", "100001"), ("steps", "--")]
# flags, others of the same kind: what the line says. They are given beside `a file`, and `a run`,
# which is finished.
WRONG = {
    "--out ''": "--out is empty",
    "--resume; --resume --out /": "config.json cannot be read ([Errno 2] No such file",
    "--minibatches 3": "doesn't divide",
    "--kappa-l 0.5 --kappa-r 0.4": "kappa_l",
    "--group-size 1 --minibatches 1": "--group-size",
    "--tasks-per-step 1001": "--tasks-per-step must be between 1 and 1000",
    "--discount 0.9; --gae-lambda 0.9": "does nothing with --algo grpo",
    "--smoothing indicator --entropy-coef 0": "does nothing with --entropy-coef 0",
    "--device cuda": "--device cuda: PyTorch sees no such GPU here",
    "--tasks no-such; --tasks 'short, no-such'": "'no-such'; there are: short, long",
    "--env scienceworld": "unknown ScienceWorld task 'short'",
    "--env scienceworld --tasks boil --simplifications hard": "'hard'",
    "--model ''; --model no/such; --model /; --model 'a run'": "cannot be loaded",
    "--out 'a file'; --out /dev/null; --out 'a file/x'; --out /dev/null/x": "Not a directory",
    "--out /proc/x": "/proc/x",
    f"--out {300 * 'x'}": "File name too long",
    "--out 'a run'": "a run exists already; continue it with --resume",
    "--resume --out 'a run' --lr 0.5": "--resume: --lr is 0.5, but the run has",
}
EACH_WRONG = [(flags, says) for rows, says in WRONG.items() for flags in rows.split("; ")]
EACH_WRONG += [(flags, "; see --help") for flags in rows_of(NO_VALUES)]
EACH_WRONG += [(f"--{name.replace('_', '-')}={value}", name) for name, value in NUMBERS]


@pytest.mark.parametrize("flags, says", EACH_WRONG)
def test_flags_that_cannot_work_are_one_line(flags, says, finished, tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    shutil.copytree(finished["grpo"], tmp_path / "a run")
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    refuses(train, *SMALL, "--out", tmp_path / "new", *shlex.split(flags), says=says)
    assert contents(tmp_path) == before and not (tmp_path / "new").exists()


ODD = """
--kappa-r inf --kappa-l 0.5|--tasks 'short, long'|--warmup 1 --min-lr 0|--max-tokens 1|--turns 1
--temperature 0.05 --eval-temperature 0.01|--eval-every 1000000000 --window 1000000000
--tokens-per-batch 1|--gamma 1e6|--algo ppo --clip 1000000 --value-clip 1e-9 --grad-clip 1e-9
"""


@pytest.mark.parametrize("flags", rows_of(ODD))
def test_odd_flags_that_can_work_do(flags, tmp_path):
    # a folder that is there, but empty
    status, _, error = call(train, *SMALL, "--out", tmp_path, "--steps", 2, *shlex.split(flags))
    assert (status, error) == (0, "")
    assert [row["step"] for row in read_log(tmp_path)] == [0, 1, 2]
    plot.load(tmp_path)
    # its config.json, with Infinity, is read again
    assert call(train, "--resume", "--out", tmp_path)[0] == 0


def test_no_steps_are_an_evaluation_of_the_model_of_a_run(finished, tmp_path):
    flags = ["--model", finished["grpo"] / "model", "--steps", 0, "--out", tmp_path]
    assert call(train, *SMALL, *flags)[0] == 0
    (row,) = read_log(tmp_path)
    assert "iid_by_task" in row and "entropy" not in row


put = lambda data: lambda path: path.write_bytes(data)
edit = lambda change: lambda path: path.write_bytes(change(path.read_bytes()))
setting = lambda **new: edit(lambda text: json.dumps(json.loads(text) | new).encode())
tensors = lambda value: lambda path: torch.save(value, path)
state = lambda **new: lambda path: torch.save(torch.load(path) | new, path)


def row(**new):
    """The last one of two values of a name counts."""
    return edit(lambda text: text.replace(b"}\n", f", {json.dumps(new)[1:]}\n".encode(), 1))


PICKLE = b"\x80\x02cos\nsystem\n(S'touch PWNED'\ntR."
GARBAGE = [b"", b"x", b"null", b"[]", b"5", b'"grpo"', b"{}", b'{"env": ', b"[" * 10**5]
GARBAGE += [bytes(4096), b"\xff\xfe\x00", b"PK\x03\x04", PICKLE]
CONFIG = b'{"env": "keyquest", "model": "tiny", "algo": "grpo"'
CONFIGS = [*map(put, GARBAGE), put(CONFIG + b"}"), put(CONFIG + b', "steps": null}')]
CONFIGS += [setting(env=5)]
LOGS = [put(data + b"\n") for data in GARBAGE]
LOGS += [row(entropy="x"), row(success=True), row(kl=float("inf"))]
LOGS += [row(iid_success=float("nan")), row(turns=10**400), row(ood_by_task={"short": "x"})]
LOGS += [
    edit(lambda text: b"\n" + text),
    edit(lambda text: text + b"\n"),
    edit(lambda text: text[1:]),
    edit(lambda text: bytes(100) + b"\n" + text),
    edit(lambda text: text[:40] + b"\n" + text),
    # a row twice, and a row less
    edit(lambda text: text[: text.index(b"\n") + 1] + text),
    edit(lambda text: text[text.index(b"\n") + 1 :]),
]
CHECKPOINTS = [*map(put, GARBAGE), tensors(5), tensors([]), tensors({"step": 1, "model": {}})]
CHECKPOINTS += [state(step="x"), state(model=[]), lambda path: (path.unlink(), path.mkdir())]
CHECKPOINTS += [edit(lambda data: data[: len(data) // 2]), edit(lambda data: data[:-1])]
DAMAGES = {"config.json": CONFIGS, "log.jsonl": LOGS, "checkpoint.pt": CHECKPOINTS}
NO_CONFIG, NO_CHECKPOINT = "config.json cannot be read (", "checkpoint.pt cannot be read ("
NOT_THESE = "checkpoint.pt cannot be read (its names, types, lengths or shapes"
ROWS = "log.jsonl cannot be read (it has {} rows, but the checkpoint goes on at step {})"
BAD_SETTINGS = dict(algo="EPO", env="x", turns=[4], steps=-1, lr="high", seed=10**400, out=5)
BAD_SETTINGS |= dict(gamma=10**400, clip=float("nan"))
# files that can be read, and are not of this run
OTHERS = {
    "config.json": [
        *((setting(**{name: v}), f"{NO_CONFIG}--{name}") for name, v in BAD_SETTINGS.items()),
        (setting(steps=True), f"{NO_CONFIG}its steps"),
        (setting(**{"colour\n": "red"}), rf"{NO_CONFIG}'colour\n' is no"),
        (setting(algo="ppo"), NOT_THESE),
        (setting(model=f"{ROOT}/models/scienceworld"), NOT_THESE),
        (setting(model="no/such"), "model 'no/such'"),
        (setting(lora_rank=2), NOT_THESE),
        (setting(device="cuda"), "--device cuda"),
        (Path.unlink, f"{NO_CONFIG}[Errno 2] No such file"),
    ],
    "log.jsonl": [
        (Path.unlink, ROWS.format(0, 4)),
        (edit(lambda text: text[:-1]), ROWS.format(3, 4)),
        (edit(lambda text: text + b'{"step": 4}\n{"step": 5}\n'), ROWS.format(6, 4)),
    ],
    "checkpoint.pt": [
        (Path.unlink, ROWS.format(4, 0)),
        (state(history=["x"]), NO_CHECKPOINT),
        (state(optimizer={}), NO_CHECKPOINT),
        (state(optimizer={"param_groups": 5, "state": 5}), NO_CHECKPOINT),
        (state(critic={}), NOT_THESE),
        (state(step=99), ROWS.format(4, 99)),
        (state(step=-5), NO_CHECKPOINT),
        (state(model={}), NOT_THESE),
        (state(model={"model.norm.weight": 5}), NOT_THESE),
    ],
    "ppo/checkpoint.pt": [(state(critic={}), NOT_THESE)],
}
EACH_DAMAGE = [(name, do, None) for name, table in DAMAGES.items() for do in table]
EACH_DAMAGE += [(name, *other) for name, table in OTHERS.items() for other in table]


@pytest.mark.parametrize("name, do, says", EACH_DAMAGE)
def test_a_damaged_file_is_one_line(name, do, says, finished, tmp_path, monkeypatch):
    algo, _, name = name.rpartition("/")
    run = shutil.copytree(finished[algo or "grpo"], tmp_path / "run")
    do(run / name)
    monkeypatch.chdir(run)
    before = contents(run)
    where = "(line " if name == "log.jsonl" else "("
    refuses(train, "--resume", "--out", run, says=says or f"{run / name} cannot be read {where}")
    if not says and name != "checkpoint.pt":
        refuses(plot, run, "--out", run, says=f"{run / name} cannot be read {where}")
    assert contents(run) == before


def test_what_to_do_is_never_read_from_a_file(finished, tmp_path):
    run = shutil.copytree(finished["grpo"], tmp_path / "run")
    setting(resume=False, out="elsewhere", device="auto")(run / "config.json")
    cfg = config.decide({"resume": True, "out": str(run), "device": "cpu"})
    assert (cfg.resume, cfg.out, cfg.device) == (True, str(run), "cpu")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
NAMES = st.sampled_from(sorted(HINTS.keys() - {"resume", "device"}))
METRICS = "entropy iid_success iid_by_task ood_by_task ood_success entropy_by_turn kl x".split()
ROW = st.dictionaries(st.sampled_from(METRICS), JSON | st.lists(st.floats()))


lines = lambda rows: "".join(json.dumps(r | {"step": k}) + "\n" for k, r in enumerate(rows))
splice = lambda data, place, n: edit(lambda b: b[: place % len(b)] + data + b[place % len(b) + n :])
# the file, what is done to it, and more flags
ANYTHING = st.one_of(
    st.builds(lambda name, text: ("tasks.json", edit(bytes), f"--{name}={text}"), NAMES, TEXT),
    st.builds(lambda name, value: ("config.json", setting(**{name: value})), NAMES, JSON),
    st.builds(lambda rows: ("log.jsonl", put(lines(rows).encode())), st.lists(ROW, max_size=4)),
    st.tuples(
        st.sampled_from(sorted(DAMAGES)),
        st.builds(splice, st.binary(max_size=30), st.integers(0), st.integers(0, 10**5)),
    ),
)


@pytest.fixture(scope="module")
def spare(finished, tmp_path_factory):
    return shutil.copytree(finished["grpo"], tmp_path_factory.mktemp("spare") / "run")


@settings(max_examples=300)
@given(ANYTHING)
def test_anything_in_a_flag_or_a_file_is_read_or_one_line(spare, finished, anything):
    name, do, *flags = anything
    do(spare / name)
    for use in (
        lambda: config.decide(config.parse_flags([*(flags or ["--resume"]), f"--out={spare}"])),
        lambda: read_log(spare),
        lambda: plot.load(spare),
        lambda: load_checkpoint(spare / "checkpoint.pt"),
    ):
        error = io.StringIO()
        with redirect_stdout(io.StringIO()), redirect_stderr(error):
            try:
                use()
            except SetupError as stop:
                assert "\n" not in str(stop)
            except SystemExit as stop:
                assert (stop.code, error.getvalue().count("\n")) == (2, 1)
    shutil.copy(finished["grpo"] / name, spare)


class Killed(BaseException):
    """As kill -9: nothing catches it."""


ENDS = [("grpo", Killed()), ("ppo", Killed()), ("grpo", OSError(28, "No space left on device"))]


@pytest.mark.parametrize("algo, end", ENDS)
def test_a_run_that_ends_at_each_of_its_writes_goes_on(algo, end, tmp_path, finished, monkeypatch):
    """Its first life ends before a file is on the disk, the next one a file later, and so on."""
    out, fsync, writes = tmp_path / "run", os.fsync, []

    def fsync_or_end(file):
        if len(writes) == life:
            raise end
        writes.append(file)
        fsync(file)

    monkeypatch.setattr(os, "fsync", fsync_or_end)
    for life in range(100):
        begun = (out / "config.json").exists()
        flags = ["--resume"] if begun else [*SMALL, "--algo", algo]
        writes.clear()
        with suppress(Killed):
            status, _, error = call(train, *flags, "--out", out)
            if status == 0:
                break
            assert error.startswith(f"train.py: could not write {out}") and "\n" not in error
            assert not list(out.rglob("*.new"))
        if begun:
            with open(out / "log.jsonl", "a") as log:
                log.write('{"step": 1, "rew')
    assert life > 5
    assert log_of(out) == log_of(finished[algo])


def test_what_cannot_be_written_is_one_line_and_the_old_file_stays(tmp_path):
    path, limit = tmp_path / "checkpoint.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_text("old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        # torch.save makes it an error of its own
        with pytest.raises(SetupError, match="could not write .*checkpoint.pt .File too large"):
            run_folder.save_tensors(str(path), torch.zeros(100_000))
        with pytest.raises(SetupError, match="could not write .*log.jsonl .File too large"):
            run_folder.append_row(tmp_path, {"step": 0, "entropy_by_turn": [0.5] * 10_000})
        with pytest.raises(SetupError, match="step 0: value_loss is not a finite number"):
            run_folder.append_row(tmp_path, {"step": 0, "value_loss": float("inf")})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_text() == "old"
    assert read_log(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_one_line_and_the_run_goes_on(number, tmp_path, finished, monkeypatch):
    monkeypatch.setattr(report, "line", lambda *_: signal.raise_signal(number))
    refuses(train, *SMALL, "--out", tmp_path, says="stopped; --resume")
    monkeypatch.undo()
    assert call(train, "--resume", "--out", tmp_path)[0] == 0
    assert log_of(tmp_path) == log_of(finished["grpo"])


def test_the_second_process_on_a_folder_is_refused(tmp_path):
    out, says = tmp_path / "run", "another process is writing to"
    command = [sys.executable, ROOT / "train.py", *SMALL, "--steps", "500", "--out", out]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert any(line.startswith("step   0") for line in first.stdout)
        first.send_signal(signal.SIGSTOP)
        refuses(train, "--resume", "--out", out, says=f"{says} {out}")
        refuses(train, *SMALL, "--out", out, says="exists already")
        # to read is allowed
        assert call(plot, out, "--out", tmp_path)[0] == 0
    finally:
        first.kill()
        first.communicate()
    # the lock ended with its process
    with locked(out):
        refuses(train, "--resume", "--out", out, says=f"{says} {out}")


def test_of_two_that_begin_at_once_the_second_overwrites_nothing(tmp_path, monkeypatch):
    """The first one begins and ends while the second one loads its model."""
    flags, load, before = [*SMALL, "--out", tmp_path / "run"], train.load_policy, {}

    def load_late(*arguments):
        monkeypatch.undo()
        assert call(train, *flags)[0] == 0
        before.update(contents(tmp_path))
        return load(*arguments)

    monkeypatch.setattr(train, "load_policy", load_late)
    refuses(train, *flags, says="run exists already")
    assert before and contents(tmp_path) == before


# At this rate the weights are finite after the first update, and their products are not, on any
# processor. The second update of the step sees it; if there is none, the next rollout.
DIVERGED = {2: "the loss or its gradient is not finite", 1: "the policy's logits are not finite"}


@pytest.mark.parametrize("minibatches", DIVERGED)
def test_a_policy_that_diverged_is_one_line_also_when_resumed(minibatches, tmp_path):
    flags = f"--lr 1e12 --warmup 0 --reward score --minibatches {minibatches}".split()
    refuses(train, *SMALL, *flags, "--out", tmp_path, says=DIVERGED[minibatches])
    refuses(train, "--resume", "--out", tmp_path, says="a lower --lr")


@pytest.mark.parametrize("model_type", ["llama", "hostile"])
def test_the_code_in_a_model_folder_never_runs(model_type, tmp_path, monkeypatch):
    """Not even if someone answers the question of transformers with yes."""
    folder = Path(shutil.copytree(ROOT / "models" / "keyquest", tmp_path / "model"))
    (folder / "hostile.py").write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')\n")
    names = {"AutoConfig": "A", "AutoModelForCausalLM": "B", "AutoTokenizer": ["C", None]}
    code = {name: f"hostile.{value}" for name, value in names.items()}
    setting(auto_map=code, model_type=model_type)(folder / "config.json")
    setting(auto_map=code, tokenizer_class="C")(folder / "tokenizer_config.json")
    (folder / "pytorch_model.bin").write_bytes(PICKLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 100))
    for look in (asked_for, load_policy):
        with suppress(SetupError):
            look(str(folder), "keyquest")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SetupError, match="cannot be loaded"):
        load_policy(str(folder), "keyquest")
    assert not list(tmp_path.glob("PWNED"))


PROGRAMS = """
open('PWNED', 'w')|__import__('os').system('touch PWNED')|().__class__.__base__.__subclasses__()
r.__class__|r.name.__class__|[x for x in (1,)]|(lambda: 1)()|r.name if r else o|f'{r.name}'
r.name * 10 ** 9|r['name']|(r := o)|r.name.upper()|not r|r and o||r.name; o
"""


@pytest.mark.parametrize("text", rows_of(PROGRAMS))
def test_a_program_in_a_grammar_is_refused(text):
    with pytest.raises((ValueError, SyntaxError)):
        compile_expression(text)


@needs_alfworld
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
    with ALFWorld((kind,), workers=1) as world:
        bad, good = world.tasks("ood")
        with pytest.raises(SetupError, match="can't be played .*its grammar has code in it"):
            world.reset([bad])
        assert world.reset([good])[0].look.startswith("In the room are ")
    assert not marker.exists()


# ---- simulators

ALFWORLD = "--env alfworld --games generated --tasks look_at_obj_in_light"
ENVS = ["--env scienceworld --tasks find-plant", pytest.param(ALFWORLD, marks=needs_alfworld)]


@pytest.mark.parametrize("flags", ENVS)
def test_a_simulator_killed_from_outside_does_not_end_a_run(flags, tmp_path, monkeypatch):
    """In the first turn of the first step, in which it plays two of the four episodes."""
    before, step, victims = children(), World.step, []

    def killing_step(world, actions):
        if len(actions) == 4 and not victims:
            victims.append(min(children() - before))
            os.kill(victims[0], signal.SIGKILL)
        return step(world, actions)

    monkeypatch.setattr(World, "step", killing_step)
    # two simulators
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    status, _, error = call(train, *SMALL, *flags.split(), "--steps", 2, "--out", tmp_path)
    assert status == 0, error
    first, second, last = read_log(tmp_path)
    assert first["lost"] in (1, 2)
    assert first["lost"] + first["episodes"] == second["episodes"] == 4
    assert (second["lost"], last["iid_lost"]) == (0, 0)


@pytest.fixture(scope="module")
def world():
    with ScienceWorld(("find-plant",), jvms=1) as world:
        yield world


def test_a_stranger_at_the_simulators_port_is_refused_and_the_world_plays_on(world):
    from py4j.java_gateway import GatewayParameters, JavaGateway
    from py4j.protocol import Py4JError

    (jvm,), before = world.simulators.jvms, world.reset(world.tasks("train")[:1])
    ours = jvm.gateway.gateway_parameters
    for token in (None, "", "guess", ours.auth_token[:-1] + "!"):
        parameters = GatewayParameters(port=ours.port, auth_token=token)
        stranger = JavaGateway(gateway_parameters=parameters)
        with pytest.raises(Py4JError, match="(?i)authenticat"):
            stranger.jvm.java.lang.Runtime.getRuntime()
        with suppress(Py4JError):
            # to end it is not allowed either
            stranger.shutdown()
    # another user can read a command line
    assert ours.auth_token not in Path(f"/proc/{jvm.process.pid}/cmdline").read_text()
    assert world.step({0: "look around"})[0].reply
    assert world.reset(world.tasks("train")[:1]) == before


def hang(jvm):
    """Stop a process, and lose patience with it in 2 seconds, not 120."""
    for connection in jvm.gateway._gateway_client.deque:
        connection.socket.settimeout(2)
    jvm.gateway.gateway_parameters.read_timeout = 2
    os.kill(jvm.process.pid, signal.SIGSTOP)


def test_a_simulator_that_hangs_or_dies_is_replaced(world, caplog):
    (jvm,) = world.simulators.jvms
    tasks, lost, lose = world.tasks("train")[:6], [], jvm.lose
    list_tasks, start = lambda: world.tasks("iid"), lambda: world.reset(tasks)
    # between two steps nothing is lost
    for ask, hurt in ((list_tasks, lambda jvm: jvm.process.kill()), (start, hang)):
        before, process = ask(), jvm.process
        hurt(jvm)
        assert ask() == before
        assert process.poll() == -signal.SIGKILL
    # in a step the first episode waits, and the others do not wait again
    hang(jvm)
    jvm.lose = lambda slot, error: (lost.append(slot), lose(slot, error))
    assert world.step(dict.fromkeys(range(6), "look around")) == dict.fromkeys(range(6))
    del jvm.lose
    assert lost == [0]
    assert caplog.records == []


# ---- at random: python -m pytest -m long

LONG = {"keyquest": "--tasks short --steps 12", "scienceworld": "--tasks find-plant --steps 4"}


@pytest.mark.long
@pytest.mark.parametrize("algo", ["grpo", "ppo"])
@pytest.mark.parametrize("env", LONG)
def test_a_run_that_is_killed_at_random_ends_as_an_undisturbed_one(env, algo, tmp_path, gone):
    flags = f"--env {env} --algo {algo} {LONG[env]} --eval-episodes 2 --tasks-per-step 2".split()
    rng, since = random.Random(0), time.monotonic()

    def begin(name):
        how = flags if is_new(tmp_path / name) else ["--resume"]
        command = [sys.executable, ROOT / "train.py", *how, "--out", tmp_path / name]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    assert begin("whole").wait() == 0
    seconds = time.monotonic() - since
    for _ in range(7):
        process = begin("killed")
        with suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, seconds))
        simulators = children(process.pid)
        process.kill()
        process.wait()
        assert gone(simulators)
    assert begin("killed").wait() == 0
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
