"""Which backbones exist, and what is fixed about each: network arguments, checkpoint file, input size, normalisation.

Pure data: reading the catalogue imports neither torch nor timm. Another package adds a backbone with an entry point in
the group "vlmx.backbones" whose value is a `BackboneRow`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmx.errors import UsageError
from vlmx.registry import Registry


@dataclass(frozen=True, kw_only=True)
class BackboneRow:
    """One backbone: a network with the weights that one published file holds.

    Attributes:
        name: "family-size-weights", e.g. "vmamba-s-coco".
        family: the family's name, e.g. "vmamba".
        builder: "module:function", imported on first use; `function(row, res, **options)` returns a `FamilyNet`.
        arch: arguments of the family's network (depths, widths, a timm id, ...).
        pretraining: data sets of the weights in the order of training, e.g. "IN1K + COCO".
        native_res: input size (height, width) in pixels that the weights are meant for.
        stride: pixels a token, along each axis.
        dim: width of a token.
        mean, std: normalisation of RGB values in 0..1.
        file: the checkpoint's file name as published.
        url: where the file is published; empty when it ships with vlmx.
        licence: licence of the weights as their publisher states it.
        published_size: parameters as the paper prints them; often the size of a whole detector, not of what runs here.
        packaged: path inside the vlmx package for weights that ship with it, else empty.
    """

    name: str
    family: str
    builder: str
    arch: Mapping[str, Any] = field(hash=False)
    pretraining: str
    native_res: tuple[int, int]
    stride: int
    dim: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    file: str
    url: str
    licence: str
    published_size: str
    packaged: str = ""


BACKBONES: Registry[BackboneRow] = Registry("backbone", group="vlmx.backbones", listing="vlmx list backbones")


def row(name: str) -> BackboneRow:
    """The row that `name` stands for.

    Raises:
        UnknownNameError: no such backbone; the message carries near misses.
        UsageError: a plug-in registered something that is not a `BackboneRow`.
    """
    found = BACKBONES.get(name)
    if not isinstance(found, BackboneRow):
        raise UsageError(
            f"the plug-in backbone '{name}' is a {type(found).__name__}, not a BackboneRow",
            fix="let its entry point in the group 'vlmx.backbones' name a vlmx.extract.backbones.catalogue.BackboneRow",
        )
    return found


def rows() -> list[BackboneRow]:
    """All rows, sorted by name, plug-ins included."""
    return [row(name) for name in BACKBONES.names()]


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

# VMamba, the "v2" checkpoints. T is the one with depths 2,2,8,2 and ssm_ratio 1, files "tiny_0230s" and "tiny_s".
_VMAMBA_RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download/"
_VMAMBA_SIZES: dict[str, dict[str, Any]] = {
    "t": {"depths": (2, 2, 8, 2), "dims": (96, 192, 384, 768), "ssm_ratio": 1.0},
    "s": {"depths": (2, 2, 15, 2), "dims": (96, 192, 384, 768), "ssm_ratio": 2.0},
    "b": {"depths": (2, 2, 15, 2), "dims": (128, 256, 512, 1024), "ssm_ratio": 2.0},
}
_ADE20K = "upernet_vssm_4xb4-160k_ade20k-512x512_"
# (size, weights, file, parameters as the paper prints them)
_VMAMBA_FILES = [
    ("t", "in1k", "vssm1_tiny_0230s_ckpt_epoch_264.pth", "30M"),
    ("s", "in1k", "vssm_small_0229_ckpt_epoch_222.pth", "50M"),
    ("b", "in1k", "vssm_base_0229_ckpt_epoch_237.pth", "80M"),
    ("t", "coco", "mask_rcnn_vssm_fpn_coco_tiny_s_epoch_12.pth", "30M"),
    ("s", "coco", "mask_rcnn_vssm_fpn_coco_small_epoch_11.pth", "50M"),
    ("b", "coco", "mask_rcnn_vssm_fpn_coco_base_epoch_11.pth", "89M"),
    ("t", "ade20k", f"{_ADE20K}tiny_s_iter_160000.pth", "30M"),
    ("s", "ade20k", f"{_ADE20K}small_iter_144000.pth", "50M"),
    ("b", "ade20k", f"{_ADE20K}base_iter_160000.pth", "89M"),
]
# weights -> (release folder, pretraining, native size, the out-norm that the file's own network applies to stage 3).
# 800x1328 is the largest width in steps of 16 below 1333: it gives the paper's 50x83 = 4150 tokens.
_VMAMBA_WEIGHTS: dict[str, tuple[str, str, tuple[int, int], str]] = {
    "in1k": ("%23v2cls", "IN1K", (224, 224), "none"),
    "coco": ("%23v2det", "IN1K + COCO", (800, 1328), "trained"),
    "ade20k": ("%23v2seg", "IN1K + ADE20K", (512, 512), "trained"),
}

for _size, _weights, _file, _published in _VMAMBA_FILES:
    _folder, _pretraining, _native_res, _out_norm = _VMAMBA_WEIGHTS[_weights]
    BACKBONES.add(
        f"vmamba-{_size}-{_weights}",
        BackboneRow(
            name=f"vmamba-{_size}-{_weights}",
            family="vmamba",
            builder="vlmx.extract.backbones.vmamba:build",
            arch={**_VMAMBA_SIZES[_size], "tap": 2, "checkpoint_out_norm": _out_norm},
            pretraining=_pretraining,
            native_res=_native_res,
            stride=16,
            dim=_VMAMBA_SIZES[_size]["dims"][2],
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            file=_file,
            url=f"{_VMAMBA_RELEASES}{_folder}/{_file}",
            licence="MIT",
            published_size=_published,
        ),
    )

# ViT through timm, 224x224, patch 16; tokens of the second-to-last block.
_VIT_DIMS = {"t": ("tiny", 192), "s": ("small", 384), "b": ("base", 768), "l": ("large", 1024)}
_VIT_PUBLISHED = {"t": "5.7M", "s": "22M", "b": "87M", "l": "304M"}
# weights -> (timm tag, pretraining, sizes)
_VIT_WEIGHTS = {
    "in21k": ("augreg_in21k", "IN21K", "tsbl"),
    "in21k-in1k": ("augreg_in21k_ft_in1k", "IN21K + IN1K", "tsbl"),
    "in1k": ("augreg_in1k", "IN1K", "sb"),
}

for _weights, (_tag, _pretraining, _sizes) in _VIT_WEIGHTS.items():
    for _size in _sizes:
        _word, _dim = _VIT_DIMS[_size]
        _timm_id = f"vit_{_word}_patch16_224.{_tag}"
        BACKBONES.add(
            f"vit-{_size}-{_weights}",
            BackboneRow(
                name=f"vit-{_size}-{_weights}",
                family="vit",
                builder="vlmx.extract.backbones.timm_models:build",
                arch={"timm_id": _timm_id},
                pretraining=_pretraining,
                native_res=(224, 224),
                stride=16,
                dim=_dim,
                mean=HALF,
                std=HALF,
                file=f"{_timm_id}.safetensors",
                url=f"https://huggingface.co/timm/{_timm_id}/resolve/main/model.safetensors",
                licence="Apache-2.0",
                published_size=_VIT_PUBLISHED[_size],
            ),
        )

# Mini encoders for 64x64 images: 8x8 = 64 tokens each. Trained with vlmx; their weights ship with it.
_TIMM_MODELS = "vlmx.extract.backbones.timm_models:build"
# name -> (family, builder, token width, arch)
_MINI: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "vit-mini-scenes": ("vit", _TIMM_MODELS, 96, {"patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}),
    "maxvit-mini-scenes": (
        "maxvit",
        _TIMM_MODELS,
        96,
        {
            "depths": (1, 2, 1),
            "embed_dim": (32, 96, 128),
            "stem_width": 24,
            "conv_expand_ratio": 2.0,
            "mlp_ratio": 2.0,
            "dim_head": 32,
            "window": 4,
            "tap": 2,
        },
    ),
    "mambavision-mini-scenes": (
        "mambavision",
        "vlmx.extract.backbones.mambavision:build",
        96,
        {
            "depths": (1, 4, 1),
            "heads": (0, 3, 6),
            "windows": (0, 8, 4),
            "in_dim": 32,
            "dim": 48,
            "conv_stages": 1,
            "tap": 1,
        },
    ),
    "vmamba-mini-scenes": (
        "vmamba",
        "vlmx.extract.backbones.vmamba:build",
        96,
        {"depths": (1, 3, 1), "dims": (32, 96, 128), "ssm_ratio": 1.0, "tap": 1, "checkpoint_out_norm": "none"},
    ),
}

for _name, (_family, _builder, _dim, _arch) in _MINI.items():
    BACKBONES.add(
        _name,
        BackboneRow(
            name=_name,
            family=_family,
            builder=_builder,
            arch=_arch,
            pretraining="scenes",
            native_res=(64, 64),
            stride=8,
            dim=_dim,
            mean=HALF,
            std=HALF,
            file=f"{_name}.safetensors",
            url="",
            licence="Apache-2.0",
            published_size="",
            packaged=f"data/mini/encoders/{_name}.safetensors",
        ),
    )
