"""How does one thread work behind its producer, in order and with bounded memory, so that no error is lost?"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class WorkBehind:
    """One thread that does jobs in the order in which they are given; a context manager.

    After a job that raises, no later one is begun. At the end of the block the jobs that were given are done, also when
    the block ends with an error; if a second signal interrupts that wait, only the job under way is.

    Args:
        behind: how many jobs may be under way or waiting.
    """

    def __init__(self, *, behind: int) -> None:
        assert behind > 0
        self._behind = behind
        self._jobs: deque[Future[None]] = deque()
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> WorkBehind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        finally:
            self._stopped.set()
            self._pool.shutdown(wait=True)

    def give(self, job: Callable[[], None]) -> None:
        """Have `job` done after those before it; waits while there is no room for it. Raises what they raised."""
        while len(self._jobs) >= self._behind:
            self._settle()
        self._jobs.append(self._pool.submit(self._do, job))

    def wait(self) -> None:
        """Until all that was given is done. Raises what a job raised."""
        while self._jobs:
            self._settle()

    def check(self) -> None:
        """Raise what a job raised, if one did; never waits."""
        while self._jobs and self._jobs[0].done():
            self._settle()

    def _settle(self) -> None:
        self._jobs.popleft().result()

    def _do(self, job: Callable[[], None]) -> None:
        if self._stopped.is_set():
            return
        try:
            job()
        except BaseException:
            self._stopped.set()
            raise
