"""How fast are the selective scans on a GPU, engine by engine? First every engine must agree with the reference.

python benchmarks/scan_gpu.py                               checks, then times on the GPU; prints milliseconds, ratios
TRITON_INTERPRET=1 python benchmarks/scan_gpu.py --check    checks only; without a GPU through triton's interpreter

Legend: B images, L sequence length, D channels, N states a channel; H x W cells of a grid, R rank of the step size.
Times are medians of device events over repeated calls with inputs in bf16. "mamba-ssm" for a grid is its kernel over
four copies of it, which is how VMamba's published code uses such a kernel.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from vlmx.extract.ops import mamba_scan, triton_scan
from vlmx.extract.ops.engines import engine

REPEATS = 20
Run = Callable[[], Tensor]

# the scan channels of the stages, and their ranks, as the published sizes have them
VMAMBA = {
    "VMamba-T": ((96, 6), (192, 12), (384, 24)),
    "VMamba-S": ((192, 6), (384, 12), (768, 24)),
    "VMamba-B": ((256, 8), (512, 16), (1024, 32)),
}
IMAGES = ((8, 512, 512), (1, 512, 512), (2, 800, 1328))
SEQUENCES = {  # B, L, D, N
    "Vim-S at 224": (32, 197, 768, 16),
    "Vim-S-ft at 224": (32, 730, 768, 16),
    "Vim-B at 224": (32, 197, 1536, 16),
    "MambaVision-S at 512, windows": (8 * 9, 196, 192, 8),
    "MambaVision-L at 512, windows": (8 * 9, 196, 392, 8),
}
SMALL_GRIDS = ((1, 3, 5, 8, 2), (1, 7, 1, 40, 6), (2, 12, 17, 33, 3))
SMALL_SEQUENCES = ((1, 1, 8, 1), (2, 40, 20, 8), (1, 65, 24, 16))
CHECKED_ON_A_GPU = ((2, 128, 128, 96, 6), (1, 50, 83, 768, 24), (2, 14, 14, 384, 24), (1, 7, 200, 48, 64))
CHECKED_SEQUENCES_ON_A_GPU = ((2, 730, 768, 16), (3, 196, 392, 8), (1, 5000, 64, 1))


def grid(B: int, H: int, W: int, D: int, R: int, *, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Arguments of `Engine.scan_four_ways`."""
    u, low = (torch.randn(B, H, W, *shape, device=device).to(dtype) for shape in ((D,), (4, R + 2)))
    weight = (torch.randn(4, D, R, device=device) / math.sqrt(R)).to(dtype)
    bias, rates, skip = (torch.randn(shape, device=device) for shape in ((4, D), (4, D), (D,)))
    return u, low, weight, bias - 4, -rates.exp(), skip


def sequence(B: int, L: int, D: int, N: int, *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Arguments of `Engine.scan`."""
    u, dt, gate = torch.randn(3, B, L, D, device=device).to(dtype)
    b, c = torch.randn(2, B, L, 1, N, device=device).to(dtype)
    rates, skip, bias = (torch.randn(shape, device=device) for shape in ((D, N), (D,), (D,)))
    tokens = {"u_BLD": u, "dt_BLD": dt, "B_BLGN": b, "C_BLGN": c, "gate_BLD": gate}
    return tokens | {"A_DN": -rates.exp(), "skip_D": skip, "bias_D": bias - 4}


def four_way_runs(inputs: tuple[Tensor, ...]) -> dict[str, Run]:
    """What computes the scans of a grid here, by name."""
    device = inputs[0].device
    runs: dict[str, Run] = {"torch": lambda: engine("torch").scan_four_ways(*inputs)}
    if mamba_scan.ENGINE.obstacle(device) is None:
        runs["mamba-ssm"] = lambda: mamba_scan.ENGINE.four_paths(*inputs)
    if triton_scan.ENGINE.obstacle(device) is None:
        runs["triton"] = lambda: triton_scan.ENGINE.scan_four_ways(*inputs)
    return runs


def sequence_runs(inputs: dict[str, Tensor], **options: bool) -> dict[str, Run]:
    """What computes the scan of a sequence here, by name."""
    device = inputs["u_BLD"].device
    runs: dict[str, Run] = {"torch": lambda: engine("torch").scan(**inputs, **options)}
    if mamba_scan.ENGINE.obstacle(device) is None:
        runs["mamba-ssm"] = lambda: mamba_scan.ENGINE.scan(**inputs, **options)
    if triton_scan.ENGINE.obstacle(device) is None:
        runs["triton"] = lambda: triton_scan.ENGINE.scan(**inputs, **options)
    return runs


def check(device: torch.device) -> bool:
    """Compare every engine with the reference on float32 inputs, and print the errors."""
    on_gpu = device.type == "cuda"
    cases: list[tuple[str, dict[str, Run], Tensor]] = []
    for shape in CHECKED_ON_A_GPU if on_gpu else SMALL_GRIDS:
        inputs = grid(*shape, dtype=torch.float32, device=device)
        truth = engine("reference").scan_four_ways(*inputs)
        cases.append((f"four ways, B H W D R {shape}", four_way_runs(inputs), truth))
    for tokens_shape in CHECKED_SEQUENCES_ON_A_GPU if on_gpu else SMALL_SEQUENCES:
        tokens = sequence(*tokens_shape, dtype=torch.float32, device=device)
        for reverse in (False, True):
            truth = engine("reference").scan(**tokens, reverse=reverse)
            cases.append((f"scan, B L D N {tokens_shape}", sequence_runs(tokens, reverse=reverse), truth))
    good = True
    for what, runs, truth in cases:
        errors = {name: float((run().double() - truth).abs().max() / truth.abs().max()) for name, run in runs.items()}
        good &= all(error <= 1e-5 for error in errors.values())
        print(f"{what:<44}" + "  ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    return good


def median_ms(run: Run) -> float:
    """Median milliseconds on the device."""
    for _ in range(3):
        run()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def report(what: str, runs: dict[str, Run]) -> None:
    """One row of the table: milliseconds, and how many times faster triton is."""
    with torch.inference_mode():
        times = {name: median_ms(run) for name, run in runs.items()}
    cells = [f"{times[name]:.3f}" if name in times else "" for name in ("triton", "mamba-ssm", "torch")]
    fastest = times.get("triton", math.nan)
    cells += [f"{times[name] / fastest:.1f}" if name in times else "" for name in ("mamba-ssm", "torch")]
    print(f"| {what} | {' | '.join(cells)} |", flush=True)


def time_everything(device: torch.device) -> None:
    """The table for `benchmarks/RESULTS.md`."""
    print(f"\n{torch.cuda.get_device_name(device)}, torch {torch.__version__}, bf16 inputs, ms")
    print("| scan | triton | mamba-ssm | torch | mamba-ssm / triton | torch / triton |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, stages in VMAMBA.items():
        for batch, height, width in IMAGES:
            for stage, (channels, rank) in enumerate(stages):
                cells = (-(-height // (4 << stage)), -(-width // (4 << stage)))
                inputs = grid(batch, *cells, channels, rank, dtype=torch.bfloat16, device=device)
                report(f"{name} stage {stage + 1}, {batch} x {height} x {width}", four_way_runs(inputs))
    for name, (batch, length, channels, states) in SEQUENCES.items():
        tokens = sequence(batch, length, channels, states, dtype=torch.bfloat16, device=device)
        report(f"{name}, {batch} sequences", sequence_runs(tokens))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the reference and stop")
    only_check = parser.parse_args().check
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    for name in ("triton", "mamba-ssm"):
        if obstacle := engine(name).obstacle(device):
            print(f"{name} does not run here: {obstacle.why}", file=sys.stderr)
    if not check(device):
        print("an engine is wrong; nothing was timed", file=sys.stderr)
        return 1
    if only_check:
        return 0
    if device.type != "cuda":
        print("no GPU to time on", file=sys.stderr)
        return 1
    time_everything(device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
