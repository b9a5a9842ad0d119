"""How does a published checkpoint become a safetensors file with the same identity?"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from vlmx.errors import OutOfSpaceError, UsageError, WeightsError
from vlmx.extract.weights.formats import MEMBER_SUFFIXES
from vlmx.extract.weights.hashing import SOURCE_FILE, SOURCE_SHA256, TENSORS_SHA256, identity, sha256_of_state
from vlmx.runs import space_error, sync_folder

if TYPE_CHECKING:
    from torch import Tensor

    from vlmx.extract.weights.state_dicts import Checkpoint


def default_target(source: Path) -> Path:
    """Beside the source, its name with the ending .safetensors."""
    name = source.name
    for suffix in (*sorted(MEMBER_SUFFIXES, key=len, reverse=True), ".zip"):
        if name.endswith(suffix):
            name = name.removesuffix(suffix)
            break
    return source.with_name(f"{name}.safetensors")


def check_target(source: Path, target: Path, *, force: bool) -> None:
    """Refuse to overwrite.

    Raises:
        UsageError: the target exists and `force` is false, is a folder, or is the source itself.
    """
    if target.is_dir():
        raise UsageError(f"{target} is a folder", fix="give the name of the file to write")
    if not target.exists():
        return
    if target.samefile(source):
        raise UsageError(f"{source} would be overwritten by itself", fix="give another name for the file to write")
    if not force:
        raise UsageError(f"{target} exists", fix="give another name, or --force to replace it")


def convert(source: Path, checkpoint: Checkpoint, target: Path) -> None:
    """Write the tensors of `checkpoint`, which was read from `source`, to `target`: wholly or not at all.

    Raises:
        WeightsError: a tensor has a type that safetensors does not have, or the target cannot be written.
        OutOfSpaceError: the disk is full; an older target is intact.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    state = _apart(checkpoint.state)
    tensors_sha256 = sha256_of_state(state)
    metadata = {
        "format": "pt",
        SOURCE_SHA256: identity(source),
        SOURCE_FILE: source.name,
        TENSORS_SHA256: tensors_sha256,
    }
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        if (free := shutil.disk_usage(target.parent).free) <= size:
            raise OutOfSpaceError(
                f"no room for {target}",
                why=f"{size} bytes are needed, {free} are free",
                fix="free some space, or write to another disk",
            )
        save_file(state, temporary, metadata=metadata)
        if sha256_of_state(load_file(temporary)) != tensors_sha256:
            raise WeightsError(f"{target} could not be written", why="the tensors read back are other ones")
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except (SafetensorError, OSError, KeyError) as error:
        # safetensors carries the system's error as text.
        code = re.search(r"os error (\d+)", str(error))
        system = OSError(int(code[1]), str(error)) if code else error
        if isinstance(system, OSError) and (full := space_error(system, target)) is not system:
            raise full from error
        raise WeightsError(f"{target} could not be written", why=str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each contiguous and in memory of its own, as safetensors wants them."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        alone = storage.data_ptr() not in seen and storage.nbytes() == tensor.numel() * tensor.element_size()
        seen.add(storage.data_ptr())
        apart[name] = tensor if alone and tensor.is_contiguous() else tensor.contiguous().clone()
    return apart
