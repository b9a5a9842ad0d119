"""Which engine computes the selective scans on a device, and why not a better one?

Legend: B images, L sequence length, D channels, G groups of channels that share B and C, N states a channel; H x W
cells of a grid, K the four directions, R rank of the step size, P = R + 2, J taps of a convolution.

An engine is one object, named below as "module:attribute" and imported when it is first asked for. It says itself what
keeps it from running on a device. Importing this module imports no torch.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from vlmx.errors import BackendError, UnknownNameError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EngineName = Literal["mamba-ssm", "triton", "native", "torch", "reference"]  # best first
ENGINE_NAMES: tuple[EngineName, ...] = get_args(EngineName)

_ENGINES: dict[EngineName, str] = {
    "mamba-ssm": "vlmx.extract.ops.mamba_scan:ENGINE",
    "triton": "vlmx.extract.ops.triton_scan:ENGINE",
    "native": "vlmx.extract.ops.native:ENGINE",
    "torch": "vlmx.extract.ops.torch_scan:ENGINE",
    "reference": "vlmx.extract.ops.reference:ENGINE",
}


@dataclass(frozen=True, kw_only=True)
class Obstacle:
    """What keeps an engine from running.

    Attributes:
        why: the cause.
        fix: the one command that would enable it; empty when nothing would.
    """

    why: str
    fix: str = ""


class Engine(ABC):
    """One way to compute both scans. All of them compute the same; only `torch` is differentiable."""

    name: ClassVar[EngineName]

    @abstractmethod
    def obstacle(self, device: torch.device) -> Obstacle | None:
        """What keeps it from running on `device`; None when it can. May build or import something at the first call."""

    def four_ways_engine(self, device: torch.device) -> EngineName:
        """Name of the engine that really computes `scan_four_ways` on `device`."""
        return self.name

    @abstractmethod
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
        """y_t = C_t h_t + skip u_t, times SiLU(gate_t), with h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t from h = 0.

        Inputs may be strided and of any floating-point dtype; the work is done in float32, in float64 for float64 u.

        Args:
            u_BLD: inputs.
            dt_BLD: step sizes before bias and softplus.
            A_DN: rates, negative.
            B_BLGN, C_BLGN: input and output weights of each token; group g is that of channels g D/G .. (g+1) D/G - 1.
            skip_D: None for no skip.
            bias_D: added to dt; None for none.
            gate_BLD: None for no gate.
            softplus: whether dt = softplus(dt + bias); without it no dt may be negative.
            reverse: walk the sequence from its end; every y stays at its token.

        Returns:
            y_BLD in u's dtype.
        """

    @abstractmethod
    def scan_four_ways(
        self,
        u_BHWD: Tensor,
        low_BHWKP: Tensor,
        dt_weight_KDR: Tensor,
        dt_bias_KD: Tensor,
        A_KD: Tensor,
        skip_D: Tensor,
    ) -> Tensor:
        """skip u plus the sum of four scans of a grid with one state a channel, each put back at its own cell.

        Direction 0 is row-major, 1 column-major, 2 and 3 are 0 and 1 from their ends. In direction k, with z = low[k]:
        dt = softplus(dt_weight[k] z[:R] + dt_bias[k]), B = z[R], C = z[R + 1].

        Args:
            u_BHWD: inputs.
            low_BHWKP: what each token says of its step size (R numbers), B and C, for every direction.
            dt_weight_KDR, dt_bias_KD: projection of the step size.
            A_KD: rates, negative.
            skip_D: sum of the four directions' skips.

        Returns:
            y_BHWD, float32 (float64 for float64 u).
        """

    def conv_silu(self, x_BLD: Tensor, weight_DJ: Tensor, bias_D: Tensor | None, *, before: int) -> Tensor:
        """SiLU(bias + sum over j of weight[j] x[t + j - before]): the depthwise convolution ahead of a scan.

        Args:
            x_BLD: tokens; zeros are assumed before the first and after the last.
            weight_DJ: J weights a channel.
            bias_D: None for none.
            before: how many of the J tokens come before t: J - 1 for a causal convolution, 0 for one that runs from
                the end, (J - 1) / 2 for a centred one.

        Returns:
            y_BLD in x's dtype.
        """
        import torch.nn.functional as F

        (length, channels), taps = x_BLD.shape[1:], weight_DJ.shape[1]
        y_BDL = F.conv1d(x_BLD.transpose(1, 2), weight_DJ[:, None], bias_D, padding=taps - 1, groups=channels)
        start = taps - 1 - before  # padded by taps - 1 at both ends
        return F.silu(y_BDL[..., start : start + length]).transpose(1, 2)


@cache
def engine(name: EngineName) -> Engine:
    """The engine of that name, whether it can run or not."""
    module, _, attribute = _ENGINES[name].partition(":")
    found: Engine = getattr(importlib.import_module(module), attribute)
    return found


_forced: EngineName | None = None


def force(name: EngineName | str | None, device: torch.device | None = None) -> None:
    """Use this engine and no other from now on; None for the best one again.

    Args:
        name: an engine.
        device: where it will run; None to find out at its first use.

    Raises:
        UnknownNameError: no engine of that name.
        BackendError: it cannot run on the device.
    """
    global _forced
    found = next((known for known in ENGINE_NAMES if known == name), None)
    if name is not None and found is None:
        raise UnknownNameError(f"no scan engine is called '{name}'", fix=f"choose one of {', '.join(ENGINE_NAMES)}")
    if found is not None and device is not None:
        _runnable(found, device)
    _forced = found


def forced() -> EngineName | None:
    """The engine that `force` named."""
    return _forced


def choose(device: torch.device) -> Engine:
    """The engine for a device: the forced one, else the best that can run there ("reference" is never chosen).

    Raises:
        BackendError: the forced engine cannot run there.
    """
    return _choose(_forced, device)


@cache
def _choose(name: EngineName | None, device: torch.device) -> Engine:
    if name is not None:
        return _runnable(name, device)
    return next(e for e in map(engine, ENGINE_NAMES) if e.obstacle(device) is None)


def _runnable(name: EngineName, device: torch.device) -> Engine:
    if obstacle := engine(name).obstacle(device):
        raise BackendError(f"the scan engine '{name}' cannot run on {device}", why=obstacle.why, fix=obstacle.fix)
    return engine(name)


def engines_report(device: torch.device) -> list[tuple[EngineName, Obstacle | None]]:
    """Every engine that is chosen automatically, best first, with what keeps it from running on the device."""
    return [(name, engine(name).obstacle(device)) for name in ENGINE_NAMES if name != "reference"]
