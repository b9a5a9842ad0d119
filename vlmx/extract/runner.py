"""How does phase one run: source -> inventory -> plan -> shards: decode, encode, commit -> seal -> image table."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import features

from vlmx.cache_specs.ids import ImageTable, image_id
from vlmx.cache_specs.spec import CacheSpec, DType, TokenShape
from vlmx.cache_specs.writer import CacheWriter
from vlmx.console import format_bytes, note, progress, warn
from vlmx.errors import DataError
from vlmx.extract.ahead import work_ahead
from vlmx.extract.batches import BatchSize, block_size
from vlmx.extract.behind import WorkBehind
from vlmx.extract.encode import EncodedShard, ShardEncoder
from vlmx.extract.interrupt import Interrupt
from vlmx.extract.lanes import lanes_for
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
from vlmx.extract.scans import ScanChoice, scan_choice
from vlmx.extract.seconds import Seconds
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
        images_per_pass: at the end; smaller than at the beginning when a GPU ran out of memory.
        scan: the engine of the encoder's scans; None when it has none.
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
    images_per_pass: int
    scan: ScanChoice | None
    untrained: str


def extract(
    backbone: Backbone,
    source: ImageSource,
    *,
    root: Path,
    dtype: DType = "float16",
    batch_size: BatchSize = "auto",
    threads: int = 4,
) -> ExtractSummary:
    """Encode every image of `source` that the cache lacks. Killed at any instant, the same call goes on.

    On a CPU, as many passes run side by side as `torch.get_num_threads()` says, each on one thread.

    Args:
        backbone: the frozen encoder, on the device where it shall run, in the dtype in which it shall compute.
        source: the images.
        root: folder of all caches: the cache is `<root>/<spec name>`, the table `<root>/datasets/<source name>.jsonl`.
        dtype: of the stored tokens.
        batch_size: images a pass on a GPU; see `batches.block_size`. A pass never straddles two shards. It is halved
            when the GPU runs out of memory.
        threads: how many threads read and decode images ahead of the encoder.

    Raises:
        DataError: an image cannot be read, or a key of the image table names another image than before.
        CacheError: another process is filling this cache.
        UsageError: a token exceeds the range of float16.
        BackendError: the forced scan engine cannot run here, or one image is too large for the memory of the GPU.
        OutOfSpaceError: the new tokens do not fit on the disk.
        Interrupted: SIGINT or SIGTERM; the shard in hand was dropped, those that were encoded are stored.
    """
    spec = spec_of(backbone, dtype)
    shape = TokenShape(grid=backbone.grid, dim=backbone.dim)
    scan = scan_choice(backbone)
    note(source.describe)
    note(f"cache {root / spec.name}: {shape.num_tokens:,} tokens of {shape.dim} {dtype} numbers an image")
    untrained = _untrained(spec)
    if untrained:
        warn(untrained)
    run = _Run(backbone, spec, scan=scan, batch_size=batch_size, seconds=Seconds(threads=threads))

    with Interrupt(fix=RESUME) as interrupt, ThreadPoolExecutor(threads) as pool:
        images = take_inventory(source, pool, ahead=4 * threads, check=interrupt.check)
        check_table(root, source.name, images)
        with CacheWriter(root, spec, shape) as writer:
            plan = plan_extraction(images, spec, shape, writer, free_bytes=shutil.disk_usage(root).free)
            note(plan.describe)
            if plan.shards:
                run.fill(writer, plan, pool, check=interrupt.check)
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
        seconds=run.seconds,
        images_per_pass=run.block,
        scan=scan,
        untrained=untrained,
    )


class _Run:
    """Three things at once, each in order: images are prepared, passes are encoded, shards are stored."""

    def __init__(
        self,
        backbone: Backbone,
        spec: CacheSpec,
        *,
        scan: ScanChoice | None,
        batch_size: BatchSize,
        seconds: Seconds,
    ) -> None:
        self.backbone = backbone
        self.spec = spec
        self.scan = scan
        self.batch_size = batch_size
        self.seconds = seconds
        self.block = 0
        self.written_bytes = 0

    def fill(
        self, writer: CacheWriter, plan: ExtractPlan, pool: ThreadPoolExecutor, *, check: Callable[[], None]
    ) -> None:
        """Encode and commit the planned shards; `check` may raise between two passes."""
        most = max(len(shard.ids) for shard in plan.shards)
        self.block = block_size(self.backbone, self.batch_size, most=most)
        todo = (plan.by_id[image] for shard in plan.shards for image in shard.ids)
        left = list(plan.shards)
        started = time.perf_counter()
        with ExitStack() as stack:
            bar = stack.enter_context(progress(f"encode {self.spec.backbone}", plan.new, "images"))
            lanes = stack.enter_context(lanes_for(self.backbone, self.spec.dtype))
            self.seconds.lanes = lanes.count
            ahead = (lanes.count + 1) * self.block + self.seconds.threads
            prepared = work_ahead(pool, self._prepare, todo, ahead=ahead)
            encoder = ShardEncoder(
                self.backbone, prepared, lanes, block=self.block, dtype=self.spec.dtype, seconds=self.seconds
            )
            writer.begin_run(self._provenance(), left)
            writing = stack.enter_context(WorkBehind(behind=1))
            for count, shard in encoder.encode(plan.shards):
                if encoder.block != self.block:  # how the shards from here on are made
                    self.block = encoder.block
                    writer.begin_run(self._provenance(), left)
                if shard is not None:
                    left.remove(shard.plan)
                    with self.seconds.waiting("wait_writer", lanes.idle):
                        writing.give(partial(self._commit, writer, shard))
                writing.check()
                bar.advance(count, written=format_bytes(self.written_bytes))
                check()
            with self.seconds.waiting("wait_writer", lanes.idle):
                writing.wait()
            bar.advance(0, written=format_bytes(self.written_bytes))
        self.seconds.total = time.perf_counter() - started

    def _prepare(self, image: SourceImage) -> NDArray[np.float32] | UndecodableImage:
        """Pixels (3, H, W) for the encoder, or what is wrong with the file; called on the threads that decode."""
        with self.seconds.working("decode"):
            return _prepare(image, self.spec)

    def _commit(self, writer: CacheWriter, shard: EncodedShard) -> None:
        """Store one shard; called on the thread that writes."""
        with self.seconds.working("write"):
            writer.commit(shard.plan, shard.tokens_SND, shard.failed)
        self.written_bytes += shard.tokens_SND[0].nbytes * (len(shard.plan.ids) - len(shard.failed))

    def _provenance(self) -> dict[str, Any]:
        """How these tokens are made, as far as it is not meant to change them."""
        backbone = self.backbone
        device = next(backbone.parameters()).device
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "weights": backbone.weights_source,
            "options": backbone.options,
            "trained": not backbone.weights_sha256.startswith("random:"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "compute": self.spec.compute,
            "scan_engine": self.scan.engine if self.scan else "none",
            "images_per_pass": self.block,
            "passes_side_by_side": self.seconds.lanes,
            "decode_threads": self.seconds.threads,
            "jpeg_decoder": features.version("libjpeg_turbo") or features.version("jpg"),
            **environment(),
        }


def _untrained(spec: CacheSpec) -> str:
    if not spec.random_weights:
        return ""
    return f"{spec.backbone} has random weights ({spec.weights_sha256}): untrained, good only for trying things out"


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
