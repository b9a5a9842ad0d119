"""How does phase one run: source -> inventory -> plan -> shards: decode, encode, commit -> seal -> image table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import features

from vlmx.cache_specs.audit import read_runs
from vlmx.cache_specs.claims import Part
from vlmx.cache_specs.ids import ImageTable, image_id
from vlmx.cache_specs.manifest import MANIFEST
from vlmx.cache_specs.places import Place, place_of
from vlmx.cache_specs.quantize import Quantization, QuantizationError
from vlmx.cache_specs.spec import CacheSpec, Codec, DType, TokenShape
from vlmx.cache_specs.writer import CacheWriter, ShardPlan
from vlmx.console import note, warn
from vlmx.errors import DataError
from vlmx.extract.ahead import work_ahead
from vlmx.extract.batches import BatchSize, block_size
from vlmx.extract.behind import WorkBehind
from vlmx.extract.encode import EncodedShard, ShardEncoder
from vlmx.extract.interrupt import RESUME, Interrupt
from vlmx.extract.inventory import SourceImage, count_sources, read_bytes, take_inventory
from vlmx.extract.job_bar import JobBar
from vlmx.extract.lanes import lanes_for
from vlmx.extract.plan import ExtractPlan, check_table, plan_extraction, spec_of, table_entries
from vlmx.extract.preprocess import UndecodableImage, prepare
from vlmx.extract.scales import first_scales
from vlmx.extract.scans import ScanChoice, scan_choice
from vlmx.extract.seconds import Seconds
from vlmx.runs import environment

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlmx.extract.backbones.base import Backbone
    from vlmx.extract.sources import ImageSource

PAUSE_S = 0.5
LOOK_AGAIN: tuple[int, ...] = (
    1,
    2,
    4,
    8,
)  # pauses after which a process that has nothing to do looks for something, the last forever


@dataclass(frozen=True, kw_only=True)
class ExtractSummary:
    """What one extraction did.

    Attributes:
        cache: the cache's place.
        datasets: names of the image tables.
        images: keys of the sources.
        different: different images among them.
        missing: images that the cache lacked when this process came.
        new: images that this process encoded.
        failed: key and reason for every image of the sources that cannot be decoded.
        new_bytes: bytes that the shards of the new images take.
        seconds: where the time went.
        images_per_pass: at the end; smaller than at the beginning when a GPU ran out of memory.
        scan: the engine of the encoder's scans; None when it has none.
        untrained: the warning that goes with an encoder of random weights; else empty.
        error: what 8 bits lost on all images of the cache; None in caches of more bits.
        new_error: the same on the new images; None where there are none, too.
        sealed: whether the cache is complete; if not, other processes are still at work, or died.
        several: whether this process was one of several.
    """

    cache: Place
    datasets: tuple[str, ...]
    images: int
    different: int
    missing: int
    new: int
    failed: dict[str, str]
    new_bytes: int
    seconds: Seconds
    images_per_pass: int
    scan: ScanChoice | None
    untrained: str
    error: QuantizationError | None
    new_error: QuantizationError | None
    sealed: bool
    several: bool


def extract(
    backbone: Backbone,
    sources: Sequence[ImageSource],
    *,
    root: str | Path | Place,
    dtype: DType = "float16",
    codec: Codec = "crc32c",
    batch_size: BatchSize = "auto",
    threads: int = 4,
    part: Part | None = None,
    stay: bool = True,
    speaks: bool = True,
    force: bool = False,
    recipe: Mapping[str, Any] | None = None,
) -> ExtractSummary:
    """Encode every image of `sources` that the cache lacks. Killed at any instant, the same call goes on.

    On a CPU, as many passes run side by side as `torch.get_num_threads()` says, each on one thread.

    Args:
        backbone: the frozen encoder, on the device where it shall run, in the dtype in which it shall compute.
        sources: the images. One that several sources share, or that the cache has already, is not encoded again.
        root: place of all caches: the cache is `<root>/<spec name>`, the tables `<root>/datasets/<source name>.jsonl`.
        dtype: of the stored tokens.
        codec: of the stored tokens.
        batch_size: images a pass on a GPU; see `batches.block_size`. A pass never straddles two shards. It is halved
            when the GPU runs out of memory.
        threads: how many threads read and decode images ahead of the encoder.
        part: which of several processes this is, that fill the cache together with equal arguments.
        stay: with several processes: when nothing is left to this one, wait whether another one dies, and take over.
        speaks: whether to warn of what every one of several processes finds out.
        force: begin also when the new tokens do not fit on the disk.
        recipe: what else the record of this run should hold, e.g. where the images came from.

    Raises:
        DataError: an image cannot be read, or a key of the image table names another image than before.
        CacheError: another process is filling this cache.
        UsageError: a token exceeds the range of float16.
        BackendError: the forced scan engine cannot run here, or one image is too large for the memory of the GPU.
        OutOfSpaceError: the new tokens do not fit on the disk, or it became full; what was stored is intact.
        Interrupted: SIGINT or SIGTERM; after SIGINT the shard in hand was dropped, after SIGTERM it was stored.
    """
    spec = spec_of(backbone, dtype, codec)
    shape = TokenShape(grid=backbone.grid, dim=backbone.dim)
    place = place_of(root)
    part = part or Part()
    scan = scan_choice(backbone)
    for source in sources:
        note(source.describe)
    note(f"cache {place.child(spec.name)}: {shape.num_tokens:,} tokens of {shape.dim} {dtype} numbers an image")
    untrained = _untrained(spec)
    if untrained and speaks:
        warn(untrained)
    run = _Run(
        backbone,
        spec,
        scan=scan,
        batch_size=batch_size,
        seconds=Seconds(threads=threads),
        recipe=recipe or {},
        part=part,
    )

    place.exists(f"{spec.name}/{MANIFEST}")  # a place that cannot be reached says so before the images are read
    with Interrupt(fix=RESUME) as interrupt, ThreadPoolExecutor(threads) as pool:
        inventory = [
            take_inventory(source, pool, root=place, ahead=4 * threads, check=interrupt.stop) for source in sources
        ]
        for source, images in zip(sources, inventory, strict=True):
            check_table(place, source.name, images)
        every = [image for images in inventory for image in images]
        with CacheWriter(place, spec, shape, part=part, calibrate=partial(run.calibrate, every)) as writer:
            plan = plan_extraction(every, spec, shape, writer, free_bytes=place.free_bytes(), force=force)
            if len(sources) > 1:
                missing = {image for shard in plan.shards for image in shard.ids}
                named = {source.name: images for source, images in zip(sources, inventory, strict=True)}
                for count in count_sources(named, missing):
                    note(count.describe)
            note(plan.describe)
            if plan.shards:
                with JobBar(writer, plan.new, alone=part.count == 1) as bar:
                    run.work(writer, plan, pool, interrupt, bar, stay=stay)
            elif part.index == 0:
                run.record_sources(writer)
            sealed = writer.seal()
            manifest = writer.manifest
        reasons = manifest.failed
        if sealed:
            for source, images in zip(sources, inventory, strict=True):
                ImageTable.merge(place, source.name, table_entries(images, reasons))

    return ExtractSummary(
        cache=place.child(spec.name),
        datasets=tuple(source.name for source in sources),
        images=len(every),
        different=len(plan.by_id),
        missing=plan.new,
        new=run.encoded,
        failed={image.key: reasons[image.id] for image in every if image.id in reasons},
        new_bytes=run.written_bytes,
        seconds=run.seconds,
        images_per_pass=run.block,
        scan=run.scan,
        untrained=untrained,
        error=manifest.error if dtype == "int8" else None,
        new_error=run.error if dtype == "int8" and run.encoded else None,
        sealed=sealed,
        several=part.count > 1,
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
        recipe: Mapping[str, Any],
        part: Part,
    ) -> None:
        self.backbone = backbone
        self.spec = spec
        self.scan = scan
        self.batch_size = batch_size
        self.seconds = seconds
        self.recipe = recipe
        self.part = part
        self.began = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.block = 0
        self.encoded = 0
        self.written_bytes = 0
        self.error = QuantizationError()

    def work(
        self,
        writer: CacheWriter,
        plan: ExtractPlan,
        pool: ThreadPoolExecutor,
        interrupt: Interrupt,
        bar: JobBar,
        *,
        stay: bool,
    ) -> None:
        """Do shards of the plan until none is missing, or, unless it is to stay, none is left to this process."""
        pauses = LOOK_AGAIN
        while writer.missing:
            share = writer.next_share()
            if share:
                self.fill(writer, plan, share, pool, interrupt, bar)
                pauses = LOOK_AGAIN
            elif not stay:
                return
            else:
                for _ in range(pauses[0]):
                    time.sleep(PAUSE_S)
                    bar.look()
                    interrupt.stop()
                pauses = pauses[1:] or pauses
            interrupt.stop()

    def fill(
        self,
        writer: CacheWriter,
        plan: ExtractPlan,
        share: Sequence[ShardPlan],
        pool: ThreadPoolExecutor,
        interrupt: Interrupt,
        bar: JobBar,
    ) -> None:
        """Encode and commit `share` and what `writer` gives after it; stops early when the system asks for it."""
        if not self.block:
            most = max(len(shard.ids) for shard in plan.shards)
            self.block = block_size(self.backbone, self.batch_size, most=most)
        left: list[ShardPlan] = []
        to_read, to_encode = tee(self._given(writer, share, left))  # images are read well ahead of the encoder
        todo = (plan.by_id[image] for shard in to_read for image in shard.ids)
        started = time.perf_counter()
        with ExitStack() as stack:
            lanes = stack.enter_context(lanes_for(self.backbone, self.spec.dtype))
            self.seconds.lanes = lanes.count
            ahead = (lanes.count + 1) * self.block + self.seconds.threads
            encoder = ShardEncoder(
                self.backbone,
                work_ahead(pool, self._prepare, todo, ahead=ahead),
                lanes,
                block=self.block,
                dtype=self.spec.dtype,
                seconds=self.seconds,
                quantization=writer.quantization,
            )
            writing = stack.enter_context(WorkBehind(behind=1))
            for count, shard in encoder.encode(_until(to_encode, lambda: interrupt.finishing)):
                scan = scan_choice(self.backbone)
                if (encoder.block, scan) != (self.block, self.scan):  # how the shards from here on are made
                    self.block, self.scan = encoder.block, scan
                    writer.begin_run(self._provenance(), left)
                if shard is not None:
                    left.remove(shard.plan)
                    with self.seconds.waiting("wait_writer", lanes.idle):
                        writing.give(partial(self._commit, writer, shard))
                writing.check()
                bar.advance(count)
                interrupt.check()
            with self.seconds.waiting("wait_writer", lanes.idle):
                writing.wait()
        self.seconds.total += time.perf_counter() - started

    def _given(self, writer: CacheWriter, share: Sequence[ShardPlan], left: list[ShardPlan]) -> Iterator[ShardPlan]:
        """Shards to make, one share after the other; they are recorded, and added to `left`, when they are given."""
        while share:
            writer.begin_run(self._provenance(), share)
            left.extend(share)
            yield from share
            share = writer.next_share()

    def calibrate(self, images: Sequence[SourceImage]) -> Quantization:
        """The scales of a new 8-bit cache, from the first images that can be decoded.

        Raises:
            DataError: none of them can.
        """
        different = {image.id: image for image in reversed(images)}.values()
        return first_scales(self.backbone, (_prepare(image, self.spec) for image in reversed(different)))

    def _prepare(self, image: SourceImage) -> NDArray[np.float32] | UndecodableImage:
        """Pixels (3, H, W) for the encoder, or what is wrong with the file; called on the threads that decode."""
        with self.seconds.working("decode"):
            return _prepare(image, self.spec)

    def _commit(self, writer: CacheWriter, shard: EncodedShard) -> None:
        """Store one shard; called on the thread that writes."""
        with self.seconds.working("write"):
            writer.commit(shard.plan, shard.tokens_SND, shard.failed, shard.error)
        self.error += shard.error or QuantizationError()
        stored = len(shard.plan.ids) - len(shard.failed)
        self.encoded += stored
        self.written_bytes += shard.tokens_SND[0].nbytes * stored

    def record_sources(self, writer: CacheWriter) -> None:
        """Nothing is left to encode: keep where these images are all the same, for `probe` and `repair`."""
        known = [earlier.get("images") for earlier in read_runs(writer.place)]
        if self.recipe.get("images") not in known:
            writer.begin_run(self._provenance(), ())

    def _provenance(self) -> dict[str, Any]:
        """How these tokens are made, as far as it is not meant to change them."""
        backbone = self.backbone
        device = next(backbone.parameters()).device
        return {
            "time": self.began,
            "weights": backbone.weights_source,
            "options": backbone.options,
            "trained": not backbone.weights_sha256.startswith("random:"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "compute": self.spec.compute,
            "scan_engine": self.scan.engine if self.scan else "none",
            "images_per_pass": self.block,
            "passes_side_by_side": self.seconds.lanes,
            "decode_threads": self.seconds.threads,
            "part": f"{self.part.index}/{self.part.count}",
            "jpeg_decoder": features.version("libjpeg_turbo") or features.version("jpg"),
            **self.recipe,
            **environment(),
        }


def _until(shards: Iterator[ShardPlan], finishing: Callable[[], bool]) -> Iterator[ShardPlan]:
    """The shards, as long as nobody asks to finish."""
    for plan in shards:
        if finishing():
            return
        yield plan


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
