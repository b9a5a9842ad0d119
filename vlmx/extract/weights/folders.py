"""Which files make up a checkpoint that is a Hugging Face folder, or the index of one?"""

from __future__ import annotations

import json
from pathlib import Path

from vlmx.errors import WeightsError
from vlmx.extract.weights.refusals import damaged

_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def files_of(path: Path) -> tuple[Path, ...]:
    """The files that `read_checkpoint` would read: one, or the shards in the order of their names.

    Raises:
        WeightsError: a folder or an index that leads to no files.
    """
    main = main_file(path) if path.is_dir() else path
    if not is_index(main):
        return (main,)
    return tuple(main.parent / name for name in sorted(set(weight_map_of(main).values())))


def is_index(path: Path) -> bool:
    """Whether a file is JSON, as the index of a sharded checkpoint is. (safetensors begin with a length.)"""
    return head_of(path)[:64].lstrip().startswith(b"{")


def head_of(path: Path) -> bytes:
    """The first 512 bytes.

    Raises:
        WeightsError: the file is not there or cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise WeightsError(f"cannot read {path}", why=str(error), fix="check the path") from error


def main_file(folder: Path) -> Path:
    """The file of a Hugging Face folder to start from.

    Raises:
        WeightsError: there is none, or it is not clear which.
    """
    for name in (_SINGLE_FILES[0], _INDEX_FILES[0], _SINGLE_FILES[1], _INDEX_FILES[1]):
        if (folder / name).is_file():
            return folder / name
    others = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if len(others) == 1:
        return others[0]
    raise WeightsError(
        f"{folder} is no folder of weights",
        why=f"it has none of {', '.join((*_SINGLE_FILES, *_INDEX_FILES))}, and {len(others)} other .safetensors files",
        fix="give the file itself, or a model folder as the Hugging Face hub has them",
    )


def weight_map_of(index: Path) -> dict[str, str]:
    """Tensor name -> shard file, checked."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise damaged(index, error) from error
    found = content.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise WeightsError(
            f"{index} is JSON, not weights",
            why="it has no weight_map, so it is not the index of a sharded checkpoint",
            fix="get the file again, or give the weights file",
        )
    if strange := sorted({str(name) for name in found.values() if name != Path(str(name)).name}):
        raise WeightsError(f"{index} names shards outside its folder", why=", ".join(strange[:4]))
    if absent := sorted({name for name in found.values() if not (index.parent / name).is_file()}):
        raise WeightsError(
            f"{len(absent)} shards of {index} are missing", why=", ".join(absent[:4]), fix="download the whole folder"
        )
    return found
