"""Is this cache the same as that one, and if not, how far are their tokens apart?

Shapes: tokens_ND [tokens, channels] float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmx.cache_specs.manifest import Header, Manifest, read_manifest
from vlmx.cache_specs.places import Place, place_of
from vlmx.cache_specs.quantize import QuantizationError
from vlmx.cache_specs.reader import open_cache
from vlmx.cache_specs.spec import CacheSpec, DType
from vlmx.console import progress

Floats = NDArray[np.float32]

# Largest ||a - b|| / ||a|| of an image that two machines may give for one spec. Measured with other kernels and other
# batch sizes on three small encoders that compute in float32: 0.00003 as float16, 0.00015 as bfloat16, 0.0004 as int8.
# Deep encoders add up more; rounding every number differently would be 0.0002 in float16 and 0.0017 in bfloat16.
ALIKE: dict[DType, float] = {"float16": 1e-3, "bfloat16": 3e-3, "float32": 1e-3}
ALIKE_8BIT_MAX = 0.03  # of 8 bits whose scales fit; scales that do not fit would let anything pass
ALIKE_COMPUTE = 2e-2  # encoders that compute in less than float32: 0.007 was measured as above
TINY = 1e-12  # in place of the norm of an image that is all zero


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far two arrays of tokens of some images are apart.

    Attributes:
        images: how many were compared.
        identical: those whose stored bytes are equal.
        max_abs: the largest difference of two numbers.
        relative: the largest ||a - b|| / ||a|| of an image.
        cosine: the smallest cosine of two tokens at the same place of the same image.
    """

    images: int = 0
    identical: int = 0
    max_abs: float = 0.0
    relative: float = 0.0
    cosine: float = 1.0

    def __add__(self, other: Distance) -> Distance:
        return Distance(
            images=self.images + other.images,
            identical=self.identical + other.identical,
            max_abs=max(self.max_abs, other.max_abs),
            relative=max(self.relative, other.relative),
            cosine=min(self.cosine, other.cosine),
        )


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What `vlmx cache diff` found.

    Attributes:
        first, second: the caches.
        spec: one line for each field of the specs that differs, "dtype: float16, not bfloat16"; also the shape.
        only_first, only_second: images that only one of them has tokens of, in the order in which they are stored.
        common: how many images both have.
        identical_bytes: whether the shards are equal to the last byte, by the digests that were recorded.
        distance: of the images that were compared; None when there are none, or their shapes differ.
        limit: up to which `distance.relative` the tokens are alike.
    """

    first: Place
    second: Place
    spec: tuple[str, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    common: int
    identical_bytes: bool
    distance: Distance | None
    limit: float

    @property
    def alike(self) -> bool:
        """Same spec, same images, and tokens that differ by no more than two machines do."""
        if self.spec or self.only_first or self.only_second:
            return False
        return self.identical_bytes or self.distance is None or self.distance.relative <= self.limit


def compare(first: str | Path | Place, second: str | Path | Place, *, sample: int | None) -> Difference:
    """Compare two caches; each may be one whose extraction has not come to its end.

    Args:
        first, second: their folders or urls.
        sample: of how many common images the tokens are compared, see `choose`; None compares all.

    Raises:
        CacheError: one of them does not exist, or is of another version of vlmx.
        CacheCorruptError: a manifest is damaged, or tokens that were read are.
    """
    places = place_of(first), place_of(second)
    one, other = read_manifest(places[0]), read_manifest(places[1])
    ours, theirs = _stored(one), _stored(other)
    both = [image for image in ours if image in theirs]
    same_shape = one.header.shape == other.header.shape
    same_bytes = _digests(one) == _digests(other) and one.header == other.header
    spec = one.header.spec.differences(other.header.spec)
    if not same_shape:
        spec.append(f"shape: {one.header.shape}, not {other.header.shape}")
    distance = None
    if both and same_shape:
        chosen = both if sample is None else choose(both, sample)
        distance = _distance(places, (one.header, other.header), chosen)
    return Difference(
        first=places[0],
        second=places[1],
        spec=tuple(spec),
        only_first=tuple(image for image in ours if image not in theirs),
        only_second=tuple(image for image in theirs if image not in ours),
        common=len(both),
        identical_bytes=same_bytes,
        distance=distance,
        limit=alike_limit(one.header.spec, one.error),
    )


def choose(images: Iterable[str], count: int) -> list[str]:
    """`count` of the images, or all if there are fewer: the same ones on every machine, from all over the cache."""
    return sorted(images, key=lambda image: hashlib.sha256(image.encode()).digest())[:count]


def alike_limit(spec: CacheSpec, error: QuantizationError) -> float:
    """The largest ||a - b|| / ||a|| of an image that another machine may give for `spec`.

    8 bits: twice what they lost when the cache was made, over all images; the worst of 60 lost 1.5 times as much.
    """
    limit = min(2 * error.relative, ALIKE_8BIT_MAX) if spec.dtype == "int8" else ALIKE[spec.dtype]
    return limit if spec.compute == "float32" else max(limit, ALIKE_COMPUTE)


def distance_of(first_ND: Floats, second_ND: Floats, *, identical: bool) -> Distance:
    """How far two arrays of tokens of one image are apart; `identical` says whether their stored bytes are equal."""
    if identical:
        return Distance(images=1, identical=1)
    one_ND, other_ND = first_ND.astype(np.float64), second_ND.astype(np.float64)
    off_ND = other_ND - one_ND
    norm = float(np.linalg.norm(one_ND))
    off = float(np.linalg.norm(off_ND))
    norms_N = np.linalg.norm(one_ND, axis=1) * np.linalg.norm(other_ND, axis=1)
    cosines_N = (one_ND * other_ND).sum(axis=1) / np.where(norms_N > 0, norms_N, 1.0)
    cosines_N[(norms_N == 0) & (off_ND == 0).all(axis=1)] = 1.0
    return Distance(
        images=1,
        max_abs=float(np.abs(off_ND).max()),
        relative=off / max(norm, TINY),
        cosine=float(np.clip(cosines_N.min(), -1.0, 1.0)),
    )


def as_float32(header: Header, stored_ND: NDArray[Any]) -> Floats:
    """What stored numbers of a cache stand for."""
    if header.quantization is not None:
        return header.quantization.decode(stored_ND)
    if header.spec.dtype == "bfloat16":
        return (stored_ND.astype(np.uint32) << 16).view(np.float32)
    return stored_ND.astype(np.float32)


def _distance(places: tuple[Place, Place], headers: tuple[Header, Header], images: Sequence[str]) -> Distance:
    one, other = (open_cache(place, allow_partial=True) for place in places)
    # whether equal bytes stand for equal tokens
    same_numbers = headers[0].spec.dtype == headers[1].spec.dtype and headers[0].quantization == headers[1].quantization
    total = Distance()
    with progress("compare", len(images), "images") as bar:
        for image in images:  # one at a time, so that memory is bounded
            first_ND, second_ND = one.read([image])[0], other.read([image])[0]
            identical = same_numbers and first_ND.tobytes() == second_ND.tobytes()
            floats_ND = (
                as_float32(header, stored) for header, stored in zip(headers, (first_ND, second_ND), strict=True)
            )
            total += distance_of(*floats_ND, identical=identical)
            bar.advance()
    return total


def _stored(manifest: Manifest) -> dict[str, None]:
    """The images that have tokens, in the order in which they are stored."""
    return {image: None for shard in manifest.shards.values() for image in shard.ids if image not in shard.failed}


def _digests(manifest: Manifest) -> list[tuple[int, str]]:
    return [(index, shard.digest or shard.sha256) for index, shard in manifest.shards.items()]
