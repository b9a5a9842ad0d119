"""What is "timm:ID.TAG"? Any model of timm whose intermediate features can be had, without a row in the catalogue.

A VisionTransformer is tapped as the catalogue's ViTs are. Of other networks, those whose blocks all have one stride
give the output of the second-to-last block, the others their last map of stride 16 (their deepest map, if none has it).

Legend: B images, C channels, H x W pixels of an image or cells of a map, N tokens, D token width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import timm
import torch
from timm.models import create_model, get_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vlmx.errors import UsageError
from vlmx.extract.backbones.base import FamilyNet
from vlmx.extract.backbones.row import BackboneRow
from vlmx.extract.backbones.timm_models import DEFAULT_BLOCK, TimmViT, build_vit
from vlmx.extract.weights import unwrapped
from vlmx.registry import unknown_name

STRIDE = 16


class TimmFeatures(FamilyNet):
    """Any timm network up to one of its feature maps: images (B, 3, H, W) -> the raw map as tokens (B, N, D).

    Args:
        timm_id: "id.tag".
        block: index of the feature; negative ones count from the end; None for the rule of this module.
    """

    forward_version = 1
    out_norm = "none"

    def __init__(self, timm_id: str, res: tuple[int, int], *, block: int | None) -> None:
        super().__init__()
        net = _network(timm_id, res)
        described = _described(net, timm_id)
        self.index = _chosen([each["reduction"] for each in described], block, timm_id)
        whole = set(net.state_dict()) | _tables(net)
        net.prune_intermediate_layers(indices=[self.index], prune_norm=True, prune_head=True)
        self.past_the_tap = whole - set(net.state_dict())
        self.net = net
        self.feature = str(described[self.index].get("module", f"feature{self.index}"))
        self.grid, self.dim = _map_shape(timm_id, res, self.index)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """timm's names -> own names; what follows the tap, and tables that are computed, are dropped."""
        state = unwrapped(state)
        return {f"net.{name}": value for name, value in state.items() if name not in self.past_the_tap}

    def published_name(self, own: str) -> str:
        return own.removeprefix("net.")

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return _map_of(self.net, images_BCHW, self.index).flatten(2).transpose(1, 2)


def build(row: BackboneRow, res: tuple[int, int], *, block: int | None = None) -> FamilyNet:
    """The frozen-feature network of a "timm:" row, with fresh random weights.

    Args:
        block: which block's output (for networks of stages: which feature map) the tokens are.

    Raises:
        UsageError: there is no such block.
    """
    if row.sizes == "patch":
        return build_vit(row, res, block=block)
    return TimmFeatures(row.arch["timm_id"], res, block=block)


@cache
def timm_row(timm_id: str) -> BackboneRow:
    """The row of a timm model, from what timm knows about its weights.

    Raises:
        UnknownNameError: timm has no such model.
        UsageError: several sets of weights have this id, and no tag says which; or its features cannot be had.
    """
    full_id = _with_tag(timm_id)
    cfg: Any = get_pretrained_cfg(full_id)
    res = (int(cfg.input_size[1]), int(cfg.input_size[2]))
    with torch.device("meta"):
        whole = _network(full_id, res)
        is_vit = type(whole) is VisionTransformer
        net: FamilyNet = (
            TimmViT(whole, block=DEFAULT_BLOCK, trained_side=res[0])
            if is_vit
            else TimmFeatures(full_id, res, block=None)
        )
    repository = cfg.hf_hub_id or ""
    in_hub = cfg.hf_hub_filename or "model.safetensors"
    uncropped = "siglip" in full_id or "in1k" in full_id  # ids that prismatic-vlms does not crop
    return BackboneRow(
        name=f"timm:{full_id}",
        family="timm",
        builder="vlmx.extract.backbones.timm_any:build",
        arch={"timm_id": full_id},
        pretraining=full_id.partition(".")[2] or "not stated",
        native_res=res,
        grid=net.grid,
        dim=net.dim,
        params=sum(parameter.numel() for parameter in net.parameters()),
        mean=cfg.mean,
        std=cfg.std,
        file=f"{full_id}.safetensors",
        url=f"https://huggingface.co/{repository}/resolve/main/{in_hub}" if repository else cfg.url or "",
        licence=cfg.license or "not stated",
        published_size="",
        sizes="patch" if is_vit else "fixed" if cfg.fixed_input_size else "any",
        size_step=int(whole.patch_embed.patch_size[0]) if is_vit else 32,
        crop_pct=1.0 if uncropped else cfg.crop_pct,
    )


def _with_tag(timm_id: str) -> str:
    """The id with its tag; one that is missing is filled in where there is only one."""
    if not timm.is_model(timm_id.partition(".")[0]):
        raise unknown_name("timm model", timm_id, timm.list_models())
    name, _, tag = timm_id.partition(".")
    tags = [each.partition(".")[2] for each in timm.list_models(f"{name}.*", pretrained=True)]
    if tag in tags or (not tag and not tags):
        return timm_id
    if tag:
        raise unknown_name(f"tag of the timm model {name}", tag, tags)
    if len(tags) > 1:
        raise UsageError(
            f"'timm:{name}' does not say which weights",
            why=f"timm has several for it: {', '.join(tags)}",
            fix=f"add the tag, e.g. timm:{name}.{tags[0]}",
        )
    return f"{name}.{tags[0]}"


def _network(timm_id: str, res: tuple[int, int]) -> Any:
    """The whole network with its head; networks that know their image size are made for `res`."""
    try:
        return create_model(timm_id, pretrained=False, img_size=res)
    except TypeError:  # a convolutional network has no image size
        return create_model(timm_id, pretrained=False)


def _tables(net: Any) -> set[str]:
    """Names of what a network computes from its size, e.g. index tables; older files hold them."""
    return {
        f"{path}.{name}".removeprefix(".")
        for path, module in net.named_modules()
        for name in module._non_persistent_buffers_set
    }


def _described(net: Any, timm_id: str) -> list[dict[str, Any]]:
    described = list(getattr(net, "feature_info", []))
    if not described or not hasattr(net, "forward_intermediates") or not hasattr(net, "prune_intermediate_layers"):
        raise UsageError(
            f"timm:{timm_id} cannot be an encoder",
            why="timm gives no intermediate features of this network",
            fix="choose another model, or add this one as a plug-in",
        )
    return described


def _chosen(strides: list[int], block: int | None, timm_id: str) -> int:
    """Index of the feature that the tokens are."""
    count = len(strides)
    if block is not None:
        if type(block) is not int or not -count <= block < count:
            raise UsageError(f"timm:{timm_id} has no feature {block!r}", fix=f"use -{count}..{count - 1}")
        return block % count
    if len(set(strides)) == 1 and count > 1:
        return count - 2
    return max((index for index, stride in enumerate(strides) if stride == STRIDE), default=count - 1)


def _map_of(net: Any, images_BCHW: Tensor, index: int) -> Tensor:
    taken: Any = net.forward_intermediates(images_BCHW, indices=[index], stop_early=True, intermediates_only=True)
    map_BDHW: Tensor = taken[0]
    return map_BDHW


@cache
def _map_shape(timm_id: str, res: tuple[int, int], index: int) -> tuple[tuple[int, int], int]:
    """Grid and width of a feature, by a pass on the meta device, which computes nothing."""
    with torch.device("meta"):
        net = _network(timm_id, res).eval()
        _, dim, rows, columns = _map_of(net, torch.empty(1, 3, *res), index).shape
    return (rows, columns), dim
