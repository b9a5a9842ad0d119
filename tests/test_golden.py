"""Are our encoders the official ones? Every case of the reference data, each within the tolerance that its set states.

The tokens of a case are compared with the output that the reference's network gives for the same weights and image.
Cases of networks too large for every-day testing are marked slow; a case whose output is not at hand is skipped.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_fill import (
    assert_close_to_golden,
    fill_ssm,
    fill_transformers,
    ssm_image,
    ssm_subsample,
    transformers_image,
    transformers_subsample,
)
from torch import Tensor, nn

from vlmx.extract.backbones import vit_adapter, vitdet
from vlmx.extract.backbones.base import build_backbone
from vlmx.extract.backbones.catalogue import row
from vlmx.extract.backbones.mambavision import ConvBlock, MambaMixer, MambaVisionClassifier, WindowStage
from vlmx.extract.backbones.vmamba import SS2D, VMambaClassifier, VSSBlock
from vlmx.extract.ops.selective_scan import selective_scan, selective_scan_reference

SLOW = pytest.mark.slow


def golden(path: Path) -> Any:
    """The stored outputs of a case."""
    if not path.is_file():
        pytest.skip(f"the outputs of {path.stem} are not at hand")
    return np.load(path)


def as_map(tokens_BND: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, D) -> (B, D, rows, columns), as the references store it."""
    return tokens_BND.transpose(1, 2).unflatten(2, grid).contiguous()


# --- state-space encoders ---------------------------------------------------------------------------------------------


def ssm_manifest(shared: Path, name: str) -> list[list[Any]]:
    entries: list[list[Any]] = json.loads((shared / f"golden/ssm/{name}.json").read_text())
    return entries


@pytest.mark.parametrize(
    ("name", "manifest", "case"),
    [
        ("vmamba-t-in1k", "vmamba_T_cls", "vmamba/vmamba_T_cls_224x224"),
        ("vmamba-t-coco", "vmamba_T_det", "vmamba/vmamba_T_det_192x320"),
        ("vmamba-t-ade20k", "vmamba_T_det", "vmamba/vmamba_T_det_224x333"),
        pytest.param("vmamba-t-in1k", "vmamba_T_cls", "vmamba/vmamba_T_cls_352x224", marks=SLOW),
        pytest.param("vmamba-t-in1k", "vmamba_T_cls", "vmamba/vmamba_T_cls_512x512", marks=SLOW),
        pytest.param("vmamba-t-coco", "vmamba_T_det", "vmamba/vmamba_T_det_800x1328", marks=SLOW),
        pytest.param("vmamba-s-in1k", "vmamba_S_cls", "vmamba/vmamba_S_cls_224x224", marks=SLOW),
        pytest.param("vmamba-s-coco", "vmamba_S_det", "vmamba/vmamba_S_det_192x320", marks=SLOW),
        pytest.param("vmamba-b-in1k", "vmamba_B_cls", "vmamba/vmamba_B_cls_224x224", marks=SLOW),
        pytest.param("vmamba-b-coco", "vmamba_B_det", "vmamba/vmamba_B_det_192x320", marks=SLOW),
        ("mambavision-t-in1k", "mambavision_T", "mambavision/mambavision_T_224x224"),
        ("mambavision-t-in1k", "mambavision_T", "mambavision/mambavision_T_256x320"),
        pytest.param("mambavision-t-in1k", "mambavision_T", "mambavision/mambavision_T_512x512", marks=SLOW),
        pytest.param("mambavision-b-in1k", "mambavision_B", "mambavision/mambavision_B_224x224", marks=SLOW),
        ("vim-t-in1k", "vim_T", "vim/vim_T_224x224"),
        pytest.param("vim-t-ft-in1k", "vim_T-ft", "vim/vim_T-ft_224x224", marks=SLOW),
        pytest.param("vim-s-in1k", "vim_S", "vim/vim_S_224x224", marks=SLOW),
        pytest.param("vim-b-in1k", "vim_B", "vim/vim_B_224x224", marks=SLOW),
    ],
)
def test_state_space_encoders(shared: Path, name: str, manifest: str, case: str) -> None:
    stored = golden(shared / f"golden/ssm/{case}.npz")
    described = json.loads((shared / f"golden/ssm/{case}.json").read_text())
    height, width = described["image"][2:]
    weights = fill_ssm(ssm_manifest(shared, f"manifests/{manifest}"))
    backbone = build_backbone(name, res=(height, width), weights=weights)
    tokens_BND = backbone(ssm_image(height, width))
    output = tokens_BND if name.startswith("vim") else as_map(tokens_BND, backbone.grid)
    expected = described["outputs"][described["main"]]
    assert list(output.shape) == expected["shape"]
    assert_close_to_golden(ssm_subsample(output), stored[described["main"]], std=expected["std"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vmamba", "mambavision"])
def test_whole_classifiers(shared: Path, family: str) -> None:
    """The networks behind the encoders, as `MambaVisionClassifier` and `VMambaClassifier` build them."""
    arch = dict(row(f"{family}-t-in1k").arch)
    case, manifest = {
        "vmamba": ("vmamba/vmamba_T_cls_224x224", "vmamba_T_cls"),
        "mambavision": ("mambavision/mambavision_T_224x224", "mambavision_T"),
    }[family]
    net: nn.Module
    if family == "vmamba":
        net = VMambaClassifier(**{key: arch[key] for key in ("depths", "dims", "ssm_ratio")}, num_classes=1000)
    else:
        net = MambaVisionClassifier(res=(224, 224), num_classes=1000, **arch)
    net.eval().load_state_dict(fill_ssm(ssm_manifest(shared, f"manifests/{manifest}")), strict=True)
    stored = golden(shared / f"golden/ssm/{case}.npz")["logits"]
    with torch.no_grad():
        logits = ssm_subsample(net(ssm_image(224, 224)), at_most=1024)
    assert_close_to_golden(logits, stored.flatten(), std=stored.std())


@pytest.mark.parametrize("unit", ["scan_vmamba_n1", "scan_mambavision_n8", "scan_vim_n16_z"])
def test_scans(shared: Path, unit: str) -> None:
    with np.load(shared / f"golden/ssm/units/{unit}.npz") as stored:
        truth = stored["y64"]
        inputs = {key: torch.from_numpy(stored[key]) for key in stored.files if not key.startswith("y")}
    fast = selective_scan(**inputs, delta_softplus=True).double().numpy()
    slow = selective_scan_reference(**inputs, delta_softplus=True).numpy()
    assert np.abs(fast - truth).max() <= 5e-6 * truth.std()
    assert np.abs(slow - truth).max() <= 1e-12 * truth.std()


UNITS: dict[str, Any] = {
    "ss2d_d16_r1": lambda: SS2D(16, 1.0),
    "ss2d_d16_r2": lambda: SS2D(16, 2.0),
    "vssblock_d16": lambda: VSSBlock(16, 1.0),
    "mv_mixer_d32": lambda: MambaMixer(32),
    "mv_convblock_d16": lambda: ConvBlock(16),
    "mv_layer_d32_pad": lambda: WindowStage(
        32, 3, heads=4, window=4, mlp_ratio=4.0, layer_scale=True, downsample=False
    ),
}


@pytest.mark.parametrize("unit", UNITS)
def test_state_space_blocks(shared: Path, unit: str) -> None:
    block: nn.Module = UNITS[unit]().eval()
    block.load_state_dict(fill_ssm(ssm_manifest(shared, f"units/{unit}.manifest")), strict=True)
    with np.load(shared / f"golden/ssm/units/{unit}.npz") as stored, torch.no_grad():
        x = torch.from_numpy(stored["x"])
        channels_last = unit.startswith(("ss2d", "vssblock"))
        y = block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if channels_last else block(x)
        assert_close_to_golden(y.numpy(), stored["y"], std=stored["y"].std())


# --- transformers -----------------------------------------------------------------------------------------------------


def assert_is_stored(found: Tensor, stored: Any, output: str, tolerance: float) -> None:
    """Shape, subsampled values, and mean, deviation, least and greatest value over the whole tensor."""
    assert list(found.shape) == stored[f"{output}__shape"].tolist()
    assert np.abs(transformers_subsample(found) - stored[output]).max() <= tolerance
    values = found.double()
    statistics = [values.mean(), values.std(correction=0), values.min(), values.max()]
    np.testing.assert_allclose([float(each) for each in statistics], stored[f"{output}__stats"], atol=tolerance, rtol=0)


def transformers_manifest(shared: Path, name: str) -> list[list[Any]]:
    described = json.loads((shared / f"golden/transformers/{name}.manifest.json").read_text())
    if "entries" not in described:
        return list(described["native_keys_and_shapes"])
    return [[entry["name"], entry["shape"], entry["dtype"]] for entry in described["entries"]]


MINI = {"embed_dim": 96, "depth": 4, "num_heads": 4}
MINI_ADAPTER = {
    **MINI,
    "deform_num_heads": 4,
    "deform_ratio": 0.5,
    "conv_inplane": 16,
    "interaction_indexes": ((0, 0), (1, 1), (2, 2), (3, 3)),
}
MINI_ARCHS: dict[str, tuple[Any, dict[str, Any]]] = {
    "vitdet_mini": (vitdet.build, {**MINI, "global_blocks": (1, 3)}),
    "vit_adapter_mini": (vit_adapter.build, {**MINI_ADAPTER, "flavour": "vit", "pretrain_grid": 24}),
    "beit_adapter_mini": (vit_adapter.build, {**MINI_ADAPTER, "flavour": "beit", "window": 8}),
    "uniperceiver_adapter_mini": (
        vit_adapter.build,
        {**MINI_ADAPTER, "flavour": "uniperceiver", "pretrain_grid": 14},
    ),
}


@pytest.mark.parametrize(
    ("case", "res", "output", "tolerance"),
    [
        ("vitdet_mini", (256, 256), "last_feat", 3e-5),
        ("vitdet_mini", (192, 320), "last_feat", 3e-5),
        ("vit_adapter_mini", (128, 128), "f4", 5e-5),
        ("vit_adapter_mini", (96, 160), "f4", 5e-5),
        ("beit_adapter_mini", (128, 128), "f4", 5e-5),
        ("uniperceiver_adapter_mini", (128, 128), "f4", 5e-5),
        ("uniperceiver_adapter_mini", (96, 160), "f4", 5e-5),
    ],
)
def test_mini_transformers(shared: Path, case: str, res: tuple[int, int], output: str, tolerance: float) -> None:
    build, arch = MINI_ARCHS[case]
    net = build(replace(row("vitdet-b-coco"), arch=arch), res).eval()
    weights = fill_transformers(transformers_manifest(shared, case))
    net.load_state_dict(net.adapt_state_dict(weights), strict=True)
    with torch.no_grad():
        found = as_map(net(transformers_image(*res)), net.grid)
    stored = golden(shared / f"golden/transformers/{case}_{res[0]}x{res[1]}.npz")
    assert_is_stored(found, stored, output, tolerance)


@pytest.mark.parametrize(
    ("name", "case", "res", "output", "tolerance"),
    [
        ("vitdet-b-coco", "vitdet_b", (256, 256), "last_feat", 3e-5),
        pytest.param("vitdet-b-coco", "vitdet_b", (192, 320), "last_feat", 3e-5, marks=SLOW),
        pytest.param("vitdet-b-coco", "vitdet_b", (512, 512), "last_feat", 3e-5, marks=SLOW),
        pytest.param("vitdet-b-coco", "vitdet_b", (1024, 1024), "last_feat", 3e-5, marks=SLOW),
        ("vitdet-b-coco", "vitdet_b_sfp", (256, 256), "p4", 3e-5),
        ("adapter-augreg-t-ade20k", "vit_adapter_augreg_t", (256, 256), "f4", 5e-5),
        ("adapter-deit-s-ade20k", "vit_adapter_deit_s", (192, 320), "f4", 5e-5),
        pytest.param("adapter-deit-s-ade20k", "vit_adapter_deit_s", (256, 256), "f4", 5e-5, marks=SLOW),
        pytest.param("adapter-deit-s-ade20k", "vit_adapter_deit_s", (512, 512), "f4", 5e-5, marks=SLOW),
        pytest.param("adapter-augreg-b-ade20k", "vit_adapter_augreg_b", (256, 256), "f4", 5e-5, marks=SLOW),
        pytest.param("adapter-beit-l-640-ade20k", "beit_adapter_l_640", (640, 640), "f4", 5e-5, marks=SLOW),
        pytest.param("adapter-uniperceiver-l-ade20k", "uniperceiver_adapter_l", (512, 512), "f4", 5e-5, marks=SLOW),
    ],
)
def test_dense_transformers(
    shared: Path, name: str, case: str, res: tuple[int, int], output: str, tolerance: float
) -> None:
    stored = golden(shared / f"golden/transformers/{case}_{res[0]}x{res[1]}.npz")
    weights = fill_transformers(transformers_manifest(shared, case))
    options = {"feature": output} if output == "p4" else {}
    backbone = build_backbone(name, res=res, weights=weights, **options)
    found = as_map(backbone(transformers_image(*res)), backbone.grid)
    assert_is_stored(found, stored, output, tolerance)


@pytest.mark.parametrize(
    ("name", "case", "side", "tolerance"),
    [
        ("vit-t-in21k", "timmref_vit_tiny_224", 224, 3e-5),
        pytest.param("clip-b", "timmref_clip_b_quickgelu_224", 224, 3e-5, marks=SLOW),
        pytest.param("siglip-b16-224", "timmref_siglip_b16_224", 224, 3e-5, marks=SLOW),
        ("timm:vit_small_patch14_reg4_dinov2.lvd142m", "timmref_dinov2_s_reg4_224", 224, 3e-5),
        ("timm:vit_small_patch14_reg4_dinov2.lvd142m", "timmref_dinov2_s_reg4_384", 384, 3e-5),
        ("maxvit-t-in1k-224", "timmref_maxvit_tiny_224", 224, 1e-4),
    ],
)
@pytest.mark.parametrize("output", ["tokens", "last_block_tokens"])
def test_timm_encoders(shared: Path, name: str, case: str, side: int, tolerance: float, output: str) -> None:
    stored = golden(shared / f"golden/transformers/{case}.npz")
    if output not in stored:
        pytest.skip("a MaxViT is tapped at a stage, not at a block")
    weights = fill_transformers(transformers_manifest(shared, case))
    options = {"block": -1} if output == "last_block_tokens" else {}
    backbone = build_backbone(name, res=(side, side), weights=weights, **options)
    tokens_BND = backbone(transformers_image(side, side))
    assert_is_stored(tokens_BND, stored, output, tolerance)


def test_fill_rule_of_the_state_space_set(shared: Path) -> None:
    checks = json.loads((shared / "golden/ssm/fill_check.json").read_text())
    for entry in checks["entries"]:
        if ":" in entry["name"]:  # an input, not a parameter
            continue
        filled = fill_ssm([[entry["name"], entry["shape"], "float32"]])[entry["name"]].numpy()
        np.testing.assert_allclose(filled.flatten()[:4], entry["first"], rtol=1e-7)
        assert float(filled.astype(np.float64).sum()) == pytest.approx(entry["sum"])


# --- every published network, by the names and shapes of its whole state dict -----------------------------------------

MANIFESTS = [
    *(f"ssm/manifests/vmamba_{size}_{kind}" for size in "TSB" for kind in ("cls", "det")),
    *(f"ssm/manifests/vim_{size}" for size in ("T", "T-ft", "S", "S-ft", "B")),
    *(
        f"ssm/manifests/mambavision_{size}"
        for size in ("T", "T2", "S", "B", "B_21k", "L", "L_21k", "L2", "L2_512_21k", "L3_256_21k", "L3_512_21k")
    ),
    *(f"transformers/vitdet_{size}.manifest" for size in "blh"),
    *(f"transformers/vit_adapter_{trunk}.manifest" for trunk in ("deit_s", "deit_b", "augreg_t", "augreg_b")),
    "transformers/vit_adapter_augreg_l.manifest",
    "transformers/uniperceiver_adapter_l.manifest",
    *(f"transformers/beit_adapter_l_{side}.manifest" for side in (640, 896)),
]


def name_of(manifest: str) -> str:
    """The catalogue's name of the network that a manifest describes."""
    stem = manifest.rpartition("/")[2].removesuffix(".manifest")
    family, _, rest = stem.lower().partition("_")
    if family == "vmamba":
        return f"vmamba-{rest[0]}-{'in1k' if rest.endswith('cls') else 'coco'}"
    if family == "vim":
        return f"vim-{rest}-in1k"
    if family == "mambavision":
        size, _, tail = rest.partition("_")
        data = "in21k" if "21k" in tail else "in1k"
        side = tail.removesuffix("21k").strip("_")
        return f"mambavision-{size}-{data}" + (f"-{side}" if side else "")
    if family == "vitdet":
        return f"vitdet-{rest}-coco"
    trunk = rest.removeprefix("adapter_").replace("_", "-")
    return f"adapter-{ {'beit': 'beit-', 'uniperceiver': 'uniperceiver-'}.get(family, '') }{trunk}-ade20k"


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_published_names_and_shapes_are_the_ones_that_are_loaded(shared: Path, manifest: str) -> None:
    described = json.loads((shared / f"golden/{manifest}.json").read_text())
    entries = described if isinstance(described, list) else [[e["name"], e["shape"]] for e in described["entries"]]
    backbone = build_backbone(name_of(manifest), res=row(name_of(manifest)).native_res, device="meta")
    published = {entry[0]: torch.empty(entry[1], device="meta") for entry in entries}
    own = backbone.net.adapt_state_dict(published)  # type: ignore[operator]
    assert {k: tuple(v.shape) for k, v in own.items()} == {
        k: tuple(v.shape) for k, v in backbone.net.state_dict().items()
    }
