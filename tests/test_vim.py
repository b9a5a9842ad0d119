"""Is our Vim the published network? Names, shapes and tokens against reference outputs; directions and precisions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_fill import assert_close_to_golden, fill_ssm, ssm_image, ssm_subsample
from torch import Tensor, nn

from vlmx.errors import WeightsError
from vlmx.extract.backbones import catalogue
from vlmx.extract.backbones.base import Backbone, build_backbone
from vlmx.extract.backbones.vim import VimNet

SIZE = (224, 224)
CLASS_INDEX = {"T": 98, "T-ft": 364, "S": 98, "S-ft": 364, "B": 98}


def manifest_of(shared: Path, name: str) -> list[list[Any]]:
    manifest: list[list[Any]] = json.loads((shared / "golden/ssm" / name).read_text())
    return manifest


def row_name(variant: str) -> str:
    return f"vim-{variant.lower()}-in1k"


@pytest.fixture(scope="module")
def tiny_weights(shared: Path) -> dict[str, Tensor]:
    return fill_ssm(manifest_of(shared, "manifests/vim_T.json"))


def mini_net(res: tuple[int, int] = (48, 64)) -> VimNet:
    torch.manual_seed(0)
    return VimNet(res=res, embed_dim=32, depth=2, stride=16).eval()


def golden_case(shared: Path, variant: str) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Statistics and stored values of all outputs of a case, by name of the output."""
    case = shared / f"golden/ssm/vim/vim_{variant}_224x224"
    described: dict[str, dict[str, Any]] = json.loads(case.with_suffix(".json").read_text())["outputs"]
    return described, dict(np.load(case.with_suffix(".npz")))


def test_the_mixer_gives_the_reference_output(shared: Path) -> None:
    published = fill_ssm(manifest_of(shared, "units/vim_mixer_d32.manifest.json"))
    net = mini_net()
    own = net.adapt_state_dict({f"mixer.{name}": value for name, value in published.items()})
    mixer = net.layers[0].get_submodule("mixer")
    mixer.load_state_dict({name.removeprefix("mixer."): value for name, value in own.items()}, strict=True)
    golden = np.load(shared / "golden/ssm/units/vim_mixer_d32.npz")
    with torch.no_grad():
        found = mixer(torch.from_numpy(golden["x"]))
    assert_close_to_golden(found.numpy(), golden["y"], std=golden["y"].std())


@pytest.mark.parametrize("variant", ["T", "T-ft", "S", "S-ft", "B"])
def test_names_shapes_and_parameters_are_the_published_ones(shared: Path, variant: str) -> None:
    manifest = manifest_of(shared, f"manifests/vim_{variant}.json")
    backbone = build_backbone(row_name(variant), res=SIZE, device="meta")
    net = backbone.net
    assert isinstance(net, VimNet)
    published = {name: torch.empty(shape, device="meta") for name, shape, _ in manifest}
    expected = {name: value.shape for name, value in net.adapt_state_dict(published).items()}
    assert {name: value.shape for name, value in net.state_dict().items()} == expected
    assert set(published) - set(expected) == {
        "head.weight",
        "head.bias",
        *(f"layers.{index}.mixer.{name}.bias" for index in range(24) for name in ("dt_proj", "dt_proj_b")),
    }
    counts = json.loads((shared / "golden/ssm/vim/params.json").read_text())[variant]
    assert sum(p.numel() for p in net.parameters()) == counts["no_head"] == backbone.row.params
    assert backbone.grid == backbone.row.grid == ((27, 27) if "ft" in variant else (14, 14))
    assert net.class_index == CLASS_INDEX[variant]
    assert (backbone.feature, backbone.out_norm) == ("norm_f", "trained")


def test_tiny_gives_the_reference_tokens_and_all_between(shared: Path, tiny_weights: dict[str, Tensor]) -> None:
    backbone = build_backbone(row_name("T"), res=SIZE, weights=tiny_weights)
    net = backbone.net
    assert isinstance(net, VimNet)
    found: dict[str, Tensor] = {}

    def keep(name: str, *, residual: bool = False) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            found[f"{name}_hidden" if residual else name] = output
            if residual:
                found[f"{name}_residual"] = inputs[0]

        return hook

    net.patch_embed.register_forward_hook(keep("patch_embed"))
    net.norm_f.register_forward_hook(keep("final_seq"))
    for index in (0, 11, 23):
        net.layers[index].register_forward_hook(keep(f"block{index}", residual=True))
    found["tokens"] = backbone(ssm_image(*SIZE))
    described, golden = golden_case(shared, "T")
    assert set(golden) - set(found) == {"cls", "logits"}
    for name, value in found.items():
        assert list(value.shape) == described[name]["shape"]
        kept = ssm_subsample(value, at_most=4096 if name == "tokens" else 1024)
        assert_close_to_golden(kept, golden[name], std=described[name]["std"])


def test_files_of_distributed_training_load_too(tiny_weights: dict[str, Tensor]) -> None:
    weights = {f"module.{name}": value for name, value in tiny_weights.items()}
    net = build_backbone(row_name("T"), res=SIZE, weights=weights).net
    assert torch.equal(net.state_dict()["layers.23.mixer.dt_bias_b"], tiny_weights["layers.23.mixer.dt_proj_b.bias"])


@pytest.mark.parametrize(
    ("variant", "complaint"),
    [
        ("T-ft", "pos_embed is (1, 197, 192), needed (1, 730, 192)"),
        pytest.param("S", "cls_token is", marks=pytest.mark.slow),
    ],
)
def test_weights_of_another_size_are_refused(tiny_weights: dict[str, Tensor], variant: str, complaint: str) -> None:
    with pytest.raises(WeightsError) as caught:
        build_backbone(row_name(variant), res=SIZE, weights=tiny_weights)
    assert complaint in caught.value.why


@pytest.mark.parametrize(("res", "class_index"), [((48, 64), 6), ((48, 48), 4)])
def test_the_class_token_is_scanned_in_the_middle_but_not_returned(res: tuple[int, int], class_index: int) -> None:
    net = mini_net(res)
    sequences: list[Tensor] = []
    net.norm_f.register_forward_hook(lambda module, inputs, output: sequences.append(output))
    images = torch.randn(1, 3, *res)
    with torch.no_grad():
        tokens_BNC = net(images)
        net.cls_token.add_(1)
        moved_BNC = net(images)
    patches = [index for index in range(sequences[0].shape[1]) if index != class_index]
    assert torch.equal(tokens_BNC, sequences[0][:, patches])
    difference = (moved_BNC - tokens_BNC).abs().amax(dim=2)
    assert difference.min() > 1e-5  # it reaches the tokens on both sides of it


def test_both_ends_of_the_image_see_each_other() -> None:
    net = mini_net()
    image = torch.randn(1, 3, 48, 64)
    first, last = image.clone(), image.clone()
    first[..., :16, :16] += 1
    last[..., -16:, -16:] += 1
    with torch.no_grad():
        plain_BNC, first_BNC, last_BNC = net(image), net(first), net(last)
    assert (first_BNC - plain_BNC).abs().amax(dim=2).min() > 1e-6
    assert (last_BNC - plain_BNC).abs().amax(dim=2).min() > 1e-6


def test_images_of_a_batch_do_not_mix() -> None:
    net = mini_net()
    images = torch.randn(3, 3, 48, 64)
    with torch.no_grad():
        together_BNC = net(images)
        alone_BNC = torch.cat([net(image[None]) for image in images])
    torch.testing.assert_close(together_BNC, alone_BNC, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "rms_limit"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_half_precision_keeps_scan_and_stream_in_float32(dtype: torch.dtype, rms_limit: float) -> None:
    images = torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact_BNC = mini_net()(images)
    net = mini_net()
    streams: list[Tensor] = []
    net.layers[1].register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0]))
    backbone = Backbone(
        net,
        row=catalogue.row(row_name("T")),
        res=(48, 64),
        dtype=dtype,
        weights_sha256="",
        weights_source="",
    )
    tokens_BNC = backbone(images)
    assert tokens_BNC.dtype == dtype
    assert streams[0].dtype == torch.float32
    kept = {name.rpartition(".")[2] for name, p in net.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_log", "A_b_log", "D", "D_b", "dt_bias", "dt_bias_b"}
    error = (tokens_BNC.float() - exact_BNC).square().mean().sqrt() / exact_BNC.std()
    assert error < rms_limit
