"""Does every encoder that ships with vlmx keep the promises of a backbone? One suite for all of them."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vlmx import build_backbone
from vlmx.errors import UsageError
from vlmx.extract.backbones import catalogue

MINI = [row.name for row in catalogue.rows() if row.packaged]
RES = (64, 64)

pytestmark = pytest.mark.parametrize("name", MINI)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, *RES, generator=torch.Generator().manual_seed(5))


def packaged(name: str) -> Path:
    return Path(str(files("vlmx"))) / catalogue.row(name).packaged


def test_tokens_have_the_shape_that_the_catalogue_promises(name: str) -> None:
    backbone = build_backbone(name, res=RES)
    tokens_BND = backbone(images(2))
    assert backbone.grid == (RES[0] // backbone.row.stride, RES[1] // backbone.row.stride) == (8, 8)
    assert tokens_BND.shape == (2, 64, backbone.row.dim)
    assert (backbone.num_tokens, backbone.dim) == (64, backbone.row.dim)
    assert bool(torch.isfinite(tokens_BND).all())


def test_packaged_weights_are_found_fit_and_stay_small(name: str) -> None:
    backbone = build_backbone(name, res=RES)
    assert backbone.weights_source == f"file {packaged(name)}"
    assert packaged(name).stat().st_size <= 2_000_000
    again = build_backbone(name, res=RES, weights=load_file(packaged(name)))
    assert torch.equal(backbone(images(2)), again(images(2)))


def test_the_card_says_how_the_weights_were_made(name: str) -> None:
    card = json.loads(packaged(name).with_suffix(".json").read_text())
    assert card["backbone"] == name
    assert card["samples"] >= 72_000
    assert card["parameters_kept"] == sum(p.numel() for p in build_backbone(name, res=RES).parameters())
    assert set(card["held_out_accuracy"]) == {"shape", "color", "size", "letter"}


def test_a_random_network_depends_on_its_seed_alone(name: str) -> None:
    first = build_backbone(name, res=RES, weights="random:3")
    torch.manual_seed(99)
    again = build_backbone(name, res=RES, weights="random:3")
    other = build_backbone(name, res=RES, weights="random:4")
    assert torch.equal(first(images(1)), again(images(1)))
    assert not torch.equal(first(images(1)), other(images(1)))


def test_train_mode_changes_nothing(name: str) -> None:
    backbone = build_backbone(name, res=RES)
    before = backbone(images(2))
    state = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert torch.equal(backbone(images(2)), before)
    assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())


def test_no_gradient_is_kept(name: str) -> None:
    backbone = build_backbone(name, res=RES, weights="random:0")
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not backbone(images(1).requires_grad_()).requires_grad


def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    backbone = build_backbone(name, res=RES)
    together = backbone(images(3))
    alone = torch.cat([backbone(image[None]) for image in images(3)])
    assert torch.allclose(together, alone, atol=1e-4 * together.std().item())


def test_every_weight_takes_part_in_the_tokens(name: str) -> None:
    net = build_backbone(name, res=RES, weights="random:0").net.requires_grad_(True)
    net(images(1)).square().sum().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None] == []


def test_tokens_are_row_major(name: str) -> None:
    """A square drawn in grid row 6, column 1 changes the token there most."""
    backbone = build_backbone(name, res=RES)
    marked_BCHW = torch.zeros(1, 3, *RES)
    marked_BCHW[:, 0, 48:56, 8:16] = 1.0
    change_N = (backbone(marked_BCHW) - backbone(torch.zeros(1, 3, *RES)))[0].norm(dim=1)
    assert divmod(int(change_N.argmax()), 8) == (6, 1)


def test_bfloat16_is_close_to_float32(name: str) -> None:
    exact = build_backbone(name, res=RES)(images(2))
    rough = build_backbone(name, res=RES, dtype=torch.bfloat16)(images(2))
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).pow(2).mean().sqrt() < 0.05 * exact.std()


def test_images_of_another_size_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="64, 64"):
        build_backbone(name, res=RES, weights="random:0")(torch.zeros(1, 3, 64, 72))


def test_an_unknown_option_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no option 'out_nrom'"):
        build_backbone(name, res=RES, weights="random:0", out_nrom="none")
