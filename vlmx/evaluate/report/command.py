"""What does `vlmx report` take, and what does it print? Light until it runs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from vlmx.console import note, table, warn
from vlmx.evaluate.command import RUNS_ROOT, boxes_option, caches_option, complete_run
from vlmx.runs import RunFolder

if TYPE_CHECKING:
    from vlmx.evaluate.report.collect import Report
    from vlmx.evaluate.score import Score

_PARTIAL = "†"

EPILOG = """\b
Worked examples:
  vlmx report runs/vit-mlp2 runs/vmamba-mlp2 -o report.html
  vlmx report runs/* --published --latex table.tex --csv table.csv
      with the paper's 99 models, and all rows as the paper's tables have them
  vlmx report runs/* --scores scores.csv
      every score with its interval, its baselines and where it comes from

\b
The page needs no network. Similarity maps are in it where the caches are at hand, photos where they lie below the data
root. Scores over a part of a benchmark's questions are marked wherever they stand.
"""


_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(epilog=EPILOG)
@click.argument("run_names", metavar="[RUNS]...", nargs=-1, shell_complete=complete_run)
@click.option("-o", "--out", type=_FILE, default=Path("report.html"), show_default=True, help="The page to write.")
@click.option("--published", is_flag=True, help="Show the paper's 99 models, too; also without any run.")
@click.option(
    "--row",
    "rows",
    metavar="ROW",
    multiple=True,
    help="Compare with this published row (vlmx list rows); once for all runs, or once for each. Default: the row with "
    "the same encoder, input size and connector.",
)
@click.option("--latex", "latex_path", type=_FILE, help="Write rows of the paper's two tables as LaTeX, too.")
@click.option("--csv", "csv_path", type=_FILE, help="Write rows with the columns of the paper's tables as CSV, too.")
@click.option("--scores", "scores_path", type=_FILE, help="Write all scores with their origin as CSV, too.")
@boxes_option
@caches_option
@click.option(
    "--data-root",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where published benchmarks and their photos lie. Default: where they were when the questions were answered.",
)
def report(
    run_names: tuple[str, ...],
    out: Path,
    published: bool,
    rows: tuple[str, ...],
    latex_path: Path | None,
    csv_path: Path | None,
    scores_path: Path | None,
    boxes: str,
    caches: str,
    data_root: Path | None,
) -> None:
    """Compare runs on one HTML page that needs no network, and print the result table.

    RUNS are folders, names, beginnings of names below runs/, or 'latest'.
    """
    from vlmx.evaluate.report.collect import collect, score_rows
    from vlmx.evaluate.report.html import render
    from vlmx.evaluate.report.paper_table import paper_table, to_csv, to_latex
    from vlmx.evaluate.score import BoxRule
    from vlmx.runs import write_atomic

    rule = next(known for known in get_args(BoxRule) if known == boxes)
    runs = [RunFolder.open(name, root=RUNS_ROOT) for name in run_names]
    found = collect(runs, caches=caches, published=published, rows=rows, box_rule=rule, data_root=data_root)
    write_atomic(out, render(found))
    if found.runs:
        _print(found)
    as_printed = paper_table(found)
    if latex_path is not None:
        write_atomic(latex_path, to_latex(as_printed))
        note(f"LaTeX: {latex_path}")
    if csv_path is not None:
        write_atomic(csv_path, to_csv(as_printed))
        note(f"rows: {csv_path}")
    if scores_path is not None:
        write_atomic(scores_path, _csv(score_rows(found)))
        note(f"scores: {scores_path}")
    note(f"report: {out.resolve()}")


def _csv(rows: Sequence[Mapping[str, object]]) -> str:
    buffer = io.StringIO()
    if rows:
        writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return buffer.getvalue()


def _print(found: Report) -> None:
    from vlmx.evaluate.report.html import alarm_of
    from vlmx.evaluate.report.paper_table import title_of
    from vlmx.evaluate.report.rankings import SUBJECT_TEXT

    columns = ["run", *map(title_of, found.benchmarks), "VQA", "boxes", "overall"]
    rows = []
    for name in ("prior", "random_object"):
        values = [found.baselines_of(benchmark).get(name) for benchmark in found.benchmarks]
        if any(value is not None for value in values):
            cells = ["" if value is None else f"{value:.1f}" for value in values]
            rows.append((name.replace("_", " "), *cells, "", "", ""))
    for run in found.runs:
        cells = [_cell(run.scores.get(benchmark)) for benchmark in found.benchmarks]
        means = [
            f"{run.pooled[group].score:.1f}{_PARTIAL if found.parts_of(run, group) else ''}"
            if group in run.pooled
            else ""
            for group in ("VQA", "boxes", "overall")
        ]
        rows.append((run.name, *cells, *means))
        if run.control_scores:
            control = [_cell(run.control_scores.get(benchmark)) for benchmark in found.benchmarks]
            rows.append(("  images shuffled", *control, "", "", ""))
    is_marked = any(_PARTIAL in cell for row in rows for cell in row[1:])
    meaning = f"{_PARTIAL} not over all of the benchmark's questions; in averages, or not over all benchmarks"
    table(columns, rows, title=meaning if is_marked else "")
    for subject, ranked in groupby(found.rankings, key=attrgetter("subject")):
        click.echo(f"{SUBJECT_TEXT[subject]}:")
        for ranking in ranked:
            if not ranking.steps:
                click.echo(f"  {ranking.group}: {ranking.basis}")
            for step in ranking.steps:
                click.echo(f"  {step.sentence(ranking.group)}")
    for run in found.runs:
        if alarm := alarm_of(run):
            warn(alarm)


def _cell(score: Score | None) -> str:
    from vlmx.evaluate.beside import part_of

    return "" if score is None else f"{score.score:.1f}{_PARTIAL if part_of(score) else ''}"
