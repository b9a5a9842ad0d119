"""How fast would an extraction run on this machine, and how small do its tokens get? A few seconds of the real thing.

Shapes: tokens_BND [images, tokens, channels].
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import numpy as np
from numpy.typing import NDArray

from vlmx.cache_specs.quantize import calibrate
from vlmx.cache_specs.shards import encode_chunk
from vlmx.cache_specs.spec import CacheSpec, DType
from vlmx.cache_specs.writer import ShardPlan
from vlmx.console import note
from vlmx.extract.ahead import work_ahead
from vlmx.extract.backbones.base import Backbone
from vlmx.extract.batches import BatchSize, block_size
from vlmx.extract.encode import ShardEncoder
from vlmx.extract.inventory import SourceImage, read_bytes
from vlmx.extract.lanes import lanes_for
from vlmx.extract.preprocess import UndecodableImage, prepare
from vlmx.extract.seconds import Seconds

SAMPLE_S = 5.0
SAMPLE_IMAGES_MAX = 4096  # different ones; evenly spread over the data
KEPT_BYTES_MAX = 128_000_000  # of tokens, for what is measured on them

Pixels = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class TimedSample:
    """What a few seconds of an extraction showed.

    Attributes:
        images: how many were decoded and encoded; the same ones again where there are few.
        seconds: how long that took, after a pass that was not counted.
        images_per_pass: of the encoder.
        passes_side_by_side: of the encoder.
        decode_threads: that read and decoded beside it.
        blosc_ratio: how many times smaller Blosc makes the tokens; None when no image could be decoded.
        int8_error: ||lost|| / ||tokens|| of 8 bits on images that the scales were not taken from; None with fewer than
            two images.
    """

    images: int
    seconds: float
    images_per_pass: int
    passes_side_by_side: int
    decode_threads: int
    blosc_ratio: float | None
    int8_error: float | None

    @property
    def images_per_s(self) -> float:
        """Images a second, decoding and encoding together."""
        return self.images / self.seconds


def time_sample(
    backbone: Backbone,
    spec: CacheSpec,
    images: Sequence[SourceImage],
    *,
    batch_size: BatchSize,
    threads: int,
    most: int,
    budget_s: float = SAMPLE_S,
) -> TimedSample:
    """Encode images as an extraction does, and throw the tokens away.

    Args:
        backbone: where and how it would run.
        spec: of the tokens.
        images: of the data; at least one.
        batch_size: see `runner.extract`.
        threads: likewise.
        most: images of a shard, at most.
        budget_s: how long; as many passes as run side by side are always made.

    Raises:
        DataError: a file cannot be read.
        UsageError: a token exceeds the range of float16.
        BackendError: a single image is too large for the memory of the GPU.
    """
    note(f"timing {spec.backbone} on this machine")
    chosen = images[:: -(-len(images) // SAMPLE_IMAGES_MAX)]
    dtype: DType = "float32" if spec.dtype == "int8" else spec.dtype
    block = block_size(backbone, batch_size, most=most)
    kept: list[NDArray[np.generic]] = []
    done = 0
    with ThreadPoolExecutor(threads) as pool, lanes_for(backbone, dtype) as lanes:
        ahead = (lanes.count + 1) * block + threads
        prepared = work_ahead(pool, partial(_prepare, spec=spec), cycle(chosen), ahead=ahead)
        seconds = Seconds(lanes=lanes.count, threads=threads)
        encoder = ShardEncoder(backbone, prepared, lanes, block=block, dtype=dtype, seconds=seconds)
        ids = cycle([image.id for image in chosen])
        for _ in encoder.encode([ShardPlan(index=0, ids=tuple(islice(ids, block)))]):
            pass  # the first pass chooses kernels and takes memory
        started = time.perf_counter()
        for count, shard in encoder.encode(_plans(ids, lanes.count * block, until=started + budget_s)):
            done += count
            if shard is not None and sum(tokens.nbytes for tokens in kept) < KEPT_BYTES_MAX:
                whole = [slot for slot, image in enumerate(shard.plan.ids) if image not in shard.failed]
                kept.extend(shard.tokens_SND[slot] for slot in whole[: len(chosen) - len(kept)])
        took_s = time.perf_counter() - started
        prepared.close()  # type: ignore[attr-defined]  # a generator; drops the images that were prepared ahead
    return TimedSample(
        images=done,
        seconds=took_s,
        images_per_pass=block,
        passes_side_by_side=lanes.count,
        decode_threads=threads,
        blosc_ratio=_blosc_ratio(kept, spec.dtype),
        int8_error=_int8_error(kept, dtype),
    )


def _plans(ids: Iterator[str], size: int, *, until: float) -> Iterator[ShardPlan]:
    index = 0
    while index == 0 or time.perf_counter() < until:
        yield ShardPlan(index=index, ids=tuple(islice(ids, size)))
        index += 1


def _prepare(image: SourceImage, *, spec: CacheSpec) -> Pixels | UndecodableImage:
    try:
        return prepare(read_bytes(image.key, image.load), spec.geometry, spec.mean, spec.std)
    except UndecodableImage as error:
        return error


def _blosc_ratio(kept: Sequence[NDArray[np.generic]], stored: DType) -> float | None:
    """Bytes of the tokens / bytes of what Blosc makes of them; of 8-bit tokens, of their codes."""
    if not kept:
        return None
    arrays = kept
    if stored == "int8":
        scales = calibrate(np.stack(kept).astype(np.float32, copy=False))
        arrays = [scales.encode(tokens.astype(np.float32, copy=False)) for tokens in kept]
    sizes = [len(bytes(encode_chunk(np.ascontiguousarray(tokens), "blosc"))) for tokens in arrays]
    return sum(tokens.nbytes for tokens in arrays) / sum(sizes)


def _int8_error(kept: Sequence[NDArray[np.generic]], dtype: DType) -> float | None:
    """Scales from the first half of the images, error on the second."""
    if len(kept) < 2:
        return None
    tokens_BND = np.stack(kept)
    if dtype == "bfloat16":
        tokens_BND = (tokens_BND.astype(np.uint32) << 16).view(np.float32)
    floats_BND = tokens_BND.astype(np.float32, copy=False)
    half = len(kept) // 2
    scales = calibrate(floats_BND[:half])
    return scales.error(floats_BND[half:], scales.encode(floats_BND[half:])).relative
