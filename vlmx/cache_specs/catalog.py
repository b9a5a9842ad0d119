"""Which caches exist, and which one does a user mean?"""

from __future__ import annotations

from pathlib import Path

from vlmx.cache_specs.manifest import MANIFEST
from vlmx.errors import CacheError
from vlmx.registry import unknown_name


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
    names = list_caches(root)
    typed = str(text)
    if typed in names:
        return root / typed
    matches = [name for name in names if typed and name.startswith(typed)]
    if len(matches) == 1:
        return root / matches[0]
    if matches:
        raise CacheError(f"'{typed}' is more than one cache", why=", ".join(matches), fix="type more of the name")
    path = Path(text)
    if (path / MANIFEST).is_file():
        return path
    if typed and path.is_dir():
        raise CacheError(
            f"{path} is not a cache",
            why=f"it has no {MANIFEST}",
            fix="give a folder that `vlmx extract` made (vlmx list caches)",
        )
    # what users type is compared without the fingerprint, which would hide the likeness; it is a prefix, so it works
    raise unknown_name("cache", typed, {_stem(name) for name in names}, listing="vlmx list caches")


def _stem(name: str) -> str:
    return name.rpartition("-")[0] or name
