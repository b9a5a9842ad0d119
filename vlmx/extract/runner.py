"""How does phase one run: source -> inventory -> plan -> shards: decode, encode, commit -> seal -> image table."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import features

from vlmx.cache_specs.ids import ImageTable, image_id
from vlmx.cache_specs.spec import CacheSpec, DType, TokenShape
from vlmx.cache_specs.writer import CacheWriter
from vlmx.console import note, progress, warn
from vlmx.errors import DataError
from vlmx.extract.ahead import work_ahead
from vlmx.extract.encode import Seconds, ShardEncoder, block_size
from vlmx.extract.interrupt import Interrupt
from vlmx.extract.plan import (
    ExtractPlan,
    SourceImage,
    check_table,
    plan_extraction,
    read_bytes,
    spec_of,
    table_entries,
    take_inventory,
)
from vlmx.extract.preprocess import UndecodableImage, prepare
from vlmx.runs import environment

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vlmx.extract.backbones.base import Backbone
    from vlmx.extract.images import ImageSource

RESUME = "give the same command again, it goes on where it stopped"


@dataclass(frozen=True, kw_only=True)
class ExtractSummary:
    """What one extraction did.

    Attributes:
        cache: the cache's folder.
        dataset: name of the image table.
        images: keys of the source.
        different: different images among them.
        new: images that were encoded now.
        failed: key and reason for every image of the source that cannot be decoded.
        new_bytes: bytes that the shards of the new images take.
        seconds: where the time went.
        untrained: the warning that goes with an encoder of random weights; else empty.
    """

    cache: Path
    dataset: str
    images: int
    different: int
    new: int
    failed: dict[str, str]
    new_bytes: int
    seconds: Seconds
    untrained: str


def extract(
    backbone: Backbone,
    source: ImageSource,
    *,
    root: Path,
    dtype: DType = "float16",
    batch_size: int = 16,
    threads: int = 4,
) -> ExtractSummary:
    """Encode every image of `source` that the cache lacks. Killed at any instant, the same call goes on.

    Args:
        backbone: the frozen encoder, on the device where it shall run.
        source: the images.
        root: folder of all caches: the cache is `<root>/<spec name>`, the table `<root>/datasets/<source name>.jsonl`.
        dtype: of the stored tokens.
        batch_size: images a forward pass on a GPU; see `encode.block_size`. A pass never straddles two shards.
        threads: how many threads read and decode images ahead of the encoder.

    Raises:
        DataError: an image cannot be read, or a key of the image table names another image than before.
        CacheError: another process is filling this cache.
        UsageError: a token exceeds the range of float16.
        OutOfSpaceError: the new tokens do not fit on the disk.
        Interrupted: SIGINT or SIGTERM; the shard in hand was dropped.
    """
    spec = spec_of(backbone, dtype)
    shape = TokenShape(grid=backbone.grid, dim=backbone.dim)
    block = block_size(backbone, batch_size)
    ahead = 2 * block + threads
    seconds = Seconds()
    note(source.describe)
    note(f"cache {root / spec.name}: {shape.num_tokens:,} tokens of {shape.dim} {dtype} numbers an image")
    untrained = _untrained(spec)
    if untrained:
        warn(untrained)

    with Interrupt(fix=RESUME) as interrupt, ThreadPoolExecutor(threads) as pool:
        images = take_inventory(source, pool, ahead=ahead, check=interrupt.check)
        check_table(root, source.name, images)
        with CacheWriter(root, spec, shape) as writer:
            plan = plan_extraction(images, spec, shape, writer, free_bytes=shutil.disk_usage(root).free)
            note(plan.describe)
            if plan.shards:
                writer.begin_run(_provenance(backbone, block), plan.shards)
                todo = (plan.by_id[image] for shard in plan.shards for image in shard.ids)
                prepared = work_ahead(pool, lambda image: _prepare(image, spec), todo, ahead=ahead)
                encoder = ShardEncoder(backbone, prepared, block=block, dtype=dtype, seconds=seconds)
                _fill(writer, plan, encoder, check=interrupt.check)
            writer.seal()
            reasons = writer.manifest.failed
        ImageTable.merge(root, source.name, table_entries(images, reasons))
    encoded = sum(image not in reasons for shard in plan.shards for image in shard.ids)

    return ExtractSummary(
        cache=root / spec.name,
        dataset=source.name,
        images=len(images),
        different=len(plan.by_id),
        new=encoded,
        failed={image.key: reasons[image.id] for image in images if image.id in reasons},
        new_bytes=plan.new_bytes * encoded // max(1, plan.new),
        seconds=seconds,
        untrained=untrained,
    )


def _fill(writer: CacheWriter, plan: ExtractPlan, encoder: ShardEncoder, *, check: Callable[[], None]) -> None:
    """Encode and commit the planned shards, one after the other; `check` may raise between two passes."""
    with progress(f"encode {writer.spec.backbone}", plan.new, "images") as bar:
        for shard in plan.shards:
            for count in encoder.encode(shard.ids):
                bar.advance(count)
                check()
            started = time.perf_counter()
            writer.commit(shard, encoder.tokens_SND, encoder.failed)
            encoder.seconds.write += time.perf_counter() - started


def _untrained(spec: CacheSpec) -> str:
    if not spec.random_weights:
        return ""
    return f"{spec.backbone} has random weights ({spec.weights_sha256}): untrained, good only for trying things out"


def _provenance(backbone: Backbone, block: int) -> dict[str, Any]:
    """How these tokens were made, as far as it is not meant to change them."""
    device = next(backbone.parameters()).device
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "weights": backbone.weights_source,
        "options": backbone.options,
        "trained": not backbone.weights_sha256.startswith("random:"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "images_per_pass": block,
        "torch_threads": torch.get_num_threads(),
        "jpeg_decoder": features.version("libjpeg_turbo") or features.version("jpg"),
        **environment(),
    }


def _prepare(image: SourceImage, spec: CacheSpec) -> NDArray[np.float32] | UndecodableImage:
    """Pixels (3, H, W) for the encoder, or what is wrong with the file."""
    data = read_bytes(image.key, image.load)
    if image_id(data) != image.id:
        raise DataError(
            f"the image '{image.key}' changed while it was being extracted",
            why="its bytes are not the ones that were read at the start",
            fix="leave the files alone until the command is done; " + RESUME,
        )
    try:
        return prepare(data, spec.geometry, spec.mean, spec.std)
    except UndecodableImage as error:
        return error
