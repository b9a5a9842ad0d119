"""What does a training need that takes a second? A cache of 20 images, 40 conversations, an LLM of two layers."""

import json
from pathlib import Path

import numpy as np
import yaml
from tiny_llm import write_tiny_llm

from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.ids import ImageEntry, ImageTable, image_id
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.cache_specs.writer import CacheWriter

IMAGES = 20
CONFIG = {
    "prompt": "plain",
    "global_batch": 8,
    "micro_batch": 4,
    "optim": {"lr": 1e-3, "connector_lr": 3e-3},
    "checkpoint": {"every_steps": 2, "keep": 2},
    "log_every": 1,
}


def make_world(root: Path, *, name: str = "vit-mini-scenes", grid: tuple[int, int] = (2, 2), dim: int = 6) -> Path:
    """Fill `root` with caches/, photos.json, llm/ and config.yaml; an epoch has five steps."""
    ids = [image_id(f"image {n}".encode()) for n in range(IMAGES)]
    tokens_BND = np.random.default_rng(0).normal(size=(IMAGES, grid[0] * grid[1], dim)).astype(np.float16)
    side = 32 * grid[0]
    spec = CacheSpec(
        backbone=name,
        weights_sha256="random:0",
        forward_version=1,
        feature="last",
        out_norm="none",
        geometry=Geometry(mode="letterbox", height=side, width=side, fill=(127, 127, 127)),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    with CacheWriter(root / "caches", spec, TokenShape(grid=grid, dim=dim)) as writer:
        for plan in writer.plan(ids):
            writer.commit(plan, tokens_BND, {})
        writer.seal()
    entries = [ImageEntry(key=f"{n}.jpg", id=i, width=64, height=64) for n, i in enumerate(ids)]
    ImageTable.merge(root / "caches", "photos", entries)
    (root / "photos.json").write_text(json.dumps([_row(n) for n in range(40)]))
    write_tiny_llm(root / "llm")
    (root / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return root


def arguments(world: Path, out: Path, *extra: str) -> list[str]:
    """The arguments of `vlmx train` in that world."""
    options = {"cache": "vit-mini", "caches": world / "caches", "connector": "mlp2", "llm": world / "llm"}
    options |= {"data": world / "photos.json", "config": world / "config.yaml", "out": out}
    return [text for key, value in options.items() for text in (f"--{key}", str(value))] + list(extra)


def _row(number: int) -> dict:
    texts = [f"<image>\nis it {number}?", "yes" if number % 2 else "no", "what is it?", "a " * (number % 9)]
    return {
        "id": f"c{number}",
        **({"image": f"{number % IMAGES}.jpg"} if number % 5 else {}),
        "conversations": [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)],
    }
