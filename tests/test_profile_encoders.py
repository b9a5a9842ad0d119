"""Does `vlmx profile encoders` measure what it says, leave nothing changed, and refuse what it cannot do?"""

import json
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from vlmx import cli
from vlmx.extract.backbones.base import build_backbone
from vlmx.extract.ops import engines
from vlmx.serve.profile import _Recorder, profile_encoders

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def best_engine_afterwards() -> Iterator[None]:
    """`--scan` holds for the rest of a process."""
    yield
    engines.force(None)


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(["profile", "encoders", *args])
    return int(stop.value.code or 0)


def test_every_engine_and_size_is_measured_and_nothing_is_left_behind() -> None:
    threads = torch.get_num_threads()
    sizes = [(64, 64), (128, 128)]
    names = ["vit-mini-scenes", "vmamba-mini-scenes"]
    costs = profile_encoders(names, sizes, dtype=torch.float32, device=CPU, budget_s=0.2)
    available = [name for name, obstacle in engines.engines_report(CPU) if obstacle is None]
    expected = [(each, size) for size in sizes for each in ["none", *available]]
    assert [(cost.engine, (cost.height, cost.width)) for cost in costs] == expected
    for cost in costs:
        assert cost.image_s > 0
        assert cost.products_s > 0
        assert (0 < cost.scan_share < 1) == (cost.engine != "none")
    assert costs[0].image_s < costs[len(available) + 1].image_s  # four times as many pixels take longer
    assert torch.get_num_threads() == threads
    assert engines.forced() is None
    for name in available:
        assert not {"scan", "scan_four_ways"} & vars(engines.engine(name)).keys()


def test_products_of_our_own_linear_layers_are_seen() -> None:
    backbone = build_backbone("vmamba-mini-scenes", res=(64, 64), weights="random:0")
    with torch.inference_mode(), _Recorder(backbone) as recorder:
        backbone(torch.rand(2, 3, 64, 64))
    layers = [module for module in backbone.modules() if isinstance(module, nn.Linear)]
    shapes = [tuple(call[1][1].shape) for call in recorder._calls]
    for layer in layers:
        assert tuple(layer.weight.shape) in shapes
    assert len(shapes) >= len(layers) > 10
    recorder.replay()()


def test_products_are_all_that_multiply_and_are_replayed_with_their_shapes() -> None:
    backbone = build_backbone("vit-mini-scenes", res=(64, 64), weights="random:0")
    with torch.inference_mode(), _Recorder(backbone) as recorder:
        backbone(torch.rand(2, 3, 64, 64))
    blocks = len(backbone.net.net.blocks)
    names = [call[0].overloadpacket.__name__ for call in recorder._calls]
    assert names.count("linear") == 4 * blocks
    assert names.count("scaled_dot_product_attention") == blocks
    assert names.count("conv2d") == 1
    with torch.inference_mode(), _Recorder(backbone) as again:
        recorder.replay()()
    shapes = [[[tuple(x.shape) for x in call[1] if torch.is_tensor(x)] for call in r._calls] for r in (recorder, again)]
    assert shapes[0] == shapes[1]


def test_table_json_and_a_forced_engine(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--backbone", "vmamba-mini-scenes", "--seconds", "0", "--scan", "torch"]
    cli.main(["profile", "encoders", *given, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["compute"]) == ("one thread of the CPU", "float32")
    (cost,) = found["costs"]
    assert (cost["backbone"], cost["height"], cost["engine"], cost["passes"]) == ("vmamba-mini-scenes", 64, "torch", 1)
    assert cost["over_products"] == pytest.approx(cost["image_s"] / cost["products_s"])
    cli.main(["profile", "encoders", *given, "--res", "64", "--res", "128", "--compute", "bfloat16"])
    printed = capsys.readouterr()
    assert "bfloat16, random weights" in printed.err
    assert "128x128" in printed.out
    assert "(x1.0)" in printed.out


def test_wrong_arguments_say_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--backbone", "vit-mini-scene") == 2
    assert "did you mean 'vit-mini-scenes'" in capsys.readouterr().err
    assert run("--backbone", "vit-mini-scenes", "--res", "7") == 2
    assert "cannot take images of 7x7 pixels" in capsys.readouterr().err
    assert run("--scan", "referense") == 2
    assert "did you mean 'reference'" in capsys.readouterr().err
