"""What do `vlmx eval`, `score` and `probe` take, and what do they print? Light until one of them runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click
from click.shell_completion import CompletionItem

from vlmx.cache_specs.command import complete_caches
from vlmx.console import note, show_error, table
from vlmx.errors import UsageError, VlmxError
from vlmx.evaluate.many import ManyProcesses, Worker
from vlmx.runs import RunFolder, list_runs

if TYPE_CHECKING:
    from vlmx.evaluate.score import Score

T = TypeVar("T")
RUNS_ROOT = Path("runs")

EVAL_EPILOG = """\b
Worked examples:
  vlmx eval --run latest
      every benchmark of the mini study with the model trained last
  vlmx eval --run vicuna-vmamba --bench paper --data-root /data
      the paper's eleven columns (vqa: its question answering, loc: its localization)
  vlmx eval --run vicuna-vmamba --bench paper --slim --profile paper
      1,024 questions of each part, worded and compared as in the paper's evaluation; every score says so
  vlmx eval --run vmamba-mlp2 --bench mini-ref,mini-count --limit 200
      a fixed subset of 200 questions each; every score says that it is partial
  vlmx eval --run vmamba-mlp2 --control shuffled
      the same questions with the tokens of other images: what is left is guessing
  vlmx eval --run vicuna-vmamba --bench vqav2 --nproc 8
  torchrun --nproc-per-node 8 -m vlmx eval -r vicuna-vmamba --bench vqav2
      eight processes, each with a GPU of its own; the same command goes on when one has died (write -r for torchrun,
      which takes --run for an option of its own)
  vlmx eval --run vmamba-mlp2 --cache none --weights vmamba_s.pth
      no cache: the run's encoder works on the fly (needs the images and phase one's libraries)

\b
Answers go to RUN/eval/BENCHMARK/answers.jsonl (shuffled: RUN/eval-shuffled/...), scores beside them. Questions that are
answered already are not asked again, however the process ended: the same command ends with the same file, byte for
byte. Meanwhile they lie in answers.parts, which `vlmx score` reads, too. Answers with other settings stay until the new
ones are finished, and are then kept as answers.replaced-DIGEST.jsonl. Images of a benchmark are looked up in the image
table of its data set (vlmx list benchmarks), those of the mini study in 'mini'.
"""
SCORE_EPILOG = """\b
Worked examples:
  vlmx score latest
  vlmx score runs/vmamba-mlp2 --boxes paper
      boxes as the paper's evaluation takes them: letterbox ignored, true boxes rounded to two decimals
  vlmx score runs/vicuna-vmamba --data-root /other/data
      the benchmarks' files have moved since the answers were made
"""
PROBE_EPILOG = """\b
Worked example:
  vlmx extract --backbone vmamba-mini-scenes && vlmx probe --cache vmamba-mini-scenes
  vlmx probe --cache vit-mini-scenes+vmamba-mini-scenes
      the tokens of two caches, joined on the channel axis
"""


def complete_run(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of runs for the shell."""
    return [CompletionItem(name) for name in [*list_runs(RUNS_ROOT), "latest"] if name.startswith(incomplete)]


caches_option = click.option(
    "--caches", metavar="FOLDER", default="caches", show_default=True, help="Folder or url of all caches."
)
RUN_HELP = "Folder, name, beginning of a name below runs/, or 'latest'."


boxes_option = click.option(
    "--boxes",
    type=click.Choice(["exact", "paper"]),
    default="exact",
    show_default=True,
    help="How boxes are compared; paper: letterbox ignored, true boxes rounded.",
)


@click.command("eval", cls=ManyProcesses, epilog=EVAL_EPILOG)
@click.option("-r", "--run", "run_name", required=True, metavar="RUN", shell_complete=complete_run, help=RUN_HELP)
@click.option(
    "--bench",
    "names",
    default="mini",
    show_default=True,
    metavar="NAMES",
    help="Benchmarks, separated by commas; mini, paper, vqa and loc stand for several.",
)
@click.option(
    "--data-root", metavar="FOLDER", default="data", show_default=True, help="Where the benchmarks' files are."
)
@caches_option
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Ask a fixed subset of N questions of each benchmark."
)
@click.option(
    "--slim", is_flag=True, help="Ask 1,024 questions of each benchmark, or of each part that is scored apart."
)
@click.option(
    "--control",
    type=click.Choice(["none", "shuffled"]),
    default="none",
    show_default=True,
    help="shuffled: tokens of other images.",
)
@click.option(
    "--profile", type=click.Choice(["paper"]), help="paper: --prompts paper --boxes paper, unless these are given."
)
@click.option(
    "--prompts",
    type=click.Choice(["default", "paper"]),
    default="default",
    show_default=True,
    help="How questions are worded; default: as in training.",
)
@boxes_option
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Questions answered together. Default: 64, fewer for encoders with many tokens.",
)
@click.option("--exact", is_flag=True, help="One question at a time, nothing shared: slow, and the same in fp32.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="What the model computes in; auto: bf16 on a GPU, fp32 elsewhere.",
)
@click.option("--nproc", type=click.IntRange(min=1), default=1, show_default=True, help="Processes; each takes a GPU.")
@click.option("--pull", metavar="FOLDER", help="Copy a remote cache to this folder, shard by shard, as it is used.")
@click.option(
    "--cache", type=click.Choice(["none"]), help="none: encode on the fly. Default: the cache of the run's encoder."
)
@click.option("--backbone", metavar="NAME", help="With --cache none: the encoder. Default: the run's.")
@click.option("--res", metavar="RES", help="With --cache none: its input size. Default: the run's.")
@click.option("--weights", metavar="FILE", help="With --cache none: its checkpoint. Default: looked up.")
@click.option("--image-root", metavar="FOLDER", help="With --cache none: where the image paths of a JSON start.")
@click.argument("overrides", nargs=-1, metavar="[stream.KEY=VALUE]...")
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    worker: Worker,
    run_name: str,
    names: str,
    data_root: str,
    caches: str,
    limit: int | None,
    slim: bool,
    control: str,
    profile: str | None,
    prompts: str,
    boxes: str,
    batch_size: int | None,
    exact: bool,
    dtype: str,
    pull: str | None,
    cache: str | None,
    overrides: tuple[str, ...],
    **encoder: str | None,
) -> None:
    """Answer benchmarks with a trained model, from cached tokens, and score the answers.

    With --cache none, whatever else `vlmx train` takes as stream.KEY=VALUE can be given, too.
    """
    from vlmx.data.benchmarks import expand
    from vlmx.data.wording import Wording
    from vlmx.evaluate.answers import Control, Dtype
    from vlmx.evaluate.predict import Asking, predict_run
    from vlmx.evaluate.score import BoxRule
    from vlmx.evaluate.score_run import score_benchmarks

    if slim and limit is not None:
        raise UsageError("--slim and --limit both choose a subset", fix="give one of them")
    if exact and batch_size not in (None, 1):
        raise UsageError(f"--exact asks one question at a time, and --batch-size {batch_size} at once", fix="give one")
    if profile is not None:
        prompts = prompts if _is_given(ctx, "prompts") else profile
        boxes = boxes if _is_given(ctx, "boxes") else profile
    run = RunFolder.open(run_name, root=RUNS_ROOT)
    benchmarks = expand(names)
    asking = Asking(
        limit=limit,
        slim=slim,
        control=_one_of(control, get_args(Control)),
        wording=_one_of(prompts, get_args(Wording)),
        data_root=data_root,
        batch_size=batch_size,
        exact=exact,
        dtype=_one_of(dtype, ("auto", *get_args(Dtype))),
    )
    given = {key: value for key, value in encoder.items() if value is not None}
    stream = _stream(cache, given, list(overrides))
    is_last = predict_run(run, benchmarks, caches=caches, asking=asking, stream=stream, pull=pull, worker=worker)
    if is_last:
        rule = _one_of(boxes, get_args(BoxRule))
        found, problems = score_benchmarks(
            run, box_rule=rule, data_root=data_root, benchmarks=benchmarks, controls=[asking.control]
        )
        _print_scores(found, problems, title=run.name)
    else:
        worker.tell_end()


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _one_of(value: str, known: Sequence[T]) -> T:
    """A choice that click has checked, with its type."""
    return next(each for each in known if each == value)


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
    "--data-root", metavar="FOLDER", help="Where the benchmarks' files are. Default: where they were when answered."
)
@boxes_option
def score(run_name: str, data_root: str | None, boxes: str) -> None:
    """Score the answers of a run again, finished or not; nothing is generated.

    RUN is a folder, a name, the beginning of a name below runs/, or 'latest'.
    """
    from vlmx.evaluate.score import BoxRule
    from vlmx.evaluate.score_run import score_benchmarks

    run = RunFolder.open(run_name, root=RUNS_ROOT)
    found, problems = score_benchmarks(run, box_rule=_one_of(boxes, get_args(BoxRule)), data_root=data_root)
    _print_scores(found, problems, title=run.name)


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


def _print_scores(scores: Sequence[Score], problems: Sequence[VlmxError], *, title: str) -> None:
    """Show the scores that there are, then what is wrong with the others.

    Raises:
        VlmxError: the last of `problems`.
    """
    if scores:
        _print_table(scores, title)
    for problem in problems[:-1]:
        show_error(problem)
    if problems:
        raise problems[-1]


def _print_table(scores: Sequence[Score], title: str) -> None:
    rows = []
    for s in scores:
        low, high = s.interval95
        rows.append(
            (
                s.benchmark + (" (shuffled)" if s.control == "shuffled" else ""),
                f"{s.score:.1f}",
                f"[{low:.1f}, {high:.1f}]",
                ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in s.baselines.items()),
                s.size,
                str(s.invalid),
            )
        )
    table(
        ["benchmark", "score", "95 % interval", "baselines", "questions", "invalid"],
        rows,
        title=f"{title}: {scores[0].encoder}",
    )
    for made_with, those in groupby(sorted(scores, key=attrgetter("made_with")), key=attrgetter("made_with")):
        click.echo(f"{made_with}: {', '.join(dict.fromkeys(s.benchmark for s in those))}")
