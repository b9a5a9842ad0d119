"""How are the scans computed on a GPU by our own kernels, which need nothing that CUDA builds of torch lack?

Legend: B images, L sequence length, D channels, G groups of channels that share B and C, N states a channel; H x W
cells of a grid, K the four directions, R rank of the step size, P = R + 2; S segments of a path.

How a GPU is filled (the kernels are in `triton_kernels`). A program of the four-way scan is two warps and walks one
path for 32 channels of an image. Compiled for an H100 in bf16 it takes about 165 registers a thread, so that six
programs fit on each of the 132 multiprocessors, and about 80 instructions a cell, channel and direction. VMamba-S at
512 x 512 has 24, 48 and 96 programs an image in stages 1 to 3: a batch of 8 makes 192, 384 and 768, which occupy every
multiprocessor without cutting a path, except in stage 1. Where there are fewer than two programs a multiprocessor,
paths are cut in as many segments as make four. Each segment is then walked twice, once to learn what it does to a state
and once for the outputs: twice the arithmetic, for which a single image in stage 1, 24 programs of 512 tiles, gets 22
times the warps.

Tiles are fixed by a small table, not tuned at first use: a kernel variant compiles once for a device, in seconds, and
triton keeps it on disk.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from vlmx.console import note, warn
from vlmx.extract.ops.engines import Engine, EngineName, Obstacle, engine
from vlmx.extract.ops.shared_library import kept_folders

_FULL = 2  # programs a multiprocessor from which on paths are not cut
_WANTED = 4  # programs a multiprocessor that cut paths make
_PARTIAL_BYTES = 2**30  # at most this much for the outputs of the four directions, before they are summed
_CHECK_TIMEOUT_S = 600


class TritonEngine(Engine):
    """See `Engine`. Float64 inputs are the torch engine's.

    The kernels are checked once on each kind of device, in a process of their own, before they are first used. Should a
    variant that the check did not need fail to compile later, that is announced and the torch engine takes over.
    """

    name: ClassVar[EngineName] = "triton"

    def __init__(self) -> None:
        self._failed: Obstacle | None = None

    def obstacle(self, device: torch.device) -> Obstacle | None:
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return Obstacle(why="it needs an NVIDIA GPU")
        if importlib.util.find_spec("triton") is None:
            return Obstacle(why="triton is not installed; CUDA builds of torch bring it", fix="pip install triton")
        try:
            if _interpreted():
                return self._failed
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            return Obstacle(why=f"triton does not import: {error}", fix="pip install --force-reinstall triton")
        if not torch.cuda.is_available():
            return Obstacle(why="no GPU answers, or torch is built without CUDA", fix="nvidia-smi")
        if torch.cuda.get_device_capability(device) < (8, 0):
            return Obstacle(why=f"{torch.cuda.get_device_name(device)} is older than Ampere (compute capability 8.0)")
        return self._failed or _kernel_fault(torch.cuda.current_device() if device.index is None else device.index)

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
        def by(compute: Callable[..., Tensor]) -> Tensor:
            return compute(
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

        return self._guarded(u_BLD, by, launch_tokens, engine("torch").scan)

    def scan_four_ways(
        self,
        u_BHWD: Tensor,
        low_BHWKP: Tensor,
        dt_weight_KDR: Tensor,
        dt_bias_KD: Tensor,
        A_KD: Tensor,
        skip_D: Tensor,
    ) -> Tensor:
        def by(compute: Callable[..., Tensor]) -> Tensor:
            return compute(u_BHWD, low_BHWKP, dt_weight_KDR, dt_bias_KD, A_KD, skip_D)

        return self._guarded(u_BHWD, by, launch_four_ways, engine("torch").scan_four_ways)

    def _guarded(
        self,
        u: Tensor,
        by: Callable[[Callable[..., Tensor]], Tensor],
        launch: Callable[..., Tensor],
        instead: Callable[..., Tensor],
    ) -> Tensor:
        if u.dtype == torch.float64 or self._failed is not None:
            return by(instead)
        if _interpreted():
            return by(launch)  # a test wants to see errors
        from triton.errors import TritonError  # type: ignore[import-not-found, import-untyped]

        try:
            with torch.cuda.device_of(u):  # triton launches on the current device
                return by(launch)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # not for want of a kernel: whoever chose the batch size handles the first, nothing the second
        except (TritonError, RuntimeError) as error:
            self._failed = Obstacle(why=f"a kernel does not compile here: {_reason(str(error))}")
            warn(f"triton scan: {self._failed.why}; the torch engine computes instead")
            return by(instead)


def launch_tokens(
    u_BLD: Tensor,
    dt_BLD: Tensor,
    A_DN: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    *,
    skip_D: Tensor | None,
    bias_D: Tensor | None,
    gate_BLD: Tensor | None,
    softplus: bool,
    reverse: bool,
) -> Tensor:
    """`Engine.scan` by `tokens_kernel`, whatever the dtypes; float64 is computed in float32."""
    from vlmx.extract.ops import triton_kernels

    batch, length, channels = u_BLD.shape
    groups, states = B_BLGN.shape[2:]
    group_channels = channels // groups
    lanes = _power_of_two(states)
    steps, block = _token_tile(lanes, group_channels)
    blocks = groups * -(-group_channels // block)
    segments = _segments(blocks * batch, -(-length // steps), u_BLD.device)
    y_BLD = torch.empty((batch, length, channels), dtype=u_BLD.dtype, device=u_BLD.device)
    factor, addend = _segment_ends((batch, segments, channels, states), u_BLD.device)

    def launch(*, finish: bool) -> None:
        triton_kernels.tokens_kernel[(blocks, segments, batch)](
            u_BLD,
            dt_BLD,
            _vector(A_DN),
            B_BLGN,
            C_BLGN,
            u_BLD if skip_D is None else _vector(skip_D),  # a pointer that is not followed
            u_BLD if bias_D is None else _vector(bias_D),
            u_BLD if gate_BLD is None else gate_BLD,
            y_BLD,
            factor,
            addend,
            length,
            channels,
            group_channels,
            states,
            segments,
            *u_BLD.stride(),
            *dt_BLD.stride(),
            *B_BLGN.stride(),
            *C_BLGN.stride(),
            *(u_BLD if gate_BLD is None else gate_BLD).stride(),
            HAS_SKIP=skip_D is not None,
            HAS_BIAS=bias_D is not None,
            HAS_GATE=gate_BLD is not None,
            SOFTPLUS=softplus,
            REVERSE=reverse,
            FINISH=finish,
            T=steps,
            D=block,
            N=lanes,
            num_warps=4,
            enable_fp_fusion=True,
        )

    if segments > 1:
        launch(finish=False)
    launch(finish=True)
    return y_BLD


def launch_four_ways(
    u_BHWD: Tensor, low_BHWKP: Tensor, dt_weight_KDR: Tensor, dt_bias_KD: Tensor, A_KD: Tensor, skip_D: Tensor
) -> Tensor:
    """`Engine.scan_four_ways` by `four_ways_kernel`, whatever the dtypes; float64 is computed in float32.

    The directions are summed from float32 outputs of their own; a batch whose outputs would exceed a gigabyte is split.
    """
    batch = u_BHWD.shape[0]
    at_once = max(1, _PARTIAL_BYTES // (4 * 4 * u_BHWD[0].numel()))
    if batch > at_once:
        pieces = zip(u_BHWD.split(at_once), low_BHWKP.split(at_once), strict=True)
        return torch.cat([launch_four_ways(u, low, dt_weight_KDR, dt_bias_KD, A_KD, skip_D) for u, low in pieces])

    from vlmx.extract.ops import triton_kernels

    _, rows, columns, channels = u_BHWD.shape
    rank = dt_weight_KDR.shape[2]
    # the kernel multiplies these two with each other, for which the interpreter takes bf16 as integers
    if low_BHWKP.dtype != dt_weight_KDR.dtype or not (low_BHWKP.is_cuda or low_BHWKP.dtype == torch.float16):
        low_BHWKP, dt_weight_KDR = low_BHWKP.float(), dt_weight_KDR.float()
    u_BHWD, low_BHWKP, dt_weight_KDR = u_BHWD.contiguous(), low_BHWKP.contiguous(), dt_weight_KDR.contiguous()
    steps, block, warps = _grid_tile(max(rows, columns))
    tiles = min(rows * -(-columns // steps), columns * -(-rows // steps))
    blocks = -(-channels // block)
    segments = _segments(blocks * 4 * batch, tiles, u_BHWD.device)
    y_KBHWD = torch.empty((4, *u_BHWD.shape), dtype=torch.float32, device=u_BHWD.device)
    factor, addend = _segment_ends((batch, 4, segments, channels), u_BHWD.device)

    def launch(*, finish: bool) -> None:
        triton_kernels.four_ways_kernel[(blocks, segments, 4 * batch)](
            u_BHWD,
            low_BHWKP,
            dt_weight_KDR,
            _vector(dt_bias_KD),
            _vector(A_KD),
            _vector(skip_D),
            y_KBHWD,
            factor,
            addend,
            batch,
            rows,
            columns,
            channels,
            rank,
            segments,
            FINISH=finish,
            T=steps,
            D=block,
            R=max(16, _power_of_two(rank)),  # the smallest that a matrix product takes
            num_warps=warps,
            enable_fp_fusion=True,
        )

    if segments > 1:
        launch(finish=False)
    launch(finish=True)
    return y_KBHWD.sum(0)


def _token_tile(lanes: int, group_channels: int) -> tuple[int, int]:
    """Steps and channels of a tile: 4096 states (2048 if one a channel), 16 to 32 a thread of four warps."""
    block = min(16 if lanes > 1 else 64, max(1, _power_of_two(group_channels)))
    return (32, block) if lanes <= 8 else (max(4, 256 // lanes), block)


def _grid_tile(longest_run: int) -> tuple[int, int, int]:
    """Steps, channels and warps of a tile; a tile does not go past the end of a row or column."""
    return (16, 32, 1) if longest_run <= 16 else (32, 32, 2)


def _segments(programs: int, tiles: int, device: torch.device) -> int:
    """In how many segments each path is cut, when uncut paths make so many programs of so many tiles."""
    processors = _processors(device)
    return 1 if programs >= _FULL * processors else min(tiles, -(-_WANTED * processors // programs))


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter runs one program after the other; two make it exercise both ways to walk a path
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _segment_ends(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    factor, addend = torch.empty((2, *shape), dtype=torch.float32, device=device)
    return factor, addend


def _vector(parameter: Tensor) -> Tensor:
    return parameter.float().contiguous()


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@functools.cache
def _interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 runs kernels on the CPU, for tests. Triton is imported where it may be used, only."""
    if "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
        return False
    from vlmx.extract.ops import triton_kernels

    return bool(triton_kernels.INTERPRETED)


@functools.cache
def _kernel_fault(device_index: int) -> Obstacle | None:
    """What is wrong with the kernels on a GPU. A passed check is remembered on disk, a failed one in this process."""
    passed = _passed_file(torch.cuda.get_device_name(device_index))
    if passed.exists():
        return None
    note("checking the triton scan kernels on this GPU; this is done once")
    fault = check_in_child(f"cuda:{device_index}")
    if fault is None:
        with suppress(OSError):  # a home that cannot be written to: the next process checks again
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()
    return fault


def check_in_child(device: str) -> Obstacle | None:
    """`check_kernels` in a process of its own, since a compiler that aborts or a kernel that leaves its memory takes
    its process with it. None when all is well.
    """
    code = f"from vlmx.extract.ops.triton_scan import check_kernels; check_kernels({device!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=_CHECK_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return Obstacle(why=f"its kernels did not compile within {_CHECK_TIMEOUT_S} s")
    if done.returncode == 0:
        return None
    reason = _reason(done.stderr) or f"the check ended with status {done.returncode}"
    fix = "apt install gcc" if "C compiler" in reason else ""  # triton builds its launchers with one
    return Obstacle(why=f"its kernels do not work on this GPU: {reason}", fix=fix)


def _passed_file(device_name: str) -> Path:
    """A file whose name changes with everything that the check depends on."""
    import triton  # type: ignore[import-not-found, import-untyped]

    sources = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("triton_kernels.py", "triton_scan.py"))
    versions = f"{triton.__version__} {torch.__version__} {device_name}"
    digest = hashlib.sha256(sources + versions.encode()).hexdigest()[:16]
    return next(kept_folders("triton")) / digest


def check_kernels(device: str) -> None:
    """Compile the kernels in the variants that the networks use, and compare their results with the torch engine's.

    Raises:
        RuntimeError: a result is wrong.
        triton.errors.TritonError: a kernel does not compile.
    """
    torch.manual_seed(0)
    truth = engine("torch")
    for dtype in (torch.float32, torch.bfloat16):
        for states, reverse in ((8, False), (16, True)):
            u, dt, gate = torch.randn(3, 2, 70, 48, device=device).to(dtype)
            b, c = torch.randn(2, 2, 70, 1, states, device=device).to(dtype)
            rates, skip, bias = -torch.rand(48, states, device=device), *torch.randn(2, 48, device=device)
            options = {"skip_D": skip, "bias_D": bias, "gate_BLD": gate, "softplus": True, "reverse": reverse}
            expected = truth.scan(u, dt, rates, b, c, **options)
            _check_close(launch_tokens(u, dt, rates, b, c, **options), expected, f"scan, {states} states, {dtype}")
        for rank, rows in ((6, 7), (24, 40), (48, 40)):
            u, low = (torch.randn(2, rows, 9, *shape, device=device).to(dtype) for shape in ((96,), (4, rank + 2)))
            weight = (torch.randn(4, 96, rank, device=device) / rank**0.5).to(dtype)
            vectors = (*torch.randn(4, 96, device=device)[None], -torch.rand(4, 96, device=device))
            inputs = (u, low, weight, *vectors, torch.randn(96, device=device))
            expected = truth.scan_four_ways(*inputs)
            _check_close(launch_four_ways(*inputs), expected, f"four-way scan, rank {rank}, {dtype}")


def _check_close(found: Tensor, expected: Tensor, what: str) -> None:
    tolerance = 1e-2 if found.dtype == torch.bfloat16 else 1e-4
    error = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    if not error <= tolerance:  # also when it is not a number
        raise RuntimeError(f"wrong result: {what}: relative error {error:.1e}")


def _reason(output: str) -> str:
    """The line of a traceback or of a compiler's output that names the error; else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "")[:300]


ENGINE = TritonEngine()
