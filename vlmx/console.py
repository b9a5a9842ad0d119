"""What a user sees while a command works: notes, progress, tables. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vlmx.errors import VlmxError

LINE_EVERY_S = 15.0
_NUMBERS = re.compile(r"[\d.,+\-x\[\] †%]*")
_NAME_LEAST, _TEXT_LEAST = 32, 16  # letters that a column keeps on a narrow terminal
_UNLIMITED = 10_000
_quiet = False


def be_quiet() -> None:
    """From here on this process shows only warnings and errors: another one of the same command shows the rest."""
    global _quiet
    _quiet = True


def note(message: str) -> None:
    """One line about what happens now (stderr)."""
    if not _quiet:
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """One line about something that the user should know (stderr)."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def show_error(error: VlmxError) -> None:
    """What, why and fix of an error, a line each (stderr)."""
    for label, text in (("error", error.what), ("why", error.why), ("fix", error.fix)):
        if text:
            print(f"{label:<6} {text}", file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """Print a table on stdout; columns of numbers are right-aligned.

    Text is folded where a terminal is narrow, numbers never are cut: what is wider than the terminal runs on in its
    next line. Where nobody looks, each row is one line.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    grid = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    least = 0
    for index, column in enumerate(columns):
        cells = [row[index] for row in rows]
        numbers = all(map(_NUMBERS.fullmatch, cells))
        width = max(map(cell_len, [column, *cells]))
        if not numbers:
            width = min(width, _NAME_LEAST if index == 0 else _TEXT_LEAST)
        grid.add_column(
            column, justify="right" if numbers else "left", overflow="fold", no_wrap=numbers, min_width=width
        )
        least += width + 1
    for row in rows:
        grid.add_row(*map(escape, row))
    console = Console(width=None if sys.stdout.isatty() else _UNLIMITED)
    console.width = max(console.width, least)
    console.print(grid, crop=False)


class Progress:
    """A counter with a rate: a live bar on a terminal, one line now and then elsewhere."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.done = 0
        self.fields: dict[str, str] = {}
        self._start = time.perf_counter()
        self._last_line = self._start

    def advance(self, count: int = 1, **fields: str) -> None:
        """Count `count` more; `fields` (e.g. loss="1.23") are shown beside the rate."""
        self.done += count
        self.fields.update(fields)
        now = time.perf_counter()
        tty = sys.stderr.isatty()
        if now - self._last_line >= (0.2 if tty else LINE_EVERY_S) and not _quiet:
            self._last_line = now
            start, end = ("\r\033[K", "") if tty else ("", "\n")
            print(start + self._line(), end=end, file=sys.stderr, flush=True)

    def _line(self) -> str:
        elapsed_s = time.perf_counter() - self._start
        rate = self.done / elapsed_s if elapsed_s > 0 else 0.0
        parts = [f"{self.label}  {self.done:,}/{self.total:,} {self.unit}", f"{rate:,.1f} {self.unit}/s"]
        if 0 < self.done < self.total and rate > 0:
            parts.append(f"ETA {format_seconds((self.total - self.done) / rate)}")
        parts += [f"{key} {value}" for key, value in self.fields.items()]
        return "  ".join(parts)

    def close(self) -> None:
        if _quiet:
            return
        print(f"\r\033[K{self._line()}" if sys.stderr.isatty() else self._line(), file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Progress]:
    """Show progress while the block runs.

    Args:
        label: what is being done, e.g. "extract vit-s-in21k".
        total: how many units there are.
        unit: plural name of one unit, e.g. "images".
    """
    bar = Progress(label, total, unit)
    try:
        yield bar
    finally:
        bar.close()


def format_seconds(seconds: float) -> str:
    """65 -> "1:05", 3700 -> "1:01:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_bytes(count: float) -> str:
    """786432 -> "786 kB" (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
