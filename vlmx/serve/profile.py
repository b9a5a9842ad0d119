"""What does an image cost on this machine, where in the encoder does the time go, and how does it grow with the size?

Legend: B images, H x W pixels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from vlmx.console import note
from vlmx.extract.backbones import catalogue
from vlmx.extract.backbones.base import Backbone, build_backbone
from vlmx.extract.batches import block_size
from vlmx.extract.ops import engines
from vlmx.extract.ops.engines import Engine, EngineName
from vlmx.extract.scans import scan_choice

GPU_IMAGES_MAX = 64
PASSES_MAX = 20
ONEDNN_LINEAR = "_linear_pointwise"  # what `ops.dense.linear` calls on a CPU, perhaps with a GELU after the product
PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "matmul",
    "linear",
    ONEDNN_LINEAR,
    "convolution",
    "conv1d",
    "conv2d",
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


@dataclass(frozen=True, kw_only=True)
class EncoderCost:
    """What one encoder costs at one size with one engine.

    Attributes:
        backbone: its name; its weights are random, which changes no time.
        height, width: of the images.
        tokens: of one image.
        engine: of its scans; "none" when it has none.
        images_per_pass: how many images were encoded at once.
        passes: how many passes were timed; the figures are medians of them.
        image_s: seconds an image. On a CPU, processor time of one thread, which other programs do not disturb.
        scan_share: share of a pass that its scans take.
        products_s: seconds an image of its matrix products, convolutions and attention alone, with the same shapes.
    """

    backbone: str
    height: int
    width: int
    tokens: int
    engine: EngineName | str
    images_per_pass: int
    passes: int
    image_s: float
    scan_share: float
    products_s: float

    @property
    def over_products(self) -> float:
        """Time of a forward pass / time of its matrix products, convolutions and attention alone."""
        return self.image_s / self.products_s


def profile_encoders(
    names: Sequence[str],
    sizes: Sequence[tuple[int, int] | None],
    *,
    dtype: torch.dtype,
    device: torch.device,
    budget_s: float,
) -> list[EncoderCost]:
    """Measure each backbone at each size with each engine that can run there, or with the forced one alone.

    Args:
        names: backbones.
        sizes: (height, width) in pixels; None for the backbone's own.
        dtype: in which they compute.
        device: where they run.
        budget_s: how long passes are repeated for one figure; one pass is always made.

    Raises:
        UnknownNameError: no such backbone.
        UsageError: a backbone cannot take a size.
        BackendError: the forced engine cannot run, or one image is too large for the memory of the GPU.
    """
    costs: list[EncoderCost] = []
    forced = engines.forced()
    threads = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        for size in sizes:
            for name in names:
                res = size or catalogue.row(name).native_res
                backbone = build_backbone(name, res=res, weights="random:0", dtype=dtype, device=device)
                scan = scan_choice(backbone)
                best: EngineName | None = scan.engine if scan else None
                costs.append(_measure(backbone, best, device, budget_s))
                if best is not None and forced is None:
                    for other, obstacle in engines.engines_report(device):
                        if other != best and obstacle is None:
                            engines.force(other, device)
                            costs.append(_measure(backbone, other, device, budget_s, known=costs[-1].products_s))
                            engines.force(None)
    finally:
        engines.force(forced)
        torch.set_num_threads(threads)
    return costs


def _measure(
    backbone: Backbone,
    engine: EngineName | None,
    device: torch.device,
    budget_s: float,
    *,
    known: float | None = None,
) -> EncoderCost:
    """Time passes and, in turn with them, their products alone; `known` seconds an image if those were timed before."""
    height, width = backbone.res
    block = block_size(backbone, "auto", most=GPU_IMAGES_MAX)
    label = f"{backbone.name} at {height}x{width}" + (f", engine {engine}" if engine else "")
    note(f"measuring {label}")
    images_BCHW = torch.rand(block, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    clock = _clock(device)
    forward: list[float] = []
    products: list[float] = []
    scans: list[float] = []
    with torch.inference_mode():
        with _Recorder(backbone) as recorder:
            backbone(images_BCHW)
        replay = recorder.replay()
        began = time.perf_counter()
        while not forward or (len(forward) < PASSES_MAX and time.perf_counter() - began < budget_s):
            with _timed_scans(engines.engine(engine) if engine else None, clock) as spent:
                started = clock()
                backbone(images_BCHW)
                forward.append(clock() - started)
            scans.append(sum(spent))
            if known is None:
                started = clock()
                replay()
                products.append(clock() - started)
    image_s = statistics.median(forward) / block
    return EncoderCost(
        backbone=backbone.name,
        height=height,
        width=width,
        tokens=backbone.num_tokens,
        engine=engine or "none",
        images_per_pass=block,
        passes=len(forward),
        image_s=image_s,
        scan_share=statistics.median(scan / total for scan, total in zip(scans, forward, strict=True)),
        products_s=known if known is not None else statistics.median(products) / block,
    )


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds: of this thread on a CPU, of the wall on a GPU, after everything that it was given."""
    if device.type == "cpu":
        return time.thread_time

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


@contextmanager
def _timed_scans(engine: Engine | None, clock: Callable[[], float]) -> Iterator[list[float]]:
    """While the block runs, the seconds of every scan of the engine are appended to the list."""
    spent: list[float] = []

    def timed(scan: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            started = clock()
            y = scan(*args, **kwargs)
            spent.append(clock() - started)
            return y

        return run

    if engine is None:
        yield spent
        return
    own = vars(engine)  # what is set there goes before the methods of its class
    own.update(scan=timed(engine.scan), scan_four_ways=timed(engine.scan_four_ways))
    try:
        yield spent
    finally:
        del own["scan"], own["scan_four_ways"]


class _Recorder(TorchDispatchMode):
    """Remembers the matrix products, convolutions and attentions of what runs in its block, by shape."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._kept = {parameter.data_ptr() for parameter in module.parameters()}
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        self._stand_ins: dict[tuple[Any, ...], Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            alone = (*args[:3], "none", [], "") if name == ONEDNN_LINEAR else args  # the product without the GELU
            self._calls.append((func, *tree_map_only(Tensor, self._stand_in, (alone, kwargs))))
        return func(*args, **kwargs)

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """A parameter itself, or its packed form; else a tensor of the same shape and strides, one for all alike."""
        if tensor.layout != torch.strided or tensor.data_ptr() in self._kept:
            return tensor
        look = (tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if look not in self._stand_ins:
            room = torch.empty_strided(*look[:2], dtype=look[2], device=tensor.device)
            self._stand_ins[look] = room.fill_(0.01)
        return self._stand_ins[look]

    def replay(self) -> Callable[[], None]:
        """The same calls, in order, alone."""

        def run() -> None:
            for func, args, kwargs in self._calls:
                func(*args, **kwargs)

        return run
