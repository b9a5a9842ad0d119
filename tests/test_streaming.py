"""Does encoding on the fly give the tokens of a cache, in any thread or process, and the same training?"""

import json
import multiprocessing
import shutil
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from vlmx import cli
from vlmx.cache_specs import streams
from vlmx.cache_specs.ids import ImageTable, image_id
from vlmx.cache_specs.places import LocalPlace
from vlmx.cache_specs.reader import open_cache
from vlmx.cache_specs.streams import StreamConfig, open_stream, stream_of
from vlmx.cache_specs.token_source import TokenSource
from vlmx.errors import BackendError, CacheError, DataError, SpecMismatchError, UsageError
from vlmx.extract.backbones.base import build_backbone
from vlmx.extract.runner import extract
from vlmx.extract.sources import open_source
from vlmx.extract.streaming import StreamingSource
from vlmx.models.folder import load_model
from vlmx.registry import Registry
from vlmx.runs import RunFolder
from vlmx.train.command import train as train_command

PHOTOS = 21
VIT = {"backbone": "vit-mini-scenes", "weights": "random:0", "res": 64, "threads": 2}


def draw(path: Path, number: int) -> None:
    photo = Image.new("RGB", (60 + 3 * number, 70), (number * 7 % 256, number * 31 % 256, 90))
    ImageDraw.Draw(photo).ellipse((number, 5, number + 30, 50), fill=(250, number * 9, 10))
    photo.save(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, one twice and one that is cut off, a JSON about them, and a cache of their tokens."""
    root = tmp_path_factory.mktemp("world")
    photos = root / "photos"
    photos.mkdir()
    for number in range(PHOTOS):
        draw(photos / f"{number:02}.png", number)
    shutil.copy(photos / "03.png", photos / "again.png")
    (photos / "cut.png").write_bytes((photos / "05.png").read_bytes()[:200])
    rows = [
        {
            "id": f"c{number}",
            "image": path.name,
            "conversations": [
                {"from": "human", "value": "<image>\nwhat colour is it?"},
                {"from": "gpt", "value": ("red", "blue", "green")[number % 3]},
            ],
        }
        for number, path in enumerate(sorted(photos.iterdir()))
    ]
    (root / "photos.json").write_text(json.dumps(rows))
    source = open_source(str(root / "photos.json"), photos)
    extract(build_backbone("vit-mini-scenes", res=(64, 64), weights="random:0"), [source], root=root / "caches")
    return root


def stream(world: Path, root: Path | None = None, **more: object) -> TokenSource:
    config = StreamConfig.model_validate({**VIT, "image_root": str(world / "photos"), **more})
    return open_stream(config, {"photos": str(world / "photos.json")}, LocalPlace(root or world / "caches"))


def cache_of(world: Path) -> TokenSource:
    return open_cache("vit-mini-scenes", world / "caches")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_tokens_are_those_of_a_cache_bit_for_bit(world: Path, tmp_path: Path, dtype: str) -> None:
    source = open_source(str(world / "photos.json"), world / "photos")
    backbone = build_backbone("vit-mini-scenes", res=(64, 64), weights="random:0")
    summary = extract(backbone, [source], root=tmp_path / "cached", dtype=dtype)  # type: ignore[arg-type]
    cache = open_cache(summary.cache.url)
    streamed = stream(world, tmp_path / "streamed", dtype=dtype)  # no cache there: 8-bit scales are found again
    assert streamed.spec == cache.spec
    assert streamed.shape == cache.shape
    assert streamed.failed == cache.failed
    assert len(streamed.failed) == 1
    assert set(streamed.ids) == set(cache.ids)
    ids = [list(cache.ids)[at] for at in np.random.default_rng(0).permutation(PHOTOS)]
    some = [*ids[:3], ids[0], *ids[3:]]  # one comes twice
    out = np.empty((len(some), *streamed.read(ids[:1]).shape[1:]), dtype=streamed.storage_dtype)
    assert streamed.read(some, out=out) is out
    assert np.array_equal(out, cache.read(some))
    assert np.array_equal(streamed.read(ids[5:8]), cache.read(ids[5:8]))  # from memory, and in another pass
    assert np.array_equal(streamed.read_float32(ids[:4]), cache.read_float32(ids[:4]))
    assert streamed.read([]).shape == (0, streamed.num_tokens, streamed.shape.dim)


def test_what_was_read_last_is_kept_and_not_more(world: Path) -> None:
    streamed = stream(world, keep_mb=0)
    assert isinstance(streamed, StreamingSource)
    streamed._kept_max = 4
    ids = list(streamed.ids)
    read: list[str] = []
    original = streamed._originals

    class Watched(dict):
        def __getitem__(self, image: str) -> object:
            read.append(image)
            return original[image]

    streamed._originals = Watched()
    streamed.read(ids[:6])
    streamed.read(ids[3:6])
    assert sorted(read) == sorted(ids[:6])
    streamed.read(ids[1:3])
    assert read[6:] == [ids[1]]  # the four that were used last were 2, 3, 4 and 5


def test_threads_share_one_stream(world: Path) -> None:
    cache, streamed = cache_of(world), stream(world, keep_mb=0)
    ids = list(cache.ids)
    parts = [[ids[(start + 3 * step) % len(ids)] for step in range(7)] for start in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for part, tokens in zip(parts, pool.map(streamed.read, parts), strict=True):
            assert np.array_equal(tokens, cache.read(part))


def test_the_threads_of_the_caller_are_left_alone(world: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        streamed = stream(world)
        streamed.read(list(streamed.ids)[:9])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def read_in_child(source: TokenSource, ids: list[str], answer: Connection) -> None:
    answer.send(source.read(ids))


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_another_process_reads_the_same(world: Path, method: str) -> None:
    streamed = stream(world)
    ids = list(streamed.ids)[:5]
    expected = streamed.read(ids)
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    child = context.Process(target=read_in_child, args=(streamed, ids[::-1], theirs))
    child.start()
    assert ours.poll(60)
    assert np.array_equal(ours.recv(), expected[::-1])
    child.join(60)
    assert child.exitcode == 0


def test_the_image_table_is_that_of_an_extraction_and_is_made_once(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream(world, tmp_path)
    assert f"look at photos  {PHOTOS + 2}/{PHOTOS + 2}" in capsys.readouterr().err
    made, extracted = ImageTable.open(tmp_path, "photos"), ImageTable.open(world / "caches", "photos")
    assert made._entries == extracted._entries
    stream(world, tmp_path)
    assert "look at photos  1/1" in capsys.readouterr().err  # the one that could not be decoded, in case it can by now


def test_a_file_that_was_repaired_is_taken(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "photos", tmp_path / "photos")
    root = tmp_path / "caches"
    moved = {"image_root": str(tmp_path / "photos")}
    assert len(stream(world, root, **moved).ids) == PHOTOS
    draw(tmp_path / "photos" / "cut.png", 77)
    assert len(stream(world, root, **moved).ids) == PHOTOS + 1


def test_a_file_that_changed_is_not_taken_for_the_old_one(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "photos", tmp_path / "photos")
    streamed = stream(world, tmp_path / "caches", image_root=str(tmp_path / "photos"))
    old = image_id((tmp_path / "photos" / "07.png").read_bytes())
    draw(tmp_path / "photos" / "07.png", 99)
    with pytest.raises(DataError, match=r"'07.png' is not the image that data set 'photos' had"):
        streamed.read([old])
    others = list(streamed.ids)[:3]
    assert np.array_equal(streamed.read(others), cache_of(world).read(others))  # an error leaves nothing behind
    gone = image_id((tmp_path / "photos" / "08.png").read_bytes())
    (tmp_path / "photos" / "08.png").unlink()
    with pytest.raises(DataError, match=r"cannot read the image '08.png'"):
        streamed.read([gone])


def test_wrong_input(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="an encoder is needed"):
        stream(world, backbone=None)
    with pytest.raises(UsageError, match="is not a resolution"):
        stream(world, res="5q")
    streamed = stream(world)
    unknown = image_id(b"unknown")
    with pytest.raises(CacheError, match="1 of 2 images cannot be encoded on the fly"):
        streamed.read([next(iter(streamed.ids)), unknown])
    with pytest.raises(CacheError, match="1 could not be decoded"):
        streamed.require(streamed.failed)
    with pytest.raises(SpecMismatchError, match="dtype"):
        streamed.require_spec(stream(world, dtype="bfloat16").spec)
    lacking: Registry = Registry("token stream", group="vlmx.no_such_group")
    lacking.add("encoder", "vlmx_no_such_module:open_encoder")
    monkeypatch.setattr(streams, "TOKEN_STREAMS", lacking)
    with pytest.raises(BackendError, match="encoding on the fly is not possible here"):
        stream(world)


def test_a_spec_says_how_to_stream_its_tokens(world: Path) -> None:
    cache = cache_of(world)
    config = stream_of(cache.spec).model_copy(update={"image_root": str(world / "photos")})  # type: ignore[arg-type]
    opened = open_stream(config, {"photos": str(world / "photos.json")}, LocalPlace(world / "caches"))
    opened.require_spec(cache.spec)


def run_train(world: Path, out: Path, *options: str) -> RunFolder:
    common = ["--config", "mini", "--connector", "mlp2", "--out", str(out), "max_steps=3", "global_batch=8"]
    common += ["log_every=1", "checkpoint.every_steps=2", "--data", str(world / "photos.json")]
    train_command([*common, *options], standalone_mode=False)
    return RunFolder(out)


CACHED = ("--cache", "vit-mini-scenes")
STREAMED = ("--cache", "none", "--backbone", "vit-mini-scenes", "--weights", "random:0", "--res", "64")


@pytest.fixture(scope="module")
def streamed_run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of the mini preset without a cache."""
    root = tmp_path_factory.mktemp("runs")
    options = ("--image-root", str(world / "photos"), "--caches", str(root / "caches"))
    return run_train(world, root / "streamed", *STREAMED, *options)


def test_training_is_the_same_with_a_cache_and_without(world: Path, streamed_run: RunFolder, tmp_path: Path) -> None:
    cached = run_train(world, tmp_path / "cached", *CACHED, "--caches", str(world / "caches"))
    losses = [line["loss"] for line in cached.metrics()]
    assert len(losses) == 3
    assert [line["loss"] for line in streamed_run.metrics()] == losses
    assert streamed_run.status["notes"] == cached.status["notes"]  # the image that cannot be decoded, and no training
    assert streamed_run.status["order_digest"] == cached.status["order_digest"]
    assert load_model(streamed_run.path / "model").card.spec == load_model(cached.path / "model").card.spec
    assert streamed_run.config["cache"] == "none"
    assert streamed_run.config["stream"]["backbone"] == "vit-mini-scenes"


def test_a_streamed_run_goes_on(streamed_run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(streamed_run.path, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    run.set_status("running")
    train_command(["--out", str(run.path), "--resume", "--caches", str(tmp_path)], standalone_mode=False)
    assert [line["loss"] for line in run.metrics()] == [line["loss"] for line in streamed_run.metrics()]


def test_an_encoder_beside_a_cache_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not clear where the tokens come from"):
        run_train(world, tmp_path, *CACHED, "--caches", str(world / "caches"), "--backbone", "vit-mini-scenes")


def evaluate(run: RunFolder, *options: str) -> list[str]:
    cli.cli.main(
        ["eval", "--run", str(run.path), "--bench", "mini-count", "--limit", "6", *options], standalone_mode=False
    )
    answers = (run.path / "eval" / "mini-count" / "answers.jsonl").read_text()
    shutil.rmtree(run.path / "eval")
    return answers.splitlines()


def test_eval_with_and_without_a_cache(
    streamed_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mini study is cut down to its first test scenes, so that this takes seconds."""
    from vlmx.data.mini import study
    from vlmx.evaluate import score

    keys = study.scene_keys("test")[:8]
    questions = tuple(q for q in score.questions_of("mini-count") if q.image in keys)
    monkeypatch.setattr(study, "scene_keys", lambda split: keys if split == "test" else [])
    monkeypatch.setattr("vlmx.evaluate.predict.questions_of", lambda benchmark, *_: questions)
    monkeypatch.setattr("vlmx.evaluate.score.questions_of", lambda benchmark, *_: questions)
    caches = tmp_path / "caches"
    on_the_fly = evaluate(streamed_run, "--caches", str(caches))
    assert "encoding on the fly, as in training" in capsys.readouterr().err
    assert len(on_the_fly) == 7
    assert evaluate(streamed_run, "--caches", str(caches), "--cache", "none", "stream.keep_mb=1") == on_the_fly

    backbone = build_backbone("vit-mini-scenes", res=(64, 64), weights="random:0")
    extract(backbone, [open_source("mini")], root=caches)
    capsys.readouterr()
    assert evaluate(streamed_run, "--caches", str(caches)) == on_the_fly
    assert "on the fly" not in capsys.readouterr().err  # there is a cache of this spec now
    with pytest.raises(SpecMismatchError, match="weights_sha256"):
        evaluate(streamed_run, "--caches", str(caches), "--cache", "none", "--weights", "random:1")
    with pytest.raises(UsageError, match="changes nothing"):
        evaluate(streamed_run, "--caches", str(caches), "--res", "64")
