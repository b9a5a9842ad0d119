"""Which scales do the tokens of a new 8-bit cache get? Those of the first images that can be decoded.

Shapes: images_BCHW [1, channels, height, width], tokens [1, tokens, channels] float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlmx.cache_specs.quantize import CALIBRATION_IMAGES, Quantization, calibrate
from vlmx.console import note, warn
from vlmx.errors import DataError
from vlmx.extract.lanes import lanes_for
from vlmx.extract.preprocess import UndecodableImage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlmx.extract.backbones.base import Backbone


def first_scales(backbone: Backbone, prepared: Iterable[NDArray[np.float32] | UndecodableImage]) -> Quantization:
    """The scales that the first images call for.

    Args:
        backbone: the encoder.
        prepared: pixels (3, H, W) of different images, or what is wrong with their files; no more than are needed
            are taken.

    Raises:
        DataError: none of them can be decoded.
    """
    tokens: list[NDArray[np.float32]] = []
    with lanes_for(backbone, "int8") as lanes:
        images_BCHW = lanes.room(1)
        for pixels in prepared:
            if isinstance(pixels, UndecodableImage):
                continue
            images_BCHW[0] = torch.from_numpy(pixels)
            tokens.append(lanes.start(images_BCHW)().stored_BND.numpy())
            if len(tokens) == CALIBRATION_IMAGES:
                break
    if not tokens:
        raise DataError("no image can be decoded", why="the scales of 8-bit tokens need some", fix="check the files")
    note(f"8-bit scales from the first {len(tokens)} images")
    if len(tokens) < CALIBRATION_IMAGES:
        warn(
            f"8-bit scales from {len(tokens)} images fit these, and perhaps no others: before more images are added, "
            f"delete this cache and begin with {CALIBRATION_IMAGES} or more"
        )
    return calibrate(np.concatenate(tokens))
