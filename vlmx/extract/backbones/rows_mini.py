"""The mini encoders for 64x64 images, 8x8 = 64 tokens each: trained with vlmx, their weights ship with it."""

from __future__ import annotations

from typing import Any

from vlmx.extract.backbones.row import HALF, BackboneRow, Sizes

_HERE = "vlmx.extract.backbones"

# name -> (family, builder, parameters, allowed sizes, arch)
_MINI: dict[str, tuple[str, str, int, Sizes, dict[str, Any]]] = {
    "vit-mini-scenes": (
        "vit",
        f"{_HERE}.timm_models:build_vit",
        584_064,
        "patch",
        {"patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3},
    ),
    "maxvit-mini-scenes": (
        "maxvit",
        f"{_HERE}.timm_models:build_maxvit",
        400_994,
        "fixed",
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
        f"{_HERE}.mambavision:build",
        512_032,
        "any",
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
        f"{_HERE}.vmamba:build",
        346_976,
        "any",
        {"depths": (1, 3, 1), "dims": (32, 96, 128), "ssm_ratio": 1.0, "tap": 1, "checkpoint_out_norm": "none"},
    ),
}


def _mini(name: str) -> BackboneRow:
    family, builder, params, sizes, arch = _MINI[name]
    return BackboneRow(
        name=name,
        family=family,
        builder=builder,
        arch=arch,
        pretraining="scenes",
        native_res=(64, 64),
        grid=(8, 8),
        dim=96,
        params=params,
        mean=HALF,
        std=HALF,
        file=f"{name}.safetensors",
        url="",
        licence="Apache-2.0",
        published_size="",
        packaged=f"data/mini/encoders/{name}.safetensors",
        sizes=sizes,
        size_step=64 if sizes == "fixed" else 8,
    )


ROWS: tuple[BackboneRow, ...] = tuple(_mini(name) for name in _MINI)
