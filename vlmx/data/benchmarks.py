"""Which questions does a benchmark name stand for, and in which image table are their images?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vlmx.data.mini import study
from vlmx.data.published import DATA_ROOT
from vlmx.data.published_benchmarks import LOCALIZATION, PUBLISHED_BENCHMARKS, QUESTION_ANSWERING
from vlmx.data.records import Question
from vlmx.data.wording import Wording
from vlmx.registry import Registry, unknown_name

MINI = "mini"
GROUPS: dict[str, tuple[str, ...]] = {  # what several benchmarks are called together
    MINI: study.BENCHMARKS,
    "paper": tuple(PUBLISHED_BENCHMARKS),
    "vqa": QUESTION_ANSWERING,
    "loc": LOCALIZATION,
}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark, as it is registered.

    Attributes:
        name: what --bench takes.
        title: its name in the literature, and the split.
        table: the data set in whose image table its images are.
        load: from the data root and the wording to its questions, in an order that never changes.
        questions: how many it has as it is published: fewer than that are a part of it; None if only its files tell.
    """

    name: str
    title: str
    table: str
    load: Callable[[Path, Wording], list[Question]]
    questions: int | None = None


def _mini(name: str, _root: Path, _wording: Wording) -> list[Question]:
    return study.questions(name)


BENCHMARKS: Registry[Benchmark] = Registry("benchmark", group="vlmx.benchmarks", listing="vlmx list benchmarks")
for _name in study.BENCHMARKS:
    BENCHMARKS.add(_name, Benchmark(name=_name, title=f"mini study, {_name}", table=MINI, load=partial(_mini, _name)))
for _column in PUBLISHED_BENCHMARKS.values():
    BENCHMARKS.add(
        _column.name,
        Benchmark(
            name=_column.name,
            title=_column.title,
            table=_column.data.table,
            load=_column.load,
            questions=_column.questions,
        ),
    )


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
    """A comma-separated list of benchmarks as names, each once.

    Groups stand for their benchmarks, in the order of the study or of the paper's tables: "mini", "paper" (its eleven
    columns), "vqa" and "loc" (the paper's seven and four). A name may have - where the benchmark's has _.

    Raises:
        UnknownNameError: one of them does not exist.
    """
    known = BENCHMARKS.names()
    result: list[str] = []
    for name in (part.strip() for part in names.split(",")):
        if name in GROUPS:
            result += GROUPS[name]
        elif name in known:
            result.append(name)
        elif name.replace("-", "_") in known:
            result.append(name.replace("-", "_"))
        else:
            raise unknown_name("benchmark", name, [*GROUPS, *known], listing=BENCHMARKS.listing)
    return list(dict.fromkeys(result))
