"""The published encoders that timm's networks run: ViT, MaxViT, CLIP, SigLIP, DINOv2, ViTDet.

Every id carries its tag: without one, timm chooses other weights than the paper's for several of them.
"""

from __future__ import annotations

from vlmx.extract.backbones.row import HALF, IMAGENET_MEAN, IMAGENET_STD, BackboneRow, Sizes

HUB = "https://huggingface.co/timm"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Triple = tuple[float, float, float]


def _row(
    name: str,
    family: str,
    timm_id: str,
    *,
    pretraining: str,
    side: int,
    grid_side: int,
    dim: int,
    params: int,
    published: str,
    sizes: Sizes,
    size_step: int,
    mean: Triple = HALF,
    std: Triple = HALF,
    crop_pct: float = 1.0,
    repository: str = "",
    trained_side: int = 0,
) -> BackboneRow:
    """A row whose weights are on the hub as timm/ID (or `repository`), file model.safetensors."""
    repository = repository or timm_id
    return BackboneRow(
        name=name,
        family=family,
        builder=f"vlmx.extract.backbones.timm_models:{'build_maxvit' if family == 'maxvit' else 'build_vit'}",
        arch={"timm_id": timm_id, **({"trained_side": trained_side} if trained_side else {})},
        pretraining=pretraining,
        native_res=(side, side),
        grid=(grid_side, grid_side),
        dim=dim,
        params=params,
        mean=mean,
        std=std,
        file=f"{repository}.safetensors",
        url=f"{HUB}/{repository}/resolve/main/model.safetensors",
        licence="Apache-2.0",
        published_size=published,
        sizes=sizes,
        size_step=size_step,
        crop_pct=crop_pct,
    )


# size -> (timm's word, width, parameters up to the second-to-last block, parameters as the paper prints them)
_VIT_SIZES = {
    "t": ("tiny", 192, 5_079_168, "5.7M"),
    "s": ("small", 384, 19_890_432, "22M"),
    "b": ("base", 768, 78_709_248, "87M"),
    "l": ("large", 1024, 290_703_360, "304M"),
}
# weights -> (timm tag, pretraining, sizes, what the reference's crop keeps: it does not crop ids with "in1k")
_VIT_WEIGHTS = {
    "in21k": ("augreg_in21k", "IN21K", "tsbl", 0.9),
    "in21k-in1k": ("augreg_in21k_ft_in1k", "IN21K + IN1K", "tsbl", 1.0),
    "in1k": ("augreg_in1k", "IN1K", "sb", 1.0),
}


def _vit(size: str, weights: str) -> BackboneRow:
    tag, pretraining, _, crop_pct = _VIT_WEIGHTS[weights]
    word, dim, params, published = _VIT_SIZES[size]
    return _row(
        f"vit-{size}-{weights}",
        "vit",
        f"vit_{word}_patch16_224.{tag}",
        pretraining=pretraining,
        side=224,
        grid_side=14,
        dim=dim,
        params=params,
        published=published,
        sizes="patch",
        size_step=16,
        crop_pct=crop_pct,
    )


# size -> (timm's word, width of stage 3, parameters as the paper prints them)
_MAXVIT_SIZES = {
    "t": ("tiny", 256, "31M"),
    "s": ("small", 384, "69M"),
    "b": ("base", 384, "119M"),
    "l": ("large", 512, "212M"),
    "xl": ("xlarge", 768, "475M"),
}
# (size, side in pixels) -> parameters up to stage 3; the position tables grow with the side
_MAXVIT_PARAMS = {
    ("t", 224): 12_609_160,
    ("t", 384): 12_646_600,
    ("t", 512): 12_691_528,
    ("s", 224): 28_196_364,
    ("s", 384): 28_252_524,
    ("s", 512): 28_319_916,
    ("b", 224): 78_736_116,
    ("b", 384): 78_887_316,
    ("b", 512): 79_068_756,
    ("l", 224): 139_782_384,
    ("l", 384): 139_983_984,
    ("l", 512): 140_225_904,
    ("xl", 224): 313_863_528,
    ("xl", 384): 314_165_928,
    ("xl", 512): 314_528_808,
}
# weights -> (timm tag, pretraining, sizes, sides)
_MAXVIT_WEIGHTS = {
    "in1k": ("in1k", "IN1K", ("t", "s", "b", "l"), (224, 384, 512)),
    "in21k": ("in21k", "IN21K", ("b", "l", "xl"), (224,)),
    "in21k-in1k": ("in21k_ft_in1k", "IN21K + IN1K", ("b", "l", "xl"), (384, 512)),
}


def _maxvit(size: str, weights: str, side: int) -> BackboneRow:
    tag, pretraining, _, _ = _MAXVIT_WEIGHTS[weights]
    word, dim, published = _MAXVIT_SIZES[size]
    imagenet = (weights, side) == ("in1k", 224)  # the only ones trained with ImageNet's own mean and deviation
    return _row(
        f"maxvit-{size}-{weights}-{side}",
        "maxvit",
        f"maxvit_{word}_tf_{side}.{tag}",
        pretraining=pretraining,
        side=side,
        grid_side=side // 16,
        dim=dim,
        params=_MAXVIT_PARAMS[size, side],
        published=published,
        sizes="fixed",
        size_step=side,
        mean=IMAGENET_MEAN if imagenet else HALF,
        std=IMAGENET_STD if imagenet else HALF,
        crop_pct=0.95 if weights == "in21k" else 1.0,
    )


def _clip(
    name: str, word: str, side: int, patch: int, dim: int, params: int, published: str, crop_pct: float
) -> BackboneRow:
    return _row(
        name,
        "clip",
        f"vit_{word}_patch{patch}_clip_quickgelu_{side}.openai",
        pretraining="WIT-400M, image and text",
        side=side,
        grid_side=side // patch,
        dim=dim,
        params=params,
        published=published,
        sizes="patch",
        size_step=patch,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        crop_pct=crop_pct,
        repository=f"vit_{word}_patch{patch}_clip_{side}.openai",
    )


def _siglip(name: str, word: str, side: int, patch: int, dim: int, params: int, published: str) -> BackboneRow:
    return _row(
        name,
        "siglip",
        f"vit_{word}_patch{patch}_siglip_{side}.webli",
        pretraining="WebLI, image and text",
        side=side,
        grid_side=side // patch,
        dim=dim,
        params=params,
        published=published,
        sizes="patch",
        size_step=patch,
    )


_VITDET_FILES = "https://dl.fbaipublicfiles.com/detectron2/ViTDet/COCO/"


def _vitdet(size: str, dim: int, depth: int, params: int, published: str, folder: str, file: str) -> BackboneRow:
    every = depth // 4
    return BackboneRow(
        name=f"vitdet-{size}-coco",
        family="vitdet",
        builder="vlmx.extract.backbones.vitdet:build",
        arch={
            "embed_dim": dim,
            "depth": depth,
            "num_heads": 12 if size == "b" else 16,
            "global_blocks": tuple(range(every - 1, depth, every)),
        },
        pretraining="IN1K + COCO",
        native_res=(1024, 1024),
        grid=(64, 64),
        dim=dim,
        params=params,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        file=file,
        url=f"{_VITDET_FILES}mask_rcnn_vitdet_{size}/{folder}/{file}",
        licence="Apache-2.0",
        published_size=published,
        sizes="multiple",
        size_step=16,
    )


ROWS: tuple[BackboneRow, ...] = (
    *(_vit(size, weights) for weights, (_, _, sizes, _) in _VIT_WEIGHTS.items() for size in sizes),
    *(
        _maxvit(size, weights, side)
        for weights, (_, _, sizes, sides) in _MAXVIT_WEIGHTS.items()
        for size in sizes
        for side in sides
    ),
    _clip("clip-b", "base", 224, 16, 768, 78_710_016, "86M", 0.9),
    _clip("clip-l", "large", 224, 14, 1024, 290_581_504, "304M", 1.0),
    _clip("clip-l-336", "large", 336, 14, 1024, 290_909_184, "304M", 1.0),
    _siglip("siglip-b16-224", "base", 224, 16, 768, 78_707_712, "93M"),
    _siglip("siglip-b16-256", "base", 256, 16, 768, 78_753_792, "93M"),
    _siglip("siglip-b16-384", "base", 384, 16, 768, 78_999_552, "93M"),
    _siglip("siglip-so400m-224", "so400m", 224, 14, 1152, 397_200_544, "428M"),
    _siglip("siglip-so400m-384", "so400m", 384, 14, 1152, 397_745_440, "428M"),
    _row(
        "dinov2-l",
        "dinov2",
        "vit_large_patch14_reg4_dinov2.lvd142m",
        pretraining="LVD-142M, self-supervised",
        side=224,
        grid_side=16,
        dim=1024,
        params=290_630_656,
        published="304M",
        sizes="patch",
        size_step=14,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        trained_side=518,
    ),
    _vitdet("b", 768, 12, 85_889_024, "111M", "f325346929", "model_final_61ccd1.pkl"),
    _vitdet("l", 1024, 24, 303_432_704, "331M", "f325599698", "model_final_6146ed.pkl"),
    _vitdet("h", 1280, 32, 631_116_800, "662M", "f329145471", "model_final_7224f1.pkl"),
)
