"""How does Ctrl-C or a batch system's SIGTERM stop an extraction between two steps instead of inside one?"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from vlmx.console import note
from vlmx.errors import VlmxError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
RESUME = "give the same command again, it goes on where it stopped"


class Interrupted(VlmxError):
    """The user or the system asked the command to stop.

    Exit code 130 after Ctrl-C, as shells expect. 0 after SIGTERM, by which a batch system says that the time is over:
    the shard in hand was finished, and the command can be given again.
    """

    exit_code = 130


class Interrupt:
    """While the block runs, the first signal only asks for a stop; the second one ends the process where it is.

    That loses nothing that was committed, and it is the only way out while a file system keeps a thread waiting.

    SIGINT asks for a stop between two steps, SIGTERM for one when the shard in hand is stored. Outside the main
    thread, where Python allows no handlers, nothing is changed.
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

    @property
    def finishing(self) -> bool:
        """Whether nothing new should be begun, and what was begun should be finished."""
        return self._asked == signal.SIGTERM

    def check(self) -> None:
        """Stop here, in the middle of a shard, if Ctrl-C asked for it.

        Raises:
            Interrupted: it did.
        """
        if self._asked == signal.SIGINT:
            self.stop()

    def stop(self) -> None:
        """Stop here if a stop was asked for.

        Raises:
            Interrupted: it was.
        """
        if self._asked is None:
            return
        stopped = Interrupted(
            f"stopped by {self._asked.name}", why="everything that was committed is intact", fix=self._fix
        )
        stopped.exit_code = 0 if self.finishing else 130
        raise stopped

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None:
            os._exit(128 + number)
        self._asked = signal.Signals(number)
        after = "after the shard in hand " if self.finishing else ""
        note(f"{self._asked.name}: stopping {after}(once more to stop at once)")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
