"""How does one bar show what all processes of an extraction do, and no bar what each does?"""

from __future__ import annotations

import time
from types import TracebackType

from vlmx.cache_specs.sizing import image_bytes
from vlmx.cache_specs.writer import CacheWriter
from vlmx.console import Progress, format_bytes

REPORT_EVERY_S = 2.0


class JobBar:
    """Images that are encoded, of all that were missing when this process came; a context manager.

    Every process keeps one, to tell the others what it has done; all but one are silent (`console.be_quiet`).

    Args:
        writer: tells and learns what the processes have done.
        total: images that are missing.
        alone: whether there is no other process to ask.
    """

    def __init__(self, writer: CacheWriter, total: int, *, alone: bool) -> None:
        self._writer = writer
        self._alone = alone
        self._image_bytes = image_bytes(writer.shape, writer.spec.dtype)
        self._own = 0
        self._others_before = 0 if alone else writer.report(0)
        self._due = 0.0
        self._bar = Progress(f"encode {writer.spec.backbone}", total, "images")

    def advance(self, count: int) -> None:
        """This process has encoded `count` more."""
        self._own += count
        self.look()

    def look(self) -> None:
        """Show what all have done, if it was not shown just now."""
        if self._alone:
            return self._show(self._own)
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + REPORT_EVERY_S
            self._show(self._writer.report(self._own) - self._others_before)

    def _show(self, done: int) -> None:
        # a process that died had told of images that another one now encodes again
        done = min(max(done, self._bar.done), self._bar.total)
        self._bar.advance(done - self._bar.done, tokens=format_bytes(done * self._image_bytes))

    def __enter__(self) -> JobBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and not self._writer.missing:
            self._show(self._bar.total)
        self._bar.close()
