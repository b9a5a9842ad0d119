"""Where do tokens go when they are read: memory to which copies are fast, from the disk and to a GPU?

Copies to a place a few bytes behind that of their source, modulo 4096, are up to ten times slower on some processors
(measured on AMD's Zen 5: 2 instead of 20 GB/s), and numpy's own large arrays begin 16 bytes behind a page. So buffers
begin at a page here.
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An uninitialised array that begins at a page of memory."""
    length = math.prod(shape) * dtype.itemsize
    room_F = np.empty(length + mmap.PAGESIZE, dtype=np.uint8)
    start = -room_F.ctypes.data % mmap.PAGESIZE
    return room_F[start : start + length].view(dtype).reshape(shape)


def pinned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An uninitialised array in memory that a GPU copies from by itself (page-locked; it begins at a page, too).

    Raises:
        RuntimeError: CUDA is not usable here.
    """
    import torch

    room_F = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, pin_memory=True)
    flat: NDArray[Any] = room_F.numpy()
    return flat.view(dtype).reshape(shape)
