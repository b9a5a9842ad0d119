"""How do tokens become 8 bits, and how far are they then from what they were?

Each channel has an offset and a scale of its own, the same for all images: value = offset + scale * q, q in -127..127.
A scale for each token instead would lose the other channels wherever one is a hundred times larger, as it happens in
transformers ("massive activations"); measured on real features, a static scale for each channel does not.

Shapes: tokens_BND [images, tokens, channels] float32, codes_BND the same in int8, offset_D and scale_D float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmx.errors import CacheError

CODE_MAX = 127
CALIBRATION_IMAGES = 64
HEADROOM = 1.25  # beyond the farthest value of the first images; what lies farther out is clipped and counted

FITTING = 0.03
FITTING_CLIPPED = 1e-3

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantization:
    """The static scale of a cache.

    Attributes:
        offset_D: the middle of each channel's range.
        scale_D: one step of each channel; positive.
    """

    offset_D: Floats
    scale_D: Floats

    def __post_init__(self) -> None:
        fine = self.offset_D.shape == self.scale_D.shape and self.offset_D.ndim == 1
        if not (fine and np.isfinite(self.offset_D).all() and np.isfinite(self.scale_D).all()):
            raise CacheError("the scales of an 8-bit cache are not one finite number for each channel")
        if not (self.scale_D > 0).all():
            raise CacheError("the scales of an 8-bit cache are not positive")

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Quantization)
            and np.array_equal(self.offset_D, other.offset_D)
            and np.array_equal(self.scale_D, other.scale_D)
        )

    def encode(self, tokens_BND: Floats) -> NDArray[np.int8]:
        """The nearest codes; values outside the range get its end."""
        steps_BND = (tokens_BND - self.offset_D) / self.scale_D
        np.rint(steps_BND, out=steps_BND)
        np.clip(steps_BND, -CODE_MAX, CODE_MAX, out=steps_BND)
        return steps_BND.astype(np.int8)

    def decode(self, codes_BND: NDArray[np.int8]) -> Floats:
        """What the codes stand for."""
        return codes_BND.astype(np.float32) * self.scale_D + self.offset_D

    def error(self, tokens_BND: Floats, codes_BND: NDArray[np.int8]) -> QuantizationError:
        """What `codes_BND` = `encode(tokens_BND)` lost."""
        lost_BND = (self.decode(codes_BND) - tokens_BND).astype(np.float64)
        reach_D = self.scale_D * np.float32(CODE_MAX + 0.5)
        return QuantizationError(
            values=tokens_BND.size,
            square=float(np.square(tokens_BND, dtype=np.float64).sum()),
            lost_square=float(np.square(lost_BND, out=lost_BND).sum()),
            clipped=int(np.count_nonzero(np.abs(tokens_BND - self.offset_D) > reach_D)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; float32 numbers survive it."""
        return {"offset": self.offset_D.tolist(), "scale": self.scale_D.tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Quantization:
        """Read what `to_dict` wrote."""
        return cls(
            offset_D=np.asarray(data["offset"], dtype=np.float32), scale_D=np.asarray(data["scale"], dtype=np.float32)
        )


@dataclass(frozen=True, kw_only=True)
class QuantizationError:
    """What 8 bits lost on some images.

    Attributes:
        values: numbers.
        square: sum of their squares.
        lost_square: sum of the squares of what was lost.
        clipped: numbers that lay outside the range of their channel.
    """

    values: int = 0
    square: float = 0.0
    lost_square: float = 0.0
    clipped: int = 0

    @property
    def fits(self) -> bool:
        """Whether the scales suit these images: 8 bits lose 0.01 or so where they do."""
        return self.relative <= FITTING and self.clipped <= FITTING_CLIPPED * self.values

    @property
    def relative(self) -> float:
        """||lost|| / ||tokens||."""
        return float(np.sqrt(self.lost_square / self.square)) if self.square else 0.0

    def __add__(self, other: QuantizationError) -> QuantizationError:
        return QuantizationError(
            values=self.values + other.values,
            square=self.square + other.square,
            lost_square=self.lost_square + other.lost_square,
            clipped=self.clipped + other.clipped,
        )


def calibrate(tokens_BND: Floats) -> Quantization:
    """The scales that the first images of a cache call for: the range of each channel, and a quarter more."""
    low_D = tokens_BND.min(axis=(0, 1)).astype(np.float64)
    high_D = tokens_BND.max(axis=(0, 1)).astype(np.float64)
    half_D = np.maximum((high_D - low_D) / 2 * HEADROOM, 1e-6)  # a channel that never changes still has a scale
    offset_D = ((low_D + high_D) / 2).astype(np.float32)
    return Quantization(offset_D=offset_D, scale_D=(half_D / CODE_MAX).astype(np.float32))
