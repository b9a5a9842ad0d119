"""How do several encoders' caches serve as one? Their tokens stand side by side on the channel axis when they are read.

Nothing is copied on disk: each cache also serves alone, and in every other fusion. Order matters and is kept: "A+B" has
A's channels first. The join follows Prismatic's fused backbones, in which each encoder normalises the image its own
way; so fill colour and normalisation may differ, and everything that places a box may not.

Shapes: B images, N tokens, D channels of all parts together, P channels of one part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlmx.cache_specs.buffers import aligned_empty
from vlmx.cache_specs.fingerprint import fingerprint
from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.quantize import Quantization
from vlmx.cache_specs.spec import CacheSpec, DType, TokenShape
from vlmx.cache_specs.token_source import TokenSource
from vlmx.errors import CacheError

if TYPE_CHECKING:
    from vlmx.cache_specs.reader import TokenReader

# A part is read in blocks of about this size and each block is copied into place while it is still in the processor's
# cache.
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class FusedSpec:
    """The identity of joined tokens: the specs of the parts, in order.

    Attributes:
        parts: two or more different specs of equal dtype whose geometries differ in the fill colour alone.
    """

    parts: tuple[CacheSpec, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        problems = _problems(self.parts)
        if problems:
            raise _not_joinable(self.name, problems)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `spec_from_dict` reads it back."""
        return {"parts": [part.to_dict() for part in self.parts]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FusedSpec:
        """Build from plain data.

        Raises:
            CacheError: keys are missing or unknown, a value is not valid, or the parts cannot be joined.
        """
        if set(data) != {"parts"} or not isinstance(data["parts"], Sequence):
            raise CacheError(
                "this spec of joined caches cannot be read",
                why=f"it has the keys {', '.join(map(str, data)) or '(none)'}, expected a list under 'parts'",
                fix="it was made by another version of vlmx: use that one, or train again",
            )
        return cls(parts=tuple(CacheSpec.from_dict(part) for part in data["parts"]))

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits over the parts' fingerprints in their order, the same on every machine."""
        return fingerprint({"parts": [part.fingerprint for part in self.parts]})

    @property
    def name(self) -> str:
        """The parts' names joined with +; `open_cache` takes it."""
        return "+".join(part.name for part in self.parts)

    @property
    def backbone(self) -> str:
        """The parts' backbones joined with +."""
        return "+".join(part.backbone for part in self.parts)

    @property
    def weights_sha256(self) -> str:
        """The parts' weights joined with +."""
        return "+".join(part.weights_sha256 for part in self.parts)

    @property
    def random_weights(self) -> bool:
        """Whether any of the encoders was never trained."""
        return any(part.random_weights for part in self.parts)

    @property
    def geometry(self) -> Geometry:
        """How photos become inputs, with the fill colour of the first part; boxes mean the same in all parts."""
        return self.parts[0].geometry

    @property
    def resolution(self) -> str:
        """Height x width of every part."""
        return self.parts[0].resolution

    @property
    def dtype(self) -> DType:
        return self.parts[0].dtype

    @property
    def storage_dtype(self) -> str:
        """numpy's name of the stored numbers."""
        return self.parts[0].storage_dtype

    def differences(self, other: FusedSpec) -> list[str]:
        """One line for each field in which two parts at the same place differ, or one if the backbones do."""
        if [part.backbone for part in self.parts] != [part.backbone for part in other.parts]:
            return [f"backbones: {self.backbone}, not {other.backbone}"]
        pairs = zip(self.parts, other.parts, strict=True)
        return [f"{mine.backbone} {line}" for mine, theirs in pairs for line in mine.differences(theirs)]


TokenSpec = CacheSpec | FusedSpec
"""What tokens are: those of one cache, or of several joined ones."""


def spec_from_dict(data: Mapping[str, Any]) -> TokenSpec:
    """Read what `to_dict` of either kind of spec wrote.

    Raises:
        CacheError: keys are missing or unknown, or a value is not valid.
    """
    return FusedSpec.from_dict(data) if "parts" in data else CacheSpec.from_dict(data)


class FusedReader(TokenSource):
    """The tokens of several caches, joined on the channel axis while they are read.

    Args:
        parts: open caches, in the order of their channels.

    Raises:
        CacheError: they cannot be joined: one of them comes twice, or their token grids, dtypes or geometries differ.
    """

    def __init__(self, parts: Sequence[TokenReader]) -> None:
        self._parts = tuple(parts)
        grids = {part.shape.grid for part in parts}
        if len(grids) > 1:
            each = ", ".join(f"{part.num_tokens} ({part.shape.grid[0]} x {part.shape.grid[1]})" for part in parts)
            raise _not_joinable(self.name, [f"tokens an image: {each}", *_problems([part.spec for part in parts])])
        self.spec: FusedSpec = FusedSpec(parts=tuple(part.spec for part in parts))
        self.shape = TokenShape(grid=parts[0].shape.grid, dim=sum(part.shape.dim for part in parts))
        first, *others = parts
        self.ids: Mapping[str, int] = {
            image: row for image, row in first.ids.items() if all(image in other for other in others)
        }
        self.failed: Mapping[str, str] = {image: why for part in parts for image, why in part.failed.items()}
        self.sealed = all(part.sealed for part in parts)
        self.quantization = _joined([part.quantization for part in parts])

    def __reduce__(self) -> tuple[Any, ...]:
        return FusedReader, (self._parts,)

    @property
    def parts(self) -> tuple[TokenReader, ...]:
        return self._parts

    def announce(self, ids: Iterable[str]) -> None:
        ids = list(ids)
        for part in self._parts:
            part.announce(ids)

    def _fill(self, place_of_image: Mapping[str, int], out_BND: NDArray[Any]) -> None:
        start = 0
        for part in self._parts:
            stop = start + part.shape.dim
            _read_into(part, place_of_image, out_BND[:, :, start:stop])
            start = stop


def _read_into(part: TokenReader, place_of_image: Mapping[str, int], place_BNP: NDArray[Any]) -> None:
    """The tokens of one part into its channels, which do not lie together in memory."""
    images = list(place_of_image)
    image_bytes = part.num_tokens * part.shape.dim * part.storage_dtype.itemsize
    block = min(len(images), max(1, BLOCK_BYTES // image_bytes))
    buffer_BNP = aligned_empty((block, part.num_tokens, part.shape.dim), part.storage_dtype)
    for start in range(0, len(images), block):
        some = images[start : start + block]
        for image, tokens_NP in zip(some, part.read(some, out=buffer_BNP[: len(some)]), strict=True):
            place_BNP[place_of_image[image]] = tokens_NP


def _joined(quantizations: Sequence[Quantization | None]) -> Quantization | None:
    """The scales of the parts' channels side by side; None where the parts, which are of one dtype, have none."""
    known = [quantization for quantization in quantizations if quantization is not None]
    if not known:
        return None
    return Quantization(
        offset_D=np.concatenate([part.offset_D for part in known]),
        scale_D=np.concatenate([part.scale_D for part in known]),
    )


def _problems(specs: Sequence[CacheSpec]) -> list[str]:
    """Why caches of these specs cannot be joined, whatever their grids."""
    problems = []
    if len(specs) < 2:
        problems.append(f"{len(specs)} caches are given, two or more are needed")
    if len({spec.fingerprint for spec in specs}) < len(specs):
        problems.append("a cache is given twice")
    if len({spec.dtype for spec in specs}) > 1:
        problems.append(f"dtypes: {', '.join(spec.dtype for spec in specs)}")
    for key in (field.name for field in fields(Geometry) if field.name != "fill"):
        values = [str(getattr(spec.geometry, key)) for spec in specs]
        if len(set(values)) > 1:
            problems.append(f"{key} of the images: {', '.join(values)}")
    return problems


def _not_joinable(name: str, problems: Sequence[str]) -> CacheError:
    return CacheError(
        f"the caches {name} cannot be joined",
        why="; ".join(problems),
        fix="join different caches of one image size, token grid and dtype: `vlmx extract` with other --res or --dtype",
    )
