"""Which caches exist, and which one does a user mean?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vlmx.cache_specs.manifest import MANIFEST
from vlmx.errors import CacheError
from vlmx.registry import unknown_name

# what follows the backbone in a cache's name, at its end or before the + of joined ones
_FINGERPRINT = re.compile(r"-[0-9a-f]{12}(?=\+|$)")
_SIZE = re.compile(r"@\d+x\d+(?=\+|$)")


def list_caches(root: Path) -> list[str]:
    """Names of the caches below `root`, sorted."""
    if not root.is_dir():
        return []
    return sorted(child.name for child in root.iterdir() if (child / MANIFEST).is_file())


def find(root: Path, text: str | Path) -> Path:
    """The folder of the cache that `text` names: a path, a name below `root`, or an unambiguous prefix of one.

    Raises:
        UnknownNameError: there is no such cache; the message carries near misses.
        CacheError: the prefix is ambiguous, or the path is a folder that is no cache.
    """
    names, typed = list_caches(root), str(text)
    found = _lookup(root, names, typed)
    if found is not None:
        return found
    if typed and Path(typed).is_dir():
        raise CacheError(
            f"{typed} is not a cache",
            why=f"it has no {MANIFEST}",
            fix="give a folder that `vlmx extract` made (vlmx list caches)",
        )
    if "+" in typed and len(parts := find_parts(root, typed)) > 1:
        raise CacheError(
            f"'{typed}' is {len(parts)} caches",
            why="they are joined when they are read, not on disk",
            fix=f"name one of them: {', '.join(part.name for part in parts)}",
        )
    # what users type is compared without the fingerprint, which would hide the likeness; it is a prefix, so it works
    raise unknown_name("cache", typed, {stem(name) for name in names}, listing="vlmx list caches")


def find_parts(root: Path, text: str | Path) -> list[Path]:
    """The folders of the caches that `text` names, with + between them; one that has + in its own name wins.

    Raises:
        UnknownNameError, CacheError: see `find`.
    """
    names, pieces = list_caches(root), [piece.strip() for piece in str(text).split("+")]
    if len(pieces) > 1 and "" in pieces:
        raise CacheError(f"'{text}' lacks a cache beside a +", fix="write A+B, each a cache's name, prefix or path")
    found = []
    while pieces:
        for count in range(len(pieces), 0, -1):
            path = _lookup(root, names, "+".join(pieces[:count]))
            if path is not None:
                break
        else:
            count, path = 1, find(root, pieces[0])  # raises: not even the shortest text names a cache
        found.append(path)
        pieces = pieces[count:]
    return found


def _lookup(root: Path, names: Sequence[str], typed: str) -> Path | None:
    if typed.startswith("timm:"):
        typed = typed.replace(":", "-", 1)  # as in the folder's name
    if typed in names:
        return root / typed
    matches = [name for name in names if typed and name.startswith(typed)]
    if len(matches) == 1:
        return root / matches[0]
    if matches:
        raise CacheError(f"'{typed}' is more than one cache", why=", ".join(matches), fix="type more of the name")
    return Path(typed) if typed and (Path(typed) / MANIFEST).is_file() else None


def stem(name: str) -> str:
    """A cache's name without its fingerprint, or several with + between them: "vit-b-in21k@224x224"."""
    return _FINGERPRINT.sub("", name)


def backbone_of(name: str) -> str:
    """The backbone that a cache's name begins with, or several with + between them: "vit-b-in21k"."""
    return _SIZE.sub("", stem(name))
