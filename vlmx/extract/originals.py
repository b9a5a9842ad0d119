"""Where are the image files now that a cache was made of?

They are found by the keys that the image tables of their data sets have, and are what they were only if their bytes
have the same content id.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmx.cache_specs.ids import ImageTable, image_id, table_names
from vlmx.cache_specs.places import Place
from vlmx.console import note, progress, warn
from vlmx.data.published import DATA_ROOT, PUBLISHED
from vlmx.errors import BackendError, DataError
from vlmx.extract.sources.opening import MINI, SourceOptions, open_again
from vlmx.extract.sources.patterns import is_remote, split_data
from vlmx.extract.sources.source import ImageRecord, ImageSource

Load = Callable[[], bytes]
SHOWN = 3


class Originals:
    """Finds images by their ids.

    Args:
        root: folder of all caches, with the image tables.
        sources: where the images may be; each is opened when the ones before it do not have everything.
    """

    def __init__(self, root: Place, sources: Iterable[ImageSource]) -> None:
        self._root = root
        self._sources = sources

    def find(self, images: Sequence[str]) -> dict[str, Load]:
        """How to read each of `images` that is there; its bytes were read once and have that id."""
        wanted = dict.fromkeys(images)
        keys = self._keys(wanted)
        named = {key for names in keys.values() for _, key in names}
        tables = table_names(self._root)
        found: dict[str, Load] = {}
        for source in self._sources:
            if len(found) == len(wanted):
                break
            found |= _those_of(wanted, [record for record in source.records() if record.key in named])
            lacking = [image for image in wanted if image not in found]
            if lacking and (source.name not in tables or any(image not in keys for image in lacking)):
                note(f"the image tables do not say which files these are: every image of {source.name} is read")
                with progress(f"read {source.name}", len(source.images), "images") as bar:
                    found |= _those_of(wanted, source.records(), tick=bar.advance)
        return found

    def whose(self, images: Sequence[str]) -> str:
        """Which data sets these are images of, for a message."""
        keys = self._keys(dict.fromkeys(images))
        by_dataset: dict[str, list[str]] = defaultdict(list)
        for image in images:
            for dataset, key in keys.get(image, [])[:1]:
                by_dataset[dataset].append(key)
        parts = [f"{len(names):,} of data set {dataset} ({_few(names)})" for dataset, names in by_dataset.items()]
        if strangers := [image[:12] for image in images if image not in keys]:
            parts.append(
                f"{len(strangers):,} of data sets without an image table below {self._root} ({_few(strangers)})"
            )
        return "; ".join(parts)

    def _keys(self, images: Mapping[str, None]) -> dict[str, list[tuple[str, str]]]:
        """Data set and key of each image, as far as an image table knows it."""
        keys: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for name in table_names(self._root):
            try:
                table = ImageTable.open(self._root, name)
            except DataError as error:
                warn(f"{error.what}: {error.why}")
                continue
            broken = table.failed()
            for key in table.keys():  # noqa: SIM118  a table is no mapping
                if key not in broken and (image := table.id_of(key)) in images:
                    keys[image].append((name, key))
        return dict(keys)


def verified(image: str, load: Load) -> bytes:
    """The bytes of an image file.

    Raises:
        DataError: it cannot be read, or is another image by now.
    """
    try:
        data = load()
    except OSError as error:
        raise DataError(f"image {image} cannot be read", why=str(error)) from error
    if image_id(data) != image:
        raise DataError(f"the file of image {image} changed while it was in use", fix="leave the files alone")
    return data


def _those_of(
    wanted: Mapping[str, None], records: Iterable[ImageRecord], tick: Callable[[], None] = lambda: None
) -> dict[str, Load]:
    found: dict[str, Load] = {}
    for record in records:
        tick()
        try:
            image = image_id(record.load())
        except OSError:  # gone since its folder was listed: another source may have it
            continue
        if image in wanted:
            found[image] = record.load
    return found


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def recipe(
    data: Sequence[str],
    *,
    image_root: Path | None = None,
    name: str | None = None,
    data_root: Path | None = None,
    image_column: str | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """What the record of an extraction says about its images, so that `reopen` finds them again, from any folder.

    Args:
        data, image_root, name, data_root, image_column, limit: as `open_sources` got them.
    """
    texts = [text for each in data for text in split_data(each)]
    return {
        "images": {
            "data": [
                text if text == MINI or text in PUBLISHED or is_remote(text) else _absolute(text) for text in texts
            ],
            "image_root": _absolute(image_root),
            "name": name,
            "data_root": _absolute(data_root or DATA_ROOT) if PUBLISHED.keys() & set(texts) else None,
            "image_column": image_column,
            "limit": limit,
        }
    }


def reopen(runs: Sequence[Mapping[str, Any]]) -> Iterator[ImageSource]:
    """The sources of all extractions into a cache, opened when they are asked for, the latest first.

    Those that cannot be opened any more are named in a warning and left out.
    """
    if not any("images" in run for run in runs):
        warn("the record of this cache does not say where its images were: an earlier version of vlmx made it")
    seen = []
    for run in reversed(runs):
        images = run.get("images")
        if images is None or images in seen:
            continue
        seen.append(images)
        options = SourceOptions(
            image_root=Path(images["image_root"]) if images["image_root"] else None,
            data_root=Path(images["data_root"] or DATA_ROOT),
            image_column=images["image_column"],
        )
        for text in images["data"]:
            try:
                source = open_again(text, images["name"], options, images["limit"])
            except (DataError, BackendError) as error:
                warn(f"{error.what}: {error.why}")
                continue
            yield source


def _absolute(path: str | Path | None) -> str | None:
    return None if path is None else os.path.abspath(path)
