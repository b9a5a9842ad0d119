"""Do several caches serve as one: tokens side by side in the right order, one identity, errors that name the cache?"""

import json
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from cache_samples import spec_of, tokens_of
from tiny_llm import write_tiny_llm

from vlmx.cache_specs import fused
from vlmx.cache_specs.catalog import backbone_of, find, stem
from vlmx.cache_specs.fused import FusedReader, FusedSpec, spec_from_dict
from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.ids import image_id
from vlmx.cache_specs.reader import TokenReader, open_cache
from vlmx.cache_specs.spec import CacheSpec, DType, TokenShape
from vlmx.cache_specs.writer import CacheWriter
from vlmx.errors import CacheError, SpecMismatchError, UnknownNameError

IDS = [image_id(b"%d" % number) for number in range(10)]
GRID = (2, 3)


def make(
    root: Path,
    backbone: str,
    dim: int = 4,
    ids: list[str] = IDS,
    grid: tuple[int, int] = GRID,
    dtype: DType = "float16",
    broken: Mapping[str, str] = MappingProxyType({}),
    seal: bool = True,
    **geometry: object,
) -> Path:
    """A cache whose tokens of an image are `tokens_of` repeated to `dim` channels; see `expected`."""
    spec = spec_of(dtype, backbone)
    spec = replace(spec, geometry=Geometry(**{**spec.geometry.to_dict(), **geometry}))
    with CacheWriter(root, spec, TokenShape(grid=grid, dim=dim), slots=4) as writer:
        for plan in writer.plan(ids):
            tokens_BND = np.stack([expected(backbone, image, dim, grid, dtype) for image in plan.ids])
            writer.commit(plan, tokens_BND, {image: why for image, why in broken.items() if image in plan.ids})
        if seal:
            writer.seal()
        return Path(writer.place.url)


def expected(backbone: str, image: str, dim: int, grid: tuple[int, int] = GRID, dtype: DType = "float16") -> np.ndarray:
    tokens_ND = np.resize(tokens_of(image, dtype), (grid[0] * grid[1], dim))
    return tokens_ND[:, ::-1] if backbone == "b" else tokens_ND


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
def test_tokens_stand_side_by_side_in_the_given_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: DType, block_bytes: int
) -> None:
    monkeypatch.setattr(fused, "BLOCK_BYTES", block_bytes)
    make(tmp_path, "a", 4, dtype=dtype)
    make(tmp_path, "b", 3, dtype=dtype)
    wanted = [IDS[7], IDS[0], IDS[7], IDS[3]]
    alone = {name: np.stack([expected(name, image, dim, dtype=dtype) for image in wanted]) for name, dim in DIMS}
    for order in ("a+b", "b+a"):
        reader = open_cache(order, tmp_path)
        assert (reader.shape.grid, reader.shape.dim, reader.num_tokens, len(reader)) == (GRID, 7, 6, 10)
        assert (reader.logical_dtype, reader.sealed) == (dtype, True)
        together = np.concatenate([alone[name] for name in order.split("+")], axis=2)
        np.testing.assert_array_equal(reader.read(wanted), together)
        assert reader.read(wanted).dtype == reader.storage_dtype == together.dtype
        out = np.empty_like(together)
        assert reader.read(wanted, out=out) is out
        np.testing.assert_array_equal(out, together)
    one, two = (open_cache(name, tmp_path).read_float32(wanted) for name in "ab")
    np.testing.assert_array_equal(open_cache("a+b", tmp_path).read_float32(wanted), np.concatenate([one, two], axis=2))
    assert open_cache("a+b", tmp_path).read([]).shape == (0, 6, 7)


DIMS = (("a", 4), ("b", 3))


def test_three_caches_and_a_copy_for_another_process(tmp_path: Path) -> None:
    for name in "abc":
        make(tmp_path, name, 2)
    reader = open_cache("c+a+b", tmp_path)
    assert reader.spec.backbone == "c+a+b"
    copy = pickle.loads(pickle.dumps(reader))
    assert isinstance(copy, FusedReader)
    assert (copy.spec, copy.ids) == (reader.spec, reader.ids)
    np.testing.assert_array_equal(copy.read(IDS), reader.read(IDS))


def test_images_are_those_that_all_have(tmp_path: Path) -> None:
    make(tmp_path, "a", ids=IDS[:8], broken={IDS[1]: "truncated"})
    make(tmp_path, "b", ids=IDS[2:], broken={IDS[4]: "too large"})
    reader = open_cache("a+b", tmp_path)
    assert set(reader.ids) == {IDS[2], IDS[3], *IDS[5:8]}
    assert reader.failed == {IDS[1]: "truncated", IDS[4]: "too large"}
    assert reader.missing([IDS[9], IDS[2], IDS[9], IDS[4]]) == [IDS[9], IDS[4]]
    assert IDS[2] in reader
    assert IDS[4] not in reader


def test_a_missing_image_is_named_with_the_cache_that_lacks_it(tmp_path: Path) -> None:
    one, two = make(tmp_path, "a", ids=IDS[:9]), make(tmp_path, "b", ids=IDS[1:], broken={IDS[4]: "too large"})
    reader = open_cache("a+b", tmp_path)
    reader.require(IDS[1:4])
    command = "vlmx extract --backbone {} --res 32x48 --weights random:0 --data photos/ --out " + str(tmp_path)
    with pytest.raises(CacheError) as caught:
        reader.require([IDS[1], IDS[9]], data="photos/")
    assert caught.value.what == f"1 of 2 images are not in cache {one.name}"
    assert caught.value.fix == f"{command.format('a')} adds them, and encodes nothing twice"
    with pytest.raises(CacheError) as caught:
        reader.require([IDS[0], IDS[9], IDS[4]], data="photos/")
    assert caught.value.what == (
        f"1 of 3 images are not in cache {one.name}; 2 of 3 images are not in cache {two.name}"
    )
    assert "could not be decoded, e.g. too large" in caught.value.why
    assert caught.value.fix.startswith(f"{command.format('a')} && {command.format('b')} adds")
    with pytest.raises(CacheError, match=f"not in cache {one.name}"):
        reader.read([IDS[9]])


def test_unsealed_parts_need_leave(tmp_path: Path) -> None:
    make(tmp_path, "a", seal=False)
    make(tmp_path, "b")
    with pytest.raises(CacheError, match=r"the extraction of a@.* has not come to its end"):
        open_cache("a+b", tmp_path)
    assert not open_cache("a+b", tmp_path, allow_partial=True).sealed


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"grid": (3, 2)}, "tokens an image: 6 (2 x 3), 6 (3 x 2)"),
        ({"grid": (1, 3)}, "tokens an image: 6 (2 x 3), 3 (1 x 3)"),
        ({"dtype": "float32"}, "dtypes: float16, float32"),
        ({"height": 64}, "height of the images: 32, 64"),
        ({"crop_pct": 0.9}, "crop_pct of the images: 1.0, 0.9"),
        ({"mode": "stretch"}, "mode of the images: letterbox, stretch"),
        ({"grid": (1, 3), "dtype": "bfloat16"}, "6 (2 x 3), 3 (1 x 3); dtypes: float16, bfloat16"),
    ],
)
def test_what_cannot_be_joined(tmp_path: Path, other: dict, problem: str) -> None:
    make(tmp_path, "a")
    make(tmp_path, "b", **other)
    with pytest.raises(CacheError, match="cannot be joined") as caught:
        open_cache("a+b", tmp_path)
    assert problem in caught.value.why


def test_a_cache_twice_cannot_be_joined_but_another_fill_can(tmp_path: Path) -> None:
    make(tmp_path, "a")
    make(tmp_path, "b", fill=[0, 0, 0])
    with pytest.raises(CacheError, match=r"cannot be joined.*a cache is given twice"):
        open_cache("a+b+a", tmp_path)
    assert open_cache("a+b", tmp_path).spec.geometry.fill == (127, 127, 127)


def spec_pair() -> FusedSpec:
    return FusedSpec(parts=(spec_of(backbone="a"), spec_of(backbone="b")))


def test_identity_of_joined_tokens() -> None:
    spec = spec_pair()
    one, two = spec.parts
    assert spec.name == f"a@32x48-{one.fingerprint[:12]}+b@32x48-{two.fingerprint[:12]}"
    assert (spec.backbone, spec.resolution, spec.weights_sha256) == ("a+b", "32x48", "random:0+random:0")
    assert spec.random_weights
    assert not FusedSpec(
        parts=(replace(one, weights_sha256="0" * 64), replace(two, weights_sha256="1" * 64))
    ).random_weights
    assert FusedSpec(parts=(replace(one, weights_sha256="0" * 64), two)).random_weights
    assert spec.fingerprint != FusedSpec(parts=(two, one)).fingerprint
    assert spec.fingerprint == "7362306a292c927f1ea4f9990d399ea71b44ea54679ff039bb84c869bd210783"


def test_specs_are_plain_data_and_back() -> None:
    spec = spec_pair()
    assert spec_from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec_from_dict(spec.parts[0].to_dict()) == spec.parts[0]
    with pytest.raises(CacheError, match=r"keys parts, order"):
        spec_from_dict({**spec.to_dict(), "order": 1})
    with pytest.raises(CacheError, match="unknown key colour"):
        spec_from_dict({"parts": [{**spec.parts[0].to_dict(), "colour": 1}]})
    with pytest.raises(CacheError, match="1 caches are given"):
        spec_from_dict({"parts": [spec.parts[0].to_dict()]})


def test_another_spec_is_refused_field_by_field(tmp_path: Path) -> None:
    make(tmp_path, "a")
    make(tmp_path, "b")
    reader, spec = open_cache("a+b", tmp_path), spec_pair()
    reader.require_spec(spec)
    other = FusedSpec(parts=(spec.parts[0], replace(spec.parts[1], feature="first")))
    with pytest.raises(SpecMismatchError) as caught:
        reader.require_spec(other)
    assert caught.value.why == "b feature: last, not first"
    with pytest.raises(SpecMismatchError, match=r"backbones: a\+b, not b\+a"):
        reader.require_spec(FusedSpec(parts=spec.parts[::-1]))
    with pytest.raises(SpecMismatchError, match="caches: a@"):
        reader.require_spec(spec.parts[0])
    with pytest.raises(SpecMismatchError, match="caches: a@"):
        open_cache("a", tmp_path).require_spec(spec)


def test_names_of_joined_caches(tmp_path: Path) -> None:
    folder = tmp_path / "x+y"
    paths = {name: make(folder, name) for name in ("a", "b+c", "b")}
    assert open_cache("a@+b@", folder).spec.backbone == "a+b"
    assert open_cache("a+b+c", folder).spec.backbone == "a+b+c"
    assert isinstance(open_cache("b+c", folder), TokenReader)  # a name that is there as it is typed
    assert open_cache(f"{paths['b']}+{paths['a']}", tmp_path).name == f"{paths['b'].name}+{paths['a'].name}"
    spec = open_cache("a+b@", folder).spec
    assert open_cache(spec.name, folder).spec == spec
    with pytest.raises(UnknownNameError, match=r"unknown cache 'a2'.*did you mean|unknown cache 'a2'"):
        open_cache("b@+a2", folder)
    with pytest.raises(CacheError, match=r"'a\+' lacks a cache beside a \+"):
        open_cache("a+", folder)
    assert open_cache("a@ + b@", folder).spec.backbone == "a+b"
    with pytest.raises(CacheError, match=r"'a@\+b@' is 2 caches"):
        find(folder, "a@+b@")
    with pytest.raises(CacheError, match="'b' is more than one cache"):
        open_cache("a+b", folder)


def test_what_stands_in_a_name() -> None:
    one, two = "vit-b-in21k@224x224-0123456789ab", "my+net@224x224-ba9876543210"
    assert (stem(one), backbone_of(one)) == ("vit-b-in21k@224x224", "vit-b-in21k")
    assert stem(f"{one}+{two}") == "vit-b-in21k@224x224+my+net@224x224"
    assert backbone_of(f"{one}+{two}") == "vit-b-in21k+my+net"


def test_extract_train_predict_and_report_with_two_encoders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from functools import partial

    from vlmx.data.mini import study
    from vlmx.evaluate.answers import answers_path, read_answers
    from vlmx.evaluate.command import evaluate
    from vlmx.evaluate.report.command import report
    from vlmx.extract.backbones.base import build_backbone
    from vlmx.extract.runner import extract
    from vlmx.extract.sources import ImageRecord, ImageSource
    from vlmx.models.folder import load_model
    from vlmx.runs import RunFolder
    from vlmx.train.command import train

    caches, run = tmp_path / "caches", tmp_path / "run"
    trained = study.scene_keys("train")[:8]
    asked = list(dict.fromkeys(question.image for question in study.questions("mini-ref-clutter")))
    images = tuple(ImageRecord(key=key, load=partial(study.image_bytes_of, key)) for key in [*trained, *asked])
    source = ImageSource(name="mini", describe="some scenes", images=images)
    for seed, name in enumerate(("vit-mini-scenes", "maxvit-mini-scenes")):
        extract(build_backbone(name, res=(64, 64), weights=f"random:{seed}"), [source], root=caches)
    rows = [
        {
            "id": key,
            "image": key,
            "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cube"}],
        }
        for key in trained
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    write_tiny_llm(tmp_path / "llm")
    options = ["--caches", caches, "--data", tmp_path / "data.json", "--llm", tmp_path / "llm", "--out", run]
    settings = ["images=mini", "prompt=plain", "global_batch=4", "max_steps=2"]
    pair = ["--cache", "vit-mini", "--cache", "maxvit-mini"]
    train([*pair, *map(str, options), *settings], standalone_mode=False)

    card = load_model(run / "model").card
    assert isinstance(card.spec, FusedSpec)
    assert (card.dim_vision, card.grid) == (96 + 96, (8, 8))
    assert RunFolder(run).status["fingerprint"] == card.spec.fingerprint
    assert RunFolder(run).status["notes"] == [
        "the encoder vit-mini-scenes is untrained (random:0)",
        "the encoder maxvit-mini-scenes is untrained (random:1)",
    ]
    common = ["--caches", str(caches)]
    evaluate(["--run", str(run), "--bench", "mini-ref-clutter", "--limit", "3", *common], standalone_mode=False)
    header, answers = read_answers(answers_path(RunFolder(run), "mini-ref-clutter", "none"))
    assert (header.cache, header.fingerprint, len(answers)) == (card.spec.name, card.spec.fingerprint, 3)
    assert open_cache(header.cache, caches).spec == card.spec
    report([str(run), "-o", str(tmp_path / "report.html"), *common], standalone_mode=False)
    shown = capsys.readouterr()
    assert "vit-mini-scenes+maxvit-mini-scenes (untrained)" in shown.out
    assert "is not at hand" not in shown.err
    assert card.spec.parts[1].weights_sha256 in (tmp_path / "report.html").read_text()


def test_one_cache_still_is_one(tmp_path: Path) -> None:
    make(tmp_path, "a")
    reader = open_cache("a", tmp_path)
    assert isinstance(reader.spec, CacheSpec)
    assert reader.parts == (reader,)
    assert reader.name == reader.spec.name
