"""Is our MambaVision the published network? Blocks and whole nets against reference outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_fill import assert_close_to_golden, fill_ssm, ssm_image, ssm_subsample
from torch import Tensor, nn

from vlmx.errors import UsageError
from vlmx.extract.backbones import catalogue
from vlmx.extract.backbones.mambavision import (
    ConvBlock,
    MambaMixer,
    MambaVision,
    MambaVisionClassifier,
    WindowStage,
    build,
    build_classifier,
)

TINY = {
    "depths": (1, 3, 8, 4),
    "heads": (2, 4, 8, 16),
    "windows": (8, 8, 14, 7),
    "in_dim": 32,
    "dim": 80,
    "conv_stages": 2,
    "tap": 2,
}


def manifest_of(shared: Path, name: str) -> list[list[object]]:
    manifest: list[list[object]] = json.loads((shared / "golden/ssm" / name).read_text())
    return manifest


@pytest.fixture(scope="module")
def tiny_weights(shared: Path) -> dict[str, Tensor]:
    return fill_ssm(manifest_of(shared, "manifests/mambavision_T.json"))


@pytest.mark.parametrize(
    ("case", "make"),
    [
        ("mv_mixer_d32", lambda: MambaMixer(32)),
        ("mv_convblock_d16", lambda: ConvBlock(16)),
        (
            "mv_layer_d32_pad",
            lambda: WindowStage(32, 3, heads=4, window=4, mlp_ratio=4.0, layer_scale=True, downsample=False),
        ),
    ],
)
def test_blocks_give_the_reference_output(shared: Path, case: str, make) -> None:  # type: ignore[no-untyped-def]
    block: nn.Module = make().eval()
    block.load_state_dict(fill_ssm(manifest_of(shared, f"units/{case}.manifest.json")), strict=True)
    golden = np.load(shared / f"golden/ssm/units/{case}.npz")
    with torch.no_grad():
        found = block(torch.from_numpy(golden["x"]))
    assert_close_to_golden(found.numpy(), golden["y"], std=golden["y"].std())


@pytest.mark.parametrize(("height", "width"), [(224, 224), (256, 320)])
def test_tiny_gives_the_reference_stage_3(
    shared: Path, tiny_weights: dict[str, Tensor], height: int, width: int
) -> None:
    net = MambaVision(res=(height, width), **TINY).eval()
    net.load_state_dict(net.adapt_state_dict(tiny_weights), strict=True)
    with torch.no_grad():
        tokens_BND = net(ssm_image(height, width))
    case = shared / f"golden/ssm/mambavision/mambavision_T_{height}x{width}"
    described = json.loads(case.with_suffix(".json").read_text())["outputs"]["stage3"]
    assert list(tokens_BND.shape) == [1, described["shape"][2] * described["shape"][3], 320]
    found = ssm_subsample(tokens_BND.transpose(1, 2).contiguous())
    assert_close_to_golden(found, np.load(case.with_suffix(".npz"))["stage3"], std=described["std"])


@pytest.mark.slow
def test_whole_tiny_gives_the_reference_logits(shared: Path, tiny_weights: dict[str, Tensor]) -> None:
    net = MambaVisionClassifier(num_classes=1000, res=(224, 224), **TINY).eval()
    net.load_state_dict(tiny_weights, strict=True)
    case = shared / "golden/ssm/mambavision/mambavision_T_224x224"
    std = json.loads(case.with_suffix(".json").read_text())["outputs"]["logits"]["std"]
    with torch.no_grad():
        logits = net(ssm_image(224, 224))
    assert_close_to_golden(ssm_subsample(logits, at_most=1024), np.load(case.with_suffix(".npz"))["logits"], std=std)


def test_hub_files_with_a_model_prefix_load_too() -> None:
    row = catalogue.row("mambavision-mini-scenes")
    net = build(row, (64, 64))
    published = build_classifier(row, (64, 64), 5).state_dict()
    prefixed = {f"model.{name}": value for name, value in published.items()}
    assert (
        net.adapt_state_dict(prefixed).keys() == net.adapt_state_dict(dict(published)).keys() == net.state_dict().keys()
    )


def test_stages_after_the_tap_are_not_built() -> None:
    net = MambaVision(res=(224, 224), **TINY)
    names = net.state_dict()
    assert sum(p.numel() for p in net.parameters()) == 11_186_528  # the published T up to the blocks of stage 3
    assert not [n for n in names if n.startswith(("levels.3", "levels.2.downsample", "norm", "head"))]


def test_half_of_the_blocks_attend_and_an_odd_one_scans() -> None:
    stage = WindowStage(32, 5, heads=2, window=2, mlp_ratio=1.0, layer_scale=False, downsample=False)
    assert [type(block.mixer).__name__ for block in stage.blocks] == [*["MambaMixer"] * 3, *["Attention"] * 2]


def test_an_image_smaller_than_a_token_is_refused() -> None:
    with pytest.raises(UsageError, match="4x64") as caught:
        build(catalogue.row("mambavision-mini-scenes"), (4, 64))
    assert "64x64" in caught.value.fix
