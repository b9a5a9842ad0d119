"""Does every registered encoder keep the promises of a backbone? The suite of plug-ins, and what it leaves open."""

from __future__ import annotations

import json
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import DropPath
from torch import Tensor, nn

from vlmx import build_backbone
from vlmx.errors import UsageError
from vlmx.extract.backbones import catalogue
from vlmx.extract.backbones.base import Backbone, FamilyNet
from vlmx.testing import BackboneSuite

MINI = [row.name for row in catalogue.rows() if row.packaged]
RES = (64, 64)


def distinct_networks() -> list[str]:
    """One name for each network of the catalogue; names that differ in their weights alone are left out."""
    found: dict[str, str] = {}
    for row in catalogue.rows():
        arch = {key: str(value).partition(".")[0] if key == "timm_id" else value for key, value in row.arch.items()}
        found.setdefault(f"{row.builder} {arch} {row.native_res}", row.name)
    return list(found.values())


# --- the suite that plug-ins run too ----------------------------------------------------------------------------------


@pytest.mark.parametrize("check", BackboneSuite.CHECKS)
@pytest.mark.parametrize(
    "name", [*MINI, "vit-t-in21k", "vmamba-t-coco", "mambavision-t-in1k", "adapter-augreg-t-ade20k"]
)
def test_small_backbones_pass_the_suite(name: str, check: str) -> None:
    getattr(BackboneSuite(name), check)()


# What of the suite a large network that takes only large images goes through: one pass takes a minute on a CPU core.
ONE_PASS = (
    "check_the_row_says_what_is_built",
    "check_every_parameter_takes_part",
    "check_shapes",
    "check_spec_round_trip",
    "check_sizes_are_refused",
)
LARGE = 4e10  # parameters x patches of 16x16 pixels


@pytest.mark.slow
@pytest.mark.parametrize("name", distinct_networks())
def test_every_backbone_passes_the_suite(name: str) -> None:
    suite = BackboneSuite(name)
    large = suite.row.params * suite.res[0] * suite.res[1] / 256 > LARGE
    for check in ONE_PASS if large else suite.CHECKS:
        getattr(suite, check)()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vitdet-b-coco", {"feature": "p4"}),
        ("vit-mini-scenes", {"block": -1}),
        ("vit-mini-scenes", {"block": 1}),
        ("vmamba-t-in1k", {"out_norm": "identity-affine"}),
        ("vmamba-t-coco", {"out_norm": "none"}),
    ],
)
def test_options_keep_everything_that_is_built_in_use(name: str, options: dict[str, object]) -> None:
    suite = BackboneSuite(name, **options)
    suite.check_every_parameter_takes_part()
    suite.check_spec_round_trip()


# --- only what is needed is computed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kinds", "ran"),
    [
        ("vit-b-in1k", ("Block",), 11),  # of 12
        ("clip-l", ("Block",), 23),  # of 24
        ("siglip-so400m-384", ("Block", "AttentionPoolLatent"), 26),  # of 27 and the pooling head
        ("dinov2-l", ("Block",), 23),
        ("vitdet-b-coco", ("Block", "LayerNorm2d"), 12),  # all, without the neck
        ("maxvit-t-in1k-224", ("MaxxVitBlock",), 2 + 2 + 5),  # without the 2 of stage 4
        ("vmamba-t-in1k", ("VSSBlock",), 2 + 2 + 8),
        ("mambavision-t-in1k", ("ConvBlock", "MixerBlock"), 1 + 3 + 8),
        ("vim-t-in1k", ("Block",), 24),
        ("adapter-deit-s-ade20k", ("ViTBlock",), 12),
        ("adapter-deit-s-ade20k", ("Extractor",), 4 + 2),
        ("adapter-deit-s-ade20k", ("ConvTranspose2d",), 0),  # it makes f1, which nobody asked for
        ("vmamba-t-in1k", ("SS2D", "Mlp"), 2 * (2 + 2 + 8)),
    ],
)
def test_nothing_runs_after_the_tap(name: str, kinds: tuple[str, ...], ran: int) -> None:
    """On the meta device, where a pass costs nothing; the numbers are those of the published architectures."""
    backbone = build_backbone(name, res=catalogue.row(name).native_res, device="meta")
    counted: Counter[str] = Counter()
    for module in backbone.modules():
        module.register_forward_hook(lambda module, *_: counted.update([type(module).__name__]))
    backbone(torch.empty(1, 3, *backbone.res, device="meta"))
    assert sum(counted[kind] for kind in kinds) == ran, counted


# --- always in eval mode ----------------------------------------------------------------------------------------------


class Noisy(FamilyNet):
    """A network that gives other tokens in training mode, in three ways."""

    grid, dim, feature, out_norm, forward_version = (8, 8), 6, "all", "none", 1

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 8, stride=8)
        self.norm, self.drop_path, self.dropout = nn.BatchNorm2d(6), DropPath(0.5), nn.Dropout(0.5)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = self.patches(images_BCHW)
        return (x + self.drop_path(self.dropout(self.norm(x)))).flatten(2).transpose(1, 2)


def test_drop_path_dropout_and_batch_norm_stay_in_eval_mode() -> None:
    row = catalogue.row("vit-mini-scenes")
    net = Noisy()
    backbone = Backbone(net, row=row, res=RES, dtype=torch.float32, weights_sha256="random:0", weights_source="")
    before, statistics = backbone(images(4)), net.norm.running_mean.clone()
    holder = nn.ModuleList([backbone]).train()  # as a model that holds the encoder would be trained
    net.drop_path.train()
    net.train()
    assert torch.equal(backbone(images(4)), before)
    assert torch.equal(net.norm.running_mean, statistics)
    assert int(net.norm.num_batches_tracked) == 0
    assert holder.training
    assert not any(module.training for module in backbone.modules())
    net.train()
    assert not torch.equal(net(images(4)), before)  # the network itself would have given other tokens


@pytest.mark.parametrize("name", ["vmamba-mini-scenes", "maxvit-mini-scenes"])
def test_a_built_backbone_is_not_cast(name: str) -> None:
    backbone = build_backbone(name, res=RES, dtype=torch.bfloat16)
    dtypes = {key: value.dtype for key, value in backbone.state_dict().items()}
    assert {torch.bfloat16, torch.float32} <= set(dtypes.values())
    backbone.to("cpu")
    backbone.to("cpu", torch.bfloat16)
    nn.Sequential(backbone).bfloat16()
    assert {key: value.dtype for key, value in backbone.state_dict().items()} == dtypes
    for cast in (backbone.half, backbone.float, lambda: backbone.to(torch.float16)):
        with pytest.raises(UsageError, match=r"build it with dtype=torch\.float"):
            cast()
    with pytest.raises(UsageError, match=r"cannot be cast to torch\.float64; .*leave it as it is"):
        backbone.double()


@pytest.mark.parametrize("name", MINI)
def test_autocast_around_a_backbone_changes_nothing(name: str) -> None:
    backbone = build_backbone(name, res=RES)
    with torch.autocast("cpu", torch.bfloat16):
        inside = backbone(images(1))
    assert torch.equal(inside, backbone(images(1)))


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "res", "fix"),
    [
        ("maxvit-t-in1k-224", (256, 256), "use 224x224, or the variant of this backbone for your size"),
        ("maxvit-mini-scenes", (128, 128), "use 64x64"),
        ("vim-t-in1k", (256, 256), "use 224x224"),
        ("vim-s-ft-in1k", (224, 240), "use 224x224"),
        ("adapter-beit-l-640-ade20k", (512, 512), "use 640x640"),
        ("adapter-deit-s-ade20k", (500, 512), "use 512x512; its own size is 512x512"),
        ("vitdet-b-coco", (800, 1333), "use 800x1328; its own size is 1024x1024"),
        ("vit-s-in1k", (8, 224), "use any from 16x16; its own size is 224x224"),
        ("mambavision-mini-scenes", (4, 64), "use any from 8x8; its own size is 64x64"),
    ],
)
def test_sizes_that_a_network_cannot_take_are_refused_before_any_work(
    name: str, res: tuple[int, int], fix: str
) -> None:
    with pytest.raises(UsageError, match=f"{res[0]}x{res[1]} pixels") as caught:
        build_backbone(name, res=res, weights="/not/there.pth")  # the file is not even looked for
    assert fix in caught.value.fix


# --- the encoders that ship with vlmx ---------------------------------------------------------------------------------


minis = pytest.mark.parametrize("name", MINI)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, *RES, generator=torch.Generator().manual_seed(5))


def packaged(name: str) -> Path:
    return Path(str(files("vlmx"))) / catalogue.row(name).packaged


@minis
def test_packaged_weights_are_found_fit_and_stay_small(name: str) -> None:
    backbone = build_backbone(name, res=RES)
    assert backbone.weights_source == f"file {packaged(name)}"
    assert packaged(name).stat().st_size <= 2_000_000
    again = build_backbone(name, res=RES, weights=load_file(packaged(name)))
    assert torch.equal(backbone(images(2)), again(images(2)))


@minis
def test_the_card_says_how_the_weights_were_made(name: str) -> None:
    card = json.loads(packaged(name).with_suffix(".json").read_text())
    assert card["backbone"] == name
    assert card["samples"] >= 72_000
    assert card["parameters_kept"] == sum(p.numel() for p in build_backbone(name, res=RES).parameters())
    assert set(card["held_out_accuracy"]) == {"shape", "color", "size", "letter"}


@minis
def test_tokens_are_row_major(name: str) -> None:
    """A square drawn in grid row 6, column 1 changes the token there most."""
    backbone = build_backbone(name, res=RES)
    marked_BCHW = torch.zeros(1, 3, *RES)
    marked_BCHW[:, 0, 48:56, 8:16] = 1.0
    change_N = (backbone(marked_BCHW) - backbone(torch.zeros(1, 3, *RES)))[0].norm(dim=1)
    assert divmod(int(change_N.argmax()), 8) == (6, 1)


@minis
def test_images_of_another_size_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="64, 64"):
        build_backbone(name, res=RES, weights="random:0")(torch.zeros(1, 3, 64, 72))


@minis
def test_an_unknown_option_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no option 'out_nrom'"):
        build_backbone(name, res=RES, weights="random:0", out_nrom="none")
