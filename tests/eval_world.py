"""What does an evaluation need that takes seconds? Tokens of an untrained encoder, and a model trained two steps."""

import json
from functools import partial
from pathlib import Path

from tiny_llm import tiny_tokenizer, write_tiny_llm

from vlmx.cache_specs.ids import ImageTable
from vlmx.extract.backbones.base import build_backbone
from vlmx.extract.runner import extract
from vlmx.extract.sources import ImageRecord, ImageSource
from vlmx.runs import RunFolder

PROMPT = "vicuna-v1.5"


def source_of(name: str, root: Path, keys: list[str]) -> ImageSource:
    """Photos below a data root as `vlmx extract --data NAME` takes them."""
    images = tuple(ImageRecord(key=key, load=partial(_bytes_of, root / key)) for key in dict.fromkeys(keys))
    return ImageSource(name=name, describe=name, images=images)


def _bytes_of(path: Path) -> bytes:
    return path.read_bytes()


def extract_images(caches: Path, sources: list[ImageSource], *, backbone: str = "vit-mini-scenes") -> None:
    """Tokens of an untrained encoder, 64 of each image."""
    extract(build_backbone(backbone, res=(64, 64), weights="random:0"), sources, root=caches, threads=1)


def write_llm(folder: Path) -> Path:
    """The tiny LLM with "Yes" and "No" as one token each, and capital letters, which its alphabet has."""
    write_tiny_llm(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Yes", "No"])
    tokenizer.save_pretrained(folder)
    return folder


def train_run(folder: Path, caches: Path, table: str, *, llm: Path, prompt: str = PROMPT) -> RunFolder:
    """A run of two steps on some images of a table."""
    from vlmx.train.command import train

    rows = [
        {
            "id": f"{number}",
            "image": key,
            "conversations": [
                {"from": "human", "value": "<image>\nwhat is it?"},
                {"from": "gpt", "value": f"thing {number}"},
            ],
        }
        for number, key in enumerate(ImageTable.open(caches, table).keys() * 4)
    ]
    data = folder.with_suffix(".json")
    data.write_text(json.dumps(rows[:8]))
    options = ["--cache", "vit-mini", "--caches", caches, "--data", data, "--llm", llm, "--out", folder]
    settings = [f"images={table}", f"prompt={prompt}", "global_batch=4", "max_steps=2", "optim.lr=1e-5"]
    train([*map(str, options), *settings], standalone_mode=False)
    return RunFolder(folder)
