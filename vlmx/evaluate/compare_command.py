"""What does `vlmx compare` take, and what does it print? Light until it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from vlmx.cache_specs.command import json_option
from vlmx.console import note, table, warn
from vlmx.errors import RunError, UsageError
from vlmx.evaluate.command import RUNS_ROOT, boxes_option, complete_run
from vlmx.runs import RunFolder, write_atomic

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from vlmx.evaluate.beside import PaperLine
    from vlmx.evaluate.beside_run import Graded, PairLine

EPILOG = """\b
Worked examples:
  vlmx compare runs/vmamba-mlp2 runs/vmamba-mlp3
      paired differences on every benchmark that both answered, and in the averages
  vlmx compare runs/vmamba-s-coco --paper
      our numbers beside those of the published row that the run corresponds to
  vlmx compare latest --paper --row vmamba-s-coco@512/mlp3 --boxes paper
      beside a row that is named, with boxes compared as the paper's evaluation does it

\b
Intervals are 95 %, by bootstrap over images; those of two runs are paired. A published number is taken as it stands.
"""


_YES_NO = {True: "yes", False: "no", None: "-"}


def _complete_row(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from vlmx.cache_specs.presets import presets

    return [CompletionItem(row.name) for row in presets() if row.name.startswith(incomplete)]


@click.command("compare", epilog=EPILOG, short_help="Compare runs with each other or with the paper.")
@click.argument("run_names", metavar="RUNS...", nargs=-1, required=True, shell_complete=complete_run)
@click.option("--paper", is_flag=True, help="Each run beside the published row that it corresponds to.")
@click.option(
    "--row",
    "row_names",
    metavar="ROW",
    multiple=True,
    shell_complete=_complete_row,
    help="With --paper: the row (vlmx list rows); once for all runs, or once for each.",
)
@boxes_option
@click.option(
    "--data-root", metavar="FOLDER", help="Where the benchmarks' files are. Default: where they were when answered."
)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path, dir_okay=False), help="Write all lines as CSV, too.")
@json_option
def compare(
    run_names: tuple[str, ...],
    paper: bool,
    row_names: tuple[str, ...],
    boxes: str,
    data_root: str | None,
    csv_path: Path | None,
    as_json: bool,
) -> None:
    """Compare runs with each other, question by question, or with the paper's numbers.

    RUNS are folders, names, beginnings of names below runs/, or 'latest'. The collapse alarm is raised when boxes have
    fallen while text answers hold.
    """
    from vlmx.evaluate.beside_run import read_graded
    from vlmx.evaluate.paper_rows import named_rows
    from vlmx.evaluate.score import BoxRule

    _check(run_names, paper, row_names)
    rows = named_rows(row_names, len(run_names))
    runs = [RunFolder.open(name, root=RUNS_ROOT) for name in run_names]
    if len({run.name for run in runs}) < len(runs):
        paths = ", ".join(str(run.path) for run in runs)
        raise RunError("two of the runs have the same name", why=paths, fix="name different ones, or rename a folder")
    rule = next(known for known in get_args(BoxRule) if known == boxes)
    graded = [read_graded(run, box_rule=rule, data_root=data_root) for run in runs]
    found = _beside_paper(runs, graded, rows) if paper else _beside_runs(graded)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        for one in found:
            (_show_paper if paper else _show_pair)(one)
    if csv_path is not None:
        write_atomic(csv_path, _csv(found))
        note(f"lines: {csv_path}")


def _check(run_names: Sequence[str], paper: bool, row_names: Sequence[str]) -> None:
    """Make sure that the options go together.

    Raises:
        UsageError: they do not.
    """
    if row_names and not paper:
        raise UsageError("--row changes nothing without --paper", fix="add --paper, or leave --row out")
    if not paper and len(run_names) < 2:
        raise UsageError(
            "one run alone has nothing to be compared with",
            fix="name a second run, or add --paper for its published row",
        )


def _beside_paper(
    runs: Sequence[RunFolder], graded: Sequence[Graded], row_names: Sequence[str | None]
) -> list[dict[str, Any]]:
    """Each run that has a row beside that row, as plain data; what has none is warned of.

    Raises:
        UsageError: no run has a row and a benchmark of the paper.
        UnknownNameError: one of `row_names` is no row.
    """
    from vlmx.evaluate.beside import beside_paper
    from vlmx.evaluate.paper_rows import row_of_run

    found, lacking = [], []
    for run, of_run, name in zip(runs, graded, row_names, strict=True):
        score = next(iter(of_run.scores.values()))
        match = row_of_run(run, cache=score.cache, encoder_weights=score.encoder_weights, row=name)
        if match.row is None:
            lacking.append(f"{run.name}: {match.remarks[0]}")
            continue
        beside = beside_paper(of_run.scores, of_run.grades, match.row)
        if not beside.lines:
            lacking.append(f"{run.name}: the paper has none of its benchmarks ({', '.join(beside.left_out)})")
            continue
        alarm = ""
        if beside.collapse is not None:
            alarm = beside.collapse.sentence(
                run.name, match.row.name, connector=of_run.connector, resolution=of_run.resolution
            )
        found.append(
            {
                "run": run.name,
                "row": match.row.name,
                "label": match.row.label,
                "row_called_collapsed": match.row.called_collapsed,
                "remarks": [*match.remarks, *([beside.remark] if beside.remark else [])],
                "lines": [_paper_line(line) for line in (*beside.lines, *beside.averages)],
                "left_out": list(beside.left_out),
                "alarm": alarm,
            }
        )
    if not found:
        raise UsageError("nothing can be compared with the paper", why="; ".join(lacking))
    for line in lacking:
        warn(line)
    return found


def _beside_runs(graded: Sequence[Graded]) -> list[dict[str, Any]]:
    """Every two runs beside each other, as plain data.

    Raises:
        UsageError: no two of them answered a benchmark or a question in common.
    """
    from vlmx.evaluate.beside_run import beside_run

    found, lacking, fixes = [], [], []
    for first, second in combinations(graded, 2):
        try:
            beside = beside_run(first, second)
        except UsageError as error:  # no question of a benchmark in common; other runs may have some
            lacking.append(": ".join(filter(None, [error.what, error.why])))
            fixes.append(error.fix)
            continue
        if not beside.lines:
            lacking.append(f"'{first.name}' and '{second.name}' have answered no benchmark in common")
            continue
        found.append(
            {
                "first": first.name,
                "second": second.name,
                "lines": [_pair_line(line) for line in (*beside.lines, *beside.averages)],
                "left_out": list(beside.left_out),
                "nothing_common": dict(beside.nothing_common),
                "alarm": beside.alarm,
            }
        )
    if not found:
        raise UsageError("the runs cannot be compared", why="; ".join(lacking), fix="; ".join(dict.fromkeys(fixes)))
    for line in lacking:
        warn(line)
    return found


def _paper_line(line: PaperLine) -> dict[str, Any]:
    return {
        **asdict(line),
        "difference": line.difference,
        "difference95": line.difference95,
        "within": line.within,
    }


def _pair_line(line: PairLine) -> dict[str, Any]:
    difference = line.difference
    return {
        "name": line.name,
        "first": difference.first_percent,
        "second": difference.second_percent,
        "difference": difference.points,
        "difference95": difference.interval95,
        "separable": difference.separable,
        "n": difference.n,
        "not_the_same": difference.unlike,
        "marks": line.marks,
    }


def _show_paper(one: Mapping[str, Any]) -> None:
    rows = [
        (
            _text(line["name"]),
            f"{line['ours']:.2f}",
            f"{line['published']:.2f}",
            f"{line['difference']:+.2f}",
            _interval(line["difference95"]),
            _YES_NO[line["within"]],
            f"{line['ours_exact']:.4f}",
            f"{line['n']:,}",
            ", ".join(line["marks"]),
        )
        for line in one["lines"]
    ]
    columns = ["percent", "ours", "paper", "difference", "its 95 % interval", "paper within", "unrounded", "questions"]
    table([*columns, "marks"], rows, title=f"{one['run']} beside {one['row']} ({one['label']})")
    for remark in one["remarks"]:
        click.echo(f"not as in the paper: {remark}")
    if one["row_called_collapsed"]:
        click.echo("the paper calls this row itself a localization collapse (section 4.4.2)")
    _show_rest(one)


def _show_pair(one: Mapping[str, Any]) -> None:
    from vlmx.evaluate.beside import AVERAGE_TEXT
    from vlmx.evaluate.compare import SAME_FILES, unlike_text

    rows = [
        (
            _text(line["name"]),
            f"{line['first']:.2f}",
            f"{line['second']:.2f}",
            f"{line['difference']:+.2f}",
            _interval(line["difference95"]),
            _YES_NO[line["separable"]],
            f"{line['n']:,}",
            ", ".join(line["marks"]),
        )
        for line in one["lines"]
    ]
    columns = [one["first"], one["second"], "difference", "its 95 % interval", "separable", "questions", "marks"]
    table(["percent", *columns], rows, title=f"{one['first']} beside {one['second']}")
    for line in one["lines"]:
        if line["not_the_same"] and line["name"] not in AVERAGE_TEXT:
            warn(f"{line['name']}: left out are {unlike_text(line['not_the_same'])}; {SAME_FILES}")
    for name, unlike in one["nothing_common"].items():
        why = f": {unlike_text(unlike)}; {SAME_FILES}" if unlike else ""
        warn(f"{name}: left out, the runs have answered no question of it in common{why}")
    _show_rest(one)


def _show_rest(one: Mapping[str, Any]) -> None:
    if one["left_out"]:
        click.echo(f"left out, the other side does not have them: {', '.join(one['left_out'])}")
    if one["alarm"]:
        warn(one["alarm"])


def _text(name: str) -> str:
    from vlmx.evaluate.beside import AVERAGE_TEXT

    return next((text for average, text in AVERAGE_TEXT.items() if average == name), name)


def _interval(interval95: Sequence[float]) -> str:
    low, high = interval95
    return f"[{low:+.2f}, {high:+.2f}]"


def _csv(found: Sequence[Mapping[str, Any]]) -> str:
    """One row for each line of each comparison; intervals as two columns, marks joined with a semicolon."""
    import csv
    import io

    rows = []
    for one in found:
        who = {key: one[key] for key in ("run", "row", "first", "second") if key in one and isinstance(one[key], str)}
        for line in one["lines"]:
            flat: dict[str, Any] = {f"{key}_run" if key in ("first", "second") else key: who[key] for key in who}
            for key, value in line.items():
                if key.endswith("95"):
                    flat |= {f"{key.removesuffix('95')}_low95": value[0], f"{key.removesuffix('95')}_high95": value[1]}
                else:
                    flat[key] = "; ".join(value) if key == "marks" else value
            rows.append(flat)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
