"""Does the mamba-ssm engine call `selective_scan_fn` as documented? A stand-in with that signature checks it.

The real one needs a GPU and a compiled package; what is proved here is layout, dtypes, order and the obstacles.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from vlmx.extract.ops.engines import Obstacle, engine
from vlmx.extract.ops.mamba_scan import ENGINE, selective_scan_fn

INTERFACE = "mamba_ssm.ops.selective_scan_interface"
STAND_IN = '''
import torch
from vlmx.extract.ops.selective_scan import selective_scan_reference

selective_scan_cuda = object()
calls = []


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """Refuses what the compiled function refuses: csrc/selective_scan of state-spaces/mamba."""
    batch, dim, length = u.shape
    states = A.shape[1]
    assert u.dtype in (torch.float32, torch.bfloat16, torch.float16)
    for x in (delta, B, C) if z is None else (delta, B, C, z):
        assert x.dtype == u.dtype and x.stride(-1) == 1, (x.dtype, x.stride())
    assert A.dtype == torch.float32 and A.shape == (dim, states)
    assert delta.shape == (batch, dim, length) and (z is None or z.shape == u.shape)
    assert B.shape == C.shape == (batch, B.shape[1], states, length) and dim % B.shape[1] == 0
    for x in (D, delta_bias):
        assert x is None or (x.dtype == torch.float32 and x.shape == (dim,))
    calls.append((u.dtype, B.shape[1]))
    return selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus).to(u.dtype)
'''
Install = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a package mamba_ssm with this `selective_scan_interface` on the path, before any that is installed."""

    def write(interface: str) -> None:
        package = tmp_path / "mamba_ssm" / "ops"
        package.mkdir(parents=True)
        for init in (package.parent / "__init__.py", package / "__init__.py"):
            init.touch()
        (package / "selective_scan_interface.py").write_text(interface)
        for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(tmp_path)
        selective_scan_fn.cache_clear()

    yield write
    selective_scan_fn.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        del sys.modules[name]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scan(install: Install, dtype: torch.dtype, reverse: bool) -> None:
    install(STAND_IN)
    torch.manual_seed(0)
    u, dt, gate = torch.randn(3, 2, 11, 12).to(dtype)
    b, c = torch.randn(2, 2, 11, 3, 5).to(dtype)
    rates, skip, bias = -torch.rand(12, 5), torch.randn(12), torch.randn(12)
    rounding = {"rtol": torch.finfo(dtype).eps, "atol": 10 * torch.finfo(dtype).eps}

    y = ENGINE.scan(u, dt, rates, b, c, skip_D=skip, bias_D=bias, gate_BLD=gate, reverse=reverse)
    truth = engine("reference").scan(u, dt, rates, b, c, skip_D=skip, bias_D=bias, gate_BLD=gate, reverse=reverse)
    torch.testing.assert_close(y.double(), truth, **rounding)
    assert y.dtype == dtype

    bare = ENGINE.scan(u, dt.abs(), rates, b, c, softplus=False, reverse=reverse)
    truth = engine("reference").scan(u, dt.abs(), rates, b, c, softplus=False, reverse=reverse)
    torch.testing.assert_close(bare.double(), truth, **rounding)
    assert importlib.import_module(INTERFACE).calls == [(dtype, 3), (dtype, 3)]


def test_where_dtypes_differ_no_digits_are_lost(install: Install) -> None:
    install(STAND_IN)
    u, dt = torch.randn(2, 1, 7, 4)
    weights = torch.ones(1, 7, 1, 2)
    y = ENGINE.scan(u.bfloat16(), dt, -torch.rand(4, 2), weights, weights)
    assert y.dtype == torch.bfloat16
    assert importlib.import_module(INTERFACE).calls == [(torch.float32, 1)]


def test_four_paths_are_one_call_with_four_groups(install: Install) -> None:
    install(STAND_IN)
    torch.manual_seed(0)
    u, low = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 4, 6)
    inputs = (u, low, torch.randn(4, 8, 4), torch.randn(4, 8), -torch.rand(4, 8), torch.randn(8))
    y = ENGINE.four_paths(*inputs)
    torch.testing.assert_close(y.double(), engine("reference").scan_four_ways(*inputs), rtol=1e-5, atol=1e-5)
    assert importlib.import_module(INTERFACE).calls == [(torch.float32, 4)]
    assert ENGINE.four_paths(u.bfloat16(), *inputs[1:]).dtype == torch.float32


@pytest.mark.parametrize(
    ("interface", "why", "fix"),
    [
        ("import selective_scan_cuda_of_another_torch", "selective_scan_cuda_of_another_torch", "--force-reinstall"),
        (
            "selective_scan_cuda = None\ndef selective_scan_fn(): ...",
            "without its compiled CUDA part",
            "KEEP_CUDA_BUILD",
        ),
        ("", "selective_scan_fn", "--force-reinstall"),
    ],
)
def test_an_installation_that_does_not_work_says_why_and_what_helps(
    install: Install, interface: str, why: str, fix: str
) -> None:
    install(interface)
    found = selective_scan_fn()
    assert isinstance(found, Obstacle)
    assert why in found.why
    assert fix in found.fix


def test_not_installed_says_the_one_command(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    selective_scan_fn.cache_clear()
    found = selective_scan_fn()
    assert isinstance(found, Obstacle)
    assert found.fix == 'pip install --no-build-isolation ".[cuda]"'


def test_a_cpu_is_an_obstacle() -> None:
    obstacle = ENGINE.obstacle(torch.device("cpu"))
    assert obstacle is not None
    assert "GPU" in obstacle.why
