"""Which questions does a benchmark name stand for?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from vlmx.data.mini import study
from vlmx.data.records import Question
from vlmx.registry import Registry, unknown_name

MINI = "mini"

BENCHMARKS: Registry[Callable[[], list[Question]]] = Registry(
    "benchmark", group="vlmx.benchmarks", listing="vlmx list benchmarks"
)
for _name in study.BENCHMARKS:
    BENCHMARKS.add(_name, partial(study.questions, _name))


def benchmark_names() -> list[str]:
    """All benchmarks, sorted."""
    return BENCHMARKS.names()


def load_benchmark(name: str) -> list[Question]:
    """The questions of one benchmark, in an order that never changes.

    Raises:
        UnknownNameError: no such benchmark.
    """
    return BENCHMARKS.get(name)()


def expand(names: str) -> list[str]:
    """A comma-separated list of benchmarks as names; "mini" stands for all of the mini study, in the study's order.

    Raises:
        UnknownNameError: one of them does not exist.
    """
    result: list[str] = []
    for name in (part.strip() for part in names.split(",")):
        if name == MINI:
            result += study.BENCHMARKS
        elif name in BENCHMARKS.names():
            result.append(name)
        else:
            raise unknown_name("benchmark", name, [MINI, *BENCHMARKS.names()], listing=BENCHMARKS.listing)
    return list(dict.fromkeys(result))
