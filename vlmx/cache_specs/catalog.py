"""Which caches exist, and which one does a user mean?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlmx.cache_specs.manifest import MANIFEST, READS_AT_ONCE, read_manifest
from vlmx.cache_specs.places import Place, place_of
from vlmx.errors import CacheError
from vlmx.registry import unknown_name

# what follows the backbone in a cache's name, at its end or before the + of joined ones
_FINGERPRINT = re.compile(r"-[0-9a-f]{12}(?=\+|$)")
_SIZE = re.compile(r"@\d+x\d+(?=\+|$)")


def list_caches(root: str | Path | Place) -> list[str]:
    """Names of the caches below `root`, sorted; none when it does not exist.

    Raises:
        CacheError: `root` is in an object store that cannot be read, or at a plain web server, which lists nothing.
    """
    return _caches(place_of(root), "")


def find(root: str | Path | Place, text: str | Path | Place) -> Place:
    """The cache that `text` names: a path, a url, a name below `root`, or an unambiguous prefix of one.

    Raises:
        UnknownNameError: there is no such cache; the message carries near misses.
        CacheError: the prefix is ambiguous, the path is a folder that is no cache, or an object store cannot be read.
    """
    place, typed = place_of(root), str(text).rstrip("/")
    names = _names(place)
    found = _lookup(place, names, typed)
    if found is not None:
        return found
    if typed and (_is_url(typed) or Path(typed).is_dir()):
        raise CacheError(
            f"{typed} is not a cache",
            why=f"it has no {MANIFEST}",
            fix="give a folder or a url that `vlmx extract` made (vlmx list caches)",
        )
    if "+" in typed and len(parts := find_parts(place, typed)) > 1:
        raise CacheError(
            f"'{typed}' is {len(parts)} caches",
            why="they are joined when they are read, not on disk",
            fix=f"name one of them: {', '.join(part.name for part in parts)}",
        )
    # what users type is compared without the fingerprint, which would hide the likeness; it is a prefix, so it works
    raise unknown_name("cache", typed, {stem(name) for name in names}, listing="vlmx list caches")


def find_parts(root: str | Path | Place, text: str | Path | Place) -> list[Place]:
    """The caches that `text` names, with + between them; one that has + in its own name wins.

    Raises:
        UnknownNameError, CacheError: see `find`.
    """
    place, pieces = place_of(root), [piece.strip() for piece in str(text).split("+")]
    names = _names(place)
    if len(pieces) > 1 and "" in pieces:
        raise CacheError(
            f"'{text}' lacks a cache beside a +", fix="write A+B, each a cache's name, prefix, path or url"
        )
    found = []
    while pieces:
        for count in range(len(pieces), 0, -1):
            part = _lookup(place, names, "+".join(pieces[:count]))
            if part is not None:
                break
        else:
            count, part = 1, find(place, pieces[0])  # raises: not even the shortest text names a cache
        found.append(part)
        pieces = pieces[count:]
    return found


def _lookup(root: Place, names: Sequence[str], typed: str) -> Place | None:
    if _is_url(typed):
        place = place_of(typed)
        return place if place.exists(MANIFEST) else _match(place.parent, _names(place.parent, place.name), place.name)
    if typed.startswith("timm:"):
        typed = typed.replace(":", "-", 1)  # as in the folder's name
    found = _match(root, names, typed)
    if found is None and typed and place_of(typed).exists(MANIFEST):
        return place_of(typed)
    return found


def _match(root: Place, names: Sequence[str], typed: str) -> Place | None:
    """The cache below `root` of this name, or the only one whose name begins so."""
    if typed in names:
        return root.child(typed)
    matches = [name for name in names if typed and name.startswith(typed)]
    if len(matches) > 1:
        each = ", ".join(f"{name} ({_kind(root.child(name))})" for name in matches)
        raise CacheError(f"'{typed}' is more than one cache", why=each, fix="type more of the name")
    if matches:
        return root.child(matches[0])
    unlisted = typed and _is_web(root) and root.child(typed).exists(MANIFEST)
    return root.child(typed) if unlisted else None


def _kind(cache: Place) -> str:
    """What tells caches apart whose names differ in the fingerprint only."""
    try:
        spec = read_manifest(cache).header.spec
    except CacheError:
        return "damaged"
    kind = [spec.dtype, *([spec.codec] if spec.codec != "crc32c" else [])]
    return ", ".join([*kind, *([f"computed in {spec.compute}"] if spec.compute != "float32" else []), spec.feature])


def _names(root: Place, start: str = "") -> list[str]:
    """The caches below `root` whose names begin so, as far as they can be listed."""
    return [] if _is_web(root) else _caches(root, start)


def _caches(root: Place, start: str) -> list[str]:
    names = [name for name in root.names() if name.startswith(start)]
    keys = [f"{name}/{MANIFEST}" for name in names]
    if root.is_local:
        found = [root.exists(key) for key in keys]
    else:
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            found = list(pool.map(root.exists, keys))
    return [name for name, is_cache in zip(names, found, strict=True) if is_cache]


def _is_url(typed: str) -> bool:
    return "://" in typed


def _is_web(place: Place) -> bool:
    """Whether it is a plain web server, which cannot list what it has."""
    return place.url.startswith(("http://", "https://"))


def stem(name: str) -> str:
    """A cache's name without its fingerprint, or several with + between them: "vit-b-in21k@224x224"."""
    return _FINGERPRINT.sub("", name)


def backbone_of(name: str) -> str:
    """The backbone that a cache's name begins with, or several with + between them: "vit-b-in21k"."""
    return _SIZE.sub("", stem(name))
