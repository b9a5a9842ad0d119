"""How is a global batch divided into micro-batches that are equally dear? By padded tokens, not by number of examples.

The loss of a step is a sum over tokens divided by the number of them in the whole global batch, so any division gives
the same gradient, and a process need not have as many examples as the next. What is the same on all processes is the
number of micro-batches: their collectives (FSDP gathers weights in each) stay in step, and each lasts as long as the
dearest of them.

A micro-batch costs its padded tokens: rows x the longest row. Of all ways to cut the batch into a number of
micro-batches, one whose dearest is cheapest keeps examples of like length together: sort by length, fill each up to a
ceiling, and search for the lowest ceiling that needs no more than that number.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmx.errors import UsageError


def plan_micro_batches(lengths: Sequence[int], world: int, max_tokens: int) -> list[list[list[int]]]:
    """Divide a global batch: a pure function of the lengths.

    The number of micro-batches of a process is the least with which all stay within the budget; they are then made as
    equal as they can be. The dearest come first, so that memory that does not suffice is noticed at once.

    Args:
        lengths: tokens of each example, visual ones included.
        world: number of processes.
        max_tokens: budget of a micro-batch, in padded tokens. An example that is longer gets a micro-batch of its own.

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
    steps = -(-len(_cut(falling, max_tokens)) // world)
    cuts = _even_cut(falling, steps * world, max_tokens)
    while len(cuts) < steps * world:
        _halve_dearest(cuts, falling)
    cuts.sort(key=lambda cut: -_cost(cut, falling))
    micro_batches = [order[cut.start : cut.stop] for cut in cuts]
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
