"""Which timm networks are frozen encoders, and where are they tapped: ViT before its last block, MaxViT at a stage.

ViT follows prismatic-vlms (Karamcheti et al., "Prismatic VLMs", arXiv 2402.07865, section 4.2): tokens of the
second-to-last block, without the final norm, class token dropped. MaxViT (Tu et al., arXiv 2204.01697) gives the raw
map of one stage. timm supplies the networks; what follows the tap is removed before any weight is loaded.

A catalogue row's `arch` either names a published network, {"timm_id": "vit_tiny_patch16_224.augreg_in21k"}, or gives
the sizes of a small one, {"patch_size": 8, "embed_dim": 96, ...} for a ViT and {"embed_dim": (32, 96, 128), ...} for a
MaxViT; `tap` (MaxViT) counts stages from 1.

Legend: B batch, C channels, H W pixels of an image or a map, N tokens, D token width.
"""

from __future__ import annotations

from typing import Any

from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import create_model
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vlmx.errors import UsageError
from vlmx.extract.backbones.base import FamilyNet
from vlmx.extract.backbones.catalogue import BackboneRow
from vlmx.extract.weights import strip_prefix

MAXVIT_PUBLISHED_TAP = 3


class TimmViT(FamilyNet):
    """A timm VisionTransformer without its last block: images (B, 3, H, W) -> tokens (B, N, D) of the block before.

    Position embeddings of a checkpoint made for another grid are resampled (bicubic with antialiasing, timm's rule).
    """

    def __init__(self, net: VisionTransformer) -> None:
        super().__init__()
        self.last_block = len(net.blocks) - 1
        net.prune_intermediate_layers(indices=[self.last_block - 1], prune_norm=True, prune_head=True)
        self.net = net
        self.grid = (int(net.patch_embed.grid_size[0]), int(net.patch_embed.grid_size[1]))
        self.dim = net.embed_dim
        self.feature = "second-to-last-block"
        self.out_norm = "none"
        self.forward_version = 1

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Published timm names -> own names; the last block, the final norms and the heads are dropped."""
        dropped = (f"blocks.{self.last_block}.", "norm.", "fc_norm.", "head.", "head_drop.", "pre_logits.")
        state = strip_prefix(state, "module.")
        kept = {f"net.{name}": value for name, value in state.items() if not name.startswith(dropped)}
        position = kept.get("net.pos_embed")
        if position is not None and position.ndim == 3 and position.shape != self.state_dict()["net.pos_embed"].shape:
            kept["net.pos_embed"] = resample_abs_pos_embed(
                position, list(self.grid), num_prefix_tokens=self.net.num_prefix_tokens
            )
        return kept

    def forward(self, images_BCHW: Tensor) -> Tensor:
        taken: Any = self.net.forward_intermediates(  # without the prefix tokens
            images_BCHW, indices=[self.last_block - 1], norm=False, output_fmt="NLC", intermediates_only=True
        )
        tokens_BND: Tensor = taken[0]
        return tokens_BND


class TimmMaxViT(FamilyNet):
    """A timm MaxViT up to stage `tap` (from 1): images (B, 3, H, W) -> that stage's raw map as tokens (B, N, D).

    Window and grid sizes, and with them the relative-position tables, belong to one image size, so a checkpoint
    serves only the size that it was made for.
    """

    def __init__(self, net: MaxxVit, *, res: tuple[int, int], tap: int) -> None:
        super().__init__()
        self.tap = tap
        self.stages_total = len(net.stages)
        described: list[dict[str, Any]] = list(net.feature_info)  # the stem, then the stages
        stride = described[tap]["reduction"]
        net.prune_intermediate_layers(indices=[tap], prune_norm=True, prune_head=True)
        self.net = net
        self.grid = (res[0] // stride, res[1] // stride)
        self.dim = described[tap]["num_chs"]
        self.feature = f"stage{tap}"
        self.out_norm = "none"
        self.forward_version = 1

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Published timm names -> own names; later stages, the final norm and the head are dropped."""
        after = tuple(f"stages.{index}." for index in range(self.tap, self.stages_total))
        dropped = (*after, "norm.", "head.")
        state = strip_prefix(state, "module.")
        return {f"net.{name}": value for name, value in state.items() if not name.startswith(dropped)}

    def forward(self, images_BCHW: Tensor) -> Tensor:
        map_BDHW = self.net.stages(self.net.stem(images_BCHW))
        tokens_BND: Tensor = map_BDHW.flatten(2).transpose(1, 2)
        return tokens_BND


def build(row: BackboneRow, res: tuple[int, int]) -> FamilyNet:
    """The frozen-feature network of a catalogue row of family "vit" or "maxvit", with fresh random weights.

    Raises:
        UsageError: the family cannot take images of this size.
    """
    net = build_classifier(row, res, num_classes=0)
    if row.family == "vit":
        return TimmViT(net)
    return TimmMaxViT(net, res=res, tap=row.arch.get("tap", MAXVIT_PUBLISHED_TAP))


def build_classifier(row: BackboneRow, res: tuple[int, int], num_classes: int) -> Any:
    """The whole timm network of a row, images -> logits (B, `num_classes`), for pretraining; published key names.

    Raises:
        UsageError: the family cannot take images of this size.
    """
    _check_size(row, res)
    if "timm_id" in row.arch:
        return create_model(row.arch["timm_id"], pretrained=False, num_classes=num_classes, img_size=res)
    if row.family == "vit":
        return VisionTransformer(img_size=res, num_classes=num_classes, **row.arch)
    return MaxxVit(_small_maxvit(row.arch), img_size=res, num_classes=num_classes)


def _small_maxvit(arch: Any) -> MaxxVitCfg:
    """A MaxViT of few small stages; one window size that divides the map of every stage."""
    return MaxxVitCfg(
        embed_dim=tuple(arch["embed_dim"]),
        depths=tuple(arch["depths"]),
        block_type=("M",) * len(arch["depths"]),
        stem_width=arch["stem_width"],
        conv_cfg=MaxxVitConvCfg(expand_ratio=arch["conv_expand_ratio"], expand_output=False),
        transformer_cfg=MaxxVitTransformerCfg(
            dim_head=arch["dim_head"], expand_ratio=arch["mlp_ratio"], window_size=(arch["window"],) * 2
        ),
    )


def _check_size(row: BackboneRow, res: tuple[int, int]) -> None:
    if row.family == "maxvit":
        if res != row.native_res:
            raise UsageError(
                f"{row.name} cannot take images of {res[0]}x{res[1]} pixels",
                why="a MaxViT's windows and position tables are made for one image size",
                fix=f"use --res {row.native_res[0]}x{row.native_res[1]}, or this backbone's variant for your size",
            )
    elif min(res) < row.stride or res[0] % row.stride or res[1] % row.stride:
        raise UsageError(
            f"{row.name} cannot take images of {res[0]}x{res[1]} pixels",
            why=f"it cuts the image into patches of {row.stride}x{row.stride} pixels",
            fix=f"use multiples of {row.stride}, e.g. {max(res[0] // row.stride, 1) * row.stride}x"
            f"{max(res[1] // row.stride, 1) * row.stride}",
        )
