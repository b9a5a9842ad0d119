"""Is a store that was filled by processes that died the same, to the last byte, as one that was filled in peace?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from vlmx.cache_specs.audit import verify
from vlmx.cache_specs.manifest import SEAL, read_manifest
from vlmx.cache_specs.reader import TokenReader
from vlmx.cache_specs.spec import TokenShape
from vlmx.cache_specs.writer import CacheWriter
from vlmx.extract.backbones.base import build_backbone
from vlmx.extract.plan import spec_of
from vlmx.extract.runner import extract
from vlmx.extract.sources import open_source

HERE = Path(__file__).parent


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of fsyncs take long on a disk."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def killed(folder: Path, kills: int, seed: int) -> dict[str, int]:
    command = [sys.executable, str(HERE / "kill_main.py"), str(folder), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def test_killed_at_a_few_random_instants(memory: Path) -> None:
    assert killed(memory, kills=5, seed=1)["killed"] >= 5


@pytest.mark.slow
def test_killed_at_two_hundred_random_instants(memory: Path) -> None:
    counts = killed(memory, kills=200, seed=2)
    assert counts["killed"] >= 200
    assert counts["in_the_middle"] >= 20
    assert counts["taken_over"] >= 40


def start(photos: Path, root: Path) -> subprocess.Popen[str]:
    arguments = ["--backbone", "vit-mini-scenes", "--weights", "random:0", "--res", "128"]
    arguments += ["--data", str(photos), "--out", str(root), "--threads", "1"]
    command = [sys.executable, "-m", "vlmx", "extract", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def committed(root: Path) -> int:
    """Shards of the one cache below `root`."""
    caches = list(root.glob("*@*"))
    return len(read_manifest(caches[0]).shards) if caches and (caches[0] / "manifest.jsonl").exists() else 0


def test_sigterm_finishes_the_shard_in_hand_and_the_command_goes_on_later(tmp_path: Path) -> None:
    """The batch system's way to say that the time is over: exit code 0, and nothing of what was begun is lost."""
    photos, root = tmp_path / "photos", tmp_path / "caches"
    photos.mkdir()
    for number in range(80):
        Image.new("RGB", (40, 30), (number, 100, 90)).save(photos / f"{number:03}.bmp")
    backbone = build_backbone("vit-mini-scenes", res=(128, 128), weights="random:0")
    shape = TokenShape(grid=backbone.grid, dim=backbone.dim)
    CacheWriter(root, spec_of(backbone, "float16"), shape, slots=4).close()
    process = start(photos, root)
    while committed(root) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    before = committed(root)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    after = committed(root)
    assert process.returncode == 0, err
    assert "SIGTERM: stopping after the shard in hand" in err
    assert "give the same command again" in err
    assert before < after < 20
    (cache,) = root.glob("*@*")
    assert not (cache / SEAL).exists()
    assert len(TokenReader(cache, allow_partial=True)) == 4 * after
    assert not (cache / "partial").exists() or not os.listdir(cache / "partial")

    summary = extract(backbone, [open_source(str(photos))], root=root, threads=1)
    assert summary.new == 80 - 4 * after
    report = verify(cache, full=True)
    assert report.ok
    assert report.sealed
    assert report.images == 80
