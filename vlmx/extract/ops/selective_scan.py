"""How is the selective scan (the recurrence of Mamba) computed fast, exactly and differentiably in plain torch?

Legend: B images, L sequence length, D channels, G groups of channels that share B and C, N states a channel;
S x T a sequence cut in S chunks of T steps, M everything that is independent at one step.

The recurrence h_t = a_t h_{t-1} + b_t with 0 <= a_t <= 1 is solved in two levels: all chunks advance together,
first from zero to learn what each would hand on, then (after a short loop over chunks) from the state that they really
receive. That is about 2 T + S dependent steps instead of L, and it only ever multiplies numbers of at most 1: nothing
can overflow, unlike forms that divide by cumulative products or work with exponents of sums.

Semantics of `selective_scan`: Gu and Dao, "Mamba", algorithm 2, with the argument conventions of state-spaces/mamba.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_scan(decay_BSTM: Tensor, drive_BSTM: Tensor, *, reverse: bool = False) -> Tensor:
    """All states h_t = decay_t * h_{t-1} + drive_t, starting from zero; differentiable in both arguments.

    The path runs along T inside chunk 0, then chunk 1, and so on; `reverse` walks it from its end. A grid (B, rows,
    columns, M) is its own row-major path; its transpose is the column-major one. Strides are free: no copy is made.

    Args:
        decay_BSTM: factors; meant to be in [0, 1].
        drive_BSTM: what is added at each step.
        reverse: walk the path backwards.

    Returns:
        states of the same shape.
    """
    states: Tensor = _LinearScan.apply(decay_BSTM, drive_BSTM, reverse)  # type: ignore[no-untyped-call]
    return states


class _LinearScan(torch.autograd.Function):
    """The adjoint of a linear scan is a linear scan in the other direction with decays shifted by one step."""

    @staticmethod
    def forward(ctx: Any, decay_BSTM: Tensor, drive_BSTM: Tensor, reverse: bool) -> Tensor:
        states_BSTM = _two_level(decay_BSTM, drive_BSTM, reverse)
        ctx.save_for_backward(decay_BSTM, states_BSTM)
        ctx.reverse = reverse
        return states_BSTM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        decay_BSTM, states_BSTM = ctx.saved_tensors
        to_next_BSTM = _one_step_earlier(decay_BSTM, not ctx.reverse)
        drive_grad_BSTM = _two_level(to_next_BSTM, grads[0], not ctx.reverse)
        return drive_grad_BSTM * _one_step_earlier(states_BSTM, ctx.reverse), drive_grad_BSTM, None


def _one_step_earlier(x_BSTM: Tensor, reverse: bool) -> Tensor:
    """At each step the value of the step before it on the path; zero at the first."""
    out = torch.zeros_like(x_BSTM)
    if reverse:
        out[:, :, :-1] = x_BSTM[:, :, 1:]
        out[:, :-1, -1] = x_BSTM[:, 1:, 0]
    else:
        out[:, :, 1:] = x_BSTM[:, :, :-1]
        out[:, 1:, 0] = x_BSTM[:, :-1, -1]
    return out


def _two_level(decay_BSTM: Tensor, drive_BSTM: Tensor, reverse: bool) -> Tensor:
    batch, chunks, steps, width = drive_BSTM.shape
    chunk_order = range(chunks - 1, -1, -1) if reverse else range(chunks)
    step_order = range(steps - 1, -1, -1) if reverse else range(steps)
    # unbind once: indexing 2 T + S times costs more than the arithmetic on small grids
    decays, drives = decay_BSTM.unbind(2), drive_BSTM.unbind(2)
    handed_on = drive_BSTM.new_zeros(
        batch, chunks, width
    )  # state at the end of each chunk, first as if it began from zero
    received = torch.zeros_like(handed_on)
    if chunks > 1:
        fade = torch.ones_like(handed_on)
        for t in step_order:
            torch.addcmul(drives[t], decays[t], handed_on, out=handed_on)
            fade *= decays[t]
        carry = handed_on.new_zeros(batch, width)
        for s in chunk_order:
            received[:, s] = carry
            carry = torch.addcmul(handed_on[:, s], fade[:, s], carry)
    states_BSTM = torch.empty_like(drive_BSTM)
    states = states_BSTM.unbind(2)
    previous = received
    for t in step_order:
        previous = torch.addcmul(drives[t], decays[t], previous, out=states[t])
    return states_BSTM


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
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t;  y_t = C_t h_t + D u_t, times SiLU(z_t) if z is given.

    Channels come before length, as in state-spaces/mamba. Half-precision inputs are computed in float32.

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
    dtype = u.dtype
    work = torch.promote_types(dtype, torch.float32)
    batch, channels, length = u.shape
    states = A.shape[1]
    groups = 1 if B.ndim == 3 else B.shape[1]
    B_BLGN = B.reshape(batch, groups, states, length).permute(0, 3, 1, 2).to(work)
    C_BLGN = C.reshape(batch, groups, states, length).permute(0, 3, 1, 2).to(work)
    u_BLD = u.transpose(1, 2).to(work)
    dt_BLD = delta.transpose(1, 2).to(work)
    if delta_bias is not None:
        dt_BLD = dt_BLD + delta_bias.to(work)
    if delta_softplus:
        dt_BLD = F.softplus(dt_BLD)

    # (.., G, N, D/G): channels last, so that every step works on contiguous runs
    A_GNd = A.to(work).reshape(groups, -1, states).transpose(1, 2)
    dt_BLGd = dt_BLD.reshape(batch, length, groups, -1)
    decay = (dt_BLGd[:, :, :, None] * A_GNd).exp()
    drive = (dt_BLGd * u_BLD.reshape(batch, length, groups, -1))[:, :, :, None] * B_BLGN[..., None]
    h = _scan_sequence(decay.flatten(2), drive.flatten(2)).reshape(decay.shape)
    y_BLD = (h * C_BLGN[..., None]).sum(3).reshape(batch, length, channels)
    if D is not None:
        y_BLD = y_BLD + D.to(work) * u_BLD
    y = y_BLD.transpose(1, 2)
    if z is not None:
        y = y * F.silu(z.to(work))
    return y.to(dtype)


def _scan_sequence(decay_BLM: Tensor, drive_BLM: Tensor) -> Tensor:
    """`linear_scan` of sequences of any length, cut in chunks of about sqrt(L / 2) steps."""
    batch, length, width = drive_BLM.shape
    steps = max(1, round(math.sqrt(length / 2)))  # minimises 2 T + L / T
    chunks = -(-length // steps)
    padding = (0, 0, 0, chunks * steps - length)
    decay = F.pad(decay_BLM, padding).reshape(batch, chunks, steps, width)
    drive = F.pad(drive_BLM, padding).reshape(batch, chunks, steps, width)
    return linear_scan(decay, drive).reshape(batch, chunks * steps, width)[:, :length]


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
    u, delta, A, B, C = u.double(), delta.double(), A.double(), B.double(), C.double()
    if B.ndim == 3:
        B, C = B[:, None], C[:, None]
    per_group = u.shape[1] // B.shape[1]
    B_BDNL, C_BDNL = B.repeat_interleave(per_group, dim=1), C.repeat_interleave(per_group, dim=1)
    if delta_bias is not None:
        delta = delta + delta_bias.double()[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    h_BDN = u.new_zeros(*u.shape[:2], A.shape[1])
    outputs = []
    for t in range(u.shape[2]):
        dt_BD1 = delta[:, :, t, None]
        h_BDN = torch.exp(dt_BD1 * A) * h_BDN + dt_BD1 * B_BDNL[..., t] * u[:, :, t, None]
        outputs.append((h_BDN * C_BDNL[..., t]).sum(-1))
    y = torch.stack(outputs, dim=2)
    if D is not None:
        y = y + D.double()[:, None] * u
    return y if z is None else y * F.silu(z.double())
