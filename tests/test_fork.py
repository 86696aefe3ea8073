"""A reader's fork: a world is a file and a line, a loss is a place in epo.py and in config.py."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from support.loading import ROOT

RUN = "--steps 1 --tasks-per-step 4 --group-size 4 --turns 8 --eval-episodes 2"


@pytest.fixture
def fork(tmp_path):
    for name in os.listdir(ROOT):
        if name.endswith(".py"):
            shutil.copy(os.path.join(ROOT, name), tmp_path)
    for name in ("support", "worlds"):
        shutil.copytree(os.path.join(ROOT, name), tmp_path / name)
    shutil.copytree(os.path.join(ROOT, "models", "keyquest"), tmp_path / "models" / "keyquest")
    return tmp_path


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))


def run(fork, *flags):
    command = [sys.executable, "train.py", *flags]
    result = subprocess.run(command, cwd=fork, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_world_is_one_new_file_and_one_line(fork):
    text = (fork / "worlds" / "keyquest.py").read_text()
    (fork / "mine.py").write_text(text.replace("class KeyQuest", "class Mine"))
    last = '    "keyquest": "worlds.keyquest:KeyQuest",\n'
    edit(fork / "envs.py", last, last + '    "mine": "mine:Mine",\n')
    flags = [*RUN.split(), "--tasks", "short", "--model", "models/keyquest", "--env", "mine"]
    status, printed = run(fork, *flags, "--out", "runs/mine")
    assert status == 0, printed
    assert len(rows(fork / "runs" / "mine")) == 2


def test_a_loss_is_a_place_in_epo_and_a_place_in_config(fork):
    """Clip-higher, and no division by the standard deviation; the earlier run is not locked out."""
    flags = ["--env", "keyquest", *RUN.split(), "--lr", "0.03"]
    # half of the points are near, so the members of a group differ
    flags += ["--tasks", "coin", "--reward", "score", "--warmup", "0"]
    status, printed = run(fork, *flags, "--out", "runs/before")
    assert status == 0, printed
    epo, config = fork / "epo.py", fork / "config.py"
    edit(epo, "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(1 - clip, 1 + clip_higher)")
    edit(epo, "weights, clip=0.2):", "weights, clip=0.2, clip_higher=0.2):")
    edit(epo, " clip=0.2,\n", " clip=0.2, clip_higher=0.2,\n")
    edit(epo, "advantages, weights, clip)\n", "advantages, weights, clip, clip_higher)\n")
    edit(epo, "(returns, group, eps=1e-6):", "(returns, group, eps=1e-6, divide=1):")
    divided = "(r - r.mean()) / (r.std() + eps)"
    edit(epo, divided, f"{divided} if divide else r - r.mean()")
    field = re.search(r"    clip: float = .*\n", config.read_text())[0]
    higher = '    clip_higher: float = option(0.2, "its upper side")\n'
    divide = '    divide: int = option(1, "by the std of a group")\n'
    edit(config, field, field + higher + divide)

    higher = run(fork, *flags, "--out", "runs/higher", "--clip-higher", "0")
    undivided = run(fork, *flags, "--out", "runs/undivided", "--divide", "0")
    assert (higher[0], undivided[0]) == (0, 0), higher[1] + undivided[1]
    names = ("before", "higher", "undivided")
    losses = {rows(fork / "runs" / name)[0]["policy_loss"] for name in names}
    assert len(losses) == 3
    status, printed = run(fork, "--evaluate", "runs/before/checkpoint.pt")
    assert status == 0 and "lacks clip_higher, divide: the defaults are taken" in printed
