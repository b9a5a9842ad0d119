"""A small cache for tests: ten images, one of them all zero and one undecodable, in shards of four."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmx.cache_specs.claims import GUARD
from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.ids import image_id
from vlmx.cache_specs.layout import PROVENANCE, shard_key
from vlmx.cache_specs.quantize import Quantization
from vlmx.cache_specs.spec import CacheSpec, Codec, DType, TokenShape
from vlmx.cache_specs.writer import CacheWriter, Part, ShardPlan

SHAPE = TokenShape(grid=(2, 3), dim=4)
SLOTS = 4
IDS = [image_id(b"%d" % number) for number in range(10)]  # two full shards and one of two images
ZERO, BROKEN = IDS[2], IDS[5]
SCALES = Quantization(
    offset_D=np.array([0.0, 0.5, -0.5, 0.0], np.float32), scale_D=np.array([0.04, 0.03, 0.05, 0.035], np.float32)
)


def spec_of(dtype: DType = "float16", backbone: str = "vit-s-in21k", codec: Codec = "crc32c") -> CacheSpec:
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
        codec=codec,
    )


def values_of(image: str) -> NDArray[np.float32]:
    """Six tokens of four numbers that belong to the image; all zero for one of the images."""
    values_ND = np.random.default_rng(int(image[:8], 16)).standard_normal((6, 4)).astype(np.float32)
    return values_ND * np.float32(image != ZERO)


def tokens_of(image: str, dtype: DType = "float16") -> NDArray[Any]:
    """`values_of` the image as they are stored."""
    values_ND = values_of(image)
    if dtype == "bfloat16":
        return (values_ND.view(np.uint32) >> 16).astype("<u2")
    if dtype == "int8":
        return SCALES.encode(values_ND)
    return values_ND.astype(spec_of(dtype).storage_dtype)


def write(
    root: Path,
    ids: Sequence[str] = IDS,
    dtype: DType = "float16",
    seal: bool = True,
    codec: Codec = "crc32c",
    part: Part | None = None,
    stop_after: int = 99,
) -> Path:
    """Fill a cache as one process does, or as one of several; `stop_after` so many shards it goes away."""
    spec = spec_of(dtype, codec=codec)
    with CacheWriter(root, spec, SHAPE, slots=SLOTS, part=part, calibrate=lambda: SCALES) as writer:
        plans = writer.plan(ids)
        if plans:
            writer.begin_run({"command": "test"}, plans)
        while share := writer.next_share():
            for plan in share:
                if stop_after == 0:
                    return root / spec.name
                stop_after -= 1
                commit(writer, plan)
        if seal:
            writer.seal()
        return root / spec.name


def commit(writer: CacheWriter, plan: ShardPlan) -> None:
    dtype = writer.spec.dtype
    tokens_BND = np.stack([tokens_of(image, dtype) for image in plan.ids])
    failed = {BROKEN: "truncated"} if BROKEN in plan.ids else None
    error = None
    if dtype == "int8":
        error = SCALES.error(
            np.stack([values_of(image) for image in plan.ids if image != BROKEN]),
            tokens_BND[[image != BROKEN for image in plan.ids]],
        )
    writer.commit(plan, tokens_BND, failed, error)


def shard_path(cache: Path, index: int) -> Path:
    """The file of one shard of a cache in a folder."""
    return cache / shard_key(index)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a cache except its provenance and the guard's lock."""
    left_out = {PROVENANCE, GUARD}
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in left_out)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


GOOD = [image for image in IDS if image != BROKEN]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(bytes(data))
