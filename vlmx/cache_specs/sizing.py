"""How many bytes does a cache take, and how many images go into one shard?"""

from __future__ import annotations

from dataclasses import dataclass

from vlmx.cache_specs.spec import DType, TokenShape

SHARD_BYTES_MAX = 256_000_000
IMAGES_PER_SHARD_MAX = 1024
REMOTE_SHARD_BYTES_MAX = 1_000_000_000  # an object store is at its best with fewer, larger files
REMOTE_IMAGES_PER_SHARD_MAX = 4096
CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16

_ITEM_BYTES: dict[DType, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1}


def image_bytes(shape: TokenShape, dtype: DType) -> int:
    """Bytes of one image's tokens, uncompressed and without their checksum."""
    return shape.num_tokens * shape.dim * _ITEM_BYTES[dtype]


def images_per_shard(bytes_per_image: int, *, local: bool = True) -> int:
    """The largest power of two, at most 1024, that keeps a shard within 256 MB; 4096 and 1 GB on an object store.

    A function of one image's size and of the kind of place alone: the bytes of a cache must not depend on how many
    images a data set has. Compressed caches have the same number of images in a shard, which is then smaller.
    """
    count = IMAGES_PER_SHARD_MAX if local else REMOTE_IMAGES_PER_SHARD_MAX
    bytes_max = SHARD_BYTES_MAX if local else REMOTE_SHARD_BYTES_MAX
    while count > 1 and count * bytes_per_image > bytes_max:
        count //= 2
    return count


def index_bytes(images_in_shard: int) -> int:
    """Bytes of the index at a shard's end: offset and length of every slot, and a checksum."""
    return INDEX_ENTRY_BYTES * images_in_shard + CRC_BYTES


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """What storing a number of images takes.

    Attributes:
        images: how many.
        bytes_per_image: tokens of one image.
        images_per_shard: slots of one shard.
        shards: files.
        total_bytes: tokens, checksums and indices; the manifest adds about 70 bytes an image.
    """

    images: int
    bytes_per_image: int
    images_per_shard: int
    shards: int
    total_bytes: int


def cache_size(images: int, shape: TokenShape, dtype: DType, *, local: bool = True) -> CacheSize:
    """Plan the size of an uncompressed cache of `images` images, all of which can be decoded."""
    bytes_per_image = image_bytes(shape, dtype)
    per_shard = images_per_shard(bytes_per_image, local=local)
    shards = -(-images // per_shard)
    return CacheSize(
        images=images,
        bytes_per_image=bytes_per_image,
        images_per_shard=per_shard,
        shards=shards,
        total_bytes=images * (bytes_per_image + CRC_BYTES) + shards * index_bytes(per_shard),
    )
