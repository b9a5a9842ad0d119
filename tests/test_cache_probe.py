"""Do `vlmx cache repair` and `probe` find the images again, rebuild the encoder, and tell right from wrong?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_samples import content, flip, shard_path
from click.testing import CliRunner, Result
from PIL import Image, ImageDraw

from vlmx import cli
from vlmx.cache_specs.audit import verify
from vlmx.cache_specs.ids import image_id
from vlmx.cache_specs.layout import ARRAY, PROVENANCE
from vlmx.cache_specs.manifest import MANIFEST, read_manifest
from vlmx.cache_specs.reader import open_cache
from vlmx.cache_specs.spec import DType, TokenShape
from vlmx.cache_specs.writer import CacheWriter, ShardPlan
from vlmx.errors import CacheCorruptError, CacheError, DataError, SpecMismatchError, UsageError
from vlmx.extract.backbones.base import Backbone, build_backbone
from vlmx.extract.cache_commands import cache as cache_command
from vlmx.extract.originals import recipe, reopen
from vlmx.extract.plan import spec_of
from vlmx.extract.runner import extract
from vlmx.extract.sources import open_source

IMAGES = 10
SLOTS = 4  # three shards; the second one has the file that is no image


@pytest.fixture(scope="module")
def vit() -> Backbone:
    return build_backbone("vit-mini-scenes", res=(64, 64), weights="random:0")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, vit: Backbone) -> Path:
    """A folder with photos and their caches, copied by each test."""
    home = tmp_path_factory.mktemp("original")
    for number in range(IMAGES):
        path = home / "photos" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        photo = Image.new("RGB", (90, 60 + number), (number * 7, number * 20, 90))
        ImageDraw.Draw(photo).ellipse((number, 5, number + 30, 50), fill=(250, number, 10))
        photo.save(path)
    (home / "photos" / "5.png").write_bytes(b"no image")
    return home


def made(home: Path, vit: Backbone, dtype: DType = "float16") -> Path:
    """The cache of the photos in `home`, with a record of where they are."""
    shape = TokenShape(grid=vit.grid, dim=vit.dim)
    if dtype != "int8":
        CacheWriter(home / "caches", spec_of(vit, dtype), shape, slots=SLOTS).close()
    photos = str(home / "photos")
    done = extract(vit, [open_source(photos)], root=home / "caches", dtype=dtype, threads=1, recipe=recipe([photos]))
    return home / "caches" / done.cache.name


@pytest.fixture
def home(tmp_path: Path, original: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "home"))


@pytest.fixture
def cache(home: Path, vit: Backbone) -> Path:
    return made(home, vit)


def run(cache: Path, command: str, *arguments: str | Path) -> Result:
    return CliRunner().invoke(cache_command, [command, str(cache), *map(str, arguments), "--threads", "1"])


def printed(result: Result) -> Any:
    assert result.exception is None or isinstance(result.exception, CacheError), result.output
    return json.loads(result.stdout)


def ids_of(cache: Path, shard: int) -> tuple[str, ...]:
    return read_manifest(cache).shards[shard].ids


def test_damaged_and_missing_shards_get_the_bytes_that_they_had(cache: Path) -> None:
    before = content(cache)
    untouched = shard_path(cache, 0).stat().st_mtime_ns
    flip(shard_path(cache, 1), 700)
    shard_path(cache, 2).unlink()
    (cache / ARRAY / "zarr.json").write_text("{}")
    result = run(cache, "repair")
    assert result.exit_code == 0, result.output
    assert "made again     2 shards, with the bytes that were recorded" in result.stdout
    assert f"written again  {ARRAY}/zarr.json" in result.stdout
    assert content(cache) == before
    assert shard_path(cache, 0).stat().st_mtime_ns == untouched
    assert printed(run(cache, "repair", "--json"))["same"] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_every_kind_of_number_is_made_again(home: Path, vit: Backbone, dtype: DType) -> None:
    cache = made(home, vit, dtype)
    before = content(cache)
    shard_path(cache, 0).unlink()
    assert run(cache, "repair", "--quick").exit_code == 0
    assert content(cache) == before


def test_an_image_that_was_never_decoded_is_not_needed(home: Path, cache: Path) -> None:
    before = content(cache)
    (home / "photos" / "5.png").unlink()
    flip(shard_path(cache, 1), 700)
    assert run(cache, "repair").exit_code == 0
    assert content(cache) == before


def test_images_that_moved_are_asked_for_and_found(home: Path, cache: Path) -> None:
    before = content(cache)
    flip(shard_path(cache, 0), 700)
    shutil.move(home / "photos", home / "elsewhere")
    gone = run(cache, "repair")
    assert isinstance(gone.exception, CacheCorruptError)
    assert gone.exception.exit_code == 5
    assert "4 of data set photos (0.png, 1.png, 2.png, ...)" in gone.exception.why
    assert "--data" in gone.exception.fix
    assert run(cache, "repair", "--data", home / "elsewhere").exit_code == 0
    assert content(cache) == before


def test_without_an_image_table_every_image_is_looked_at(home: Path, cache: Path) -> None:
    before = content(cache)
    flip(shard_path(cache, 0), 700)
    shutil.rmtree(home / "caches" / "datasets")
    photo = home / "photos" / "0.png"
    photo.rename(home / "photos" / "renamed.png")
    assert run(cache, "repair").exit_code == 0
    assert content(cache) == before


def test_what_can_be_made_is_made_and_the_rest_named(home: Path, cache: Path) -> None:
    flip(shard_path(cache, 0), 700)
    flip(shard_path(cache, 2), 700)
    photo = home / "photos" / "9.png"
    Image.new("RGB", (9, 9)).save(photo)  # another image by now: it must not get in under the old id
    result = run(cache, "repair", "--json")
    found = printed(result)
    assert (found["same"], found["left"]) == ([0], {"2": 1})
    assert "1 of data set photos (9.png)" in found["whose"]
    assert isinstance(result.exception, CacheCorruptError)
    assert list(verify(cache, full=True).damaged) == [2]


def differently(cache: Path, vit: Backbone, factor: float, shards: Sequence[int] = (0, 1, 2)) -> None:
    """Make the cache again as a machine would whose encoder gives tokens that are off by that factor."""
    manifest = read_manifest(cache)
    reader = open_cache(cache)
    tokens = {image: reader.read_float32([image])[0] for image in reader.ids}
    provenance = (cache / PROVENANCE).read_bytes()
    shutil.rmtree(cache)
    shape = TokenShape(grid=vit.grid, dim=vit.dim)
    with CacheWriter(cache.parent, manifest.header.spec, shape, slots=SLOTS) as writer:
        writer.plan([image for shard in manifest.shards.values() for image in shard.ids])
        for shard in manifest.shards.values():
            by = factor if shard.index in shards else 1.0
            stored = np.zeros((len(shard.ids), shape.num_tokens, shape.dim), np.float16)
            for slot, image in enumerate(shard.ids):
                if image in tokens:
                    stored[slot] = tokens[image] * by
            writer.commit(ShardPlan(index=shard.index, ids=shard.ids), stored, shard.failed)
        writer.seal()
    (cache / PROVENANCE).write_bytes(provenance)


def test_other_last_bits_are_recorded_anew_and_the_seal_fits(cache: Path, vit: Backbone) -> None:
    here = content(cache)
    differently(cache, vit, 1.0005, shards=[1])
    assert content(cache) != here
    flip(shard_path(cache, 1), 700)
    assert printed(run(cache, "repair", "--json"))["other"] == [1]
    report = verify(cache, full=True)
    assert report.ok
    assert report.sealed
    assert content(cache) == here


def test_forgotten_shards_are_pending(home: Path, cache: Path, vit: Backbone) -> None:
    before = content(cache)
    flip(shard_path(cache, 1), 700)
    result = run(cache, "repair", "--forget")
    assert result.exit_code == 0
    assert "1 shards are forgotten" in result.output
    with pytest.raises(CacheError, match="has not come to its end"):
        open_cache(cache)
    made(home, vit)
    assert content(cache) == before


def test_another_encoder_is_refused(cache: Path) -> None:
    flip(shard_path(cache, 0), 700)
    for command in ("repair", "probe"):
        result = run(cache, command, "--weights", "random:1")
        assert isinstance(result.exception, SpecMismatchError), result.output
        assert result.exception.why == "weights_sha256: random:0, not random:1"
    assert list(verify(cache, full=True).damaged) == [0]


def test_a_cache_that_somebody_writes_is_not_repaired(cache: Path, vit: Backbone) -> None:
    flip(shard_path(cache, 0), 700)
    with CacheWriter(cache.parent, spec_of(vit, "float16"), TokenShape(grid=vit.grid, dim=vit.dim)):
        result = run(cache, "repair")
        assert isinstance(result.exception, CacheError)
        assert "another process is writing" in result.exception.what
    assert run(cache, "repair").exit_code == 0


def test_a_damaged_manifest_is_not_repaired(cache: Path) -> None:
    flip(cache / MANIFEST, 50)
    result = run(cache, "repair")
    assert isinstance(result.exception, CacheCorruptError)
    assert "copy" in result.exception.fix


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_a_probe_of_what_this_machine_made_is_exact(home: Path, vit: Backbone, dtype: DType) -> None:
    found = printed(run(made(home, vit, dtype), "probe", "--json"))
    assert (found["ok"], found["exact"]) == (True, 1.0)
    assert (found["distance"]["images"], found["distance"]["identical"]) == (9, 9)
    assert found["missing"] == []


def test_a_probe_allows_other_last_bits_and_no_more(cache: Path, vit: Backbone) -> None:
    differently(cache, vit, 1.0005)
    near = printed(run(cache, "probe", "--images", "4", "--json"))
    assert near["ok"]
    assert near["exact"] < 0.9
    assert near["distance"]["images"] == 4
    assert 1e-4 < near["distance"]["relative"] < near["limit"] == 1e-3
    differently(cache, vit, 1.003, shards=[2])
    far = run(cache, "probe")
    assert isinstance(far.exception, CacheError)
    assert far.exception.exit_code == 5
    assert "not the same tokens" in far.stdout
    assert far.exception.why.split()[1] in ids_of(cache, 2)


def test_a_probe_names_images_that_it_did_not_find(home: Path, cache: Path) -> None:
    missing = image_id((home / "photos" / "3.png").read_bytes())
    (home / "photos" / "3.png").unlink()
    found = printed(run(cache, "probe", "--json"))
    assert (found["ok"], found["distance"]["images"], found["missing"]) == (True, 8, [missing])
    assert found["whose"] == "1 of data set photos (3.png)"
    shutil.rmtree(home / "photos")
    result = run(cache, "probe")
    assert isinstance(result.exception, DataError)
    assert "none of 9 images" in result.exception.what
    assert "9 of data set photos" in result.exception.why


def test_options_that_cannot_be_meant_are_refused(cache: Path, home: Path) -> None:
    assert isinstance(run(cache, "probe", "--image-root", home).exception, UsageError)


def test_recorded_sources_are_found_from_any_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    rows = [{"id": "a", "image": "1.png", "conversations": []}]
    (home / "list.json").write_text(json.dumps(rows))
    runs = [
        recipe(["mini", "photos"], limit=2),
        recipe(["list.json"], image_root=Path("photos"), name="listed"),
        recipe(["mini", "photos"], limit=2),
        {"unreadable": "{"},
        recipe([str(tmp_path / "gone"), "photos"]),  # the one is found without the other
    ]
    runs = json.loads(json.dumps(runs))
    monkeypatch.chdir(tmp_path)
    found = [(source.name, [record.key for record in source.records()]) for source in reopen(runs)]
    assert [(name, len(keys)) for name, keys in found] == [("photos", 10), ("mini", 2), ("photos", 2), ("listed", 1)]
    assert capsys.readouterr().err.count("gone") == 2  # in what and why of one warning


def test_what_the_command_extracted_is_found_again_without_being_told(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    cli.main(
        ["extract", "--backbone", "vit-mini-scenes", "--weights", "random:0", "--data", "photos", "--threads", "1"]
    )
    cache = home / "caches" / capsys.readouterr().out.strip()
    before = content(cache)
    monkeypatch.chdir(tmp_path)
    flip(shard_path(cache, 0), 700)
    result = run(cache, "repair")
    assert result.exit_code == 0, result.output
    assert content(cache) == before


def test_images_that_were_all_there_already_are_found_where_they_were(
    home: Path, cache: Path, vit: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len((cache / "provenance.jsonl").read_text().splitlines())
    shutil.copytree(home / "photos", home / "again")
    again = str(home / "again")
    for _ in range(2):  # recorded once
        extract(vit, [open_source(again)], root=home / "caches", threads=1, recipe=recipe([again]))
    assert len((cache / "provenance.jsonl").read_text().splitlines()) == before + 1
    shutil.rmtree(home / "photos")
    assert printed(run(cache, "probe", "--json"))["distance"]["images"] == 9


def test_the_group_is_light_to_import() -> None:
    code = (
        "import sys; from vlmx.extract.cache_commands import cache; print(sorted(cache.commands));"
        "print([name for name in ('torch', 'timm', 'zarr', 'PIL', 'numpy', 'pydantic') if name in sys.modules])"
    )
    lines = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    ).stdout.splitlines()
    assert lines == ["['diff', 'gc', 'info', 'ls', 'probe', 'repair', 'verify']", "[]"]
