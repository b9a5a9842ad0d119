"""How many images go through the encoder in one pass?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Literal

import torch

from vlmx.console import note
from vlmx.errors import BackendError
from vlmx.extract.backbones.base import Backbone

BatchSize = int | Literal["auto"]

CPU_BLOCK_MAX = 8
CPU_BLOCK_PIXELS = 4 * 224 * 224  # larger passes were not faster, and their memory lies further from the core
GPU_BLOCK_MAX = 256
GPU_BLOCK_PIXELS = 64 * 512 * 512  # bounds the pinned memory of the host: three passes of 200 MB
WORTH_IT = 0.95  # a pass of twice the size must bring the time of an image down to this, or the smaller one is taken


def block_size(backbone: Backbone, batch_size: BatchSize, *, most: int) -> int:
    """How many images go through the encoder in one pass; every pass has this size.

    The last bits of a CPU's matrix products depend on the number of rows, so a CPU takes a size of its own, whatever
    the user's `batch_size`: an image's bytes in the cache depend neither on it nor on how many images there are. Larger
    passes are not faster there.

    Args:
        backbone: on the device where it will run.
        batch_size: for a GPU; "auto" tries sizes out.
        most: the largest size that is of use.

    Raises:
        BackendError: not even one image fits into the memory of the GPU.
    """
    device = next(backbone.parameters()).device
    height, width = backbone.res
    if device.type == "cpu":
        return max(1, min(CPU_BLOCK_MAX, CPU_BLOCK_PIXELS // (height * width)))
    if batch_size != "auto":
        return batch_size
    most = max(1, min(most, GPU_BLOCK_MAX, GPU_BLOCK_PIXELS // (height * width)))
    size = fastest_size(lambda size: _seconds_of_a_pass(backbone, size, device), most=most)
    if size == 0:
        raise too_large(backbone)
    note(f"{size} images a pass, found by trying (--batch-size sets it)")
    return size


def fastest_size(seconds_of: Callable[[int], float], *, most: int) -> int:
    """The smallest of 1, 2, 4, ... that is nearly as fast for each image as any that fits into memory.

    Args:
        seconds_of: seconds that a pass of a size takes; raises torch.OutOfMemoryError when it does not fit.
        most: the largest size to try.

    Returns:
        0 when not even one image fits.
    """
    best, best_s = 0, math.inf
    size = 1
    while size <= most and size <= 4 * max(1, best):  # two doublings that bring nothing end it
        try:
            each_s = seconds_of(size) / size
        except torch.OutOfMemoryError:
            break
        if each_s < WORTH_IT * best_s:
            best, best_s = size, each_s
        size *= 2
    return best


def too_large(backbone: Backbone) -> BackendError:
    """The error when one image alone does not fit."""
    height, width = backbone.res
    return BackendError(
        f"{backbone.name} at {height}x{width} does not fit into the memory of the GPU",
        why="it runs out of memory with a single image a pass",
        fix="see with nvidia-smi what else takes its memory, or give a smaller --res, or --compute bfloat16",
    )


def _seconds_of_a_pass(backbone: Backbone, size: int, device: torch.device) -> float:
    """The second of two passes on a GPU; the first one chooses kernels and takes memory."""
    torch.cuda.empty_cache()  # what smaller passes left behind is of no use to this one
    images_BCHW = torch.zeros(size, 3, *backbone.res, device=device)
    started = 0.0
    with torch.inference_mode():
        for _ in range(2):
            torch.cuda.synchronize(device)
            started = time.perf_counter()
            backbone(images_BCHW)
    torch.cuda.synchronize(device)
    return time.perf_counter() - started
