"""Who trains in a run folder, and what is recorded of it, however it ends? One session at a time; a resumed run has had
several.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vlmx.console import warn
from vlmx.errors import OutOfSpaceError, VlmxError
from vlmx.runs import RunFolder, State, environment, now
from vlmx.train.parallel import World
from vlmx.train.plan import TrainPlan
from vlmx.train.resume import Changes, identity_of, require_same_data
from vlmx.train.stopping import Stopped


@dataclass
class Session:
    """What the training tells of itself while it runs.

    Attributes:
        start: steps that were done before this session.
        done: steps that are done now.
        found: what the run's status gets when the training is complete.
    """

    start: int = 0
    done: int = 0
    found: dict[str, Any] = field(default_factory=dict)


@contextmanager
def session(
    plan: TrainPlan, run: RunFolder, world: World, *, resume: bool, changes: Changes | None = None
) -> Iterator[Session]:
    """Hold the run folder while the block trains in it, and record when and how that ended; every process takes part,
    and the first one does it.

    Args:
        plan: what is trained.
        run: where.
        world: the processes that train together.
        resume: whether a run that is there already is gone on with.
        changes: of the configuration, which were insisted on.

    Raises:
        RunError: another process trains in the folder, it is something else than a run, or the data are not those of
            the run.
        OutOfSpaceError: the disk is full.
    """
    if not world.first:
        yield Session()
        return
    with run.held():
        known = run.status if resume and (run.path / "status.json").exists() else {}
        identity = require_same_data(run, plan) if known else identity_of(plan)
        started_s = time.perf_counter()
        RunFolder.create(run.path, kind="train", config=plan.config.model_dump(mode="json"))
        sessions = [*known.get("sessions", []), {"started": now(), "host": os.uname().nodename, **environment()}]
        history = [*known.get("changed_when_resumed", []), *([changes] if changes else [])]
        run.set_status("running", **identity, sessions=sessions, changed_when_resumed=history or None)
        this = Session()
        error: BaseException | None = None
        try:
            yield this
        except BaseException as raised:
            error = raised
            raise
        finally:
            _end(run, this, error, time.perf_counter() - started_s)


def _end(run: RunFolder, this: Session, error: BaseException | None, seconds: float) -> None:
    state: State = "done" if error is None else "failed"
    if isinstance(error, KeyboardInterrupt | Stopped):
        state = "interrupted"
    said = None
    if error is not None:
        said = str(error) if isinstance(error, VlmxError) else f"{type(error).__name__}: {error}".rstrip(": ")
    end = {"ended": now(), "seconds": round(seconds, 1), "state": state, "steps": [this.start, this.done]}
    *before, last = run.status["sessions"]
    sessions: list[Mapping[str, Any]] = [*before, {**last, **end}]
    try:
        run.set_status(
            state,
            **(this.found if error is None else {}),
            ended=end["ended"],
            seconds=round(sum(one.get("seconds", 0.0) for one in sessions), 1),
            error=said,
            sessions=sessions,
        )
    except OutOfSpaceError as full:
        if error is None:
            raise
        warn(f"{full.what}: that the training ended is not recorded")
