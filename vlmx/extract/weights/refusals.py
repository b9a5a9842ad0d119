"""What is a file that is no checkpoint, and what should its owner do?"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

from vlmx.errors import WeightsError

# What torch's readers, ours and the interpreter of pickle opcodes raise on a damaged file.
READ_ERRORS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    AssertionError,
)


def damaged(path: Path, error: BaseException | str) -> WeightsError:
    """The error for a file that cannot be read."""
    if isinstance(error, BaseException):
        reason = (str(error) or type(error).__name__).splitlines()[0]
        error = f"{type(error).__name__}: {reason}"
    return WeightsError(
        f"{path} cannot be read as weights",
        why=f"{error} (the file is {path.stat().st_size} bytes long)",
        fix="it is damaged, incomplete or of another kind; get it again and compare its size with the published one",
    )


# (where, the bytes there, what the file is, what to do)
_OTHER_KINDS: list[tuple[int, bytes, str, str]] = [
    (0, b"version https://git-lfs", "a git-lfs pointer, not the weights themselves", "run `git lfs pull` there"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it and give the file inside"),
    (0, b"BZh", "a bzip2 archive", "unpack it and give the file inside"),
    (0, b"\xfd7zXZ\x00", "an xz archive", "unpack it and give the file inside"),
    (0, b"\x28\xb5\x2f\xfd", "a zstandard archive", "unpack it and give the file inside"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it and give the file inside"),
    (0, b"Rar!", "a rar archive", "unpack it and give the file inside"),
    (257, b"ustar", "a tar archive", "unpack it and give the file inside (torch 0.1 wrote such files: save it again)"),
    (0, b"\x93NUMPY", "a NumPy array, not a checkpoint", "get the safetensors file of these weights from the hub"),
    (0, b"\x89HDF", "an HDF5 file, not a PyTorch checkpoint", "get the safetensors file of these weights from the hub"),
]


def refuse_other_kinds(path: Path, head: bytes) -> None:
    if not head:
        raise WeightsError(f"{path} is empty", fix="get the file again")
    if is_web_page(head):
        raise WeightsError(
            f"{path} is a web page, not weights", why="the download got an error page", fix="get the file again"
        )
    for where, magic, kind, fix in _OTHER_KINDS:
        if head[where : where + len(magic)] == magic:
            raise WeightsError(f"{path} is {kind}", fix=fix)


def is_web_page(head: bytes) -> bool:
    """Whether a file that begins so is HTML or XML."""
    return head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml"))
