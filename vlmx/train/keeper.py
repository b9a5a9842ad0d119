"""Which checkpoints are there at any time? The newest ones, the best ones, and never a broken one in their place.

A checkpoint is written in the background; the next one waits for it. One that cannot be written (a full disk) is
reported, and the training goes on: ending it would lose what is in memory, going on loses nothing, and the next
checkpoint may find room. The ones before it stay. Only where a training stops because it was asked to, a checkpoint
that cannot be written is an error.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from vlmx.console import warn
from vlmx.errors import OutOfSpaceError, VlmxError
from vlmx.models.vlm import VLM
from vlmx.runs import space_error
from vlmx.train.checkpoints import (
    CheckpointCorruptError,
    Record,
    commit,
    load_checkpoint,
    read_record,
    remove_checkpoint,
    saved_steps,
    start_writing,
    step_folder,
    verify,
)
from vlmx.train.parallel import World
from vlmx.train.settings import CheckpointConfig


class Keeper:
    """The checkpoints of one run; every process has one, and calls its methods at the same steps.

    Attributes:
        failed_steps: whose checkpoints could not be written.
        last_step: for which one was tried last.

    Args:
        folder: of all checkpoints of the run.
        config: how many of them are kept.
        card: of the model, as plain data.
        world: the processes that train together.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, card: Mapping[str, Any], world: World) -> None:
        self.folder = folder
        self.config = config
        self.card = card
        self.world = world
        self.failed_steps: list[int] = []
        self.last_step: int | None = None
        # Collectives of the thread must not meet those of the training, so they have a group of their own.
        self._group = dist.new_group(backend="gloo") if world.distributed else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="keeper")
        self._pending: Future[None] | None = None
        self._failure: VlmxError | None = None

    def restore(self, vlm: VLM, optimizer: torch.optim.Optimizer) -> Record | None:
        """Fill model and optimiser from the newest whole checkpoint; None if there is no checkpoint at all.

        Damaged ones that are newer are set aside as step-N.damaged, and said so.

        Raises:
            CheckpointCorruptError: there are checkpoints, and all of them are damaged; nothing is set aside.
        """
        steps = saved_steps(self.folder)
        record, damaged = None, {}
        for step in reversed(steps):
            try:
                record = self._whole(step)
                break
            except CheckpointCorruptError as error:
                damaged[step] = error
        if steps and record is None:
            raise CheckpointCorruptError(
                f"all checkpoints in {self.folder} are damaged",
                why="; ".join(problem.why for problem in damaged.values()),
                fix="restore one from a backup; or remove the run folder and train from the start",
            )
        for step, problem in damaged.items():
            if self.world.first:
                aside = step_folder(self.folder, step).with_suffix(".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                step_folder(self.folder, step).rename(aside)
                warn(f"{problem.what} ({problem.why}); it was set aside as {aside.name}, and an older one is used")
        self.world.barrier()
        if record is not None:
            load_checkpoint(self.folder, record.step, vlm, optimizer, self.world)
        return record

    def save(
        self,
        step: int,
        vlm: VLM,
        optimizer: torch.optim.Optimizer,
        *,
        losses: Sequence[float],
        accuracy: float | None = None,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Begin to write the checkpoint of `step`, as soon as the one before is written.

        Args:
            losses: of the last steps, oldest first; the best checkpoints are those of the lowest mean.
            accuracy: of held-out questions; where there is one, the best checkpoints are those of the highest.
            counts: what is counted over the whole run.
        """
        self._wait()
        self.last_step = step
        partial = self.folder / f"step-{step}.partial"
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.world.first:
            for rest in (*self.folder.glob("*.partial"), *self.folder.glob("*.removed")):
                shutil.rmtree(rest, ignore_errors=True)
        written = start_writing(partial, vlm, optimizer, self.world, self._group)
        record = Record(
            step=step, losses=tuple(losses), accuracy=accuracy, counts=counts or {}, card=self.card, files={}
        )
        self._pending = self._thread.submit(self._finish, written, partial, record)

    def close(self, *, must_be_saved: bool = False) -> None:
        """Wait for the checkpoint that is being written; nothing can be saved after this.

        Args:
            must_be_saved: the last one is needed.

        Raises:
            OutOfSpaceError, RunError: it is needed, and could not be written.
        """
        self._wait()
        self._thread.shutdown()
        if must_be_saved and self._failure is not None:
            raise self._failure

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
        self._pending = None

    def _whole(self, step: int) -> Record:
        """The record of a checkpoint whose files were compared with it; each process looks at some of them."""
        problem: CheckpointCorruptError | None = None
        record = read_record(self.folder, step)
        try:
            verify(self.folder, record, part=self.world.rank, of=self.world.size)
        except CheckpointCorruptError as error:
            problem = error
        (found,) = self.world.sums([problem is not None])
        if problem is not None:
            raise problem
        if found:
            raise CheckpointCorruptError(
                f"the checkpoint of step {step} is damaged", why="another process found it so", fix=""
            )
        return record

    def _finish(self, written: Future[Any], partial: Path, record: Record) -> None:
        """In the thread: wait until all have written, give the folder its name, remove what is not kept."""
        self._failure = None
        try:
            written.result()
            commit(partial, record, self.world, self._group)
            if self.world.first:
                self._prune()
        except (CheckpointException, OSError, OutOfSpaceError) as error:
            self._failure = self._explain(error, record.step)
            self.failed_steps.append(record.step)
            if self.world.first:
                shutil.rmtree(partial, ignore_errors=True)
                warn(f"{self._failure.what}: {self._failure.why}")

    def _explain(self, error: CheckpointException | OSError | OutOfSpaceError, step: int) -> VlmxError:
        causes: list[BaseException] = [error]
        if isinstance(error, CheckpointException):
            causes = [cause for cause, _ in error.failures.values()]
        full = any(_is_full_disk(cause, self.folder) for cause in causes)
        whole = saved_steps(self.folder)
        reason = "; ".join(dict.fromkeys(str(cause) for cause in causes))
        return (OutOfSpaceError if full else VlmxError)(
            f"the checkpoint of step {step} could not be written",
            why=f"{'no space left' if full else reason}; "
            + (f"that of step {whole[-1]} is kept" if whole else "there is none before it"),
            fix=f"free some space for {self.folder}" if full else f"make {self.folder} writable",
        )

    def _prune(self) -> None:
        steps = saved_steps(self.folder)
        kept = {*steps[-self.config.keep :], *self._best(steps)}
        for step in steps:
            if step not in kept:
                remove_checkpoint(step_folder(self.folder, step))

    def _best(self, steps: Sequence[int]) -> list[int]:
        return best_steps(self.folder, steps)[: self.config.keep_best]


def best_steps(folder: Path, steps: Sequence[int]) -> list[int]:
    """`steps`, the best first: by held-out accuracy if any of them has one, else by the mean of the last losses.

    Of equal ones the newer is the better; those whose record cannot be read are left out.
    """
    records = []
    for step in steps:
        try:
            records.append(read_record(folder, step))
        except CheckpointCorruptError:
            continue
    if any(record.accuracy is not None for record in records):
        ranked = sorted((-(r.accuracy or 0.0), -r.step) for r in records if r.accuracy is not None)
    else:
        ranked = sorted((sum(r.losses) / len(r.losses), -r.step) for r in records if r.losses)
    return [-negative for _, negative in ranked]


def _is_full_disk(cause: BaseException, folder: Path) -> bool:
    if isinstance(cause, OSError):
        cause = space_error(cause, folder)
    # PyTorch's own writer does not pass the system's error on
    return isinstance(cause, OutOfSpaceError) or "inline_container" in str(cause)
