"""How much memory does a reader over a store of 300 GB take? `cache.py` runs this in a process of its own.

The store has 400,000 images of 1024 x 384 in 1,563 shards. The shard files are sparse: their indices are there, tokens
read as zeros, so checksums are not compared. The last line is the result as JSON.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import time
from pathlib import Path

import google_crc32c
import numpy as np
from cache import SHAPES, spec_of

from vlmx.cache_specs.buffers import aligned_empty
from vlmx.cache_specs.layout import shard_key
from vlmx.cache_specs.manifest import Header, Manifest, ShardRecord
from vlmx.cache_specs.places import LocalPlace
from vlmx.cache_specs.reader import TokenReader
from vlmx.cache_specs.sizing import CRC_BYTES

IMAGES, SLOTS, BATCH, BATCHES = 400_000, 256, 16, 1000


def make_sparse(place: LocalPlace) -> None:
    """A store as `CacheWriter` makes it, but for the tokens."""
    spec, shape = spec_of(1024), SHAPES[1024]
    chunk = 1024 * 384 * 2 + CRC_BYTES
    names = [hashlib.sha256(b"%d" % number).hexdigest() for number in range(IMAGES)]
    shards = {}
    for index in range(-(-IMAGES // SLOTS)):
        ids = tuple(names[index * SLOTS : (index + 1) * SLOTS])
        index_S2 = np.full((SLOTS, 2), 2**64 - 1, dtype="<u8")
        index_S2[: len(ids), 0] = np.arange(len(ids)) * chunk
        index_S2[: len(ids), 1] = chunk
        tail = index_S2.tobytes()
        tail += google_crc32c.value(tail).to_bytes(CRC_BYTES, "little")
        path = place.path / shard_key(index)
        path.parent.mkdir(parents=True)
        with open(path, "wb") as file:
            file.seek(len(ids) * chunk)
            file.write(tail)
            size = file.tell()
        shards[index] = ShardRecord(index=index, ids=ids, failed={}, bytes=size, digest="0" * 64)
    header = Header(spec=spec, shape=shape, images_per_shard=SLOTS)
    place.write("manifest.jsonl", Manifest(header=header, shards=shards).to_bytes())


def memory_mb() -> dict[str, float]:
    """Of this process: its own memory, and the page tables with which it maps files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {
        name: float(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if "kB" in rest
    }
    return {"own": kilobytes["RssAnon"] / 1e3, "page tables": kilobytes["VmPTE"] / 1e3}


def main() -> None:
    place = LocalPlace(Path(sys.argv[1]) / "sparse")
    make_sparse(place)
    gc.collect()
    before = memory_mb()
    start = time.perf_counter()
    reader = TokenReader(place, allow_partial=True, verify="never")
    seconds = time.perf_counter() - start
    gc.collect()
    opened = memory_mb()
    ids = list(reader.ids)
    out_BND = aligned_empty((BATCH, 1024, 384), np.dtype(np.float16))
    out_BND[:] = 1
    chosen = np.random.default_rng(0).integers(0, IMAGES, (BATCHES, BATCH)).tolist()
    idle = memory_mb()
    for numbers in chosen:
        reader.read([ids[k] for k in numbers], out_BND)
        assert not out_BND.any()
    used = memory_mb()
    result = {
        "opened, s": seconds,
        "ids and manifest, MB": opened["own"] - before["own"],
        "16,000 random reads in all shards: indices and files, MB": used["own"] - idle["own"],
        "page tables, MB": used["page tables"],
    }
    for name, value in result.items():
        print(f"  {name:60s} {value:8.1f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
