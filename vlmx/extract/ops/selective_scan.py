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
    """See `Engine.scan`.

    Raises:
        ValueError: shapes, devices or dtypes do not go together.
    """
    by = _engine_for(u_BLD, dt_BLD, A_DN, B_BLGN, C_BLGN, skip_D, bias_D, gate_BLD)
    return _scan(by, u_BLD, dt_BLD, A_DN, B_BLGN, C_BLGN, skip_D, bias_D, gate_BLD, softplus, reverse).to(u_BLD.dtype)


def _scan(
    by: Engine,
    u_BLD: Tensor,
    dt_BLD: Tensor,
    A_DN: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    skip_D: Tensor | None,
    bias_D: Tensor | None,
    gate_BLD: Tensor | None,
    softplus: bool,
    reverse: bool,
) -> Tensor:
    """The scan by one engine, after a look at its inputs: a kernel reads where it is told to, whatever lies there."""
    shape = tuple(u_BLD.shape)
    if len(shape) != 3 or A_DN.ndim != 2 or B_BLGN.ndim != 4:
        raise ValueError(
            f"u is {shape}, A {tuple(A_DN.shape)} and B {tuple(B_BLGN.shape)}, not (B, L, D), (D, N) and (B, L, G, N)"
        )
    channels, states, groups = shape[2], A_DN.shape[1], B_BLGN.shape[2]
    if groups == 0 or channels % groups:
        raise ValueError(f"{channels} channels cannot be divided into {groups} equal groups")
    weights = (*shape[:2], groups, states)
    expected = {
        "delta": (dt_BLD, shape),
        "A": (A_DN, (channels, states)),
        "B": (B_BLGN, weights),
        "C": (C_BLGN, weights),
        "the skip": (skip_D, (channels,)),
        "the bias": (bias_D, (channels,)),
        "the gate": (gate_BLD, shape),
    }
    _require(u_BLD, expected)
    if u_BLD.numel() == 0 or states == 0:
        return torch.zeros_like(u_BLD)
    return by.scan(
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
    """See `Engine.scan_four_ways`.

    Raises:
        ValueError: shapes, devices or dtypes do not go together.
    """
    if u_BHWD.ndim != 4 or dt_weight_KDR.ndim != 3:
        raise ValueError(
            f"u is {tuple(u_BHWD.shape)} and the weight {tuple(dt_weight_KDR.shape)}, not (B, H, W, D) and (4, D, R)"
        )
    channels, rank = u_BHWD.shape[3], dt_weight_KDR.shape[2]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "low": (low_BHWKP, (*u_BHWD.shape[:3], 4, rank + 2)),
        "the weight": (dt_weight_KDR, (4, channels, rank)),
        "the bias": (dt_bias_KD, (4, channels)),
        "A": (A_KD, (4, channels)),
        "the skip": (skip_D, (channels,)),
    }
    _require(u_BHWD, expected)
    dtype = torch.float64 if u_BHWD.dtype == torch.float64 else torch.float32
    if u_BHWD.numel() == 0:
        return torch.zeros_like(u_BHWD, dtype=dtype)
    inputs = (u_BHWD, low_BHWKP, dt_weight_KDR, dt_bias_KD, A_KD, skip_D)
    return _engine_for(*inputs).scan_four_ways(*inputs).to(dtype)


def conv_silu(x_BLD: Tensor, weight_DJ: Tensor, bias_D: Tensor | None, *, before: int) -> Tensor:
    """See `Engine.conv_silu`.

    Raises:
        ValueError: shapes, devices or dtypes do not go together.
    """
    if x_BLD.ndim != 3 or weight_DJ.ndim != 2:
        raise ValueError(f"x is {tuple(x_BLD.shape)} and the weight {tuple(weight_DJ.shape)}, not (B, L, D) and (D, J)")
    channels = x_BLD.shape[2]
    _require(x_BLD, {"the weight": (weight_DJ, (channels, weight_DJ.shape[1])), "the bias": (bias_D, (channels,))})
    if x_BLD.numel() == 0:
        return torch.zeros_like(x_BLD)
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
        delta_softplus: whether dt = softplus(delta + delta_bias); without it, delta + delta_bias must not be negative.

    Returns:
        y, (B, D, L), in u's dtype.

    Raises:
        ValueError: shapes, devices or dtypes do not go together.
    """
    by = _engine_for(u, delta, A, B, C, D, z, delta_bias)
    return _channels_first(by, u, delta, A, B, C, D, z, delta_bias, delta_softplus).to(u.dtype)


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
    if min(u.ndim, delta.ndim, 3 if z is None else z.ndim) < 3 or min(B.ndim, C.ndim) < 3 or max(B.ndim, C.ndim) > 4:
        raise ValueError(
            f"u is {tuple(u.shape)}, delta {tuple(delta.shape)}, B {tuple(B.shape)} and C {tuple(C.shape)}: "
            "u, delta and z are (B, D, L), B and C are (B, N, L) or (B, G, N, L)"
        )
    B, C = (x[:, None] if x.ndim == 3 else x for x in (B, C))
    y_BLD = _scan(
        by,
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        B.permute(0, 3, 1, 2),
        C.permute(0, 3, 1, 2),
        D,
        delta_bias,
        None if z is None else z.transpose(1, 2),
        delta_softplus,
        False,
    )
    return y_BLD.transpose(1, 2)


def _require(first: Tensor, expected: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Make sure that tensors have their shapes, and the device of `first`, and are floating-point as it is."""
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, {shape} goes with u {tuple(first.shape)}")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, u is on {first.device}")
        if not (tensor.is_floating_point() and first.is_floating_point()):
            raise ValueError(f"u is {first.dtype} and {name} {tensor.dtype}: floating-point numbers are needed")


def _engine_for(*tensors: Tensor | None) -> Engine:
    present = [tensor for tensor in tensors if tensor is not None]
    if present[0].is_meta or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present)):
        return engine("torch")
    return choose(present[0].device)
