"""Which commands of `vlmx cache` need the encoder: `repair` and `probe`. Heavy modules are imported when they run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from vlmx.cache_specs.command import AGAIN, cache, cache_argument, json_option, root_option

if TYPE_CHECKING:
    from vlmx.cache_specs.audit import Report
    from vlmx.cache_specs.places import Place
    from vlmx.extract.probe import ProbeReport
    from vlmx.extract.repair import RepairReport
    from vlmx.extract.sources import ImageSource

__all__ = ["cache"]

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--data",
        multiple=True,
        metavar="DATA",
        help="Where the images are now, as `vlmx extract --data` takes it.  [default: where they were]",
    ),
    click.option(
        "--image-root",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="FOLDER",
        help="Where the image paths of a JSON start.",
    ),
    click.option(
        "--data-root",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="FOLDER",
        help="Folder below which the files of published data sets lie.",
    ),
    click.option("--image-column", metavar="NAME", help="Column of parquet files that holds the images."),
    click.option(
        "--weights",
        metavar="FILE",
        shell_complete=lambda ctx, param, text: [CompletionItem(text, type="file")],
        help="Checkpoint of the encoder.  [default: the file that was used, or the published one]",
    ),
    click.option(
        "--threads",
        type=click.IntRange(1),
        default=min(32, os.cpu_count() or 1),
        show_default="cores, at most 32",
        help="Threads that read and decode images.",
    ),
)


def _encoder_options(command: Command) -> Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@cache.command(short_help="Encode some images again and compare them with the cache.")
@cache_argument
@root_option
@click.option("--images", type=click.IntRange(1), default=32, show_default=True, help="How many are encoded again.")
@_encoder_options
@json_option
def probe(
    cache: str,
    root: str,
    images: int,
    data: tuple[str, ...],
    image_root: Path | None,
    data_root: Path | None,
    image_column: str | None,
    weights: str | None,
    threads: int,
    as_json: bool,
) -> None:
    """Encode some images again on this machine and compare them with the cache; exit code 5 when they differ.

    The images are always the same ones, from all over the cache.
    """
    from vlmx.cache_specs.catalog import find
    from vlmx.cache_specs.findings import show
    from vlmx.errors import CacheError
    from vlmx.extract.probe import probe as run

    place = find(root, cache)
    sources = _sources(place, data, image_root, data_root, image_column)
    report = run(place, sources, weights=weights, images=images, threads=threads)
    if as_json:
        click.echo(json.dumps(_probe_json(report), indent=1))
    else:
        show(_probe_rows(report))
    if not report.ok:
        raise CacheError(
            f"the encoder gives other tokens here than cache {place.name} has",
            why=f"image {report.worst} is off by {report.distance.relative:.3g} of its norm, more than "
            f"{report.limit:.3g}",
            fix="compare device, versions and scan engine with those of the extraction (vlmx cache info); "
            "`vlmx cache verify --full` says whether the cache itself is damaged",
        )


@cache.command(short_help="Make damaged and missing shards again, in place.")
@cache_argument
@root_option
@click.option("--quick", is_flag=True, help="Look only at sizes and indices for damage, not at every byte.")
@click.option("--forget", is_flag=True, help="Make nothing again: throw damaged shards away; their images are pending.")
@_encoder_options
@json_option
def repair(
    cache: str,
    root: str,
    quick: bool,
    forget: bool,
    data: tuple[str, ...],
    image_root: Path | None,
    data_root: Path | None,
    image_column: str | None,
    weights: str | None,
    threads: int,
    as_json: bool,
) -> None:
    """Make damaged and missing shards of a cache again, in place, from the images and the encoder that made them.

    Shards that are intact are not touched. Exit code 5 when something is left that could not be repaired.
    """
    from vlmx.cache_specs import audit
    from vlmx.cache_specs.catalog import find
    from vlmx.cache_specs.findings import show, show_report
    from vlmx.cache_specs.settle import forget_shards
    from vlmx.console import note
    from vlmx.errors import CacheCorruptError

    place = find(root, cache)
    report = audit.verify(place, full=not quick)
    if not as_json:
        show_report(report)
    made: RepairReport | None = None
    if forget and report.damaged:
        forget_shards(place, list(report.damaged))
        note(
            f"{len(report.damaged)} shards are forgotten, their images are pending; "
            "the `vlmx extract` command of this cache encodes them again"
        )
    elif report.damaged or report.metadata:
        from vlmx.extract.repair import repair as run

        sources = _sources(place, data, image_root, data_root, image_column)
        made = run(report, sources, weights=weights, threads=threads)
    if as_json:
        click.echo(json.dumps(_repair_json(report, made, forgotten=forget), indent=1))
    elif made is not None:
        show(_repair_rows(made))
    if report.problems:
        raise CacheCorruptError(
            f"not everything of {place.name} can be repaired",
            why="; ".join(report.problems),
            fix=AGAIN,
        )
    if made is not None and not made.ok:
        raise CacheCorruptError(
            f"{len(made.left)} shards of {place.name} are still damaged",
            why=f"images were not found: {made.whose}",
            fix="say where they are now with --data (and --image-root); --forget throws the shards away",
        )


def _sources(
    place: Place,
    data: tuple[str, ...],
    image_root: Path | None,
    data_root: Path | None,
    image_column: str | None,
) -> Iterable[ImageSource]:
    from vlmx.cache_specs.audit import read_runs
    from vlmx.errors import UsageError
    from vlmx.extract.originals import reopen
    from vlmx.extract.sources import open_sources

    if data:
        return open_sources(data, image_root, data_root=data_root, image_column=image_column)
    if image_root or data_root or image_column:
        raise UsageError("it is not clear where the images are", why="--data is missing", fix="give --data, too")
    return reopen(read_runs(place))


def _probe_rows(report: ProbeReport) -> list[tuple[str, str]]:
    found = report.distance
    rows = [
        ("cache", report.cache.name),
        ("encoded again", f"{found.images:,} images, {found.identical:,} of them with identical tokens"),
        ("equal numbers", f"{report.exact:.2%}"),
        ("largest difference", f"{found.max_abs:.3g}"),
        ("relative error", f"{found.relative:.3g} in the worst image (the same encoder up to {report.limit:.3g})"),
        ("smallest cosine", f"{found.cosine:.6f}"),
    ]
    if report.missing:
        rows.append(("not found", f"{len(report.missing)} images: {report.whose}"))
    return [*rows, ("verdict", "the same encoder" if report.ok else "not the same tokens")]


def _probe_json(report: ProbeReport) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "cache": report.cache.name,
        "url": report.cache.url,
        "ok": report.ok,
        "distance": asdict(report.distance),
        "exact": report.exact,
        "worst": report.worst,
        "limit": report.limit,
        "missing": list(report.missing),
        "whose": report.whose,
    }


def _repair_rows(made: RepairReport) -> list[tuple[str, str]]:
    rows = []
    if made.same:
        rows.append(("made again", f"{len(made.same)} shards, with the bytes that were recorded"))
    if made.other:
        rows.append(
            (
                "made again",
                f"{len(made.other)} shards, with other last bits than those that were recorded: {made.other}",
            )
        )
    if made.metadata:
        rows.append(("written again", ", ".join(made.metadata)))
    rows += [("left", f"shard {index}: {count:,} images not found") for index, count in made.left.items()]
    return rows


def _repair_json(report: Report, made: RepairReport | None, *, forgotten: bool) -> dict[str, Any]:
    from vlmx.cache_specs.findings import report_json

    return {
        "found": report_json(report),
        "forgotten": list(report.damaged) if forgotten else [],
        "same": list(made.same) if made else [],
        "other": list(made.other) if made else [],
        "left": {str(index): count for index, count in made.left.items()} if made else {},
        "whose": made.whose if made else "",
        "metadata": list(made.metadata) if made else [],
    }
