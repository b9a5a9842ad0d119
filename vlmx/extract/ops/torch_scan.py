"""How is the selective scan (the recurrence of Mamba) computed fast, exactly and differentiably in plain torch?

Legend: B images, L sequence length, D channels, G groups of channels that share B and C, N states a channel; H x W
cells of a grid, K four directions, R rank of the step size, P = R + 2; S x T a sequence cut in S chunks of T steps,
M everything that is independent at one step.

The recurrence h_t = a_t h_{t-1} + b_t with 0 <= a_t <= 1 is solved in two levels: all chunks advance together,
first from zero to learn what each would hand on, then (after a short loop over chunks) from the state that they really
receive. That is about 2 T + S dependent steps instead of L, and it only ever multiplies numbers of at most 1: nothing
can overflow, unlike forms that divide by cumulative products or work with exponents of sums.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmx.extract.ops.engines import Engine, EngineName, Obstacle


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


class TorchEngine(Engine):
    """See `Engine`. Runs on every device and in every floating-point dtype, and is differentiable."""

    name: ClassVar[EngineName] = "torch"

    def obstacle(self, device: torch.device) -> Obstacle | None:
        return None

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
        dtype = u_BLD.dtype
        work = torch.promote_types(dtype, torch.float32)
        groups = B_BLGN.shape[2]
        u_BLD, dt_BLD, B_BLGN, C_BLGN = u_BLD.to(work), dt_BLD.to(work), B_BLGN.to(work), C_BLGN.to(work)
        if bias_D is not None:
            dt_BLD = dt_BLD + bias_D.to(work)
        if softplus:
            dt_BLD = F.softplus(dt_BLD)
        # (.., G, N, D/G): channels last, so that every step works on contiguous runs
        A_GNd = A_DN.to(work).unflatten(0, (groups, -1)).transpose(1, 2)
        dt_BLGd = dt_BLD.unflatten(2, (groups, -1))
        decay = (dt_BLGd[:, :, :, None] * A_GNd).exp()
        drive = (dt_BLGd * u_BLD.unflatten(2, (groups, -1)))[:, :, :, None] * B_BLGN[..., None]
        h = _scan_sequence(decay.flatten(2), drive.flatten(2), reverse=reverse).reshape(decay.shape)
        y_BLD = (h * C_BLGN[..., None]).sum(3).flatten(2)
        if skip_D is not None:
            y_BLD = y_BLD + skip_D.to(work) * u_BLD
        if gate_BLD is not None:
            y_BLD = y_BLD * F.silu(gate_BLD.to(work))
        return y_BLD.to(dtype)

    def scan_four_ways(
        self,
        u_BHWD: Tensor,
        low_BHWKP: Tensor,
        dt_weight_KDR: Tensor,
        dt_bias_KD: Tensor,
        A_KD: Tensor,
        skip_D: Tensor,
    ) -> Tensor:
        work = torch.promote_types(u_BHWD.dtype, torch.float32)
        u_BHWD, low_BHWKP, A_KD = u_BHWD.to(work), low_BHWKP.to(work), A_KD.to(work)
        y_BHWD = u_BHWD * skip_D.to(work)
        for k in range(4):
            low_rank, b_BHW1, c_BHW1 = low_BHWKP[..., k, :].split((dt_weight_KDR.shape[2], 1, 1), dim=-1)
            dt_BHWD = F.softplus(F.linear(low_rank, dt_weight_KDR[k].to(work), dt_bias_KD[k].to(work)))
            decay_BHWD = (dt_BHWD * A_KD[k]).exp()
            drive_BHWD = dt_BHWD * u_BHWD * b_BHW1
            if k % 2 == 1:  # column by column: the same grid, transposed
                decay_BHWD, drive_BHWD = decay_BHWD.transpose(1, 2), drive_BHWD.transpose(1, 2)
            states_BHWD = linear_scan(decay_BHWD, drive_BHWD, reverse=k >= 2)
            if k % 2 == 1:
                states_BHWD = states_BHWD.transpose(1, 2)
            y_BHWD = torch.addcmul(y_BHWD, states_BHWD, c_BHW1)
        return y_BHWD


def _scan_sequence(decay_BLM: Tensor, drive_BLM: Tensor, *, reverse: bool) -> Tensor:
    """`linear_scan` of sequences of any length, cut in chunks of about sqrt(L / 2) steps."""
    batch, length, width = drive_BLM.shape
    steps = max(1, round(math.sqrt(length / 2)))  # minimises 2 T + L / T
    chunks = -(-length // steps)
    padding = (0, 0, 0, chunks * steps - length)
    decay = F.pad(decay_BLM, padding).reshape(batch, chunks, steps, width)
    drive = F.pad(drive_BLM, padding).reshape(batch, chunks, steps, width)
    return linear_scan(decay, drive, reverse=reverse).reshape(batch, chunks * steps, width)[:, :length]


ENGINE = TorchEngine()
