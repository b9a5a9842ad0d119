"""Extract a folder of photos again and again in processes that are killed at random instants, and compare the stores.

    python tests/kill_main.py FOLDER KILLS SEED

A round begins with an empty cache, one to three processes fill it together, and one of them is killed. The others go
on and must come to the end; a round of one process is begun again, and perhaps killed again. Prints a JSON line: how
many were killed, how many of these in the middle of the work, and how many processes took over.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from vlmx.cache_specs.claims import GUARD
from vlmx.cache_specs.layout import PROVENANCE
from vlmx.cache_specs.manifest import COMMITS, MANIFEST, SEAL
from vlmx.cache_specs.spec import TokenShape
from vlmx.cache_specs.writer import CacheWriter, Part
from vlmx.extract.backbones.base import Backbone, build_backbone
from vlmx.extract.plan import spec_of
from vlmx.extract.runner import extract
from vlmx.extract.sources import open_source

IMAGES = 24
SLOTS = 2


def draw_photos(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(IMAGES):
        photo = Image.new("RGB", (90, 60), (number * 7 % 256, number * 31 % 256, 90))
        ImageDraw.Draw(photo).ellipse((number, 5, number + 30, 50), fill=(250, number, 10))
        photo.save(folder / f"{number:02}.png")
    (folder / "07.png").write_bytes(b"no image")


def begin(root: Path, photos: Path, backbone: Backbone, part: Part) -> int:
    """Fill the cache in a process of its own; gives its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(root.parent / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        extract(backbone, [open_source(str(photos))], root=root, threads=1, part=part)
        code = 0
    finally:
        os._exit(code)


def empty_cache(root: Path, backbone: Backbone) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    spec = spec_of(backbone, "float16")
    CacheWriter(root, spec, TokenShape(grid=backbone.grid, dim=backbone.dim), slots=SLOTS).close()
    return root / spec.name


def content(root: Path) -> dict[str, bytes]:
    """The cache and the image table, but for what may differ."""
    files = (path for path in root.rglob("*") if path.is_file())
    kept = (path for path in files if path.name not in (PROVENANCE, GUARD) and ".stamps." not in path.name)
    return {str(path.relative_to(root)): path.read_bytes() for path in kept}


def succeeded(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def committed(cache: Path) -> int:
    names = os.listdir(cache / COMMITS) if (cache / COMMITS).is_dir() else []
    records = sum(name.endswith(".json") and not name.startswith(".") for name in names)
    return records + (cache / MANIFEST).read_bytes().count(b"\n") - 1


def main(folder: Path, kills: int, seed: int) -> None:
    dice = random.Random(seed)
    torch.set_num_threads(1)
    photos, root = folder / "photos", folder / "caches"
    draw_photos(photos)
    backbone = build_backbone("vit-mini-scenes", res=(64, 64), weights="random:0")

    cache = empty_cache(root, backbone)
    started = time.perf_counter()
    assert succeeded(begin(root, photos, backbone, Part()))
    lasts_s = time.perf_counter() - started
    whole = content(root)
    assert (cache / SEAL).exists()

    killed = in_the_middle = taken_over = 0
    while killed < kills:
        empty_cache(root, backbone)
        while not (cache / SEAL).exists():
            count = dice.choice((1, 1, 2, 3))
            children = [begin(root, photos, backbone, Part(index=index, count=count)) for index in range(count)]
            victim = dice.choice(children)
            time.sleep(dice.uniform(0, lasts_s))
            os.kill(victim, signal.SIGKILL)
            died = os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1]) == -signal.SIGKILL
            killed += died
            in_the_middle += died and committed(cache) > 0 and not (cache / SEAL).exists()
            for child in children:
                if child != victim:
                    assert succeeded(child), (folder / "stderr").read_text()[-3000:]
            if count > 1:
                taken_over += died
                assert (cache / SEAL).exists(), "the others should have come to the end"
            elif dice.random() < 0.5:
                assert succeeded(begin(root, photos, backbone, Part())), (folder / "stderr").read_text()[-3000:]
        # one that dies after the seal may not have come to the image table
        assert succeeded(begin(root, photos, backbone, Part())), (folder / "stderr").read_text()[-3000:]
        now = content(root)
        assert now == whole, sorted(name for name in now.keys() | whole.keys() if now.get(name) != whole.get(name))
    print(json.dumps({"killed": killed, "in_the_middle": in_the_middle, "taken_over": taken_over}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
