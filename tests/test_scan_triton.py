"""Do our GPU kernels compute the selective scan? Without a GPU, through triton's interpreter: make test-triton."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_fill import assert_close_to_golden
from torch import Tensor

from vlmx.extract.ops import triton_scan
from vlmx.extract.ops.engines import Obstacle, engine

pytest.importorskip("triton", reason="triton is not installed; 'make test-triton' brings its own")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set; run 'make test-triton'", allow_module_level=True)

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TRITON = triton_scan.ENGINE
TRUTH = engine("reference")


@pytest.fixture(autouse=True)
def _scan_by_doubling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter scans element by element, in minutes. Here it combines vectors, in a tree as a GPU does."""
    if not INTERPRETED or request.node.get_closest_marker("slow"):
        return
    from triton.runtime import interpreter

    def generic_scan(self: Any, inputs: Any) -> list[Any]:
        data = [np.moveaxis(x.handle.data, self.axis, 0).copy() for x in inputs]
        step = 1
        while step < len(data[0]):
            now = [self.to_tensor(values, x.dtype) for values, x in zip(data, inputs, strict=True)]
            earlier = [
                self.to_tensor(np.roll(values, step, 0), x.dtype) for values, x in zip(data, inputs, strict=True)
            ]
            combined = [x.handle.data for x in self.combine_fn.fn(*earlier, *now)]
            data = [np.concatenate([old[:step], new[step:]]) for old, new in zip(data, combined, strict=True)]
            step *= 2
        outputs = [np.ascontiguousarray(np.moveaxis(values, 0, self.axis)) for values in data]
        return [self.to_tensor(values, x.dtype) for values, x in zip(outputs, inputs, strict=True)]

    monkeypatch.setattr(interpreter.ScanOps, "generic_scan", generic_scan)


def assert_close(found: Tensor, truth: Tensor, tolerance: float = 3e-6) -> None:
    """Maximum difference, relative to the largest value."""
    difference = (found.double() - truth).abs().max() / truth.abs().max()
    assert difference <= tolerance, f"{float(difference):.1e}"


def scan_inputs(
    length: int, channels: int, *, states: int, groups: int = 1, batch: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Arguments of `Engine.scan`."""
    g = torch.Generator().manual_seed(length * channels + states)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(DEVICE)

    u, dt, gate = (normal(batch, length, channels).to(dtype) for _ in range(3))
    b, c = (normal(batch, length, groups, states).to(dtype) for _ in range(2))
    return {
        "u_BLD": u,
        "dt_BLD": dt,
        "A_DN": -normal(channels, states).exp(),
        "B_BLGN": b,
        "C_BLGN": c,
        "skip_D": normal(channels),
        "bias_D": normal(channels),
        "gate_BLD": gate,
    }


def grid_inputs(
    rows: int, columns: int, channels: int, *, rank: int, batch: int = 1, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Arguments of `Engine.scan_four_ways`."""
    g = torch.Generator().manual_seed(rows * columns + channels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(DEVICE)

    u, low = normal(batch, rows, columns, channels).to(dtype), normal(batch, rows, columns, 4, rank + 2).to(dtype)
    weight = (normal(4, channels, rank) / rank**0.5).to(dtype)
    return [u, low, weight, normal(4, channels), -normal(4, channels).exp(), normal(channels)]


@pytest.mark.parametrize("unit", ["scan_vmamba_n1", "scan_mambavision_n8", "scan_vim_n16_z"])
def test_golden_scans(shared: Path, unit: str) -> None:
    with np.load(shared / f"golden/ssm/units/{unit}.npz") as data:
        truth = data["y64"]
        x = {name: torch.from_numpy(data[name]).to(DEVICE) for name in data.files if name not in ("y64", "y32")}
    y_BLD = TRITON.scan(
        x["u"].transpose(1, 2),
        x["delta"].transpose(1, 2),
        x["A"],
        x["B"].permute(0, 3, 1, 2),
        x["C"].permute(0, 3, 1, 2),
        skip_D=x["D"],
        bias_D=x["delta_bias"],
        gate_BLD=x["z"].transpose(1, 2) if "z" in x else None,
    )
    assert_close_to_golden(y_BLD.transpose(1, 2).cpu().numpy(), truth, std=float(truth.std()))


def test_golden_scan_paths(shared: Path) -> None:
    """With step size 1 and decay 1 the states are running sums: they must run along the published order of pixels."""
    with np.load(shared / "golden/ssm/units/cross_scan_3x5.npz") as data:
        paths = data["scan_index"]
    u = torch.arange(1.0, 16.0, device=DEVICE).square().reshape(1, 3, 5, 1)
    zeros = torch.zeros(4, 1, device=DEVICE)
    step_is_1 = torch.full((4, 1), float(np.log(np.e - 1)), device=DEVICE)
    for k, path in enumerate(paths):
        low = torch.zeros(1, 3, 5, 4, 3, device=DEVICE)
        low[..., k, 1:] = 1  # B and C of this direction only
        y = TRITON.scan_four_ways(u, low, zeros[..., None], step_is_1, zeros, zeros[0])
        expected = u.flatten()[path].cumsum(0)
        torch.testing.assert_close(y.flatten()[path], expected, rtol=1e-6, atol=0, msg=f"direction {k}")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("length", "channels", "states", "groups", "batch"),
    [(1, 1, 1, 1, 1), (16, 20, 16, 1, 2), (17, 16, 16, 2, 1), (32, 40, 8, 1, 1), (65, 12, 8, 4, 2), (300, 70, 1, 1, 1)],
)
def test_scan(length: int, channels: int, states: int, groups: int, batch: int, reverse: bool) -> None:
    inputs = scan_inputs(length, channels, states=states, groups=groups, batch=batch)
    assert_close(TRITON.scan(**inputs, reverse=reverse), TRUTH.scan(**inputs, reverse=reverse))


def test_scan_with_an_odd_number_of_states() -> None:
    inputs = scan_inputs(20, 8, states=5)
    assert_close(TRITON.scan(**inputs), TRUTH.scan(**inputs))


def test_skip_gate_bias_and_softplus_are_optional() -> None:
    inputs = scan_inputs(40, 8, states=2)
    inputs = {name: inputs[name] for name in ("u_BLD", "dt_BLD", "A_DN", "B_BLGN", "C_BLGN")}
    inputs["dt_BLD"] = inputs["dt_BLD"].abs()
    assert_close(TRITON.scan(**inputs, softplus=False), TRUTH.scan(**inputs, softplus=False))


def test_channels_first_inputs_are_strided_over() -> None:
    inputs = scan_inputs(40, 8, states=4, batch=2)
    strided = {
        name: x.transpose(1, 2).contiguous().transpose(1, 2)
        if x.ndim == 3
        else x.movedim(1, -1).contiguous().movedim(-1, 1)
        for name, x in inputs.items()
        if x.ndim > 2
    }
    assert not strided["u_BLD"].is_contiguous()
    assert_close(TRITON.scan(**{**inputs, **strided}), TRUTH.scan(**inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_scanned_in_float32(dtype: torch.dtype) -> None:
    inputs = scan_inputs(70, 8, states=4, dtype=dtype)
    y = TRITON.scan(**inputs)
    assert y.dtype == dtype
    truth = TRUTH.scan(**inputs)
    rounding = torch.finfo(dtype).eps / (1 if INTERPRETED else 2)  # the interpreter cuts bf16 off instead of rounding
    torch.testing.assert_close(y.double(), truth, rtol=rounding, atol=3e-6)  # one rounding, at the end
    grid = grid_inputs(4, 5, 8, rank=6, dtype=dtype)
    found = TRITON.scan_four_ways(*grid)
    assert found.dtype == torch.float32
    assert_close(found, TRUTH.scan_four_ways(*grid))


def test_large_steps_neither_overflow_nor_lose_the_input() -> None:
    inputs = scan_inputs(100, 8, states=4)
    inputs["dt_BLD"] = torch.full_like(inputs["dt_BLD"], 500.0)  # decay is exp(-500 |A|) = 0
    inputs["dt_BLD"][:, ::7] = -500.0  # step size 0: decay is 1
    assert_close(TRITON.scan(**inputs), TRUTH.scan(**inputs))


@pytest.mark.parametrize("exponent", [-30, -12, -6, -1, 0, 1, 6, 30])
def test_step_sizes_are_relatively_exact(exponent: int) -> None:
    """One step with decay 1 gives dt itself; log(1 + exp(x)) would lose small ones."""
    one = torch.ones(1, 1, 1, device=DEVICE)
    x = one * exponent
    dt = TRITON.scan(one, x, torch.zeros(1, 1, device=DEVICE), one[None], one[None])
    truth = torch.log1p(x.double().exp())
    torch.testing.assert_close(dt.double(), truth, rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    ("rows", "columns", "channels", "rank", "batch"),
    [(3, 5, 8, 1, 2), (1, 7, 40, 6, 1), (7, 1, 3, 20, 1), (16, 16, 32, 2, 1), (17, 40, 33, 3, 1)],
)
def test_four_ways(rows: int, columns: int, channels: int, rank: int, batch: int) -> None:
    inputs = grid_inputs(rows, columns, channels, rank=rank, batch=batch)
    assert_close(TRITON.scan_four_ways(*inputs), TRUTH.scan_four_ways(*inputs))


@pytest.mark.parametrize("segments", [1, 2, 7])
def test_paths_may_be_cut_anywhere(segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """7 segments of 5 tiles of 16 cells: some are empty."""
    monkeypatch.setattr(triton_scan, "_segments", lambda programs, tiles, device: segments)
    grid = grid_inputs(5, 9, 8, rank=2)
    assert_close(TRITON.scan_four_ways(*grid), TRUTH.scan_four_ways(*grid))
    inputs = scan_inputs(90, 8, states=8)
    assert_close(TRITON.scan(**inputs, reverse=True), TRUTH.scan(**inputs, reverse=True))


def test_a_batch_too_large_for_one_launch_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = grid_inputs(3, 4, 8, rank=2, batch=5)
    whole = TRITON.scan_four_ways(*grid)
    monkeypatch.setattr(triton_scan, "_PARTIAL_BYTES", 2 * 4 * 4 * 3 * 4 * 8)
    assert_close(TRITON.scan_four_ways(*grid), whole.double())


def test_float64_inputs_are_computed_in_float64() -> None:
    inputs = {name: x.double() for name, x in scan_inputs(30, 4, states=2).items()}
    assert_close(TRITON.scan(**inputs), TRUTH.scan(**inputs), tolerance=1e-13)


@pytest.mark.slow
def test_the_interpreters_own_scan() -> None:
    """Without the shortcut of the other tests."""
    inputs = scan_inputs(20, 4, states=2)
    assert_close(TRITON.scan(**inputs), TRUTH.scan(**inputs))


def test_paths_are_cut_only_where_a_gpu_would_be_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_scan, "_processors", lambda device: 132)
    stage_1_alone = triton_scan._segments(24, 512, DEVICE)
    assert 24 * stage_1_alone >= 4 * 132
    assert triton_scan._segments(8 * 96, 32, DEVICE) == 1
    assert triton_scan._segments(1, 3, DEVICE) == 3  # no more segments than tiles


def test_a_kernel_that_does_not_compile_is_announced_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from triton.runtime.errors import OutOfResources

    def launch(*args: Any, **options: Any) -> Tensor:
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(triton_scan, "_interpreted", lambda: False)
    monkeypatch.setattr(triton_scan, "launch_tokens", launch)
    fresh = triton_scan.TritonEngine()
    inputs = scan_inputs(30, 4, states=2)
    for _ in range(2):
        assert_close(fresh.scan(**inputs), TRUTH.scan(**inputs))
    warnings = capsys.readouterr().err
    assert warnings.count("the torch engine computes instead") == 1
    assert "shared memory" in warnings
    grid = grid_inputs(3, 4, 8, rank=2)
    assert_close(fresh.scan_four_ways(*grid), TRUTH.scan_four_ways(*grid))
    monkeypatch.setattr(triton_scan, "_interpreted", lambda: True)
    obstacle = fresh.obstacle(DEVICE)
    assert obstacle is not None
    assert "shared memory" in obstacle.why


def test_a_full_gpu_is_not_a_broken_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*args: Any, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(triton_scan, "_interpreted", lambda: False)
    monkeypatch.setattr(triton_scan, "launch_tokens", launch)
    with pytest.raises(torch.OutOfMemoryError):
        triton_scan.TritonEngine().scan(**scan_inputs(3, 4, states=2))


def test_the_check_of_a_new_gpu_notices_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    by_torch = engine("torch")
    monkeypatch.setattr(triton_scan, "launch_tokens", by_torch.scan)
    monkeypatch.setattr(triton_scan, "launch_four_ways", by_torch.scan_four_ways)
    triton_scan.check_kernels(str(DEVICE))
    monkeypatch.setattr(triton_scan, "launch_four_ways", lambda *x: by_torch.scan_four_ways(*x) * 1.001)
    with pytest.raises(RuntimeError, match="wrong result: four-way scan, rank 6"):
        triton_scan.check_kernels(str(DEVICE))
    monkeypatch.setattr(triton_scan, "launch_tokens", lambda *x, **options: by_torch.scan(*x, **options) * torch.nan)
    with pytest.raises(RuntimeError, match="wrong result: scan, 8 states"):
        triton_scan.check_kernels(str(DEVICE))


def test_only_a_passed_check_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    fault = Obstacle(why="the GPU is busy")
    verdicts = [fault, None]
    monkeypatch.setattr(triton_scan, "check_in_child", lambda device: verdicts.pop(0))
    in_a_new_process = triton_scan._kernel_fault.__wrapped__
    assert in_a_new_process(0) is fault
    assert in_a_new_process(0) is None
    assert in_a_new_process(0) is None
    assert not verdicts
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "another GPU")
    with pytest.raises(IndexError):  # it is checked, which this test has no verdict for
        in_a_new_process(0)


def test_a_triton_that_does_not_import_is_an_obstacle(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ImportError('libtriton.so: no such file')")
    script = (
        "import torch; from vlmx.extract.ops.triton_scan import ENGINE; print(ENGINE.obstacle(torch.device('cpu')))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert "triton does not import: libtriton.so" in done.stdout, done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_check_in_a_process_of_its_own_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    obstacle = triton_scan.check_in_child("cuda:0")
    assert obstacle is not None
    assert "CUDA" in obstacle.why
    monkeypatch.setattr(triton_scan, "_interpreted", lambda: False)
    obstacle = TRITON.obstacle(torch.device("cpu"))
    assert obstacle is not None
    assert "GPU" in obstacle.why


COMPILE = """
import itertools
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from vlmx.extract.ops.triton_kernels import four_ways_kernel, tokens_kernel
from vlmx.extract.ops.triton_scan import _grid_tile, _token_tile

FLOAT32 = {"rates_ptr", "skip_ptr", "bias_ptr", "factor_ptr", "addend_ptr"}


def build(kernel, dtype, constants, *, float32, warps, capability):
    names = kernel.arg_names
    kind = lambda name: "*fp32" if name in float32 else f"*{dtype}" if name.endswith("_ptr") else "i32"
    signature = {name: "constexpr" if name in constants else kind(name) for name in names}
    divisible = [i for i, name in enumerate(names) if name.endswith("_ptr") or name in ("channels", "u_step")]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    options = {"num_warps": warps, "enable_fp_fusion": True}
    cubin = compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]
    assert len(cubin) > 1000


for capability, dtype in ((80, "fp32"), (90, "bf16")):
    for rank, longest in ((16, 14), (32, 128)):
        steps, block, warps = _grid_tile(longest)
        for finish in (False, True):
            constants = {"FINISH": finish, "T": steps, "D": block, "R": rank}
            float32 = FLOAT32 | {"y_ptr"}
            build(four_ways_kernel, dtype, constants, float32=float32, warps=warps, capability=capability)
    for states in (1, 16):
        steps, block = _token_tile(states, 768)
        flags = {name: True for name in ("HAS_SKIP", "HAS_BIAS", "HAS_GATE", "SOFTPLUS", "REVERSE", "FINISH")}
        constants = {**flags, "T": steps, "D": block, "N": states, "u_channel": 1, "dt_channel": 1, "gate_channel": 1}
        build(tokens_kernel, dtype, constants, float32=FLOAT32, warps=4, capability=capability)
print("compiled")
"""


def test_the_kernels_compile_for_ampere_and_hopper(tmp_path: Path) -> None:
    """To machine code, by the compiler that triton brings; no GPU is needed for that."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("compiled\n"), done.stderr[-2000:]
