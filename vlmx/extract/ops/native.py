"""How does the C kernel of the selective scans come to a machine: compiled once, checked, kept, and called by threads?

Legend: B images, L sequence length, D channels, G groups of channels that share B and C, N states a channel; H x W
cells of a grid, K the four directions, R rank of the step size, P = R + 2.

`native.c` needs a C compiler and nothing else: no headers of torch or Python. It is compiled at its first use (about a
second) into $XDG_CACHE_HOME/vlmx/native, under a name made of all that it depends on, and called through ctypes, which
lets go of Python's lock. It is used only if it agrees with the torch engine on a small input.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmx.extract.ops.engines import Engine, EngineName, Obstacle
from vlmx.extract.ops.torch_scan import ENGINE as TORCH

SOURCE = Path(__file__).with_name("native.c")
MOST_STATES = 64  # as in native.c
_LANES = 16  # as in native.c
_LOG2_E = math.log2(math.e)
_FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-fPIC", "-shared")


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
        y_BLD = torch.empty(batch, length, channels)
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
        y_BHWD = torch.empty(batch, rows, columns, channels)
        by_columns = torch.arange(rows * columns, dtype=torch.int32).view(rows, columns).T.contiguous()
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
        y_BLD = torch.empty(x_BLD.shape)
        pointers = [_address(x) for x in (x_BLD, weight_JD, bias, y_BLD)]
        args = _ConvArgs(*pointers, *x_BLD.shape, weight_DJ.shape[1], before, *x_BLD.stride()[:2])
        _run("vlmx_conv_silu", args, len(x_BLD) * -(-x_BLD.shape[2] // _LANES))
        return y_BLD.to(dtype)

    @cache  # noqa: B019  (there is one engine)
    def _miscompiled(self) -> Obstacle | None:
        """Compare with the torch engine once: every branch of the kernel, on a few hundred numbers."""
        g = torch.Generator().manual_seed(0)
        worst = 0.0
        with torch.inference_mode():
            for states, reverse in ((1, False), (3, True), (8, False), (16, True)):
                u, dt, gate = (torch.randn(2, 6, 40, generator=g) for _ in range(3))
                B, C = (torch.randn(2, 6, 2, states, generator=g) for _ in range(2))
                args = (u, dt, -torch.rand(40, states, generator=g), B, C)
                skip, bias = torch.randn(2, 40, generator=g)
                theirs, ours = (
                    e.scan(*args, skip_D=skip, bias_D=bias, gate_BLD=gate, reverse=reverse) for e in (TORCH, self)
                )
                worst = max(worst, _difference(ours, theirs))
            grid = (torch.randn(2, 3, 5, 24, generator=g), torch.randn(2, 3, 5, 4, 5, generator=g))
            weights = (torch.randn(4, 24, 3, generator=g), torch.randn(4, 24, generator=g))
            rates_skip = (-torch.rand(4, 24, generator=g), torch.randn(24, generator=g))
            theirs, ours = (e.scan_four_ways(*grid, *weights, *rates_skip) for e in (TORCH, self))
            worst = max(worst, _difference(ours, theirs))
            x, kernel, bias = (torch.randn(*shape, generator=g) for shape in ((2, 6, 40), (40, 4), (40,)))
            theirs, ours = (e.conv_silu(x, kernel, bias, before=3) for e in (TORCH, self))
            worst = max(worst, _difference(ours, theirs))
        if worst <= 1e-4:
            return None
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
    """The compiled and checked kernel, or why there is none."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        return Obstacle(why="no C compiler (cc, gcc or clang) is on the PATH", fix="apt install gcc")
    try:
        library = ctypes.CDLL(str(compiled(compiler)))
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", None) or str(error)
        return Obstacle(why=f"{compiler} cannot compile it: {said.strip().splitlines()[-1]}", fix="apt install gcc")
    except OSError as error:
        fix = "export XDG_CACHE_HOME=/a/folder/that/can/be/written/and/executed"
        return Obstacle(why=f"it cannot be built or loaded: {error}", fix=fix)
    for name, args in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes = [ctypes.POINTER(args), ctypes.c_int64, ctypes.c_int64]
        function.restype = None
    return library


def compiled(compiler: str) -> Path:
    """The shared library: from the cache, or compiled now. Several processes may do this at once.

    Raises:
        subprocess.SubprocessError: the compiler refuses.
        OSError: the cache cannot be written.
    """
    target = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    version = _output_of([compiler, "--version"])
    parts: Sequence[str | bytes] = (SOURCE.read_bytes(), version, *_FLAGS, target, _cpu())
    key = hashlib.sha256(b"\0".join(p.encode() if isinstance(p, str) else p for p in parts)).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    library = Path(root) / "vlmx" / "native" / key / "scan.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(suffix=".so", dir=library.parent)
        os.close(handle)
        try:
            _output_of([compiler, *_FLAGS, target, "-o", unfinished, str(SOURCE)])
            os.replace(unfinished, library)
        finally:
            Path(unfinished).unlink(missing_ok=True)
    return library


def _output_of(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def _cpu() -> str:
    """What -march=native depends on: machine code for one CPU may be illegal on another that shares the home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        return f"{platform.machine()} {platform.processor()} {platform.version()}"
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


ENGINE = NativeEngine()
