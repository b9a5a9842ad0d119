"""Do published tensors get into the right network, all of them, and is everything else refused by name?"""

from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vlmx.errors import BackendError, UsageError, WeightsError
from vlmx.extract.backbones.base import build_backbone
from vlmx.extract.backbones.catalogue import row


def mini_state(name: str = "vmamba-mini-scenes") -> dict[str, Tensor]:
    return load_file(Path(str(files("vlmx"))) / row(name).packaged)


def test_counters_of_batch_norms_need_not_be_there() -> None:
    state = mini_state("maxvit-mini-scenes")
    assert any(key.endswith("num_batches_tracked") for key in state)
    without = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    images_BCHW = torch.randn(1, 3, 64, 64)
    expected = build_backbone("maxvit-mini-scenes", res=(64, 64), weights=state)(images_BCHW)
    assert torch.equal(build_backbone("maxvit-mini-scenes", res=(64, 64), weights=without)(images_BCHW), expected)


def test_weights_of_another_backbone_are_refused_with_the_name_of_what_they_are() -> None:
    state = mini_state("vmamba-mini-scenes")
    for other in ("vit-mini-scenes", "mambavision-t-in1k", "vim-t-in1k"):
        with pytest.raises(WeightsError) as caught:
            build_backbone(other, res=row(other).native_res, weights=state)
        assert caught.value.why.startswith("they are the weights of vmamba-mini-scenes; ")


def test_what_an_option_needs_is_named_alone() -> None:
    """The ViT of a ViTDet without its pyramid fits, but not with feature=p4."""
    net = build_backbone("vitdet-b-coco", res=(64, 64), weights="random:0").net.state_dict()
    with pytest.raises(WeightsError) as caught:
        build_backbone("vitdet-b-coco", res=(64, 64), weights=net, feature="p4")
    assert caught.value.why.startswith("6 keys are missing: simfp_4.0.weight")


@pytest.mark.parametrize("lost", ["layers.1.blocks.1.norm.weight", "layers.1.blocks.2."])
def test_a_partial_file_is_not_taken_for_another_variant(lost: str) -> None:
    state = {key: value for key, value in mini_state().items() if not key.startswith(lost)}
    with pytest.raises(WeightsError, match=r"missing: .*" + lost.rstrip(".").replace(".", r"\.")):
        build_backbone("vmamba-mini-scenes", res=(64, 64), weights=state)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.to(torch.int8), "is torch.int8"),
        (lambda t: t.to(torch.complex64), "is torch.complex64"),
        (lambda t: t.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn"),
        (lambda t: t.to("meta"), "meta device, or sparse"),
        (lambda t: t.to_sparse(), "meta device, or sparse"),
        (lambda t: t * torch.nan, "1 tensor holds NaN or infinity"),
    ],
)
def test_tensors_that_cannot_be_weights(change: Any, complaint: str) -> None:
    state = mini_state()
    key = "layers.0.blocks.0.mlp.fc1.weight"
    with pytest.raises(WeightsError) as caught:
        build_backbone("vmamba-mini-scenes", res=(64, 64), weights={**state, key: change(state[key])})
    assert complaint in caught.value.why
    assert key in caught.value.why


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_another_precision_load(dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in mini_state().items()}
    backbone = build_backbone("vmamba-mini-scenes", res=(64, 64), weights=state)
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}


def test_weights_beyond_the_range_of_float16_are_refused_in_float16() -> None:
    state = mini_state()
    state["patch_embed.0.weight"] = state["patch_embed.0.weight"].float() * 1e7
    assert build_backbone("vmamba-mini-scenes", res=(64, 64), weights=state, dtype=torch.bfloat16)
    with pytest.raises(WeightsError, match="do not fit into float16"):
        build_backbone("vmamba-mini-scenes", res=(64, 64), weights=state, dtype=torch.float16)


def test_loading_is_free_of_random_initialisation_and_gives_the_same_network() -> None:
    state = mini_state()
    random_before = torch.get_rng_state()
    loaded = build_backbone("vmamba-mini-scenes", res=(64, 64), weights=state)
    assert torch.equal(torch.get_rng_state(), random_before)
    own = loaded.state_dict()
    assert all(torch.equal(value, state[key.removeprefix("net.")]) for key, value in own.items())
    filled = build_backbone("vmamba-mini-scenes", res=(64, 64), weights="random:1")
    assert float(filled.state_dict()["net.layers.0.blocks.0.mlp.fc1.weight"].std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "backbone.", "module.backbone."])
def test_prefixes_and_what_lies_beside_a_backbone(prefix: str) -> None:
    state = {f"{prefix}{key}": value for key, value in mini_state().items()}
    if prefix.endswith("backbone."):
        outer = prefix.removesuffix("backbone.")
        beside = (
            "data_preprocessor.mean",
            "neck.x",
            "rpn_head.x",
            "roi_head.x",
            "decode_head.x",
            "pixel_mean",
            "ema_x",
        )
        state |= {f"{outer}{name}": torch.zeros(1) for name in beside}
    assert build_backbone("vmamba-mini-scenes", res=(64, 64), weights=state)


def test_arguments_that_make_no_sense() -> None:
    build = partial(build_backbone, "vmamba-mini-scenes")
    for res in (64, (64, 64, 3), (64.0, 64.0), "64x64", (True, 64)):
        with pytest.raises(UsageError, match=r"is not \(height, width\)"):
            build(res=res)
    assert build(res=[64, 64]).res == (64, 64)
    with pytest.raises(UsageError, match="weights cannot be a int"):
        build(res=(64, 64), weights=3)
    with pytest.raises(UsageError, match="on the meta device there are no weights"):
        build(res=(64, 64), weights="/nowhere.pth", device="meta")
    with pytest.raises(BackendError, match="the device 'gpu' cannot be used"):
        build(res=(64, 64), device="gpu")
    with pytest.raises(WeightsError, match="holds more than tensors"):
        build(res=(64, 64), weights={3: torch.zeros(1)})
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            backbone = build(res=(64, 64))
    finally:
        torch.set_default_dtype(torch.float32)
    assert backbone(torch.zeros(1, 3, 64, 64)).dtype == torch.float32
