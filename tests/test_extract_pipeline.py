"""Does extraction overlap its three parts without changing a byte, and get by when memory or an engine is missing?"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_extract import VIT, draw_photo, run_extract, tokens_of, vlmx
from torch import Tensor, nn

from vlmx import cli
from vlmx.cache_specs.reader import open_cache
from vlmx.errors import BackendError, CacheError
from vlmx.extract import runner
from vlmx.extract.backbones.base import Backbone, build_backbone
from vlmx.extract.batches import fastest_size
from vlmx.extract.behind import WorkBehind
from vlmx.extract.lanes import CpuLanes, Finish
from vlmx.extract.ops import engines
from vlmx.extract.runner import extract
from vlmx.extract.seconds import Seconds
from vlmx.extract.sources import ImageSource, open_source


@pytest.fixture(autouse=True)
def best_engine_afterwards() -> Iterator[None]:
    """`--scan` holds for the rest of a process."""
    yield
    engines.force(None)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(21):
        draw_photo(folder / f"{number:02}.png", number)
    return open_source(str(folder))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_work_behind_keeps_the_order_and_lets_its_producer_go_on() -> None:
    done: list[int] = []
    may_end = threading.Event()

    def job(number: int) -> None:
        may_end.wait(10)
        done.append(number)

    with WorkBehind(behind=2) as behind:
        behind.give(lambda: job(0))
        behind.give(lambda: job(1))
        assert done == []  # both were given while the first had not ended
        third = threading.Thread(target=behind.give, args=(lambda: job(2),))
        third.start()
        third.join(0.1)
        assert third.is_alive()  # there is room for two
        may_end.set()
        third.join(10)
    assert done == [0, 1, 2]


def test_work_behind_raises_early_and_begins_nothing_after_an_error() -> None:
    done: list[str] = []

    def fail() -> None:
        raise OSError("disk")

    def produce(jobs: list[Callable[[], None]], checks: int) -> None:
        with WorkBehind(behind=2) as behind:
            for each in jobs:
                behind.give(each)
            for _ in range(checks):
                behind.check()
                time.sleep(0.01)
            assert checks == 0, "no check has raised"

    with pytest.raises(OSError, match="disk"):
        produce([fail, lambda: done.append("after the error")], 1000)
    assert done == []
    with pytest.raises(OSError, match="disk"):
        produce([fail], 0)  # an error of the last job is seen at the end


def test_work_behind_ends_what_was_given_when_its_producer_fails() -> None:
    done: list[str] = []

    def job() -> None:
        time.sleep(0.05)
        done.append("stored")

    def produce() -> None:
        with WorkBehind(behind=2) as behind:
            behind.give(job)
            behind.give(job)
            raise KeyError("an image")

    with pytest.raises(KeyError):
        produce()
    assert done == ["stored", "stored"]


@pytest.mark.parametrize("name", ["vit-mini-scenes", "vmamba-mini-scenes"])
@pytest.mark.usefixtures("two_threads")
def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path, photos: ImageSource, name: str) -> None:
    backbone = build_backbone(name, res=(64, 64), weights="random:0")
    two = extract(backbone, [photos], root=tmp_path / "two", threads=2)
    assert two.seconds.lanes == 2
    assert torch.get_num_threads() == 2  # as it was before
    torch.set_num_threads(1)
    one = extract(backbone, [photos], root=tmp_path / "one", threads=1)
    assert one.seconds.lanes == 1
    tokens = tokens_of(one.cache.path)
    assert len(tokens) == 21
    assert all(np.array_equal(tokens[image], other) for image, other in tokens_of(two.cache.path).items())


def small_memory(backbone: Backbone, fits: Callable[[int], bool]) -> list[int]:
    """Let `backbone` raise what a GPU raises for passes that do not fit; the sizes of those that did."""
    sizes: list[int] = []

    def look(module: nn.Module, images: tuple[Tensor]) -> None:
        if not fits(len(images[0])):
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(images[0]))

    backbone.register_forward_pre_hook(look)
    return sizes


def test_out_of_memory_halves_the_pass_and_loses_nothing(
    tmp_path: Path, photos: ImageSource, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = build_backbone("vit-mini-scenes", res=(64, 64), weights="random:0")
    expected = tokens_of(extract(backbone, [photos], root=tmp_path / "roomy").cache.path)
    sizes = small_memory(backbone, lambda size: size <= 2)
    summary = extract(backbone, [photos], root=tmp_path / "tight")
    assert summary.images_per_pass == 2
    assert set(sizes) == {2}
    printed = capsys.readouterr().err
    assert "from here on 4 images a pass" in printed
    assert "from here on 2 images a pass" in printed
    found = tokens_of(summary.cache.path)
    assert sorted(found) == sorted(expected)
    for image, tokens in expected.items():
        np.testing.assert_allclose(found[image].astype(np.float32), tokens.astype(np.float32), atol=2e-3)
    runs = [json.loads(line) for line in (summary.cache.path / "provenance.jsonl").read_text().splitlines()]
    assert [run["images_per_pass"] for run in runs] == [8, 2]


class EagerLanes(CpuLanes):
    """Runs a pass where it is begun, so that it is also there that memory runs out, as on a GPU."""

    def start(self, images_BCHW: Tensor) -> Finish:
        encoded = self._encode(images_BCHW)
        return lambda: encoded


def test_memory_that_runs_out_when_a_pass_begins(
    tmp_path: Path, photos: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = build_backbone("vit-mini-scenes", res=(64, 64), weights="random:0")
    expected = tokens_of(extract(backbone, [photos], root=tmp_path / "roomy").cache.path)
    monkeypatch.setattr(runner, "lanes_for", lambda backbone, stored: EagerLanes(backbone, torch.float16))
    begun: list[int] = []
    small_memory(backbone, lambda size: begun.append(size) or len(begun) <= 1 or size <= 3)
    summary = extract(backbone, [photos], root=tmp_path / "tight")
    assert summary.images_per_pass == 2
    assert begun[:3] == [8, 8, 4]
    assert set(begun[3:]) == {2}
    found = tokens_of(summary.cache.path)
    assert sorted(found) == sorted(expected)
    for image, tokens in expected.items():
        np.testing.assert_allclose(found[image].astype(np.float32), tokens.astype(np.float32), atol=2e-3)


@pytest.mark.usefixtures("two_threads")
def test_memory_that_runs_out_later_is_survived_too(tmp_path: Path, photos: ImageSource) -> None:
    backbone = build_backbone("vit-mini-scenes", res=(64, 64), weights="random:0")
    expected = tokens_of(extract(backbone, [photos], root=tmp_path / "roomy").cache.path)
    passes: list[int] = []
    sizes = small_memory(backbone, lambda size: passes.append(size) or size <= 3 or len(passes) <= 1)
    summary = extract(backbone, [photos], root=tmp_path / "tight")
    assert summary.images_per_pass == 2
    assert sizes[0] == 8
    found = tokens_of(summary.cache.path)
    assert sorted(found) == sorted(expected)
    for image, tokens in expected.items():
        np.testing.assert_allclose(found[image].astype(np.float32), tokens.astype(np.float32), atol=2e-3)


def test_one_image_that_does_not_fit_is_a_clear_error(tmp_path: Path, photos: ImageSource) -> None:
    backbone = build_backbone("vit-mini-scenes", res=(64, 64), weights="random:0")
    small_memory(backbone, lambda size: False)
    with pytest.raises(BackendError, match="vit-mini-scenes at 64x64 does not fit into the memory") as caught:
        extract(backbone, [photos], root=tmp_path)
    assert caught.value.exit_code == 8
    assert "--res" in caught.value.fix


@pytest.mark.parametrize(
    ("seconds_of", "most", "expected"),
    [
        ({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}, 8, 8),  # eight cost what one costs
        ({1: 1.0, 2: 1.0, 4: 1.9, 8: 3.9, 16: 7.9}, 256, 2),  # no faster beyond two
        ({1: 1.0, 2: 2.0, 4: 1.2, 8: 2.4, 16: 4.8}, 256, 4),  # one doubling that brings nothing is passed over
        ({1: 1.0, 2: 1.0, 4: 1.0}, 256, 4),  # eight do not fit
        ({1: 1.0, 2: 1.0}, 1, 1),
        ({}, 256, 0),
    ],
)
def test_the_size_of_a_pass_is_found_by_trying(seconds_of: dict[int, float], most: int, expected: int) -> None:
    def measure(size: int) -> float:
        if size not in seconds_of:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return seconds_of[size]

    assert fastest_size(measure, most=most) == expected


def test_bfloat16_tokens_are_another_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_photo(tmp_path / "photos" / "0.png", 0)
    plain, _ = run_extract(tmp_path / "caches", tmp_path / "photos", capsys)
    half, _ = run_extract(tmp_path / "caches", tmp_path / "photos", capsys, "--compute", "bfloat16")
    readers = [open_cache(path.name, tmp_path / "caches") for path in (plain, half)]
    assert readers[0].spec.differences(readers[1].spec) == ["compute: float32, not bfloat16"]
    assert "compute" not in readers[0].spec.to_dict()
    assert json.loads((half / "provenance.jsonl").read_text())["compute"] == "bfloat16"
    with pytest.raises(CacheError) as caught:
        readers[1].require(["0" * 64])
    assert "--compute bfloat16" in caught.value.fix
    (exact,), (rough,) = (tokens_of(path).values() for path in (plain, half))
    error = np.abs(exact.astype(np.float32) - rough.astype(np.float32)).std() / exact.astype(np.float32).std()
    assert 1e-4 < error < 0.1


def test_the_scan_engine_is_recorded_and_can_be_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_photo(tmp_path / "photos" / "0.png", 0)
    given = ["--data", str(tmp_path / "photos"), "--out", str(tmp_path), "--weights", "random:0"]
    for name, more, engine in [
        ("vmamba-mini-scenes", ["--scan", "torch"], "torch"),
        ("mambavision-mini-scenes", [], engines.choose(torch.device("cpu")).name),
        ("vit-mini-scenes", ["--scan", "torch"], "none"),
    ]:
        cli.main(["extract", "--backbone", name, *given, *more])
        out, err = capsys.readouterr()
        assert json.loads((tmp_path / out.strip() / "provenance.jsonl").read_text())["scan_engine"] == engine
        assert (f"selective scan: {engine}" in err) == (engine != "none")
        assert ("has no selective scan" in err) == (engine == "none")


def test_a_slow_engine_is_announced_with_what_would_enable_a_better_one(tmp_path: Path) -> None:
    draw_photo(tmp_path / "photos" / "0.png", 0)
    command = [sys.executable, "-m", "vlmx", "extract", "--backbone", "vmamba-mini-scenes", "--weights", "random:0"]
    command += ["--data", str(tmp_path / "photos"), "--out", str(tmp_path)]
    env = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}  # no compiler, nothing compiled yet
    printed = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stderr
    assert "selective scan: torch" in printed
    (warning,) = (line for line in printed.splitlines() if "the scan runs on the slow engine 'torch'" in line)
    assert "native: " in warning
    assert "(enable it: " in warning


def test_summary_says_where_the_time_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(9):
        draw_photo(tmp_path / "photos" / f"{number}.png", number)
    _, err = run_extract(tmp_path, tmp_path / "photos", capsys)
    line = next(line for line in err.splitlines() if line.startswith("time "))
    for part in (
        "images/s",
        "encoder busy",
        "waiting for images",
        "for the writer",
        "decoding",
        "of 2 threads",
        "writing",
    ):
        assert part in line
    last = [line for line in err.splitlines() if line.startswith("encode vit-mini-scenes")][-1]
    assert "9/9 images" in last
    assert "tokens 111 kB" in last  # 9 images of 64 tokens of 96 numbers of 2 bytes


def test_waiting_counts_only_while_a_lane_is_idle() -> None:
    seconds = Seconds(lanes=2)
    with seconds.waiting("wait_images", lambda: 0.0):
        time.sleep(0.02)
    assert seconds.wait_images == 0.0
    with seconds.waiting("wait_images", lambda: 2.0):
        time.sleep(0.02)
    assert 0.04 <= seconds.wait_images < 1.0
    seconds.total = 4.0
    seconds.encode = 6.0
    assert "encoder on 2 threads busy 75 %" in seconds.describe(images=8)
    assert "2.0 images/s" in seconds.describe(images=8)


def test_wrong_engines_and_sizes_say_what_to_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_photo(tmp_path / "photos" / "0.png", 0)
    common = ("extract", *VIT, "--data", tmp_path / "photos", "--out", tmp_path / "caches")
    assert vlmx(*common, "--scan", "trition") == 2
    assert "did you mean 'triton'" in capsys.readouterr().err
    assert vlmx(*common, "--batch-size", "0") == 2
    assert "neither a positive number nor auto" in capsys.readouterr().err
    assert vlmx(*common, "--compute", "float64") == 2
    if engines.engine("triton").obstacle(torch.device("cpu")) is None:
        pytest.skip("triton runs here")
    assert vlmx(*common, "--scan", "triton") == 8
    printed = capsys.readouterr().err
    assert "the scan engine 'triton' cannot run on cpu" in printed
    assert "why    " in printed
    assert not (tmp_path / "caches").exists()


@pytest.mark.parametrize(
    "name", ["vit-mini-scenes", "maxvit-mini-scenes", "mambavision-mini-scenes", "vmamba-mini-scenes"]
)
def test_weights_that_lie_channels_last_give_the_same_tokens(name: str) -> None:
    """What a GPU's lane does to the convolutions; copies of the parameters must not depend on their strides."""
    backbone = build_backbone(name, res=(64, 64), weights="random:0")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = backbone(images)
    found = backbone.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["vit-mini-scenes", "maxvit-mini-scenes", "vmamba-mini-scenes"])
def test_a_gpu_gives_the_tokens_of_the_cpu(tmp_path: Path, photos: ImageSource, name: str) -> None:
    torch.backends.cudnn.allow_tf32 = False
    caches = [
        extract(build_backbone(name, res=(64, 64), weights="random:0", device=device), [photos], root=tmp_path / device)
        for device in ("cpu", "cuda")
    ]
    expected, found = (tokens_of(summary.cache.path) for summary in caches)
    assert sorted(found) == sorted(expected)
    for image, tokens in expected.items():
        np.testing.assert_allclose(found[image].astype(np.float32), tokens.astype(np.float32), atol=1e-2, rtol=1e-2)
