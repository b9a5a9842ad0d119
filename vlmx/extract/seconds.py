"""Where did the time of an extraction go?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

Work = Literal["decode", "encode", "write"]
Wait = Literal["wait_images", "wait_writer"]


@dataclass(kw_only=True)
class Seconds:
    """Time of an extraction, from the first image that is prepared to the last shard that is stored.

    Attributes:
        lanes: passes of the encoder that run side by side.
        threads: threads that read and decode.
        total: from beginning to end.
        decode: reading, decoding and letterboxing, summed over the threads.
        encode: in the encoder, summed over the lanes.
        write: checksums and writing, on a thread of its own.
        wait_images: lanes times seconds that had nothing to do because no image was ready.
        wait_writer: the same, because the shard before was still being written.
    """

    lanes: int = 1
    threads: int = 1
    total: float = 0.0
    decode: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    wait_images: float = 0.0
    wait_writer: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, what: Work | Wait, seconds: float) -> None:
        """From any thread."""
        with self._lock:
            setattr(self, what, getattr(self, what) + seconds)

    @contextmanager
    def working(self, what: Work) -> Iterator[None]:
        """Add the time of the block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(what, time.perf_counter() - started)

    @contextmanager
    def waiting(self, what: Wait, idle_lanes: Callable[[], float]) -> Iterator[None]:
        """Add the time of the block, as far as lanes were idle meanwhile.

        Args:
            what: why nothing can be given to the lanes.
            idle_lanes: how many have nothing to do now; asked at the beginning and at the end.
        """
        idle = idle_lanes()
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(what, (time.perf_counter() - started) * (idle + idle_lanes()) / 2)

    def describe(self, images: int) -> str:
        """One line for the user: what the encoder did with its time, and how busy those beside it were."""
        total = max(self.total, 1e-9)
        lanes = f" on {self.lanes} threads" if self.lanes > 1 else ""
        known = self.encode + self.wait_images + self.wait_writer
        rest = max(0.0, self.total * self.lanes - known)  # putting tokens in place, starting and ending
        return (
            f"time {self.total:.1f} s, {images / total:,.1f} images/s; encoder{lanes} busy "
            f"{self._share(self.encode, self.lanes)}, waiting for images {self._share(self.wait_images, self.lanes)}, "
            f"for the writer {self._share(self.wait_writer, self.lanes)}, other steps {self._share(rest, self.lanes)}; "
            f"beside it decoding "
            f"{self._share(self.decode, self.threads)} of {self.threads} thread{'s' if self.threads > 1 else ''}, "
            f"writing {self._share(self.write, 1)}"
        )

    def _share(self, seconds: float, workers: int) -> str:
        return f"{100 * seconds / max(self.total * workers, 1e-9):.0f} %"
