"""How does Ctrl-C or a batch system's SIGTERM stop an extraction between two steps instead of inside one?"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from vlmx.console import note
from vlmx.errors import VlmxError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(VlmxError):
    """The user or the system asked the command to stop; exit code 130, as shells expect."""

    exit_code = 130


class Interrupt:
    """While the block runs, the first signal only asks for a stop; the second one acts as it did before the block.

    Outside the main thread, where Python allows no handlers, nothing is changed.
    """

    def __init__(self, *, fix: str) -> None:
        self._fix = fix
        self._asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def check(self) -> None:
        """Stop here if a stop was asked for.

        Raises:
            Interrupted: it was.
        """
        if self._asked is not None:
            raise Interrupted(
                f"stopped by {self._asked.name}", why="everything that was committed is intact", fix=self._fix
            )

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = signal.Signals(number)
        self._restore()
        note(f"{self._asked.name}: stopping (once more to stop at once)")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
