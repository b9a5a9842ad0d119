"""Where is a backbone's checkpoint file, and how is it read without running anything that it contains?

A file is read by what it is, not by its name: safetensors, or a torch file (zip or the older format). Torch files are
pickles, and a pickle can run code; so they are read with torch's own `weights_only` reader, and if that refuses them
(training frameworks store logs and settings beside the tensors) with an unpickler that can only make tensors:
everything else in the file becomes an inert object.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vlmx.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

    from vlmx.extract.backbones.catalogue import BackboneRow

WEIGHTS_FOLDER = "VLMX_WEIGHTS"
_NESTED_UNDER = ("state_dict", "model", "module", "model_state")


def find(row: BackboneRow, path: str | Path | None = None) -> Path:
    """The checkpoint file of `row`: `path` if given, else in the folder $VLMX_WEIGHTS, else the one packaged with vlmx.

    Raises:
        WeightsError: there is none; the message names the file, where it is published, and where to put it.
    """
    if path is not None:
        given = Path(path).expanduser()
        if not given.is_file():
            raise WeightsError(f"no weights file {given}", fix="check the path")
        return given
    folder = os.environ.get(WEIGHTS_FOLDER, "")
    if folder and (in_folder := Path(folder).expanduser() / row.file).is_file():
        return in_folder
    if row.packaged and (packaged := Path(str(files("vlmx"))) / row.packaged).is_file():
        return packaged
    raise WeightsError(
        f"the weights of {row.name} are not on this machine",
        why=f"no '{row.file}' in " + (f"${WEIGHTS_FOLDER} ({folder})" if folder else f"${WEIGHTS_FOLDER} (not set)"),
        fix=(f"download {row.url}, save it as '{row.file}' " if row.url else f"put '{row.file}' ")
        + (f"in {folder}" if folder else f"in a folder that ${WEIGHTS_FOLDER} names")
        + ", or give the path of the file with --weights",
    )


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint file by name, on the CPU, as stored (one level of nesting removed).

    Raises:
        WeightsError: the file is no checkpoint, is damaged, or holds no tensors.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise WeightsError(f"cannot read {path}", why=str(error)) from error
    if not head:
        raise WeightsError(f"{path} is empty", fix="get the file again")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(
            f"{path} is a web page, not weights", why="the download got an error page", fix="get the file again"
        )
    if head[8:9] == b"{":  # eight bytes of length, then a JSON header
        return _read_safetensors(path)
    return _state_in(_read_torch(path), path)


def strip_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove `prefix` from all names if all of them have it; otherwise change none."""
    if all(name.startswith(prefix) for name in state):
        return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)


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


def _damaged(path: Path, error: BaseException) -> WeightsError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return WeightsError(
        f"{path} cannot be read as weights",
        why=f"{type(error).__name__}: {reason} (the file is {path.stat().st_size} bytes long)",
        fix="it is damaged, incomplete or of another kind; get it again and compare its size with the published one",
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, Tensor] = load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    if not state:
        raise WeightsError(f"{path} holds no tensors")
    return state


def _read_torch(path: Path) -> object:
    import torch

    # A memory map leaves optimizer states and logs on disk; only the zip format can be mapped.
    mmap = zipfile.is_zipfile(path)
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError:  # more than tensors inside: read the tensors alone
            return torch.load(path, map_location="cpu", weights_only=False, mmap=mmap, pickle_module=_TensorsOnly)
    except _READ_ERRORS as error:
        raise _damaged(path, error) from error


# What torch's readers and the interpreter of pickle opcodes raise on a damaged file.
_READ_ERRORS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)


def _state_in(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict in what a torch file holds: the object itself, or what it keeps under one of the usual names."""
    import torch

    candidates = [content]
    if isinstance(content, Mapping):
        candidates = [content[key] for key in _NESTED_UNDER if key in content] + candidates
    for state in candidates:
        if isinstance(state, Mapping) and state and all(isinstance(v, torch.Tensor) for v in state.values()):
            return {str(name): tensor.detach() for name, tensor in state.items()}
    raise WeightsError(
        f"{path} holds no state dict",
        why=f"neither the file nor its entries {', '.join(_NESTED_UNDER)} are tensors by name",
        fix="give a checkpoint, not a pickled model or another kind of file",
    )


class _Inert:
    """Stands for every object of a pickle that is not a tensor: takes anything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    append = add = extend


# Nothing that a training framework stores needs these: a pickle that names them was made to run code.
_HOSTILE_MODULES = {"os", "posix", "nt", "subprocess", "sys", "shutil", "socket", "runpy", "importlib", "pty", "ctypes"}
_HOSTILE_BUILTINS = {"eval", "exec", "compile", "__import__", "open", "input", "breakpoint"}


@cache
def _tensor_makers() -> dict[tuple[str, str], Any]:
    """The only names of a pickle that are resolved: what rebuilds a tensor."""
    import torch

    makers: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch", "Size"): torch.Size,
        ("torch", "device"): torch.device,
        ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
    }
    for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"):
        makers["torch._utils", name] = getattr(torch._utils, name)
    makers.update({("torch", n): v for n, v in vars(torch).items() if isinstance(v, torch.dtype)})
    return makers


class _TensorsOnlyUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        hostile = module.split(".")[0] in _HOSTILE_MODULES
        if hostile or (module in {"builtins", "__builtin__"} and name in _HOSTILE_BUILTINS):
            raise WeightsError(
                "the weights file tries to run code; nothing was run",
                why=f"its pickle asks for {module}.{name}",
                fix="do not use this file; get the weights from their publisher",
            )
        return _tensor_makers().get((module, name), _Inert)


class _TensorsOnly:
    """What torch.load needs of the `pickle` module, with an unpickler that cannot reach any other code."""

    __name__ = "pickle"
    Unpickler = _TensorsOnlyUnpickler

    @staticmethod
    def load(file: BinaryIO, **arguments: Any) -> Any:
        return _TensorsOnlyUnpickler(file, **arguments).load()
