"""How are images of a cache encoded once more, by the encoder that made it?

Legend: S images of one shard, N tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlmx.cache_specs.manifest import Header
from vlmx.cache_specs.spec import CacheSpec
from vlmx.cache_specs.writer import ShardPlan
from vlmx.console import progress
from vlmx.errors import SpecMismatchError
from vlmx.extract.ahead import work_ahead
from vlmx.extract.backbones.base import Backbone, build_backbone
from vlmx.extract.batches import BatchSize, block_size
from vlmx.extract.encode import EncodedShard, ShardEncoder
from vlmx.extract.lanes import lanes_for
from vlmx.extract.originals import Load, verified
from vlmx.extract.plan import spec_of
from vlmx.extract.preprocess import UndecodableImage, prepare
from vlmx.extract.seconds import Seconds

Run = Mapping[str, Any]


def rebuild(spec: CacheSpec, runs: Sequence[Run], weights: str | None) -> Backbone:
    """The encoder that gives the tokens of `spec`, on the best device of this machine.

    Args:
        spec: of the cache.
        runs: how it was made, oldest first.
        weights: the file, if it is not where it was.

    Raises:
        SpecMismatchError: with these weights, or in this version of vlmx, it is another encoder.
        WeightsError: the weights are not found.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # as `vlmx extract` does
    last = runs[-1] if runs else {}
    backbone = build_backbone(
        spec.backbone,
        res=(spec.geometry.height, spec.geometry.width),
        weights=weights or _weights(spec, last),
        dtype=getattr(torch, spec.compute),
        device=device,
        **last.get("options", {}),
    )
    differences = spec.differences(spec_of(backbone, spec.dtype, spec.codec))
    if differences:
        raise SpecMismatchError(
            f"this is not the encoder that made {spec.name}",
            why="; ".join(differences),
            fix="give its weights file with --weights, or use the version of vlmx that made the cache",
        )
    return backbone


def _weights(spec: CacheSpec, run: Run) -> str | None:
    """What to build the encoder from: random numbers, the file that was used, or None to look one up."""
    if spec.random_weights:
        return spec.weights_sha256
    path = str(run.get("weights", "")).partition("file ")[2]
    return path if path and Path(path).exists() else None


def run_of(runs: Sequence[Run], index: int) -> Run:
    """How a shard was made: the last extraction that planned it."""
    for run in reversed(runs):
        if any(first <= index <= last for first, last in run.get("shards", [])):
            return run
    return {}


def batch_size_of(backbone: Backbone, run: Run) -> BatchSize:
    """As many images a pass as then, if this is the same kind of GPU: its last bits depend on it."""
    device = next(backbone.parameters()).device
    if device.type == "cuda" and run.get("device") == torch.cuda.get_device_name(device):
        return int(run["images_per_pass"])
    return "auto"


def encode_again(
    backbone: Backbone,
    header: Header,
    plans: Sequence[ShardPlan],
    loads: Mapping[str, Load],
    failed: Mapping[str, str],
    *,
    batch_size: BatchSize,
    threads: int,
) -> Iterator[EncodedShard]:
    """The images of each plan, as they are stored in the cache, one plan after the other.

    Args:
        backbone: from `rebuild`.
        header: of the cache.
        plans: what to encode.
        loads: how to read each image.
        failed: images that could not be decoded when the cache was made, and why; they are not read.
        batch_size: images a pass, on a GPU.
        threads: that read and decode ahead of the encoder.

    Raises:
        DataError: a file cannot be read any more.
    """
    spec = header.spec
    block = block_size(backbone, batch_size, most=max(len(plan.ids) for plan in plans))
    todo = [image for plan in plans for image in plan.ids]
    with ThreadPoolExecutor(threads) as pool, lanes_for(backbone, spec.dtype) as lanes:
        ahead = (lanes.count + 1) * block + threads
        prepared = work_ahead(pool, partial(_prepare, spec=spec, loads=loads, failed=failed), todo, ahead=ahead)
        encoder = ShardEncoder(
            backbone,
            prepared,
            lanes,
            block=block,
            dtype=spec.dtype,
            seconds=Seconds(lanes=lanes.count, threads=threads),
            quantization=header.quantization,
        )
        with progress(f"encode {spec.backbone}", len(todo), "images") as bar:
            for count, shard in encoder.encode(plans):
                bar.advance(count)
                if shard is not None:
                    yield shard


def _prepare(image: str, *, spec: CacheSpec, loads: Mapping[str, Load], failed: Mapping[str, str]) -> Any:
    """Pixels (3, H, W) for the encoder, or why there are none."""
    if image in failed:
        return UndecodableImage(failed[image])
    try:
        return prepare(verified(image, loads[image]), spec.geometry, spec.mean, spec.std)
    except UndecodableImage as error:
        return error
