"""Does `vlmx extract` store exactly what the encoder gives, survive being killed, and refuse what it cannot do?"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image, ImageDraw

from vlmx import cli
from vlmx.cache_specs.ids import ImageTable, image_id
from vlmx.cache_specs.manifest import read_manifest
from vlmx.cache_specs.reader import open_cache
from vlmx.cache_specs.spec import TokenShape
from vlmx.cache_specs.writer import CacheWriter
from vlmx.errors import CacheError, DataError, OutOfSpaceError, UsageError, VlmxError
from vlmx.extract.backbones.base import Backbone, build_backbone
from vlmx.extract.inventory import SourceImage
from vlmx.extract.plan import plan_extraction, spec_of
from vlmx.extract.preprocess import prepare
from vlmx.extract.runner import extract
from vlmx.extract.sources import ImageRecord, ImageSource, open_source

VIT = ("--backbone", "vit-mini-scenes", "--weights", "random:0")


def draw_photo(path: Path, number: int, wh: tuple[int, int] = (90, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo = Image.new("RGB", wh, (number * 7 % 256, number * 31 % 256, 90))
    ImageDraw.Draw(photo).ellipse((number % 40, 5, number % 40 + wh[0] // 3, 50), fill=(250, number % 256, 10))
    photo.save(path)
    return path


def vlmx(*args: str | Path) -> int:
    """Run the command in this process; the exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(arg) for arg in args])
    return int(stop.value.code or 0)


def run_extract(out: Path, data: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[Path, str]:
    """Extract with the small untrained ViT; the cache's folder and what was printed on stderr."""
    cli.main(["extract", *VIT, "--data", str(data), "--out", str(out), "--threads", "2", *more])
    printed = capsys.readouterr()
    return out / printed.out.strip(), printed.err


def tokens_of(cache: Path) -> dict[str, np.ndarray]:
    """Stored tokens by image id, as zarr-python reads them."""
    array = zarr.open_group(cache / "tokens.zarr", mode="r")["tokens"]
    lines = [json.loads(line) for line in (cache / "manifest.jsonl").read_text().splitlines()]
    slots = lines[0]["images_per_shard"]
    return {
        image: array[line["index"] * slots + slot]
        for line in lines[1:]
        for slot, image in enumerate(line["ids"])
        if image not in line["failed"]
    }


@pytest.fixture(scope="module")
def vit() -> Backbone:
    return build_backbone("vit-mini-scenes", res=(64, 64), weights="random:0")


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str], vit: Backbone) -> None:
    photos = tmp_path / "photos"
    for number in range(5):
        draw_photo(photos / f"{number}.png", number, (60 + 10 * number, 70))
    (photos / "5-same-as-0.png").write_bytes((photos / "0.png").read_bytes())
    whole = draw_photo(tmp_path / "whole.jpg", 9).read_bytes()
    (photos / "6-truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "7-no-image.jpg").write_text("<html>not found</html>")
    (photos / "labels.txt").write_text("")

    cache, err = run_extract(tmp_path / "caches", photos, capsys)

    assert cache.name.startswith("vit-mini-scenes@64x64-")
    assert "8 images; left out: 1 other files (.txt 1)" in err
    assert "7 different images: 0 already in the cache, 7 to encode" in err
    assert "2 images could not be decoded" in err
    assert "6-truncated.jpg: " in err
    assert "7-no-image.jpg: not an image that Pillow knows" in err

    spec = spec_of(vit, "float16")
    stored = tokens_of(cache)
    assert len(stored) == 5
    for number in range(5):
        data = (photos / f"{number}.png").read_bytes()
        pixels = torch.from_numpy(prepare(data, spec.geometry, vit.mean, vit.std))
        expected = vit(pixels[None])[0].half().numpy()
        np.testing.assert_allclose(stored[image_id(data)], expected, atol=2e-3)

    table = ImageTable.open(tmp_path / "caches", "photos")
    assert table.id_of("5-same-as-0.png") == table.id_of("0.png") == image_id((photos / "0.png").read_bytes())
    assert table.source_wh("4.png") == (100, 70)
    assert sorted(table.failed()) == ["6-truncated.jpg", "7-no-image.jpg"]
    with pytest.raises(DataError, match="could not be decoded"):
        table.id_of("6-truncated.jpg")


def test_untrained_weights_are_named_in_everything_that_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_photo(tmp_path / "photos" / "0.png", 0)
    cache, err = run_extract(tmp_path, tmp_path / "photos", capsys)
    assert err.count("random weights (random:0): untrained") == 2  # at the start and in the summary
    assert json.loads((cache / "provenance.jsonl").read_text())["trained"] is False
    for file in ("manifest.jsonl", "tokens.zarr/zarr.json"):
        assert "random:0" in (cache / file).read_text()


def test_second_run_encodes_only_new_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    for number in range(3):
        draw_photo(photos / f"{number}.png", number)
    cache, _ = run_extract(tmp_path, photos, capsys)
    before = tokens_of(cache)
    first_shard = (cache / "tokens.zarr/tokens/c/0/0/0").read_bytes()

    for number in range(3, 7):
        draw_photo(photos / f"{number}.png", number)
    same, err = run_extract(tmp_path, photos, capsys)
    assert same == cache
    assert "7 different images: 3 already in the cache, 4 to encode" in err
    assert (cache / "tokens.zarr/tokens/c/0/0/0").read_bytes() == first_shard
    after = tokens_of(cache)
    assert len(after) == 7
    assert all(np.array_equal(after[image], before[image]) for image in before)

    _, err = run_extract(tmp_path, photos, capsys)
    assert "7 already in the cache, 0 to encode" in err
    assert (cache / "SEALED.json").exists()


@pytest.mark.parametrize("name", ["vmamba-mini-scenes", "maxvit-mini-scenes"])
def test_bytes_depend_neither_on_batch_size_nor_on_the_other_images(tmp_path: Path, name: str) -> None:
    """Without blocks of fixed size, these two networks give other last bits for other batch sizes."""
    photos = tmp_path / "photos"
    for number in range(11):
        draw_photo(photos / f"{number:02}.png", number)
    everything = open_source(str(photos))
    some = ImageSource(name="some", describe="some", images=everything.images[4:7])
    backbone = build_backbone(name, res=(64, 64), weights="random:0")
    runs = [
        tokens_of(extract(backbone, [source], root=tmp_path / str(index), batch_size=size).cache.path)
        for index, (source, size) in enumerate([(everything, 1), (everything, 6), (some, 16)])
    ]
    assert len(runs[2]) == 3
    for image, tokens in runs[0].items():
        assert np.array_equal(tokens, runs[1][image])
        assert image not in runs[2] or np.array_equal(tokens, runs[2][image])


def test_target_that_is_not_square(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_photo(tmp_path / "photos" / "0.png", 0)
    cache, err = run_extract(tmp_path, tmp_path / "photos", capsys, "--res", "64x96", "--dtype", "bfloat16")
    assert "@64x96-" in cache.name
    assert "96 tokens of 96 bfloat16" in err
    array = zarr.open_group(cache / "tokens.zarr", mode="r")["tokens"]
    assert (array.shape, array.dtype) == ((1, 96, 96), np.uint16)
    backbone = build_backbone("vit-mini-scenes", res=(64, 96), weights="random:0")
    data = (tmp_path / "photos" / "0.png").read_bytes()
    pixels = prepare(data, spec_of(backbone, "bfloat16").geometry, backbone.mean, backbone.std)
    expected = backbone(torch.from_numpy(pixels)[None])[0]
    stored = torch.from_numpy(array[0].view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(stored.float(), expected, atol=0.0, rtol=2**-7)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """All files of a folder but the record of how it came about."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "provenance.jsonl"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, vit: Backbone) -> tuple[Path, Path]:
    """A folder of photos, one of them truncated, and their cache in shards of 2 images."""
    root = tmp_path_factory.mktemp("uninterrupted")
    for index in range(24):
        draw_photo(root / "photos" / f"{index:02}.bmp", index, (1000, 750))
    broken = root / "photos" / "13.bmp"
    broken.write_bytes(broken.read_bytes()[:900])
    return root / "photos", extract(vit, [open_source(str(root / "photos"))], root=small_shards(root, vit)).cache.path


def small_shards(root: Path, backbone: Backbone) -> Path:
    """Begin the cache of `backbone` with 2 images a shard, so that few images make many shards."""
    shape = TokenShape(grid=backbone.grid, dim=backbone.dim)
    CacheWriter(root, spec_of(backbone, "float16"), shape, slots=2).close()
    return root


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_and_started_again_gives_the_same_bytes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    vit: Backbone,
    uninterrupted: tuple[Path, Path],
    number: signal.Signals,
) -> None:
    photos, cache = uninterrupted
    started = small_shards(tmp_path, vit) / cache.name
    arguments = ["extract", *VIT, "--data", str(photos), "--out", str(tmp_path), "--threads", "1"]
    process = subprocess.Popen([sys.executable, "-m", "vlmx", *arguments], stderr=subprocess.PIPE, text=True)
    while len(read_manifest(started).shards) < 2:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    committed = len(read_manifest(started).shards)
    assert 2 <= committed < 12
    if number == signal.SIGTERM:
        assert process.returncode == 0
        assert "stopped by SIGTERM" in err
        assert "give the same command again" in err
    else:
        assert process.returncode == -signal.SIGKILL

    again, err = run_extract(tmp_path, photos, capsys)
    assert f"{2 * committed} already in the cache, {24 - 2 * committed} to encode" in err
    assert folder_bytes(again) == folder_bytes(cache)
    table = tmp_path / "datasets" / "photos.jsonl"
    assert table.read_bytes() == (cache.parent / "datasets" / "photos.jsonl").read_bytes()


def test_wrong_commands_say_what_to_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_photo(tmp_path / "photos" / "0.png", 0)
    common = ("--data", tmp_path / "photos", "--out", tmp_path / "caches")
    assert vlmx("extract", "--backbone", "vit-mini-scene", *common) == 2
    assert "did you mean 'vit-mini-scenes'" in capsys.readouterr().err
    assert vlmx("extract", *VIT, *common, "--res", "64*64") == 2
    assert "--res takes 512, or HEIGHTxWIDTH" in capsys.readouterr().err
    assert vlmx("extract", *VIT, *common, "--res", "7x65") == 2
    assert "cannot take images of 7x65 pixels" in capsys.readouterr().err
    assert vlmx("extract", *common) == 2
    assert "neither --backbone nor --row is given" in capsys.readouterr().err
    assert vlmx("extract", *VIT, *common, "--row", "clip-b@224/mlp2") == 2
    assert "--row stands for a backbone and its size" in capsys.readouterr().err
    assert vlmx("extract", *common, "--row", "clip-b@512/mlp2") == 2
    assert "clip-b@224/mlp2" in capsys.readouterr().err
    assert vlmx("extract", *VIT, *common, "--crop") == 2
    assert "the reference does not crop the images of vit-mini-scenes" in capsys.readouterr().err
    assert vlmx("extract", "--row", "dinov2-l+clip-l-336@336/mlp2", *common, "--weights", "some.pth") == 2
    assert "--weights cannot be the weights of 2 encoders" in capsys.readouterr().err
    assert vlmx("extract", *VIT, *common, "--out-norm", "none") == 2
    assert "no option 'out_norm'" in capsys.readouterr().err
    assert vlmx("extract", "--backbone", "vmamba-t-in1k", *common, "--weights", tmp_path / "gone.pth") == 4
    assert "gone.pth" in capsys.readouterr().err
    assert not (tmp_path / "caches").exists()


def test_a_row_with_options_and_the_command_that_adds_to_its_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_photo(tmp_path / "photos" / "0.png", 0)
    given = ["--row", "vit-t-in21k@224/mlp2", "--weights", "random:0", "--crop", "--block", "3"]
    cli.main(["extract", *given, "--data", str(tmp_path / "photos"), "--out", str(tmp_path / "caches")])
    reader = open_cache(capsys.readouterr().out.strip(), tmp_path / "caches")
    assert (reader.spec.backbone, reader.spec.resolution) == ("vit-t-in21k", "224x224")
    assert (reader.spec.feature, reader.spec.geometry.crop_pct) == ("blocks.3", 0.9)
    plain = spec_of(build_backbone("vit-t-in21k", res=(224, 224), weights="random:0"), "float16")
    assert set(reader.spec.differences(plain)) == {
        "feature: blocks.3, not blocks.10",
        "geometry.crop_pct: 0.9, not 1.0",
    }
    with pytest.raises(CacheError) as caught:
        reader.require(["0" * 64])
    assert "--backbone vit-t-in21k --res 224x224 --weights random:0 --block 3 --crop" in caught.value.fix


def test_pixels_that_no_patch_covers_are_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_photo(tmp_path / "photos" / "0.png", 0)
    cache, printed = run_extract(tmp_path / "caches", tmp_path / "photos", capsys, "--res", "64x71")
    assert "sees whole patches only: 0 rows and 7 columns of pixels are left out" in printed
    assert open_cache(cache).shape.grid == (8, 8)


def one_image(load: Iterator[bytes]) -> ImageSource:
    return ImageSource(name="one", describe="one", images=(ImageRecord(key="one.png", load=lambda: next(load)),))


def test_tokens_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    data = draw_photo(tmp_path / "0.png", 0).read_bytes()
    backbone = build_backbone("vit-mini-scenes", res=(64, 64), weights="random:0")
    with torch.no_grad():
        backbone.net.net.pos_embed.fill_(1e6)  # the residual stream carries it to the end
    with pytest.raises(UsageError, match="do not fit into float16") as caught:
        extract(backbone, [one_image(iter([data, data]))], root=tmp_path)
    assert "--dtype bfloat16" in caught.value.fix
    summary = extract(backbone, [one_image(iter([data, data]))], root=tmp_path, dtype="bfloat16")
    assert summary.new == 1
    with torch.no_grad():
        backbone.net.net.pos_embed.fill_(float("nan"))
    with pytest.raises(VlmxError, match="NaN or infinity"):
        extract(backbone, [one_image(iter([data, data]))], root=tmp_path / "nan", dtype="bfloat16")


def test_image_that_changes_meanwhile_is_an_error(tmp_path: Path, vit: Backbone) -> None:
    one, two = (draw_photo(tmp_path / f"{number}.png", number).read_bytes() for number in (1, 2))
    with pytest.raises(DataError, match="changed while it was being extracted"):
        extract(vit, [one_image(iter([one, two]))], root=tmp_path)


def test_key_that_names_another_image_than_before_is_refused_before_encoding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = draw_photo(tmp_path / "photos" / "0.png", 0)
    cache, _ = run_extract(tmp_path, photo.parent, capsys)
    draw_photo(photo, 1)
    assert vlmx("extract", *VIT, "--data", photo.parent, "--out", tmp_path) == 3
    assert "give this data set its own name with --name" in capsys.readouterr().err
    assert len(tokens_of(cache)) == 1
    run_extract(tmp_path, photo.parent, capsys, "--name", "changed")
    assert len(tokens_of(cache)) == 2


def test_plan_that_does_not_fit_is_refused(tmp_path: Path, vit: Backbone) -> None:
    spec, shape = spec_of(vit, "float16"), TokenShape(grid=vit.grid, dim=vit.dim)
    images = [SourceImage(key=str(i), id=f"{i:064x}", source_wh=(1, 1), load=bytes) for i in range(3)]
    with CacheWriter(tmp_path, spec, shape) as writer:
        fits = plan_extraction(images, spec, shape, writer, free_bytes=10**6)
        # 3 images of 64 x 96 float16 numbers and a checksum, and the index of one shard of 1024
        assert fits.new_bytes == 3 * (64 * 96 * 2 + 4) + 1024 * 16 + 4
        with pytest.raises(OutOfSpaceError, match="3 images do not fit"):
            plan_extraction(images, spec, shape, writer, free_bytes=fits.new_bytes - 1)


def test_full_disk_keeps_what_was_committed(tmp_path: Path, vit: Backbone) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    try:
        spec, shape = spec_of(vit, "float16"), TokenShape(grid=vit.grid, dim=vit.dim)
        CacheWriter(disk, spec, shape, slots=4).close()
        photos = [draw_photo(tmp_path / "photos" / f"{number:02}.png", number) for number in range(12)]
        everything = open_source(str(tmp_path / "photos"))
        extract(vit, [replace(everything, images=everything.images[:4])], root=disk)
        before = tokens_of(disk / spec.name)
        calls = []

        def take_the_space() -> bytes:
            """Between the plan, which found enough room, and the end, another program fills the disk."""
            calls.append(1)
            if len(calls) == 2:
                (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 30_000))
            return photos[4].read_bytes()

        images = (*everything.images[:4], ImageRecord(key="04.png", load=take_the_space), *everything.images[5:])
        with pytest.raises(OutOfSpaceError, match="no space left") as caught:
            extract(vit, [replace(everything, images=images)], root=disk, threads=1)
        assert "same command again" in caught.value.fix
        kept = tokens_of(disk / spec.name)
        assert all(np.array_equal(kept[image], before[image]) for image in before)

        (disk / "filler").unlink()
        assert extract(vit, [everything], root=disk).new == 12 - len(kept)
        assert len(tokens_of(disk / spec.name)) == 12
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_help_and_completion_are_light() -> None:
    code = (
        "import sys; from vlmx.extract.arguments import complete_backbone;"
        "print([item.value for item in complete_backbone(None, None, 'vmamba-s')]);"
        "print([name for name in ('torch', 'timm', 'zarr', 'PIL', 'numpy') if name in sys.modules])"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == ["['vmamba-s-ade20k', 'vmamba-s-coco', 'vmamba-s-in1k']", "[]"]


def test_webdataset_and_llava_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same photos from three kinds of sources are encoded once."""
    photos = tmp_path / "photos"
    for number in range(3):
        draw_photo(photos / f"{number}.png", number)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for number in range(3):
            tar.add(photos / f"{number}.png", arcname=f"{number}.png")
        info = tarfile.TarInfo("0.txt")
        tar.addfile(info, io.BytesIO(b""))
    rows = [{"id": "a", "image": "photos/2.png", "conversations": []}, {"id": "b", "conversations": []}]
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    _, err = run_extract(tmp_path, tmp_path / "shard.tar", capsys)
    assert "3 to encode" in err
    for data in (photos, tmp_path / "mix.json"):
        _, err = run_extract(tmp_path, data, capsys)
        assert " 0 to encode" in err
    ids = [
        ImageTable.open(tmp_path, name).id_of(key)
        for name, key in [("shard", "2.png"), ("photos", "2.png"), ("mix", "photos/2.png")]
    ]
    assert len(set(ids)) == 1


def test_limit_takes_the_first_images_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        draw_photo(tmp_path / "photos" / f"{number}.png", number)
    _, printed = run_extract(tmp_path / "caches", tmp_path / "photos", capsys, "--limit", "2")
    assert "only the first 2" in printed
    assert ImageTable.open(tmp_path / "caches", "photos").keys() == ["0.png", "1.png"]


def test_a_repaired_file_takes_the_place_of_the_broken_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_photo(tmp_path / "photos" / "good.png", 1)
    (tmp_path / "photos" / "bad.png").write_bytes(b"not an image")
    run_extract(tmp_path / "caches", tmp_path / "photos", capsys)
    assert list(ImageTable.open(tmp_path / "caches", "photos").failed()) == ["bad.png"]
    draw_photo(tmp_path / "photos" / "bad.png", 2)
    run_extract(tmp_path / "caches", tmp_path / "photos", capsys)
    table = ImageTable.open(tmp_path / "caches", "photos")
    assert table.failed() == {}
    assert table.source_wh("bad.png") == (90, 60)


def test_scales_from_few_images_and_images_that_they_do_not_fit_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "black.png")
    for number in range(4):
        draw_photo(tmp_path / "photos" / f"{number}.png", number)
    common = ["extract", *VIT, "--dtype", "int8", "--out", str(tmp_path / "caches"), "--threads", "1"]
    cli.main([*common, "--data", str(tmp_path), "--name", "black", "--limit", "1"])
    assert "8-bit scales from 1 images fit these" in capsys.readouterr().err
    cli.main([*common, "--data", str(tmp_path / "photos")])
    assert "the 8-bit scales of this cache do not fit the images that were added" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_no_bug_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_photo(tmp_path / "photos" / "0.png", 0)
    (tmp_path / "file").write_text("no folder")
    assert vlmx("extract", *VIT, "--data", tmp_path / "photos", "--out", tmp_path / "file") == 1
    said = capsys.readouterr().err
    assert "Not a directory" in said
    assert "bug" not in said
