"""Is a cache's identity the same everywhere, and does everything that changes a token change it?"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlmx.cache_specs.fingerprint import canonical_json, fingerprint
from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.ids import ImageEntry, ImageTable, image_id
from vlmx.cache_specs.sizing import cache_size, images_per_shard
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.errors import CacheError, DataError, UsageError

SPEC = CacheSpec(
    backbone="vmamba-s-coco",
    weights_sha256="ab" * 32,
    forward_version=1,
    feature="stage3",
    out_norm="layernorm",
    geometry=Geometry(mode="letterbox", height=512, width=640, fill=(123, 116, 103)),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
# never change this number: it would make every cache that exists unknown
FINGERPRINT = "1182725f709e8915d5ab3066b3edf1e9219be6c51d4d2e6d47df71abc74db8d9"

CHANGES: dict[str, Any] = {
    "backbone": "vmamba-t-coco",
    "weights_sha256": "random:7",
    "forward_version": 2,
    "feature": "stage4",
    "out_norm": "none",
    "geometry": Geometry(mode="stretch", height=512, width=640, fill=(123, 116, 103)),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "dtype": "bfloat16",
    "compute": "bfloat16",
}


def test_the_fingerprint_is_this_literal() -> None:
    assert SPEC.fingerprint == FINGERPRINT
    assert SPEC.name == f"vmamba-s-coco@512x640-{FINGERPRINT[:12]}"


def test_canonical_json_is_sorted_short_and_ascii() -> None:
    assert canonical_json({"b": [1, 0.1, 1e-05], "a": "ä"}) == '{"a":"\\u00e4","b":[1,0.1,1e-05]}'
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_integers_and_numpy_numbers_give_the_same_identity() -> None:
    import numpy as np

    ints = dataclasses.replace(SPEC, mean=(0, 0, 0), std=(1, 1, 1))  # type: ignore[arg-type]
    floats = dataclasses.replace(SPEC, mean=tuple(np.zeros(3)), std=tuple(np.ones(3)))  # type: ignore[arg-type]
    assert ints.fingerprint == floats.fingerprint


@pytest.mark.parametrize("field", list(CHANGES))
def test_every_field_changes_the_identity(field: str) -> None:
    other = dataclasses.replace(SPEC, **{field: CHANGES[field]})
    assert other.fingerprint != SPEC.fingerprint
    assert len(SPEC.differences(other)) == 1
    assert SPEC.differences(other)[0].startswith(field)


def test_differences_name_the_field_inside_the_geometry() -> None:
    other = dataclasses.replace(SPEC, geometry=dataclasses.replace(SPEC.geometry, height=224), dtype="float32")
    assert SPEC.differences(other) == ["geometry.height: 512, not 224", "dtype: float16, not float32"]
    assert SPEC.differences(SPEC) == []


def test_a_spec_survives_json() -> None:
    assert CacheSpec.from_dict(json.loads(json.dumps(SPEC.to_dict()))) == SPEC


def test_all_key_problems_are_named_at_once() -> None:
    data = SPEC.to_dict()
    del data["feature"]
    data["colour"] = 1
    data["geometry"]["zoom"] = 2
    with pytest.raises(CacheError) as caught:
        CacheSpec.from_dict(data)
    assert caught.value.why == "missing key feature; unknown key colour; unknown key geometry.zoom"


def test_all_value_problems_are_named_at_once() -> None:
    with pytest.raises(CacheError) as caught:
        dataclasses.replace(SPEC, backbone="a/b", weights_sha256="x", std=(0, 1, 1), dtype="int4")  # type: ignore[arg-type]
    for part in ("'a/b'", "'x'", "std (0.0, 1.0, 1.0)", "'int4'"):
        assert part in caught.value.why


def test_a_value_of_the_wrong_type_is_one_clear_error() -> None:
    with pytest.raises(CacheError, match="wrong type"):
        CacheSpec.from_dict({**SPEC.to_dict(), "mean": 0.5})


@pytest.mark.parametrize(
    ("tokens", "dim", "expected"),
    [(196, 384, 1024), (1024, 384, 256), (4150, 384, 64), (4096, 1280, 16), (64, 96, 1024)],
)
def test_shards_are_powers_of_two_below_256_megabytes(tokens: int, dim: int, expected: int) -> None:
    assert images_per_shard(tokens * dim * 2) == expected


def test_a_huge_image_still_has_a_shard() -> None:
    assert images_per_shard(10**9) == 1


def test_the_size_of_the_papers_table() -> None:
    size = cache_size(400_000, TokenShape(grid=(32, 32), dim=384), "float16")
    assert (size.bytes_per_image, size.shards) == (786_432, 1563)
    assert size.total_bytes == 400_000 * 786_436 + 1563 * (16 * 256 + 4)


def test_the_id_of_an_image_is_the_sha256_of_its_bytes() -> None:
    assert image_id(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def entry(key: str, image: str = "a" * 64, **fields: Any) -> ImageEntry:
    return ImageEntry(key=key, id=image, width=640, height=480, **fields)


def test_a_table_grows_in_the_order_of_first_appearance(tmp_path: Path) -> None:
    ImageTable.merge(tmp_path, "photos", [entry("b.jpg"), entry("\u2028 strange/ä.jpg", "b" * 64)])
    first = (tmp_path / "datasets" / "photos.jsonl").read_bytes()
    ImageTable.merge(tmp_path, "photos", [entry("b.jpg")])
    assert (tmp_path / "datasets" / "photos.jsonl").read_bytes() == first
    ImageTable.merge(tmp_path, "photos", [entry("a.jpg", "c" * 64)])
    table = ImageTable.open(tmp_path, "photos")
    assert table.keys() == ["b.jpg", "\u2028 strange/ä.jpg", "a.jpg"]
    assert table.id_of("a.jpg") == "c" * 64
    assert table.source_wh("a.jpg") == (640, 480)


def test_a_key_cannot_change_its_image(tmp_path: Path) -> None:
    ImageTable.merge(tmp_path, "photos", [entry("a.jpg")])
    before = (tmp_path / "datasets" / "photos.jsonl").read_bytes()
    with pytest.raises(DataError, match="--name") as caught:
        ImageTable.merge(tmp_path, "photos", [entry("b.jpg"), entry("a.jpg", "b" * 64)])
    assert "a.jpg" in caught.value.why
    assert (tmp_path / "datasets" / "photos.jsonl").read_bytes() == before


def test_an_undecodable_image_is_an_error_when_it_is_used(tmp_path: Path) -> None:
    broken = ImageEntry(key="a.jpg", id="a" * 64, error="image file is truncated")
    table = ImageTable.merge(tmp_path, "photos", [broken])
    with pytest.raises(DataError, match="truncated"):
        table.id_of("a.jpg")
    assert ImageTable.open(tmp_path, "photos").failed() == {"a.jpg": "image file is truncated"}
    assert b"width" not in (tmp_path / "datasets" / "photos.jsonl").read_bytes()


def test_unknown_tables_and_keys_and_bad_names(tmp_path: Path) -> None:
    ImageTable.merge(tmp_path, "photos", [entry("a.jpg")])
    with pytest.raises(DataError, match="did you mean 'photos'"):
        ImageTable.open(tmp_path, "photo")
    with pytest.raises(DataError, match=r"no image 'b\.jpg'"):
        ImageTable.open(tmp_path, "photos").id_of("b.jpg")
    with pytest.raises(UsageError, match="--name"):
        ImageTable.merge(tmp_path, "../photos", [])
    (tmp_path / "datasets" / "photos.jsonl").write_text('{"key": "a.jpg"}\n')
    with pytest.raises(DataError, match="line 1"):
        ImageTable.open(tmp_path, "photos")


def test_the_identity_needs_no_heavy_library() -> None:
    code = (
        "import sys; from vlmx.cache_specs import spec, geometry, ids, sizing, catalog, command;"
        "print([name for name in ('torch', 'zarr', 'PIL', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
