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
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from vlmx.console import be_quiet, note, warn
from vlmx.errors import RunError, UsageError

if TYPE_CHECKING:
    import torch

CHILD = "VLMX_EVAL_PARENT"  # descriptor of a pipe that closes when the parent dies
POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One of the processes that answer together.

    Attributes:
        index: which, from 0.
        count: how many there are.
        local: which of those of its machine.
        launched: whether torchrun or `--nproc` has started it, and with it all others.
    """

    index: int = 0
    count: int = 1
    local: int = 0
    launched: bool = False

    def device(self) -> torch.device:
        """The processor of this process: each takes a GPU of its own, as far as there are so many."""
        import torch

        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", self.local % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device

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
    """The place that the variables of torchrun, or of `--nproc`, give this process; empty ones count as not set.

    Raises:
        UsageError: they give no place.
    """
    said = {key: environment.get(key) or default for key, default in _VARIABLES}
    texts = ", ".join(f"{key}={value}" for key, value in said.items())
    if not all(value.isdecimal() for value in said.values()) or not int(said["RANK"]) < int(said["WORLD_SIZE"]):
        raise UsageError(
            "the environment gives this process no place among several",
            why=f"{texts}: RANK counts from 0 to WORLD_SIZE - 1",
            fix="unset RANK, WORLD_SIZE and LOCAL_RANK, or let torchrun set them",
        )
    return Worker(
        index=int(said["RANK"]),
        count=int(said["WORLD_SIZE"]),
        local=int(said["LOCAL_RANK"]),
        launched=any(environment.get(key) for key in (CHILD, _TORCHRUN)),
    )


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
_TORCHRUN = "TORCHELASTIC_RUN_ID"  # which torchrun sets in all that it starts


class ManyProcesses(click.Command):
    """A command that can run as several processes: it takes --nproc, and its function gets a `Worker` instead."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        given = list(args)
        context = super().make_context(info_name, args, parent, **extra)
        context.meta["arguments"] = given
        return context

    def invoke(self, ctx: click.Context) -> Any:
        count = ctx.params.pop("nproc")
        worker = worker_of(os.environ)
        child = os.environ.get(CHILD)
        if child is not None:
            _end_with_parent(int(child))
        elif count > 1 and worker.count > 1:
            raise UsageError(
                "--nproc within torchrun",
                why=f"torchrun has started {worker.count} processes already",
                fix="leave one of the two away",
            )
        elif count > 1:
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // count)), **os.environ}
    kept, given = os.pipe()
    before = signal.signal(signal.SIGTERM, _stop)
    children: list[subprocess.Popen[bytes]] = []
    try:
        for index in range(count):
            place = {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count), CHILD: str(kept)}
            children.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**environment, **place}, pass_fds=[kept])
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
