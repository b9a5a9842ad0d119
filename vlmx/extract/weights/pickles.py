"""How are tensors taken out of a pickle without running anything that it asks for?

A pickle is a small program: it names functions of any module and calls them. The unpickler here resolves no name to a
function or class of another module. What rebuilds tensors and arrays becomes a record of plain numbers, every other
name becomes an inert object, and neither can be changed by the pickle. The readers turn records into tensors later.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class _Sealed:
    """Base of all that a pickle can hold on to: has no attributes that a pickle could set."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """A pickle would set attributes here; it may not."""


class _Inert(_Sealed):
    """Stands for every object that is neither a tensor nor a container: takes anything, does nothing."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    append = add = extend


class _Mapping(dict):
    """An OrderedDict of the pickle; state dicts carry attributes, which are not kept."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Maker(_Sealed):
    """Stands for a function of the pickle: calls ours."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)


class StorageType(_Sealed):
    """The element type of a storage."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class Storage(_Sealed):
    """A run of numbers in a torch file: `numel` elements of `dtype` under `key`."""

    __slots__ = ("dtype", "key", "numel")

    def __init__(self, *, dtype: torch.dtype, key: str, numel: int) -> None:
        self.dtype = dtype
        self.key = key
        self.numel = numel


class StoredTensor(_Sealed):
    """A tensor in a torch file: a view of a storage."""

    __slots__ = ("dtype", "offset", "size", "storage", "stride")

    def __init__(
        self,
        *,
        storage: Storage,
        dtype: torch.dtype,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> None:
        self.storage = storage
        self.dtype = dtype
        self.offset = offset
        self.size = size
        self.stride = stride


class _Dtype(_Sealed):
    """A NumPy dtype: its type string, e.g. "f4", and its byte order."""

    __slots__ = ("order", "spec")

    def __init__(self, spec: Any, *_: Any) -> None:
        self.spec = str(spec)
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        _version, order, subtype, names, fields = state[:5]
        self.order = str(order)
        if (subtype, names, fields) != (None, None, None):
            self.spec = "structured"


class StoredArray(_Sealed):
    """A NumPy array in a pickle. `tensor` is None if its type has no tensors; `type` says which it is."""

    __slots__ = ("tensor", "type")

    tensor: torch.Tensor | None

    def __init__(self) -> None:
        self.tensor = None
        self.type = "unknown"

    def __setstate__(self, state: Any) -> None:
        shape, dtype, fortran, raw = state[-4:]
        self.fill(raw, dtype, shape, "F" if fortran else "C")

    def fill(self, raw: Any, dtype: Any, shape: Any, order: Any) -> StoredArray:
        """Take the bytes `raw` as an array of `shape`, if they are plain numbers."""
        import numpy as np
        import torch

        self.type = dtype.spec
        # Only these: an array of Python objects is a pickle in a pickle.
        if re.fullmatch(r"[fiu][1248]|b1", dtype.spec) and dtype.order in ("<", ">", "=", "|"):
            data = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
            native = np.dtype(dtype.spec)
            if len(data) != math.prod(_numbers(shape)) * native.itemsize or order not in ("C", "F"):
                raise pickle.UnpicklingError("an array's bytes do not have its shape")
            stored = np.frombuffer(data, native.newbyteorder(dtype.order)).reshape(shape, order=order)
            self.tensor = torch.from_numpy(np.array(stored, dtype=native, order="C"))
        return self


def _numbers(values: Any) -> tuple[int, ...]:
    found = tuple(values)
    if any(type(value) is not int or value < 0 for value in found):
        raise pickle.UnpicklingError(f"sizes and strides are not counts: {found!r:.80}")
    return found


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any, dtype: Any = None) -> StoredTensor:
    import torch

    dtype = dtype or getattr(storage, "dtype", None)
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor has no storage (written by pickle.dump instead of torch.save?)")
    (start,), dims, steps = _numbers([offset]), _numbers(size), _numbers(stride)
    last = start + sum((n - 1) * step for n, step in zip(dims, steps, strict=True))
    elements = storage.numel * storage.dtype.itemsize // dtype.itemsize
    # The second condition: views that repeat elements would let a small file ask for any amount of memory.
    if math.prod(dims) and (last >= elements or math.prod(dims) > elements):
        raise pickle.UnpicklingError(f"a tensor of shape {dims} goes past its storage of {elements} elements")
    return StoredTensor(storage=storage, dtype=dtype, offset=start, size=dims, stride=steps)


def _tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any) -> StoredTensor:
    return _tensor(storage, offset, size, stride, dtype=dtype)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _array(*_: Any) -> StoredArray:
    return StoredArray()


def _array_of_buffer(raw: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> StoredArray:
    return StoredArray().fill(raw, dtype, shape, order)


def _scalar(dtype: Any, raw: Any = b"") -> StoredArray:
    return StoredArray().fill(raw, dtype, (), "C")


def _encode(text: Any, encoding: Any) -> bytes:
    """Bytes as pickles of protocol 2 write them."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes are encoded as {encoding!r:.40}")
    return bytes(text.encode("latin1"))


def _no_bytes() -> bytes:
    """An empty byte string as pickles of protocol 2 write it."""
    return b""


def _size(dims: Any = ()) -> tuple[int, ...]:
    return _numbers(dims)


def _mapping(*items: Any) -> _Mapping:
    return _Mapping(*items)


_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


@cache
def _known() -> dict[tuple[str, str], Any]:
    """The only names of a pickle that become more than inert objects."""
    import torch

    known: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): _Maker(_mapping),
        ("torch", "Size"): _Maker(_size),
        ("torch._utils", "_rebuild_tensor"): _Maker(_tensor),
        ("torch._utils", "_rebuild_tensor_v2"): _Maker(_tensor),
        ("torch._utils", "_rebuild_tensor_v3"): _Maker(_tensor_v3),
        ("torch._utils", "_rebuild_parameter"): _Maker(_parameter),
        ("torch._utils", "_rebuild_parameter_with_state"): _Maker(_parameter),
        ("torch.storage", "UntypedStorage"): StorageType(torch.uint8),
        ("numpy", "dtype"): _Maker(_Dtype),
        ("_codecs", "encode"): _Maker(_encode),
        ("__builtin__", "bytes"): _Maker(_no_bytes),
    }
    for module in ("numpy.core", "numpy._core"):
        known[f"{module}.multiarray", "_reconstruct"] = _Maker(_array)
        known[f"{module}.multiarray", "scalar"] = _Maker(_scalar)
        known[f"{module}.numeric", "_frombuffer"] = _Maker(_array_of_buffer)
    known.update({("torch", name): StorageType(getattr(torch, dtype)) for name, dtype in _STORAGES.items()})
    known.update({("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)})
    return known


# Nothing that a training framework stores needs these: a pickle that names them was made to run code. All of them
# would be inert anyway; the list only makes the message clear.
# fmt: off
_HOSTILE_MODULES = {
    "os", "posix", "nt", "subprocess", "sys", "shutil", "socket", "runpy", "importlib", "pty", "ctypes", "code",
    "codeop", "pdb", "bdb", "timeit", "webbrowser", "pickle", "_pickle", "marshal", "multiprocessing", "asyncio",
    "urllib", "http", "requests", "pip", "commands", "popen2", "cPickle", "urllib2", "httplib",
}
# fmt: on
_HOSTILE_NAMES = {
    "builtins": {"eval", "exec", "compile", "__import__", "open", "input", "breakpoint"},
    "torch": {"load"},
    "torch.serialization": {"load"},
    "torch.jit": {"load"},
    "torch.hub": {"load", "load_state_dict_from_url"},
    "io": {"open", "open_code", "FileIO"},
    "_io": {"open", "open_code", "FileIO"},
    "codecs": {"open"},
    "numpy": {"load", "fromfile", "memmap"},
}


class HostilePickle(Exception):
    """A pickle asks for something that only an attack needs; the text is its name."""


class TensorsOnlyUnpickler(pickle.Unpickler):
    """Unpickles containers, numbers, strings, and records of tensors and arrays; all else is inert.

    Raises:
        HostilePickle: from `load`, the pickle asks for something that only an attack needs.
    """

    def find_class(self, module: str, name: str) -> Any:
        names = _HOSTILE_NAMES.get("builtins" if module == "__builtin__" else module, set())
        if module.split(".")[0] in _HOSTILE_MODULES or name.split(".")[0] in names:
            raise HostilePickle(f"{module}.{name}")
        return _known().get((module, name), _Inert)
