"""Which of several processes that extract together is this one, and what follows from that?

Two levels, either or both: the environment variable VLMX_PART=INDEX/COUNT tells apart the tasks of a batch system;
torchrun, or `vlmx extract --nproc`, start the processes of one task.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from vlmx.cache_specs.claims import Part
from vlmx.console import be_quiet, warn
from vlmx.errors import UsageError, VlmxError, of_system
from vlmx.processes import Rank, rank_of, shared_device

if TYPE_CHECKING:
    import torch

PART = "VLMX_PART"
CHILD = "VLMX_CHILD"  # JSON, for children of `vlmx extract --nproc`: index, count, descriptor


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One process of an extraction.

    Attributes:
        part: which part of the work it begins with.
        rank: which of the processes of its task it is.
        speaks: whether it shows notes, progress and results; the others show only warnings and errors.
        stays: whether it waits, after its own part, for processes that may still die. Tasks of a batch system do not.
        descriptor: of the socket to the parent, in children of `vlmx extract --nproc`.
    """

    part: Part
    rank: Rank = field(default_factory=Rank)
    speaks: bool = True
    stays: bool = True
    descriptor: int | None = None

    def device(self) -> torch.device:
        """The processor of this process: each takes a GPU of its own, as far as there are so many."""
        import torch

        device = shared_device(self.rank)
        gpus = torch.cuda.device_count()
        if device.type == "cuda" and self.speaks and self.rank.locals > gpus:
            warn(f"{self.rank.locals} processes share {gpus} GPU{'s' if gpus > 1 else ''}")
        return device

    def finish(self, name: str, sealed: bool) -> None:
        """Give the result: the name of what was filled, on stdout or to the parent."""
        if self.descriptor is not None:
            _tell(self.descriptor, {"name": name, "sealed": sealed})
        elif self.speaks:
            click.echo(name)

    @contextmanager
    def at_work(self, *, debug: bool) -> Iterator[None]:
        """Around all that this process does: errors are told once, and children do not outlive their parent.

        Args:
            debug: an error of a child shall be shown here, with its traceback.
        """
        if not self.speaks:
            be_quiet()
        if self.descriptor is None:
            yield
            return
        threading.Thread(target=_stop_after, args=(self.descriptor,), daemon=True).start()
        try:
            yield
        except (VlmxError, OSError) as problem:
            if debug:
                raise
            error = of_system(problem) if isinstance(problem, OSError) else problem
            told = {"what": error.what, "why": error.why, "fix": error.fix, "code": error.exit_code}
            _tell(self.descriptor, {"error": told, "kind": type(error).__name__})
            raise click.exceptions.Exit(error.exit_code) from problem


def worker_of(environ: Mapping[str, str]) -> Worker:
    """The place that the environment gives to this process.

    Raises:
        UsageError: VLMX_PART is no part, or torchrun's variables are no place.
    """
    task = _task_of(environ)
    if CHILD in environ:
        child = json.loads(environ[CHILD])
        index, count = child["index"], child["count"]
        rank = Rank(index=index, count=count, local=index, locals=count)
    else:
        child, rank = {}, rank_of(environ)
    return Worker(
        part=Part(index=task.index * rank.count + rank.index, count=task.count * rank.count),
        rank=rank,
        speaks=rank.index == 0,
        stays=task.count == 1,
        descriptor=child.get("descriptor"),
    )


def child_variables(index: int, count: int, descriptor: int) -> dict[str, str]:
    """What tells a process that it is a child of `vlmx extract --nproc`."""
    return {CHILD: json.dumps({"index": index, "count": count, "descriptor": descriptor})}


def _task_of(environ: Mapping[str, str]) -> Part:
    text = environ.get(PART, "0/1")
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UsageError(
            f"{PART}={text} is no part of an extraction",
            why="it must be INDEX/COUNT, and INDEX counts from 0",
            fix=f"e.g. {PART}=0/4 to {PART}=3/4 for four processes, or unset it",
        )
    return Part(index=int(match[1]), count=int(match[2]))


def _tell(descriptor: int, message: object) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as channel:
        channel.sendall(json.dumps(message).encode() + b"\n")


def _stop_after(descriptor: int) -> None:
    """Ask this process to stop when its parent is gone, however it went."""
    with socket.socket(fileno=os.dup(descriptor)) as channel:
        channel.recv(1)
    os.kill(os.getpid(), signal.SIGTERM)
