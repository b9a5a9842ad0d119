"""What is the selective scan, written as its definition? Float64, one step after the other: slow, and the yardstick.

Legend: B images, L sequence length, D channels, G groups of channels that share B and C, N states a channel; H x W
cells of a grid, K the four directions, R rank of the step size, P = R + 2.

Source: Gu and Dao, "Mamba" (2023), algorithm 2; the four directions: Liu et al., "VMamba" (2024), section 4.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmx.extract.ops.engines import Engine, EngineName, Obstacle


class ReferenceEngine(Engine):
    """See `Engine`; results are float64 whatever the inputs are."""

    name: ClassVar[EngineName] = "reference"

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
        u_BLD, dt_BLD, A_DN = u_BLD.double(), dt_BLD.double(), A_DN.double()
        batch, length, channels = u_BLD.shape
        per_group = channels // B_BLGN.shape[2]
        B_BLDN, C_BLDN = (x.double().repeat_interleave(per_group, dim=2) for x in (B_BLGN, C_BLGN))
        if bias_D is not None:
            dt_BLD = dt_BLD + bias_D.double()
        if softplus:
            dt_BLD = F.softplus(dt_BLD)
        h_BDN = u_BLD.new_zeros(batch, channels, A_DN.shape[1])
        y_BLD = torch.empty_like(u_BLD)
        for t in reversed(range(length)) if reverse else range(length):
            dt_BD1 = dt_BLD[:, t, :, None]
            h_BDN = torch.exp(dt_BD1 * A_DN) * h_BDN + dt_BD1 * B_BLDN[:, t] * u_BLD[:, t, :, None]
            y_BLD[:, t] = (h_BDN * C_BLDN[:, t]).sum(-1)
        if skip_D is not None:
            y_BLD = y_BLD + skip_D.double() * u_BLD
        return y_BLD if gate_BLD is None else y_BLD * F.silu(gate_BLD.double())

    def scan_four_ways(
        self,
        u_BHWD: Tensor,
        low_BHWKP: Tensor,
        dt_weight_KDR: Tensor,
        dt_bias_KD: Tensor,
        A_KD: Tensor,
        skip_D: Tensor,
    ) -> Tensor:
        u_BHWD, low_BHWKP, dt_weight_KDR = u_BHWD.double(), low_BHWKP.double(), dt_weight_KDR.double()
        y_BHWD = u_BHWD * skip_D.double()
        for k in range(4):
            u, low = u_BHWD, low_BHWKP[..., k, :]
            if k % 2 == 1:  # column by column: the grid, transposed
                u, low = u.transpose(1, 2), low.transpose(1, 2)
            low_BLP = low.flatten(1, 2)
            y_BLD = self.scan(
                u.flatten(1, 2),
                F.linear(low_BLP[..., :-2], dt_weight_KDR[k]),
                A_KD[k, :, None],
                low_BLP[..., None, -2:-1],
                low_BLP[..., None, -1:],
                bias_D=dt_bias_KD[k],
                reverse=k >= 2,
            )
            y = y_BLD.unflatten(1, u.shape[1:3])
            y_BHWD = y_BHWD + (y.transpose(1, 2) if k % 2 == 1 else y)
        return y_BHWD


ENGINE = ReferenceEngine()
