"""A small cache for tests: ten images, one of them all zero and one undecodable, in shards of four."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.ids import image_id
from vlmx.cache_specs.layout import PROVENANCE
from vlmx.cache_specs.spec import CacheSpec, DType, TokenShape
from vlmx.cache_specs.writer import CacheWriter

SHAPE = TokenShape(grid=(2, 3), dim=4)
SLOTS = 4
IDS = [image_id(b"%d" % number) for number in range(10)]  # two full shards and one of two images
ZERO, BROKEN = IDS[2], IDS[5]


def spec_of(dtype: DType = "float16", backbone: str = "vit-s-in21k") -> CacheSpec:
    return CacheSpec(
        backbone=backbone,
        weights_sha256="random:0",
        forward_version=1,
        feature="last",
        out_norm="layernorm",
        geometry=Geometry(mode="letterbox", height=32, width=48, fill=(127, 127, 127)),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        dtype=dtype,
    )


def tokens_of(image: str, dtype: DType = "float16") -> NDArray[Any]:
    """Six tokens of four numbers that belong to the image; all zero for one of the images."""
    values_ND = np.random.default_rng(int(image[:8], 16)).standard_normal((6, 4)).astype(np.float32)
    values_ND *= image != ZERO
    if dtype == "bfloat16":
        return (values_ND.view(np.uint32) >> 16).astype("<u2")
    return values_ND.astype(spec_of(dtype).storage_dtype)


def write(root: Path, ids: Sequence[str] = IDS, dtype: DType = "float16", seal: bool = True) -> Path:
    with CacheWriter(root, spec_of(dtype), SHAPE, slots=SLOTS) as writer:
        plans = writer.plan(ids)
        if plans:
            writer.begin_run({"command": "test"}, plans)
        for plan in plans:
            tokens_BND = np.stack([tokens_of(image, dtype) for image in plan.ids])
            writer.commit(plan, tokens_BND, {BROKEN: "truncated"} if BROKEN in plan.ids else None)
        if seal:
            writer.seal()
        return writer.path


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a cache except its provenance."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != PROVENANCE)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


GOOD = [image for image in IDS if image != BROKEN]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(bytes(data))
