"""How are micro-batches ready before they are needed? One thread makes the next steps' while the current one trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from vlmx.train.collate import Collator, MicroBatch
from vlmx.train.plan import TrainPlan
from vlmx.train.sampler import Indices, epoch_batches, order_digest, rank_share

AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one process trains on in one optimiser step.

    Attributes:
        index: from 0.
        example_ids: ids of the whole global batch, all processes.
        micro_batches: this process's part.
    """

    index: int
    example_ids: list[str]
    micro_batches: list[MicroBatch]


class Feed:
    """The steps of a run, for one process."""

    def __init__(self, plan: TrainPlan, collator: Collator, *, rank: int, world: int) -> None:
        self.plan = plan
        self.collator = collator
        self.rank = rank
        self.world = world
        self._order: tuple[int, Indices] | None = None

    def batches_of(self, epoch: int) -> Indices:
        """Positions of the examples of each global batch of an epoch, [batches, global_batch]."""
        if self._order is None or self._order[0] != epoch:
            config = self.plan.config
            batches = epoch_batches(
                self.plan.conversations, seed=config.seed, epoch=epoch, global_batch=config.global_batch
            )
            self._order = (epoch, batches)
        return self._order[1]

    def digest(self) -> str:
        """SHA-256 of the first epoch's order."""
        return order_digest(self.plan.conversations, self.batches_of(0))

    def steps(self, start: int) -> Iterator[Step]:
        """Steps `start`, `start + 1`, ... to the end of the run; errors of the thread are raised here."""
        waiting: deque[Future[Step]] = deque()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed") as thread:
            try:
                for index in range(start, self.plan.total_steps + AHEAD):
                    if index < self.plan.total_steps:
                        waiting.append(thread.submit(self._make, index))
                    if len(waiting) > AHEAD or index >= self.plan.total_steps:
                        if not waiting:
                            return
                        yield waiting.popleft().result()
            finally:
                thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, index: int) -> Step:
        epoch, position = divmod(index, self.plan.steps_per_epoch)
        batch = self.batches_of(epoch)[position]
        share = rank_share(batch, rank=self.rank, world=self.world, micro_batch=self.plan.micro_batch)
        conversations = self.plan.conversations
        return Step(
            index=index,
            example_ids=[conversations[i].id for i in batch],
            micro_batches=[self.collator([conversations[i] for i in part]) for part in share],
        )
