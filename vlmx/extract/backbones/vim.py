"""How does Vim (Vision Mamba), in the form of its published checkpoints, turn an image into tokens?

An independent implementation after Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with
Bidirectional State Space Model" (arXiv 2401.09417), section 3: patches are one sequence with a class token in the
middle, and each block scans that sequence from both of its ends.

Legend: B images, H x W pixels, N patch tokens, L = N + 1 sequence with the class token, C token width, D = 2 C scan
channels, S states a channel (16), R rank of the step size (C / 16, rounded up).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmx.extract.backbones.base import FamilyNet
from vlmx.extract.backbones.row import BackboneRow
from vlmx.extract.ops.dense import linear
from vlmx.extract.ops.selective_scan import conv_silu, scan_tokens
from vlmx.extract.weights import unwrapped

PATCH = 16
STATES = 16
CONV_WIDTH = 4
_EPS = 1e-5


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-5) * weight over the last axis, in x's dtype; the result has the weight's dtype."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BLC: Tensor) -> Tensor:
        weight = self.weight.to(x_BLC.dtype)
        return F.rms_norm(x_BLC, weight.shape, weight, eps=_EPS).to(self.weight.dtype)


class PatchEmbed(nn.Module):
    """Image (B, 3, H, W) -> tokens (B, N, C), row-major: 16x16 patches, which overlap when the stride is below 16."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, stride=stride)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        tokens_BNC: Tensor = self.proj(images_BCHW).flatten(2).transpose(1, 2)
        return tokens_BNC


class BidirectionalMixer(nn.Module):
    """Causal convolution and selective scan from the left and from the right, averaged: (B, L, C) -> (B, L, C).

    Input, gate and output projections serve both directions; convolution, step size, rates and skip exist once for
    each (names with `_b` for the backward one). The average is that of the published weights, which halve the sum.
    `dt_bias` is the published `dt_proj.bias`: it is added inside the scan and, unlike the projection, always float32.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner, self.rank = 2 * dim, math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d, self.conv1d_b = (
            nn.Conv1d(inner, inner, CONV_WIDTH, padding=CONV_WIDTH - 1, groups=inner) for _ in range(2)
        )
        self.x_proj, self.x_proj_b = (nn.Linear(inner, self.rank + 2 * STATES, bias=False) for _ in range(2))
        self.dt_proj, self.dt_proj_b = (nn.Linear(self.rank, inner, bias=False) for _ in range(2))
        self.dt_bias, self.dt_bias_b = (nn.Parameter(_first_step_sizes(inner)) for _ in range(2))
        self.A_log, self.A_b_log = (
            nn.Parameter(torch.arange(1.0, STATES + 1).log().repeat(inner, 1)) for _ in range(2)
        )
        self.D, self.D_b = (nn.Parameter(torch.ones(inner)) for _ in range(2))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        for projection in (self.dt_proj, self.dt_proj_b):
            nn.init.uniform_(projection.weight, -(self.rank**-0.5), self.rank**-0.5)

    def forward(self, x_BLC: Tensor) -> Tensor:
        x_BLD, z_BLD = linear(x_BLC, self.in_proj.weight).chunk(2, dim=2)
        forward_BLD = self._scan(
            x_BLD,
            z_BLD,
            self.conv1d,
            self.x_proj,
            self.dt_proj,
            dt_bias=self.dt_bias,
            A_log=self.A_log,
            skip=self.D,
            reverse=False,
        )
        backward_BLD = self._scan(
            x_BLD,
            z_BLD,
            self.conv1d_b,
            self.x_proj_b,
            self.dt_proj_b,
            dt_bias=self.dt_bias_b,
            A_log=self.A_b_log,
            skip=self.D_b,
            reverse=True,
        )
        return linear(torch.lerp(forward_BLD, backward_BLD, 0.5), self.out_proj.weight)

    def _scan(
        self,
        x_BLD: Tensor,
        z_BLD: Tensor,
        conv: nn.Conv1d,
        x_proj: nn.Linear,
        dt_proj: nn.Linear,
        *,
        dt_bias: Tensor,
        A_log: Tensor,
        skip: Tensor,
        reverse: bool,
    ) -> Tensor:
        """One direction: causal convolution of `x_BLD`, scan, gate by `z_BLD`; `reverse` does it from the end."""
        weight_DJ = conv.weight.flatten(1)
        if reverse:
            weight_DJ = weight_DJ.flip(1)
        u_BLD = conv_silu(x_BLD, weight_DJ, conv.bias, before=0 if reverse else CONV_WIDTH - 1)
        dt_BLR, b_BLS, c_BLS = linear(u_BLD, x_proj.weight).split([self.rank, STATES, STATES], dim=-1)
        return scan_tokens(
            u_BLD,
            dt_proj(dt_BLR),
            -torch.exp(A_log),
            b_BLS[:, :, None],
            c_BLS[:, :, None],
            skip_D=skip,
            bias_D=dt_bias,
            gate_BLD=z_BLD,
            reverse=reverse,
        )


class Block(nn.Module):
    """RMSNorm, then the mixer, of the residual stream (B, L, C); the caller adds the result to the stream."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.mixer = BidirectionalMixer(dim)

    def forward(self, residual_BLC: Tensor) -> Tensor:
        hidden_BLC: Tensor = self.mixer(self.norm(residual_BLC))
        return hidden_BLC


class VimNet(FamilyNet):
    """Vim without its classifier: images (B, 3, H, W) of size `res` -> tokens (B, N, C).

    The tokens are the rows of the last RMSNorm's output (`norm_f`, part of the checkpoint, so `out_norm` is "trained")
    without the class token, row-major. The class token itself stays in the sequence: both scans run through it.

    In bf16 and fp16 the residual stream, the scan and its own parameters are float32, as in the published code.

    Args:
        res: image (height, width) in pixels. It fixes the length of the position embedding.
        embed_dim: C.
        depth: number of blocks.
        stride: pixels between patches: 16, or 8 for the fine-tuned "-ft" checkpoints.
    """

    scans = "sequences"
    keep_float32 = ("A_log", "A_b_log", "D", "D_b", "dt_bias", "dt_bias_b")

    def __init__(self, *, res: tuple[int, int], embed_dim: int, depth: int, stride: int) -> None:
        super().__init__()
        self.grid = ((res[0] - PATCH) // stride + 1, (res[1] - PATCH) // stride + 1)
        self.dim = embed_dim
        self.feature = "norm_f"
        self.out_norm = "trained"
        self.forward_version = 1
        patches = self.grid[0] * self.grid[1]
        self.class_index = patches // 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, embed_dim))
        self.patch_embed = PatchEmbed(embed_dim, stride)
        self.layers = nn.ModuleList(Block(embed_dim) for _ in range(depth))
        self.norm_f = RMSNorm(embed_dim)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Published names -> own names: the prefix `module.` and the classifier go, the step sizes' biases move."""
        own = {}
        for name, value in unwrapped(state).items():
            if name not in ("head.weight", "head.bias"):
                name = name.replace(".dt_proj.bias", ".dt_bias").replace(".dt_proj_b.bias", ".dt_bias_b")
                own[name] = value
        return own

    def published_name(self, own: str) -> str:
        return own.replace(".dt_bias_b", ".dt_proj_b.bias").replace(".dt_bias", ".dt_proj.bias")

    def forward(self, images_BCHW: Tensor) -> Tensor:
        patches_BNC = self.patch_embed(images_BCHW)
        class_B1C = self.cls_token.expand(len(patches_BNC), -1, -1)
        before, after = patches_BNC[:, : self.class_index], patches_BNC[:, self.class_index :]
        embedded_BLC = torch.cat([before, class_B1C, after], dim=1)
        residual_BLC = embedded_BLC.float() + self.pos_embed
        for block in self.layers:
            residual_BLC = residual_BLC + block(residual_BLC)
        normed_BLC = self.norm_f(residual_BLC)
        return torch.cat([normed_BLC[:, : self.class_index], normed_BLC[:, self.class_index + 1 :]], dim=1)


def build(row: BackboneRow, res: tuple[int, int]) -> VimNet:
    """The network of a catalogue row, with fresh random weights."""
    return VimNet(res=res, **row.arch)


def _first_step_sizes(inner: int) -> Tensor:
    """(D,): softplus of it is spread evenly in log space over [0.001, 0.1] (Gu and Dao, "Mamba", section 3.6)."""
    dt = torch.empty(inner).uniform_(math.log(0.001), math.log(0.1)).exp()
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
