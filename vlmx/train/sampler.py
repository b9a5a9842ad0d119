"""Which examples are trained on together, and in which order? A pure function of (seed, epoch, data).

The order does not depend on the encoder, the connector, the resolution, or the number of processes. Examples with and
without an image never share a batch; each kind is shuffled and cut into global batches; the last batch of a kind is
completed from the start of that kind's order, so that nothing is dropped: up to one batch less one of each kind is seen
twice an epoch, and a kind with less than half a batch of examples comes around several times. Batches of both kinds are
shuffled together. Within a batch, longer conversations come first, so that a micro-batch has little padding.

`order="paper"` gives the very batches of the reference, prismatic-vlms' SplitModalitySampler: the same rules, drawn
from PyTorch's generator, and these besides. The batch with the longest example comes first. The examples of a batch
are dealt to the processes, longest first, each to the process with the fewest words that has room. Its limits are kept
as well: a kind with less than half a global batch of examples cannot be completed, so that batches of both kinds run
into each other, or the epoch cannot be cut at all, which is an error here; and there must be examples with an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from vlmx.data.records import Conversation
from vlmx.errors import UsageError

BatchOrder = Literal["default", "paper"]
Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

PAPER_VISUAL_TOKENS = 576  # what an image counts when the reference looks for the longest batch, whatever the encoder


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """All that the order depends on.

    Attributes:
        has_image: of each example, [examples].
        words: `word_count` of each example, [examples].
    """

    has_image: Flags
    words: Indices


def word_count(conversation: Conversation) -> int:
    """Words of all messages, split at white space: the length by which batches are sorted."""
    return sum(len(turn.question.split()) + len(turn.answer.split()) for turn in conversation.turns)


def sizes_of(conversations: Sequence[Conversation]) -> Sizes:
    """Measure all examples: seconds for a mixture of gigabytes, so do it once for all epochs."""
    return Sizes(
        has_image=np.array([c.image is not None for c in conversations], dtype=bool),
        words=np.array([word_count(c) for c in conversations], dtype=np.int64),
    )


def epoch_batches(
    conversations: Sequence[Conversation],
    *,
    seed: int,
    epoch: int,
    global_batch: int,
    order: BatchOrder = "default",
    world: int = 1,
) -> Indices:
    """`batches_of` the sizes of conversations."""
    sizes = sizes_of(conversations)
    return batches_of(sizes, seed=seed, epoch=epoch, global_batch=global_batch, order=order, world=world)


def batches_of(
    sizes: Sizes, *, seed: int, epoch: int, global_batch: int, order: BatchOrder = "default", world: int = 1
) -> Indices:
    """Positions of the examples of each global batch, int64 [batches, global_batch], in training order.

    Args:
        sizes: of the examples.
        seed, epoch: what the shuffling follows from.
        global_batch: examples a step, over all processes.
        order: "default", or "paper" for the reference's batches.
        world: number of processes; has no influence on the default order. In the paper's order a row is the processes'
            shares one after the other: the same examples for every `world`, unless a kind is too short to be completed.

    Raises:
        UsageError: the paper's order cannot be made of these examples.
    """
    if order == "paper":
        return _paper(sizes, seed=seed, epoch=epoch, global_batch=global_batch, world=world)
    bits = np.random.Philox(key=seed, counter=[0, 0, 0, epoch])  # the stream of a bit generator never changes in numpy
    batches = [
        _cut(_shuffled(np.flatnonzero(kind), bits), global_batch)
        for kind in (sizes.has_image, ~sizes.has_image)
        if kind.any()
    ]
    rows = np.concatenate(batches)
    return _longest_first(rows[_shuffled(np.arange(len(rows)), bits)], sizes.words)


def _paper(sizes: Sizes, *, seed: int, epoch: int, global_batch: int, world: int) -> Indices:
    """The reference's order.

    Source: the steps of SplitModalitySampler in TRI-ML/prismatic-vlms, commit 874c5bb; results are equal to its. It
    counts the mark `<image>` as a word; from our messages the marks are gone.
    """
    import torch

    has_image, words = sizes.has_image, sizes.words + sizes.has_image
    if not has_image.any():
        raise UsageError(
            "the paper's batch order needs examples with an image",
            why=f"none of the {len(has_image):,} has one, and the reference's sampler cannot go without",
            fix="take the default order",
        )
    stream = torch.Generator().manual_seed(seed + epoch)

    def permutation(count: int) -> Indices:
        return torch.randperm(count, generator=stream).numpy()

    batches: list[Indices] = []
    for kind in (has_image, ~has_image):
        members = np.flatnonzero(kind)
        drawn = members[permutation(len(members))]
        completed = np.concatenate([drawn, drawn[: -len(drawn) % global_batch]])
        if len(completed):
            rows = completed.reshape(-1, min(global_batch, len(completed)))
            batches += list(_dealt(_longest_first(rows, words), words, world))
    batches = [batches[index] for index in permutation(len(batches))]
    length = words + PAPER_VISUAL_TOKENS * has_image
    longest = int(np.argmax([length[batch].max() for batch in batches]))
    batches[0], batches[longest] = batches[longest], batches[0]
    order = np.concatenate(batches)
    if len(order) % global_batch:
        raise UsageError(
            f"the paper's batch order cannot cut this data into global batches of {global_batch}",
            why=f"of {len(has_image):,} examples {int(has_image.sum()):,} have an image, and the reference's sampler"
            " completes a kind from itself once only",
            fix="take the default order, or a smaller global_batch",
        )
    return order.reshape(-1, global_batch)


def steps_an_epoch(conversations: Sequence[Conversation], global_batch: int, order: BatchOrder = "default") -> int:
    """How many global batches `epoch_batches` gives."""
    with_image = sum(c.image is not None for c in conversations)
    counts = (with_image, len(conversations) - with_image)
    if order == "paper":
        return sum(count + min(count, -count % global_batch) for count in counts) // global_batch
    return sum(-(-count // global_batch) for count in counts)


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """What completing the last batch of each kind does to an epoch.

    Attributes:
        conversations: how many are seen more than once.
        most: how often the one that is seen most often is.
    """

    conversations: int
    most: int

    @property
    def text(self) -> str:
        """For people; empty if none is repeated."""
        if not self.conversations:
            return ""
        often = "twice" if self.most == 2 else f"more than once, up to {self.most} times,"
        return f"{self.conversations:,} conversations are seen {often} to complete batches"


def repeats(conversations: Sequence[Conversation], global_batch: int, order: BatchOrder = "default") -> Repeats:
    """Count what `epoch_batches` repeats in an epoch."""
    with_image = sum(c.image is not None for c in conversations)
    repeated, most = 0, 1
    for count in (with_image, len(conversations) - with_image):
        missing = -count % global_batch
        if order == "paper":
            missing = min(missing, count)
        repeated += min(missing, count)
        if missing:
            most = max(most, -(-(count + missing) // count))
    return Repeats(conversations=repeated, most=most)


def order_digest(conversations: Sequence[Conversation], batches: Indices) -> str:
    """SHA-256 over the example ids of an epoch in training order: equal digests mean equal batches.

    In the paper's order it is the one of `world=1` that can be compared between numbers of processes.
    """
    digest = hashlib.sha256()
    for batch in batches:
        digest.update("\n".join(conversations[index].id for index in batch).encode() + b"\n\n")
    return digest.hexdigest()


def rank_share(
    batch: Indices, *, rank: int, world: int, micro_batch: int, order: BatchOrder = "default"
) -> list[Indices]:
    """The micro-batches of one process, as many as every other process has.

    By default every `world`-th of the batch's micro-batches; in the paper's order, slices of the process's own part of
    the row.
    """
    if order == "paper":
        own = batch.reshape(world, -1)[rank]
        return [own[start : start + micro_batch] for start in range(0, len(own), micro_batch)]
    return [batch[start : start + micro_batch] for start in range(rank * micro_batch, len(batch), world * micro_batch)]


def _shuffled(values: Indices, bits: np.random.Philox) -> Indices:
    return values[np.argsort(bits.random_raw(len(values)), kind="stable")]


def _cut(order: Indices, size: int) -> Indices:
    """Rows of `size`, the last one completed from the start."""
    return np.resize(order, (-(-len(order) // size), size))


def _longest_first(rows: Indices, words: Indices) -> Indices:
    return np.take_along_axis(rows, np.argsort(-words[rows], axis=1, kind="stable"), axis=1)


def _dealt(rows: Indices, words: Indices, world: int) -> Indices:
    """Each row in `world` equal parts, one after the other: an example, from the left, goes to the part with the fewest
    words (the first of several) that is not full.

    Raises:
        UsageError: the parts would not be equal.
    """
    count, width = rows.shape
    room, rest = divmod(width, world)
    if rest:
        raise UsageError(
            f"a batch of {width} examples cannot be divided among {world} processes",
            why="in the paper's batch order every process gets as many",
            fix="take another number of processes, or the default order",
        )
    parts = np.empty((count, world, room), dtype=np.int64)
    load = np.zeros((count, world))
    taken = np.zeros((count, world), dtype=np.int64)
    row = np.arange(count)
    for examples in rows.T:
        part = load.argmin(axis=1)
        parts[row, part, taken[row, part]] = examples
        taken[row, part] += 1
        load[row, part] += words[examples]
        load[taken == room] = np.inf
    return parts.reshape(count, width)
