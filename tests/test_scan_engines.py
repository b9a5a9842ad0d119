"""Does every engine compute the recurrence that `reference` writes down? Reference data, random inputs, extremes.

To put another engine through it, list its name below. An engine that cannot run here is skipped with its reason.

Legend: B images, L sequence length, D channels, G groups, N states a channel; H x W cells, K directions, R rank.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vlmx.errors import BackendError, UnknownNameError
from vlmx.extract.ops import engines
from vlmx.extract.ops.engines import Engine, EngineName

CPU = torch.device("cpu")
NAMES: list[EngineName] = ["mamba-ssm", "triton", "native", "torch", "reference"]


@pytest.fixture(params=NAMES)
def engine(request: pytest.FixtureRequest) -> Engine:
    found = engines.engine(request.param)
    if obstacle := found.obstacle(CPU):
        pytest.skip(f"{request.param}: {obstacle.why}")
    return found


REFERENCE = engines.engine("reference")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sequence(
    batch: int, length: int, channels: int, states: int, *, groups: int = 1, steps: float = 0.0
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Arguments of `scan`; `steps` is the mean of the step sizes before the softplus."""
    u, dt, gate = (randn(batch, length, channels, seed=i) for i in (1, 2, 3))
    B, C = (randn(batch, length, groups, states, seed=i) for i in (4, 5))
    A = -randn(channels, states, seed=6).exp()
    skip, bias = randn(channels, seed=7), randn(channels, seed=8) + steps
    return (u, dt, A, B, C), {"skip_D": skip, "bias_D": bias, "gate_BLD": gate}


def grid(batch: int, height: int, width: int, channels: int, rank: int, *, steps: float = 0.0) -> tuple[Tensor, ...]:
    """Arguments of `scan_four_ways`."""
    return (
        randn(batch, height, width, channels, seed=1),
        randn(batch, height, width, 4, rank + 2, seed=2),
        randn(4, channels, rank, seed=3) * rank**-0.5,
        randn(4, channels, seed=4) + steps,
        -randn(4, channels, seed=5).exp(),
        randn(channels, seed=6),
    )


def assert_equal(found: Tensor, expected: Tensor, *, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest value, and nothing of it NaN."""
    assert found.shape == expected.shape
    error = float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
    assert error <= tolerance, f"off by {error:.1e} of the largest value"


@pytest.mark.parametrize("unit", ["scan_vmamba_n1", "scan_mambavision_n8", "scan_vim_n16_z"])
def test_golden_scans(shared: Path, engine: Engine, unit: str) -> None:
    with np.load(shared / f"golden/ssm/units/{unit}.npz") as stored:
        truth = stored["y64"]
        data = {key: torch.from_numpy(stored[key]) for key in stored.files if not key.startswith("y")}
    B, C = (x[:, None] if x.ndim == 3 else x for x in (data["B"], data["C"]))
    y_BLD = engine.scan(
        data["u"].mT,
        data["delta"].mT,
        data["A"],
        B.permute(0, 3, 1, 2),
        C.permute(0, 3, 1, 2),
        skip_D=data["D"],
        bias_D=data["delta_bias"],
        gate_BLD=data["z"].mT if "z" in data else None,
    )
    assert np.abs(y_BLD.mT.double().numpy() - truth).max() <= 5e-6 * truth.std()


def test_golden_order_of_the_four_ways(shared: Path, engine: Engine) -> None:
    """With decay 1 and step size 1 each direction is a running sum along the published order of the pixels."""
    with np.load(shared / "golden/ssm/units/cross_scan_3x5.npz") as data:
        paths = torch.from_numpy(data["scan_index"]).long()
    drive = torch.arange(1.0, 16.0).square()
    one = float(np.log(np.e - 1))  # softplus of it is 1
    for k in range(4):
        low = torch.zeros(1, 3, 5, 4, 3)
        low[..., k, 1:] = 1.0  # B = C = 1 in this direction, 0 in the others
        u = drive.reshape(1, 3, 5, 1)
        y = engine.scan_four_ways(
            u, low, torch.zeros(4, 1, 1), torch.full((4, 1), one), torch.zeros(4, 1), torch.zeros(1)
        )
        torch.testing.assert_close(
            y.flatten()[paths[k]].double(), drive[paths[k]].double().cumsum(0), rtol=1e-5, atol=0.0
        )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 7, 5, 1), (2, 64, 40, 8), (1, 197, 48, 16), (3, 10, 16, 3)], ids=str
)
@pytest.mark.parametrize("steps", [-7.0, 0.0, 5.0])
def test_scan_of_small_and_large_steps(
    engine: Engine, shape: tuple[int, int, int, int], steps: float, reverse: bool
) -> None:
    args, options = sequence(*shape, steps=steps)
    expected = REFERENCE.scan(*args, **options, reverse=reverse)
    assert_equal(engine.scan(*args, **options, reverse=reverse), expected)


@pytest.mark.parametrize("states", [1, 8, 16])
def test_scan_of_a_long_sequence(engine: Engine, states: int) -> None:
    args, options = sequence(1, 5000, 16, states, steps=-5.0)
    assert_equal(engine.scan(*args, **options), REFERENCE.scan(*args, **options), tolerance=5e-5)


def test_groups_of_channels_have_their_own_weights(engine: Engine) -> None:
    args, options = sequence(2, 9, 60, 4, groups=3)
    assert_equal(engine.scan(*args, **options), REFERENCE.scan(*args, **options))


def test_skip_bias_gate_and_softplus_are_optional(engine: Engine) -> None:
    (u, dt, A, B, C), options = sequence(2, 9, 20, 4)
    plain = engine.scan(u, dt.abs(), A, B, C, softplus=False)
    assert_equal(plain, REFERENCE.scan(u, dt.abs(), A, B, C, softplus=False))
    for name, value in options.items():
        assert_equal(
            engine.scan(u, dt, A, B, C, **{name: value}),  # type: ignore[arg-type]
            REFERENCE.scan(u, dt, A, B, C, **{name: value}),  # type: ignore[arg-type]
        )


def test_strided_inputs(engine: Engine) -> None:
    (u, dt, A, B, C), options = sequence(2, 9, 20, 4)
    expected = REFERENCE.scan(u, dt, A, B, C, **options)
    channels_first = [x.mT.contiguous().mT for x in (u, dt)]
    wide = torch.cat([u, dt, B[:, :, 0], C[:, :, 0]], dim=2).split([20, 20, 4, 4], dim=2)
    for first, second in (channels_first, wide[:2]):
        found = engine.scan(first, second, A, wide[2][:, :, None], wide[3][:, :, None], **options)
        assert_equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(engine: Engine, dtype: torch.dtype) -> None:
    args, options = sequence(2, 50, 20, 8)
    halves, half_options = [x.to(dtype) for x in args], {key: x.to(dtype) for key, x in options.items()}
    found, expected = engine.scan(*halves, **half_options), REFERENCE.scan(*halves, **half_options)
    assert found.dtype == (torch.float64 if engine.name == "reference" else dtype)
    assert_equal(
        found, expected, tolerance=2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    )  # one rounding, at the end
    cells = [x.to(dtype) for x in grid(1, 4, 6, 20, 3)]
    found = engine.scan_four_ways(*cells)
    assert found.dtype == (torch.float64 if engine.name == "reference" else torch.float32)
    assert_equal(found, REFERENCE.scan_four_ways(*cells))


def test_float64_stays_float64(engine: Engine) -> None:
    args, options = sequence(1, 30, 6, 2)
    doubles, double_options = [x.double() for x in args], {key: x.double() for key, x in options.items()}
    found = engine.scan(*doubles, **double_options)
    assert found.dtype == torch.float64
    if engine.name != "mamba-ssm":  # whose kernels know no float64
        assert_equal(found, REFERENCE.scan(*doubles, **double_options), tolerance=1e-11)
        cells = [x.double() for x in grid(1, 3, 4, 6, 2)]
        assert_equal(engine.scan_four_ways(*cells), REFERENCE.scan_four_ways(*cells), tolerance=1e-11)


def test_steps_beyond_all_measure_forget_and_do_not_overflow(engine: Engine) -> None:
    (u, dt, A, B, C), options = sequence(1, 40, 20, 4)
    dt = torch.full_like(dt, 1e4)  # decays are exp(-1e4) = 0
    dt[:, ::7] = -1e4  # step size 0, decay 1
    assert_equal(engine.scan(u, dt, A, B, C, **options), REFERENCE.scan(u, dt, A, B, C, **options))
    assert_equal(*(e.scan(u, dt, A, B, C, gate_BLD=dt * u) for e in (engine, REFERENCE)))


def test_one_image_with_nan_leaves_the_other_alone(engine: Engine) -> None:
    (u, dt, A, B, C), options = sequence(2, 12, 20, 4)
    u, dt = u.clone(), dt.clone()
    u[1, 3, 2] = dt[1, 3, 5] = float("nan")
    y = engine.scan(u, dt, A, B, C, **options)
    assert bool(torch.isfinite(y[0]).all())
    assert bool(y[1, 3:, (2, 5)].isnan().all())
    assert bool(torch.isfinite(y[1, :3]).all())


@pytest.mark.parametrize("steps", [-7.0, 0.0, 5.0])
@pytest.mark.parametrize("cells", [(1, 1), (3, 5), (1, 7), (7, 1), (16, 16), (33, 10)], ids=str)
def test_four_ways(engine: Engine, cells: tuple[int, int], steps: float) -> None:
    args = grid(2, *cells, 20, 3, steps=steps)
    assert_equal(engine.scan_four_ways(*args), REFERENCE.scan_four_ways(*args))


@pytest.mark.parametrize(("channels", "rank"), [(1, 1), (16, 6), (96, 24), (33, 64)])
def test_four_ways_of_any_width(engine: Engine, channels: int, rank: int) -> None:
    args = grid(1, 4, 6, channels, rank)
    assert_equal(engine.scan_four_ways(*args), REFERENCE.scan_four_ways(*args))


@pytest.mark.parametrize("before", [0, 1, 3])
def test_convolution_ahead_of_a_scan(engine: Engine, before: int) -> None:
    x, weight, bias = randn(2, 9, 20, seed=1), randn(20, 4, seed=2), randn(20, seed=3)
    expected = torch.zeros(2, 9, 20)
    for t in range(9):
        for j in range(4):
            if 0 <= t + j - before < 9:
                expected[:, t] += weight[:, j] * x[:, t + j - before]
    for b, shifted in ((None, expected), (bias, expected + bias)):
        assert_equal(engine.conv_silu(x, weight, b, before=before), torch.nn.functional.silu(shifted))
    assert engine.conv_silu(x.bfloat16(), weight.bfloat16(), None, before=before).dtype == torch.bfloat16


def test_threads_share_the_work_and_change_nothing() -> None:
    native = engines.engine("native")
    if obstacle := native.obstacle(CPU):
        pytest.skip(obstacle.why)
    args, options = sequence(2, 30, 100, 4)
    cells = grid(2, 5, 6, 100, 3)
    alone = (native.scan(*args, **options), native.scan_four_ways(*cells))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        shared_out = (native.scan(*args, **options), native.scan_four_ways(*cells))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone[0], shared_out[0])
    assert torch.equal(alone[1], shared_out[1])


def test_the_first_engine_without_an_obstacle_is_chosen() -> None:
    report = engines.engines_report(CPU)
    assert [name for name, _ in report] == ["mamba-ssm", "triton", "native", "torch"]
    assert engines.choose(CPU).name == next(name for name, obstacle in report if obstacle is None)
    assert all(obstacle.why for _, obstacle in report if obstacle is not None)


def test_forcing_an_engine() -> None:
    try:
        engines.force("torch", CPU)
        assert engines.choose(CPU).name == "torch" == engines.forced()
        with pytest.raises(BackendError) as raised:
            engines.force("mamba-ssm", CPU)
        assert raised.value.exit_code == 8
        assert raised.value.why
        assert engines.forced() == "torch"
        with pytest.raises(UnknownNameError, match="native"):
            engines.force("natvie")
        engines.force("mamba-ssm")  # the device is not known yet
        with pytest.raises(BackendError):
            engines.choose(CPU)
    finally:
        engines.force(None)
    assert engines.forced() is None
