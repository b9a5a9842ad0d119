"""What does a killed training go on from? Checkpoints: model and optimiser after N steps, in one folder each.

Batches, learning rates and random seeds are functions of the step, so nothing else needs to be kept. A folder is
written under a temporary name and renamed when it is whole; torch.distributed.checkpoint writes `.metadata` last, and a
folder without it does not count. Any number of processes can read what any other number wrote.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from vlmx.models.vlm import VLM
from vlmx.runs import space_error, sync_folder
from vlmx.train.parallel import World

_STEP = re.compile(r"step-(\d+)")


def saved_steps(folder: Path) -> list[int]:
    """Steps after which there is a whole checkpoint, ascending."""
    matches = [(_STEP.fullmatch(child.name), child) for child in folder.glob("step-*")]
    return sorted(int(match[1]) for match, child in matches if match and (child / ".metadata").exists())


def save_checkpoint(
    folder: Path, step: int, vlm: VLM, optimizer: torch.optim.Optimizer, world: World, *, keep: int
) -> None:
    """Write the checkpoint of `step` and remove all but the newest `keep`; every process takes part.

    Raises:
        OutOfSpaceError: the disk is full; earlier checkpoints are intact.
    """
    target, partial = folder / f"step-{step}", folder / f"step-{step}.partial"
    if world.first:
        for rest in (target, *folder.glob("*.partial")):
            shutil.rmtree(rest, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    try:
        with _alone_is_meant():
            save(_state(vlm, optimizer), checkpoint_id=partial, no_dist=not world.distributed)
    except OSError as error:
        raise space_error(error, partial) from error
    world.barrier()
    if world.first:
        partial.rename(target)
        sync_folder(folder)
        for old in saved_steps(folder)[:-keep]:
            shutil.rmtree(folder / f"step-{old}")
    world.barrier()


def load_checkpoint(folder: Path, step: int, vlm: VLM, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Fill model and optimiser with what they were after `step`."""
    state = _state(vlm, optimizer)
    with _alone_is_meant():
        load(state, checkpoint_id=folder / f"step-{step}", no_dist=not world.distributed)
    set_state_dict(vlm, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


@contextmanager
def _alone_is_meant() -> Iterator[None]:
    """torch warns when there is no process group, which is what one process wants."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _state(vlm: VLM, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model, optimizer_state = get_state_dict(vlm, optimizer)
    return {"model": model, "optimizer": optimizer_state}
