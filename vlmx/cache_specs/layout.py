"""Where does everything of a cache lie, and what do its zarr.json files say?

    <root>/<spec.name>/
      manifest.jsonl           committed shards; the only thing that readers trust
      SEALED.json              present when the last extraction came to its end
      provenance.jsonl         one line for each extraction: kernel, device, versions, command
      writer.lock              held by the one writer
      tokens.zarr/             a Zarr v3 group that any Zarr v3 library opens
        zarr.json
        tokens/zarr.json       array [image, token, channel], one inner chunk for each image
        tokens/c/<shard>/0/0   one file for each shard
    <root>/datasets/<name>.jsonl

What is not Zarr lies outside the group, so that zarr-python finds no unknown objects in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmx.cache_specs.manifest import Header

LOCK = "writer.lock"
PROVENANCE = "provenance.jsonl"
PARTIAL = "shard.partial"  # the one shard that is being written
GROUP = "tokens.zarr"
ARRAY = "tokens"

_DATA_TYPES = {"<f2": "float16", "<u2": "uint16", "<f4": "float32"}


def array_folder(cache: Path) -> Path:
    """The folder of the array."""
    return cache / GROUP / ARRAY


def shards_folder(cache: Path) -> Path:
    """The folder with one folder for each shard."""
    return array_folder(cache) / "c"


def shard_path(cache: Path, index: int) -> Path:
    """The file of one shard."""
    return shards_folder(cache) / str(index) / "0" / "0"


def group_metadata(header: Header) -> str:
    """zarr.json of the group: the spec as attributes."""
    attributes = {"vlmx": {**header.spec.to_dict(), "grid": list(header.shape.grid)}}
    return _json({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def array_metadata(header: Header, num_rows: int) -> str:
    """zarr.json of the array `tokens` [num_rows, token, channel]."""
    tokens, dim = header.shape.num_tokens, header.shape.dim
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    crc = {"name": "crc32c"}
    sharding = {
        "chunk_shape": [1, tokens, dim],
        "codecs": [little, crc],
        "index_codecs": [little, crc],
        "index_location": "end",
    }
    data_type = _DATA_TYPES[header.spec.storage_dtype]
    return _json(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [num_rows, tokens, dim],
            "data_type": data_type,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [header.images_per_shard, tokens, dim]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0 if data_type == "uint16" else 0.0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {"vlmx:logical_dtype": header.spec.dtype},
            "dimension_names": ["image", "token", "channel"],
            "storage_transformers": [],
        }
    )


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1) + "\n"
