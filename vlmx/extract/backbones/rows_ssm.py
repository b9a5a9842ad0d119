"""The published state-space encoders: VMamba, Vim, MambaVision."""

from __future__ import annotations

from typing import Any

from vlmx.extract.backbones.row import IMAGENET_MEAN, IMAGENET_STD, BackboneRow

HUB = "https://huggingface.co"

# VMamba, the "v2" checkpoints. T is the one with depths 2,2,8,2 and ssm_ratio 1, files "tiny_0230s" and "tiny_s".
_VMAMBA_RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download/"
_VMAMBA_SIZES: dict[str, dict[str, Any]] = {
    "t": {"depths": (2, 2, 8, 2), "dims": (96, 192, 384, 768), "ssm_ratio": 1.0},
    "s": {"depths": (2, 2, 15, 2), "dims": (96, 192, 384, 768), "ssm_ratio": 2.0},
    "b": {"depths": (2, 2, 15, 2), "dims": (128, 256, 512, 1024), "ssm_ratio": 2.0},
}
_VMAMBA_PARAMS = {"t": 14_374_272, "s": 31_276_224, "b": 55_400_704}  # up to the blocks of stage 3, without out-norm
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
# weights -> (release folder, pretraining, native size and grid, the out-norm that the file's own network has).
# 800x1328 is the largest width in steps of 16 below 1333: it gives the paper's 50x83 = 4150 tokens.
_VMAMBA_WEIGHTS: dict[str, tuple[str, str, tuple[int, int], tuple[int, int], str]] = {
    "in1k": ("%23v2cls", "IN1K", (224, 224), (14, 14), "none"),
    "coco": ("%23v2det", "IN1K + COCO", (800, 1328), (50, 83), "trained"),
    "ade20k": ("%23v2seg", "IN1K + ADE20K", (512, 512), (32, 32), "trained"),
}


def _vmamba(size: str, weights: str, file: str, published: str) -> BackboneRow:
    folder, pretraining, native_res, grid, out_norm = _VMAMBA_WEIGHTS[weights]
    arch = {**_VMAMBA_SIZES[size], "tap": 2, "checkpoint_out_norm": out_norm}
    dim = arch["dims"][2]
    return BackboneRow(
        name=f"vmamba-{size}-{weights}",
        family="vmamba",
        builder="vlmx.extract.backbones.vmamba:build",
        arch=arch,
        pretraining=pretraining,
        native_res=native_res,
        grid=grid,
        dim=dim,
        params=_VMAMBA_PARAMS[size] + (2 * dim if out_norm == "trained" else 0),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        file=file,
        url=f"{_VMAMBA_RELEASES}{folder}/{file}",
        licence="MIT",
        published_size=published,
        size_step=16,
    )


# Vim with the class token in the middle; "-ft" has overlapping patches. size -> (repository, file, width, stride,
# parameters without the head, parameters as the paper prints them)
_VIM: dict[str, tuple[str, str, int, int, int, str]] = {
    "t": ("Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth", 192, 16, 6_955_008, "7M"),
    "t-ft": ("Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth", 192, 8, 7_057_344, "7M"),
    "s": ("Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth", 384, 16, 25_411_584, "26M"),
    "s-ft": ("Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth", 384, 8, 25_616_256, "26M"),
    "b": ("Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth", 768, 16, 96_829_440, "98M"),
}


def _vim(size: str) -> BackboneRow:
    repository, file, dim, stride, params, published = _VIM[size]
    side = (224 - 16) // stride + 1
    return BackboneRow(
        name=f"vim-{size}-in1k",
        family="vim",
        builder="vlmx.extract.backbones.vim:build",
        arch={"embed_dim": dim, "depth": 24, "stride": stride},
        pretraining="IN1K",
        native_res=(224, 224),
        grid=(side, side),
        dim=dim,
        params=params,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        file=file,
        url=f"{HUB}/hustvl/{repository}/resolve/main/{file}",
        licence="Apache-2.0",
        published_size=published,
        sizes="fixed",
        size_step=224,
    )


# MambaVision. size -> (depths, dim, in_dim, heads of stages 3 and 4, layer scale, parameters up to the blocks of
# stage 3, parameters as the paper prints them)
_MAMBAVISION: dict[str, tuple[tuple[int, int, int, int], int, int, tuple[int, int], bool, int, str]] = {
    "t": ((1, 3, 8, 4), 80, 32, (8, 16), False, 11_186_528, "32M"),
    "t2": ((1, 3, 11, 4), 80, 32, (8, 16), False, 14_496_288, "35M"),
    "s": ((3, 3, 7, 5), 96, 64, (8, 16), False, 14_677_184, "50M"),
    "b": ((3, 3, 10, 5), 128, 64, (8, 16), True, 35_006_272, "98M"),
    "l": ((3, 3, 10, 5), 196, 64, (16, 32), True, 81_924_368, "228M"),
    "l2": ((3, 3, 12, 5), 196, 64, (16, 32), True, 95_518_144, "242M"),
    "l3": ((3, 3, 20, 10), 256, 64, (16, 32), True, 255_528_768, "740M"),
}
# (name without the family, size, repository, file, native side, windows of stages 3 and 4)
_MAMBAVISION_FILES = [
    ("t-in1k", "t", "MambaVision-T-1K", "mambavision_tiny_1k", 224, (14, 7)),
    ("t2-in1k", "t2", "MambaVision-T2-1K", "mambavision_tiny2_1k", 224, (14, 7)),
    ("s-in1k", "s", "MambaVision-S-1K", "mambavision_small_1k", 224, (14, 7)),
    ("b-in1k", "b", "MambaVision-B-1K", "mambavision_base_1k", 224, (14, 7)),
    ("l-in1k", "l", "MambaVision-L-1K", "mambavision_large_1k", 224, (14, 7)),
    ("l2-in1k", "l2", "MambaVision-L2-1K", "mambavision_large2_1k", 224, (14, 7)),
    ("b-in21k", "b", "MambaVision-B-21K", "mambavision_base_21k", 224, (14, 7)),
    ("l-in21k", "l", "MambaVision-L-21K", "mambavision_large_21k", 224, (14, 7)),
    ("l2-in21k-512", "l2", "MambaVision-L2-512-21K", "mambavision_L2_21k_240m_512", 512, (32, 16)),
    ("l3-in21k-256", "l3", "MambaVision-L3-256-21K", "mambavision_L3_21k_740m_256", 256, (16, 8)),
    ("l3-in21k-512", "l3", "MambaVision-L3-512-21K", "mambavision_L3_21k_740m_512", 512, (32, 16)),
]


def _mambavision(name: str, size: str, repository: str, file: str, side: int, windows: tuple[int, int]) -> BackboneRow:
    depths, dim, in_dim, heads, layer_scale, params, published = _MAMBAVISION[size]
    return BackboneRow(
        name=f"mambavision-{name}",
        family="mambavision",
        builder="vlmx.extract.backbones.mambavision:build",
        arch={
            "depths": depths,
            "heads": (0, 0, *heads),
            "windows": (0, 0, *windows),
            "in_dim": in_dim,
            "dim": dim,
            "conv_stages": 2,
            "layer_scale": layer_scale,
            "tap": 2,
        },
        pretraining="IN21K" if "in21k" in name else "IN1K",
        native_res=(side, side),
        grid=(side // 16, side // 16),
        dim=4 * dim,
        params=params,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        file=f"{file}.pth.tar",
        url=f"{HUB}/nvidia/{repository}/resolve/main/{file}.pth.tar",
        licence="CC-BY-NC-SA-4.0",
        published_size=published,
        size_step=16,
    )


ROWS: tuple[BackboneRow, ...] = (
    *(_vmamba(*each) for each in _VMAMBA_FILES),
    *(_vim(size) for size in _VIM),
    *(_mambavision(*each) for each in _MAMBAVISION_FILES),
)
