"""How do the images of shards become arrays of tokens, pass by pass?

Legend: B images of one pass, C channels (3), H x W pixels, S images of one shard, N tokens, D token width.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlmx.cache_specs.quantize import Quantization, QuantizationError
from vlmx.cache_specs.spec import STORAGE_DTYPES, DType
from vlmx.console import warn
from vlmx.errors import UsageError, VlmxError
from vlmx.extract.backbones.base import Backbone
from vlmx.extract.batches import too_large
from vlmx.extract.lanes import Encoded, Finish, Lanes
from vlmx.extract.preprocess import UndecodableImage
from vlmx.extract.seconds import Seconds

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlmx.cache_specs.writer import ShardPlan

    Prepared = NDArray[np.float32] | UndecodableImage  # pixels (3, H, W), or what is wrong with the file

FLOAT16_MAX = 65504.0


@dataclass(kw_only=True)
class EncodedShard:
    """One shard, ready to be stored.

    Attributes:
        plan: its index and ids.
        tokens_SND: in storage dtype (bfloat16 as uint16); rows of failed images are zero.
        failed: ids of its undecodable images, and why.
        error: what 8 bits lost on its images; None in caches of more bits.
    """

    plan: ShardPlan
    tokens_SND: NDArray[np.generic]
    failed: dict[str, str]
    error: QuantizationError | None


@dataclass(kw_only=True)
class _Pass:
    """A pass under way.

    Attributes:
        shard: where its tokens go.
        slots: their rows in the shard; none when all its images are undecodable.
        room_BCHW: the buffer of the images; the first `size` go through the encoder.
        size: images of the pass; those behind `slots` are earlier ones, and their tokens are dropped.
        settled: how many images of the shard are done with it, undecodable ones included.
        last: whether it completes the shard.
        finish: waits for the tokens; None when the pass could not begin for want of memory.
    """

    shard: EncodedShard
    slots: list[int]
    room_BCHW: Tensor
    size: int
    settled: int
    last: bool
    finish: Finish | None = None


class ShardEncoder:
    """Encodes shards one after the other, while later images are being prepared and earlier tokens are being stored.

    Args:
        backbone: the frozen encoder.
        prepared: results of `preprocess.prepare` for all images of all shards, in order.
        lanes: where passes run.
        block: images a pass.
        dtype: of the stored tokens.
        seconds: where the time is added up.
        quantization: the scales of 8-bit tokens; None for others.

    Attributes:
        block: images a pass; halved whenever a GPU runs out of memory.
    """

    def __init__(
        self,
        backbone: Backbone,
        prepared: Iterator[Prepared],
        lanes: Lanes,
        *,
        block: int,
        dtype: DType,
        seconds: Seconds,
        quantization: Quantization | None = None,
    ) -> None:
        assert (quantization is not None) == (dtype == "int8")
        self.block = block
        self._backbone = backbone
        self._prepared = prepared
        self._lanes = lanes
        self._dtype = dtype
        self._seconds = seconds
        self._quantization = quantization
        self._rooms = [lanes.room(block) for _ in range(lanes.depth + 1)]  # one is filled while the others are in use
        self._under_way: deque[_Pass] = deque()

    def encode(self, plans: Iterable[ShardPlan]) -> Iterator[tuple[int, EncodedShard | None]]:
        """Yields, for each pass, how many more images are done and the shard that is complete with them, if one is.

        Raises:
            VlmxError: the encoder gave NaN or infinity.
            UsageError: a token does not fit into float16.
            BackendError: a single image is too large for the memory of the GPU.
        """
        for plan in plans:
            for begun in self._passes(plan):
                if len(self._under_way) == self._lanes.depth:
                    yield self._collect()
                self._begin(begun)
                if begun.slots and begun.finish is None:  # out of memory: let the earlier ones give theirs back
                    while self._under_way:
                        yield self._collect()
        while self._under_way:
            yield self._collect()

    def _passes(self, plan: ShardPlan) -> Iterator[_Pass]:
        """The images of one shard in passes, each ready to begin. A pass never straddles two shards."""
        shape = (len(plan.ids), self._backbone.num_tokens, self._backbone.dim)
        shard = EncodedShard(
            plan=plan,
            tokens_SND=np.zeros(shape, STORAGE_DTYPES[self._dtype]),
            failed={},
            error=None if self._quantization is None else QuantizationError(),
        )
        slots: list[int] = []
        settled = 0
        for slot, image in enumerate(plan.ids):
            with self._seconds.waiting("wait_images", self._lanes.idle):
                result = next(self._prepared)
            settled += 1
            if isinstance(result, UndecodableImage):
                shard.failed[image] = result.reason
            else:
                self._rooms[-1][len(slots)] = torch.from_numpy(result)
                slots.append(slot)
            last = slot == len(plan.ids) - 1
            if len(slots) == self.block or last:
                size = self.block if slots else 0
                yield _Pass(
                    shard=shard, slots=slots, room_BCHW=self._rooms.pop(), size=size, settled=settled, last=last
                )
                slots, settled = [], 0

    def _begin(self, begun: _Pass) -> None:
        self._under_way.append(begun)
        if begun.slots and begun.size <= self.block:
            try:
                begun.finish = self._lanes.start(begun.room_BCHW[: begun.size])
            except torch.OutOfMemoryError:
                begun.finish = None

    def _collect(self) -> tuple[int, EncodedShard | None]:
        """Wait for the oldest pass and put its tokens where they belong."""
        ended = self._under_way.popleft()
        if ended.slots:
            self._store(ended, self._finish(ended))
        self._rooms.append(ended.room_BCHW)
        return ended.settled, ended.shard if ended.last else None

    def _finish(self, ended: _Pass) -> Encoded:
        if ended.finish is not None:
            try:
                return ended.finish()
            except torch.OutOfMemoryError:
                pass  # and leave this block: the error holds what the pass had allocated
        return self._in_pieces(ended.room_BCHW[: ended.size])

    def _in_pieces(self, images_BCHW: Tensor) -> Encoded:
        """The same images in smaller passes, after one pass of them ran out of memory."""
        if len(images_BCHW) <= self.block:
            if self.block == 1:
                raise too_large(self._backbone)
            self.block //= 2
            warn(f"out of GPU memory: from here on {self.block} images a pass")
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        pieces: list[Encoded] = []
        left_BCHW = images_BCHW
        while len(left_BCHW):
            size = self.block  # it may be halved again on the way
            pieces.append(self._run(left_BCHW[:size]))
            left_BCHW = left_BCHW[size:]
        return Encoded(
            stored_BND=torch.cat([piece.stored_BND for piece in pieces]),
            peaks_B=torch.cat([piece.peaks_B for piece in pieces]),
            took_s=sum(piece.took_s for piece in pieces),
        )

    def _run(self, images_BCHW: Tensor) -> Encoded:
        try:
            return self._lanes.start(images_BCHW)()
        except torch.OutOfMemoryError:
            pass
        return self._in_pieces(images_BCHW)

    def _store(self, ended: _Pass, encoded: Encoded) -> None:
        self._seconds.add("encode", encoded.took_s)
        shard, count = ended.shard, len(ended.slots)
        for slot, peak in zip(ended.slots, encoded.peaks_B.tolist(), strict=False):
            self._check(shard.plan.ids[slot], peak)
        stored_BND = encoded.stored_BND[:count]
        if self._quantization is not None:
            assert shard.error is not None
            tokens_BND = stored_BND.numpy()
            codes_BND = self._quantization.encode(tokens_BND)
            shard.error += self._quantization.error(tokens_BND, codes_BND)
            shard.tokens_SND[ended.slots] = codes_BND
            return
        if self._dtype == "bfloat16":
            stored_BND = stored_BND.view(torch.int16)
        shard.tokens_SND[ended.slots] = stored_BND.numpy().view(shard.tokens_SND.dtype)

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
