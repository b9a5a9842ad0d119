"""Is what a dry run says what an extraction then does, does it store nothing, and is a full disk refused before?"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from vlmx import cli
from vlmx.cache_specs.places import LocalPlace
from vlmx.cache_specs.spec import Codec, DType
from vlmx.errors import OutOfSpaceError, UsageError, WeightsError
from vlmx.extract import estimate_text
from vlmx.extract.backbones import catalogue
from vlmx.extract.backbones.base import build_backbone
from vlmx.extract.estimate import Estimate, estimate, read_sources, runs_that_pay, weights_of
from vlmx.extract.flops import META, encoder_flops, llm_training_flops
from vlmx.extract.ops import engines
from vlmx.extract.runner import extract
from vlmx.extract.sources import open_sources

PHOTOS = 12


def draw(path: Path, number: int) -> None:
    photo = Image.new("RGB", (60 + 3 * number, 70), (number * 7 % 256, number * 31 % 256, 90))
    ImageDraw.Draw(photo).ellipse((number, 5, number + 30, 50), fill=(250, number * 9, 10))
    photo.save(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two folders of photos that have four in common; the first has one photo twice, and one that is cut off."""
    root = tmp_path_factory.mktemp("photos")
    for name, first in (("one", 0), ("two", PHOTOS - 4)):
        (root / name).mkdir()
        for number in range(first, first + PHOTOS):
            draw(root / name / f"{number:02}.png", number)
    data = (root / "one" / "03.png").read_bytes()
    (root / "one" / "again.png").write_bytes(data)
    (root / "one" / "cut.png").write_bytes(data[:150])
    return [str(root / "one"), str(root / "two")]


@pytest.fixture(autouse=True)
def _stamps_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files get stamps from their first moment on: whether a stamp file comes to be does not hang on the clock."""
    monkeypatch.setattr("vlmx.extract.sources.source.SETTLED_NS", 0)


def look(
    folders: list[str],
    root: Path,
    name: str = "vit-mini-scenes",
    *,
    weights: str | None = "random:0",
    dtype: DType = "float16",
    codec: Codec = "crc32c",
    taken_bytes: int = 0,
) -> Estimate:
    place = LocalPlace(root)
    return estimate(
        catalogue.row(name),
        (64, 64),
        read_sources(open_sources(folders), place, threads=2),
        root=place,
        weights=weights,
        dtype=dtype,
        codec=codec,
        compute=torch.float32,
        device=torch.device("cpu"),
        crop=False,
        options={},
        batch_size="auto",
        threads=2,
        taken_bytes=taken_bytes,
        sample_s=0,
    )


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_is_said_is_what_is_done(folders: list[str], tmp_path: Path, dtype: DType) -> None:
    before = look(folders, tmp_path, dtype=dtype)
    assert [(d.name, d.images, d.different, d.in_cache, d.earlier, d.new) for d in before.data] == [
        ("one", 14, 13, 0, 0, 13),
        ("two", 12, 12, 0, 4, 8),
    ]
    assert (before.different, before.new, before.new_shards) == (21, 21, 1)
    assert (before.tokens, before.dim, before.engine) == (64, 96, None)
    assert all("stamps" in file for file in files(tmp_path))  # the ids of what was read, and nothing else
    backbone = build_backbone("vit-mini-scenes", res=(64, 64), weights="random:0")
    summary = extract(backbone, open_sources(folders[:1]), root=tmp_path, dtype=dtype)
    assert before.cache == summary.cache.url
    after = look(folders, tmp_path, dtype=dtype)
    assert [(d.in_cache, d.earlier, d.new) for d in after.data] == [(13, 0, 0), (4, 0, 8)]
    assert (after.new, after.images_per_shard) == (8, before.images_per_shard)
    extract(backbone, open_sources(folders), root=tmp_path, dtype=dtype)
    written = (tmp_path / summary.cache.name / "tokens.zarr" / "tokens" / "c" / "1").rglob("*")
    assert sum(path.stat().st_size for path in written if path.is_file()) == after.new_bytes
    there = files(tmp_path)
    done = look(folders, tmp_path, dtype=dtype)
    assert (done.new, done.new_bytes, done.new_shards, done.seconds) == (0, 0, 0, 0.0)
    assert done.break_even.runs == 1
    assert "nothing is new" in estimate_text.space_line(done)
    assert "The cache is there" in estimate_text.pay_lines(done)[1]
    assert files(tmp_path) == there


def test_the_sample(folders: list[str], tmp_path: Path) -> None:
    seen = look(folders, tmp_path)
    assert seen.sample.images >= seen.sample.images_per_pass * seen.sample.passes_side_by_side
    assert seen.seconds == pytest.approx(seen.new / seen.sample.images_per_s)
    profiles = {(p.dtype, p.codec): p for p in seen.profiles}
    assert list(profiles) == [
        ("float16", "crc32c"),
        ("bfloat16", "crc32c"),
        ("int8", "crc32c"),
        ("float16", "blosc"),
    ]
    assert [p.chosen for p in seen.profiles] == [True, False, False, False]
    plain, half, packed = profiles["float16", "crc32c"], profiles["int8", "crc32c"], profiles["float16", "blosc"]
    assert plain.bytes == seen.new_bytes
    assert half.bytes < 0.55 * plain.bytes
    assert half.relative_error is not None
    assert 1e-4 < half.relative_error < 0.1
    assert packed.ratio is not None
    assert packed.bytes == round(plain.bytes / packed.ratio)


def test_the_ratio_of_blosc_is_that_of_the_cache(folders: list[str], tmp_path: Path) -> None:
    seen = look(folders, tmp_path, codec="blosc")
    backbone = build_backbone("vit-mini-scenes", res=(64, 64), weights="random:0")
    cache = extract(backbone, open_sources(folders), root=tmp_path, codec="blosc").cache
    shard = tmp_path / cache.name / "tokens.zarr" / "tokens" / "c" / "0" / "0" / "0"
    chosen = next(profile for profile in seen.profiles if profile.chosen)
    stored = shard.stat().st_size - 16 * seen.images_per_shard
    assert chosen.ratio == pytest.approx(20 * seen.bytes_per_image / stored, rel=0.03)  # one is cut off


def test_operations_of_a_vit_by_hand() -> None:
    """64 patches of 8x8 pixels and a class token; five of six blocks: tokens are taken from the second to last."""
    patches, tokens, width = 64, 65, 96
    linear = 2 * tokens * width * (3 * width + width + 2 * 4 * width)  # queries, keys and values; output; MLP
    attention = 2 * 2 * tokens * tokens * width
    embedding = 2 * patches * (3 * 8 * 8) * width
    assert encoder_flops("vit-mini-scenes", (64, 64), {}) == embedding + 5 * (linear + attention)


@pytest.mark.parametrize(
    ("name", "res", "percent"),
    [
        ("vmamba-s-in1k", 224, 0.07),
        ("vit-b-in21k", 224, 0.15),
        ("clip-l-336", 336, 0.85),
        ("siglip-so400m-384", 384, 1.3),
        ("vmamba-s-coco", 512, 0.13),
        ("vitdet-h-coco", 1024, 2.3),
    ],
)
def test_an_encoder_beside_a_7b_llm(name: str, res: int, percent: float) -> None:
    """Against a count by hand of the whole networks; here they end where the tokens are taken."""
    row = catalogue.row(name)
    flops = encoder_flops(name, (res, res), {})
    tokens = build_backbone(row.name, res=(res, res), device="meta").num_tokens
    share = flops / (flops + llm_training_flops(6.74e9, tokens + 250))
    assert 100 * share == pytest.approx(percent, rel=0.2)


def test_scans_are_counted_whatever_engine_is_forced() -> None:
    engines.force("reference")
    try:
        flops = encoder_flops("vmamba-mini-scenes", (64, 64), {})
        assert engines.forced() == "reference"
    finally:
        engines.force(None)
    assert flops == encoder_flops("vmamba-mini-scenes", (64, 64), {})
    assert "scan" not in vars(engines.choose(META))


def test_runs_that_pay() -> None:
    assert runs_that_pay(100, 1, 100) == 2
    assert runs_that_pay(0, 1, 100) == 1  # it is there
    assert runs_that_pay(50, 0, 100) == 1  # half of it is there
    assert runs_that_pay(200, 0, 100) == 3  # at two it takes as long
    assert runs_that_pay(100, 90, 100) == 11
    assert runs_that_pay(100, 100, 100) is None


def test_what_is_said_about_paying(folders: list[str], tmp_path: Path) -> None:
    seen = look(folders, tmp_path)
    large, small = seen.shares
    pays = replace(seen.break_even, once_s=7200.0, on_the_fly_s=7200.0, read_s=60.0, runs=2)
    shares = (replace(large, share=0.0013), replace(small, share=0.024))
    text = "\n".join(estimate_text.pay_lines(replace(seen, break_even=pays, shares=shares)))
    assert "0.13 % of the training of a 7B LLM, 2.4 % with 0.36B" in text
    assert "pays from 2 runs on: 2:00:00 once and 1:00 a run" in text
    assert "For one run it does not pay: `vlmx train --cache none --backbone vit-mini-scenes --res 64x64" in text
    assert "--weights random:0 ...`" in text
    assert "With a 7B LLM it hardly pays for more" in text
    heavy = replace(seen, break_even=pays, shares=(replace(large, share=0.3), small))
    assert "hardly" not in "\n".join(estimate_text.pay_lines(heavy))
    slow = replace(seen, break_even=replace(pays, read_s=9000.0, runs=None))
    assert "A cache never pays in time" in estimate_text.pay_lines(slow)[1]


def test_room(folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalPlace, "free_bytes", lambda place: 300_000)
    seen = look(folders, tmp_path)
    assert (seen.new_bytes, seen.free_bytes, seen.fits) == (274_520, 300_000, True)
    full = look(folders, tmp_path, taken_bytes=30_000)  # by the encoder before it
    assert not full.fits
    assert "it does not fit, and would be refused" in estimate_text.space_line(full)
    remote = replace(seen, free_bytes=None)
    assert "no limit" in estimate_text.space_line(remote)


def test_missing_weights_are_found_out_without_a_download(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMX_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    row = catalogue.row("vmamba-t-in1k")
    offline = weights_of(row, None)
    assert (offline.found, offline.download_to) == (None, None)
    assert "HF_HUB_OFFLINE" in offline.why_no_download
    assert "it would not be downloaded: offline mode" in estimate_text.weights_line(offline)
    seen = look(folders, tmp_path / "caches", "vmamba-t-in1k", weights=None)
    assert seen.cache is None
    assert seen.engine in engines.ENGINE_NAMES
    assert "with random weights, which take the same time" in estimate_text.time_line(seen)

    monkeypatch.delenv("HF_HUB_OFFLINE")
    online = weights_of(row, None)
    assert online.download_to == str(tmp_path / "weights")
    assert f"missing: {row.url} would be downloaded to" in estimate_text.weights_line(online)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / row.file).write_bytes(b"")
    assert weights_of(row, None).found == str(tmp_path / "weights" / row.file)
    with pytest.raises(WeightsError, match="no weights file"):
        weights_of(row, str(tmp_path / "typo.pth"))


JSON_KEYS = [
    *("backbone", "height", "width", "tokens", "dim", "dtype", "codec", "compute", "weights", "cache", "device"),
    *("engine", "engine_fallback", "data", "different", "new", "bytes_per_image", "images_per_shard", "new_shards"),
    *("new_bytes", "free_bytes", "fits", "profiles", "sample", "seconds", "encoder_flops", "shares", "break_even"),
]


def command(*arguments: str) -> None:
    cli.cli.main(
        ["extract", "--backbone", "vit-mini-scenes", "--weights", "random:0", *arguments], standalone_mode=False
    )


def test_the_command(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", ",".join(folders), "--out", str(tmp_path))
    command("--dry-run", "--json", *data)
    printed = json.loads(capsys.readouterr().out)
    assert printed["format"] == 1
    (encoder,) = printed["encoders"]
    assert list(encoder) == JSON_KEYS
    assert list(encoder["data"][0]) == ["name", "images", "different", "in_cache", "earlier", "new"]
    assert encoder["new"] == 21
    assert encoder["sample"]["images_per_s"] > 0
    assert all("stamps" in file for file in files(tmp_path))
    with pytest.raises(UsageError, match="--json belongs to --dry-run"):
        command("--json", *data)


def test_a_full_disk_is_refused_before_anything_is_encoded(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LocalPlace, "free_bytes", lambda place: 100_000)
    data = ("--data", folders[0], "--out", str(tmp_path))
    with pytest.raises(OutOfSpaceError, match="13 images do not fit on the disk") as refused:
        command(*data)
    assert "their tokens take 176 kB, 100 kB are free" in refused.value.why
    assert "--dtype int8 (96.3 kB)" in refused.value.fix
    assert "vlmx train --cache none --backbone vit-mini-scenes" in refused.value.fix
    assert "--force" in refused.value.fix
    command(*data, "--force")
    printed = capsys.readouterr().err
    assert "warning: 13 images do not fit on the disk" in printed
    assert "done: 14 images (13 different), 12 new" in printed
