"""Which timm networks are frozen encoders, and where are they tapped: ViT before its last block, MaxViT at a stage.

ViT, CLIP, SigLIP and DINOv2 follow prismatic-vlms (Karamcheti et al., "Prismatic VLMs", arXiv 2402.07865, section 4.2):
tokens of the second-to-last block, without the final norm, class and register tokens dropped. MaxViT (Tu et al., arXiv
2204.01697) gives the raw map of one stage. timm supplies the networks; what follows the tap is removed before any
weight is loaded.

A catalogue row's `arch` either names a published network, {"timm_id": "vit_tiny_patch16_224.augreg_in21k"}, or gives
the sizes of a small one, {"patch_size": 8, "embed_dim": 96, ...} for a ViT and {"embed_dim": (32, 96, 128), ...} for a
MaxViT; `tap` (MaxViT) counts stages from 1. `trained_side` stands beside a timm id whose published weights are for
other images than the row's native size.

Legend: B batch, C channels, H W pixels of an image or a map, N tokens, D token width.
"""

from __future__ import annotations

import math
import re
from typing import Any

from timm.models import create_model
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from vlmx.errors import UsageError, WeightsError
from vlmx.extract.backbones.base import FamilyNet
from vlmx.extract.backbones.row import BackboneRow
from vlmx.extract.weights import unwrapped

MAXVIT_PUBLISHED_TAP = 3
DEFAULT_BLOCK = -2
# names of the position embeddings, (1, tokens, width) or (tokens, width), in timm's, OpenCLIP's and OpenAI's files
_POSITIONS = ("pos_embed", "visual.trunk.pos_embed", "visual.positional_embedding")


class TimmViT(FamilyNet):
    """A timm VisionTransformer up to one block: images (B, 3, H, W) -> that block's patch tokens (B, N, D).

    For other image sizes than the checkpoint's, its position embeddings are resampled (bicubic with antialiasing,
    timm's rule).

    Args:
        net: the whole network.
        block: index of the block whose output is taken; negative ones count from the end.
        trained_side: side in pixels of the (square) images that the checkpoint was trained with. A file with another
            number of positions is the file of another backbone.
    """

    def __init__(self, net: VisionTransformer, *, block: int, trained_side: int) -> None:
        super().__init__()
        self.trained_side = trained_side
        depth = len(net.blocks)
        if not -depth <= block < depth:
            raise UsageError(
                f"block={block} does not exist", why=f"the network has {depth} blocks", fix=f"use -{depth}..{depth - 1}"
            )
        self.block = block % depth
        net.prune_intermediate_layers(indices=[self.block], prune_norm=True, prune_head=True)
        self.net = net
        self.grid = (int(net.patch_embed.grid_size[0]), int(net.patch_embed.grid_size[1]))
        self.dim = net.embed_dim
        self.feature = f"blocks.{self.block}"
        self.out_norm = "none"
        self.forward_version = 1

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """timm's, OpenCLIP's, OpenAI's or DINOv2's names -> own names; later blocks, final norms and heads go."""
        state = unwrapped(state)
        self._refuse_other_sizes(state)
        state = _timm_names(self.net, state)
        dropped = ("norm.", "fc_norm.", "head.", "head_drop.", "attn_pool.")
        return {
            f"net.{name}": value
            for name, value in state.items()
            if not name.startswith(dropped) and not self._is_past_the_tap(name)
        }

    def published_name(self, own: str) -> str:
        return own.removeprefix("net.")

    def _refuse_other_sizes(self, state: dict[str, Tensor]) -> None:
        """Raise for weights of the same network that were trained with images of another size."""
        patch = int(self.net.patch_embed.patch_size[0])
        expected = (self.trained_side // patch) ** 2
        for name in _POSITIONS:
            stored = state[name].shape[-2] if name in state and state[name].ndim in (2, 3) else expected
            if not expected <= stored <= expected + self.net.num_prefix_tokens:
                side = math.isqrt(stored) * patch
                raise WeightsError(
                    f"the weights were trained with images of {side}x{side} pixels, those of this backbone with "
                    f"{self.trained_side}x{self.trained_side}",
                    why=f"{name} is {tuple(state[name].shape)}",
                    fix="give the file that 'vlmx list backbones' shows for this backbone, or choose another backbone",
                )

    def _is_past_the_tap(self, name: str) -> bool:
        block = re.match(r"blocks\.(\d+)\.", name)
        return block is not None and int(block[1]) > self.block

    def forward(self, images_BCHW: Tensor) -> Tensor:
        taken: Any = self.net.forward_intermediates(  # without the prefix tokens
            images_BCHW, indices=[self.block], norm=False, output_fmt="NLC", intermediates_only=True
        )
        tokens_BND: Tensor = taken[0]
        return tokens_BND


def _timm_names(net: VisionTransformer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's own conversion of published ViT layouts, with position embeddings for the size of `net`.

    A state dict that the conversion cannot read, or whose patches have another size (which it would resample), is left
    as it is: the strict load that follows names what does not fit.
    """
    patches = state.get("patch_embed.proj.weight")
    if patches is not None and patches.shape != net.patch_embed.proj.weight.shape:
        return state
    try:
        converted: dict[str, Tensor] = checkpoint_filter_fn(state, net)
    except (RuntimeError, KeyError, AssertionError, ValueError):
        return state
    return converted


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
        state = unwrapped(state)
        return {f"net.{name}": value for name, value in state.items() if not name.startswith(dropped)}

    def published_name(self, own: str) -> str:
        return own.removeprefix("net.")

    def forward(self, images_BCHW: Tensor) -> Tensor:
        map_BDHW = self.net.stages(self.net.stem(images_BCHW))
        tokens_BND: Tensor = map_BDHW.flatten(2).transpose(1, 2)
        return tokens_BND


def build_vit(row: BackboneRow, res: tuple[int, int], *, block: int | None = None) -> TimmViT:
    """The frozen-feature network of a ViT, CLIP, SigLIP or DINOv2 row, with fresh random weights.

    Args:
        block: which block's output the tokens are; negative ones count from the end; None for the second to last.

    Raises:
        UsageError: there is no such block.
    """
    net = build_classifier(row, res, num_classes=0)
    return TimmViT(
        net,
        block=DEFAULT_BLOCK if block is None else _integer(block),
        trained_side=row.arch.get("trained_side", row.native_res[0]),
    )


def build_maxvit(row: BackboneRow, res: tuple[int, int]) -> TimmMaxViT:
    """The frozen-feature network of a MaxViT row, with fresh random weights."""
    net = build_classifier(row, res, num_classes=0)
    return TimmMaxViT(net, res=res, tap=row.arch.get("tap", MAXVIT_PUBLISHED_TAP))


def build_classifier(row: BackboneRow, res: tuple[int, int], num_classes: int) -> Any:
    """The whole timm network of a row, images -> logits (B, `num_classes`), for pretraining; published key names."""
    if "timm_id" in row.arch:
        return create_model(row.arch["timm_id"], pretrained=False, num_classes=num_classes, img_size=res)
    if row.family == "vit":
        return VisionTransformer(img_size=res, num_classes=num_classes, **row.arch)
    return MaxxVit(_small_maxvit(row.arch), img_size=res, num_classes=num_classes)


def _integer(block: object) -> int:
    if type(block) is not int:
        raise UsageError(f"block={block!r} is no block", fix="give an integer; -2 is the second to last block")
    return block


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
