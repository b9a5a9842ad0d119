"""Where else do metrics go than into the run's metrics.jsonl? TensorBoard, trackio, Weights & Biases; none is needed.

Their packages are imported only where they are asked for, by `log_to` or `vlmx train --log-to`. What they say goes to
stderr: stdout is the command's. A tracker that fails while a training runs does not end it (see `Meter.log`).
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from vlmx.errors import BackendError
from vlmx.processes import rank_of
from vlmx.runs import RunFolder
from vlmx.train.settings import Tracker

PROJECT = "vlmx"


class Sink(Protocol):
    """Takes numbers of a step."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of `step`.

        Raises:
            OSError: it cannot.
        """

    def close(self) -> None:
        """Write what is still held back.

        Raises:
            OSError: it cannot.
        """


class _TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: RunFolder, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run.path / "tensorboard"), purge_step=start + 1)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run of the project vlmx at Weights & Biases; a resumed run goes on in the same one."""

    def __init__(self, run: RunFolder, start: int) -> None:
        name = hashlib.sha256(f"{run.path.resolve()}{run.status['started']}".encode()).hexdigest()[:12]
        identity = run.status.get("wandb", name)
        run.set_status("running", wandb=identity)
        wandb: Any = import_module("wandb")
        self._error: type[Exception] = wandb.Error
        try:
            self._run: Any = wandb.init(
                project=PROJECT,
                name=run.name,
                id=identity,
                resume="allow",
                allow_val_change=True,
                dir=str(run.path),
                config=run.config,
            )
        except wandb.Error as error:
            raise _no_wandb(error) from error

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        try:
            self._run.log(dict(numbers), step=step)
        except self._error as error:
            raise OSError(str(error)) from error

    def close(self) -> None:
        try:
            self._run.finish()
        except self._error as error:
            raise OSError(str(error)) from error


def _require_login() -> None:
    """See that Weights & Biases will take a run; on a terminal it asks for the key.

    Raises:
        BackendError: it will not.
    """
    wandb: Any = import_module("wandb")
    if wandb.setup().settings.mode in ("offline", "disabled"):
        return
    try:
        wandb.login(verify=True)
    except wandb.Error as error:
        raise _no_wandb(error) from error


def _no_wandb(error: Exception) -> BackendError:
    return BackendError(
        "metrics cannot be logged to wandb",
        why=str(error).rstrip("."),
        fix="`wandb login`, or WANDB_MODE=offline keeps them in the run folder until `wandb sync`; or leave it out,"
        " metrics.jsonl is always written",
    )


class _Trackio:
    """A run of the local project vlmx (`trackio show`); a resumed run goes on in the same one.

    trackio knows runs by their names only, and folders of the same name may be many: a run's has something after it.
    """

    def __init__(self, run: RunFolder, start: int) -> None:
        self._trackio: Any = import_module("trackio")
        name = run.status.get("trackio") if start else None
        resume = "allow" if name else "never"
        name = name or f"{run.name}-{secrets.token_hex(3)}"
        run.set_status("running", trackio=name)
        try:
            with redirect_stdout(sys.stderr):
                self._trackio.init(project=PROJECT, name=name, resume=resume, config=run.config)
        except (OSError, ValueError) as error:
            raise BackendError(
                "metrics cannot be logged to trackio",
                why=str(error),
                fix="look at its settings (TRACKIO_...); or leave it out, metrics.jsonl is always written",
            ) from error

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._trackio.log(dict(numbers), step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._trackio.finish()


_SINKS: Mapping[Tracker, Callable[[RunFolder, int], Sink]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _WandB,
}


def require_trackers(names: Sequence[Tracker]) -> None:
    """Check that the packages are installed, and that they will take a run, before anything else is done.

    Raises:
        BackendError: some are not, and all are named; or Weights & Biases knows no key, or cannot be reached.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise BackendError(
            f"metrics cannot be logged to {' and '.join(missing)}",
            why="not installed",
            fix=f"pip install {' '.join(missing)}; or leave it out, metrics.jsonl is always written",
        )
    if "wandb" in names and rank_of(os.environ).index == 0:  # the only process that reports
        _require_login()


def open_trackers(names: Sequence[Tracker], run: RunFolder, *, start: int) -> list[Sink]:
    """Open each of `names`, which `require_trackers` has seen, for a run that has done `start` steps.

    Raises:
        BackendError: one of them does not take the run.
    """
    return [_SINKS[name](run, start) for name in dict.fromkeys(names)]
