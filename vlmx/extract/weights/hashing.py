"""Which weights are these: what is the SHA-256 that a cache records for a checkpoint?

The identity of a file is the SHA-256 of its bytes. A file that `vlmx weights convert` wrote has the identity of its
source, so that caches made from one and from the other are the same.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vlmx.errors import WeightsError
from vlmx.extract.weights.folders import files_of

if TYPE_CHECKING:
    from torch import Tensor

# Keys of the metadata of a converted file.
SOURCE_SHA256 = "vlmx.source_sha256"
SOURCE_FILE = "vlmx.source_file"
TENSORS_SHA256 = "vlmx.tensors_sha256"


def sha256_of_file(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_state(state: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, over name, dtype, shape and bytes of every tensor, in the order of the sorted names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def identity(path: Path) -> str:
    """SHA-256 (hex) that stands for the weights in a file or folder.

    For a converted file its source's; for several shards that of the sorted lines "name sha256".

    Raises:
        WeightsError: the file was changed after it was converted, or cannot be read.
    """
    shards = files_of(path)
    if len(shards) == 1:
        return _identity_of_file(shards[0])
    lines = "".join(f"{shard.name} {sha256_of_file(shard)}\n" for shard in shards)
    return hashlib.sha256(lines.encode()).hexdigest()


def _identity_of_file(path: Path) -> str:
    metadata = _metadata(path)
    if SOURCE_SHA256 not in metadata:
        try:
            return sha256_of_file(path)
        except OSError as error:
            raise WeightsError(f"cannot read {path}", why=str(error), fix="check the path") from error

    from vlmx.extract.weights.formats import read

    if sha256_of_state(read(path)) != metadata.get(TENSORS_SHA256):
        raise WeightsError(
            f"{path} was changed after vlmx had converted it",
            why=f"its tensors are not those of {metadata.get(SOURCE_FILE, 'its source')} any more",
            fix="convert the published file again, or save the changed weights without the vlmx metadata",
        )
    return metadata[SOURCE_SHA256]


def _metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for every other file."""
    import json

    with path.open("rb") as file:
        start = file.read(9)
        if len(start) < 9 or start[8:] != b"{":
            return {}
        (length,) = struct.unpack("<Q", start[:8])
        if length > 100_000_000:
            return {}
        try:
            header = json.loads(b"{" + file.read(length - 1))
        except (ValueError, RecursionError):
            return {}
    found = header.get("__metadata__")
    return found if isinstance(found, dict) else {}
