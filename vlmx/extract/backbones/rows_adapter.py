"""The published ViT-Adapter segmentation backbones (ADE20K)."""

from __future__ import annotations

from typing import Any

from vlmx.extract.backbones.row import HALF, IMAGENET_MEAN, IMAGENET_STD, BackboneRow

_RELEASES = "https://github.com/czczup/ViT-Adapter/releases/download/"
_QUARTERS_12 = ((0, 2), (3, 5), (6, 8), (9, 11))
_QUARTERS_24 = ((0, 5), (6, 11), (12, 17), (18, 23))

# (name, flavour, width, depth, heads, heads and ratio of deformable attention, parameters up to f4, the rest)
_TRUNKS: list[tuple[str, str, int, int, int, int, float, int, dict[str, int]]] = [
    ("augreg-t", "vit", 192, 12, 3, 6, 1.0, 7_805_360, {"pretrain_grid": 14}),
    ("deit-s", "vit", 384, 12, 6, 6, 1.0, 26_886_416, {"pretrain_grid": 14}),
    ("deit-b", "vit", 768, 12, 12, 12, 0.5, 97_080_800, {"pretrain_grid": 14}),
    ("augreg-b", "vit", 768, 12, 12, 12, 0.5, 97_372_640, {"pretrain_grid": 24}),
    ("augreg-l", "vit", 1024, 24, 16, 16, 0.5, 322_705_600, {"pretrain_grid": 24}),
    ("uniperceiver-l", "uniperceiver", 1024, 24, 16, 16, 0.5, 322_325_696, {"pretrain_grid": 14}),
    ("beit-l-640", "beit", 1024, 24, 16, 16, 0.5, 324_488_896, {"window": 40}),
    ("beit-l-896", "beit", 1024, 24, 16, 16, 0.5, 326_823_616, {"window": 56}),
]
_PARAMS = {name: params for name, *_, params, _ in _TRUNKS}
# name -> arguments of the network
_ARCHS: dict[str, dict[str, Any]] = {
    name: {
        "flavour": flavour,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "deform_num_heads": deform_heads,
        "deform_ratio": deform_ratio,
        "interaction_indexes": _QUARTERS_12 if depth == 12 else _QUARTERS_24,
        "conv_inplane": 64,
        **flavour_arch,
    }
    for name, flavour, dim, depth, heads, deform_heads, deform_ratio, _, flavour_arch in _TRUNKS
}
# (name, trunk, pretraining before ADE20K, side, release/file, parameters as the paper prints them)
_FILES = [
    ("deit-s", "deit-s", "IN1K", 512, "v0.3.1/upernet_deit_adapter_small_512_160k_ade20k.pth", "58M"),
    ("deit-b", "deit-b", "IN1K", 512, "v0.3.1/upernet_deit_adapter_base_512_160k_ade20k.pth.tar", "134M"),
    ("augreg-t", "augreg-t", "IN22K", 512, "v0.3.1/upernet_augreg_adapter_tiny_512_160_ade20k.pth.tar", "36M"),
    ("augreg-b", "augreg-b", "IN22K", 512, "v0.3.1/upernet_augreg_adapter_base_512_160k_ade20k.pth.tar", "134M"),
    ("augreg-l", "augreg-l", "IN22K", 512, "v0.3.1/upernet_augreg_adapter_large_512_160k_ade20k.pth.tar", "364M"),
    (
        "uniperceiver-l",
        "uniperceiver-l",
        "multi-modal",
        512,
        "v0.3.1/upernet_uniperceiver_adapter_large_512_160k_ade20k.pth",
        "364M",
    ),
    (
        "beit-l-640",
        "beit-l-640",
        "IN22K",
        640,
        "v0.2.1/upernet_beit_adapter_large_640_160k_ade20k.pth.tar",
        "451M",
    ),
    (
        "beit-l-640-m2f",
        "beit-l-640",
        "IN22K",
        640,
        "v0.2.2/mask2former_beit_adapter_large_640_160k_ade20k.zip",
        "568M",
    ),
    (
        "beit-l-896",
        "beit-l-896",
        "IN22K + COCO-Stuff",
        896,
        "v0.2.0/mask2former_beit_adapter_large_896_80k_ade20k.zip",
        "571M",
    ),
    (
        "beitv2-l-896",
        "beit-l-896",
        "IN22K + COCO-Stuff",
        896,
        "v0.3.1/mask2former_beitv2_adapter_large_896_80k_ade20k.zip",
        "571M",
    ),
]


def _adapter(name: str, trunk: str, pretraining: str, side: int, published_file: str, published: str) -> BackboneRow:
    arch = _ARCHS[trunk]
    half = name in {"augreg-b", "augreg-l"}
    return BackboneRow(
        name=f"adapter-{name}-ade20k",
        family="adapter",
        builder="vlmx.extract.backbones.vit_adapter:build",
        arch=arch,
        pretraining=f"{pretraining} + ADE20K",
        native_res=(side, side),
        grid=(side // 32, side // 32),
        dim=arch["embed_dim"],
        params=_PARAMS[trunk],
        mean=HALF if half else IMAGENET_MEAN,
        std=HALF if half else IMAGENET_STD,
        file=published_file.partition("/")[2],
        url=f"{_RELEASES}{published_file}",
        licence="Apache-2.0",
        published_size=published,
        sizes="fixed" if arch["flavour"] == "beit" else "multiple",
        size_step=32,
    )


ROWS: tuple[BackboneRow, ...] = tuple(_adapter(*each) for each in _FILES)
