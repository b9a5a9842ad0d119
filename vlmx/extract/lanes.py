"""Where do passes of the encoder run: side by side on CPU cores, or on a GPU with the copies beside them?

Legend: B images of one pass, C channels (3), H x W pixels, N tokens, D token width.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from vlmx.cache_specs.spec import DType
from vlmx.extract.backbones.base import Backbone

CPU_LANES_MAX = 32  # a pass of VMamba-T holds Python's lock for up to 18 of its 500 ms; more lanes would wait for it


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What a pass gave, in host memory.

    Attributes:
        stored_BND: tokens in the dtype that is stored.
        peaks_B: the largest absolute value among the tokens of each image, before they were converted.
        took_s: seconds of the encoder.
    """

    stored_BND: Tensor
    peaks_B: Tensor
    took_s: float


Finish = Callable[[], Encoded]


class Lanes(ABC):
    """Runs passes, several at a time; a context manager.

    Attributes:
        count: passes that compute side by side.
        depth: passes that should be under way so that none of the lanes waits for the next one.
    """

    count: int
    depth: int

    @abstractmethod
    def room(self, block: int) -> Tensor:
        """Host memory (B, 3, H, W) for the images of a pass, zeros."""

    @abstractmethod
    def start(self, images_BCHW: Tensor) -> Finish:
        """Begin a pass; what is returned waits for its end. The images must not change before that.

        Raises:
            torch.OutOfMemoryError: from here or from what is returned; nothing of the pass is kept.
        """

    @abstractmethod
    def idle(self) -> float:
        """How many lanes have nothing to do now."""

    def __enter__(self) -> Lanes:
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the passes under way end, drop those that wait."""


class CpuLanes(Lanes):
    """Every pass runs on one thread, and as many run side by side as torch was given threads.

    Passes do not wait for each other, while threads that share one matrix product meet after each: beside other work
    on the same cores that is several times slower. And the tokens cannot depend on how many cores there are.

    Args:
        backbone: on the CPU.
        dtype: of the stored tokens.
    """

    def __init__(self, backbone: Backbone, dtype: torch.dtype) -> None:
        self._backbone = backbone
        self._dtype = dtype
        self._threads_before = torch.get_num_threads()
        self.count = min(self._threads_before, CPU_LANES_MAX)
        self.depth = self.count + 1
        self._under_way: list[Future[Encoded]] = []

    def __enter__(self) -> CpuLanes:
        torch.set_num_threads(1)  # here, for threads that start later, and below for those that have started
        self._pool = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._threads_before)

    def room(self, block: int) -> Tensor:
        return torch.zeros(block, 3, *self._backbone.res, dtype=torch.float32, device="cpu")

    def start(self, images_BCHW: Tensor) -> Finish:
        future = self._pool.submit(self._encode, images_BCHW)
        self._under_way = [earlier for earlier in self._under_way if not earlier.done()] + [future]
        return future.result

    def idle(self) -> float:
        return max(0, self.count - sum(not future.done() for future in self._under_way))

    def _encode(self, images_BCHW: Tensor) -> Encoded:
        started = time.perf_counter()
        with torch.inference_mode():
            tokens_BND = self._backbone(images_BCHW)
            peaks_B = tokens_BND.abs().amax(dim=(1, 2)).float()
            stored_BND = tokens_BND.to(self._dtype)
        return Encoded(stored_BND=stored_BND, peaks_B=peaks_B, took_s=time.perf_counter() - started)


class CudaLane(Lanes):
    """One pass computes while the images of the next are copied in and the tokens of the last are copied out.

    Host memory is pinned and each direction has its own stream. Images and weights of convolutions lie channels-last.

    Args:
        backbone: on a GPU; the memory layout of its convolutions is changed.
        dtype: of the stored tokens.
    """

    count = 1
    depth = 2

    def __init__(self, backbone: Backbone, dtype: torch.dtype) -> None:
        self._backbone = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._dtype = dtype
        self._device = next(backbone.parameters()).device
        self._into = torch.cuda.Stream(self._device)
        self._out_of = torch.cuda.Stream(self._device)
        self._last: torch.cuda.Event | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.cuda.synchronize(self._device)  # the copies under way use memory that is given back now

    def room(self, block: int) -> Tensor:
        return torch.zeros(block, 3, *self._backbone.res, dtype=torch.float32, device="cpu", pin_memory=True)

    def start(self, images_BCHW: Tensor) -> Finish:
        computing = torch.cuda.current_stream(self._device)
        began, ended, arrived = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        with torch.inference_mode():
            with torch.cuda.stream(self._into):
                copied_BCHW = images_BCHW.to(self._device, non_blocking=True)
            computing.wait_stream(self._into)
            copied_BCHW.record_stream(computing)
            began.record(computing)
            tokens_BND = self._backbone(copied_BCHW.contiguous(memory_format=torch.channels_last))
            peaks_B = tokens_BND.abs().amax(dim=(1, 2)).float()
            stored_BND = tokens_BND.to(self._dtype).contiguous()
            ended.record(computing)
            self._out_of.wait_stream(computing)
            with torch.cuda.stream(self._out_of):
                host_BND = torch.empty(stored_BND.shape, dtype=self._dtype, pin_memory=True)
                host_B = torch.empty(peaks_B.shape, dtype=torch.float32, pin_memory=True)
                host_BND.copy_(stored_BND, non_blocking=True)
                host_B.copy_(peaks_B, non_blocking=True)
            stored_BND.record_stream(self._out_of)
            peaks_B.record_stream(self._out_of)
            arrived.record(self._out_of)
        self._last = ended

        def finish() -> Encoded:
            arrived.synchronize()
            return Encoded(stored_BND=host_BND, peaks_B=host_B, took_s=began.elapsed_time(ended) / 1000)

        return finish

    def idle(self) -> float:
        return 1.0 if self._last is None or self._last.query() else 0.0


def lanes_for(backbone: Backbone, stored: DType) -> Lanes:
    """The lanes of the device on which the backbone is.

    Args:
        backbone: the frozen encoder.
        stored: dtype of the stored tokens; those that become 8 bits come as float32.
    """
    dtype: torch.dtype = torch.float32 if stored == "int8" else getattr(torch, stored)
    on_gpu = next(backbone.parameters()).device.type == "cuda"
    return CudaLane(backbone, dtype) if on_gpu else CpuLanes(backbone, dtype)
