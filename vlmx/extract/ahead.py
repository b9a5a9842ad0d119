"""How do threads work ahead of their consumer, while the results keep their order and memory stays bounded?"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def work_ahead(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], *, ahead: int
) -> Iterator[Result]:
    """`work(item)` for every item, in order; at most `ahead` results are under way or waiting.

    An exception of `work` is raised when its result would have been yielded.
    """
    remaining = iter(items)
    waiting: deque[Future[Result]] = deque(pool.submit(work, item) for item in islice(remaining, ahead))
    try:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(work, item) for item in islice(remaining, 1))
            yield result
    finally:
        for future in waiting:
            future.cancel()
