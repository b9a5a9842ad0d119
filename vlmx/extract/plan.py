"""What is there to do: which images exist, which of them the cache lacks, and does the rest fit on the disk?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.ids import ImageEntry, ImageTable, table_key
from vlmx.cache_specs.places import Place
from vlmx.cache_specs.sizing import cache_size
from vlmx.cache_specs.spec import CacheSpec, Codec, Compute, DType, TokenShape
from vlmx.console import format_bytes, warn
from vlmx.errors import DataError, OutOfSpaceError
from vlmx.extract.inventory import SourceImage

if TYPE_CHECKING:
    from vlmx.cache_specs.writer import CacheWriter, ShardPlan
    from vlmx.extract.backbones.base import Backbone


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


def spec_of(backbone: Backbone, dtype: DType, codec: Codec = "crc32c") -> CacheSpec:
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
        compute=cast(Compute, str(backbone.dtype).removeprefix("torch.")),
        codec=codec,
    )


def plan_extraction(
    images: Sequence[SourceImage],
    spec: CacheSpec,
    shape: TokenShape,
    writer: CacheWriter,
    *,
    free_bytes: int | None,
    force: bool = False,
) -> ExtractPlan:
    """Compare what there is with what the cache has.

    Args:
        images: the inventory; images of equal content are encoded once.
        spec, shape: of the cache that `writer` writes.
        writer: knows which ids are stored, and into which shards the others go.
        free_bytes: room at the place of the cache; None where there is no limit.
        force: plan it also when it does not fit, and only warn.

    Raises:
        OutOfSpaceError: what is missing does not fit; nothing was written.
    """
    by_id: dict[str, SourceImage] = {}
    for image in images:
        by_id.setdefault(image.id, image)
    shards = tuple(writer.plan(list(by_id)))
    new = sum(len(shard.ids) for shard in shards)
    new_bytes = cache_size(new, shape, spec.dtype, local=writer.place.is_local).total_bytes
    if free_bytes is not None and new_bytes > free_bytes:
        short = no_room(spec, shape, new, free_bytes, local=writer.place.is_local)
        if not force:
            raise short
        warn(f"{short.what}: {short.why}; as much as fits is stored")
    return ExtractPlan(by_id=by_id, shards=shards, new=new, new_bytes=new_bytes)


def no_room(spec: CacheSpec, shape: TokenShape, new: int, free_bytes: int, *, local: bool) -> OutOfSpaceError:
    """The error for `new` images whose tokens do not fit, with the ways out and what they take."""
    needed = cache_size(new, shape, spec.dtype, local=local).total_bytes
    half = cache_size(new, shape, "int8", local=local).total_bytes
    smaller = "" if spec.dtype == "int8" else f"--dtype int8 ({format_bytes(half)}), "
    return OutOfSpaceError(
        f"{new:,} images do not fit on the disk",
        why=f"their tokens take {format_bytes(needed)}, {format_bytes(free_bytes)} are free",
        fix=f"free some space, choose another disk with --out, or store less: {smaller}a smaller --res; or store "
        f"nothing, `vlmx train --cache none --backbone {spec.backbone} --res {spec.resolution}`; or begin with --force",
    )


def check_table(root: Place, name: str, images: Sequence[SourceImage]) -> None:
    """See to it, before anything is encoded, that the image table can take these images.

    Raises:
        DataError: a key of the data set stood for another image before.
    """
    if not root.exists(table_key(name)):
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
