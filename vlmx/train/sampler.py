"""Which examples are trained on together, and in which order? A pure function of (seed, epoch, data).

The order does not depend on the encoder, the connector, the resolution, or the number of processes. Rules, after the
reference's sampler: examples with and without an image never share a batch; each kind is shuffled and cut into global
batches; the last batch of a kind is completed with the first examples of that kind's order (so nothing is dropped, and
up to one batch less one of each kind is seen twice an epoch); batches of both kinds are shuffled together. Within a
batch, longer conversations come first, so that a micro-batch has little padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vlmx.data.records import Conversation

Indices = npt.NDArray[np.int64]


def word_count(conversation: Conversation) -> int:
    """Words of all messages, split at white space: the length by which batches are sorted."""
    return sum(len(turn.question.split()) + len(turn.answer.split()) for turn in conversation.turns)


def epoch_batches(conversations: Sequence[Conversation], *, seed: int, epoch: int, global_batch: int) -> Indices:
    """Positions of the examples of each global batch, int64 [batches, global_batch], in training order."""
    bits = np.random.Philox(key=seed, counter=[0, 0, 0, epoch])  # the stream of a bit generator never changes in numpy
    has_image = np.array([c.image is not None for c in conversations], dtype=bool)
    words = np.array([word_count(c) for c in conversations], dtype=np.int64)
    batches = [
        _cut(_shuffled(np.flatnonzero(kind), bits), global_batch) for kind in (has_image, ~has_image) if kind.any()
    ]
    order = np.concatenate(batches)
    order = order[_shuffled(np.arange(len(order)), bits)]
    longest_first = np.argsort(-words[order], axis=1, kind="stable")
    return np.take_along_axis(order, longest_first, axis=1)


def steps_an_epoch(conversations: Sequence[Conversation], global_batch: int) -> int:
    """How many global batches `epoch_batches` gives."""
    with_image = sum(c.image is not None for c in conversations)
    return sum(-(-count // global_batch) for count in (with_image, len(conversations) - with_image))


def order_digest(conversations: Sequence[Conversation], batches: Indices) -> str:
    """SHA-256 over the example ids of an epoch in training order: equal digests mean equal batches."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update("\n".join(conversations[index].id for index in batch).encode() + b"\n\n")
    return digest.hexdigest()


def rank_share(batch: Indices, *, rank: int, world: int, micro_batch: int) -> list[Indices]:
    """The micro-batches of one process: every `world`-th of the batch's micro-batches, so that all processes have as
    many.
    """
    return [batch[start : start + micro_batch] for start in range(rank * micro_batch, len(batch), world * micro_batch)]


def _shuffled(values: Indices, bits: np.random.Philox) -> Indices:
    return values[np.argsort(bits.random_raw(len(values)), kind="stable")]


def _cut(order: Indices, size: int) -> Indices:
    """Rows of `size`, the last one completed from the start."""
    return np.resize(order, (-(-len(order) // size), size))
