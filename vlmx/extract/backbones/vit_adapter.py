"""How does ViT-Adapter turn an image into tokens: a plain transformer that exchanges with a convolutional pyramid.

An own implementation after Chen et al., "Vision Transformer Adapter for Dense Predictions", arXiv 2205.08534, that
takes the state-dict names of the published ADE20K segmentation checkpoints. Their networks give four maps, f1 to f4 at
stride 4, 8, 16 and 32; the tokens are f4 after its batch norm. What only f1-f3 need is neither built nor computed.

Legend: B batch, C channels, H W pixels of an image, N tokens, P tokens of the pyramid (stride 8, 16, 32 one after
the other), D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmx.extract.backbones.adapter_interactions import (
    PYRAMID_SCALES,
    DeformableAttention,
    Interaction,
    SpatialPrior,
    tokens_of,
)
from vlmx.extract.backbones.adapter_trunks import (
    PATCH,
    BeitBlock,
    PatchEmbed,
    PerceiverEmbed,
    PerceiverLayer,
    ViTBlock,
    relative_position_index,
    resize_positions,
)
from vlmx.extract.backbones.base import FamilyNet
from vlmx.extract.backbones.row import BackboneRow
from vlmx.extract.weights import backbone_of_detector

Flavour = Literal["vit", "beit", "uniperceiver"]

STRIDE = 32
EXTRA_EXTRACTORS = 2  # of the last interaction
ONLY_FOR_F1_TO_F3 = ("spm.fc1.", "up.", "norm1.", "norm2.", "norm3.")


@dataclass(frozen=True, kw_only=True)
class AdapterArch:
    """Sizes of a network.

    Attributes:
        embed_dim, depth, num_heads: width, blocks and heads of the trunk.
        interaction_indexes: first and last block, counted from 0, of each group of blocks that an interaction embraces.
        deform_num_heads, deform_ratio: heads of the deformable attention, and width of its values over `embed_dim`.
        conv_inplane: channels of the stem of the pyramid.
        pretrain_grid: side of the stored grid of absolute positions (all but BEiT).
        window: side of the token grid that the relative-position tables are made for (BEiT).
    """

    embed_dim: int
    depth: int
    num_heads: int
    interaction_indexes: tuple[tuple[int, int], ...]
    deform_num_heads: int
    deform_ratio: float
    conv_inplane: int
    pretrain_grid: int = 0
    window: int = 0


class ViTAdapter(FamilyNet):
    """What ViT-Adapter is on every trunk: images (B, 3, H, W) -> tokens (B, N, D) of f4, row-major.

    Args:
        res: image (height, width) in pixels, multiples of 32.
        eps: of every layer norm.
    """

    class_tokens = 0  # tokens of the trunk before those of the patches; the adapter neither reads nor changes them

    def __init__(self, res: tuple[int, int], arch: AdapterArch, *, eps: float) -> None:
        super().__init__()
        self.dim = arch.embed_dim
        self.grid = (res[0] // STRIDE, res[1] // STRIDE)
        self.feature = "f4"
        self.out_norm = "trained"
        self.forward_version = 1
        self.trunk_grid = (res[0] // PATCH, res[1] // PATCH)
        self.groups = arch.interaction_indexes
        self.level_embed = nn.Parameter(torch.zeros(PYRAMID_SCALES, self.dim))
        self.spm = SpatialPrior(arch.conv_inplane, self.dim)
        self.interactions = nn.ModuleList(
            Interaction(
                self.dim,
                arch.deform_num_heads,
                arch.deform_ratio,
                extra=EXTRA_EXTRACTORS if group == self.groups[-1] else 0,
                eps=eps,
            )
            for group in self.groups
        )
        self.norm4 = nn.BatchNorm2d(self.dim)

    @abstractmethod
    def embed(self, images_BCHW: Tensor) -> Tensor:
        """What enters the trunk: (B, class_tokens + N, D), positions included."""

    @abstractmethod
    def run_blocks(self, first: int, last: int, x_BND: Tensor) -> Tensor:
        """Blocks `first` to `last` of the trunk, both included."""

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Published names -> own names: without prefixes, the segmentor's heads and what only f1-f3 need."""
        state = backbone_of_detector(state)
        return {name: value for name, value in state.items() if not name.startswith(ONLY_FOR_F1_TO_F3)}

    def forward(self, images_BCHW: Tensor) -> Tensor:
        maps = self.spm(images_BCHW)
        scales = [(int(each.shape[2]), int(each.shape[3])) for each in maps]
        levels = zip(maps, self.level_embed, strict=True)
        pyramid_BPD = torch.cat([each.flatten(2).transpose(1, 2) + level_D for each, level_D in levels], dim=1)
        x_BND, skip = self.embed(images_BCHW), self.class_tokens
        for (first, last), interaction in zip(self.groups, self.interactions, strict=True):
            assert isinstance(interaction, Interaction)
            injected_BND = interaction.injector(x_BND[:, skip:], self.trunk_grid, pyramid_BPD, scales)
            x_BND = torch.cat([x_BND[:, :skip], injected_BND], dim=1)
            x_BND = self.run_blocks(first, last, x_BND)
            if (first, last) == self.groups[-1]:  # no injector follows, so from here f4 needs the coarsest scale alone
                scales = scales[-1:]
                pyramid_BPD = pyramid_BPD[:, -tokens_of(scales)[0] :]
            pyramid_BPD = interaction.extract(pyramid_BPD, scales, x_BND[:, skip:], self.trunk_grid)
        trunk_BDHW = x_BND[:, skip:].transpose(1, 2).unflatten(2, self.trunk_grid)
        halved_BDHW = F.interpolate(trunk_BDHW, scale_factor=0.5, mode="bilinear", align_corners=False)
        f4_BDHW = self.norm4(pyramid_BPD.transpose(1, 2).unflatten(2, self.grid) + halved_BDHW)
        tokens_BND: Tensor = f4_BDHW.flatten(2).transpose(1, 2)
        return tokens_BND


class ViTTrunkAdapter(ViTAdapter):
    """On a ViT (DeiT or AugReg). Positions include a class token's, though the network has no such token."""

    def __init__(self, res: tuple[int, int], arch: AdapterArch) -> None:
        super().__init__(res, arch, eps=1e-6)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + arch.pretrain_grid**2, self.dim))
        self.patch_embed = PatchEmbed(self.dim)
        self.blocks = nn.ModuleList(ViTBlock(self.dim, arch.num_heads, eps=1e-6) for _ in range(arch.depth))
        _initialise(self)

    def embed(self, images_BCHW: Tensor) -> Tensor:
        tokens_BND: Tensor = self.patch_embed(images_BCHW) + resize_positions(self.pos_embed[0, 1:], self.trunk_grid)
        return tokens_BND

    def run_blocks(self, first: int, last: int, x_BND: Tensor) -> Tensor:
        for block in self.blocks[first : last + 1]:
            x_BND = block(x_BND)
        return x_BND


class BeitAdapter(ViTAdapter):
    """On BEiT, whose relative-position tables are made for one image size, 16 `window` squared."""

    class_tokens = 1

    def __init__(self, res: tuple[int, int], arch: AdapterArch) -> None:
        super().__init__(res, arch, eps=1e-6)
        self.window = arch.window
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.dim))
        self.patch_embed = PatchEmbed(self.dim)
        self.blocks = nn.ModuleList(
            BeitBlock(self.dim, arch.num_heads, arch.window, eps=1e-6) for _ in range(arch.depth)
        )
        _initialise(self)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As for every trunk, also without the index tables that each block stores (1.8 GB at 896x896)."""
        state = super().adapt_state_dict(state)
        return {name: value for name, value in state.items() if not name.endswith(".attn.relative_position_index")}

    def embed(self, images_BCHW: Tensor) -> Tensor:
        patches_BND = self.patch_embed(images_BCHW)
        return torch.cat([self.cls_token.expand(len(patches_BND), -1, -1), patches_BND], dim=1)

    def run_blocks(self, first: int, last: int, x_BND: Tensor) -> Tensor:
        index_QK = relative_position_index(self.window, x_BND.device)
        for block in self.blocks[first : last + 1]:
            x_BND = block(x_BND, index_QK)
        return x_BND


class UniPerceiverAdapter(ViTAdapter):
    """On Uni-Perceiver. Layer norms of trunk and adapter have another epsilon than on the other trunks."""

    def __init__(self, res: tuple[int, int], arch: AdapterArch) -> None:
        super().__init__(res, arch, eps=1e-5)
        self.visual_embed = PerceiverEmbed(self.dim, arch.pretrain_grid, eps=1e-5)
        self.layers = nn.ModuleList(PerceiverLayer(self.dim, arch.num_heads, eps=1e-5) for _ in range(arch.depth))
        _initialise(self)

    def embed(self, images_BCHW: Tensor) -> Tensor:
        tokens_BND: Tensor = self.visual_embed(images_BCHW)
        return tokens_BND

    def run_blocks(self, first: int, last: int, x_BND: Tensor) -> Tensor:
        for layer in self.layers[first : last + 1]:
            x_BND = layer(x_BND)
        return x_BND


_FLAVOURS: dict[Flavour, Callable[[tuple[int, int], AdapterArch], ViTAdapter]] = {
    "vit": ViTTrunkAdapter,
    "beit": BeitAdapter,
    "uniperceiver": UniPerceiverAdapter,
}


def build(row: BackboneRow, res: tuple[int, int]) -> ViTAdapter:
    """The frozen-feature network of a catalogue row, with fresh random weights.

    `row.arch` holds "flavour", one of "vit", "beit" and "uniperceiver", and the attributes of `AdapterArch`.
    """
    sizes = dict(row.arch)
    flavour: Flavour = sizes.pop("flavour")
    return _FLAVOURS[flavour](res, AdapterArch(**sizes))


def _initialise(net: ViTAdapter) -> None:
    """Random start: small normal weights, positions too; sampling points spread over a few cells."""
    for name, parameter in net.named_parameters():
        if name.endswith(("pos_embed", "pos_embed.weight", "cls_token", "level_embed", "bias_table")):
            nn.init.normal_(parameter, std=0.02)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in net.modules():
        if isinstance(module, DeformableAttention):
            nn.init.uniform_(module.sampling_offsets.bias, -4.0, 4.0)
