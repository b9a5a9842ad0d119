"""Where are the weights of a backbone: given, in a folder, packaged, in the Hugging Face cache, or on the net?"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from vlmx.errors import WeightsError

if TYPE_CHECKING:
    from vlmx.extract.backbones.catalogue import BackboneRow

WEIGHTS_FOLDER = "VLMX_WEIGHTS"


def find(row: BackboneRow, path: str | Path | None = None) -> Path:
    """The checkpoint of `row`: a file, or a Hugging Face folder.

    The first of: `path` if given; the folder $VLMX_WEIGHTS; the file packaged with vlmx; the folder
    ~/.cache/vlmx/weights; the cache of the Hugging Face hub; a download. In a folder, three names are looked for: the
    file as published, `<backbone>.safetensors`, and a Hugging Face folder `<backbone>`.

    Raises:
        WeightsError: there is none; the message names the file, where it is published, where to put it, and why it
            was not downloaded.
        OutOfSpaceError: the download does not fit on the disk; what has arrived is kept.
    """
    if found := find_here(row, path):
        return found

    from vlmx.extract.weights.download import download, why_not

    folder = named_folder()
    reason = why_not(row.url)
    if not reason:
        try:
            return download(row, folder or cache_folder())
        except WeightsError as error:
            reason = "; ".join(part for part in (error.what, error.why) if part)
    place = folder or cache_folder()
    raise WeightsError(
        f"the weights of {row.name} are not on this machine",
        why=f"no '{row.file}' in "
        + (f"${WEIGHTS_FOLDER} ({folder})" if folder else f"${WEIGHTS_FOLDER} (not set) or {place}")
        + f", and no download: {reason}",
        fix=(f"download {row.url}, save it as '{row.file}' in {place}" if row.url else f"put '{row.file}' in {place}")
        + ", or give the path of the file with --weights",
    )


def find_here(row: BackboneRow, path: str | Path | None = None) -> Path | None:
    """As `find`, but nothing is downloaded: None when the checkpoint is not on this machine.

    Raises:
        WeightsError: `path` is given and does not exist.
    """
    if path is not None:
        given = Path(path).expanduser()
        if not given.exists():
            raise WeightsError(f"no weights file {given}", fix="check the path")
        return given
    folder = named_folder()
    if folder and (found := _in_folder(row, folder)):
        return found
    if row.packaged and (packaged := Path(str(files("vlmx"))) / row.packaged).is_file():
        return packaged
    return _in_folder(row, cache_folder()) or in_hub_cache(row.url)


def named_folder() -> Path | None:
    """The folder that $VLMX_WEIGHTS names, or None."""
    name = os.environ.get(WEIGHTS_FOLDER, "")
    return Path(name).expanduser() if name else None


def cache_folder() -> Path:
    """Where downloads go when $VLMX_WEIGHTS is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmx" / "weights"


def _in_folder(row: BackboneRow, folder: Path) -> Path | None:
    for path in (folder / row.file, folder / f"{row.name}.safetensors"):
        if path.is_file():
            return path
    return folder / row.name if (folder / row.name).is_dir() else None


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file on the Hugging Face hub."""

    repo: str
    revision: str
    file: str


def hub_file(url: str) -> HubFile | None:
    """The repository, revision and file of a hub address, or None for addresses elsewhere."""
    found = re.fullmatch(r"https://huggingface\.co/([^/]+(?:/[^/]+)?)/resolve/([^/]+)/([^?]+)(?:\?.*)?", url)
    return HubFile(repo=found[1], revision=unquote(found[2]), file=unquote(found[3])) if found else None


def in_hub_cache(url: str) -> Path | None:
    """The file in the cache of the Hugging Face hub (HF_HOME, HF_HUB_CACHE), or None."""
    wanted = hub_file(url)
    if wanted is None:
        return None

    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(wanted.repo, wanted.file, revision=wanted.revision)
    return Path(cached) if isinstance(cached, str) else None
