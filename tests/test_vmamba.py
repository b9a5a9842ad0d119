"""Does VMamba give the reference's numbers, accept every form of its checkpoints, and refuse all others by name?"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlmx.errors import UnknownNameError, UsageError, WeightsError
from vlmx.extract.backbones.base import Backbone, build_backbone
from vlmx.extract.backbones.catalogue import row
from vlmx.extract.backbones.vmamba import VMambaClassifier, VMambaNet

MINI: dict[str, Any] = {"depths": (1, 3, 1), "dims": (32, 96, 128), "ssm_ratio": 1.0}


@pytest.mark.parametrize(("size", "parameters"), [("t", 14_374_272), ("s", 31_276_224), ("b", 55_400_704)])
def test_nothing_after_the_tapped_stage_is_built(size: str, parameters: int) -> None:
    with torch.device("meta"):
        network = VMambaNet(res=(224, 224), **row(f"vmamba-{size}-in1k").arch, out_norm="none")
    assert sum(p.numel() for p in network.parameters()) == parameters


# From here on: a network of the same code that is small enough to be quick.


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """A whole classification network's state dict."""
    torch.manual_seed(5)
    return VMambaClassifier(**MINI, num_classes=7).state_dict()


def mini(weights: Any, *, res: tuple[int, int] = (64, 64), **options: Any) -> Backbone:
    return build_backbone("vmamba-mini-scenes", res=res, weights=weights, **options)


def image(height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_attributes(published: dict[str, Tensor]) -> None:
    backbone = mini(published, res=(64, 90))
    assert backbone.name == "vmamba-mini-scenes"
    assert (backbone.res, backbone.grid, backbone.num_tokens, backbone.dim) == ((64, 90), (8, 12), 96, 96)
    assert (backbone.feature, backbone.out_norm, backbone.forward_version) == ("stage2", "none", 1)
    assert backbone.weights_source == "state dict"
    assert backbone(image(64, 90)).shape == (2, 96, 96)


def test_every_form_of_a_checkpoint_gives_the_same_tokens(published: dict[str, Tensor]) -> None:
    expected = mini(published)(image())
    needed = mini(published).net.state_dict()
    forms = {
        "only what is needed": needed,
        "wrapped for parallel training": {f"module.{k}": v for k, v in published.items()},
        "inside a detector": {f"backbone.{k}": v for k, v in needed.items()}
        | {"neck.convs.0.weight": torch.ones(1), "roi_head.bbox_head.fc.weight": torch.ones(1)},
        "1x1 convolutions": {
            k: v[..., None, None]
            if k.endswith(("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight"))
            else v
            for k, v in published.items()
        },
        "stacked directions": {
            k.replace("proj_weight", "proj.weight").replace("projs_weight", "projs.weight"): (
                v.flatten(0, 1) if k.endswith(("x_proj_weight", "dt_projs_weight")) else v
            )
            for k, v in published.items()
        },
    }
    for form, state in forms.items():
        assert torch.equal(mini(state)(image()), expected), form


def test_always_in_eval_mode_without_gradients(published: dict[str, Tensor]) -> None:
    backbone = mini(published)
    backbone.train()
    holder = nn.Sequential(backbone).train()
    assert not any(module.training for module in holder[0].modules())
    assert not backbone(image().requires_grad_()).requires_grad
    assert not any(p.requires_grad for p in backbone.parameters())


def test_the_classifier_learns_and_its_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    network = VMambaClassifier(**MINI, num_classes=2)
    colours = torch.rand(8, 3, 32, 32) + torch.tensor([0.0, 1.0] * 4)[:, None, None, None]
    labels = torch.tensor([0, 1] * 4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(network(colours), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in network.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_random_weights_follow_their_seed_and_leave_the_callers_random_state_alone() -> None:
    torch.manual_seed(9)
    before = torch.get_rng_state()
    first, again, other = mini("random:3"), mini("random:3"), mini("random:4")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first(image()), again(image()))
    assert not torch.equal(first(image()), other(image()))
    assert (first.weights_sha256, first.weights_source) == ("random:3", "random seed 3")


@pytest.mark.parametrize("seed", ["random:", "random:-1", "random:x", "random:1.5", "random:99999999999999999999"])
def test_bad_seeds(seed: str) -> None:
    with pytest.raises(UsageError, match="names no seed"):
        mini(seed)


def test_bfloat16_is_close_and_gives_bfloat16(published: dict[str, Tensor]) -> None:
    exact = mini(published)(image())
    half = mini(published, dtype=torch.bfloat16)(image())
    assert half.dtype == torch.bfloat16
    assert float((half.float() - exact).square().mean().sqrt() / exact.std()) < 0.03


def test_images_that_do_not_fit_are_refused(published: dict[str, Tensor]) -> None:
    backbone = mini(published)
    with pytest.raises(UsageError, match=r"\(B, 3, 64, 64\); got \(2, 3, 64, 72\)"):
        backbone(image(64, 72))
    with pytest.raises(UsageError, match=r"floating-point images; got torch\.uint8"):
        backbone(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_out_norms() -> None:
    arch = {"res": (64, 64), **row("vmamba-mini-scenes").arch, "checkpoint_out_norm": "trained"}
    torch.manual_seed(0)
    trained = VMambaNet(**arch, out_norm="trained").requires_grad_(False)
    trained.get_submodule("outnorm1").weight.fill_(2.0)
    state = trained.state_dict()
    raw, plain = (VMambaNet(**arch, out_norm=kind) for kind in ("none", "identity-affine"))
    for network in (raw, plain):
        network.load_state_dict(network.adapt_state_dict(state))
    with torch.no_grad():
        tokens = raw(image())
        normed = nn.functional.layer_norm(tokens, (96,), eps=1e-5)
        torch.testing.assert_close(plain(image()), normed)
        torch.testing.assert_close(trained(image()), 2 * normed)


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="has no option 'out_nrom'; options of vmamba: out_norm"):
        mini("random:0", out_nrom="none")
    with pytest.raises(UsageError, match="out_norm='layer' is not known; choose one of trained, identity-affine, none"):
        mini("random:0", out_norm="layer")
    with pytest.raises(UsageError, match="has no trained out-norm"):
        build_backbone("vmamba-t-in1k", res=(224, 224), out_norm="trained")
    with pytest.raises(UsageError, match=r"cannot take images of 64x7 pixels; .*use any from 8x8"):
        mini("random:0", res=(64, 7))
    with pytest.raises(UnknownNameError, match="vmamba-t-in1k"):
        build_backbone("vmamba-t-in1", res=(224, 224))


def of_variant(depths: tuple[int, ...], dims: tuple[int, ...], ssm_ratio: float) -> dict[str, Tensor]:
    """A state dict with right names and shapes and no memory."""
    with torch.device("meta"):
        return VMambaClassifier(depths=depths, dims=dims, ssm_ratio=ssm_ratio, num_classes=1000).state_dict()


@pytest.mark.parametrize(
    ("depths", "dims", "ssm_ratio", "looks_like"),
    [
        ((2, 2, 5, 2), (96, 192, 384, 768), 2.0, "VMamba-T s2l5 (depths 2,2,5,2, dims 96,192,384,768, ssm_ratio 2)"),
        ((2, 2, 15, 2), (96, 192, 384, 768), 2.0, "VMamba-S s2l15"),
        ((2, 2, 20, 2), (128, 256, 512, 1024), 1.0, "VMamba-B s1l20"),
        ((2, 2, 9, 2), (96, 192, 384, 768), 2.0, "a VMamba (depths 2,2,9,2"),
    ],
)
def test_another_variant_is_refused_by_name(
    depths: tuple[int, ...], dims: tuple[int, ...], ssm_ratio: float, looks_like: str
) -> None:
    network = VMambaNet(res=(224, 224), **row("vmamba-t-in1k").arch, out_norm="none")
    with pytest.raises(WeightsError) as caught:
        network.adapt_state_dict(of_variant(depths, dims, ssm_ratio))
    assert looks_like in str(caught.value)
    assert "not VMamba-T s1l8" in str(caught.value)


def test_a_checkpoint_of_another_training_is_refused(published: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsError, match="detection or segmentation checkpoint"):
        mini({**published, "outnorm0.weight": torch.ones(32)})
    dense = VMambaNet(
        res=(64, 64), **{**row("vmamba-mini-scenes").arch, "checkpoint_out_norm": "trained"}, out_norm="none"
    )
    with pytest.raises(WeightsError, match="ImageNet classification checkpoint"):
        dense.adapt_state_dict(published)


def test_keys_shapes_and_values_are_checked_and_named(published: dict[str, Tensor]) -> None:
    bad = dict(published)
    del bad["patch_embed.5.bias"]
    bad["layers.0.blocks.0.surprise"] = torch.ones(1)
    bad["patch_embed.0.bias"] = torch.ones(3)
    bad["patch_embed.2.bias"] = torch.full((16,), float("inf"))
    with pytest.raises(WeightsError) as caught:
        mini(bad)
    for problem in (
        "1 key is missing: patch_embed.5.bias",
        "1 key is unexpected: layers.0.blocks.0.surprise",
        "patch_embed.0.bias is (3,), needed (16,)",
        "NaN or infinity: patch_embed.2.bias",
    ):
        assert problem in str(caught.value)


def test_a_checkpoint_given_whole_is_refused_with_a_hint(published: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsError, match=r"no tensors by name: 'model', 'epoch'; .*entry 'model'"):
        mini({"model": published, "epoch": 3})
