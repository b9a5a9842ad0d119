"""What do `vlmx eval`, `score`, `probe` and `report` take, and what do they print? Light until one of them runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from click.shell_completion import CompletionItem

from vlmx.cache_specs.command import complete_caches
from vlmx.console import note, table
from vlmx.errors import UsageError
from vlmx.runs import RunFolder, list_runs

if TYPE_CHECKING:
    from vlmx.evaluate.report.collect import Report
    from vlmx.evaluate.score import Score

RUNS_ROOT = Path("runs")

EVAL_EPILOG = """\b
Worked examples:
  vlmx eval --run latest
      every benchmark of the mini study with the model trained last
  vlmx eval --run vmamba-mlp2 --bench mini-ref,mini-count --limit 200
      a fixed subset of 200 questions each; every score says that it is partial
  vlmx eval --run vmamba-mlp2 --control shuffled
      the same questions with the tokens of other images: what is left is guessing
  vlmx eval --run vmamba-mlp2 --cache none --weights vmamba_s.pth
      no cache: the run's encoder works on the fly (needs the images and phase one's libraries)

\b
Answers go to RUN/eval/BENCHMARK/answers.jsonl (shuffled: RUN/eval-shuffled/...), scores beside them. Questions that are
answered already are not asked again. Images of the mini study are looked up in the data set 'mini' of the caches, those
of any other benchmark in the data set of the benchmark's name.
"""
SCORE_EPILOG = """\b
Worked examples:
  vlmx score latest
  vlmx score runs/vmamba-mlp2 --boxes paper
      boxes as the paper's evaluation takes them: letterbox ignored, true boxes rounded to two decimals
"""
PROBE_EPILOG = """\b
Worked example:
  vlmx extract --backbone vmamba-mini-scenes && vlmx probe --cache vmamba-mini-scenes
  vlmx probe --cache vit-mini-scenes+vmamba-mini-scenes
      the tokens of two caches, joined on the channel axis
"""
REPORT_EPILOG = """\b
Worked examples:
  vlmx report runs/vit-mlp2 runs/vmamba-mlp2 -o report.html
  vlmx report runs/* --csv scores.csv
"""


def complete_run(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of runs for the shell."""
    return [CompletionItem(name) for name in [*list_runs(RUNS_ROOT), "latest"] if name.startswith(incomplete)]


caches_option = click.option(
    "--caches", metavar="FOLDER", default="caches", show_default=True, help="Folder or url of all caches."
)
RUN_HELP = "Folder, name, beginning of a name below runs/, or 'latest'."


@click.command("eval", epilog=EVAL_EPILOG)
@click.option("--run", "run_name", required=True, metavar="RUN", shell_complete=complete_run, help=RUN_HELP)
@click.option(
    "--bench", "names", default="mini", show_default=True, metavar="NAMES", help="Benchmarks, separated by commas."
)
@caches_option
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Ask a fixed subset of N questions of each benchmark."
)
@click.option(
    "--control",
    type=click.Choice(["none", "shuffled"]),
    default="none",
    show_default=True,
    help="shuffled: tokens of other images.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Questions generated together."
)
@click.option("--pull", metavar="FOLDER", help="Copy a remote cache to this folder, shard by shard, as it is used.")
@click.option(
    "--cache", type=click.Choice(["none"]), help="none: encode on the fly. Default: the cache of the run's encoder."
)
@click.option("--backbone", metavar="NAME", help="With --cache none: the encoder. Default: the run's.")
@click.option("--res", metavar="RES", help="With --cache none: its input size. Default: the run's.")
@click.option("--weights", metavar="FILE", help="With --cache none: its checkpoint. Default: looked up.")
@click.option("--image-root", metavar="FOLDER", help="With --cache none: where the image paths of a JSON start.")
@click.argument("overrides", nargs=-1, metavar="[stream.KEY=VALUE]...")
def evaluate(
    run_name: str,
    names: str,
    caches: str,
    limit: int | None,
    control: str,
    batch_size: int,
    pull: str | None,
    cache: str | None,
    overrides: tuple[str, ...],
    **encoder: str | None,
) -> None:
    """Answer benchmarks with a trained model, from cached tokens, and score the answers.

    With --cache none, whatever else `vlmx train` takes as stream.KEY=VALUE can be given, too.
    """
    from vlmx.data.benchmarks import expand
    from vlmx.evaluate.answers import Control
    from vlmx.evaluate.predict import predict_run
    from vlmx.evaluate.score import score_run

    run = RunFolder.open(run_name, root=RUNS_ROOT)
    chosen = next(known for known in get_args(Control) if known == control)
    benchmarks = expand(names)
    given = {key: value for key, value in encoder.items() if value is not None}
    stream = _stream(cache, given, list(overrides))
    predict_run(
        run, benchmarks, caches=caches, limit=limit, control=chosen, batch_size=batch_size, stream=stream, pull=pull
    )
    _print_scores([s for s in score_run(run) if s.benchmark in benchmarks and s.control == chosen], title=run.name)


def _stream(cache: str | None, given: dict[str, str], overrides: list[str]) -> dict[str, Any] | None:
    """What was said about encoding on the fly; None when a cache is meant.

    Raises:
        UsageError: something was said, but not --cache none.
        ConfigError: an override is not of the group stream, or is wrong.
    """
    from vlmx.cache_specs.streams import StreamConfig
    from vlmx.config import load_config

    if cache is None:
        if given or overrides:
            raise UsageError(
                "what is said about the encoder changes nothing",
                why=", ".join([*(f"--{key.replace('_', '-')}" for key in given), *overrides]),
                fix="add --cache none, or leave it out",
            )
        return None
    strange = [item for item in overrides if not item.startswith("stream.")]
    if strange:
        raise UsageError(f"'{strange[0]}' is not an override of the encoder", fix="write stream.KEY=VALUE")
    config = load_config(StreamConfig, None, [item.removeprefix("stream.") for item in overrides], **given)
    return config.model_dump(exclude_unset=True)


@click.command(epilog=SCORE_EPILOG)
@click.argument("run_name", metavar="RUN", shell_complete=complete_run)
@click.option(
    "--boxes", type=click.Choice(["exact", "paper"]), default="exact", show_default=True, help="How boxes are compared."
)
def score(run_name: str, boxes: str) -> None:
    """Score the answers of a run again; nothing is generated.

    RUN is a folder, a name, the beginning of a name below runs/, or 'latest'.
    """
    from vlmx.evaluate.score import BoxRule, score_run

    run = RunFolder.open(run_name, root=RUNS_ROOT)
    rule = next(known for known in get_args(BoxRule) if known == boxes)
    _print_scores(score_run(run, box_rule=rule), title=run.name)


@click.command(epilog=PROBE_EPILOG)
@click.option(
    "--cache",
    "name",
    required=True,
    metavar="CACHE",
    shell_complete=complete_caches,
    help="Name, beginning of a name, or folder; A+B joins two.",
)
@caches_option
def probe(name: str, caches: str) -> None:
    """Read position and boxes linearly from frozen tokens of the mini study, without any LLM.

    The result is printed, and kept in FOLDER/probes for `vlmx report`.
    """
    from vlmx.cache_specs.reader import open_cache
    from vlmx.evaluate.probe import probe_cache, write_probe

    result = probe_cache(open_cache(name, caches), caches)
    write_probe(caches, result)
    rows = [
        ("position of the token, R squared", f"{result.position_r2:.3f}", ""),
        ("object or not, area under ROC", f"{result.objectness_auc:.3f}", f"{result.objectness_auc_position:.3f}"),
        ("box at IoU 0.5, percent", f"{result.box_hit:.1f}", f"{result.box_hit_position:.1f}"),
        ("box, mean IoU in percent", f"{result.box_iou:.1f}", f"{result.box_iou_position:.1f}"),
    ]
    table(["linear probe", "token", "position only"], rows, title=result.backbone)
    note(f"{result.train_scenes} train scenes, {result.test_scenes} held-out ones; cache {result.cache}")


@click.command(epilog=REPORT_EPILOG)
@click.argument("run_names", metavar="RUNS...", nargs=-1, required=True, shell_complete=complete_run)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    help="The page to write.",
)
@click.option(
    "--csv",
    "csv_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write all scores with their origin as CSV, too.",
)
@caches_option
def report(run_names: tuple[str, ...], out: Path, csv_path: Path | None, caches: str) -> None:
    """Compare runs on one HTML page that needs no network, and print the result table.

    RUNS are folders, names, beginnings of names below runs/, or 'latest'.
    """
    from vlmx.evaluate.report.collect import collect, score_rows
    from vlmx.evaluate.report.html import render
    from vlmx.runs import write_atomic

    found = collect([RunFolder.open(name, root=RUNS_ROOT) for name in run_names], caches=caches)
    write_atomic(out, render(found))
    _print_report(found)
    if csv_path is not None:
        write_atomic(csv_path, _csv(score_rows(found)))
        note(f"scores: {csv_path}")
    note(f"report: {out.resolve()}")


def _csv(rows: Sequence[dict[str, object]]) -> str:
    import csv
    import io

    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _print_scores(scores: Sequence[Score], *, title: str) -> None:
    rows = []
    for s in scores:
        low, high = s.interval95
        rows.append(
            (
                s.benchmark + (" (shuffled)" if s.control == "shuffled" else ""),
                f"{s.score:.1f}",
                f"[{low:.1f}, {high:.1f}]",
                ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in s.baselines.items()),
                f"{s.n:,}" + (f" of {s.expected:,} (partial)" if s.partial else ""),
                str(s.invalid),
            )
        )
    title = f"{title}: {scores[0].encoder}" if scores else title
    table(["benchmark", "score", "95 % interval", "baselines", "questions", "invalid"], rows, title=title)


def _print_report(found: Report) -> None:
    from vlmx.evaluate.report.rankings import SUBJECT_TEXT

    columns = ["run", *(name.removeprefix("mini-") for name in found.benchmarks), "VQA", "boxes", "overall"]
    rows = []
    for name in ("prior", "random_object"):
        values = [_baseline_cell(found, benchmark, name) for benchmark in found.benchmarks]
        if any(values):
            rows.append((name.replace("_", " "), *values, "", "", ""))
    for run in found.runs:
        cells = [f"{run.scores[b].score:.1f}" if b in run.scores else "" for b in found.benchmarks]
        means = [f"{run.pooled[g].score:.1f}" if g in run.pooled else "" for g in ("VQA", "boxes", "overall")]
        rows.append((run.name, *cells, *means))
        if run.control_scores:
            control = [
                f"{run.control_scores[b].score:.1f}" if b in run.control_scores else "" for b in found.benchmarks
            ]
            rows.append(("  images shuffled", *control, "", "", ""))
    table(columns, rows, title="partial: --limit was given" if found.partial else "")
    for subject, ranked in groupby(found.rankings, key=attrgetter("subject")):
        click.echo(f"{SUBJECT_TEXT[subject]}:")
        for ranking in ranked:
            for step in ranking.steps:
                click.echo(f"  {step.sentence(ranking.group)}")


def _baseline_cell(found: Report, benchmark: str, name: str) -> str:
    values = [run.scores[benchmark].baselines.get(name) for run in found.runs if benchmark in run.scores]
    return f"{values[0]:.1f}" if values[0] is not None else ""
