"""Where do images come from: the embedded study, a folder, a LLaVA-style JSON, or webdataset tars."""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from vlmx.errors import DataError, UsageError

IMAGE_SUFFIXES = frozenset(
    f".{kind}"
    for kind in ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm")
)
SHOWN = 5  # how many names an error lists


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One image of a source.

    Attributes:
        key: its name within the source; a data set's table leads from it to the image's content id.
        load: reads the file's bytes; may be called from any thread, and more than once.
    """

    key: str
    load: Callable[[], bytes]


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Images in an order that is the same on every machine.

    Attributes:
        name: name of the data set's image table.
        describe: one line for the user: what it is, how many images, what was left out and why.
    """

    name: str
    describe: str
    images: tuple[ImageRecord, ...]

    def records(self) -> Iterable[ImageRecord]:
        """The images, in order. A key appears once, unless tars repeat it."""
        return self.images

    def first(self, count: int) -> ImageSource:
        """Only the first `count` images."""
        return replace(self, describe=f"{self.describe}; only the first {count:,}", images=self.images[:count])


def open_source(data: str, image_root: Path | None = None, name: str | None = None) -> ImageSource:
    """Find the images that `data` stands for; nothing is decoded yet.

    Args:
        data: "mini" (the embedded study), a folder (with its subfolders), a LLaVA-style .json or .jsonl file, or
            webdataset .tar files: a path, a glob, or braces such as "data/{000..003}.tar".
        image_root: folder that the image paths of a JSON start from; default: the folder of the JSON.
        name: name of the data set; default: "mini", or taken from the path.

    Raises:
        DataError: there is no such file or folder, it holds no image, it is damaged, or a JSON names missing images.
        UsageError: `image_root` without a JSON, or a name that is no file name.
    """
    path = Path(data)
    is_json = path.suffix.lower() in (".json", ".jsonl") and not path.is_dir()
    if image_root is not None and not is_json:
        raise UsageError("--image-root belongs to a JSON", why=f"--data {data} holds the images itself")
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise UsageError(f"'{name}' cannot name a data set", fix="use letters, digits and . _ + -")
    if data == "mini":
        return _mini(name)
    if path.is_dir():
        return _folder(path, name)
    if is_json and path.is_file():
        return _llava(path, image_root or path.parent, name)
    if data.endswith(".tar"):
        return _tars(data, name)
    if path.exists():
        why = "it is neither a folder, a .json or .jsonl file, nor a .tar file"
    else:
        why = f"{path.absolute()} does not exist"
    raise DataError(
        f"cannot read images from '{data}'",
        why=why,
        fix="--data takes 'mini', a folder of images, a LLaVA-style .json or .jsonl, or webdataset .tar files",
    )


def _mini(name: str | None) -> ImageSource:
    from vlmx.data.mini import study

    keys = [key for split in ("train", "test") for key in study.scene_keys(split)]
    render = cache(study.image_bytes_of)  # a scene is read twice, to hash and to decode; all of them are 84 MB
    images = tuple(ImageRecord(key=key, load=partial(render, key)) for key in keys)
    return ImageSource(
        name=name or "mini", describe=f"the embedded mini study: {len(images):,} rendered scenes", images=images
    )


def _folder(folder: Path, name: str | None) -> ImageSource:
    keys: list[str] = []
    others: Counter[str] = Counter()
    for here, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = [child for child in subfolders if not _is_loop(here, child)]
        for file in files:
            path = PurePosixPath(os.path.relpath(os.path.join(here, file), folder))
            if path.suffix.lower() in IMAGE_SUFFIXES:
                keys.append(str(path))
            else:
                others[path.suffix.lower() or file] += 1
    if not keys:
        tars = others[".tar"]
        raise DataError(
            f"no image in the folder {folder}",
            why=_others(others) or "it is empty",
            fix=f"for its tars, give --data '{folder}/*.tar'" if tars else "give the folder that holds the image files",
        )
    images = tuple(ImageRecord(key=key, load=(folder / key).read_bytes) for key in sorted(keys))
    return ImageSource(
        name=name or _table_name(folder.resolve().name),
        describe=_describe(f"folder {folder}", len(images), _others(others)),
        images=images,
    )


def _is_loop(here: str, child: str) -> bool:
    """Whether a subfolder is a link to a folder that it lies in."""
    target = os.path.realpath(os.path.join(here, child))
    return (os.path.realpath(here) + os.sep).startswith(target + os.sep)


def _llava(path: Path, root: Path, name: str | None) -> ImageSource:
    rows = _rows(path)
    keys: dict[str, None] = {}
    text_only = 0
    problems: list[str] = []
    for number, row in enumerate(rows, start=1):
        image = row.get("image") if isinstance(row, dict) else None
        if not isinstance(row, dict):
            problems.append(f"row {number} is a {type(row).__name__}, not an object")
        elif image is None:
            text_only += 1
        elif not isinstance(image, str) or not image:
            problems.append(f"row {number}: 'image' is {json.dumps(image)[:60]}, not one path")
        else:
            keys[image] = None
    if problems:
        raise DataError(
            f"{len(problems):,} of {len(rows):,} rows of {path} are not LLaVA-style rows",
            why=_first(problems),
            fix='a row is {"id": ..., "image": "path/of/one.jpg", "conversations": [...]}; no "image" means text only',
        )
    if not keys:
        raise DataError(f"{path} names no image", why=f"{text_only:,} rows, all text only")
    missing = [key for key in keys if not (root / key).is_file()]
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(keys):,} images that {path} names are missing",
            why=f"not below {root}: {_first(missing)}",
            fix="give the folder that the paths start from with --image-root, or fetch the missing files",
        )
    images = tuple(ImageRecord(key=key, load=(root / key).read_bytes) for key in keys)
    return ImageSource(
        name=name or _table_name(path.stem),
        describe=_describe(f"{path} ({len(rows):,} rows)", len(images), f"{text_only:,} text-only rows"),
        images=images,
    )


def _rows(path: Path) -> list[Any]:
    """The rows of a .json list, or of a .jsonl file with one row a line."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".jsonl":
            rows: Any = []
            for number, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    try:
                        rows.append(json.loads(line))
                    except json.JSONDecodeError as error:
                        raise DataError(f"cannot read {path}", why=f"line {number}: {error}") from error
        else:
            rows = json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"cannot read {path}", why=str(error)) from error
    if not isinstance(rows, list):
        raise DataError(
            f"{path} is not a list of rows",
            why=f"its top level is a {type(rows).__name__}",
            fix="give a LLaVA-style JSON",
        )
    return rows


def _tars(pattern: str, name: str | None) -> ImageSource:
    paths = _tar_paths(pattern)
    images: list[ImageRecord] = []
    others: Counter[str] = Counter()
    for path in paths:
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    suffix = PurePosixPath(member.name).suffix.lower()
                    if not member.isfile():
                        continue
                    if suffix not in IMAGE_SUFFIXES:
                        others[suffix or member.name] += 1
                        continue
                    load = partial(_read_range, path, member.offset_data, member.size)
                    images.append(ImageRecord(key=member.name, load=load))
        except (tarfile.TarError, OSError) as error:
            raise DataError(
                f"cannot read the tar {path}",
                why=str(error),
                fix="it is truncated, compressed, or no tar: fetch it again",
            ) from error
    if not images:
        raise DataError(f"no image in {len(paths)} tar files ({pattern})", why=_others(others) or "they are empty")
    first = paths[0]
    return ImageSource(
        name=name or _table_name(first.stem if len(paths) == 1 else first.resolve().parent.name),
        describe=_describe(f"{len(paths)} tar files ({pattern})", len(images), _others(others)),
        images=tuple(images),
    )


def _tar_paths(pattern: str) -> list[Path]:
    from webdataset.shardlists import expand_urls

    paths: list[str] = []
    for item in expand_urls(pattern):
        paths += sorted(glob.glob(item)) if glob.has_magic(item) and not os.path.exists(item) else [item]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing or not paths:
        raise DataError(
            f"{len(missing)} of {len(paths)} tar files are missing" if paths else f"no file matches '{pattern}'",
            why=_first(missing) if missing else "",
            fix="give local .tar files: a path, a quoted glob, or braces such as 'data/{000..003}.tar'",
        )
    return [Path(path) for path in paths]


def _read_range(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _table_name(text: str) -> str:
    """A data set's name from a file name: what is not allowed in names becomes '-'."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "images"


def _describe(what: str, count: int, left_out: str) -> str:
    return f"{what}: {count:,} images" + (f"; left out: {left_out}" if left_out else "")


def _others(others: Counter[str]) -> str:
    """What was found and is no image file, e.g. "12 other files (.txt 10, .json 2)"."""
    if not others:
        return ""
    return f"{others.total():,} other files ({_first([f'{suffix} {n:,}' for suffix, n in others.most_common()])})"


def _first(items: list[str]) -> str:
    return ", ".join(items[:SHOWN]) + (", ..." if len(items) > SHOWN else "")
