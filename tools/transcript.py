"""Episodes token by token, as one HTML page: how sure was the policy of each token that it wrote?

    python -m tools.transcript runs/scienceworld results/lr2e-3 --out figures/mine/transcript.html

An argument is a run folder, or a folder of run folders. Of each run the last
transcripts/step-NNNN.json is shown: a won and a lost episode, if the step had both. The page runs
no script and loads nothing, and whatever is in a file is shown as text.
"""

import argparse
import json
import math
import os
import sys

from jinja2 import Environment

from plot import run_folders
from support.run_folder import SetupError, damaged, one_line, write_whole

# what a file of another shape than expected leads to
DAMAGED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
DAMAGED += (OSError, RecursionError)
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'">
<title>Token entropy</title>
<style>
body { font: 16px/1.5 sans-serif; max-width: 60em; margin: 1em auto; padding: 0 1em;
       color: #000; background: #fff; overflow-wrap: anywhere }
pre, summary, .token { font-family: monospace; white-space: pre-wrap; margin: 0; tab-size: 2 }
summary { padding: .5em 0; cursor: pointer }
.turn { border-left: 4px solid #ccc; padding-left: .8em; margin: 1em 0 }
.invalid { border-color: #000 }
.token { display: inline-block; max-width: 100%; margin: 0 2px 4px 0; padding: 0 2px;
         box-shadow: 0 0 0 1px #ccc; vertical-align: top }
.token small { display: block; font-size: 11px; line-height: 1.2 }
.above { outline: 2px solid #000 }
.below { border-bottom: 3px dotted #000 }
.scale { display: flex; gap: .5em }
.bar { flex: 1; border: 1px solid #888;
       background: linear-gradient(to right, {{ shade(0) }}, {{ shade(top) }}) }
</style>
</head>
<body>
<h1>Token entropy</h1>
<p>The number under a token, and its background, is the entropy in nats of the distribution that it
was drawn from. <span class="token above">Outlined</span>: above the corridor's cap.
<span class="token below">Dotted</span>: below its floor. Open an observation to read all of it.</p>
<div class="scale">0<div class="bar"></div>{{ "%.3f" % top }} nats</div>
{% for run in runs %}{% for episode in run.episodes %}
<h2>{{ run.name }}</h2>
<p>Step {{ run.step }}, {{ episode.task }}, variation {{ episode.variation }}:
<strong>{{ "success" if episode.success else "failure" }}</strong>, score {{ episode.score }},
{{ episode.turns | length }} turns. Corridor: {{ run.corridor }}.<br>
Task: {{ episode.goal }}</p>
{% for turn in episode.turns %}
<div class="turn{{ " invalid" if turn.invalid }}">
<details{{ " open" if loop.first }}>
<summary>{{ turn.summary }}</summary><pre>{{ turn.rest }}</pre></details>
<div>{% for text, entropy in turn.tokens -%}
<span class="token{{ mark(entropy, run) }}" style="background: {{ shade(entropy) }}">
{{- text }}<small>{{ "%.3f" % entropy }}</small></span>
{%- endfor %}</div>
Turn {{ loop.index }}{{ ", invalid" if turn.invalid }}:
{{ "no action" if turn.action is none else turn.action }}
</div>
{% endfor %}{% endfor %}{% endfor %}
</body>
</html>
"""


def number(value):
    """A JSON number as a float. Raises ValueError for anything else."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def read_turn(turn):
    summary, _, rest = turn["observation"].strip().partition("\n")
    # a line break inside a token would look like one between tokens
    texts = [text.replace("\n", "⏎") for text in turn["tokens"]]
    tokens = list(zip(texts, map(number, turn["entropy"]), strict=True))
    more = {"action": turn["action"], "invalid": turn["invalid"]}
    return {"summary": summary, "rest": rest, "tokens": tokens, **more}


def read_transcript(folder):
    """The last transcript of a run as PAGE needs it, or None. SetupError: it is damaged."""
    paths = sorted((folder / "transcripts").glob("step-*.json"))
    if not paths:
        return None
    try:
        data = json.loads(paths[-1].read_text(encoding="utf-8"))
        # of step 0 there is none, and each of its ends can be missing
        low, high = data["corridor"] or (None, None)
        floor = -math.inf if low is None else number(low)
        cap = math.inf if high is None else number(high)
        names = ("task", "variation", "success", "score")
        episodes = [
            {name: episode[name] for name in names}
            # earlier versions did not write the goal
            | {"goal": episode.get("goal", "")}
            | {"turns": [read_turn(turn) for turn in episode["turns"]]}
            for episode in data["episodes"]
        ]
        step = data["step"]
    except DAMAGED as error:
        raise damaged(paths[-1], f"{type(error).__name__}: {one_line(error)}") from error
    corridor = f"{floor:.3f} to {cap:.3f} nats"
    if (low, high) == (None, None):
        corridor = "none yet"
    run = {"name": folder.name, "step": step, "corridor": corridor, "episodes": episodes}
    return run | {"floor": floor, "cap": cap}


def render(runs):
    """Transcripts -> HTML, with one scale of colours for the whole page."""
    turns = [turn for run in runs for episode in run["episodes"] for turn in episode["turns"]]
    top = max((entropy for turn in turns for _, entropy in turn["tokens"]), default=0) or 1.0

    def shade(entropy):
        """From white to an orange that black can be read on; it also grows darker in grey."""
        share = min(max(entropy / top, 0), 1)
        return "#" + "".join(f"{round(255 - (255 - end) * share):02x}" for end in (213, 94, 0))

    def mark(entropy, run):
        above, below = entropy > run["cap"], entropy < run["floor"]
        return " above" * above + " below" * below

    template = Environment(autoescape=True).from_string(PAGE)
    return template.render(runs=runs, top=top, shade=shade, mark=mark)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: parser.exit(2, f"transcript.py: {message}; see --help\n")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or a folder of some")
    parser.add_argument("--out", default="figures/transcript.html", help="the file to write")
    args = parser.parse_args()
    try:
        folders = [folder for path in args.runs for folder in run_folders(path)]
        transcripts = [run for run in map(read_transcript, folders) if run]
        if not transcripts:
            raise SetupError(f"no transcripts/step-*.json in {', '.join(args.runs)}")
        if missing := len(folders) - len(transcripts):
            print(f"{missing} of {len(folders)} runs have no transcripts/step-*.json")
        os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
        # a lone surrogate cannot be encoded
        page = render(transcripts).encode(errors="replace")
        write_whole(args.out, lambda file: file.write(page))
        print(args.out)
    except (SetupError, OSError) as error:
        sys.exit(f"transcript.py: {error}")


if __name__ == "__main__":
    main()
