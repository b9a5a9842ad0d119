"""What is this file or folder, and which tensors does it hold?

Content decides, never the name. Nothing that a file contains is run (see `pickles`).
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlmx.errors import OutOfSpaceError, VlmxError, WeightsError
from vlmx.extract.weights.folders import files_of, head_of, is_index, main_file, weight_map_of
from vlmx.extract.weights.pickles import HostilePickle, TensorsOnlyUnpickler
from vlmx.extract.weights.refusals import READ_ERRORS, damaged, refuse_other_kinds
from vlmx.extract.weights.state_dicts import Checkpoint, checkpoint_of
from vlmx.extract.weights.torch_files import LEGACY_MAGIC, read_torch_legacy, read_torch_zip
from vlmx.runs import space_error

if TYPE_CHECKING:
    from torch import Tensor

MEMBER_SUFFIXES = (".pth", ".pth.tar", ".pt", ".bin", ".pkl", ".safetensors")
MAX_MEMBER_BYTES = 16 * 2**30
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint file or folder by name; see `read_checkpoint`."""
    return read_checkpoint(path).state


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file of any known format, a Hugging Face folder, or the index file of a sharded checkpoint.

    Raises:
        WeightsError: it is no checkpoint, is damaged, holds no tensors, or tries to run code.
        OutOfSpaceError: there is no room to unpack a zip.
    """
    if path.is_dir():
        path = main_file(path)
    if is_index(path):
        return _read_shards(path)
    return _read_file(path, inside_zip=False)


def _read_file(path: Path, *, inside_zip: bool) -> Checkpoint:
    head = head_of(path)
    refuse_other_kinds(path, head)
    try:
        if head.startswith(b"PK"):
            return _read_zip(path, inside_zip=inside_zip)
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER_BYTES:
            return _read_safetensors(path)
        if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
            return _read_pickle(path)
    except HostilePickle as asked:
        raise WeightsError(
            f"{path} tries to run code; nothing was run",
            why=f"its pickle asks for {asked}",
            fix="do not use this file; get the weights from their publisher",
        ) from asked
    except READ_ERRORS as error:
        raise damaged(path, error) from error
    raise damaged(path, f"it begins with {head[:12]!r}: neither safetensors, a torch file, a zip nor a pickle")


def _read_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, Tensor] = load_file(path, device="cpu")
    except SafetensorError as error:
        raise damaged(path, error) from error
    if not state:
        raise WeightsError(f"{path} holds no tensors")
    return Checkpoint(state=state, format="safetensors", files=(path,))


def _read_pickle(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        content = TensorsOnlyUnpickler(file, encoding="latin1").load()
    if content == LEGACY_MAGIC:
        content, materialise = read_torch_legacy(path)
        return checkpoint_of(path, "torch (before 1.6)", content, materialise)
    return checkpoint_of(path, "pickle of arrays", content, None)


def _read_zip(path: Path, *, inside_zip: bool) -> Checkpoint:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    names = [info.filename for info in infos]
    if any(name.endswith("/data.pkl") for name in names):
        content, materialise = read_torch_zip(path, names)
        return checkpoint_of(path, "torch", content, materialise)
    if names and all(name.endswith(".npy") for name in names):
        raise WeightsError(
            f"{path} is a NumPy .npz archive; vlmx does not read these",
            fix="get the safetensors file of these weights from the hub (vlmx list backbones --json shows its url)",
        )
    members = [i for i in infos if i.filename.endswith(MEMBER_SUFFIXES) and not i.filename.startswith("__MACOSX/")]
    if inside_zip or len(members) != 1:
        found = ", ".join(i.filename for i in members) or "none"
        raise WeightsError(
            f"{path} is a zip archive {'inside a zip archive' if inside_zip else f'with {len(members)} checkpoints'}",
            why=f"checkpoints in it: {found}",
            fix="unpack it and give the file inside",
        )
    with _unpacked(path, members[0]) as member:
        return replace(_read_file(member, inside_zip=True), files=(path,), zip_member=members[0].filename)


@contextmanager
def _unpacked(path: Path, info: zipfile.ZipInfo) -> Iterator[Path]:
    """The member as a temporary file in TMPDIR; the name inside the archive is not used for it."""
    name = info.filename
    if name.startswith(("/", "\\")) or ".." in Path(name.replace("\\", "/")).parts or ":" in name:
        raise WeightsError(f"{path} holds a file with an unsafe name", why=repr(name), fix="do not use this file")
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if info.file_size > MAX_MEMBER_BYTES:
        raise WeightsError(
            f"{path} unpacks to {info.file_size} bytes",
            why=f"vlmx unpacks at most {MAX_MEMBER_BYTES}, because a small zip can be made to fill a disk",
            fix="unpack it yourself if you trust it, and give the file inside",
        )
    if info.file_size > free:
        raise OutOfSpaceError(
            f"no room to unpack {path}",
            why=f"{info.file_size} bytes are needed, {free} are free in {tempfile.gettempdir()}",
            fix="free some space, or let TMPDIR name another folder",
        )
    with tempfile.TemporaryDirectory(prefix="vlmx-") as folder:
        member = Path(folder) / "member"
        with zipfile.ZipFile(path) as archive, archive.open(info) as source, member.open("wb") as target:
            try:
                shutil.copyfileobj(source, target, 1 << 20)
            except OSError as error:
                raise space_error(error, member) from error
        try:
            yield member
        except VlmxError as error:
            # The temporary file means nothing to the user.
            texts = [text.replace(str(member), f"{path} ({name})") for text in (error.what, error.why, error.fix)]
            raise type(error)(texts[0], why=texts[1], fix=texts[2]) from error


def _read_shards(index: Path) -> Checkpoint:
    weight_map = weight_map_of(index)
    state: dict[str, Tensor] = {}
    files = files_of(index)
    for file in files:
        shard = _read_file(file, inside_zip=False)
        state.update({name: tensor for name, tensor in shard.state.items() if weight_map.get(name) == file.name})
    if missing := [name for name in weight_map if name not in state]:
        raise WeightsError(
            f"the shards of {index} lack {len(missing)} of its tensors",
            why=", ".join(missing[:4]),
            fix="download the whole folder again",
        )
    return replace(shard, state=state, files=files)
