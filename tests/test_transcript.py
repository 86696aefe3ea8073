"""The transcript page: what is in a file is text, a token's entropy can be read without a mouse."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from support.loading import ROOT
from support.run_folder import SetupError
from tools import transcript

HOSTILE = '<script>alert(1)</script>" onmouseover=alert(2) "onmouseover=\'&'
VOID = {"meta", "br"}


def episode(text="a", **changes):
    turn = {"observation": f"{text}\nmore {text}", "action": text, "invalid": True}
    turn |= {"tokens": [text, "\n"], "entropy": [0.25, 1.0]}
    value = {"task": text, "variation": text, "goal": text, "success": text, "score": text}
    return value | {"turns": [turn]} | changes


def write_run(folder, data, step=16):
    (folder / "transcripts").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    path = folder / "transcripts" / f"step-{step:04d}.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


class Page(HTMLParser):
    """The elements of a page, its text, and whether each element is closed by its own end."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def classes(self, name):
        classes = [attributes.get("class", "") for _, attributes in self.elements]
        return [text for text in classes if name in text.split()]


def test_nothing_of_a_hostile_file_is_markup(tmp_path):
    # a folder's name cannot have a slash
    folder = tmp_path / HOSTILE.replace("/", "")
    data = {"step": HOSTILE, "corridor": [0.0, 0.5], "episodes": [episode(HOSTILE)]}
    write_run(folder, data)
    hostile = transcript.render([transcript.read_transcript(folder)])
    assert "<script" not in hostile
    assert '"onmouseover' not in hostile
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in hostile

    page = Page(hostile)
    assert page.open == []
    # step, task, variation, score, goal, two lines of the observation, token, action
    assert page.text.count(HOSTILE) == 9
    write_run(folder, data | {"step": 1, "episodes": [episode(success="a")]})
    harmless = Page(transcript.render([transcript.read_transcript(folder)]))
    assert page.elements == harmless.elements


def test_the_page_runs_no_script_and_fits_a_phone(tmp_path):
    write_run(tmp_path, {"step": 1, "corridor": None, "episodes": [episode()]})
    page = Page(transcript.render([transcript.read_transcript(tmp_path)]))
    meta = [attributes for tag, attributes in page.elements if tag == "meta"]
    policy = {"http-equiv": "Content-Security-Policy"}
    policy["content"] = "default-src 'none'; style-src 'unsafe-inline'"
    assert policy in meta
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in meta
    assert not any({"title", "src", "href"} & attributes.keys() for _, attributes in page.elements)


def test_every_token_has_its_entropy_and_its_side_of_the_corridor(tmp_path):
    turn = {"observation": "x", "action": None, "invalid": False}
    turn |= {"tokens": ["a", "b", "c"], "entropy": [0.05, 0.25, 2.0]}
    data = {"step": 3, "corridor": [0.1, 0.5], "episodes": [episode(turns=[turn])]}
    write_run(tmp_path, data)
    text = transcript.render([transcript.read_transcript(tmp_path)])
    tokens = re.findall(r'<span class="([^"]*)" style="background: (#\w+)">\s*(.*?)</span>', text)
    assert tokens == [
        ("token below", "#fefbf9", "a<small>0.050</small>"),
        ("token", "#faebdf", "b<small>0.250</small>"),
        ("token above", "#d55e00", "c<small>2.000</small>"),
    ]
    assert "no action" in text
    assert "Corridor: 0.100 to 0.500 nats." in text


def test_the_last_step_is_taken_and_a_line_break_is_visible(tmp_path):
    write_run(tmp_path, "damaged", step=8)
    write_run(tmp_path, {"step": 16, "corridor": [None, None], "episodes": [episode()]})
    run = transcript.read_transcript(tmp_path)
    text = transcript.render([run])
    assert run["step"] == 16
    assert "Corridor: none yet." in text
    assert "⏎<small>" in text
    assert not Page(text).classes("above")[1:]


GOOD = {"step": 1, "corridor": [0.0, 1.0], "episodes": [episode()]}
TURN = GOOD["episodes"][0]["turns"][0]
DAMAGED = {
    "half": json.dumps(GOOD)[:-20],
    "a list": [],
    "no episodes": {"step": 1, "corridor": None},
    "a corridor of text": GOOD | {"corridor": ["<b>", 1]},
    "a corridor of three": GOOD | {"corridor": [0, 1, 2]},
    "episodes of text": GOOD | {"episodes": "abc"},
    "a token without entropy": GOOD | {"episodes": [episode(turns=[TURN | {"entropy": [0.1]}])]},
    "entropy of text": GOOD | {"episodes": [episode(turns=[TURN | {"entropy": ["0", "<b>"]}])]},
    "entropy that is not finite": json.dumps(GOOD).replace("0.25", "NaN"),
    "entropy too large": json.dumps(GOOD).replace("0.25", "1" + "0" * 400),
    "tokens of numbers": GOOD | {"episodes": [episode(turns=[TURN | {"tokens": [1, 2]}])]},
    "no observation": GOOD | {"episodes": [episode(turns=[TURN | {"observation": None}])]},
    "deeply nested": "[" * 100_000,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line(name, tmp_path):
    path = write_run(tmp_path, DAMAGED[name])
    with pytest.raises(SetupError) as error:
        transcript.render([transcript.read_transcript(tmp_path)])
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def run_transcript(*arguments):
    command = [sys.executable, "-m", "tools.transcript", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_command_writes_the_page_of_committed_runs(tmp_path):
    out = tmp_path / "new" / "page.html"
    result = run_transcript("results/lr2e-3", "results/lr2e-3-strong", "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(out)
    page = Page(out.read_text(encoding="utf-8"))
    assert page.open == []
    files = sorted(Path(ROOT, "results").glob("lr2e-3*/*/transcripts/*.json"))
    turns = [
        turn for f in files for e in json.loads(f.read_text())["episodes"] for turn in e["turns"]
    ]
    # two more are in the legend
    assert len(files) == 2
    assert len(page.classes("token")) == sum(len(turn["tokens"]) for turn in turns) + 2
    assert "tiny-grpo-plain-seed1" in page.text


def test_a_command_that_cannot_work_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    cases = {"no transcripts/": tmp_path, "is no run folder": tmp_path / "nowhere"}
    for text, folder in cases.items():
        result = run_transcript(folder, "--out", tmp_path / "page.html")
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1
        assert text in result.stderr
    assert not (tmp_path / "page.html").exists()
