"""How does ViT-Adapter exchange information between its convolutional pyramid and the plain transformer.

After Chen et al., "Vision Transformer Adapter for Dense Predictions", arXiv 2205.08534, sections 3.2-3.4, with the
deformable attention of Zhu et al., "Deformable DETR", arXiv 2010.04159, section 4.1. Names of parameters are those of
the published checkpoints. What only the finer output maps f1-f3 need is not here.

A scale is the (rows, columns) of one map. The pyramid is one token sequence: the scales at stride 8, 16 and 32, each
row-major, one after the other.

Legend: B batch, C channels, H W rows and columns of a map, N tokens of the trunk, P tokens of the pyramid, Q queries,
V values (tokens that are sampled), D width, E width of one head's values, A heads, Y = B A, L scales of the values, K
points a scale, X the pair (x, y).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POINTS = 4
PYRAMID_SCALES = 3
FFN_SHRINK = 4

Scale = tuple[int, int]


def tokens_of(scales: Sequence[Scale]) -> list[int]:
    """Number of tokens of each scale."""
    return [rows * columns for rows, columns in scales]


def cell_centres(scales: Sequence[Scale], device: torch.device) -> Tensor:
    """Centres (x, y) of all cells of all scales as fractions of the image: (Q, 2) float32, in token order."""
    centres = []
    for rows, columns in scales:
        y = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) / rows
        x = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) / columns
        centres.append(torch.stack([x.repeat(rows), y.repeat_interleave(columns)], dim=-1))
    return torch.cat(centres)


class DeformableAttention(nn.Module):
    """Each query averages a few bilinear samples of each value map, at places and with weights that it predicts.

    Places are cell centre + offset, offsets in cells of the sampled map; outside a map there are zeros. Places, weights
    and samples are float32 in every run dtype: bfloat16 rounds a place near 0.9 by up to 0.002, of 112 cells 0.2 cells.
    """

    def __init__(self, dim: int, heads: int, scales: int, value_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        values = int(dim * value_ratio)
        self.sampling_offsets = nn.Linear(dim, heads * scales * POINTS * 2)
        self.attention_weights = nn.Linear(dim, heads * scales * POINTS)
        self.value_proj = nn.Linear(dim, values)
        self.output_proj = nn.Linear(values, dim)

    def forward(
        self, query_BQD: Tensor, query_scales: Sequence[Scale], value_BVD: Tensor, value_scales: Sequence[Scale]
    ) -> Tensor:
        shape = (self.heads, len(value_scales), POINTS)
        offsets_BQALKX = self.sampling_offsets(query_BQD).float().unflatten(2, (*shape, 2))
        weights_BQALK = self.attention_weights(query_BQD).float().unflatten(2, (self.heads, -1)).softmax(-1)
        weights_BAQLK = weights_BQALK.unflatten(3, shape[1:]).transpose(1, 2)
        value_BAEV = self.value_proj(value_BVD).float().unflatten(2, (self.heads, -1)).permute(0, 2, 3, 1)
        centres_QX = cell_centres(query_scales, query_BQD.device)
        gathered_YEQ: Tensor | None = None
        for level, map_BAEV in enumerate(value_BAEV.split(tokens_of(value_scales), dim=3)):
            rows, columns = value_scales[level]
            cells = torch.tensor([columns, rows], dtype=torch.float32, device=query_BQD.device)
            places_BQAKX = centres_QX[:, None, None] + offsets_BQALKX[:, :, :, level] / cells
            sampled_YEQK = F.grid_sample(
                map_BAEV.flatten(0, 1).unflatten(2, (rows, columns)),
                (2 * places_BQAKX - 1).transpose(1, 2).flatten(0, 1),
                mode="bilinear",
                padding_mode="zeros",
                align_corners=False,
            )
            part_YEQ = (sampled_YEQK * weights_BAQLK[:, :, :, level].flatten(0, 1)[:, None]).sum(-1)
            gathered_YEQ = part_YEQ if gathered_YEQ is None else gathered_YEQ + part_YEQ
        assert gathered_YEQ is not None
        gathered_BQD = gathered_YEQ.unflatten(0, (-1, self.heads)).permute(0, 3, 1, 2).flatten(2)
        out_BQD: Tensor = self.output_proj(gathered_BQD.to(query_BQD.dtype))
        return out_BQD


class DepthwiseConv(nn.Module):
    """One 3x3 convolution a channel, the same one for each scale of a token sequence."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x_BPD: Tensor, scales: Sequence[Scale]) -> Tensor:
        parts = x_BPD.transpose(1, 2).split(tokens_of(scales), dim=2)
        maps = [self.dwconv(part.unflatten(2, scale)) for part, scale in zip(parts, scales, strict=True)]
        return torch.cat([each.flatten(2) for each in maps], dim=2).transpose(1, 2)


class ConvFfn(nn.Module):
    """A narrow MLP with a depthwise convolution before its exact GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim // FFN_SHRINK)
        self.dwconv = DepthwiseConv(dim // FFN_SHRINK)
        self.fc2 = nn.Linear(dim // FFN_SHRINK, dim)

    def forward(self, x_BPD: Tensor, scales: Sequence[Scale]) -> Tensor:
        out_BPD: Tensor = self.fc2(F.gelu(self.dwconv(self.fc1(x_BPD), scales)))
        return out_BPD


class Injector(nn.Module):
    """Trunk tokens look at the whole pyramid; `gamma` says per channel how much of what they see is added."""

    def __init__(self, dim: int, heads: int, value_ratio: float, *, eps: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=eps)
        self.feat_norm = nn.LayerNorm(dim, eps=eps)
        self.attn = DeformableAttention(dim, heads, PYRAMID_SCALES, value_ratio)
        self.gamma = nn.Parameter(torch.zeros(dim))  # the paper starts it at zero, section 3.4

    def forward(self, x_BND: Tensor, grid: Scale, pyramid_BPD: Tensor, scales: Sequence[Scale]) -> Tensor:
        seen_BND = self.attn(self.query_norm(x_BND), [grid], self.feat_norm(pyramid_BPD), scales)
        out_BND: Tensor = x_BND + self.gamma * seen_BND
        return out_BND


class Extractor(nn.Module):
    """Tokens of the pyramid look at the trunk, then at their neighbours of the same scale.

    No scale reads another one here, so any subset of the scales may be given.
    """

    def __init__(self, dim: int, heads: int, value_ratio: float, *, eps: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=eps)
        self.feat_norm = nn.LayerNorm(dim, eps=eps)
        self.attn = DeformableAttention(dim, heads, 1, value_ratio)
        self.ffn_norm = nn.LayerNorm(dim, eps=eps)
        self.ffn = ConvFfn(dim)

    def forward(self, pyramid_BPD: Tensor, scales: Sequence[Scale], x_BND: Tensor, grid: Scale) -> Tensor:
        seen_BPD = self.attn(self.query_norm(pyramid_BPD), scales, self.feat_norm(x_BND), [grid])
        pyramid_BPD = pyramid_BPD + seen_BPD
        out_BPD: Tensor = pyramid_BPD + self.ffn(self.ffn_norm(pyramid_BPD), scales)
        return out_BPD


class Interaction(nn.Module):
    """The injector before a group of trunk blocks and the extractors after it (`extra` more than one)."""

    def __init__(self, dim: int, heads: int, value_ratio: float, *, extra: int, eps: float) -> None:
        super().__init__()
        self.injector = Injector(dim, heads, value_ratio, eps=eps)
        self.extractor = Extractor(dim, heads, value_ratio, eps=eps)
        self.extra_extractors = nn.ModuleList(Extractor(dim, heads, value_ratio, eps=eps) for _ in range(extra))

    def extract(self, pyramid_BPD: Tensor, scales: Sequence[Scale], x_BND: Tensor, grid: Scale) -> Tensor:
        """All extractors one after the other."""
        for extractor in (self.extractor, *self.extra_extractors):
            pyramid_BPD = extractor(pyramid_BPD, scales, x_BND, grid)
        return pyramid_BPD


class SpatialPrior(nn.Module):
    """Image (B, 3, H, W) -> maps of the trunk's width at stride 8, 16 and 32 (section 3.2); `width` of the stem."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_conv_norm_relu(3, width, stride=2),
            *_conv_norm_relu(width, width, stride=1),
            *_conv_norm_relu(width, width, stride=1),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*_conv_norm_relu(width, 2 * width, stride=2))
        self.conv3 = nn.Sequential(*_conv_norm_relu(2 * width, 4 * width, stride=2))
        self.conv4 = nn.Sequential(*_conv_norm_relu(4 * width, 4 * width, stride=2))
        self.fc2 = nn.Conv2d(2 * width, dim, 1)
        self.fc3 = nn.Conv2d(4 * width, dim, 1)
        self.fc4 = nn.Conv2d(4 * width, dim, 1)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stride8 = self.conv2(self.stem(images_BCHW))
        stride16 = self.conv3(stride8)
        stride32 = self.conv4(stride16)
        return self.fc2(stride8), self.fc3(stride16), self.fc4(stride32)


def _conv_norm_relu(in_dim: int, out_dim: int, *, stride: int) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
    return nn.Conv2d(in_dim, out_dim, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(out_dim), nn.ReLU()
