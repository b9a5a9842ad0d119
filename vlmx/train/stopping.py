"""How does Ctrl-C or a batch system's SIGTERM stop a training between two steps, with a checkpoint?"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from vlmx.console import note
from vlmx.errors import VlmxError
from vlmx.train.parallel import World

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(VlmxError):
    """The training was asked to stop, saved a checkpoint, and can be gone on with.

    Exit code 0 after SIGTERM, by which a batch system or torchrun says that the time is over; 130 after Ctrl-C, as
    shells expect.
    """

    def __init__(self, step: int, total: int, run: str, exit_code: int) -> None:
        super().__init__(
            f"stopped after step {step:,} of {total:,}, which is saved",
            fix=f"vlmx train --out {run} --resume goes on with it",
        )
        self.exit_code = exit_code


class Stop:
    """While the block runs, the first signal asks for a stop after the step in hand; the second ends the process.

    Outside the main thread, where Python allows no handlers, nothing is changed.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._asked: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def exit_code(self) -> int | None:
        """The exit code to stop with, if any process was asked to; None: go on. Every process calls it after a step.

        All of them stop after the same step, whichever got the signal, and whenever.
        """
        term, interrupt = self._world.sums([self._asked == signal.SIGTERM, self._asked == signal.SIGINT])
        return 130 if interrupt else 0 if term else None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None:
            os._exit(128 + number)
        self._asked = number
        if self._world.first:
            note(f"{signal.Signals(number).name}: saving after this step (once more to stop at once)")
