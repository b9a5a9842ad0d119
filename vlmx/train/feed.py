"""How are a step's micro-batches ready before they are needed? Threads make the next ones while the current one trains.

One thread turns conversations into token ids; others read the visual tokens that these ask for, into buffers that are
used again. An image that several conversations of a process's step share is read once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy.typing as npt
import torch

from vlmx.cache_specs.loader import TokenLoader
from vlmx.train.budget import plan_micro_batches
from vlmx.train.collate import Collator, MicroBatch, Row
from vlmx.train.plan import TrainPlan
from vlmx.train.sampler import Indices, Sizes, batches_of, order_digest, rank_share, sizes_of

TEXTS_AHEAD = 4
TOKENS_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one process trains on in one optimiser step.

    Attributes:
        index: from 0.
        example_ids: ids of the whole global batch, all processes.
        images: content ids of the different images of this process's part.
        micro_batches: this process's part.
    """

    index: int
    example_ids: list[str]
    images: list[str]
    micro_batches: list[MicroBatch]


class Feed:
    """The steps of a run, for one process."""

    def __init__(self, plan: TrainPlan, collator: Collator, *, rank: int, world: int) -> None:
        self.plan = plan
        self.collator = collator
        self.rank = rank
        self.world = world
        self._order: tuple[int, Indices] | None = None

    @cached_property
    def sizes(self) -> Sizes:
        """What the order of the batches depends on."""
        return sizes_of(self.plan.conversations)

    def batches_of(self, epoch: int) -> Indices:
        """Positions of the examples of each global batch of an epoch, [batches, global_batch]."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._batches(epoch, self.world))
        return self._order[1]

    def digest(self) -> str:
        """SHA-256 of the first epoch's order; the same for every number of processes."""
        return order_digest(self.plan.conversations, self._batches(0, 1))

    def steps(self, start: int) -> Generator[Step, None, None]:
        """Steps `start`, `start + 1`, ... to the end of the run.

        The tokens of a step are in a buffer: they are valid until the next step is asked for.

        Raises:
            CacheError, CacheCorruptError: tokens cannot be read.
        """
        drafts: deque[Step] = deque()
        reader = self.plan.reader
        readers = 2 if reader.parts else 1  # an encoder that works on the fly does one batch at a time
        with (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed") as thread,
            TokenLoader(reader, self._images(start, thread, drafts), threads=readers, ahead=TOKENS_AHEAD) as loader,
        ):
            try:
                for tokens_UND in loader:
                    yield self._with_tokens(drafts.popleft(), tokens_UND)
            finally:
                thread.shutdown(wait=False, cancel_futures=True)

    def draft(self, index: int) -> Step:
        """A step without visual tokens."""
        epoch, position = divmod(index, self.plan.steps_per_epoch)
        batch = self.batches_of(epoch)[position]
        conversations = self.plan.conversations
        parts = self._parts(batch)
        images = list(dict.fromkeys(row.image for part in parts for row in part if row.image is not None))
        number_of = {image: number for number, image in enumerate(images)}
        return Step(
            index=index,
            example_ids=[conversations[i].id for i in batch],
            images=images,
            micro_batches=[self.collator.batch(part, number_of) for part in parts],
        )

    def _batches(self, epoch: int, world: int) -> Indices:
        config = self.plan.config
        return batches_of(
            self.sizes,
            seed=config.seed,
            epoch=epoch,
            global_batch=config.global_batch,
            order=config.order,
            world=world,
        )

    def _parts(self, batch: Indices) -> list[list[Row]]:
        """The rows of this process's micro-batches."""
        config, conversations = self.plan.config, self.plan.conversations
        if config.micro_tokens is not None:
            rows = self.collator.rows([conversations[i] for i in batch])
            lengths = [len(row.ids) for row in rows]
            division = plan_micro_batches(lengths, self.world, config.micro_tokens, packed=self.collator.packed)
            return [[rows[i] for i in part] for part in division[self.rank]]
        share = rank_share(
            batch, rank=self.rank, world=self.world, micro_batch=self.plan.micro_batch, order=config.order
        )
        return [self.collator.rows([conversations[i] for i in part]) for part in share]

    def _images(self, start: int, thread: ThreadPoolExecutor, drafts: deque[Step]) -> Iterator[Sequence[str]]:
        """The images of each step; the drafts are left in `drafts`."""
        waiting: deque[Future[Step]] = deque()
        for index in range(start, self.plan.total_steps + TEXTS_AHEAD):
            if index < self.plan.total_steps:
                waiting.append(thread.submit(self.draft, index))
            if waiting and index >= start + TEXTS_AHEAD:
                drafts.append(waiting.popleft().result())
                yield drafts[-1].images

    def _with_tokens(self, step: Step, stored_UND: npt.NDArray[Any]) -> Step:
        tokens_UND = torch.from_numpy(stored_UND)
        if self.plan.reader.logical_dtype == "bfloat16":
            tokens_UND = tokens_UND.view(torch.bfloat16)
        micro_batches = [
            replace(micro, batch=replace(micro.batch, visual_UND=_some(tokens_UND, micro.images)))
            for micro in step.micro_batches
        ]
        return replace(step, micro_batches=micro_batches)


def _some(tokens_UND: torch.Tensor, images: Sequence[int]) -> torch.Tensor:
    """The tokens of some images, without a copy where these lie together."""
    if not images:
        return tokens_UND[:0]
    if list(images) == list(range(images[0], images[0] + len(images))):
        return tokens_UND[images[0] : images[0] + len(images)]
    return tokens_UND[list(images)]
