"""How is the fused CUDA scan of the mamba-ssm package used, where it is installed?

Legend: B images, L sequence length, D channels, G groups of channels that share B and C, N states a channel; H x W
cells of a grid, K the four directions, R rank of the step size, P = R + 2.

Only `selective_scan_fn` is taken from it, with these of its conventions: channels come before length; u, dt, B, C and
the gate have one dtype (float32, float16 or bfloat16), A, the skip and the bias are float32; B and C are (B, G, N, L);
the result has u's dtype. It is never a dependency: it has to be compiled against the installed torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmx.extract.ops.engines import Engine, EngineName, Obstacle, engine

_MODULE = "mamba_ssm.ops.selective_scan_interface"
_INSTALL = 'pip install --no-build-isolation ".[cuda]"'
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir mamba-ssm"


class MambaEngine(Engine):
    """See `Engine`. Float64 inputs are the torch engine's."""

    name: ClassVar[EngineName] = "mamba-ssm"

    def obstacle(self, device: torch.device) -> Obstacle | None:
        if device.type != "cuda" or not torch.cuda.is_available():
            return Obstacle(why="it needs an NVIDIA GPU")
        found = selective_scan_fn()
        return found if isinstance(found, Obstacle) else None

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
        if u_BLD.dtype == torch.float64:
            return engine("torch").scan(
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
        fused = selective_scan_fn()
        assert not isinstance(fused, Obstacle), "an engine with an obstacle was asked to compute"
        # half-precision inputs are taken as they are; where dtypes differ, none loses digits
        sequences = [x for x in (u_BLD, dt_BLD, B_BLGN, C_BLGN, gate_BLD) if x is not None]
        work = sequences[0].dtype if len({x.dtype for x in sequences}) == 1 else torch.float32

        def laid_out(x: Tensor) -> Tensor:
            """(B, L, ..) -> (B, .., L), contiguous, in the order in which the path is walked."""
            return (x.flip(1) if reverse else x).movedim(1, -1).to(work).contiguous()

        y_BDL: Tensor = fused(
            laid_out(u_BLD),
            laid_out(dt_BLD),
            A_DN.float().contiguous(),
            laid_out(B_BLGN),
            laid_out(C_BLGN),
            D=None if skip_D is None else skip_D.float().contiguous(),
            z=None if gate_BLD is None else laid_out(gate_BLD),
            delta_bias=None if bias_D is None else bias_D.float().contiguous(),
            delta_softplus=softplus,
        )
        y_BLD = y_BDL.transpose(1, 2).to(u_BLD.dtype)
        return y_BLD.flip(1) if reverse else y_BLD

    def four_ways_engine(self, device: torch.device) -> EngineName:
        return "triton" if engine("triton").obstacle(device) is None else self.name

    def scan_four_ways(
        self,
        u_BHWD: Tensor,
        low_BHWKP: Tensor,
        dt_weight_KDR: Tensor,
        dt_bias_KD: Tensor,
        A_KD: Tensor,
        skip_D: Tensor,
    ) -> Tensor:
        """The triton engine's fused form where that runs, else `four_paths`."""
        inputs = (u_BHWD, low_BHWKP, dt_weight_KDR, dt_bias_KD, A_KD, skip_D)
        if engine("triton").obstacle(u_BHWD.device) is None:
            return engine("triton").scan_four_ways(*inputs)
        return engine("torch").scan_four_ways(*inputs) if u_BHWD.dtype == torch.float64 else self.four_paths(*inputs)

    def four_paths(
        self,
        u_BHWD: Tensor,
        low_BHWKP: Tensor,
        dt_weight_KDR: Tensor,
        dt_bias_KD: Tensor,
        A_KD: Tensor,
        skip_D: Tensor,
    ) -> Tensor:
        """`scan_four_ways` as one scan of four copies of the grid, which are four groups of channels; float32."""
        rows, columns = u_BHWD.shape[1:3]
        u_BHWD, low_BHWKP = u_BHWD.float(), low_BHWKP.float()  # so that the result is float32
        low_KBLP = [_along(low_BHWKP[..., k, :], k) for k in range(4)]
        steps = [F.linear(low[..., :-2], weight.float()) for low, weight in zip(low_KBLP, dt_weight_KDR, strict=True)]
        y_BLM = self.scan(
            torch.cat([_along(u_BHWD, k) for k in range(4)], dim=2),
            torch.cat(steps, dim=2),
            A_KD.reshape(-1, 1),
            torch.stack([low[..., -2:-1] for low in low_KBLP], dim=2),
            torch.stack([low[..., -1:] for low in low_KBLP], dim=2),
            bias_D=dt_bias_KD.reshape(-1),
        )
        y_BHWD = u_BHWD * skip_D.float()
        for k, y_BLD in enumerate(y_BLM.chunk(4, dim=2)):
            y_BHWD = y_BHWD + _back(y_BLD, k, rows, columns)
        return y_BHWD


def _along(x_BHWM: Tensor, k: int) -> Tensor:
    """The cells in the order of direction k: (B, L, M)."""
    x_BLM = (x_BHWM.transpose(1, 2) if k % 2 else x_BHWM).flatten(1, 2)
    return x_BLM.flip(1) if k >= 2 else x_BLM


def _back(x_BLM: Tensor, k: int, rows: int, columns: int) -> Tensor:
    """The inverse of `_along`."""
    x_BLM = x_BLM.flip(1) if k >= 2 else x_BLM
    x_BHWM: Tensor = (
        x_BLM.unflatten(1, (columns, rows)).transpose(1, 2) if k % 2 else x_BLM.unflatten(1, (rows, columns))
    )
    return x_BHWM


@functools.cache
def selective_scan_fn() -> Callable[..., Any] | Obstacle:
    """mamba-ssm's function, or why it cannot be had."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return Obstacle(why="mamba-ssm is not installed; it has to be compiled, with nvcc", fix=_INSTALL)
    try:
        module = importlib.import_module(_MODULE)
        found: Callable[..., Any] = module.selective_scan_fn
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        # its compiled part was built for another torch, or one of the many packages that it imports is missing
        return Obstacle(why=f"mamba-ssm does not import: {error}", fix=_REBUILD)
    if getattr(module, "selective_scan_cuda", None) is None:
        why = "mamba-ssm is installed without its compiled CUDA part"
        return Obstacle(why=why, fix=f"MAMBA_KEEP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE {_REBUILD}")
    return found


ENGINE = MambaEngine()
