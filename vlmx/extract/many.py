"""How does `vlmx extract --nproc N` start N processes, keep them going, and tell once what happened to them?"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import click

from vlmx.console import show_error, warn
from vlmx.errors import VlmxError
from vlmx.extract.interrupt import RESUME, SIGNALS, Interrupted
from vlmx.extract.slurm import job_array
from vlmx.extract.worker import Worker, child_variables, worker_of
from vlmx.processes import NprocCommand, refuse_nested, threads_each

RESTARTS = 3  # of each process, when a signal killed it
TELL_AFTER_S = 2.0  # an error that ends all processes at once is told alone
POLL_S = 0.1
MESSAGE_BYTES_MAX = 1 << 20


class ManyProcesses(NprocCommand):
    """A command that can run as several processes: it takes --nproc and --slurm, and its function does not see them."""

    def invoke(self, ctx: click.Context) -> Any:
        count, tasks = ctx.params.pop("nproc"), ctx.params.pop("slurm")
        arguments: list[str] = ctx.meta["arguments"]
        if tasks is not None:
            click.echo(job_array(arguments, tasks), nl=False)
            return None
        worker = worker_of(os.environ)
        debug = bool(ctx.find_root().params.get("debug"))
        if count == 1 or worker.descriptor is not None or ctx.params.get("dry_run"):
            with worker.at_work(debug=debug):
                return super().invoke(ctx)
        refuse_nested(worker.rank.locals)
        threads_given = ctx.get_parameter_source("threads") is not click.core.ParameterSource.DEFAULT
        command = [sys.executable, "-m", "vlmx", *(["--debug"] if debug else []), "extract", *arguments]
        _start(command, count, worker, threads_given=threads_given)
        return None


@dataclass(kw_only=True)
class _Child:
    """One of the processes.

    Attributes:
        index: which.
        process: it, or the one that took its place.
        channel: where it tells its result or its error.
        restarts: how often it was started again.
        deaths: signals that killed it.
        code: exit code as shells count it, once it is not running and not started again.
        message: what it told.
        ended: when, in seconds of the monotonic clock.
        told: whether the user was told of its end.
    """

    index: int
    process: subprocess.Popen[bytes]
    channel: socket.socket
    restarts: int = 0
    deaths: list[str] = field(default_factory=list)
    code: int | None = None
    message: dict[str, Any] = field(default_factory=dict)
    ended: float = 0.0
    told: bool = False

    @property
    def failed(self) -> bool:
        """Whether it ended without a result although nobody had asked it to stop."""
        return self.code is not None and "name" not in self.message and self.message.get("kind") != Interrupted.__name__

    @property
    def why(self) -> str:
        """Why it failed."""
        if "error" in self.message:
            return str(self.message["error"]["what"])
        return f"killed by {', '.join(self.deaths)}" if self.deaths else f"exit code {self.code}"


def _start(command: Sequence[str], count: int, worker: Worker, *, threads_given: bool) -> None:
    """Run `command` as `count` processes and wait for them; prints the result.

    Args:
        command: `vlmx extract` as it was given.
        count: how many.
        worker: this process.
        threads_given: whether the command says how many threads decode.

    Raises:
        VlmxError: the cache is not complete: the error of the processes, if all had the same, or a summary.
        Interrupted: they were asked to stop.
    """
    threads = threads_each(count)
    command = [*command, *([] if threads_given else ["--threads", str(min(32, threads))])]
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}

    def start(index: int) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                env={**environment, **child_variables(index, count, theirs.fileno())},
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C reaches them through this process alone
            )
        return process, ours

    children: list[_Child] = []
    with _signals(lambda number: _forward(children, number)) as asked:
        for index in range(count):
            if not asked:
                process, channel = start(index)
                children.append(_Child(index=index, process=process, channel=channel))
        if asked:
            _forward(children, asked[-1])  # to the one that was being started, too
        while any(child.code is None for child in children):
            for child in children:
                if child.code is None and child.process.poll() is not None:
                    _settle(child, asked, start, count)
            _tell(children, count, after_s=TELL_AFTER_S)
            time.sleep(POLL_S)
    _conclude(children, asked, worker)


def _settle(
    child: _Child,
    asked: Sequence[int],
    start: Callable[[int], tuple[subprocess.Popen[bytes], socket.socket]],
    count: int,
) -> None:
    """A process has ended: note how, or start it again."""
    with child.channel:
        told = child.channel.recv(MESSAGE_BYTES_MAX)  # it has ended: this never waits
    child.message = json.loads(told) if told else {}
    code = 0 if "name" in child.message else child.process.returncode
    if code < 0:
        child.deaths.append(signal.Signals(-code).name)
    if code < 0 and not asked and child.restarts < RESTARTS:
        child.restarts += 1
        warn(
            f"process {child.index} of {count} was killed by {child.deaths[-1]}; started again "
            f"({child.restarts} of {RESTARTS})"
        )
        child.process, child.channel = start(child.index)
        if asked:
            child.process.send_signal(asked[-1])
        return
    child.code = 128 - code if code < 0 else code
    child.ended = time.monotonic()


def _tell(children: Sequence[_Child], count: int, *, after_s: float) -> None:
    """Warn of processes that failed a while ago, as long as others go on."""
    if all(child.code is not None for child in children):
        return
    for child in children:
        if child.failed and not child.told and time.monotonic() - child.ended > after_s:
            child.told = True
            if not any(other.told and other.why == child.why for other in children if other is not child):
                warn(f"process {child.index} of {count} stopped, the others go on: {child.why}")


def _conclude(children: Sequence[_Child], asked: Sequence[int], worker: Worker) -> None:
    """Give the result, or raise what kept the processes from it."""
    done = [child.message for child in children if "name" in child.message]
    failed = [child for child in children if child.failed and not (asked and "error" not in child.message)]
    if complete := [message for message in done if message["sealed"]]:
        for child in failed:
            if not child.told:
                warn(f"process {child.index} of {len(children)} stopped, the others did its work: {child.why}")
        worker.finish(complete[0]["name"], True)
        return
    if not failed and done and not asked:
        worker.finish(done[0]["name"], False)  # one of several tasks, of which another one is going to be the last
        return
    if not failed:
        _raise_interrupted(asked)
    # e.g. a full disk, which every process meets at another file
    errors = {child.message["kind"]: child.message["error"] for child in failed if "error" in child.message}
    if len(errors) == 1 and all("error" in child.message for child in failed):
        raise _error(*errors.values())
    for error in errors.values():
        show_error(_error(error))
    raise _summary(children, failed)


def _raise_interrupted(asked: Sequence[int]) -> None:
    """All processes stopped because they were asked to: through this one, or each by itself."""
    number = signal.Signals(asked[0]) if asked else signal.SIGTERM
    stopped = Interrupted(f"stopped by {number.name}", why="everything that was committed is intact", fix=RESUME)
    stopped.exit_code = 130 if number == signal.SIGINT else 0
    raise stopped


def _summary(children: Sequence[_Child], failed: Sequence[_Child]) -> VlmxError:
    reasons: dict[str, list[str]] = {}
    for child in failed:
        reasons.setdefault(child.why, []).append(str(child.index))
    error = VlmxError(
        f"{len(failed)} of {len(children)} processes failed, and the cache is not complete",
        why="; ".join(f"process {', '.join(indices)}: {why}" for why, indices in reasons.items()),
        fix=RESUME,
    )
    error.exit_code = max(child.code or 0 for child in failed)
    return error


def _error(told: Mapping[str, Any]) -> VlmxError:
    error = VlmxError(told["what"], why=told["why"], fix=told["fix"])
    error.exit_code = told["code"]
    return error


def _forward(children: Sequence[_Child], number: int) -> None:
    for child in children:
        if child.code is None:
            child.process.send_signal(number)


@contextmanager
def _signals(forward: Callable[[int], None]) -> Iterator[list[int]]:
    """While the block runs, signals go to `forward`; gives those that came."""
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        forward(number)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
