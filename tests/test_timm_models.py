"""Are timm's networks tapped where they should be, whatever form their files have? (Numbers: test_golden.)"""

from __future__ import annotations

import re

import pytest
import torch
from timm.models import create_model
from torch import Tensor

from vlmx.errors import UnknownNameError, UsageError, WeightsError
from vlmx.extract.backbones import catalogue
from vlmx.extract.backbones.base import build_backbone
from vlmx.extract.backbones.loading import fit_problems
from vlmx.extract.backbones.timm_models import build_classifier, build_maxvit, build_vit
from vlmx.extract.plan import spec_of
from vlmx.testing.backbones import unused_parameters


def small_vit_state(res: tuple[int, int]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state: dict[str, Tensor] = build_classifier(catalogue.row("vit-mini-scenes"), res, 5).state_dict()
    return state


def test_vit_tokens_are_the_input_of_the_last_block() -> None:
    row = catalogue.row("vit-mini-scenes")
    torch.manual_seed(0)
    whole = build_classifier(row, (64, 64), 5).eval()
    seen: list[Tensor] = []
    whole.blocks[5].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images_BCHW = torch.randn(2, 3, 64, 64)
    tokens_BND = build_backbone(row.name, res=(64, 64), weights=dict(whole.state_dict()))(images_BCHW)
    with torch.no_grad():
        whole(images_BCHW)
    assert torch.allclose(tokens_BND, seen[0][:, 1:], atol=1e-5)  # without the class token


def test_vit_position_embeddings_follow_the_image_size() -> None:
    state = small_vit_state((64, 64))
    net = build_vit(catalogue.row("vit-mini-scenes"), (96, 64))
    adapted = net.adapt_state_dict(state)["net.pos_embed"]
    assert net.grid == (12, 8)
    assert adapted.shape == (1, 1 + 12 * 8, 96)
    assert torch.equal(adapted[:, 0], state["pos_embed"][:, 0])  # the class token's row is not resampled


def test_vit_has_neither_last_block_nor_head() -> None:
    names = build_vit(catalogue.row("vit-t-in21k"), (224, 224)).state_dict()
    assert {n.split(".")[2] for n in names if n.startswith("net.blocks.")} == {str(i) for i in range(11)}
    assert not [n for n in names if n.startswith(("net.norm", "net.head", "net.fc_norm"))]


def test_maxvit_has_no_later_stage_and_no_head() -> None:
    net = build_maxvit(catalogue.row("maxvit-mini-scenes"), (64, 64))
    assert {n.split(".")[2] for n in net.state_dict() if n.startswith("net.stages.")} == {"0", "1"}
    assert not [n for n in net.state_dict() if n.startswith(("net.norm", "net.head"))]


@pytest.mark.parametrize("name", ["vit-mini-scenes", "maxvit-mini-scenes"])
def test_a_data_parallel_prefix_is_taken_off(name: str) -> None:
    row = catalogue.row(name)
    net = build_vit(row, (64, 64)) if row.family == "vit" else build_maxvit(row, (64, 64))
    state = {f"module.{key}": value for key, value in build_classifier(row, (64, 64), 5).state_dict().items()}
    assert net.adapt_state_dict(state).keys() == net.state_dict().keys()


def test_a_checkpoint_without_a_needed_block_is_refused() -> None:
    state = {name: value for name, value in small_vit_state((64, 64)).items() if not name.startswith("blocks.3.")}
    with pytest.raises(WeightsError, match=r"blocks\.3\.norm1"):
        build_backbone("vit-mini-scenes", res=(64, 64), weights=state)


def test_another_block_can_be_tapped() -> None:
    state = small_vit_state((64, 64))
    images_BCHW = torch.randn(1, 3, 64, 64)
    whole = build_classifier(catalogue.row("vit-mini-scenes"), (64, 64), 5).eval()
    whole.load_state_dict(state)
    seen: list[Tensor] = []
    for block in whole.blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.append(output[:, 1:]))
    with torch.no_grad():
        whole(images_BCHW)
    for block, index in [(None, 4), (-1, 5), (5, 5), (0, 0), (-6, 0)]:
        backbone = build_backbone("vit-mini-scenes", res=(64, 64), weights=state, block=block)
        assert backbone.feature == f"blocks.{index}"
        torch.testing.assert_close(backbone(images_BCHW), seen[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("block", "complaint"), [(6, "block=6"), (-7, "block=-7"), ("last", "'last'"), (1.0, "1.0")])
def test_blocks_that_do_not_exist_are_refused(block: object, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        build_backbone("vit-mini-scenes", res=(64, 64), device="meta", block=block)


def test_open_clip_and_openai_and_dinov2_files_load_as_they_are_published() -> None:
    """The layouts in which SigLIP and DINOv2 are published outside timm's hub, made from a network of ours."""
    timm_state = create_model("vit_base_patch16_siglip_224.webli", num_classes=0).state_dict()
    open_clip = {f"visual.trunk.{name}": value for name, value in timm_state.items()}
    open_clip["text.positional_embedding"] = torch.zeros(2)
    backbone = build_backbone("siglip-b16-224", res=(224, 224), weights=open_clip)
    assert torch.equal(backbone.state_dict()["net.net.pos_embed"], timm_state["pos_embed"])

    name = "timm:vit_small_patch14_reg4_dinov2.lvd142m"
    state = create_model("vit_small_patch14_reg4_dinov2.lvd142m").state_dict()
    prefix = state.pop("cls_token"), state.pop("reg_token")
    meta = {re.sub(r"^reg_token$", "register_tokens", key): value for key, value in state.items()}
    meta |= {"cls_token": prefix[0], "register_tokens": prefix[1], "mask_token": torch.zeros(1, 384)}
    meta["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), state["pos_embed"]], dim=1)
    images_BCHW = torch.randn(1, 3, 112, 112)
    tokens = build_backbone(name, res=(112, 112), weights=meta)(images_BCHW)
    expected = build_backbone(name, res=(112, 112), weights={**state, "cls_token": prefix[0], "reg_token": prefix[1]})
    torch.testing.assert_close(tokens, expected(images_BCHW))


@pytest.mark.parametrize(
    ("given", "to", "complaint"),
    [
        (
            "vit_large_patch14_clip_quickgelu_336.openai",
            "clip-l",
            "336x336 pixels",
        ),
        ("vit_base_patch16_siglip_256.webli", "siglip-b16-224", "256x256 pixels"),
        ("vit_large_patch14_reg4_dinov2.lvd142m", "dinov2-l", ""),
    ],
)
def test_weights_for_images_of_another_size_are_another_backbone(given: str, to: str, complaint: str) -> None:
    with torch.device("meta"):
        state = create_model(given).state_dict()
    problems = fit_problems(catalogue.row(to), state)
    assert (complaint in problems[0]) if complaint else problems == []


def test_patches_of_another_size_are_not_resampled_but_refused() -> None:
    state = small_vit_state((64, 64))
    state["patch_embed.proj.weight"] = torch.zeros(96, 3, 16, 16)
    with pytest.raises(WeightsError, match=r"patch_embed.proj.weight is \(96, 3, 16, 16\)"):
        build_backbone("vit-mini-scenes", res=(64, 64), weights=state)


def test_pixels_beyond_the_last_whole_patch_are_counted() -> None:
    assert catalogue.row("dinov2-l").unseen((384, 336)) == (6, 0)
    assert build_backbone("dinov2-l", res=(384, 336), device="meta").grid == (27, 24)


@pytest.mark.parametrize(
    ("timm_id", "native", "grid", "dim", "feature", "sizes"),
    [
        ("resnet18.a1_in1k", (224, 224), (14, 14), 256, "layer3", "any"),
        ("convnext_atto.d2_in1k", (224, 224), (14, 14), 160, "stages.2", "any"),
        ("swin_tiny_patch4_window7_224.ms_in1k", (224, 224), (14, 14), 384, "layers.2", "fixed"),
        ("eva02_tiny_patch14_224.mim_in22k", (224, 224), (16, 16), 192, "blocks.10", "fixed"),
        ("vit_tiny_patch16_384.augreg_in21k_ft_in1k", (384, 384), (24, 24), 192, "blocks.10", "patch"),
    ],
)
def test_any_other_timm_model(
    timm_id: str, native: tuple[int, int], grid: tuple[int, int], dim: int, feature: str, sizes: str
) -> None:
    row = catalogue.row(f"timm:{timm_id}")
    assert (row.native_res, row.grid, row.dim, row.sizes) == (native, grid, dim, sizes)
    published = create_model(timm_id).state_dict()
    backbone = build_backbone(row.name, res=native, weights=published)
    assert (backbone.name, backbone.feature, backbone.grid) == (f"timm:{timm_id}", feature, grid)
    assert unused_parameters(backbone, torch.zeros(1, 3, *native)) == []
    assert spec_of(backbone, "float16").name.startswith(f"timm-{timm_id}@{native[0]}x{native[1]}-")


@pytest.mark.parametrize(
    ("timm_id", "error", "complaint"),
    [
        ("vit_base_patch16_siglip_224", UsageError, "v2_webli"),
        ("vit_base_patch16_siglip_224.weblu", UnknownNameError, "webli"),
        ("resnet19", UnknownNameError, "resnet18"),
    ],
)
def test_timm_ids_that_name_no_weights_are_refused(timm_id: str, error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        catalogue.row(f"timm:{timm_id}")
