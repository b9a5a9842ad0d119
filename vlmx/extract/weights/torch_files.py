"""What does a torch file hold, whatever else a training framework put beside the tensors?

torch's own `weights_only` reader comes first. If it refuses the file (logs, settings and optimizers of other packages
are in it), the tensors are taken out with `TensorsOnlyUnpickler`; torch's general reader is never used, because parts
of it act on what a pickle says even if the unpickler does not (TorchScript archives, source patches, tar archives).
File layouts: the writers in torch/serialization.py.
"""

from __future__ import annotations

import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vlmx.errors import WeightsError
from vlmx.extract.weights.pickles import Storage, StorageType, StoredTensor, TensorsOnlyUnpickler

if TYPE_CHECKING:
    from torch import Tensor

# The first object of every file of torch's older format.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

# Turns a record of the pickle into the tensor that it describes.
Materialise = Callable[[StoredTensor], "Tensor"]


def read_torch_zip(path: Path, names: list[str]) -> tuple[object, Materialise | None]:
    """Content of a torch file of the zip format, whose members are `names`; tensors stay on disk until they are used.

    Returns:
        The content; what makes tensors of its `StoredTensor` records, or None if it holds tensors already.

    Raises:
        WeightsError: it is a TorchScript archive, or its pickle tries to run code.
        Exception: one of `refusals.READ_ERRORS`, if it is damaged.
    """
    import torch

    if any(name.endswith("/constants.pkl") for name in names):
        raise WeightsError(
            f"{path} is a TorchScript program, not weights",
            why="loading it could run what is in it",
            fix="get the checkpoint that it was made from",
        )
    try:
        # torch.load goes by the name if it ends so, and then only takes safetensors.
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True), None
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True), None
    except pickle.UnpicklingError:
        return _tensors_of_zip(path)


def read_torch_legacy(path: Path) -> tuple[object, Materialise | None]:
    """As `read_torch_zip`, for torch's older format."""
    import torch

    with path.open("rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True), None
        except pickle.UnpicklingError:
            return _tensors_of_legacy(path)


class _Unpickler(TensorsOnlyUnpickler):
    """Knows how torch's pickles refer to storages: (word, type, key, device, numel[, None])."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, Storage] = {}

    def persistent_load(self, saved_id: Any) -> Storage:
        if not isinstance(saved_id, tuple) or len(saved_id) not in (5, 6) or saved_id[0] != "storage":
            raise pickle.UnpicklingError(f"a reference is not to a storage: {saved_id!r:.80}")
        _, kind, key, _device, numel, *view = saved_id
        if view not in ([], [None]):
            raise pickle.UnpicklingError("a storage is a view of another one, as torch before 0.4 wrote them")
        if not isinstance(kind, StorageType) or type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError("a storage has no type or no size")
        return self.storages.setdefault(str(key), Storage(dtype=kind.dtype, key=str(key), numel=numel))


def _tensors_of_zip(path: Path) -> tuple[object, Materialise]:
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise zipfile.BadZipFile(f"{len(pickles)} members are called data.pkl")
        prefix = pickles[0].removesuffix("data.pkl")
        members = {info.filename: info for info in archive.infolist()}
        if f"{prefix}byteorder" in members and archive.read(f"{prefix}byteorder") != b"little":
            raise zipfile.BadZipFile("it was written on a machine of another byte order")
        with archive.open(pickles[0]) as stream:
            content = _Unpickler(stream).load()  # type: ignore[arg-type]
        # A private map: optimizer states and logs stay on disk, and nobody can write the file through a tensor.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def place(storage: Storage) -> tuple[int, int]:
        info = members[f"{prefix}data/{storage.key}"]
        if info.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile("its tensors are compressed")
        name_length, extra_length = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
        return info.header_offset + 30 + name_length + extra_length, info.file_size

    return content, _materialiser(data, place)


def _tensors_of_legacy(path: Path) -> tuple[object, Materialise]:
    with path.open("rb") as file:
        _magic, _protocol, system = (TensorsOnlyUnpickler(file).load() for _ in range(3))
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise pickle.UnpicklingError("it was written on a machine of another byte order")
        unpickler = _Unpickler(file)
        content = unpickler.load()
        places: dict[str, tuple[int, int]] = {}
        for key in TensorsOnlyUnpickler(file).load():
            storage = unpickler.storages[str(key)]
            (numel,) = struct.unpack("<q", file.read(8))
            places[storage.key] = file.tell(), numel * storage.dtype.itemsize
            file.seek(numel * storage.dtype.itemsize, 1)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return content, _materialiser(data, lambda storage: places[storage.key])


def _materialiser(data: mmap.mmap, place: Callable[[Storage], tuple[int, int]]) -> Materialise:
    """Views of `data`; `place` gives the first byte and the number of bytes of a whole storage."""

    def materialise(record: StoredTensor) -> Tensor:
        import torch

        storage = record.storage
        if storage.numel == 0:
            return torch.empty(record.size, dtype=record.dtype)
        begin, length = place(storage)
        wanted = storage.numel * storage.dtype.itemsize
        if wanted > length or begin + length > len(data):
            raise EOFError(f"storage {storage.key} ends early")
        flat = torch.frombuffer(data, dtype=record.dtype, count=wanted // record.dtype.itemsize, offset=begin)
        return flat.as_strided(record.size, record.stride, record.offset)

    return materialise
