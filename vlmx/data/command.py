"""What do `vlmx data check` and `vlmx data show` print? Whether benchmarks are whole, and what they ask."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from click.shell_completion import CompletionItem

from vlmx.data.published import DATA_ROOT
from vlmx.data.records import Question
from vlmx.data.wording import Wording
from vlmx.errors import DataError

if TYPE_CHECKING:
    from vlmx.data.check import BenchmarkReport, FileState

NOT_WHOLE = DataError.exit_code
_INDENT = " " * 13


def complete_benchmarks(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of benchmarks and of groups of them for the shell."""
    from vlmx.data.benchmarks import BENCHMARKS, GROUPS, benchmark_names

    named = [CompletionItem(name, help=BENCHMARKS.get(name).title) for name in benchmark_names()]
    groups = [CompletionItem(group, help=", ".join(members)) for group, members in GROUPS.items()]
    return [item for item in [*groups, *named] if item.value.startswith(incomplete)]


_DATA_ROOT = click.option(
    "--data-root",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(DATA_ROOT),
    show_default=True,
    metavar="FOLDER",
    help="Folder of the published data sets' files.",
)


@click.group()
def data() -> None:
    """Are the benchmarks' files whole, and what do they ask?

    \b
    vlmx data check                     all eleven benchmarks of the paper
    vlmx data check refcoco,pope        two of them
    vlmx data show textvqa_ocr -n 1     its first question as a model gets it, and the right answers
    """


@data.command()
@click.argument("names", nargs=-1, metavar="[BENCH]...", shell_complete=complete_benchmarks)
@_DATA_ROOT
@click.option("--no-images", is_flag=True, help="Look at the annotation files only, which is all that scoring needs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(names: tuple[str, ...], data_root: Path, no_images: bool, as_json: bool) -> None:
    """Count questions and photos, and say what is missing, where it comes from, and under which licence.

    BENCH is a benchmark or several with commas; "paper" (all eleven, the default), "vqa" and "loc" are groups. Exits
    with 0 if all of them are as published, else with 3.
    """
    from vlmx.data.benchmarks import expand
    from vlmx.data.check import check_benchmark

    reports = [check_benchmark(name, data_root, images=not no_images) for name in expand(",".join(names) or "paper")]
    if as_json:
        content = {
            "data_root": str(data_root),
            "whole": all(report.whole for report in reports),
            "benchmarks": [_as_json(report) for report in reports],
        }
        click.echo(json.dumps(content, indent=2))
    else:
        for report in reports:
            click.echo("\n".join(_lines(report)))
        click.echo(f"{sum(report.whole for report in reports)} of {len(reports)} benchmarks are whole in {data_root}")
    if not all(report.whole for report in reports):
        click.get_current_context().exit(NOT_WHOLE)


def _as_json(report: BenchmarkReport) -> dict[str, Any]:
    files = [{**asdict(each.download), "there": each.there} for each in report.files]
    return {**asdict(report), "whole": report.whole, "files": files}


def _lines(report: BenchmarkReport) -> list[str]:
    lines = [f"{report.name:<12} {report.title}: {_counts(report)}"]
    lines += [f"{_INDENT}{line}" for each in report.files for line in _file_lines(each, short=report.whole)]
    for problem in report.problems:
        shown = [("problem", problem.what), ("why", problem.why), ("fix", problem.fix)]
        lines += [f"{_INDENT}{label:<8} {text}" for label, text in shown if text]
    return [*lines, ""]


def _counts(report: BenchmarkReport) -> str:
    if report.questions is None or report.images is None:
        return "not readable"
    parts = ", ".join(f"{count.found:,} {part}" for part, count in report.parts.items())
    counted = f"{report.questions.found:,} questions" + (f" ({parts})" if parts else "")
    return ("whole, " if report.whole else "") + f"{counted} about {report.images.found:,} images"


def _file_lines(state: FileState, *, short: bool) -> list[str]:
    each = state.download
    lines = [f"{'ok' if state.there else 'missing':<8} {each.path}  [{each.licence}]"]
    if short:
        return lines
    more = [f"from {each.url}", each.remarks]
    return [*lines, *(f"{'':<8}   {text}" for text in more if text)]


@data.command()
@click.argument("name", metavar="BENCH", shell_complete=complete_benchmarks)
@_DATA_ROOT
@click.option("-n", "count", type=click.IntRange(1), default=3, show_default=True, help="How many questions.")
@click.option(
    "--prompts",
    "wording",
    type=click.Choice(get_args(Wording)),
    default="default",
    show_default=True,
    help="As in the training data, or as in the paper's evaluation where that differs.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def show(name: str, data_root: Path, count: int, wording: Wording, as_json: bool) -> None:
    """Show the first questions of BENCH as a model gets them, with their right answers."""
    from vlmx.data.benchmarks import expand, load_benchmark

    for benchmark in expand(name):
        for question in load_benchmark(benchmark, root=data_root, wording=wording)[:count]:
            click.echo(json.dumps(asdict(question)) if as_json else "\n".join(_question_lines(question)))


def _question_lines(question: Question) -> list[str]:
    lines = [f"{question.benchmark} {question.id}  ({question.question_type})  {question.image}"]
    lines += [f"    {line}" for line in question.prompt.split("\n")]
    if question.kind == "box":
        (x1, y1, x2, y2), (width, height) = question.region
        right = f"box {x1:g}, {y1:g}, {x2:g}, {y2:g} (corners, pixels) in {width} x {height}"
        right += f", one of {len(question.object_boxes)} objects" if question.object_boxes else ""
    else:
        said = Counter(question.answers).most_common()
        right = " | ".join(f"{answer} ({times}x)" if times > 1 else answer for answer, times in said)
    asked = f"    asked for the probabilities of {', '.join(question.options)}" if question.options else ""
    return [*lines, *([asked] if asked else []), f"    right: {right}", ""]
