"""How is a training going? The progress line, metrics.jsonl and other trackers, and a loss that explodes."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from vlmx.console import Progress, format_bytes, warn
from vlmx.errors import OutOfSpaceError, RunError
from vlmx.runs import RunFolder
from vlmx.train.settings import WatchConfig
from vlmx.train.trackers import Sink

LOSSES_KEPT = 100


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimiser step did, over all processes."""

    loss: float
    grad_norm: float
    supervised: int
    tokens: int


class Alarm:
    """Stops a training whose loss stays far above what it was; every process has one, and sees the same losses.

    A loss is compared with the median of the last LOSSES_KEPT ones before it, once there are as many. A step now and
    then may be bad, so it has to stay there for some steps.

    Args:
        config: the factor and the number of steps.
        losses: those before, of a resumed training.
    """

    def __init__(self, config: WatchConfig, losses: Iterable[float] = ()) -> None:
        self.config = config
        self.losses: deque[float] = deque(losses, maxlen=LOSSES_KEPT)
        self._first: tuple[int, Sequence[str]] | None = None
        self._median = math.inf
        self._high = 0

    def check(self, step: int, loss: float, example_ids: Sequence[str]) -> None:
        """Look at the loss of a step, counted from 1.

        Raises:
            RunError: it has exploded; names the batch with which that began.
        """
        factor = self.config.explode_factor
        if self._first is None:
            self._median = statistics.median(self.losses) if len(self.losses) == LOSSES_KEPT else math.inf
        self.losses.append(loss)
        if factor is None or loss <= factor * self._median:
            self._first, self._high = None, 0
            return
        self._first = self._first or (step, example_ids)
        self._high += 1
        if self._high >= self.config.explode_steps:
            began, ids = self._first
            raise RunError(
                f"training stopped at step {step}: the loss is {loss:.4g} and has been above {factor:g} x its median"
                f" of {self._median:.4g} since step {began}",
                why=f"the batch of step {began} was {', '.join(ids)}",
                fix=f"look at these examples, or remove the checkpoints after step {began - 1} and go on with"
                " --resume-anyway optim.lr=LOWER; watch.explode_factor=null switches this off",
            )


class Meter:
    """Where the time of a run goes, for the process that reports.

    Attributes:
        lines_lost: lines that metrics.jsonl had no room for.

    Args:
        run: metrics.jsonl of this run gets a line every `log_every` steps.
        bar: shows every step.
        sinks: get what metrics.jsonl gets.
        log_every, steps_per_epoch, total_steps: of the run.
    """

    def __init__(
        self,
        run: RunFolder,
        bar: Progress,
        sinks: Sequence[Sink],
        *,
        log_every: int,
        steps_per_epoch: int,
        total_steps: int,
    ) -> None:
        self.run = run
        self.bar = bar
        self.sinks = list(sinks)
        self.log_every = log_every
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps
        self.wait_s = 0.0
        self.tokens = 0
        self.lines_lost = 0
        self.window_start_s = self.mark_s = time.perf_counter()

    def restart(self) -> None:
        """From here on the next batch is waited for."""
        self.mark_s = time.perf_counter()

    def paused(self, seconds: float) -> None:
        """Something else than training has taken so long; it does not count in the rates."""
        self.window_start_s += seconds

    def waited(self) -> None:
        """The batch is there."""
        self.wait_s += time.perf_counter() - self.mark_s

    def trained(self, done: int, result: StepResult, lr: float) -> None:
        """Report the step after which `done` are done."""
        self.tokens += result.tokens
        now_s = time.perf_counter()
        elapsed_s = now_s - self.window_start_s
        rate, waiting, memory = self.tokens / elapsed_s, self.wait_s / elapsed_s, peak_memory_bytes()
        shown = {"tokens/s": f"{rate:,.0f}", "data wait": f"{waiting:.0%}", "memory": format_bytes(memory)}
        self.bar.advance(1, loss=f"{result.loss:.4f}", lr=f"{lr:.2e}", **shown)
        if done % self.log_every == 0 or done == self.total_steps:
            self.log(
                done,
                epoch=round(done / self.steps_per_epoch, 4),
                loss=result.loss,
                lr=lr,
                grad_norm=result.grad_norm,
                supervised_tokens=result.supervised,
                tokens_per_s=round(rate, 1),
                data_wait=round(waiting, 4),
                memory_bytes=memory,
            )
            self.wait_s, self.tokens, self.window_start_s = 0.0, 0, now_s

    def log(self, step: int, **numbers: float) -> None:
        """A line of metrics of a step. No training ends because there is no room for one."""
        try:
            self.run.log(step=step, **numbers)
        except OutOfSpaceError as error:
            if not self.lines_lost:
                warn(f"{error.what}, the metrics of step {step}: the training goes on without")
            self.lines_lost += 1
        for sink in tuple(self.sinks):
            try:
                sink.log(step, numbers)
            except OSError as error:
                warn(f"{type(sink).__name__.strip('_')} takes no more metrics ({error}): the training goes on without")
                self.sinks.remove(sink)

    def close(self) -> None:
        """Close what metrics went to."""
        for sink in self.sinks:
            try:
                sink.close()
            except OSError as error:
                warn(f"{type(sink).__name__.strip('_')} could not write its last metrics ({error})")


def peak_memory_bytes() -> int:
    """The most memory that this process had so far: of the GPU if there is one, else of the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
