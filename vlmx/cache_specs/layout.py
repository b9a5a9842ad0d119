"""Where does everything of a cache lie, and what do its zarr.json files say?

    <root>/<spec.name>/
      manifest.jsonl           committed shards; with commits/, the only thing that readers trust
      commits/<shard>.json     shards that were committed since the manifest was written; none when the cache is sealed
      SEALED.json              present when the last extraction came to its end
      provenance.jsonl         one line for each extraction: kernel, device, versions, command
      writer.lock, writers/    who is writing now
      partial/                 what is being written now
      tokens.zarr/             a Zarr v3 group that any Zarr v3 library opens
        zarr.json
        tokens/zarr.json       array [image, token, channel], one inner chunk for each image
        tokens/c/<shard>/0/0   one file for each shard
        scale/, offset/        arrays [channel], in 8-bit caches only
    <root>/datasets/<name>.jsonl

What is not Zarr lies outside the group, so that zarr-python finds no unknown objects in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from vlmx.cache_specs.manifest import Header
from vlmx.cache_specs.shards import BLOSC

PROVENANCE = "provenance.jsonl"
GROUP = "tokens.zarr"
ARRAY = f"{GROUP}/tokens"
SHARDS = f"{ARRAY}/c"

_DATA_TYPES = {"<f2": "float16", "<u2": "uint16", "<f4": "float32", "|i1": "int8"}
_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC = {"name": "crc32c"}


def shard_key(index: int) -> str:
    """The file of one shard."""
    return f"{SHARDS}/{index}/0/0"


def metadata(header: Header, num_rows: int) -> Iterator[tuple[str, bytes]]:
    """Every file of the Zarr group but the shards, with its content.

    Args:
        header: of the manifest.
        num_rows: length of the array's first axis.
    """
    attributes = {"vlmx": {**header.spec.to_dict(), "grid": list(header.shape.grid)}}
    yield f"{GROUP}/zarr.json", _json({"zarr_format": 3, "node_type": "group", "attributes": attributes})
    yield f"{ARRAY}/zarr.json", _tokens(header, num_rows)
    if header.quantization is not None:
        for name, values_D in (("scale", header.quantization.scale_D), ("offset", header.quantization.offset_D)):
            yield f"{GROUP}/{name}/zarr.json", _channels(len(values_D))
            yield f"{GROUP}/{name}/c/0", values_D.astype("<f4").tobytes()


def _tokens(header: Header, num_rows: int) -> bytes:
    """zarr.json of the array `tokens` [num_rows, token, channel]."""
    tokens, dim = header.shape.num_tokens, header.shape.dim
    stored = np.dtype(header.spec.storage_dtype)
    whole = {"name": "bytes"} if stored.itemsize == 1 else _LITTLE
    blosc = {"name": "blosc", "configuration": {**BLOSC, "typesize": stored.itemsize}}
    sharding = {
        "chunk_shape": [1, tokens, dim],
        "codecs": [whole, blosc, _CRC] if header.spec.codec == "blosc" else [whole, _CRC],
        "index_codecs": [_LITTLE, _CRC],
        "index_location": "end",
    }
    data_type = _DATA_TYPES[header.spec.storage_dtype]
    return _array(
        shape=[num_rows, tokens, dim],
        chunk=[header.images_per_shard, tokens, dim],
        data_type=data_type,
        codecs=[{"name": "sharding_indexed", "configuration": sharding}],
        attributes={"vlmx:logical_dtype": header.spec.dtype},
        names=["image", "token", "channel"],
    )


def _channels(dim: int) -> bytes:
    """zarr.json of the arrays `scale` and `offset` [channel]: token = offset + scale * stored number."""
    return _array(shape=[dim], chunk=[dim], data_type="float32", codecs=[_LITTLE], attributes={}, names=["channel"])


def _array(
    *,
    shape: list[int],
    chunk: list[int],
    data_type: str,
    codecs: list[dict[str, Any]],
    attributes: dict[str, Any],
    names: list[str],
) -> bytes:
    return _json(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": data_type,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0.0 if data_type.startswith("float") else 0,
            "codecs": codecs,
            "attributes": attributes,
            "dimension_names": names,
            "storage_transformers": [],
        }
    )


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
