"""How does a GGUF file become a folder that `vlmx train --llm` takes? Weights in float32, tokenizer, chat template.

pip install gguf
python gguf_to_folder.py MODEL.gguf FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import vlmx  # noqa: F401  makes torchvision, and so transformers' models, importable on CPU torch

import torch  # isort: skip
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # isort: skip


def convert(file: Path, folder: Path) -> None:
    """Write `folder`. The quantised weights become the float32 numbers that they stand for."""
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**source), dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())  # transformers does not save the one that came from a GGUF file
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
