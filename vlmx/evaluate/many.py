"""Which of several processes that answer together is this one, and how does `vlmx eval --nproc N` start N of them?

The processes need no word from each other (see parts.py). They are told apart as torchrun does it, by RANK, LOCAL_RANK
and WORLD_SIZE, so that `torchrun -m vlmx eval` is the same thing, on several machines, too. One that dies stops no
other one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

import click

from vlmx.console import be_quiet, note, warn
from vlmx.errors import RunError
from vlmx.processes import NprocCommand, Rank, rank_of, refuse_nested, threads_each

CHILD = "VLMX_EVAL_PARENT"  # descriptor of a pipe that closes when the parent dies
POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Worker(Rank):
    """One of the processes that answer together.

    Attributes:
        launched: whether torchrun or `--nproc` has started it, and with it all others.
    """

    launched: bool = False

    def tell_end(self) -> None:
        """Say, where there are others, that this process has answered its share and shows no scores."""
        if self.count == 1:
            return
        said = (
            f"process {self.index} of {self.count} (RANK={self.index}, WORLD_SIZE={self.count}) has answered its share"
            " alone; the process that ends last shows the scores"
        )
        if self.launched:
            note(said)
        else:
            warn(
                f"{said}. Neither torchrun nor --nproc has started this one: if no others are at work, unset RANK and "
                "WORLD_SIZE and give the command again"
            )


def worker_of(environment: Mapping[str, str]) -> Worker:
    """The place that the variables of torchrun, or of `--nproc`, give this process.

    Raises:
        UsageError: they give no place.
    """
    return Worker(**asdict(rank_of(environment)), launched=any(environment.get(key) for key in (CHILD, _TORCHRUN)))


_TORCHRUN = "TORCHELASTIC_RUN_ID"  # which torchrun sets in all that it starts


class ManyProcesses(NprocCommand):
    """A command that can run as several processes: it takes --nproc, and its function gets a `Worker` instead."""

    def invoke(self, ctx: click.Context) -> Any:
        count = ctx.params.pop("nproc")
        worker = worker_of(os.environ)
        child = os.environ.get(CHILD)
        if child is not None:
            _end_with_parent(int(child))
        elif count > 1:
            refuse_nested(worker.count)
            debug = bool(ctx.find_root().params.get("debug"))
            command = [sys.executable, "-m", "vlmx", *(["--debug"] if debug else []), "eval", *ctx.meta["arguments"]]
            _run(command, count)
            return None
        if worker.index:
            be_quiet()
        ctx.params["worker"] = worker
        return super().invoke(ctx)


def _run(command: Sequence[str], count: int) -> None:
    """Run a command as `count` processes and wait for all.

    Raises:
        RunError: some failed, or were killed.
        KeyboardInterrupt: this process was told to stop, and the others were, too.
    """
    environment = {"OMP_NUM_THREADS": str(threads_each(count)), **os.environ}
    kept, given = os.pipe()
    before = signal.signal(signal.SIGTERM, _stop)
    children: list[subprocess.Popen[bytes]] = []
    try:
        for index in range(count):
            place = {key: str(index) for key in ("RANK", "LOCAL_RANK")}
            place |= {key: str(count) for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
            children.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, env={**environment, **place, CHILD: str(kept)}, pass_fds=[kept]
                )
            )
        while any(child.poll() is None for child in children):
            time.sleep(POLL_S)
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
        for child in children:
            child.wait()
        signal.signal(signal.SIGTERM, before)
        os.close(kept)
        os.close(given)
    ends = {index: child.returncode for index, child in enumerate(children) if child.returncode}
    if ends:
        raise RunError(
            f"{len(ends)} of {count} processes came to no end",
            why=", ".join(f"process {index}: {_how(code)}" for index, code in ends.items()),
            fix="give the same command again: what is answered is kept",
        )


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}, see above"


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _end_with_parent(descriptor: int) -> None:
    """End this process when the one that started it is gone, however it went."""

    def wait() -> None:
        os.read(descriptor, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="parent").start()
