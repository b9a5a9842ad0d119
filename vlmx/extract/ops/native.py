"""How are the selective scans computed by a C kernel, on as many threads as torch has?

Legend: B images, L sequence length, D channels, G groups of channels that share B and C, N states a channel; H x W
cells of a grid, K the four directions, R rank of the step size, P = R + 2.

`native.c` needs a C compiler and nothing else: no headers of torch or Python. It is compiled at its first use (about a
second), kept (`shared_library`), and called through ctypes, which lets go of Python's lock. It is used only if it
agrees with the torch engine on a small input.
"""

from __future__ import annotations

import ctypes
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmx.extract.ops.engines import Engine, EngineName, Obstacle
from vlmx.extract.ops.shared_library import discard, library_of
from vlmx.extract.ops.torch_scan import ENGINE as TORCH

SOURCE = Path(__file__).with_name("native.c")
MOST_STATES = 64  # as in native.c
_LANES = 16  # as in native.c
_LOG2_E = math.log2(math.e)
_OWN: dict[str, Any] = {
    "dtype": torch.float32,
    "device": torch.device("cpu"),
}  # whatever torch's defaults are at the moment


class _ScanArgs(ctypes.Structure):
    """`scan_args` of native.c."""

    _fields_: ClassVar[list[tuple[str, type]]] = [  # type: ignore[misc]
        *((name, ctypes.c_void_p) for name in ("u", "dt", "B", "C", "gate", "A", "skip", "bias", "y")),
        *((n, ctypes.c_int64) for n in ("images", "length", "channels", "groups", "states", "softplus", "reverse")),
        *((n, ctypes.c_int64) for n in ("u_image", "u_token", "dt_image", "dt_token", "gate_image", "gate_token")),
        *((n, ctypes.c_int64) for n in ("B_image", "B_token", "B_group", "C_image", "C_token", "C_group")),
    ]


class _GridArgs(ctypes.Structure):
    """`grid_args` of native.c."""

    _fields_: ClassVar[list[tuple[str, type]]] = [  # type: ignore[misc]
        *((name, ctypes.c_void_p) for name in ("u", "low", "weight", "bias", "A", "skip", "by_columns", "y")),
        *((name, ctypes.c_int64) for name in ("images", "cells", "channels", "rank")),
    ]


class _ConvArgs(ctypes.Structure):
    """`conv_args` of native.c."""

    _fields_: ClassVar[list[tuple[str, type]]] = [  # type: ignore[misc]
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "y")),
        *((n, ctypes.c_int64) for n in ("images", "length", "channels", "width", "before", "x_image", "x_token")),
    ]


_FUNCTIONS = {"vlmx_scan": _ScanArgs, "vlmx_scan_four_ways": _GridArgs, "vlmx_conv_silu": _ConvArgs}


class NativeEngine(Engine):
    """See `Engine`. CPU only; float64 inputs and more than 64 states a channel go to the torch engine."""

    name: ClassVar[EngineName] = "native"

    def obstacle(self, device: torch.device) -> Obstacle | None:
        if device.type != "cpu":
            return Obstacle(why=f"it runs on the CPU, the device is {device.type}")
        found = _library()
        return found if isinstance(found, Obstacle) else self._miscompiled()

    def scan(
        self,
        u_BLD: Tensor,
        dt_BLD: Tensor,
        A_DN: Tensor,
        B_BLGN: Tensor,
        C_BLGN: Tensor,
        *,
        skip_D: Tensor | None = None,
        bias_D: Tensor | None = None,
        gate_BLD: Tensor | None = None,
        softplus: bool = True,
        reverse: bool = False,
    ) -> Tensor:
        dtype = u_BLD.dtype
        (batch, length, channels), (groups, states) = u_BLD.shape, B_BLGN.shape[2:]
        if dtype == torch.float64 or states > MOST_STATES:
            return TORCH.scan(
                u_BLD,
                dt_BLD,
                A_DN,
                B_BLGN,
                C_BLGN,
                skip_D=skip_D,
                bias_D=bias_D,
                gate_BLD=gate_BLD,
                softplus=softplus,
                reverse=reverse,
            )
        u_BLD, dt_BLD, B_BLGN, C_BLGN = (_lined_up(x) for x in (u_BLD, dt_BLD, B_BLGN, C_BLGN))
        gate = None if gate_BLD is None else _lined_up(gate_BLD)
        skip, bias = (None if x is None else x.float().contiguous() for x in (skip_D, bias_D))
        A_ND = (A_DN.float() * _LOG2_E).T.contiguous()
        y_BLD = torch.empty(batch, length, channels, **_OWN)
        pointers = [_address(x) for x in (u_BLD, dt_BLD, B_BLGN, C_BLGN, gate, A_ND, skip, bias, y_BLD)]
        sizes = [batch, length, channels, groups, states, int(softplus), int(reverse)]
        gate_strides = (0, 0) if gate is None else gate.stride()[:2]
        strides = [*u_BLD.stride()[:2], *dt_BLD.stride()[:2], *gate_strides, *B_BLGN.stride()[:3], *C_BLGN.stride()[:3]]
        blocks = -(-(channels // groups) // _LANES) * groups
        _run("vlmx_scan", _ScanArgs(*pointers, *sizes, *strides), batch * blocks)
        return y_BLD.to(dtype)

    def scan_four_ways(
        self,
        u_BHWD: Tensor,
        low_BHWKP: Tensor,
        dt_weight_KDR: Tensor,
        dt_bias_KD: Tensor,
        A_KD: Tensor,
        skip_D: Tensor,
    ) -> Tensor:
        if u_BHWD.dtype == torch.float64:
            return TORCH.scan_four_ways(u_BHWD, low_BHWKP, dt_weight_KDR, dt_bias_KD, A_KD, skip_D)
        batch, rows, columns, channels = u_BHWD.shape
        inputs = [u_BHWD, low_BHWKP, dt_weight_KDR.transpose(1, 2), dt_bias_KD, A_KD.float() * _LOG2_E, skip_D]
        dense = [x.float().contiguous() for x in inputs]
        y_BHWD = torch.empty(batch, rows, columns, channels, **_OWN)
        cells = torch.arange(rows * columns, dtype=torch.int32, device=_OWN["device"])
        by_columns = cells.view(rows, columns).T.contiguous()
        pointers = [_address(x) for x in (*dense, by_columns, y_BHWD)]
        blocks = -(-channels // _LANES)
        sizes = [batch, rows * columns, channels, dt_weight_KDR.shape[2]]
        _run("vlmx_scan_four_ways", _GridArgs(*pointers, *sizes), batch * blocks)
        return y_BHWD

    def conv_silu(self, x_BLD: Tensor, weight_DJ: Tensor, bias_D: Tensor | None, *, before: int) -> Tensor:
        if x_BLD.dtype == torch.float64:
            return super().conv_silu(x_BLD, weight_DJ, bias_D, before=before)
        dtype = x_BLD.dtype
        x_BLD = _lined_up(x_BLD)
        weight_JD = weight_DJ.float().T.contiguous()
        bias = None if bias_D is None else bias_D.float().contiguous()
        y_BLD = torch.empty(x_BLD.shape, **_OWN)
        pointers = [_address(x) for x in (x_BLD, weight_JD, bias, y_BLD)]
        args = _ConvArgs(*pointers, *x_BLD.shape, weight_DJ.shape[1], before, *x_BLD.stride()[:2])
        _run("vlmx_conv_silu", args, len(x_BLD) * -(-x_BLD.shape[2] // _LANES))
        return y_BLD.to(dtype)

    @cache  # noqa: B019  (there is one engine)
    def _miscompiled(self) -> Obstacle | None:
        """Compare with the torch engine once: every branch of the kernel, on a few hundred numbers."""
        g = torch.Generator("cpu").manual_seed(0)
        options: Any = {"generator": g, **_OWN}
        worst = 0.0
        with torch.inference_mode():
            for states, reverse in ((1, False), (3, True), (8, False), (16, True)):
                u, dt, gate = (torch.randn(2, 6, 40, **options) for _ in range(3))
                B, C = (torch.randn(2, 6, 2, states, **options) for _ in range(2))
                args = (u, dt, -torch.rand(40, states, **options), B, C)
                skip, bias = torch.randn(2, 40, **options)
                theirs, ours = (
                    e.scan(*args, skip_D=skip, bias_D=bias, gate_BLD=gate, reverse=reverse) for e in (TORCH, self)
                )
                worst = max(worst, _difference(ours, theirs))
            grid = (torch.randn(2, 3, 5, 24, **options), torch.randn(2, 3, 5, 4, 5, **options))
            weights = (torch.randn(4, 24, 3, **options), torch.randn(4, 24, **options))
            rates_skip = (-torch.rand(4, 24, **options), torch.randn(24, **options))
            theirs, ours = (e.scan_four_ways(*grid, *weights, *rates_skip) for e in (TORCH, self))
            worst = max(worst, _difference(ours, theirs))
            x, kernel, bias = (torch.randn(*shape, **options) for shape in ((2, 6, 40), (40, 4), (40,)))
            theirs, ours = (e.conv_silu(x, kernel, bias, before=3) for e in (TORCH, self))
            worst = max(worst, _difference(ours, theirs))
        if worst <= 1e-4:
            return None
        library = _library()
        assert isinstance(library, ctypes.CDLL)
        discard(library)
        return Obstacle(why=f"the compiled kernel is off by {worst:.1e} standard deviations", fix="apt install gcc")


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference in standard deviations; infinite if it is NaN."""
    found = float((ours - theirs).abs().max() / theirs.std())
    return math.inf if math.isnan(found) else found


def _lined_up(x: Tensor) -> Tensor:
    """Float32, with neighbours in the last axis beside each other in memory."""
    x = x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _run(function: str, args: ctypes.Structure, tasks: int) -> None:
    """Call a function of the library for all tasks, shared between as many threads as torch has."""
    library = _library()
    assert isinstance(library, ctypes.CDLL), library
    call: Any = getattr(library, function)
    threads = torch.get_num_threads()
    shares = max(1, min(threads, tasks))
    edges = [tasks * i // shares for i in range(shares + 1)]
    others = [_pool(os.getpid(), threads).submit(call, ctypes.byref(args), *edges[i : i + 2]) for i in range(1, shares)]
    call(ctypes.byref(args), *edges[:2])
    for other in others:
        other.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: those of a parent do not live on in a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="vlmx-scan")


@cache
def _library() -> ctypes.CDLL | Obstacle:
    """The compiled kernel, or why there is none."""
    library = library_of(SOURCE)
    if isinstance(library, Obstacle):
        return library
    for name, args in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes = [ctypes.POINTER(args), ctypes.c_int64, ctypes.c_int64]
        function.restype = None
    return library


ENGINE = NativeEngine()
