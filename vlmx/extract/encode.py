"""How do the images of one shard become an array of tokens?

Legend: B images of one pass, C channels (3), H x W pixels, S images of one shard, N tokens, D token width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlmx.cache_specs.spec import STORAGE_DTYPES, DType
from vlmx.errors import UsageError, VlmxError
from vlmx.extract.backbones.base import Backbone
from vlmx.extract.preprocess import UndecodableImage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Prepared = NDArray[np.float32] | UndecodableImage  # pixels (3, H, W), or what is wrong with the file

FLOAT16_MAX = 65504.0
CPU_BLOCK_MAX = 8
CPU_BLOCK_PIXELS = 8 * 224 * 224  # bounds the memory of a pass


def block_size(backbone: Backbone, batch_size: int) -> int:
    """How many images go through the encoder in one pass; every pass has this size.

    The last bits of a CPU's matrix products depend on the number of rows, so a CPU takes a size of its own, whatever
    the user's `batch_size`: an image's bytes in the cache depend neither on it nor on how many images there are. Larger
    passes are not faster there.
    """
    if _device(backbone).type != "cpu":
        return batch_size
    height, width = backbone.res
    return max(1, min(CPU_BLOCK_MAX, CPU_BLOCK_PIXELS // (height * width)))


@dataclass(kw_only=True)
class Seconds:
    """Where the time of an extraction went: waiting for decoded images, in the encoder, writing shards."""

    wait: float = 0.0
    encode: float = 0.0
    write: float = 0.0


class ShardEncoder:
    """Encodes shards one after the other, each pass by pass.

    Args:
        backbone: the frozen encoder.
        prepared: results of `preprocess.prepare` for all images of all shards, in order.
        block: images a pass.
        dtype: of the stored tokens.
        seconds: where the time is added up.

    Attributes:
        tokens_SND: of the shard in hand, in storage dtype (bfloat16 as uint16); rows of failed images are zero.
        failed: ids of its undecodable images, and why.
    """

    tokens_SND: NDArray[np.generic]
    failed: dict[str, str]

    def __init__(
        self, backbone: Backbone, prepared: Iterator[Prepared], *, block: int, dtype: DType, seconds: Seconds
    ) -> None:
        self.seconds = seconds
        self._backbone = backbone
        self._prepared = prepared
        self._dtype = dtype
        self._images_BCHW = torch.zeros(block, 3, *backbone.res)

    def encode(self, ids: Sequence[str]) -> Iterator[int]:
        """Encode the images of one shard; yields after each pass how many more images are done.

        Raises:
            VlmxError: the encoder gave NaN or infinity.
            UsageError: a token does not fit into float16.
        """
        shape = (len(ids), self._backbone.num_tokens, self._backbone.dim)
        self.tokens_SND = np.zeros(shape, STORAGE_DTYPES[self._dtype])
        self.failed = {}
        filled: list[int] = []  # slots whose pixels wait for the next pass
        done = 0
        for slot, image in enumerate(ids):
            started = time.perf_counter()
            result = next(self._prepared)
            self.seconds.wait += time.perf_counter() - started
            done += 1
            if isinstance(result, UndecodableImage):
                self.failed[image] = result.reason
            else:
                self._images_BCHW[len(filled)] = torch.from_numpy(result)
                filled.append(slot)
            if len(filled) == len(self._images_BCHW) or slot == len(ids) - 1:
                if filled:
                    self._forward(filled, [ids[s] for s in filled])
                yield done
                filled, done = [], 0

    def _forward(self, slots: list[int], ids: list[str]) -> None:
        """One pass of full size; rows behind `slots` hold earlier images and their tokens are dropped."""
        started = time.perf_counter()
        with torch.inference_mode():
            tokens_BND: Tensor = self._backbone(self._images_BCHW.to(_device(self._backbone)))[: len(slots)]
            peaks_B = tokens_BND.abs().amax(dim=(1, 2)).tolist()
            stored_BND = tokens_BND.to(getattr(torch, self._dtype)).cpu()
        self.seconds.encode += time.perf_counter() - started
        for image, peak in zip(ids, peaks_B, strict=True):
            self._check(image, peak)
        if self._dtype == "bfloat16":
            stored_BND = stored_BND.view(torch.int16)
        self.tokens_SND[slots] = stored_BND.numpy().view(self.tokens_SND.dtype)

    def _check(self, image: str, peak: float) -> None:
        """`peak` is the largest absolute value among the tokens of `image`."""
        if not math.isfinite(peak):
            raise VlmxError(
                f"{self._backbone.name} gives NaN or infinity for an image",
                why=f"image id {image}, weights: {self._backbone.weights_source}",
                fix="check that the weights file is the published one",
            )
        if self._dtype == "float16" and peak > FLOAT16_MAX:
            raise UsageError(
                f"tokens of {self._backbone.name} do not fit into float16",
                why=f"a value of {peak:.3g} for image id {image}, the largest float16 is {FLOAT16_MAX:.0f}",
                fix="give --dtype bfloat16 (or float32)",
            )


def _device(backbone: Backbone) -> torch.device:
    return next(backbone.parameters()).device
