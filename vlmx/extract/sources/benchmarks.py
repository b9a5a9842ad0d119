"""Which images does a published data set need, and are they all there?"""

from __future__ import annotations

import os
from pathlib import Path

from vlmx.cache_specs.ids import list_images
from vlmx.data.llava665k import missing_images
from vlmx.data.published import PublishedData
from vlmx.errors import DataError
from vlmx.extract.sources.folder import file_record
from vlmx.extract.sources.source import ImageSource, describe


def open_published(published: PublishedData, root: Path, name: str | None) -> ImageSource:
    """The images of a published data set, each once, in the order of its annotations.

    Args:
        published: the data set; its files are there (`published.require`).
        root: the data root, from which its keys start.
        name: of the image table; default: the data set's own.

    Raises:
        DataError: an annotation file is damaged or of another split, or images are missing.
    """
    examples = published.keys(root)
    keys = list(dict.fromkeys(examples))
    if not keys:
        raise DataError(f"{published.title} names no image", fix="check that its file is the one of this split")
    found = missing_images(keys, root)
    if found.missing:
        folders = [each for each in published.images if any(key.startswith(f"{each.path}/") for key in found.missing)]
        raise DataError(
            f"{len(found.missing):,} of {len(keys):,} images of {published.title} are missing",
            why=f"not below {root}: {list_images(found.missing)}",
            fix="fetch them from " + ", ".join(each.url for each in folders or published.images),
        )
    count = f"{len(examples):,} examples"
    if len(examples) != published.examples:
        count += f" (published: {published.examples:,})"
    return ImageSource(
        name=name or published.table,
        describe=describe(f"{published.title}, {count}", len(keys), ""),
        images=tuple(file_record(key, os.path.join(root, found.renamed.get(key, key))) for key in keys),
    )
