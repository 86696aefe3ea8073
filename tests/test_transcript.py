"""The transcript page: what is in a file is text, a token's entropy can be read without a mouse."""

import html
import json
import re
import shutil
import subprocess
import sys

import pytest

from support.run_folder import ROOT, SetupError
from tools import transcript

LAST = "transcripts/step-0016.json"
HOSTILE = '<script>alert(1)</script>" onmouseover=alert(2) "onmouseover=\'&'
TURN = {"tokens": ["a", "\n", "c"], "entropy": [0.05, 0.25, 2.0], "action": None, "invalid": True}
TURN["observation"] = "x\nmore x"


def page_of(tmp_path, corridor=None, text="x", **turn):
    """A transcript with `text` everywhere -> the tags of its page, and its text."""
    episode = dict.fromkeys(("task", "variation", "goal", "success", "score"), text)
    data = {"step": text, "corridor": corridor, "episodes": [episode | {"turns": [TURN | turn]}]}
    path = tmp_path / text.replace("/", "") / LAST
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(data))
    page = transcript.render([transcript.read_transcript(path)])
    return "".join(re.findall("<[^>]*>", page)), html.unescape(re.sub("<[^>]*>", "", page))


def test_nothing_of_a_hostile_file_is_markup_and_nothing_is_loaded(tmp_path):
    turn = lambda text: {"tokens": [text] * 3, "action": text, "observation": f"{text}\n{text}"}
    tags, text = page_of(tmp_path, text=HOSTILE, **turn(HOSTILE))
    # four of the episode, its step, two of the observation, three tokens, the action
    assert text.count(HOSTILE) == 11
    assert tags == page_of(tmp_path, **turn("x"))[0]
    assert "default-src 'none'; style-src 'unsafe-inline'" in tags
    assert "width=device-width, initial-scale=1" in tags
    assert not re.search(r"<(script|link|img)| (src|href|title|on\w+)=", tags)


def test_every_token_has_its_entropy_and_its_side_of_the_corridor(tmp_path):
    tags, text = page_of(tmp_path, corridor=[0.1, 0.5])
    assert re.findall('"token (.*?)"', tags) == ["above", "below", "below", "above"]
    assert re.findall("94 0 / (.*?)%", tags) == ["2", "12", "100"]
    assert "a0.050⏎0.250c2.000" in text and "Turn 1, invalid:\nno action" in text
    assert "Corridor: 0.100 to 0.500 nats." in text
    assert "Corridor: none yet." in page_of(tmp_path, [None, None], "step 0")[1]


# a pattern of a good file, and what stands there instead
DAMAGES = {
    "half": (".{20}$", ""),
    "a list": (".*", "[]"),
    "no episodes": ('"episodes"', '"other"'),
    "episodes of text": ('("episodes":).*', r'\1 "abc"}'),
    "a corridor of text": ("0.0, 1.0", '"<b>", 1'),
    "a corridor of three": ("0.0, 1.0", "0, 1, 2"),
    "a token without entropy": ("0.25, ", ""),
    "entropy of text": ("0.25", '"<b>"'),
    "entropy that is not finite": ("0.25", "NaN"),
    "entropy too large": ("0.25", "1" + "0" * 400),
    "tokens of numbers": ('"a"', "1"),
    "no observation": (r'"x\\nmore x"', "null"),
    "deeply nested": (".*", "[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_line(damage, tmp_path):
    good = json.dumps({"step": 1, "corridor": [0.0, 1.0], "episodes": [{"turns": [TURN]}]})
    (tmp_path / "a.json").write_text(re.sub(*DAMAGES[damage], good, count=1))
    with pytest.raises(SetupError, match=r"^.*/a\.json cannot be read.*$"):
        transcript.read_transcript(tmp_path / "a.json")


def test_the_command_writes_the_last_transcript_or_a_line(tmp_path):
    run, out = tmp_path / "run", tmp_path / "new" / "page.html"
    command = [sys.executable, "-m", "tools.transcript", run, "--out", out]
    call = lambda: subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert re.fullmatch("transcript.py: .*/run is no run folder .*\n", call().stderr)
    shutil.copytree(f"{ROOT}/results/lr2e-3/tiny-grpo-plain-seed1", run)
    (run / "transcripts" / "step-0008.json").write_text("damaged")
    assert call().stdout == f"{out} has transcripts of 1 of 1 runs\n"
    lists = re.findall('"entropy": (.*?])', (run / LAST).read_text())
    assert out.read_text().count("<small>") == sum(text.count(",") + 1 for text in lists)
    shutil.rmtree(run / "transcripts")
    assert re.fullmatch("transcript.py: no transcripts/.*\n", call().stderr)
