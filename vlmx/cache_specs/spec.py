"""Which tokens are these? Everything that changes a token, and nothing else.

Kernel, device, batch size and library versions are not meant to change tokens; they are provenance, recorded beside
the cache and not part of its identity. The token grid and width follow from the spec, so they are not in it either.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

from vlmx.cache_specs.fingerprint import fingerprint
from vlmx.cache_specs.geometry import Geometry
from vlmx.errors import CacheError

DType = Literal["float16", "bfloat16", "float32", "int8"]
Compute = Literal["float32", "bfloat16", "float16"]
Codec = Literal["crc32c", "blosc"]
SPEC_VERSION = 1

# numpy's name of what is stored; bfloat16 has none in numpy and in zarr-python, so its bits are stored as uint16
STORAGE_DTYPES: dict[DType, str] = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "int8": "|i1"}

_BACKBONE = re.compile(r"(timm:)?[A-Za-z0-9][A-Za-z0-9._+-]*")
_WEIGHTS = re.compile(r"[0-9a-f]{64}|random:[0-9]+")


@dataclass(frozen=True, kw_only=True)
class TokenShape:
    """The shape of one image's tokens.

    Attributes:
        grid: rows and columns of the token map; token r * columns + c is the cell in row r, column c.
        dim: numbers a token.
    """

    grid: tuple[int, int]
    dim: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        assert min(*self.grid, self.dim) > 0, self

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """The identity of a cache: two caches with equal specs hold the same tokens for the same image bytes.

    Attributes:
        backbone: name of the encoder, family-size-weights.
        weights_sha256: 64 hex digits of the weights file, or "random:SEED" for an untrained encoder.
        forward_version: counts changes of the encoder's code that change its output.
        feature: which stage or layer the tokens are taken from.
        out_norm: which normalisation is applied to them, or "none".
        geometry: how photos become inputs.
        mean, std: per-channel normalisation of inputs scaled to 0..1.
        dtype: the numbers' type; bfloat16 is stored as the uint16 of its bits. int8 is 8 bits on a scale of each
            channel, see `quantize`.
        compute: type of the encoder's matrix products; less than float32 changes tokens by a percent or so. Left out
            of the description when it is float32, so that caches from before it existed keep their identity.
        codec: what each image's tokens go through: "crc32c" puts a checksum behind them; "blosc" compresses them
            before that, without loss (bitshuffle and LZ4).
        version: layout of this description.
    """

    backbone: str
    weights_sha256: str
    forward_version: int
    feature: str
    out_norm: str
    geometry: Geometry
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dtype: DType = "float16"
    compute: Compute = "float32"
    codec: Codec = "crc32c"
    version: int = SPEC_VERSION

    def __post_init__(self) -> None:
        # floats, so that 0 and 0.0, or numpy's numbers, give one fingerprint
        object.__setattr__(self, "mean", tuple(float(level) for level in self.mean))
        object.__setattr__(self, "std", tuple(float(level) for level in self.std))
        problems = []
        if not _BACKBONE.fullmatch(self.backbone):
            problems.append(f"backbone {self.backbone!r} is not a name of letters, digits and . _ + -")
        if not _WEIGHTS.fullmatch(self.weights_sha256):
            problems.append(f"weights_sha256 {self.weights_sha256!r} is neither 64 hex digits nor random:SEED")
        if type(self.forward_version) is not int or self.forward_version < 1:
            problems.append(f"forward_version {self.forward_version!r} is not a positive integer")
        if not (self.feature and self.out_norm):
            problems.append("feature and out_norm must not be empty")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(map(math.isfinite, self.mean + self.std)):
            problems.append(f"mean {self.mean} and std {self.std} are not three finite numbers each")
        elif min(self.std) <= 0:
            problems.append(f"std {self.std} is not positive")
        if self.dtype not in get_args(DType):
            problems.append(f"dtype {self.dtype!r} is not one of {', '.join(get_args(DType))}")
        if self.compute not in get_args(Compute):
            problems.append(f"compute {self.compute!r} is not one of {', '.join(get_args(Compute))}")
        if self.codec not in get_args(Codec):
            problems.append(f"codec {self.codec!r} is not one of {', '.join(get_args(Codec))}")
        if self.version != SPEC_VERSION:
            problems.append(f"version {self.version!r} is not {SPEC_VERSION}, the one that this vlmx knows")
        if problems:
            raise CacheError("this cache spec is not valid", why="; ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        return {
            "backbone": self.backbone,
            "weights_sha256": self.weights_sha256,
            "forward_version": self.forward_version,
            "feature": self.feature,
            "out_norm": self.out_norm,
            "geometry": self.geometry.to_dict(),
            "mean": list(self.mean),
            "std": list(self.std),
            "dtype": self.dtype,
            **({} if self.compute == "float32" else {"compute": self.compute}),
            "codec": self.codec,
            "version": self.version,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CacheSpec:
        """Build from plain data; every key must be there, and no other.

        Raises:
            CacheError: keys are missing or unknown, or a value is not valid.
        """
        geometry = data.get("geometry")
        problems = _key_problems("", {"compute": "float32", **data}, cls)
        if isinstance(geometry, Mapping):
            problems += _key_problems("geometry.", {"crop_pct": 1.0, **geometry}, Geometry)
        elif "geometry" in data:
            problems.append("geometry is not a mapping")
        if problems:
            raise CacheError(
                "this cache spec cannot be read",
                why="; ".join(problems),
                fix="it was made by another version of vlmx: use that one, or extract again",
            )
        assert isinstance(geometry, Mapping)
        try:
            return cls(**{**data, "geometry": Geometry(**geometry)})
        except (TypeError, ValueError) as error:
            raise CacheError("this cache spec cannot be read", why=f"a value has the wrong type: {error}") from error

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits, the same on every machine."""
        return fingerprint(self.to_dict())

    @property
    def resolution(self) -> str:
        """Height x width as `--res` takes it, e.g. "512x512"."""
        return f"{self.geometry.height}x{self.geometry.width}"

    @property
    def name(self) -> str:
        """The cache's folder name: backbone@HxW-<first 12 digits of the fingerprint>; ":" in the backbone is "-"."""
        return f"{self.backbone.replace(':', '-')}@{self.resolution}-{self.fingerprint[:12]}"

    @property
    def storage_dtype(self) -> str:
        """numpy's name of the stored numbers, little endian; "<u2" for bfloat16."""
        return STORAGE_DTYPES[self.dtype]

    @property
    def random_weights(self) -> bool:
        """Whether the encoder was never trained."""
        return self.weights_sha256.startswith("random:")

    def differences(self, other: CacheSpec) -> list[str]:
        """One line for each field in which the two differ: "dtype: float16, not bfloat16" (self first)."""
        mine, theirs = (
            _flat(
                {
                    **spec.to_dict(),
                    "compute": spec.compute,
                    "geometry": {**spec.geometry.to_dict(), "crop_pct": spec.geometry.crop_pct},
                }
            )
            for spec in (self, other)
        )
        return [f"{key}: {mine[key]}, not {theirs[key]}" for key in mine if mine[key] != theirs[key]]


def _key_problems(prefix: str, data: Mapping[str, Any], cls: type) -> list[str]:
    known = {field.name for field in fields(cls)}
    problems = [f"missing key {prefix}{key}" for key in sorted(known - set(data))]
    return problems + [f"unknown key {prefix}{key}" for key in sorted(set(data) - known)]


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
