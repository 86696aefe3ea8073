"""A reader's fork: a world is a file and a name; a loss is three places that a search finds."""

import os
import shutil
import subprocess
import sys

import pytest
from test_faults import ROOT, call, log_of

import train

FLAGS = "--env keyquest --steps 1 --tasks-per-step 4 --group-size 4 --turns 8 --eval-episodes 2"
# half of the points are near, so the members of a group differ
FLAGS = f"{FLAGS} --tasks coin --reward score --lr 0.03 --warmup 0".split()


@pytest.fixture
def fork(tmp_path):
    for name in os.listdir(ROOT):
        if name.endswith(".py"):
            shutil.copy(ROOT / name, tmp_path)
    for name in ("support", "worlds", "models/keyquest"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new), encoding="utf-8")


def run(fork, *flags):
    command = [sys.executable, "train.py", *flags]
    result = subprocess.run(command, cwd=fork, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_world_is_one_new_file_and_a_name(fork):
    worlds = fork / "worlds"
    text = (worlds / "keyquest.py").read_text(encoding="utf-8")
    (worlds / "mine.py").write_text(text.replace("class KeyQuest", "class Mine"), encoding="utf-8")
    edit(fork / "envs.py", '"keyquest": "KeyQuest"', '"keyquest": "KeyQuest", "mine": "Mine"')
    run(fork, *FLAGS, "--env", "mine", "--model", "models/keyquest", "--out", "runs/mine")
    assert len(log_of(fork / "runs" / "mine")) == 2


# GRPO without the division by a group's standard deviation
LOSS = [
    ("epo.py", "(returns, group, eps=1e-6):", '(returns, group, eps=1e-6, divide="on"):'),
    ("epo.py", "/ (r.std() + eps)", '/ (r.std() + eps if divide == "on" else 1)'),
    ("config.py", "    clip: f", '    divide: Switch = option("on", "by the std")\n    clip: f'),
    ("train.py", "vantages(episodes, returns)[", "vantages(episodes, returns, cfg)["),
    ("train.py", "vantages(episodes, returns):", "vantages(episodes, returns, cfg):"),
    ("train.py", "(returns, group)", "(returns, group, divide=cfg.divide)"),
]


def test_a_loss_is_a_place_in_epo_one_in_config_and_its_call(fork):
    """It is another loss, and an earlier run can be read."""
    before, undivided = fork / "runs" / "before", fork / "runs" / "undivided"
    assert call(train, *FLAGS, "--out", before)[0] == 0
    for name, old, new in LOSS:
        edit(fork / name, old, new)
    run(fork, *FLAGS, "--divide", "off", "--out", undivided)
    assert log_of(before)[0]["loss"] != log_of(undivided)[0]["loss"]
    printed = run(fork, "--resume", "--out", "runs/before")
    assert "lacks divide: the defaults are taken" in printed
