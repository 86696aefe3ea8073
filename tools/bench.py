"""Speed and memory beside the usual ways: the same work in several ways, in one run.

    python -m tools.bench                     # all parts that can run here
    python -m tools.bench rollout loss        # some of them

The parts are environment, alfworld, rollout, loss, memory, models and step. Each prints a table and
adds it to a JSON file. Ratios carry over to other machines, times do not.
"""

import argparse
import json
import os
import sys

import torch

from support import forward
from support.run_folder import SetupError, one_line, write_json
from tools.bench_models import loss, loss_once, memory, memory_once, model_once, models, step
from tools.bench_worlds import alfworld, environment, rollout
from tools.measure import DEVICE

PARTS = {f.__name__: f for f in (environment, alfworld, rollout, loss, memory, models, step)}
# one measurement each, for a process of its own
ONCE = {f.__name__: f for f in (loss_once, memory_once, model_once)}


def read_results(path):
    """The results of earlier parts. Raises SetupError."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, TypeError, ValueError) as error:
        raise SetupError(f"{path} is not a file of results ({one_line(error)})") from error


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: parser.exit(2, f"bench.py: {message}; see --help\n")
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    text = "where the results go, beside those of parts that ran earlier"
    parser.add_argument("--out", default="bench.json", help=text)
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        function, arguments = args.once
        # as on a GPU; the memory model is for these
        forward.RECOMPUTE_ABOVE = 0
        return print(json.dumps(ONCE[function](*json.loads(arguments))))
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    try:
        results = read_results(args.out)
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
        results |= {"threads": torch.get_num_threads(), "device": device}
        for part in args.parts or PARTS:
            results[part] = PARTS[part]()
            write_json(args.out, results)
    except (SetupError, OSError) as error:
        sys.exit(f"bench.py: {error}")


if __name__ == "__main__":
    main()
