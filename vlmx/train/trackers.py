"""Where else do metrics go than into the run's metrics.jsonl? TensorBoard, trackio, Weights & Biases; none is needed.

Their packages are imported only where they are asked for, by `log_to` or `vlmx train --log-to`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from vlmx.errors import BackendError
from vlmx.runs import RunFolder
from vlmx.train.settings import Tracker

PROJECT = "vlmx"


class Sink(Protocol):
    """Takes numbers of a step."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of `step`."""

    def close(self) -> None:
        """Write what is still held back."""


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
        self._run: Any = import_module("wandb").init(
            project=PROJECT,
            name=run.name,
            id=identity,
            resume="allow",
            allow_val_change=True,
            dir=str(run.path),
            config=run.config,
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """A run of the local project vlmx (`trackio show`); a resumed run goes on in the same one."""

    def __init__(self, run: RunFolder, start: int) -> None:
        self._trackio: Any = import_module("trackio")
        self._trackio.init(project=PROJECT, name=run.name, resume="allow", config=run.config)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._trackio.log(dict(numbers), step=step)

    def close(self) -> None:
        self._trackio.finish()


_SINKS: Mapping[Tracker, Callable[[RunFolder, int], Sink]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _WandB,
}


def require_trackers(names: Sequence[Tracker]) -> None:
    """Check that the packages are installed.

    Raises:
        BackendError: some are not; all are named.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise BackendError(
            f"metrics cannot be logged to {' and '.join(missing)}",
            why="not installed",
            fix=f"pip install {' '.join(missing)}; or leave it out, metrics.jsonl is always written",
        )


def open_trackers(names: Sequence[Tracker], run: RunFolder, *, start: int) -> list[Sink]:
    """Open each of `names` for a run that has done `start` steps.

    Raises:
        BackendError: packages are not installed.
    """
    require_trackers(names)
    return [_SINKS[name](run, start) for name in dict.fromkeys(names)]
