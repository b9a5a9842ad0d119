"""Which files does a path, a glob, or a text with braces stand for?"""

from __future__ import annotations

import fnmatch
import glob
import os

from vlmx.cache_specs.places import place_of
from vlmx.errors import DataError, UsageError
from vlmx.extract.sources.source import first


def split_data(text: str) -> list[str]:
    """The sources that one --data names: separated by commas, but for those in braces and in the name of a path."""
    if os.path.exists(text):
        return [text]
    parts = [""]
    depth = 0
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def is_remote(path: str) -> bool:
    """Whether a path is an address on a server."""
    return "://" in path


def expand(pattern: str, kind: str) -> list[str]:
    """The files that `pattern` stands for, in order: braces are written out, globs are sorted.

    Args:
        pattern: a path, an address, a glob, or braces such as "data/{000..003}.tar".
        kind: ".tar" or ".parquet", for the message.

    Raises:
        DataError: no such file, or one of them twice. Whether a file on a server is there, is not asked.
        UsageError: a brace too many or too few, or a glob on a web server.
    """
    paths: list[str] = []
    for item in _braces_written_out(pattern):
        if is_remote(item):
            paths += _matching_addresses(item)
        elif glob.has_magic(item) and not os.path.exists(item):
            paths += sorted(glob.glob(item))
        else:
            paths.append(item)
    missing = [path for path in paths if not is_remote(path) and not os.path.isfile(path)]
    name = kind.removeprefix(".")
    if missing or not paths:
        raise DataError(
            f"{len(missing)} of {len(paths)} {name} files are missing" if paths else f"no file matches '{pattern}'",
            why=first(missing) if missing else "",
            fix=f"give {kind} files: a path, a quoted glob, or braces such as 'data/{{000..003}}{kind}'",
        )
    seen: set[str] = set()
    twice = []
    for path in paths:
        real = path if is_remote(path) else os.path.realpath(path)
        if real in seen:
            twice.append(path)
        seen.add(real)
    if twice:
        raise DataError(
            f"{len(twice)} {name} files are named twice", why=first(twice), fix="let the pattern name each file once"
        )
    return paths


def _braces_written_out(pattern: str) -> list[str]:
    from webdataset.shardlists import expand_urls

    if os.path.exists(pattern):
        return [pattern]
    try:
        return list(expand_urls(pattern))
    except ValueError as error:
        raise UsageError(f"'{pattern}' has a brace too many or too few", fix="write e.g. {000..003}") from error


def _matching_addresses(address: str) -> list[str]:
    """A glob in the last part of an address in a bucket, searched; any other address as it is."""
    folder, _, name = address.rpartition("/")
    if not glob.has_magic(name.replace("?", "")):  # in an address, a "?" begins the query
        return [address]
    if address.lower().startswith("http"):
        raise UsageError(
            f"'{address}' cannot be searched",
            why="web servers do not list their files",
            fix="write the files out with braces, such as {000..003}.tar",
        )
    return [f"{folder}/{found}" for found in fnmatch.filter(place_of(folder).names(), name)]
