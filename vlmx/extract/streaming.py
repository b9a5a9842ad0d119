"""How does phase two get tokens that no cache holds? The encoder works when they are asked for, as in an extraction.

Shapes: out_BND [images, tokens, channels] in storage dtype (bfloat16 as the uint16 of its bits).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlmx.cache_specs.manifest import MANIFEST, read_manifest
from vlmx.cache_specs.places import Place, place_of
from vlmx.cache_specs.quantize import Quantization
from vlmx.cache_specs.sizing import image_bytes
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.cache_specs.streams import StreamConfig
from vlmx.cache_specs.token_source import TokenSource
from vlmx.cache_specs.writer import ShardPlan
from vlmx.console import note
from vlmx.errors import CacheError, DataError
from vlmx.extract.ahead import work_ahead
from vlmx.extract.arguments import parse_res
from vlmx.extract.backbones.base import Backbone, build_backbone
from vlmx.extract.backbones.catalogue import row as catalogue_row
from vlmx.extract.batches import block_size
from vlmx.extract.encode import ShardEncoder
from vlmx.extract.lanes import lanes_for
from vlmx.extract.plan import spec_of
from vlmx.extract.preprocess import UndecodableImage, prepare
from vlmx.extract.scales import first_scales
from vlmx.extract.seconds import Seconds
from vlmx.extract.sources import open_sources
from vlmx.extract.tables import Original, complete_table
from vlmx.processes import rank_of, shared_device

if TYPE_CHECKING:
    from vlmx.cache_specs.reader import TokenReader

    Prepared = NDArray[np.float32] | UndecodableImage

MB = 1_000_000
SHOWN = 3


def open_encoder(config: StreamConfig, datasets: Mapping[str, str], root: Place) -> StreamingSource:
    """Build the encoder and find its images; see `vlmx.cache_specs.streams.open_stream`.

    The image tables are the ones that `vlmx extract` makes. Where there is none yet, every image is decoded once, so
    that those that cannot be are known before a training begins.
    """
    assert config.backbone is not None
    row = catalogue_row(config.backbone)
    rank = rank_of(os.environ)
    device = str(shared_device(rank))
    torch.backends.cudnn.allow_tf32 = False  # as `vlmx extract` does
    options = {"out_norm": config.out_norm, "block": config.block, "feature": config.feature}
    backbone = build_backbone(
        row.name,
        res=parse_res(str(config.res)) if config.res is not None else row.native_res,
        weights=config.weights,
        dtype=getattr(torch, config.compute),
        device=device,
        crop=config.crop,
        **{name: value for name, value in options.items() if value is not None},
    )
    spec = spec_of(backbone, config.dtype, config.codec)
    if rank.index == 0:
        note(f"encoding on the fly: {spec.backbone} at {spec.resolution} on {device}, {backbone.num_tokens:,} tokens")
    threads = config.threads or min(32, os.cpu_count() or 1)
    originals: dict[str, Original] = {}
    failed: dict[str, str] = {}
    for name, data in datasets.items():
        (source,) = open_sources(
            [data], _path(config.image_root), name, data_root=_path(config.data_root), image_column=config.image_column
        )
        found = complete_table(source, root, spec.geometry, threads=threads)
        for image, original in found.originals.items():
            originals.setdefault(image, original)
        failed |= found.failed
    return StreamingSource(
        backbone,
        spec,
        originals,
        failed,
        root=root,
        threads=threads,
        batch_size=config.batch_size,
        keep_bytes=config.keep_mb * MB,
        origin=(config, dict(datasets), root.url),
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


class StreamingSource(TokenSource):
    """Tokens that are encoded when they are read, in the same passes as an extraction makes.

    On a CPU they are those that a cache of the same spec holds, bit for bit. 8-bit tokens have the scales of the cache
    of this spec below `root`, or, if there is none, those of the first images.

    Any number of threads may read; one at a time encodes. Tokens of recent images are kept.

    Args:
        backbone: the encoder, where it shall run.
        spec: what it gives.
        originals: image id -> its file, for every image that can be decoded.
        failed: image id -> why it cannot.
        root: folder of all caches.
        threads: that read and decode images.
        batch_size: images a pass, on a GPU.
        keep_bytes: for tokens of recent images.
        origin: what another process opens the same source with: configuration, data sets, url of the root.
    """

    sealed = True

    def __init__(
        self,
        backbone: Backbone,
        spec: CacheSpec,
        originals: Mapping[str, Original],
        failed: Mapping[str, str],
        *,
        root: Place,
        threads: int,
        batch_size: int,
        keep_bytes: int,
        origin: tuple[StreamConfig, dict[str, str], str],
    ) -> None:
        self.spec: CacheSpec = spec
        self.shape = TokenShape(grid=backbone.grid, dim=backbone.dim)
        self.ids: Mapping[str, int] = {image: number for number, image in enumerate(originals)}
        self.failed = failed
        self._backbone = backbone
        self._originals = originals
        self._root = root
        self._threads = threads
        self._batch_size = batch_size
        self._kept_max = keep_bytes // image_bytes(self.shape, spec.dtype)
        self._origin = origin
        if spec.dtype == "int8":
            self.quantization = self._known_scales() or first_scales(backbone, map(self._prepare, originals))
        self._local = self._new_local()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, self._origin

    def __enter__(self) -> StreamingSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the threads. They are made again when something is read."""
        self._here().close()

    @property
    def parts(self) -> tuple[TokenReader, ...]:
        """There is no cache."""
        return ()

    @property
    def name(self) -> str:
        """As the cache would be called, marked."""
        return f"stream-{self.spec.name}"

    @property
    def root(self) -> Place:
        """The folder of all caches; the image tables are there."""
        return self._root

    def require(self, ids: Iterable[str], *, data: str = "") -> None:
        wanted = list(dict.fromkeys(ids))
        missing = self.missing(wanted)
        if not missing:
            return
        broken = [self.failed[image] for image in missing if image in self.failed]
        raise CacheError(
            f"{len(missing)} of {len(wanted)} images cannot be encoded on the fly",
            why=f"the first are {', '.join(image[:12] for image in missing[:SHOWN])}"
            + (f"; {len(broken)} could not be decoded, e.g. {broken[0]}" if broken else ""),
            fix="say with stream.images=DATA where the images are" + (f"; they are those of '{data}'" if data else ""),
        )

    def announce(self, ids: Iterable[str]) -> None:
        """Nothing is begun early: images are decoded while those before them are encoded."""

    def _fill(self, place_of_image: Mapping[str, int], out_BND: NDArray[Any]) -> None:
        local = self._here()
        with local.lock, self._on_device():
            todo = []
            for image, place in place_of_image.items():
                tokens_ND = local.kept.get(image)
                if tokens_ND is None:
                    todo.append(image)
                else:
                    local.kept.move_to_end(image)
                    out_BND[place] = tokens_ND
            for image, tokens_ND in local.encode(todo):
                out_BND[place_of_image[image]] = tokens_ND
                if self._kept_max:
                    local.kept[image] = tokens_ND.copy()
                if len(local.kept) > self._kept_max:
                    local.kept.popitem(last=False)

    def _prepare(self, image: str) -> Prepared:
        """Pixels (3, H, W) for the encoder, or what is wrong with the file."""
        data = self._originals[image].read(image)
        try:
            return prepare(data, self.spec.geometry, self.spec.mean, self.spec.std)
        except UndecodableImage as error:
            return error

    def _on_device(self) -> AbstractContextManager[None]:
        """Kernels go to the device that is current, and in every thread that is the first one."""
        device = next(self._backbone.parameters()).device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _known_scales(self) -> Quantization | None:
        cache = self._root.child(self.spec.name)
        return read_manifest(cache).header.quantization if cache.exists(MANIFEST) else None

    def _here(self) -> _Local:
        """The threads of this process; a forked one has none of its parent's."""
        if self._local.pid != os.getpid():
            self._local = self._new_local()
        return self._local

    def _new_local(self) -> _Local:
        return _Local(
            self._backbone,
            self.spec,
            self._prepare,
            quantization=self.quantization,
            threads=self._threads,
            batch_size=self._batch_size,
        )


def _reopen(config: StreamConfig, datasets: dict[str, str], root: str) -> StreamingSource:
    return open_encoder(config, datasets, place_of(root))


class _Local:
    """What one process has: the tokens that it keeps, and the threads of its encoder, which end with an error.

    Attributes:
        pid: the process.
        lock: held by whoever uses the rest.
        kept: tokens by image id, those used last at the end.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: CacheSpec,
        prepare_one: Any,
        *,
        quantization: Quantization | None,
        threads: int,
        batch_size: int,
    ) -> None:
        self.pid = os.getpid()
        self.lock = threading.RLock()
        self.kept: OrderedDict[str, NDArray[Any]] = OrderedDict()
        self._backbone = backbone
        self._spec = spec
        self._prepare_one = prepare_one
        self._quantization = quantization
        self._threads = threads
        self._block = block_size(backbone, batch_size, most=batch_size)
        self._encoder: ShardEncoder | None = None
        self._stack = ExitStack()
        self._prepared: Iterator[Prepared] = iter(())

    def encode(self, images: Sequence[str]) -> Iterator[tuple[str, NDArray[Any]]]:
        """Image and tokens, in order. The tokens are overwritten by nobody, but hold on to those of their neighbours.

        Raises:
            DataError: a file is not what it was, or cannot be read.
        """
        if not images:
            return
        try:
            encoder = self._started()
            self._prepared = work_ahead(self._pool, self._prepare_one, images, ahead=self._ahead)
            for _, shard in encoder.encode(self._plans(images)):
                if shard is None:
                    continue
                if shard.failed:
                    image, reason = next(iter(shard.failed.items()))
                    raise DataError(
                        f"image {image} cannot be decoded any more", why=reason, fix="leave the image files alone"
                    )
                yield from zip(shard.plan.ids, shard.tokens_SND, strict=True)
        except BaseException:
            self.close()  # passes under way are of no use to the next reader
            raise

    def close(self) -> None:
        with self.lock:
            self._encoder = None
            self._stack.close()

    def _started(self) -> ShardEncoder:
        if self._encoder is not None:
            return self._encoder
        threads = torch.get_num_threads()
        self._pool = self._stack.enter_context(ThreadPoolExecutor(self._threads, thread_name_prefix="decode"))
        lanes = self._stack.enter_context(lanes_for(self._backbone, self._spec.dtype))
        torch.set_num_threads(threads)  # the lanes' own threads keep to one each; who trains keeps all
        self._ahead = (lanes.count + 1) * self._block + self._threads
        self._images_a_plan = lanes.count * self._block
        self._encoder = ShardEncoder(
            self._backbone,
            _Relay(self),
            lanes,
            block=self._block,
            dtype=self._spec.dtype,
            seconds=Seconds(lanes=lanes.count, threads=self._threads),
            quantization=self._quantization,
        )
        return self._encoder

    def _plans(self, images: Sequence[str]) -> Iterator[ShardPlan]:
        """The images in shares of a few passes, so that memory stays bounded however many are read."""
        for index, start in enumerate(range(0, len(images), self._images_a_plan)):
            yield ShardPlan(index=index, ids=tuple(images[start : start + self._images_a_plan]))


class _Relay(Iterator["Prepared"]):
    """The images of the read under way: an encoder outlives many reads."""

    def __init__(self, local: _Local) -> None:
        self._local = local

    def __next__(self) -> Prepared:
        return next(self._local._prepared)
