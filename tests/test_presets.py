"""Are the paper's 99 rows what the paper prints, can each be built, and does `vlmx train --row` run one?"""

import csv
import json
import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_llm import write_tiny_llm

from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.ids import ImageEntry, ImageTable, image_id
from vlmx.cache_specs.presets import preset, presets
from vlmx.cache_specs.spec import CacheSpec, DType, TokenShape
from vlmx.cache_specs.writer import CacheWriter
from vlmx.errors import CacheError, UnknownNameError, UsageError
from vlmx.extract.backbones import catalogue
from vlmx.models.folder import load_model
from vlmx.runs import RunFolder
from vlmx.serve.command import list_
from vlmx.train.command import train

PUBLISHED = list(csv.DictReader(files("vlmx.evaluate").joinpath("paper/results.csv").read_text().splitlines()))
BUILDS = sorted({(backbone, row.res, row.tokens) for row in presets() for backbone in row.backbones})


def test_every_published_row_is_there_in_order() -> None:
    assert len(presets()) == len(PUBLISHED) == 99
    for row, published in zip(presets(), PUBLISHED, strict=True):
        for column in ("pretrained", "encoder", "connector", "params", "image_size"):
            assert getattr(row, column) == published[column]
        assert [row.tokens] * len(row.backbones) == [int(count) for count in published["tokens"].split("+")]


def test_names_are_different_and_need_no_quotes() -> None:
    names = [row.name for row in presets()]
    assert len(set(names)) == 99
    assert all(re.fullmatch(r"[a-z0-9+@/-]+", name) for name in names)
    assert all(preset(row.name) is row for row in presets())


@pytest.mark.parametrize(
    ("name", "backbones", "res", "tokens"),
    [
        ("vmamba-s-coco@800x1328/mlp2", ("vmamba-s-coco",), (800, 1328), 4150),
        ("dinov2-l+clip-l-336@336/mlp3", ("dinov2-l", "clip-l-336"), (336, 336), 576),
        ("vim-s-ft-in1k@224/mlp2", ("vim-s-ft-in1k",), (224, 224), 729),
        ("adapter-beit-l-640-m2f-ade20k@640/mlp2", ("adapter-beit-l-640-m2f-ade20k",), (640, 640), 400),
    ],
)
def test_some_rows(name: str, backbones: tuple[str, ...], res: tuple[int, int], tokens: int) -> None:
    row = preset(name)
    assert (row.backbones, row.res, row.tokens) == (backbones, res, tokens)


def test_an_unknown_row_suggests_the_near_one() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'vmamba-s-coco@512/mlp3'.*vlmx list rows"):
        preset("vmamba-s-coco@512")


each_build = pytest.mark.parametrize(
    ("name", "res", "tokens"), BUILDS, ids=[f"{name}@{res[0]}x{res[1]}" for name, res, _ in BUILDS]
)


@each_build
def test_every_row_builds_with_its_tokens(name: str, res: tuple[int, int], tokens: int) -> None:
    from vlmx.extract.backbones.base import build_backbone

    backbone = build_backbone(name, res=res, device="meta")
    assert backbone.num_tokens == tokens
    assert backbone.dim == catalogue.row(name).dim


@pytest.mark.slow
@each_build
def test_every_row_computes_tokens_of_that_shape(name: str, res: tuple[int, int], tokens: int) -> None:
    import torch

    from vlmx.extract.backbones.base import build_backbone

    images_BCHW = torch.empty(2, 3, *res, device="meta")
    tokens_BND = build_backbone(name, res=res, device="meta")(images_BCHW)
    assert tokens_BND.shape == (2, tokens, catalogue.row(name).dim)


def listed(*args: str) -> str:
    result = CliRunner().invoke(list_, list(args), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_list_rows() -> None:
    assert len(json.loads(listed("rows", "--json"))) == 99
    vim = json.loads(listed("rows", "--json", "--encoder", "vim-"))
    assert [row["encoder"] for row in vim] == ["Vim-T", "Vim-T-ft", "Vim-S", "Vim-S-ft", "Vim-B"]
    assert vim[1] == {
        "name": "vim-t-ft-in1k@224/mlp2",
        "backbones": ["vim-t-ft-in1k"],
        "res": [224, 224],
        "connector": "mlp2",
        "tokens": 729,
        "pretrained": "IN1K",
        "encoder": "Vim-T-ft",
        "params": "7M",
        "image_size": "224x224",
    }
    lines = listed("rows", "--encoder", "clip-l").splitlines()
    assert lines[1].split() == ["clip-l@224/mlp2", "CLIP-L", "clip-l", "224x224", "mlp2", "256"]
    assert lines[-1].split() == [
        "dinov2-l+clip-l-336@336/mlp3",
        "DINOv2-L/CLIP-L",
        "dinov2-l+clip-l-336",
        "336x336",
        "mlp3",
        "576",
    ]
    with pytest.raises(UnknownNameError, match="did you mean 'DINOv2-L'"):
        list_(["rows", "--encoder", "DINOv3-L"], standalone_mode=False)


def test_list_backbones() -> None:
    rows = {row["name"]: row for row in json.loads(listed("backbones", "--json"))}
    assert set(rows) == {row.name for row in catalogue.rows()}
    assert rows["vitdet-h-coco"]["published_size"] == "662M"
    assert rows["vitdet-h-coco"]["tokens"] == 4096
    assert {row["family"] for row in json.loads(listed("backbones", "--json", "--family", "vim"))} == {"vim"}
    line = next(line for line in listed("backbones").splitlines() if line.startswith("vmamba-s-coco "))
    assert re.split(r"\s{2,}", line.strip())[1:5] == ["IN1K + COCO", "800x1328", "4150", "384"]
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in listed("backbones", "vmamba-s-coco").splitlines())
    assert facts["tokens"] == "4150 (50 x 83) at the native size"
    assert facts["checkpoint"] == "mask_rcnn_vssm_fpn_coco_small_epoch_11.pth"
    assert facts["url"].endswith(facts["checkpoint"])
    assert facts["mean"] == "0.485, 0.456, 0.406"
    assert {"allowed sizes", "licence", "published size", "frozen parameters"} <= set(facts)
    everything = listed("backbones", "--long").split("\n\n")
    assert len(everything) == len(rows)
    assert all("\nurl " in each and "\nlicence " in each for each in everything)
    assert len(listed("backbones", "--long", "--family", "vim").split("\n\n")) == 5
    with pytest.raises(UsageError, match="a name and --family"):
        list_(["backbones", "vit-b-in1k", "--family", "vim"], standalone_mode=False)
    for wrong in (["backbones", "--family", "vmanba"], ["backbones", "vmamba-s-coca"]):
        with pytest.raises(UnknownNameError, match="did you mean"):
            list_(wrong, standalone_mode=False)


IDS = [image_id(b"%d" % number) for number in range(4)]
ROW = "dinov2-l+siglip-so400m-384@384/mlp3"


def make_cache(root: Path, backbone: str, dim: int, res: int = 384, dtype: DType = "float16") -> str:
    spec = CacheSpec(
        backbone=backbone,
        weights_sha256="0" * 64,
        forward_version=1,
        feature="last",
        out_norm="none",
        geometry=Geometry(mode="letterbox", height=res, width=res, fill=(127, 127, 127)),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        dtype=dtype,
    )
    with CacheWriter(root, spec, TokenShape(grid=(2, 2), dim=dim)) as writer:
        for plan in writer.plan(IDS):
            writer.commit(plan, np.ones((len(plan.ids), 4, dim), dtype=dtype), {})
        writer.seal()
    return spec.name


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Options of `vlmx train` for a tiny LLM and four photos, whose caches are in tmp_path/caches."""
    entries = [ImageEntry(key=f"{n}.jpg", id=image, width=64, height=64) for n, image in enumerate(IDS)]
    ImageTable.merge(tmp_path / "caches", "photos", entries)
    talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cube"}]
    rows = [{"id": f"{n}", "image": f"{n}.jpg", "conversations": talk} for n in range(4)]
    (tmp_path / "photos.json").write_text(json.dumps(rows))
    write_tiny_llm(tmp_path / "llm")
    options = {"caches": "caches", "data": "photos.json", "llm": "llm", "out": "run"}
    given = [text for key, value in options.items() for text in (f"--{key}", str(tmp_path / value))]
    return [*given, "prompt=plain", "global_batch=4", "max_steps=1"]


def test_train_a_row(tmp_path: Path, arguments: list[str]) -> None:
    two = make_cache(tmp_path / "caches", "siglip-so400m-384", 5)
    one = make_cache(tmp_path / "caches", "dinov2-l", 3)
    make_cache(tmp_path / "caches", "dinov2-l", 3, res=224)
    train(["--row", ROW, *arguments], standalone_mode=False)
    card = load_model(tmp_path / "run" / "model").card
    assert (card.spec.name, card.connector, card.dim_vision) == (f"{one}+{two}", "mlp3", 8)
    assert RunFolder(tmp_path / "run").status["state"] == "done"


def test_a_row_without_its_caches_says_how_to_make_them(tmp_path: Path, arguments: list[str]) -> None:
    make_cache(tmp_path / "caches", "dinov2-l", 3)
    with pytest.raises(CacheError, match="has no cache below") as caught:
        train(["--row", ROW, *arguments], standalone_mode=False)
    assert caught.value.why == "there is none of siglip-so400m-384@384x384"
    assert caught.value.fix == (
        f"vlmx extract --row {ROW} --data {tmp_path / 'photos.json'} --out {tmp_path / 'caches'}"
    )
    assert not (tmp_path / "run").exists()


def test_several_caches_of_a_row_need_a_choice(tmp_path: Path, arguments: list[str]) -> None:
    first = make_cache(tmp_path / "caches", "clip-b", 3, res=224)
    second = make_cache(tmp_path / "caches", "clip-b", 3, res=224, dtype="float32")
    row = ["--row", "clip-b@224/mlp2"]
    with pytest.raises(CacheError, match="more than one cache") as caught:
        train([*row, *arguments], standalone_mode=False)
    assert caught.value.why == ", ".join(sorted([first, second]))
    assert caught.value.fix == f"say which with --cache {min(first, second)}"
    train([*row, "--cache", second, *arguments], standalone_mode=False)
    assert load_model(tmp_path / "run" / "model").card.spec.name == second


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        (["--connector", "mlp3"], "its connector is mlp2, mlp3 is given"),
        (["connector=linear"], "its connector is mlp2, linear is given"),
        (["--cache", "dinov2"], "its tokens are clip-b at 224x224, the cache has dinov2-l at 384x384"),
        (["--cache", "clip-b", "--cache", "clip-l"], "its tokens are clip-b at 224x224, the cache has clip-b+clip-l"),
    ],
)
def test_a_row_and_something_else_are_a_conflict(
    tmp_path: Path, arguments: list[str], extra: list[str], why: str
) -> None:
    for name, res in (("clip-b", 224), ("clip-l", 224), ("dinov2-l", 384)):
        make_cache(tmp_path / "caches", name, 3, res=res)
    with pytest.raises(UsageError, match="this is not the row clip-b@224/mlp2") as caught:
        train(["--row", "clip-b@224/mlp2", *arguments, *extra], standalone_mode=False)
    assert why in caught.value.why
    assert not (tmp_path / "run").exists()
