"""Which files does an LLM come from, and are they all there and whole? Looked at before anything is loaded.

transformers reports a damaged folder in as many ways as there are libraries below it; here each has a name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmx.errors import WeightsError

MINI = "mini"
MINI_FOLDER = Path(__file__).parent.parent / "data" / "mini" / "lm"
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
SHOWN = 3
_OTHER_INDEX = "pytorch_model.bin.index.json"
_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZER = ("tokenizer*", "vocab*", "*.model")
_POINTER = b"version https://git-lfs"


def checked_source(name_or_path: str) -> str:
    """The folder to load an LLM from; a hub id only if the hub's cache on this machine does not have all of it.

    Raises:
        WeightsError: there is no such folder, it is not that of an LLM with weights, or files are damaged or missing.
    """
    folder = MINI_FOLDER if name_or_path == MINI else Path(name_or_path).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
            raise WeightsError(
                f"there is no LLM folder {name_or_path}", fix="check the path, or give 'mini' or a hub id"
            )
        cached = _cached(name_or_path)
        if cached is None:
            return name_or_path
        folder = cached
    _require_config(folder)
    if not any(next(folder.glob(pattern), None) for pattern in _PATTERNS):
        raise WeightsError(
            f"the LLM folder {folder} has no weights",
            why="there is neither *.safetensors nor pytorch_model*.bin in it",
            fix="download the weights into it; the configuration alone is not enough",
        )
    problems = [problem for file in weight_files_in(folder) for problem in _problems(file)]
    if problems:
        raise WeightsError(
            f"the weights of the LLM in {folder} are not whole",
            why="; ".join(problems[:SHOWN]) + ("; ..." if len(problems) > SHOWN else ""),
            fix="download these files again (git lfs pull, where they are pointers)",
        )
    return str(folder)


def tensors_index(folder: Path, name: str) -> dict[str, str]:
    """Name of each tensor -> the file that it is in, as an index of weights says.

    Raises:
        WeightsError: the index is damaged.
    """
    content = _json_object(folder / name)
    files = None if content is None else content.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise WeightsError(
            f"{folder / name} is damaged", why="it is no JSON object with a weight_map", fix="download it again"
        )
    return files


def weight_files_in(folder: Path) -> list[Path]:
    """The files that hold an LLM's weights, those included that an index names and that are not there.

    Raises:
        WeightsError: an index is damaged.
    """
    if (folder / WHOLE).exists():
        return [folder / WHOLE]
    for index in (INDEX, _OTHER_INDEX):
        if (folder / index).exists():
            return [folder / file for file in sorted(set(tensors_index(folder, index).values()))]
    return sorted(next((found for pattern in _PATTERNS if (found := list(folder.glob(pattern)))), []))


def _require_config(folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise WeightsError(
            f"{folder} is not an LLM folder",
            why="it has no config.json",
            fix="give a folder that save_pretrained made",
        )
    if _json_object(folder / "config.json") is None:
        raise WeightsError(f"{folder / 'config.json'} is damaged", why="it is no JSON object", fix="download it again")


def _json_object(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _problems(file: Path) -> Iterator[str]:
    """What is wrong with a file of weights, as far as its size and its header tell."""
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        yield f"{file.name} is missing"
        return
    with file.open("rb") as opened:
        start = opened.read(len(_POINTER))
    if not start:
        yield f"{file.name} is empty"
    elif start == _POINTER:
        yield f"{file.name} is a pointer of git-lfs, not the file itself"
    elif file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            yield f"{file.name}: {error}"


def _cached(hub_id: str) -> Path | None:
    """The folder of a hub id in the hub's cache on this machine; None if a file that is needed is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    files = weight_files_in(folder)
    tokenizer = any(next(folder.glob(pattern), None) for pattern in _TOKENIZER)
    whole = tokenizer and (folder / "config.json").exists() and files and all(file.exists() for file in files)
    return folder if whole else None
