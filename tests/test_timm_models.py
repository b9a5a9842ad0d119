"""Are the tokens of timm's ViT and MaxViT the ones that the paper's codebase feeds to its VLMs?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_fill import fill_transformers, transformers_image, transformers_subsample
from torch import Tensor

from vlmx.errors import UsageError, WeightsError
from vlmx.extract.backbones import catalogue
from vlmx.extract.backbones.base import build_backbone
from vlmx.extract.backbones.timm_models import TimmMaxViT, TimmViT, build, build_classifier


def vit_tiny_weights(shared: Path) -> dict[str, Tensor]:
    case = shared / "golden/transformers/timmref_vit_tiny_224.manifest.json"
    return fill_transformers(json.loads(case.read_text())["native_keys_and_shapes"])


def small_vit_state(res: tuple[int, int]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state: dict[str, Tensor] = build_classifier(catalogue.row("vit-mini-scenes"), res, 5).state_dict()
    return state


def test_vit_tiny_gives_the_reference_second_to_last_block(shared: Path) -> None:
    backbone = build_backbone("vit-t-in21k", res=(224, 224), weights=vit_tiny_weights(shared))
    golden = np.load(shared / "golden/transformers/timmref_vit_tiny_224.npz")
    tokens_BND = backbone(transformers_image(224, 224))
    assert tokens_BND.shape == (1, 196, 192)
    assert (backbone.grid, backbone.num_tokens, backbone.dim) == ((14, 14), 196, 192)
    assert np.abs(transformers_subsample(tokens_BND) - golden["tokens"]).max() <= 3e-5
    assert np.abs(transformers_subsample(tokens_BND) - golden["last_block_tokens"]).max() > 1.0


def test_maxvit_tiny_gives_the_reference_stage_3(shared: Path) -> None:
    row = replace(
        catalogue.row("maxvit-mini-scenes"), arch={"timm_id": "maxvit_tiny_tf_224.in1k"}, native_res=(224, 224)
    )
    case = shared / "golden/transformers/timmref_maxvit_tiny_224"
    weights = fill_transformers(json.loads(Path(f"{case}.manifest.json").read_text())["native_keys_and_shapes"])
    net = build(row, (224, 224)).eval()
    net.load_state_dict(net.adapt_state_dict(weights), strict=True)
    with torch.no_grad():
        tokens_BND = net(transformers_image(224, 224))
    assert tokens_BND.shape == (1, 196, 256)
    assert net.grid == (14, 14)
    assert np.abs(transformers_subsample(tokens_BND) - np.load(f"{case}.npz")["tokens"]).max() <= 1e-4


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
    net = build(catalogue.row("vit-mini-scenes"), (96, 64))
    assert isinstance(net, TimmViT)
    adapted = net.adapt_state_dict(state)["net.pos_embed"]
    assert net.grid == (12, 8)
    assert adapted.shape == (1, 1 + 12 * 8, 96)
    assert torch.equal(adapted[:, 0], state["pos_embed"][:, 0])  # the class token's row is not resampled


def test_vit_has_neither_last_block_nor_head() -> None:
    names = build(catalogue.row("vit-t-in21k"), (224, 224)).state_dict()
    assert {n.split(".")[2] for n in names if n.startswith("net.blocks.")} == {str(i) for i in range(11)}
    assert not [n for n in names if n.startswith(("net.norm", "net.head", "net.fc_norm"))]


def test_maxvit_has_no_later_stage_and_no_head() -> None:
    net = build(catalogue.row("maxvit-mini-scenes"), (64, 64))
    assert isinstance(net, TimmMaxViT)
    assert {n.split(".")[2] for n in net.state_dict() if n.startswith("net.stages.")} == {"0", "1"}
    assert not [n for n in net.state_dict() if n.startswith(("net.norm", "net.head"))]


@pytest.mark.parametrize("name", ["vit-mini-scenes", "maxvit-mini-scenes"])
def test_a_data_parallel_prefix_is_taken_off(name: str) -> None:
    row = catalogue.row(name)
    net = build(row, (64, 64))
    state = {f"module.{key}": value for key, value in build_classifier(row, (64, 64), 5).state_dict().items()}
    assert net.adapt_state_dict(state).keys() == net.state_dict().keys()


def test_a_checkpoint_without_a_needed_block_is_refused() -> None:
    state = {name: value for name, value in small_vit_state((64, 64)).items() if not name.startswith("blocks.3.")}
    with pytest.raises(WeightsError, match=r"blocks\.3\.norm1"):
        build_backbone("vit-mini-scenes", res=(64, 64), weights=state)


@pytest.mark.parametrize(
    ("name", "res", "hint"),
    [
        ("vit-mini-scenes", (60, 64), "56x64"),
        ("vit-s-in1k", (8, 224), "16x224"),
        ("maxvit-mini-scenes", (128, 128), "64x64"),
    ],
)
def test_sizes_that_the_net_cannot_take_are_refused(name: str, res: tuple[int, int], hint: str) -> None:
    with pytest.raises(UsageError, match=f"{res[0]}x{res[1]}") as caught:
        build(catalogue.row(name), res)
    assert hint in caught.value.fix
