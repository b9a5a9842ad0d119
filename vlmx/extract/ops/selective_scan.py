"""What do networks call to compute a selective scan? The best engine that can run, or the one that the user forced.

Legend: B images, L sequence length, D channels, G groups of channels that share B and C, N states a channel; H x W
cells of a grid, K the four directions, R rank of the step size, P = R + 2.

Semantics: Gu and Dao, "Mamba", algorithm 2. When a gradient is asked for, and on the meta device, the torch engine
computes: it is the differentiable one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmx.extract.ops.engines import Engine, choose, engine


def scan_tokens(
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
    """See `Engine.scan`."""
    return _engine_for(u_BLD, dt_BLD, A_DN, B_BLGN, C_BLGN, skip_D, bias_D, gate_BLD).scan(
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


def scan_four_ways(
    u_BHWD: Tensor, low_BHWKP: Tensor, dt_weight_KDR: Tensor, dt_bias_KD: Tensor, A_KD: Tensor, skip_D: Tensor
) -> Tensor:
    """See `Engine.scan_four_ways`."""
    inputs = (u_BHWD, low_BHWKP, dt_weight_KDR, dt_bias_KD, A_KD, skip_D)
    return _engine_for(*inputs).scan_four_ways(*inputs)


def conv_silu(x_BLD: Tensor, weight_DJ: Tensor, bias_D: Tensor | None, *, before: int) -> Tensor:
    """See `Engine.conv_silu`."""
    return _engine_for(x_BLD, weight_DJ, bias_D).conv_silu(x_BLD, weight_DJ, bias_D, before=before)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """`scan_tokens` with names and layout of state-spaces/mamba: channels come before length.

    Args:
        u: (B, D, L) inputs.
        delta: (B, D, L) step sizes before bias and softplus.
        A: (D, N) rates, negative.
        B, C: (B, N, L), or (B, G, N, L) when G equal groups of channels have their own.
        D: (D,) skip; None for none.
        z: (B, D, L) gate; None for none.
        delta_bias: (D,), added to delta before the softplus.
        delta_softplus: whether dt = softplus(delta + delta_bias).

    Returns:
        y, (B, D, L), in u's dtype.
    """
    tensors = (t for t in (u, delta, A, B, C, D, z, delta_bias) if t is not None)
    return _channels_first(_engine_for(*tensors), u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """The same as `selective_scan`, one step after the other in float64: slow, and the yardstick for it.

    Returns:
        y, (B, D, L), float64.
    """
    return _channels_first(engine("reference"), u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def _channels_first(
    by: Engine,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    if B.ndim == 3:
        B, C = B[:, None], C[:, None]
    y_BLD = by.scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        B.permute(0, 3, 1, 2),
        C.permute(0, 3, 1, 2),
        skip_D=D,
        bias_D=delta_bias,
        gate_BLD=None if z is None else z.transpose(1, 2),
        softplus=delta_softplus,
    )
    return y_BLD.transpose(1, 2)


def _engine_for(*tensors: Tensor | None) -> Engine:
    present = [tensor for tensor in tensors if tensor is not None]
    if present[0].is_meta or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present)):
        return engine("torch")
    return choose(present[0].device)
