"""Is the fast scan the recurrence that it stands for: values, gradients, scan paths, extremes?"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vlmx.errors import BackendError
from vlmx.extract.ops import engines
from vlmx.extract.ops.selective_scan import scan_four_ways, selective_scan, selective_scan_reference
from vlmx.extract.ops.torch_scan import linear_scan


def random_inputs(length: int, *, groups: int = 2, states: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """u, delta, A, B, C, D, z, delta_bias for 2 images and 4 channels."""
    g = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    u, delta, z = (normal(2, 4, length) for _ in range(3))
    B, C = (normal(2, groups, states, length) for _ in range(2))
    return [u, delta, -normal(4, states).exp(), B, C, normal(4), z, normal(4)]


@pytest.mark.parametrize("length", [1, 2, 3, 17, 196])
def test_equals_the_sequential_reference_at_any_length(length: int) -> None:
    inputs = random_inputs(length)
    fast = selective_scan(*inputs, delta_softplus=True)
    torch.testing.assert_close(fast, selective_scan_reference(*inputs, delta_softplus=True), rtol=1e-11, atol=1e-12)


def test_skip_gate_bias_and_groups_are_optional() -> None:
    u, delta, A, B, C, _, _, _ = random_inputs(9, groups=1)
    ungrouped = selective_scan(u, delta.abs(), A, B[:, 0], C[:, 0])
    torch.testing.assert_close(ungrouped, selective_scan_reference(u, delta.abs(), A, B, C), rtol=1e-11, atol=1e-12)


def test_two_steps_by_hand() -> None:
    one = torch.ones(1, 1, 2)
    y = selective_scan(one * 3, one * 2, torch.tensor([[-0.5]]), one, one * 10, torch.tensor([1.0]))
    h1 = 2 * 3.0  # dt B u
    h2 = np.exp(-1.0) * h1 + 6.0  # exp(dt A) h + dt B u
    np.testing.assert_allclose(y[0, 0].numpy(), [10 * h1 + 3, 10 * h2 + 3], rtol=1e-6)


def test_large_steps_neither_overflow_nor_lose_the_input() -> None:
    u, _, A, B, C, D, z, bias = random_inputs(200, dtype=torch.float32)
    delta = torch.full_like(u, 500.0)  # decay is exp(-500 |A|) = 0
    delta[..., ::7] = -500.0  # step size 0: decay is 1
    inputs = [u, delta, A, B, C, D, z, bias]
    truth = selective_scan_reference(*inputs, delta_softplus=True)
    fast = selective_scan(*inputs, delta_softplus=True)
    assert (fast - truth).abs().max() <= 1e-6 * truth.abs().max()


def test_half_precision_inputs_are_scanned_in_float32() -> None:
    inputs = random_inputs(50, dtype=torch.bfloat16)
    y = selective_scan(*inputs, delta_softplus=True)
    truth = selective_scan_reference(*inputs, delta_softplus=True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), truth, rtol=2**-8, atol=1e-5)  # one rounding, at the end


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 5, 2), (2, 3, 4, 2), (1, 5, 1, 3)])
def test_gradients_of_the_linear_scan(shape: tuple[int, ...], reverse: bool) -> None:
    g = torch.Generator().manual_seed(0)
    decay = torch.rand(shape, generator=g, dtype=torch.float64).requires_grad_()
    drive = torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: linear_scan(a, b, reverse=reverse), (decay, drive))
    assert torch.autograd.gradcheck(
        lambda a, b: linear_scan(a.transpose(1, 2), b.transpose(1, 2), reverse=reverse), (decay, drive)
    )


def test_gradients_of_the_selective_scan() -> None:
    inputs = [x.requires_grad_() for x in random_inputs(7)]
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, delta_softplus=True), inputs)


def test_golden_scan_paths(shared: Path) -> None:
    """With decay 1 the states are running sums: they must run along the published order of the pixels."""
    with np.load(shared / "golden/ssm/units/cross_scan_3x5.npz") as data:
        paths = data["scan_index"]
    drive = torch.arange(1.0, 16.0).square().reshape(1, 3, 5, 1)
    ones = torch.ones_like(drive)
    for k, path in enumerate(paths):
        if k % 2 == 0:
            states = linear_scan(ones, drive, reverse=k >= 2)
        else:
            states = linear_scan(ones.transpose(1, 2), drive.transpose(1, 2), reverse=k >= 2).transpose(1, 2)
        expected = drive.flatten()[path].cumsum(0)
        assert states.flatten()[path].tolist() == expected.tolist(), f"direction {k}"


CPU = torch.device("cpu")


def scan_arguments() -> dict[str, torch.Tensor]:
    shapes = {"u": (2, 6, 9), "delta": (2, 6, 9), "B": (2, 3, 9), "C": (2, 3, 9), "D": (6,), "z": (2, 6, 9)}
    arguments = {name: torch.ones(shape) for name, shape in shapes.items()}
    return {**arguments, "A": -torch.ones(6, 3), "delta_bias": torch.ones(6)}


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_inputs_that_do_not_fit_are_refused_before_a_kernel_reads_them(name: str) -> None:
    good = scan_arguments()
    assert selective_scan(**good, delta_softplus=True).shape == (2, 6, 9)
    for wrong in (good[name][..., :-1], good[name].to("meta"), good[name].int(), good[name].to(torch.complex64)):
        with pytest.raises(ValueError, match=r"goes with|is on|floating-point|not \(B"):
            selective_scan(**{**good, name: wrong}, delta_softplus=True)


def test_groups_that_do_not_divide_the_channels_are_refused() -> None:
    good = scan_arguments()
    with pytest.raises(ValueError, match="6 channels cannot be divided into 4 equal groups"):
        selective_scan(**{**good, "B": torch.ones(2, 4, 3, 9), "C": torch.ones(2, 4, 3, 9)})
    mixed = selective_scan(**{**good, "B": torch.ones(2, 1, 3, 9)}, delta_softplus=True)
    assert torch.equal(mixed, selective_scan(**good, delta_softplus=True))


@pytest.mark.parametrize("name", ["triton", "native", "torch", "reference"])
def test_nothing_gives_nothing(name: str) -> None:
    try:
        engines.force(name, CPU)
    except BackendError:
        pytest.skip(f"{name} does not run here")
    try:
        for batch, channels, length in ((0, 6, 9), (2, 0, 9), (2, 6, 0)):
            u = torch.ones(batch, channels, length)
            y = selective_scan(u, u, -torch.ones(channels, 3), *2 * [torch.ones(batch, 3, length)])
            assert (y.shape, y.dtype) == (u.shape, u.dtype)
        grid = scan_four_ways(
            torch.ones(0, 3, 4, 6),
            torch.ones(0, 3, 4, 4, 5),
            torch.ones(4, 6, 3),
            torch.ones(4, 6),
            -torch.ones(4, 6),
            torch.ones(6),
        )
        assert grid.shape == (0, 3, 4, 6)
        assert selective_scan(**scan_arguments(), delta_softplus=True).dtype == torch.float32
    finally:
        engines.force(None)
