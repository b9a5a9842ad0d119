"""Which images lie in a folder and its subfolders?"""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from pathlib import Path

from vlmx.cache_specs.ids import table_name
from vlmx.errors import DataError
from vlmx.extract.sources.source import (
    IMAGE_SUFFIXES,
    ImageRecord,
    ImageSource,
    describe,
    file_stamp,
    others,
    read_file,
)


def open_folder(folder: Path, files: list[str], name: str | None) -> ImageSource:
    """The image files of a folder, sorted; keys are paths relative to it.

    Args:
        folder: the folder.
        files: what lies in it: `files_below(folder)`.
        name: of the image table.

    Raises:
        DataError: there is no image.
    """
    keys: list[str] = []
    rest: Counter[str] = Counter()
    for path in files:
        suffix = os.path.splitext(path)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            keys.append(path)
        else:
            rest[suffix or os.path.basename(path)] += 1
    if not keys:
        tars = rest[".tar"]
        raise DataError(
            f"no image in the folder {folder}",
            why=others(rest) or "it is empty",
            fix=f"for its tars, give --data '{folder}/*.tar'" if tars else "give the folder that holds the image files",
        )
    return ImageSource(
        name=name or table_name(folder.resolve().name),
        describe=describe(f"folder {folder}", len(keys), others(rest)),
        images=tuple(file_record(key, os.path.join(folder, key)) for key in sorted(keys)),
    )


def file_record(key: str, path: str) -> ImageRecord:
    """An image that is a file of its own."""
    return ImageRecord(key=key, load=partial(read_file, path), stamp=partial(file_stamp, path))


def files_below(folder: Path) -> list[str]:
    """Paths of all files, relative to the folder; linked folders are followed, loops are not."""
    paths: list[str] = []
    for here, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = [child for child in subfolders if not _is_loop(here, child)]
        below = os.path.relpath(here, folder)
        paths += files if below == "." else [f"{below}/{file}" for file in files]
    return paths


def _is_loop(here: str, child: str) -> bool:
    """Whether a subfolder is a link to a folder that it lies in."""
    target = os.path.realpath(os.path.join(here, child))
    return (os.path.realpath(here) + os.sep).startswith(target + os.sep)
