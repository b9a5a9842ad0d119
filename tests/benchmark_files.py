"""How do users lay out the published files of the eleven benchmarks? Small data roots with all of them.

make_data_root(folder) writes one: see benchmark_contents for what is in it. Photos are small, each with two coloured
boxes; OCID's are 640 x 480, as the real ones all are. changed_root(folder, path, change) damages one of its files.
real_pope_root(folder) has the official POPE questions about the real photos that lie beside the checkout.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmark_contents import BEACH, FILES, IMAGES, PILE, QUESTIONS, SHORT, SNOW, TABLE

__all__ = ["BEACH", "FILES", "IMAGES", "PILE", "QUESTIONS", "SHORT", "SNOW", "TABLE", "make_data_root"]

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"  # beside the checkout, where there is any


def make_data_root(folder: Path, *, images: bool = True) -> Path:
    """Write the published files of all benchmarks below `folder`, and their photos unless `images` is False."""
    for path, content in FILES.items():
        write_file(folder, path, content)
    if images:
        for key in IMAGES:
            write_image(folder, key)
    return folder


def changed_root(root: Path, path: str, change: Callable[[Any], object]) -> Path:
    """A data root without photos, one file of which `change` has changed."""
    content = copy.deepcopy(FILES[path])
    change(content)
    make_data_root(root, images=False)
    write_file(root, path, content)
    return root


def write_file(root: Path, path: str, content: Any) -> None:
    """Write one annotation file as its publishers do: pickle, lines of JSON, or JSON."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".p":
        file.write_bytes(pickle.dumps(content, protocol=2))
    elif file.suffix == ".jsonl" or file.parent.name == "pope":
        file.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    else:
        file.write_text(json.dumps(content), encoding="utf-8")


def write_image(root: Path, key: str) -> None:
    """Write one photo: a plain ground, which differs between photos, with two boxes of other colours."""
    from PIL import Image, ImageDraw

    width, height = IMAGES[key]
    number = list(IMAGES).index(key)
    picture = Image.new("RGB", (width, height), (40 + 12 * number, 200 - 9 * number, 90 + 7 * number))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((width // 8, height // 6, width // 2, 2 * height // 3), fill=(230, 20 + 10 * number, 30))
    draw.rectangle((3 * width // 5, height // 4, 7 * width // 8, 5 * height // 6), fill=(20, 40, 250 - 10 * number))
    (root / key).parent.mkdir(parents=True, exist_ok=True)
    picture.save(root / key)


def real_pope_root(folder: Path) -> Path:
    """A data root with the official POPE questions, 36 of them, about the real photos beside the checkout.

    The three files keep the lines about these photos, and the photos get their names of 2014. Skips the test where
    there are none.
    """
    if not (REAL_DATA / "pope").is_dir() or not (REAL_DATA / "coco128" / "images").is_dir():
        pytest.skip("the POPE files and COCO photos are not beside this checkout")
    photos = {f"COCO_val2014_{path.name}": path for path in (REAL_DATA / "coco128" / "images").glob("*.jpg")}
    used: set[str] = set()
    for file in sorted((REAL_DATA / "pope").glob("coco_pope_*.json")):
        rows = [row for row in map(json.loads, file.read_text().splitlines()) if row["image"] in photos]
        write_file(folder, f"pope/{file.name}", rows)
        used |= {row["image"] for row in rows}
    (folder / "coco" / "val2014").mkdir(parents=True, exist_ok=True)
    for name in sorted(used):
        shutil.copy(photos[name], folder / "coco" / "val2014" / name)
    return folder
