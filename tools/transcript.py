"""Episodes token by token, as one HTML page: how sure was the policy of each token that it wrote?

    python -m tools.transcript runs/scienceworld results/lr2e-3 --out figures/mine/transcript.html

Of each run the last transcripts/step-NNNN.json is shown: a won and a lost episode, if the step had
both. The page runs no script and loads nothing, and whatever is in a file is shown as text.
"""

import json
import math
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from jinja2 import Environment

from plot import DAMAGED, run_folders
from support.report import read_arguments
from support.run_folder import SetupError, damaged, one_line, write_whole

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Token entropy</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta
http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"><style>
body { font: 16px/1.5 sans-serif; max-width: 60em; margin: auto; padding: 1em }
pre, summary, .token { font-family: monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.turn { border-left: 4px solid #ccc; padding-left: .8em; margin: 1em 0 }
.token { display: inline-block; margin: 2px; padding: 0 2px; border: 1px solid #ccc }
.above { outline: 2px solid #000 } .below { border-bottom: 3px dotted #000 }
small { display: block } </style></head><body><h1>Token entropy</h1>
<p>The number under a token is the entropy in nats of the distribution that it was drawn from. White
is 0, and orange {{ "%.3f" % top }}. <span class="token above">Outlined</span>: above the corridor.
<span class="token below">Dotted</span>: below it. Open an observation to read all of it.</p>
{% for run in runs %}{% for episode in run.episodes %}<h2>{{ run.name }}</h2>
<p>Step {{ run.step }}, {{ episode.task }}, variation {{ episode.variation }}:
<strong>{{ "success" if episode.success else "failure" }}</strong>, score {{ episode.score }},
{{ episode.turns | length }} turns. Corridor: {{ run.corridor }}.<br>Task: {{ episode.goal }}</p>
{% for turn in episode.turns %}{% set first, _, rest = turn.observation.partition("\n") %}
<div class="turn"><details{{ " open" if loop.first }}>
<summary>{{ first }}</summary><pre>{{ rest }}</pre></details>
{% for text, nats in turn.shown -%}
<span class="token{{ " above" if nats > run.cap }}{{ " below" if nats < run.floor }}"
 style="background: rgb(213 94 0 / {{ "%.0f" % (100 * nats / top) }}%)">
{{- text }}<small>{{ "%.3f" % nats }}</small></span>
{%- endfor %}<br>Turn {{ loop.index }}{{ ", invalid" if turn.invalid }}:
{{ "no action" if turn.action is none else turn.action }}</div>{% endfor %}{% endfor %}{% endfor %}
</body></html>"""


def read_transcript(path):
    """-> what PAGE shows of a transcript. Raises SetupError."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        # of step 0 there is no corridor, and each of its ends can be missing
        low, high = run["corridor"] or (None, None)
        run["floor"] = -math.inf if low is None else low
        run["cap"] = math.inf if high is None else high
        corridor = "{floor:.3f} to {cap:.3f} nats".format(**run)
        run["corridor"] = corridor.replace("-inf to inf nats", "none yet")
        run["name"] = path.parent.parent.name
        for turn in [turn for episode in run["episodes"] for turn in episode["turns"]]:
            if not all(map(math.isfinite, turn["entropy"])):
                raise ValueError("an entropy is not finite")
            # a line break inside a token would look like one between tokens
            texts = [text.replace("\n", "⏎") for text in turn["tokens"]]
            turn["shown"] = list(zip(texts, turn["entropy"], strict=True))
            turn["observation"] = turn["observation"].strip()
    except DAMAGED as error:
        raise damaged(path, f"{type(error).__name__}: {one_line(error)}") from error
    return run


def render(runs):
    """Transcripts -> HTML, with one scale of colours for the whole page."""
    turns = [turn for run in runs for episode in run["episodes"] for turn in episode["turns"]]
    top = max((nats for turn in turns for nats in turn["entropy"]), default=0) or 1.0
    return Environment(autoescape=True).from_string(PAGE).render(runs=runs, top=top)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or a folder of some")
    parser.add_argument("--out", default="figures/transcript.html", help="the file to write")
    args = read_arguments(parser, "transcript.py")
    try:
        folders = [folder for path in args.runs for folder in run_folders(path)]
        paths = [sorted((folder / "transcripts").glob("step-*.json"))[-1:] for folder in folders]
        runs = [read_transcript(path) for last in paths for path in last]
        if not runs:
            raise SetupError(f"no transcripts/step-*.json in {', '.join(args.runs)}")
        # a lone surrogate cannot be encoded
        page = render(runs).encode(errors="replace")
        write_whole(args.out, lambda file: file.write(page), mark=b"<title>Token entropy</title>")
        print(f"{args.out} has transcripts of {len(runs)} of {len(folders)} runs")
    except (SetupError, OSError) as error:
        sys.exit(f"transcript.py: {error}")


if __name__ == "__main__":
    main()
