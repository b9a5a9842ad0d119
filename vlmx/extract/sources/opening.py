"""Which images does --data stand for: the embedded study, published data sets, folders, JSON lists, tars, parquet?"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from vlmx.data.published import DATA_ROOT, PUBLISHED, require
from vlmx.errors import DataError, UsageError
from vlmx.extract.sources.folder import files_below, open_folder
from vlmx.extract.sources.patterns import expand, is_remote, split_data
from vlmx.extract.sources.source import IMAGE_SUFFIXES, ImageSource
from vlmx.registry import unknown_name

MINI = "mini"
Kind = Literal["mini", "published", "folder", "json", "tars", "parquet"]
KINDS = (
    "'mini', a published data set ("
    + ", ".join(PUBLISHED)
    + "), a folder of images, a LLaVA-style .json or .jsonl, webdataset .tar files, or .parquet files"
)


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What users say about their data.

    Attributes:
        image_root: the folder that the image paths of a list start from; None: the folder of the list.
        data_root: the folder below which the files of published data sets lie.
        image_column: the column of parquet files that holds the images; None: found by name or type.
    """

    image_root: Path | None = None
    data_root: Path = Path(DATA_ROOT)
    image_column: str | None = None


def open_sources(
    data: Sequence[str],
    image_root: Path | None = None,
    name: str | None = None,
    *,
    data_root: Path | None = None,
    image_column: str | None = None,
    limit: int | None = None,
) -> list[ImageSource]:
    """Find the images that `data` stands for; nothing is decoded yet.

    Args:
        data: each "mini" (the embedded study), the name of a published data set, a folder (with its subfolders), a
            LLaVA-style .json, .jsonl or .parquet file that names images, webdataset .tar files (a path, a glob, an
            address, or braces such as "data/{000..003}.tar"), or .parquet files (the same, or a folder of them).
            Several may stand in one text, separated by commas.
        image_root: the folder that the image paths of a list start from; default: the folder of the list.
        name: name of the data set, when there is one only; default: its own, or taken from the path.
        data_root: the folder below which the files of published data sets lie; default: "data".
        image_column: the column of parquet files that holds the images.
        limit: how many images of each are taken at most.

    Raises:
        DataError: there is no such file or folder, it holds no image, it is damaged, or images are missing.
        UsageError: an option that fits none of the data, two data sets of one name, or a name that is no file name.
        BackendError: a library that this kind of data needs is not installed.
    """
    texts = [text for each in data for text in split_data(each)]
    if not texts or "" in texts:
        raise UsageError("--data has an empty part", why=f"it is {', '.join(map(repr, data))}", fix="name some images")
    if name is not None and len(texts) > 1:
        raise UsageError(
            f"--name cannot be the name of {len(texts)} data sets",
            why=", ".join(texts),
            fix="leave it out, or extract them one after the other",
        )
    if name is not None and (not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name) or name.endswith(".stamps")):
        raise UsageError(
            f"'{name}' cannot name a data set", fix="use letters, digits and . _ + -, and not .stamps at the end"
        )
    options = SourceOptions(image_root=image_root, data_root=data_root or Path(DATA_ROOT), image_column=image_column)
    require([PUBLISHED[text] for text in texts if text in PUBLISHED], options.data_root)
    opened = [_open(text, name, options) for text in texts]
    _refuse_unused({kind for kind, _ in opened}, texts, image_root, data_root, image_column)
    sources = [source if limit is None else source.first(limit) for _, source in opened]
    _refuse_equal_names(texts, sources)
    return sources


def open_source(data: str, image_root: Path | None = None, name: str | None = None) -> ImageSource:
    """`open_sources` of one."""
    (source,) = open_sources([data], image_root, name)
    return source


def open_again(data: str, name: str | None, options: SourceOptions, limit: int | None) -> ImageSource:
    """One of the sources that `open_sources` opened together once, where not all options need to be for this one.

    Raises:
        DataError, BackendError: as `open_sources`.
    """
    if data in PUBLISHED:
        require([PUBLISHED[data]], options.data_root)
    _, source = _open(data, name, options)
    return source if limit is None else source.first(limit)


def _open(data: str, name: str | None, options: SourceOptions) -> tuple[Kind, ImageSource]:
    """One source and its kind. A name goes before a folder of the same name, which is given as "./gqa" or "gqa/"."""
    path = Path(data)
    suffix = Path(urlsplit(data).path if is_remote(data) else data).suffix.lower()
    if data == MINI:
        from vlmx.extract.sources.mini import open_mini

        return "mini", open_mini(name)
    if data in PUBLISHED:
        from vlmx.extract.sources.benchmarks import open_published

        return "published", open_published(PUBLISHED[data], options.data_root, name)
    if path.is_dir():
        files = files_below(path)
        suffixes = {os.path.splitext(file)[1].lower() for file in files}
        if ".parquet" not in suffixes or suffixes & IMAGE_SUFFIXES:
            return "folder", open_folder(path, files, name)
        found = sorted(str(path / file) for file in files if file.lower().endswith(".parquet"))
        return "parquet", _parquet(found, f"folder {data}", name or _folder_name(path), options)
    if path.is_file() and (suffix in (".json", ".jsonl") or (suffix == ".parquet" and _is_list(path, options))):
        from vlmx.extract.sources.json_lists import open_json

        return "json", open_json(path, options.image_root or path.parent, name)
    if suffix == ".tar":
        from vlmx.extract.sources.tars import open_tars

        return "tars", open_tars(data, name)
    if suffix == ".parquet" and not is_remote(data):
        return "parquet", _parquet(expand(data, ".parquet"), data, name, options)
    if is_remote(data):
        why = "of files on a server, only .tar files can be read"
    elif path.exists():
        why = "it is neither a folder, nor a .json, .jsonl, .tar or .parquet file"
    else:
        why = f"{path.absolute()} does not exist"
        if re.fullmatch(r"[\w+-]+", data):
            why += f"; {unknown_name('data set', data, [MINI, *PUBLISHED]).fix}"
    raise DataError(f"cannot read images from '{data}'", why=why, fix=f"--data takes {KINDS}")


def _is_list(path: Path, options: SourceOptions) -> bool:
    from vlmx.extract.sources.parquet import is_list_of_conversations

    return options.image_column is None and is_list_of_conversations(str(path))


def _parquet(paths: list[str], what: str, name: str | None, options: SourceOptions) -> ImageSource:
    from vlmx.extract.sources.parquet import open_parquet

    return open_parquet(paths, what, name, options.image_column)


def _folder_name(folder: Path) -> str:
    from vlmx.cache_specs.ids import table_name

    return table_name(folder.resolve().name)


def _refuse_unused(
    kinds: set[Kind], texts: list[str], image_root: Path | None, data_root: Path | None, image_column: str | None
) -> None:
    """An option that changed nothing was meant otherwise."""
    for option, given, kind, things in (
        ("--image-root", image_root, "json", "a JSON, or a .parquet of conversations"),
        ("--data-root", data_root, "published", f"published data sets ({', '.join(PUBLISHED)})"),
        ("--image-column", image_column, "parquet", "parquet files"),
    ):
        if given is not None and kind not in kinds:
            raise UsageError(f"{option} belongs to {things}", why=f"--data is {', '.join(texts)}", fix=f"drop {option}")


def _refuse_equal_names(texts: list[str], sources: list[ImageSource]) -> None:
    first: dict[str, str] = {}
    for text, source in zip(texts, sources, strict=True):
        if source.name in first:
            raise UsageError(
                f"two data sets would be called '{source.name}'",
                why=f"{first[source.name]} and {text}",
                fix="extract them one after the other, each with its own --name; no image is encoded twice",
            )
        first[source.name] = text
