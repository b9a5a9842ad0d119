"""How does ViTDet turn an image into tokens? timm's `samvit` network runs detectron2's weights.

Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (arXiv 2203.16527); weights of
detectron2's ViTDet project. Attention is windowed except in four global blocks; there is no final norm. The map that
the detector's pyramid is made of is "last_feat", `embed_dim` wide; the pyramid's level of the same stride, "p4", is
256 wide.

Legend: B images, C channels, H x W pixels of an image or cells of a map, N tokens, D token width.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from vlmx.errors import UsageError
from vlmx.extract.backbones.base import FamilyNet
from vlmx.extract.backbones.row import BackboneRow
from vlmx.extract.weights import backbone_of_detector

Feature = Literal["last_feat", "p4"]
_FEATURES: tuple[Feature, ...] = ("last_feat", "p4")
PATCH, WINDOW, EPS = 16, 14, 1e-6
TRAINED_SIDE = 1024  # the global blocks' relative-position tables are made for it, and resized for other sizes
PRETRAINED_GRID = 14  # of the position embeddings, a row for the class token before them
PYRAMID_WIDTH = 256


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _NormedConv(nn.Conv2d):
    """A convolution without bias, then a norm over channels; parameters `weight`, `norm.weight`, `norm.bias`."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int) -> None:
        super().__init__(dim_in, dim_out, kernel, padding=kernel // 2, bias=False)
        self.norm = ChannelNorm(dim_out, eps=EPS)

    def forward(self, input: Tensor) -> Tensor:
        normed: Tensor = self.norm(super().forward(input))
        return normed


class ViTDet(FamilyNet):
    """The plain ViT of a ViTDet detector, with or without its pyramid's stride-16 level.

    Images (B, 3, H, W) -> tokens (B, N, D), one for 16x16 pixels, row-major.

    Args:
        res: (height, width) of the images, multiples of 16.
        feature: "last_feat", the output of the last block, or "p4", the pyramid's level made from it.
        embed_dim, depth, num_heads: of the ViT.
        global_blocks: indices of the blocks whose attention is not windowed.
    """

    forward_version = 1
    out_norm = "none"
    keep_float32 = ("pos_embed",)

    def __init__(
        self,
        *,
        res: tuple[int, int],
        feature: Feature,
        embed_dim: int,
        depth: int,
        num_heads: int,
        global_blocks: tuple[int, ...],
    ) -> None:
        super().__init__()
        norm: Any = partial(nn.LayerNorm, eps=EPS)  # timm's own default is 1e-5
        net = VisionTransformerSAM(
            img_size=TRAINED_SIDE,
            patch_size=PATCH,
            num_classes=0,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            norm_layer=norm,
            use_rel_pos=True,
            window_size=WINDOW,
            global_attn_indexes=global_blocks,
            neck_chans=0,
        )
        net.prune_intermediate_layers(indices=[depth - 1], prune_norm=True, prune_head=True)
        self.feature = feature
        self.grid = (res[0] // PATCH, res[1] // PATCH)
        self.dim = embed_dim if feature == "last_feat" else PYRAMID_WIDTH
        net.pos_embed = nn.Parameter(net.pos_embed.new_zeros(1, 1 + PRETRAINED_GRID**2, embed_dim))
        nn.init.trunc_normal_(net.pos_embed, std=0.02)
        self.net = net
        if feature == "p4":
            self.simfp_4 = nn.Sequential(
                _NormedConv(embed_dim, PYRAMID_WIDTH, 1), _NormedConv(PYRAMID_WIDTH, PYRAMID_WIDTH, 3)
            )

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names of a detector, of its backbone, or of the ViT alone; heads and unused pyramid levels are dropped."""
        state = backbone_of_detector(state)
        if not any(key.startswith("net.") for key in state):
            state = {f"net.{key}": value for key, value in state.items()}
        levels = ("simfp_2.", "simfp_3.", "simfp_5.", *(() if self.feature == "p4" else ("simfp_4.",)))
        return {key: value for key, value in state.items() if not key.startswith(levels)}

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BHWD: Tensor = self.net.patch_embed(images_BCHW)
        x_BHWD = x_BHWD + self._positions().to(x_BHWD.dtype)
        for block in self.net.blocks:
            x_BHWD = block(x_BHWD)
        if self.feature == "p4":
            x_BHWD = self.simfp_4(x_BHWD.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x_BHWD.flatten(1, 2)

    def _positions(self) -> Tensor:
        """(1, rows, columns, D) in float32, resized to the grid: bicubic, without antialiasing, as detectron2 does.

        timm's own resizing antialiases, which gives other values even when it enlarges.
        """
        side = PRETRAINED_GRID
        map_1DHW: Tensor = self.net.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        if self.grid != (side, side):
            map_1DHW = F.interpolate(map_1DHW, size=self.grid, mode="bicubic", align_corners=False)
        return map_1DHW.permute(0, 2, 3, 1)


def build(row: BackboneRow, res: tuple[int, int], *, feature: str | None = None) -> ViTDet:
    """The frozen-feature network of a ViTDet row, with fresh random weights.

    Args:
        feature: "last_feat" (the default) or "p4".

    Raises:
        UsageError: another feature is asked for.
    """
    chosen = "last_feat" if feature is None else feature
    known = next((each for each in _FEATURES if each == chosen), None)
    if known is None:
        raise UsageError(f"feature={feature!r} is not known", fix=f"choose one of {', '.join(_FEATURES)}")
    return ViTDet(res=res, feature=known, **row.arch)
