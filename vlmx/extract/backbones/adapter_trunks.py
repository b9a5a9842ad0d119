"""Which plain transformers does ViT-Adapter stand on: the blocks of ViT (DeiT, AugReg), BEiT and Uni-Perceiver.

ViT: Dosovitskiy et al., arXiv 2010.11929, with the layer scale of Touvron et al., arXiv 2103.17239. BEiT: Bao et al.,
arXiv 2106.08254, relative positions instead of absolute ones. Uni-Perceiver: Zhu et al., arXiv 2112.01522. All are
pre-norm with exact GELU. Names of parameters are those of the published ViT-Adapter checkpoints.

Legend: B batch, C channels, H W rows and columns (pixels of an image), N tokens of the trunk (row-major), D width, A
heads, Q K tokens as queries and as keys, T entries of a relative-position table, G tokens of a stored square grid.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 16
MLP_RATIO = 4
PERCEIVER_FRAMES = 8  # time positions that Uni-Perceiver stores; an image uses the first


def attend(qkv_BNE: Tensor, heads: int, bias_AQK: Tensor | None = None) -> Tensor:
    """Multi-head self-attention: (B, N, E = 3D) -> (B, N, D); `bias_AQK` is added to the scaled products."""
    query, key, value = qkv_BNE.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    bias_BAQK = None if bias_AQK is None else bias_AQK[None]
    mixed_BAND = F.scaled_dot_product_attention(query, key, value, attn_mask=bias_BAQK)
    return mixed_BAND.transpose(1, 2).flatten(2)


def resize_positions(stored_GD: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embeddings (G, D) of a square grid -> (N, D) of `grid`: bicubic, no antialiasing, in float32."""
    side = math.isqrt(stored_GD.shape[0])
    map_DHW = stored_GD.float().reshape(side, side, -1).permute(2, 0, 1)
    resized_BDHW = F.interpolate(map_DHW[None], size=grid, mode="bicubic", align_corners=False)
    return resized_BDHW[0].flatten(1).T.to(stored_GD.dtype)


def relative_position_index(window: int, device: torch.device) -> Tensor:
    """Row of BEiT's relative-position table for each pair of tokens: (1 + N, 1 + N) int32, [query, key].

    Token 0 is the class token. The table has one row for each offset (down, right) between two cells of a grid of
    `window` x `window`, then three: class token to cell, cell to class token, class token to itself.
    """
    side = 2 * window - 1
    line = torch.arange(window, device=device, dtype=torch.int32)
    row, column = line.repeat_interleave(window), line.repeat(window)
    down_NN, right_NN = row[:, None] - row + (window - 1), column[:, None] - column + (window - 1)
    index_QK = F.pad(down_NN * side + right_NN, (1, 0, 1, 0))
    index_QK[0, :] = side**2
    index_QK[:, 0] = side**2 + 1
    index_QK[0, 0] = side**2 + 2
    return index_QK


class PatchEmbed(nn.Module):
    """Image (B, 3, H, W) -> one token (B, N, D) for each patch of 16x16 pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, stride=PATCH)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        tokens_BND: Tensor = self.proj(images_BCHW).flatten(2).transpose(1, 2)
        return tokens_BND


class Mlp(nn.Module):
    """Two linear layers with exact GELU between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim)
        self.fc2 = nn.Linear(MLP_RATIO * dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        out_BND: Tensor = self.fc2(F.gelu(self.fc1(x_BND)))
        return out_BND


class ViTAttention(nn.Module):
    """Self-attention without position terms."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        out_BND: Tensor = self.proj(attend(self.qkv(x_BND), self.heads))
        return out_BND


class ViTBlock(nn.Module):
    """Attention, then MLP, each normalised before and scaled per channel after."""

    def __init__(self, dim: int, heads: int, *, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = ViTAttention(dim, heads)
        self.gamma1 = nn.Parameter(torch.ones(dim))
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim)
        self.gamma2 = nn.Parameter(torch.ones(dim))

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.gamma1 * self.attn(self.norm1(x_BND))
        out_BND: Tensor = x_BND + self.gamma2 * self.mlp(self.norm2(x_BND))
        return out_BND


class BeitAttention(nn.Module):
    """Self-attention with a learned bias for each relative position and head; keys have no bias of their own."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2 + 3, heads))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor, index_QK: Tensor) -> Tensor:
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        # A x (1 + N) x (1 + N) values, 630 MB at 896x896 in float32: made in the run dtype, alive in one layer only.
        table_AT = self.relative_position_bias_table.T.contiguous()
        bias_AQK = table_AT.index_select(1, index_QK.flatten()).unflatten(1, index_QK.shape)
        mixed_BND = attend(F.linear(x_BND, self.qkv.weight, qkv_bias), self.heads, bias_AQK)
        out_BND: Tensor = self.proj(mixed_BND)
        return out_BND


class BeitBlock(nn.Module):
    """As `ViTBlock`, with BEiT's attention: tokens (B, 1 + N, D), class token first."""

    def __init__(self, dim: int, heads: int, window: int, *, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = BeitAttention(dim, heads, window)
        self.gamma_1 = nn.Parameter(torch.ones(dim))
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim)
        self.gamma_2 = nn.Parameter(torch.ones(dim))

    def forward(self, x_BND: Tensor, index_QK: Tensor) -> Tensor:
        x_BND = x_BND + self.gamma_1 * self.attn(self.norm1(x_BND), index_QK)
        out_BND: Tensor = x_BND + self.gamma_2 * self.mlp(self.norm2(x_BND))
        return out_BND


class PerceiverAttention(nn.Module):
    """Self-attention without position terms, under Uni-Perceiver's names."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        out_BND: Tensor = self.out_proj(attend(self.in_proj(x_BND), self.heads))
        return out_BND


class PerceiverLayer(nn.Module):
    """As `ViTBlock`, under Uni-Perceiver's names."""

    def __init__(self, dim: int, heads: int, *, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.self_attn = PerceiverAttention(dim, heads)
        self.gamma_1 = nn.Parameter(torch.ones(dim))
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.linear1 = nn.Linear(dim, MLP_RATIO * dim)
        self.linear2 = nn.Linear(MLP_RATIO * dim, dim)
        self.gamma_2 = nn.Parameter(torch.ones(dim))

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.gamma_1 * self.self_attn(self.norm1(x_BND))
        out_BND: Tensor = x_BND + self.gamma_2 * self.linear2(F.gelu(self.linear1(self.norm2(x_BND))))
        return out_BND


class PerceiverPatchEmbed(PatchEmbed):
    """Patch tokens plus spatial positions (stored for 14x14, resized) plus the time position of a single frame."""

    def __init__(self, dim: int, stored_grid: int) -> None:
        super().__init__(dim)
        self.spatial_pos_embed = nn.Embedding(stored_grid**2, dim)
        self.temporal_pos_embed = nn.Embedding(PERCEIVER_FRAMES, dim)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        grid = (images_BCHW.shape[2] // PATCH, images_BCHW.shape[3] // PATCH)
        spatial_ND = resize_positions(self.spatial_pos_embed.weight, grid)
        return super().forward(images_BCHW) + spatial_ND + self.temporal_pos_embed.weight[0]


class PerceiverEmbed(nn.Module):
    """Image (B, 3, H, W) -> normalised tokens (B, N, D) of Uni-Perceiver."""

    def __init__(self, dim: int, stored_grid: int, *, eps: float) -> None:
        super().__init__()
        self.patch_embed = PerceiverPatchEmbed(dim, stored_grid)
        self.embeddings_norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        tokens_BND: Tensor = self.embeddings_norm(self.patch_embed(images_BCHW))
        return tokens_BND
