"""What is refused in one line: flags that do nothing, what is not ours to write over, what does not
fit. A row is what is done, and what the line says.
"""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from test_faults import ROOT, call, contents, finished, refuses, rows_of, setting

import plot
import train
from config import decide, parse_flags
from support.run_folder import SetupError
from tools import study, transcript, warmstart

__all__ = ["finished"]
# where they do nothing: flags
NOTHING = {
    "--algo grpo": "--critic-lr 1|--critic-minibatches 2|--value-clip 1|--discount 1",
    "--env keyquest": "--games auto|--simplifications easy",
    "--env alfworld": "--env alfworld --games generated --simplifications easy",
    "--env scienceworld": "--env scienceworld --games real",
    "a tiny policy": "--think off|--think on",
    "--entropy-target": "--entropy-coef 0.1 --entropy-target 1",
    "--entropy-coef 0": "--entropy-coef 0 --alpha 3|--entropy-coef 0 --smoothing hinge",
    "--smoothing off": "--smoothing off --window 3",
    "--dynamic-weight off": "--dynamic-weight off --gamma 1",
}
if find_spec("textworld") is None:
    # a newer Python has no ALFWorld
    del NOTHING["--env alfworld"]
EACH = [(flags, where) for where, row in NOTHING.items() for flags in rows_of(row)]


@pytest.mark.parametrize("flags, where", EACH)
def test_a_flag_that_does_nothing_is_refused(flags, where):
    with pytest.raises(SetupError, match=f"does nothing with {where}; leave it out"):
        decide(parse_flags(["--env", "keyquest", *flags.split()]))


SOMETHING = """
--entropy-coef 0 --smoothing off|--smoothing off --dynamic-weight off|--algo ppo --critic-lr 1
"""


@pytest.mark.parametrize("flags", rows_of(SOMETHING))
def test_what_switches_off_is_not(flags):
    decide(parse_flags(["--env", "keyquest", *flags.split()]))


def test_a_saved_run_may_have_it(finished, tmp_path):
    run = shutil.copytree(finished["grpo"], tmp_path / "run")
    setting(critic_lr=0.5, window=3, smoothing="off")(run / "config.json")
    assert decide({"resume": True, "out": str(run)}).critic_lr == 0.5


MINE = "mine/log.txt mine/tasks.json mine.new/a.new linked/step-0000.txt new.unfinished/x a.png"
WARM = "--env keyquest --out y"
NOT_OURS = [
    (train, "--env keyquest --out mine", "mine exists already"),
    (train, "--env keyquest --out mine.new", "mine.new exists already"),
    (train, "--env keyquest --out link", "link exists already"),
    (train, "--env keyquest --out 'a\nb'", r"'a\nb' has characters that cannot be printed"),
    (train, "--env keyquest --out \udcff", r"'\udcff' has characters that cannot be printed"),
    (plot, "RUN --out \udcff", r"'\udcff' has characters that cannot be printed"),
    (plot, "RUN --draw kl --out .", "kl.png is not of this program"),
    (plot, "RUN --draw ../kl", "../kl is no figure"),
    (plot, "RUN --out ''", "No such file"),
    (transcript, "RUN --out mine/log.txt", "mine/log.txt is not of this program"),
    (warmstart, f"{WARM} --out mine", "mine exists already"),
    (warmstart, f"{WARM} --out new", "new.unfinished is not of a warm start"),
    (warmstart, f"{WARM} --rare nan", "--rare must be between 0 and 1"),
    (warmstart, f"{WARM} --rare 1 --model x", "--rare does nothing with --model"),
    (warmstart, f"{WARM} --model x --misname 1", "--misname does nothing with --env"),
    (warmstart, f"{WARM} --measure none --eval-episodes 1", "does nothing with --measure none"),
    (study, "run arms.json", "'../up' is no arm"),
    (study, "run flags.json", "'a' is no arm"),
    (study, "run seeds.json", "seeds.json cannot be read"),
]


@pytest.mark.parametrize("program, flags, says", NOT_OURS)
def test_what_is_not_ours_stays(program, flags, says, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in [tmp_path / name for name in [*MINE.split(), "kl.png"]]:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (tmp_path / "link").mkdir()
    os.symlink(tmp_path / "linked", "link/transcripts")
    for name, value in {"arms": {"../up": ""}, "flags": "--help", "seeds": 5}.items():
        study_of = {"flags": "", "arms": {"a": ""}, "seeds": [0, 1], name: value}
        (tmp_path / f"{name}.json").write_text(json.dumps(study_of))
    before = contents(tmp_path)
    run = [str(finished["grpo"]) if flag == "RUN" else flag for flag in shlex.split(flags)]
    refuses(program, *run, says=says)
    assert contents(tmp_path) == before


def weight(change):
    return lambda s: s["model"].update(
        {"model.norm.weight": change(s["model"]["model.norm.weight"])}
    )


def moment(change, name="exp_avg_sq"):
    """Of a matrix."""
    first = lambda s: s["critic_optimizer"]["state"][0]
    return lambda s: first(s).update({name: change(first(s)["exp_avg_sq"])})


# what fused AdamW would read past the end of, and the like
CHANGES = [
    lambda w: w[:-1].clone(),
    torch.Tensor.double,
    torch.Tensor.to_sparse,
    lambda w: w.to("meta"),
]
CHANGES += [torch.Tensor.tolist, lambda w: w[:1].expand(w.shape), lambda w: w.to(torch.complex64)]
FORMS = [kind(change) for kind in (weight, moment) for change in CHANGES]
FORMS += [moment(lambda m: m, name) for name in ("step", "other")]
FORMS += [moment(lambda m: m.t().contiguous().t()), lambda s: s.update(colour=5, step=3)]
FORMS += [lambda s: s["optimizer"]["state"].pop(3), lambda s: s["optimizer"].update(state={})]
FORMS += [lambda s: s["optimizer"]["param_groups"].clear(), lambda s: s.update(step=2)]
FORMS += [lambda s: s.pop("critic_optimizer"), lambda s: s["critic"].popitem()]
FORMS += [lambda s: s["history"].append(1.0), lambda s: s.update(history=[1, 1, 1])]
FORMS += [lambda s: s.update(history=[math.nan] * 3)]


@pytest.mark.parametrize("change", FORMS)
def test_a_checkpoint_of_another_form_is_not_loaded(change, finished, tmp_path):
    run = shutil.copytree(finished["ppo"], tmp_path / "run")
    saved = torch.load(run / "checkpoint.pt")
    change(saved)
    torch.save(saved, run / "checkpoint.pt")
    refuses(train, "--resume", "--out", run, says="checkpoint.pt cannot be read (its ")


ASKS = [{"turns": v} for v in ("4", -4, True, [4], 10**400)] + [{"max_tokens": v} for v in (0, {})]
ASKS += [{"lr": v} for v in ("x", -1, math.nan)] + [{"tasks": 5}, {"think": True}, {"think": "no"}]


@pytest.mark.parametrize("asks", ASKS)
def test_what_a_model_asks_for_is_checked_like_a_flag(asks, tmp_path):
    folder = shutil.copytree(ROOT / "models" / "keyquest", tmp_path / "model")
    setting(**asks)(folder / "config.json")
    refuses(
        train, "--env", "keyquest", "--model", folder, says=f"config.json of model '{folder}': --"
    )


@pytest.mark.parametrize("text", [r"$\frac{", r"$\frac{$", r"\$x$", "\ud800"])
def test_any_name_is_drawn(text, finished, tmp_path):
    run = shutil.copytree(finished["grpo"], tmp_path / "run")
    setting(env=text, turns=10**9)(run / "config.json")
    assert call(plot, f"$\\frac{{$={run}", "--out", tmp_path)[0] == 0


@pytest.mark.parametrize("command", ["train.py", "plot.py", "-m tools.study", "-m tools.warmstart"])
def test_help_goes_into_a_pipe_of_ascii(command):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    run = [sys.executable, *command.split(), "--help"]
    done = subprocess.run(run, cwd=ROOT, env=os.environ | ascii_only, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and b"--" in done.stdout
