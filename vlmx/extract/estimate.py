"""What would an extraction do, would it fit, how long would it take, and does a cache pay? Nothing is stored.

Only content ids of images that were read are kept, beside the image tables, as the extraction keeps them: what follows
does not read those images again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch

from vlmx.cache_specs.manifest import MANIFEST, read_manifest
from vlmx.cache_specs.places import Place
from vlmx.cache_specs.sizing import cache_size, image_bytes, images_per_shard
from vlmx.cache_specs.spec import CacheSpec, Codec, DType, TokenShape
from vlmx.extract.backbones.base import Backbone, build_backbone
from vlmx.extract.backbones.row import BackboneRow
from vlmx.extract.batches import BatchSize
from vlmx.extract.flops import encoder_flops, llm_training_flops
from vlmx.extract.inventory import SourceCount, SourceImage, count_sources, take_inventory
from vlmx.extract.plan import spec_of
from vlmx.extract.scans import scan_choice
from vlmx.extract.sources import ImageSource
from vlmx.extract.timed_sample import SAMPLE_S, TimedSample, time_sample
from vlmx.extract.weights.lookup import cache_folder, find_here, named_folder

LLMS = (("7B", 6.74e9), ("0.36B", 0.36e9))  # Vicuna's size, and that of a small model: name, parameters
TEXT_TOKENS = 250  # of an example, beside its visual tokens
READ_BYTES_PER_S = 500e6  # a plain SSD, for reading tokens; assumed, not measured


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where an encoder's weights are.

    Attributes:
        given: what --weights said; None when it was not given.
        found: the file or folder; "random:SEED" for an untrained encoder; None when it is not on this machine.
        file: the published file's name.
        url: where it is published; empty when it is not.
        download_to: where `vlmx extract` would put it; None when nothing would be downloaded.
        why_no_download: why not, when they are missing; else empty.
    """

    given: str | None
    found: str | None
    file: str
    url: str
    download_to: str | None
    why_no_download: str


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What storing the new images would take in one way.

    Attributes:
        dtype, codec: of the tokens.
        chosen: whether it is what was asked for.
        bytes: of all new images; with Blosc, as far as the sample tells.
        relative_error: of 8 bits, on the sample; else None.
        ratio: how many times smaller Blosc made the sample; else None.
    """

    dtype: DType
    codec: Codec
    chosen: bool
    bytes: int
    relative_error: float | None = None
    ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Share:
    """An encoder beside the training of a language model, one example with one image.

    Attributes:
        llm: its size in words.
        parameters: their number.
        tokens: of an example, visual ones included.
        llm_flops: operations of its training step.
        share: the encoder's part of all operations, 0 to 1, when it works in every step.
    """

    llm: str
    parameters: float
    tokens: int
    llm_flops: float
    share: float


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """A cache against an encoder that works in every run, in time on this machine.

    Attributes:
        once_s: to encode what the cache lacks.
        read_s: to read the tokens of all images, in each run.
        read_bytes_per_s: at this speed, which is assumed.
        on_the_fly_s: to encode all images, in each run.
        runs: from how many runs on the cache takes less time; None if it never does.
    """

    once_s: float
    read_s: float
    read_bytes_per_s: float
    on_the_fly_s: float
    runs: int | None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What `vlmx extract` would do with one encoder.

    Attributes:
        backbone, height, width: the encoder and its input in pixels.
        tokens, dim: of one image.
        dtype, codec, compute: of the tokens.
        weights: where they are. When they are missing, an untrained encoder takes the same time in their place.
        cache: url of the cache; None when the weights are missing, on which its name depends.
        device: where it would run.
        engine: of its selective scans; None when it has none.
        engine_fallback: why it is the slow one; else empty.
        data: the images of each data set.
        different: different images of all of them.
        new: those that would be encoded.
        bytes_per_image: of tokens.
        images_per_shard: of a full shard.
        new_shards: files that would be written.
        new_bytes: what they take; with Blosc, before it makes them smaller.
        free_bytes: room; None in object stores.
        fits: whether there is room for them, and for what encoders before this one write.
        profiles: other ways to store the same images.
        sample: what was measured.
        seconds: expected time of decoding and encoding; a disk must take `new_bytes` meanwhile.
        encoder_flops: operations for one image.
        shares: what the encoder would be in training steps.
        break_even: when a cache pays.
    """

    backbone: str
    height: int
    width: int
    tokens: int
    dim: int
    dtype: DType
    codec: Codec
    compute: str
    weights: Weights
    cache: str | None
    device: str
    engine: str | None
    engine_fallback: str
    data: tuple[SourceCount, ...]
    different: int
    new: int
    bytes_per_image: int
    images_per_shard: int
    new_shards: int
    new_bytes: int
    free_bytes: int | None
    fits: bool
    profiles: tuple[Profile, ...]
    sample: TimedSample
    seconds: float
    encoder_flops: int
    shares: tuple[Share, ...]
    break_even: BreakEven

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "sample": {**asdict(self.sample), "images_per_s": self.sample.images_per_s}}


def read_sources(sources: Sequence[ImageSource], root: Place, *, threads: int) -> dict[str, list[SourceImage]]:
    """Content ids of all images, by the name of their source.

    Raises:
        DataError: a file cannot be read, or two different images have the same key.
    """
    with ThreadPoolExecutor(threads) as pool:
        return {
            source.name: take_inventory(source, pool, root=root, ahead=4 * threads, check=lambda: None)
            for source in sources
        }


def estimate(
    row: BackboneRow,
    res: tuple[int, int],
    inventories: Mapping[str, Sequence[SourceImage]],
    *,
    root: Place,
    weights: str | None,
    dtype: DType,
    codec: Codec,
    compute: torch.dtype,
    device: torch.device,
    crop: bool,
    options: Mapping[str, Any],
    batch_size: BatchSize,
    threads: int,
    taken_bytes: int = 0,
    sample_s: float = SAMPLE_S,
) -> Estimate:
    """Look, build the encoder, and encode for a few seconds.

    Args:
        row, res: the encoder and the (height, width) of its images in pixels.
        inventories: see `read_sources`; at least one image.
        root: place of all caches.
        weights, dtype, codec, compute, device, crop, options, batch_size, threads: as `vlmx extract` has them.
        taken_bytes: what encoders before this one would write.
        sample_s: how long to encode.

    Raises:
        WeightsError: the weights that were named do not exist, or those that were found are not this network's.
        UsageError: the encoder cannot take the size or the options.
        CacheError: the cache that is there is damaged.
    """
    state = weights_of(row, weights)
    backbone = build_backbone(
        row.name, res=res, weights=state.found or "random:0", dtype=compute, device=device, crop=crop, **options
    )
    spec = spec_of(backbone, dtype, codec)
    shape = TokenShape(grid=backbone.grid, dim=backbone.dim)
    place = root.child(spec.name) if state.found else None
    known, per_shard = _stored(place, image_bytes(shape, dtype), local=root.is_local)
    by_id = {image.id: image for images in inventories.values() for image in images}
    new = [image for image in by_id if image not in known]
    free_bytes = root.free_bytes()
    new_bytes = cache_size(len(new), shape, dtype, local=root.is_local).total_bytes
    sample = time_sample(
        backbone,
        spec,
        [by_id[image] for image in new] or list(by_id.values()),
        batch_size=batch_size,
        threads=threads,
        most=min(per_shard, max(1, len(new))),
        budget_s=sample_s,
    )
    flops = encoder_flops(row.name, res, options)
    scan = scan_choice(backbone)
    return Estimate(
        backbone=row.name,
        height=res[0],
        width=res[1],
        tokens=shape.num_tokens,
        dim=shape.dim,
        dtype=dtype,
        codec=codec,
        compute=spec.compute,
        weights=state,
        cache=None if place is None else place.url,
        device=_device_name(backbone),
        engine=None if scan is None else scan.engine,
        engine_fallback="" if scan is None else scan.fallback,
        data=tuple(count_sources(inventories, new)),
        different=len(by_id),
        new=len(new),
        bytes_per_image=image_bytes(shape, dtype),
        images_per_shard=per_shard,
        new_shards=-(-len(new) // per_shard),
        new_bytes=new_bytes,
        free_bytes=free_bytes,
        fits=free_bytes is None or taken_bytes + new_bytes <= free_bytes,
        profiles=tuple(_profiles(spec, shape, len(new), sample, local=root.is_local)),
        sample=sample,
        seconds=len(new) / sample.images_per_s,
        encoder_flops=flops,
        shares=tuple(_share(name, parameters, shape.num_tokens, flops) for name, parameters in LLMS),
        break_even=_break_even(len(new), len(by_id), image_bytes(shape, dtype), sample.images_per_s),
    )


def weights_of(row: BackboneRow, given: str | None) -> Weights:
    """Where the weights of `row` are, or would come from; nothing is downloaded.

    Raises:
        WeightsError: `given` names a file that does not exist.
    """
    from vlmx.extract.weights.download import why_not

    if given is not None and given.startswith("random:"):
        return Weights(given=given, found=given, file=row.file, url=row.url, download_to=None, why_no_download="")
    found = find_here(row, given)
    reason = "" if found else why_not(row.url)
    target = None if found or reason else str(named_folder() or cache_folder())
    return Weights(
        given=given,
        found=None if found is None else str(found),
        file=row.file,
        url=row.url,
        download_to=target,
        why_no_download=reason,
    )


def runs_that_pay(once_s: float, read_s: float, on_the_fly_s: float) -> int | None:
    """From how many runs on a cache takes less time than encoding in every run; None if it never does.

    n runs take once_s + n read_s with a cache, and n on_the_fly_s without.
    """
    if on_the_fly_s <= read_s:
        return None
    return math.floor(once_s / (on_the_fly_s - read_s)) + 1


def _stored(place: Place | None, bytes_per_image: int, *, local: bool) -> tuple[set[str], int]:
    """What the cache has, and how many images its shards take."""
    if place is None or not place.exists(MANIFEST):
        return set(), images_per_shard(bytes_per_image, local=local)
    manifest = read_manifest(place)
    known = {image for shard in manifest.shards.values() for image in shard.ids}
    return known, manifest.header.images_per_shard


def _device_name(backbone: Backbone) -> str:
    device = next(backbone.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _profiles(spec: CacheSpec, shape: TokenShape, images: int, sample: TimedSample, *, local: bool) -> list[Profile]:
    sizes = {dtype: cache_size(images, shape, dtype, local=local).total_bytes for dtype in get_args(DType)}
    ways: list[tuple[DType, Codec]] = [("float16", "crc32c"), ("bfloat16", "crc32c"), ("int8", "crc32c")]
    if (spec.dtype, "crc32c") not in ways:
        ways.insert(0, (spec.dtype, "crc32c"))
    if sample.blosc_ratio is not None:
        ways.append((spec.dtype, "blosc"))
    return [
        Profile(
            dtype=dtype,
            codec=codec,
            chosen=(dtype, codec) == (spec.dtype, spec.codec),
            bytes=round(sizes[dtype] / (sample.blosc_ratio if codec == "blosc" and sample.blosc_ratio else 1)),
            relative_error=sample.int8_error if dtype == "int8" else None,
            ratio=sample.blosc_ratio if codec == "blosc" else None,
        )
        for dtype, codec in ways
    ]


def _share(llm: str, parameters: float, visual_tokens: int, flops: int) -> Share:
    tokens = visual_tokens + TEXT_TOKENS
    llm_flops = llm_training_flops(parameters, tokens)
    share = flops / (flops + llm_flops)
    return Share(llm=llm, parameters=parameters, tokens=tokens, llm_flops=llm_flops, share=share)


def _break_even(new: int, different: int, bytes_per_image: int, images_per_s: float) -> BreakEven:
    once_s, on_the_fly_s = new / images_per_s, different / images_per_s
    read_s = different * bytes_per_image / READ_BYTES_PER_S
    return BreakEven(
        once_s=once_s,
        read_s=read_s,
        read_bytes_per_s=READ_BYTES_PER_S,
        on_the_fly_s=on_the_fly_s,
        runs=runs_that_pay(once_s, read_s, on_the_fly_s),
    )
