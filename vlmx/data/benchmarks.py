"""Which questions does a benchmark name stand for, and in which image table are their images?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from vlmx.data.mini import study
from vlmx.data.published import DATA_ROOT
from vlmx.data.records import Question
from vlmx.registry import Registry, unknown_name

MINI = "mini"
Wording = Literal["default", "paper"]  # how questions are worded: as in training, or as the paper's evaluation does it


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark, as it is registered.

    Attributes:
        name: what --bench takes.
        title: its name in the literature, and the split.
        table: the data set in whose image table its images are.
        load: from the data root and the wording to its questions, in an order that never changes.
    """

    name: str
    title: str
    table: str
    load: Callable[[Path, Wording], list[Question]]


def _mini(name: str, _root: Path, _wording: Wording) -> list[Question]:
    return study.questions(name)


BENCHMARKS: Registry[Benchmark] = Registry("benchmark", group="vlmx.benchmarks", listing="vlmx list benchmarks")
for _name in study.BENCHMARKS:
    BENCHMARKS.add(_name, Benchmark(name=_name, title=f"mini study, {_name}", table=MINI, load=partial(_mini, _name)))


def benchmark_names() -> list[str]:
    """All benchmarks, sorted."""
    return BENCHMARKS.names()


def load_benchmark(name: str, *, root: str | Path = DATA_ROOT, wording: Wording = "default") -> list[Question]:
    """The questions of one benchmark, in an order that never changes.

    Args:
        root: the data root, where its published files are; the mini study needs none.
        wording: "paper" where the paper's evaluation words a question in another way than its training did.

    Raises:
        UnknownNameError: no such benchmark.
        DataError: its files are missing or damaged.
    """
    return BENCHMARKS.get(name).load(Path(root), wording)


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
