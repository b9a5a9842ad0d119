"""Are ViT-Adapter's names, shapes, sizes and parts the published ones? (Its tokens: test_golden.)"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_fill import fill_transformers, transformers_image
from torch import Tensor

from vlmx.errors import UsageError
from vlmx.extract.backbones import catalogue
from vlmx.extract.backbones.adapter_interactions import DeformableAttention
from vlmx.extract.backbones.adapter_trunks import relative_position_index
from vlmx.extract.backbones.base import Backbone, build_backbone
from vlmx.extract.backbones.loading import fit_problems
from vlmx.extract.backbones.vit_adapter import ViTAdapter, build

MINI = {
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 4,
    "interaction_indexes": ((0, 0), (1, 1), (2, 2), (3, 3)),
    "deform_num_heads": 4,
    "deform_ratio": 0.5,
    "conv_inplane": 16,
}
MINIS: dict[str, dict[str, Any]] = {
    "vit_adapter_mini": {**MINI, "flavour": "vit", "pretrain_grid": 24},
    "beit_adapter_mini": {**MINI, "flavour": "beit", "window": 8},
    "uniperceiver_adapter_mini": {**MINI, "flavour": "uniperceiver", "pretrain_grid": 14},
}
# row -> (manifest, parameters of the whole published backbone, parameters built for f4)
PUBLISHED = {
    "adapter-augreg-t-ade20k": ("vit_adapter_augreg_t", 7_966_640, 7_805_360),
    "adapter-deit-s-ade20k": ("vit_adapter_deit_s", 27_503_888, 26_886_416),
    "adapter-deit-b-ade20k": ("vit_adapter_deit_b", 99_495_392, 97_080_800),
    "adapter-augreg-b-ade20k": ("vit_adapter_augreg_b", 99_787_232, 97_372_640),
    "adapter-augreg-l-ade20k": ("vit_adapter_augreg_l", 326_973_632, 322_705_600),
    "adapter-uniperceiver-l-ade20k": ("uniperceiver_adapter_l", 326_593_728, 322_325_696),
    "adapter-beit-l-640-ade20k": ("beit_adapter_l_640", 328_756_928, 324_488_896),
    "adapter-beit-l-640-m2f-ade20k": ("beit_adapter_l_640", 328_756_928, 324_488_896),
    "adapter-beit-l-896-ade20k": ("beit_adapter_l_896", 331_091_648, 326_823_616),
    "adapter-beitv2-l-896-ade20k": ("beit_adapter_l_896", 331_091_648, 326_823_616),
}


def manifest_of(shared: Path, case: str) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((shared / f"golden/transformers/{case}.manifest.json").read_text())
    return manifest


def filled(manifest: dict[str, Any]) -> dict[str, Tensor]:
    return fill_transformers([[each["name"], each["shape"], each["dtype"]] for each in manifest["entries"]])


def published_shapes(manifest: dict[str, Any]) -> dict[str, Tensor]:
    """The backbone's part of the published file, without values."""
    return {
        f"backbone.{each['name']}": torch.empty(each["shape"], dtype=getattr(torch, each["dtype"]), device="meta")
        for each in manifest["entries"]
    }


def mini_net(case: str, res: tuple[int, int] = (128, 128)) -> ViTAdapter:
    """A small network with the reference weights; its names are the published ones, so no manifest is needed."""
    row = replace(catalogue.row("adapter-deit-s-ade20k"), arch=MINIS[case])
    net = build(row, res)
    own = net.state_dict()
    net.load_state_dict(fill_transformers([[name, value.shape, str(value.dtype)[6:]] for name, value in own.items()]))
    return net.eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_sizes_are_the_published_ones(shared: Path, name: str) -> None:
    case, whole, built = PUBLISHED[name]
    manifest = manifest_of(shared, case)
    row = catalogue.row(name)
    backbone = build_backbone(name, res=row.native_res, device="meta")
    assert (backbone.feature, backbone.out_norm, backbone.grid) == ("f4", "trained", row.grid)
    assert manifest["params"] == whole
    assert sum(parameter.numel() for parameter in backbone.parameters()) == built
    config = manifest["config"]
    for key in MINI:
        assert json.loads(json.dumps(row.arch[key])) == config[key], key

    beside = {"decode_head.conv_seg.weight", "auxiliary_head.conv_seg.weight", "ema_backbone_norm4_weight"}
    inside = published_shapes(manifest)
    file = inside | {key: torch.empty(1, device="meta") for key in beside}
    bare = {key.removeprefix("backbone."): value for key, value in inside.items()}
    for published in (file, bare, {f"module.{key}": value for key, value in file.items()}):
        assert fit_problems(row, published) == []
    assert isinstance(backbone.net, ViTAdapter)
    dropped = {
        key
        for key in set(bare) - set(backbone.net.adapt_state_dict(file))
        if not key.endswith(".attn.relative_position_index")
    }
    norms = [f"norm{index}" for index in (1, 2, 3)]
    of_a_norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert dropped == {
        *(f"{norm}.{each}" for norm in norms for each in of_a_norm),
        *(f"{conv}.{each}" for conv in ("up", "spm.fc1") for each in ("weight", "bias")),
    }


def test_other_files_are_refused_with_what_is_wrong(shared: Path) -> None:
    row = catalogue.row("adapter-augreg-b-ade20k")
    fitting = published_shapes(manifest_of(shared, "vit_adapter_augreg_b"))
    assert fit_problems(row, published_shapes(manifest_of(shared, "vit_adapter_deit_b"))) == [
        "1 shape differs: pos_embed is (1, 197, 768), needed (1, 577, 768)"
    ]
    assert fit_problems(row, {key: value for key, value in fitting.items() if ".gamma1" not in key}, shown=1) == [
        "12 keys are missing: blocks.0.gamma1, ..."
    ]
    assert fit_problems(row, fitting | {"backbone.cls_token": torch.empty(1, 1, 768)}) == [
        "1 key is unexpected: cls_token"
    ]
    assert fit_problems(row, fitting | {"head.weight": torch.empty(1)}) == ["1 key is unexpected: head.weight"]


@pytest.mark.parametrize(
    ("name", "res"),
    [("adapter-deit-s-ade20k", (512, 500)), ("adapter-beit-l-640-ade20k", (512, 512))],
)
def test_sizes_that_a_trunk_cannot_take_are_refused(name: str, res: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=f"cannot take images of {res[0]}x{res[1]}"):
        build_backbone(name, res=res, weights="random:0")


@pytest.mark.parametrize("case", MINIS)
@torch.no_grad()
def test_an_image_does_not_depend_on_the_others_of_its_batch(case: str) -> None:
    net = mini_net(case)
    first, second = (
        transformers_image(128, 128),
        torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)),
    )
    together = net(torch.cat([first, second]))
    torch.testing.assert_close(together, torch.cat([net(first), net(second)]), atol=5e-5, rtol=0)
    assert not torch.allclose(together[0], together[1], atol=0.1)


@pytest.mark.parametrize("case", MINIS)
@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 0.03), (torch.float16, 0.01)])
def test_low_precision_stays_close_to_float32(case: str, dtype: torch.dtype, close: float) -> None:
    images = transformers_image(128, 128)
    with torch.no_grad():
        exact = mini_net(case)(images)
    backbone = Backbone(
        mini_net(case),
        row=catalogue.row("adapter-deit-s-ade20k"),
        res=(128, 128),
        dtype=dtype,
        weights_sha256="",
        weights_source="",
    )
    found = backbone(images)
    assert found.dtype == dtype
    relative_rms = float((found.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert 0 < relative_rms < close


@torch.no_grad()
def test_deformable_attention_samples_where_it_says() -> None:
    attention = DeformableAttention(4, heads=2, scales=1, value_ratio=1.0)
    for linear in (attention.sampling_offsets, attention.attention_weights):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    for linear in (attention.value_proj, attention.output_proj):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    value_BVD = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    map_HWD = value_BVD[0].unflatten(0, (2, 3))

    def sampled(offset_xy: tuple[float, float]) -> Tensor:
        attention.sampling_offsets.bias.copy_(torch.tensor(offset_xy).repeat(2 * 4))
        return attention(torch.zeros(1, 6, 4), [(2, 3)], value_BVD, [(2, 3)])[0].unflatten(0, (2, 3))

    torch.testing.assert_close(sampled((0.0, 0.0)), map_HWD)
    right, outside = sampled((1.0, 0.0)).split([2, 1], dim=1)
    torch.testing.assert_close(right, map_HWD[:, 1:])
    torch.testing.assert_close(outside, torch.zeros(2, 1, 4))
    torch.testing.assert_close(sampled((0.0, -0.5))[1], (map_HWD[0] + map_HWD[1]) / 2)


def test_relative_positions_have_beits_numbers() -> None:
    # Of a 2x2 grid: 9 offsets, then class token to cell (9), cell to class token (10), class token to itself (11).
    assert relative_position_index(2, torch.device("cpu")).tolist() == [
        [11, 9, 9, 9, 9],
        [10, 4, 3, 1, 0],
        [10, 5, 4, 2, 1],
        [10, 7, 6, 4, 3],
        [10, 8, 7, 5, 4],
    ]
