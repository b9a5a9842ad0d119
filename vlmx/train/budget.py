"""How is a global batch divided into micro-batches that are equally dear? By tokens, not by number of examples.

The loss of a step is a sum over tokens divided by the number of them in the whole global batch, so any division gives
the same gradient, and a process need not have as many examples as the next. What is the same on all processes is the
number of micro-batches: their collectives (FSDP gathers weights in each) stay in step, and each lasts as long as the
dearest of them.

A micro-batch costs its padded tokens: rows x the longest row. Of all ways to cut the batch into a number of
micro-batches, one whose dearest is cheapest keeps examples of like length together: sort by length, fill each up to a
ceiling, and search for the lowest ceiling that needs no more than that number. Packed rows cost their own tokens, and
each example, the longest first, goes to the micro-batch that costs least so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from vlmx.errors import UsageError


def plan_micro_batches(
    lengths: Sequence[int], world: int, max_tokens: int, *, packed: bool = False
) -> list[list[list[int]]]:
    """Divide a global batch: a pure function of the lengths.

    The number of micro-batches of a process is the least with which all stay within the budget; they are then made as
    equal as they can be. The dearest come first, so that memory that does not suffice is noticed at once.

    Args:
        lengths: tokens of each example, visual ones included.
        world: number of processes.
        max_tokens: budget of a micro-batch, in padded tokens. An example that is longer gets a micro-batch of its own.
        packed: nothing is padded, so a micro-batch costs the sum of its lengths.

    Returns:
        [process][micro-batch] -> positions in `lengths`, longest first. Every process has as many micro-batches, none
        is empty, and every position occurs once.

    Raises:
        UsageError: the examples cannot be divided evenly among the processes, so that one could go without.
    """
    if not lengths or len(lengths) % world:
        raise UsageError(
            f"a global batch of {len(lengths)} cannot be divided among {world} processes",
            why="every process must have as many micro-batches, and none of them may be empty",
            fix="set global_batch to a multiple of the number of processes",
        )
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    falling = [lengths[position] for position in order]
    parts = _deal(falling, world, max_tokens) if packed else _cuts(falling, world, max_tokens)
    micro_batches = [[order[index] for index in part] for part in parts]
    steps = len(parts) // world
    plan: list[list[list[int]]] = [[] for _ in range(world)]
    for step in range(steps):
        row = micro_batches[step * world : (step + 1) * world]
        for rank, micro_batch in enumerate(
            reversed(row) if step % 2 else row
        ):  # so that no process has all the dear ones
            plan[rank].append(micro_batch)
    return plan


def padded_tokens(lengths: Sequence[int], micro_batch: Sequence[int]) -> int:
    """What a micro-batch costs: its rows, each padded to the longest."""
    return len(micro_batch) * max(lengths[position] for position in micro_batch)


def _deal(falling: Sequence[int], world: int, max_tokens: int) -> list[list[int]]:
    """Parts that are as equal in tokens as this makes them, the dearest first; as many for each process."""
    steps = -(-sum(falling) // (world * max_tokens))
    while True:
        parts: list[list[int]] = [[] for _ in range(min(steps * world, len(falling)))]
        least = [(0, number) for number in range(len(parts))]
        for index, length in enumerate(falling):
            tokens, number = heappop(least)
            parts[number].append(index)
            heappush(least, (tokens + length, number))
        tokens_of = {number: tokens for tokens, number in least}
        if all(len(part) == 1 or tokens_of[number] <= max_tokens for number, part in enumerate(parts)):
            return [parts[number] for number in sorted(tokens_of, key=lambda number: -tokens_of[number])]
        steps += 1


def _cuts(falling: Sequence[int], world: int, max_tokens: int) -> list[range]:
    """Parts of like lengths whose dearest is as cheap as can be, the dearest first; as many for each process."""
    count = -(-len(_cut(falling, max_tokens)) // world) * world
    cuts = _even_cut(falling, count, max_tokens)
    while len(cuts) < count:
        _halve_dearest(cuts, falling)
    return sorted(cuts, key=lambda cut: -_cost(cut, falling))


def _cut(falling: Sequence[int], ceiling: int) -> list[range]:
    """Parts of lengths that never rise, each as large as the ceiling allows, and at least one example."""
    cuts, start = [], 0
    while start < len(falling):
        stop = min(len(falling), start + max(1, ceiling // falling[start]))
        cuts.append(range(start, stop))
        start = stop
    return cuts


def _even_cut(falling: Sequence[int], most: int, max_tokens: int) -> list[range]:
    """At most `most` parts under the lowest ceiling with which there are no more."""
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_cut(falling, middle)) <= most:
            high = middle
        else:
            low = middle + 1
    return _cut(falling, low)


def _halve_dearest(cuts: list[range], falling: Sequence[int]) -> None:
    """Make two parts of the one that costs most among those of several examples."""
    dearest = max((i for i, cut in enumerate(cuts) if len(cut) > 1), key=lambda i: _cost(cuts[i], falling))
    cut = cuts[dearest]
    middle = (cut.start + cut.stop) // 2
    cuts[dearest : dearest + 1] = [range(cut.start, middle), range(middle, cut.stop)]


def _cost(cut: range, falling: Sequence[int]) -> int:
    return len(cut) * falling[cut.start]
