"""What does `vlmx correlate` take, and what does it print? Light until it runs."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from vlmx.cache_specs.command import json_option
from vlmx.console import note, table
from vlmx.errors import UsageError
from vlmx.evaluate.command import RUNS_ROOT, boxes_option, complete_run
from vlmx.runs import RunFolder, write_atomic

if TYPE_CHECKING:
    from vlmx.evaluate.correlate import Correlation
    from vlmx.evaluate.score import BoxRule

PICTURES = (".png", ".svg", ".pdf")
_ON_ONE_LINE = 12  # columns with both ends of an interval on one line of the terminal

EPILOG = """\b
Worked examples:
  vlmx correlate --published
      the eleven benchmarks over the paper's 99 rows
  vlmx correlate --published --columns vqa,weighted_loc,in1k -o heat.png
      some columns, as a heat map
  vlmx correlate runs/* --published --interval bootstrap -o correlations.csv
      our runs and the paper's rows together

\b
Columns are benchmarks, weighted_vqa, weighted_loc, weighted_overall, macro (averages of models that have all their
benchmarks) and in1k (ImageNet-1K accuracy of the encoder, where the paper prints it). Groups: vqa, loc, averages, all.
"""


@click.command("correlate", epilog=EPILOG, short_help="Correlate benchmarks over runs or the paper's rows.")
@click.argument("run_names", metavar="[RUNS]...", nargs=-1, shell_complete=complete_run)
@click.option("--published", is_flag=True, help="The paper's 99 rows are models, too.")
@click.option("--columns", metavar="NAMES", help="Columns or groups, separated by commas.  [default: all benchmarks]")
@click.option(
    "--interval",
    type=click.Choice(["fisher", "bootstrap"]),
    default="fisher",
    show_default=True,
    help="Fisher's z, or models drawn again and again.",
)
@boxes_option
@click.option(
    "--data-root", metavar="FOLDER", help="Where the benchmarks' files are. Default: where they were when answered."
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Heat map (.png, .svg, .pdf) or all pairs (.csv).",
)
@json_option
def correlate(
    run_names: tuple[str, ...],
    published: bool,
    columns: str | None,
    interval: str,
    boxes: str,
    data_root: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Pearson's correlation between benchmarks, over runs, over the paper's rows, or both.

    RUNS are folders, names, beginnings of names below runs/, or 'latest'.
    """
    from vlmx.evaluate.correlate import AVERAGES, IN1K, Interval, expand_columns, known_columns, published_model
    from vlmx.evaluate.correlate import correlate as correlate_models
    from vlmx.evaluate.paper_rows import paper_rows
    from vlmx.evaluate.score import BoxRule

    if not run_names and not published:
        raise UsageError("there is nothing to correlate", fix="name runs, or give --published")
    if out is not None and out.suffix not in (*PICTURES, ".csv"):
        raise UsageError(f"{out} is of no known kind", fix=f"end it in {', '.join(PICTURES)} or .csv")
    rule = next(known for known in get_args(BoxRule) if known == boxes)
    models = [published_model(row) for row in paper_rows()] if published else []
    of_runs = [_model_of_run(run, rule, data_root, whole=published) for run in _different(run_names)]
    models += [model for model in of_runs if model]
    known = known_columns(models)
    default = [name for name in known if name not in (*AVERAGES, IN1K)]
    chosen = expand_columns(columns, known) if columns else default
    kind = next(known for known in get_args(Interval) if known == interval)
    found = correlate_models(models, chosen, interval=kind)
    if as_json:
        click.echo(json.dumps(_json(found), indent=1))
    else:
        _show(found, models)
    if out is not None:
        _write(out, found)
        note(f"{'pairs' if out.suffix == '.csv' else 'heat map'}: {out}")


def _different(run_names: Sequence[str]) -> list[RunFolder]:
    """The runs of these names.

    Raises:
        UsageError: one of them is named twice.
    """
    runs = [RunFolder.open(name, root=RUNS_ROOT) for name in run_names]
    paths = [run.path.resolve() for run in runs]
    twice = {str(run.path) for run in runs if paths.count(run.path.resolve()) > 1}
    if twice:
        raise UsageError("a run is named twice", why=", ".join(sorted(twice)), fix="name each run once")
    return runs


def _model_of_run(run: RunFolder, rule: BoxRule, data_root: str | None, *, whole: bool) -> dict[str, float]:
    """A run's numbers by column; what is only a part of a benchmark is noted.

    Args:
        run, rule, data_root: see `vlmx.evaluate.beside_run.read_graded`.
        whole: whether such parts are left out, as among published scores; then nothing may be left.

    Raises:
        RunError: the run has no answers, or some are damaged.
    """
    from vlmx.evaluate.beside import marks_of, part_of
    from vlmx.evaluate.beside_run import read_graded
    from vlmx.evaluate.correlate import scored_model
    from vlmx.evaluate.paper_rows import row_of_run

    graded = read_graded(run, box_rule=rule, data_root=data_root)
    parts = [name for name, score in graded.scores.items() if part_of(score)]
    for name in parts:
        left_out = "left out, " if whole else ""
        note(f"{run.name}, {name}: {left_out}{', '.join(marks_of(graded.scores[name]))}")
    scores = {name: score.score for name, score in graded.scores.items() if not (whole and name in parts)}
    if not scores:
        return {}
    first = next(iter(graded.scores.values()))
    match = row_of_run(run, cache=first.cache, encoder_weights=first.encoder_weights)
    return scored_model(scores, match.row)


def _json(found: Correlation) -> dict[str, Any]:
    return {
        "columns": list(found.columns),
        "models": found.models,
        "interval": found.interval,
        "pairs": _pairs(found),
    }


def _pairs(found: Correlation) -> list[dict[str, Any]]:
    rows = []
    for (first, second), cell in found.pairs.items():
        low, high = cell.interval95 or (None, None)
        rows.append(
            {
                "first": first,
                "second": second,
                "r": cell.r,
                "low95": low,
                "high95": high,
                "n": cell.n,
                "blank": cell.blank,
            }
        )
    return rows


def _show(found: Correlation, models: Sequence[Mapping[str, float]]) -> None:
    from vlmx.evaluate.correlate import INTERVAL_TEXT

    rows = []
    for number, first in enumerate(found.columns, start=1):
        rows.append((f"{number:>2} {first}", *(_cell(found, first, second) for second in found.columns)))
    table(["Pearson's r", *(str(number) for number in range(1, len(found.columns) + 1))], rows)
    note(f"{found.models} models; below each coefficient its 95 % interval ({INTERVAL_TEXT[found.interval]})")
    for count, names in sorted(_lacking(found, models).items()):
        note(f"only {count} of them have {', '.join(names)}")
    for reason in sorted({cell.blank for cell in found.pairs.values() if cell.blank}):
        note(f"blank: {reason}")


def _lacking(found: Correlation, models: Sequence[Mapping[str, float]]) -> dict[int, list[str]]:
    """Columns that not all models have, by how many have them."""
    counts = {name: sum(name in model for model in models) for name in found.columns}
    by_count: dict[int, list[str]] = {}
    for name, count in counts.items():
        if count < found.models:
            by_count.setdefault(count, []).append(name)
    return by_count


def _cell(found: Correlation, first: str, second: str) -> str:
    cell = found.cell(first, second)
    if cell is None:
        return "1"
    if cell.r is None or cell.interval95 is None:
        return "-"
    between = " " if len(found.columns) <= _ON_ONE_LINE else "\n"
    return f"{cell.r:.2f}\n{between.join(f'{edge:.2f}'.replace('0.', '.') for edge in cell.interval95)}"


def _write(path: Path, found: Correlation) -> None:
    if path.suffix == ".csv":
        import csv

        text = io.StringIO()
        rows = _pairs(found)
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(path, text.getvalue())
        return
    from vlmx.evaluate.correlate_plot import heat_map

    picture = io.BytesIO()
    heat_map(found).savefig(picture, format=path.suffix[1:], dpi=150)
    write_atomic(path, picture.getvalue())
