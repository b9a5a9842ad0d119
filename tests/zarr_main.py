"""Run by another Python with another zarr: reads a cache, and writes its tokens again as zarr does it.

    python zarr_main.py CACHE CODEC TARGET

Prints, as JSON, zarr's version, the SHA-256 of the tokens as it reads them, and which shards have other bytes.
"""

import hashlib
import json
import sys
from pathlib import Path

import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

cache, codec, target = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
array = zarr.open_group(cache / "tokens.zarr", mode="r")["tokens"]
tokens = array[:]
blosc = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=tokens.itemsize, blocksize=0)
again = zarr.create_array(
    target,
    shape=tokens.shape,
    chunks=array.chunks,
    shards=array.shards,
    dtype=tokens.dtype,
    compressors=[*([blosc] if codec == "blosc" else []), Crc32cCodec()],
    filters=None,
    fill_value=0,
    config={"write_empty_chunks": True},
)
slots = array.shards[0]
for start in range(0, len(tokens), slots):
    again[start : start + slots] = tokens[start : start + slots]
other = [
    path.parent.parent.name
    for path in sorted(path for path in (target / "c").rglob("*") if path.is_file())
    if path.read_bytes() != (cache / "tokens.zarr" / "tokens" / path.relative_to(target)).read_bytes()
]
digest = hashlib.sha256(tokens.tobytes()).hexdigest()
print(json.dumps({"zarr": zarr.__version__, "tokens": digest, "other_shards": other, "shards": len(tokens) / slots}))
