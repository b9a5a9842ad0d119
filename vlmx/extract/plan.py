"""What is there to do: which images exist, which of them the cache lacks, and does the rest fit on the disk?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.ids import ImageEntry, ImageTable, image_id, table_path
from vlmx.cache_specs.sizing import cache_size
from vlmx.cache_specs.spec import CacheSpec, DType, TokenShape
from vlmx.console import format_bytes, progress
from vlmx.errors import DataError, OutOfSpaceError
from vlmx.extract.ahead import work_ahead
from vlmx.extract.images import ImageRecord, ImageSource
from vlmx.extract.preprocess import source_size

if TYPE_CHECKING:
    from vlmx.cache_specs.writer import CacheWriter, ShardPlan
    from vlmx.extract.backbones.base import Backbone


@dataclass(frozen=True, kw_only=True)
class SourceImage:
    """One image of a source, read once.

    Attributes:
        key: its name in the source.
        id: content id of its bytes.
        source_wh: (width, height) in pixels that its header states; None if it states none.
        load: reads its bytes again.
    """

    key: str
    id: str
    source_wh: tuple[int, int] | None
    load: Callable[[], bytes]


@dataclass(frozen=True, kw_only=True)
class ExtractPlan:
    """What one extraction does.

    Attributes:
        by_id: one source image for every different content, in the order of first appearance.
        shards: what is to be encoded, in order; empty when the cache already has everything.
        new: how many images the shards hold.
        new_bytes: what they will take on disk.
    """

    by_id: dict[str, SourceImage]
    shards: tuple[ShardPlan, ...]
    new: int
    new_bytes: int

    @property
    def describe(self) -> str:
        """One line for the user."""
        have = len(self.by_id) - self.new
        shards = f"{len(self.shards):,} shard{'s' if len(self.shards) > 1 else ''}"
        return f"{len(self.by_id):,} different images: {have:,} already in the cache, {self.new:,} to encode" + (
            f" ({format_bytes(self.new_bytes)} in {shards})" if self.new else ""
        )


def spec_of(backbone: Backbone, dtype: DType) -> CacheSpec:
    """The identity of the cache that `backbone` fills: letterbox, padded with its mean colour, int(255 * mean)."""
    height, width = backbone.res
    red, green, blue = (int(255 * level) for level in backbone.mean)
    geometry = Geometry(
        mode="letterbox", height=height, width=width, fill=(red, green, blue), crop_pct=backbone.crop_pct
    )
    return CacheSpec(
        backbone=backbone.name,
        weights_sha256=backbone.weights_sha256,
        forward_version=backbone.forward_version,
        feature=backbone.feature,
        out_norm=backbone.out_norm,
        geometry=geometry,
        mean=backbone.mean,
        std=backbone.std,
        dtype=dtype,
        compute=cast(DType, str(backbone.dtype).removeprefix("torch.")),
    )


def take_inventory(
    source: ImageSource, pool: ThreadPoolExecutor, *, ahead: int, check: Callable[[], None]
) -> list[SourceImage]:
    """Read every image of a source once: content id and size. Pixels are not decoded.

    Args:
        source: the images.
        pool: the threads that read.
        ahead: how many images may be read before they are asked for.
        check: called after each image; may raise to stop.

    Raises:
        DataError: a file cannot be read, or two different images have the same key.
    """
    records = list(source.records())
    images: dict[str, SourceImage] = {}
    with progress(f"read {source.name}", len(records), "images") as bar:
        for image in work_ahead(pool, _identify, records, ahead=ahead):
            earlier = images.setdefault(image.key, image)
            if earlier.id != image.id:
                raise DataError(
                    f"two different images are named '{image.key}'",
                    why=source.describe,
                    fix="give them different names, or extract the tars as two data sets, each with its own --name",
                )
            check()
            bar.advance()
    return list(images.values())


def _identify(record: ImageRecord) -> SourceImage:
    data = read_bytes(record.key, record.load)
    return SourceImage(key=record.key, id=image_id(data), source_wh=source_size(data), load=record.load)


def read_bytes(key: str, load: Callable[[], bytes]) -> bytes:
    """The bytes of an image file.

    Raises:
        DataError: the file cannot be read at all; a file that can be read but not decoded is another matter.
    """
    try:
        return load()
    except OSError as error:
        raise DataError(f"cannot read the image '{key}'", why=str(error), fix="check the file and its disk") from error


def plan_extraction(
    images: Sequence[SourceImage], spec: CacheSpec, shape: TokenShape, writer: CacheWriter, *, free_bytes: int
) -> ExtractPlan:
    """Compare what there is with what the cache has.

    Args:
        images: the inventory; images of equal content are encoded once.
        spec, shape: of the cache that `writer` writes.
        writer: knows which ids are stored, and into which shards the others go.
        free_bytes: room on the disk of the cache.

    Raises:
        OutOfSpaceError: what is missing does not fit; nothing was written.
    """
    by_id: dict[str, SourceImage] = {}
    for image in images:
        by_id.setdefault(image.id, image)
    shards = tuple(writer.plan(list(by_id)))
    new = sum(len(shard.ids) for shard in shards)
    new_bytes = cache_size(new, shape, spec.dtype).total_bytes
    if new_bytes > free_bytes:
        raise OutOfSpaceError(
            f"{new:,} images do not fit on the disk",
            why=f"their tokens take {format_bytes(new_bytes)}, {format_bytes(free_bytes)} are free",
            fix="free some space, choose another disk with --out, or a smaller --res",
        )
    return ExtractPlan(by_id=by_id, shards=shards, new=new, new_bytes=new_bytes)


def check_table(root: Path, name: str, images: Sequence[SourceImage]) -> None:
    """See to it, before anything is encoded, that the image table can take these images.

    Raises:
        DataError: a key of the data set stood for another image before.
    """
    if not table_path(root, name).is_file():
        return
    table = ImageTable.open(root, name)
    undecodable = table.failed()
    changed = [
        image.key
        for image in images
        if image.key in table and image.key not in undecodable and table.id_of(image.key) != image.id
    ]
    if changed:
        raise DataError(
            f"{len(changed):,} images of data set '{name}' are not the ones that it had before",
            why=f"same key, other bytes: {', '.join(changed[:5])}",
            fix="give this data set its own name with --name",
        )


def table_entries(images: Sequence[SourceImage], failed: Mapping[str, str]) -> Iterator[ImageEntry]:
    """The lines of the image table: size of each image, or why it cannot be decoded.

    Args:
        images: the inventory.
        failed: reasons by image id.
    """
    for image in images:
        if image.id in failed:
            yield ImageEntry(key=image.key, id=image.id, error=failed[image.id])
        else:
            assert image.source_wh is not None, image.key
            width, height = image.source_wh
            yield ImageEntry(key=image.key, id=image.id, width=width, height=height)
