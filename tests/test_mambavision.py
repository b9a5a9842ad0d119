"""Does MambaVision take its files in all their forms, and build the blocks that it should? (Numbers: test_golden.)"""

from __future__ import annotations

from vlmx.extract.backbones import catalogue
from vlmx.extract.backbones.mambavision import (
    MambaVision,
    WindowStage,
    build,
    build_classifier,
)


def test_hub_files_with_a_model_prefix_load_too() -> None:
    row = catalogue.row("mambavision-mini-scenes")
    net = build(row, (64, 64))
    published = build_classifier(row, (64, 64), 5).state_dict()
    prefixed = {f"model.{name}": value for name, value in published.items()}
    assert (
        net.adapt_state_dict(prefixed).keys() == net.adapt_state_dict(dict(published)).keys() == net.state_dict().keys()
    )


def test_stages_after_the_tap_are_not_built() -> None:
    net = MambaVision(res=(224, 224), **catalogue.row("mambavision-t-in1k").arch)
    names = net.state_dict()
    assert sum(p.numel() for p in net.parameters()) == 11_186_528  # the published T up to the blocks of stage 3
    assert not [n for n in names if n.startswith(("levels.3", "levels.2.downsample", "norm", "head"))]


def test_half_of_the_blocks_attend_and_an_odd_one_scans() -> None:
    stage = WindowStage(32, 5, heads=2, window=2, mlp_ratio=1.0, layer_scale=False, downsample=False)
    assert [type(block.mixer).__name__ for block in stage.blocks] == [*["MambaMixer"] * 3, *["Attention"] * 2]
