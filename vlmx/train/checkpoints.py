"""What is a checkpoint on disk, and how is it written and read?

    step-N/__R_I.distcp      what process R wrote, as torch.distributed.checkpoint lays it out
    step-N/.metadata         which part of which tensor is where
    step-N/checkpoint.json   the record: checksums of the files above, and what is known of the training after N steps

Batches, learning rates and random seeds are functions of the step, so weights, moments and the step are all that has to
be kept; frozen weights are not, they are those of the LLM. A folder is written under a temporary name and renamed when
it is whole. Any number of processes can read what any other number wrote. Reading does not notice a flipped bit by
itself, hence the checksums.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fastcrc import crc32
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from vlmx.errors import RunError
from vlmx.models.vlm import VLM
from vlmx.runs import sync_folder, write_json
from vlmx.train.parallel import World

RECORD = "checkpoint.json"
_STEP = re.compile(r"step-(\d+)")
_CHUNK = 1 << 24


class CheckpointCorruptError(RunError):
    """A checkpoint is not what was written."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a checkpoint says of itself.

    Attributes:
        step: optimiser steps done.
        losses: of the last steps, oldest first.
        accuracy: of the held-out questions, 0..1; None if there are none.
        counts: of conversations that were cut, or taught nothing, so far.
        card: the model card as plain data (`card_to_dict`).
        files: [bytes, CRC-32C] of every other file of the folder.
    """

    step: int
    losses: tuple[float, ...]
    accuracy: float | None
    counts: Mapping[str, int]
    card: Mapping[str, Any]
    files: Mapping[str, tuple[int, int]]


def saved_steps(folder: Path) -> list[int]:
    """Steps after which there is a checkpoint, ascending.

    A folder got its name when it was whole; whether it still is, `read_record` and `verify` find out.
    """
    return sorted(int(match[1]) for child in folder.glob("step-*") if (match := _STEP.fullmatch(child.name)))


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return folder / f"step-{step}"


def start_writing(
    partial: Path, vlm: VLM, optimizer: torch.optim.Optimizer, world: World, group: dist.ProcessGroup | None
) -> Future[Any]:
    """Copy the state to the CPU, and write it in a thread while the training goes on; every process takes part.

    Args:
        partial: the temporary folder; what another attempt left there is removed.
        group: a gloo group of all processes that nothing else uses; None for one process.

    Returns:
        Done when all processes have written. It raises CheckpointException, in all of them, when one has failed.
    """
    if world.first:  # the others write only after a collective that this process takes part in
        shutil.rmtree(partial, ignore_errors=True)
    _alone_is_meant()
    written = async_save(
        _state(vlm, optimizer), checkpoint_id=partial, process_group=group, no_dist=not world.distributed
    )
    assert isinstance(written, Future)  # not so only with a stager of one's own
    return written


def commit(partial: Path, record: Record, world: World, group: dist.ProcessGroup | None) -> None:
    """Take the checksums of what was written, and give the folder its name; every process takes part.

    Raises:
        OSError: files cannot be read back, or the record cannot be written.
    """
    mine = {path.name: _sum_of(path) for path in sorted(partial.glob(f"__{world.rank}_*"))}
    all_of: list[dict[str, tuple[int, int]]] = [mine] * world.size
    if world.distributed:
        dist.all_gather_object(all_of, mine, group=group)
    if not world.first:
        return
    files = {name: found for part in all_of for name, found in part.items()}
    files[".metadata"] = _sum_of(partial / ".metadata")
    fields = {**asdict(record), "files": files}
    write_json(partial / RECORD, {**fields, "crc32c": _sum_of_fields(fields)})
    target = step_folder(partial.parent, record.step)
    if target.exists():
        remove_checkpoint(target)
    partial.rename(target)
    sync_folder(target.parent)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint's folder; renamed first, as half of a checkpoint must not look like one."""
    removed = path.with_suffix(".removed")
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    shutil.rmtree(removed)


def read_record(folder: Path, step: int) -> Record:
    """The record of the checkpoint of `step`.

    Raises:
        CheckpointCorruptError: it is missing or cannot be read.
    """
    path = step_folder(folder, step) / RECORD
    try:
        fields = json.loads(path.read_text())
        if fields.pop("crc32c") != _sum_of_fields(fields):
            raise ValueError("it is not what was written")
        files = {str(name): (int(size), int(crc)) for name, (size, crc) in fields.pop("files").items()}
        return Record(**{**fields, "losses": tuple(fields["losses"])}, files=files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorruptError(
            f"the checkpoint of step {step} is damaged", why=f"{path}: {error}", fix=_FIX
        ) from error


def verify(folder: Path, record: Record, *, part: int = 0, of: int = 1) -> None:
    """Compare a checkpoint's files with its record.

    Args:
        part: look at every `of`-th file only, beginning with this one.

    Raises:
        CheckpointCorruptError: files are missing or damaged; all are named.
    """
    damaged = []
    for name in sorted(record.files)[part::of]:
        path = step_folder(folder, record.step) / name
        try:
            if _sum_of(path) != record.files[name]:
                damaged.append(f"{name} is not what was written")
        except OSError as error:
            damaged.append(f"{name}: {error.strerror}")
    if damaged:
        raise CheckpointCorruptError(
            f"the checkpoint of step {record.step} is damaged",
            why=f"{step_folder(folder, record.step)}: {'; '.join(damaged)}",
            fix=_FIX,
        )


def load_checkpoint(folder: Path, step: int, vlm: VLM, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Fill model and optimiser with what they were after `step`; every process takes part.

    The optimiser's moments are those of the checkpoint. Its settings (peak rates, decay, betas) stay as they are: they
    follow from the configuration, which may have changed.

    Raises:
        CheckpointCorruptError: what is in it does not fit the model.
    """
    settings = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
    state = _state(vlm, optimizer)
    _alone_is_meant()
    try:
        load(state, checkpoint_id=step_folder(folder, step), no_dist=not world.distributed)
    except CheckpointException as error:
        raise _does_not_fit(step, error) from error
    set_state_dict(
        vlm,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_options(vlm, strict=False),
    )
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def read_weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The trained tensors of the checkpoint of `step`, whole and by the model's names, in this one process.

    Raises:
        CheckpointCorruptError: it cannot be read.
    """
    path = step_folder(folder, step)
    tensors = FileSystemReader(path).read_metadata().state_dict_metadata
    model = {
        name.removeprefix("model."): torch.empty(found.size, dtype=found.properties.dtype)
        for name, found in tensors.items()
        if name.startswith("model.") and isinstance(found, TensorStorageMetadata)
    }
    _alone_is_meant()
    try:
        load({"model": model}, checkpoint_id=path, no_dist=True)
    except CheckpointException as error:
        raise _does_not_fit(step, error) from error
    return model


def _does_not_fit(step: int, error: CheckpointException) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        f"the checkpoint of step {step} does not fit the model",
        why="; ".join(dict.fromkeys(str(cause) or repr(cause) for cause, _ in error.failures.values())),
        fix="resume with the LLM, connector and adapters that the run was started with",
    )


_FIX = "--resume goes on from the newest whole checkpoint"


def _sum_of_fields(fields: Mapping[str, Any]) -> int:
    return crc32.iscsi(json.dumps(fields, sort_keys=True).encode())


def _sum_of(path: Path) -> tuple[int, int]:
    """Size and checksum; a large file is taken in chunks, so that memory does not grow with it."""
    size, value = 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            size, value = size + len(chunk), crc32.iscsi(chunk, value)
    return size, value


def _alone_is_meant() -> None:
    """torch warns when there is no process group, which is what one process wants; a thread of its own warns, too."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


def _options(vlm: VLM, *, strict: bool = True) -> StateDictOptions:
    frozen = any(not parameter.requires_grad for parameter in vlm.parameters())
    return StateDictOptions(ignore_frozen_params=frozen, strict=strict or not frozen)


def _state(vlm: VLM, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model, optimizer_state = get_state_dict(vlm, optimizer, options=_options(vlm))
    return {"model": model, "optimizer": optimizer_state}
