"""What does `vlmx cache` do? Show what is in caches, check that they are what was written, compare them, clean up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from vlmx.cache_specs.audit import Report
    from vlmx.cache_specs.places import Place

EPILOG = """\b
Worked examples:
  vlmx cache ls                                  every cache below ./caches
  vlmx cache info vmamba-s-coco@512              what it is, how much, and how it was made
  vlmx cache verify vmamba-s-coco@512            manifest, sizes and indices: seconds
  vlmx cache verify --all --full                 every byte of every cache
  vlmx cache repair vmamba-s-coco@512            make damaged shards again from the images
  vlmx cache probe vmamba-s-coco@512             does the encoder still give these tokens here?
  vlmx cache diff vmamba-s-coco@512 s3://group/caches/vmamba-s-coco@512x512-0123456789ab
  vlmx cache gc --delete                         what killed processes left behind
"""

DAY_S = 86400


AGAIN = "give the `vlmx extract` command of the cache again: it stores what is missing and seals it anew"


def complete_caches(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of caches below the folder that --root or --caches names, or below `caches`."""
    from vlmx.cache_specs.catalog import list_caches

    root = str(context.params.get("root") or context.params.get("caches") or "caches")
    return [CompletionItem(name) for name in list_caches(root) if name.startswith(incomplete)]


cache_argument = click.argument("cache", shell_complete=complete_caches)
root_option = click.option(
    "--root",
    metavar="FOLDER",
    default="caches",
    show_default=True,
    is_eager=True,
    help="Folder or url of all caches.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(epilog=EPILOG)
def cache() -> None:
    """Show, check, compare and clean up caches of visual tokens.

    CACHE is a name, any unambiguous beginning of one, a folder, or a url such as s3://bucket/caches/NAME.
    Exit code 5: something is wrong with a cache.
    """


@cache.command(short_help="List caches, damaged ones too.")
@root_option
@json_option
def ls(root: str, as_json: bool) -> None:
    """List the caches below a folder, damaged ones and those of other versions of vlmx too."""
    from dataclasses import asdict

    from vlmx.cache_specs.survey import survey
    from vlmx.console import format_bytes, note, table

    lines = survey(root)
    if as_json:
        click.echo(json.dumps([asdict(line) for line in lines], indent=1))
        return
    good = [line for line in lines if not line.problem]
    if good:
        columns = ("cache", "images", "undecodable", "size", "stored as", "sealed", "last extraction")
        rows = [
            (
                line.name,
                f"{line.images:,}",
                f"{line.failed:,}",
                format_bytes(line.bytes),
                line.dtype if line.codec == "crc32c" else f"{line.dtype}, {line.codec}",
                "yes" if line.sealed else "no",
                line.last or "unknown",
            )
            for line in good
        ]
        table(columns, rows)
    for line in lines:
        if line.problem:
            click.echo(f"{line.name}: {line.problem}")
    if not lines:
        note(f"no cache below {root}; `vlmx extract` makes one")


@cache.command()
@cache_argument
@root_option
@json_option
def info(cache: str, root: str, as_json: bool) -> None:
    """Show what a cache holds, how it was made, and who is writing it."""
    from vlmx.cache_specs import survey
    from vlmx.cache_specs.catalog import find
    from vlmx.cache_specs.findings import info_json, info_rows, show

    found = survey.info(find(root, cache))
    if as_json:
        click.echo(json.dumps(info_json(found), indent=1))
        return
    show([("cache", found.place.name), *info_rows(found)])
    for number, run in enumerate(found.runs, start=1):
        click.echo("")
        show([("extraction", str(number)), *((key, str(value)) for key, value in run.items())])
    for image, why in found.failed.items():
        click.echo(f"undecodable {image}: {why}")


@cache.command(short_help="Check that caches are what was written.")
@click.argument("caches", nargs=-1, metavar="[CACHE]...", shell_complete=complete_caches)
@root_option
@click.option("--all", "everything", is_flag=True, help="Every cache below the folder.")
@click.option("--full", is_flag=True, help="Read every byte, not only sizes and indices.")
@click.option("--threads", type=click.IntRange(1), help="Shards that are read side by side.  [default: cores]")
@json_option
def verify(
    caches: tuple[str, ...], root: str, everything: bool, full: bool, threads: int | None, as_json: bool
) -> None:
    """Check that caches are what was written; exit code 5 and a list when they are not."""
    from vlmx.cache_specs import audit
    from vlmx.cache_specs.catalog import find
    from vlmx.cache_specs.findings import report_json, show, show_report
    from vlmx.cache_specs.places import place_of
    from vlmx.cache_specs.survey import survey
    from vlmx.errors import CacheCorruptError, CacheError, UsageError

    if bool(caches) == everything:
        raise UsageError("it is not clear which caches are meant", fix="name some, or give --all, and not both")
    if everything:
        places = [place_of(root).child(line.name) for line in survey(root)]
    else:
        places = [find(root, name) for name in caches]
    reports: list[Report] = []
    unreadable: list[tuple[Place, CacheError]] = []
    for place in places:
        try:
            reports.append(audit.verify(place, full=full, threads=threads))
        except CacheError as error:
            if not everything and len(places) == 1 and not as_json:
                raise
            unreadable.append((place, error))
        else:
            if not as_json:
                show_report(reports[-1])
    if as_json:
        rows = [report_json(report) for report in reports]
        rows += [{"cache": place.name, "url": place.url, "ok": False, "problems": [str(e)]} for place, e in unreadable]
        click.echo(json.dumps(rows, indent=1))
    else:
        for place, reason in unreadable:
            show([("cache", place.name), ("problem", str(reason))])
    bad = [report for report in reports if not report.ok]
    if bad or unreadable:
        shards = [report for report in bad if report.damaged or report.metadata]
        fix = f"`vlmx cache repair {shards[0].place}` makes damaged shards again" if shards else AGAIN
        raise CacheCorruptError(
            f"{len(bad) + len(unreadable)} of {len(places)} caches are damaged",
            why=", ".join([*(report.place.name for report in bad), *(place.name for place, _ in unreadable)]),
            fix=fix if bad else "see the problems above",
        )


@cache.command()
@click.argument("first", shell_complete=complete_caches)
@click.argument("second", shell_complete=complete_caches)
@root_option
@click.option(
    "--sample",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    metavar="N",
    help="Compare the tokens of N common images, the same ones on every machine.",
)
@click.option("--all", "everything", is_flag=True, help="Compare the tokens of all common images.")
@json_option
def diff(first: str, second: str, root: str, sample: int, everything: bool, as_json: bool) -> None:
    """Compare two caches: specs, images, tokens. Exit code 5 when they are not the same tokens of the same images.

    Tokens that another machine made may differ in their last bits; up to a limit, they are "alike".
    """
    from vlmx.cache_specs.catalog import find
    from vlmx.cache_specs.compare import compare
    from vlmx.cache_specs.findings import difference_json, difference_rows, reasons, show
    from vlmx.errors import CacheError

    places = find(root, first), find(root, second)
    found = compare(*places, sample=None if everything else sample)
    if as_json:
        click.echo(json.dumps(difference_json(found), indent=1))
    else:
        show(difference_rows(found))
    if not found.alike:
        raise CacheError(f"{places[0]} and {places[1]} are not the same", why="; ".join(reasons(found)))


@cache.command(short_help="Remove what killed processes left, and what nobody needs.")
@root_option
@click.option("--delete", is_flag=True, help="Delete what is listed; without it, nothing is changed.")
@click.option(
    "--older-than",
    "older_than_days",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    metavar="DAYS",
    help="Leave alone what was changed more recently.",
)
@click.option(
    "--runs",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Also name the caches that no run below FOLDER was trained on; they are not deleted.",
)
@json_option
def gc(root: str, delete: bool, older_than_days: float, runs: Path | None, as_json: bool) -> None:
    """List, and with --delete remove, what nobody needs: leftovers of killed processes, shards that were never
    committed, caches without any shard, tables of data sets without images in any cache.

    A committed shard, or a cache that somebody is writing, is never touched.
    """
    from vlmx.cache_specs import rubbish
    from vlmx.console import format_bytes, note

    found = rubbish.find_rubbish(root, older_than_s=older_than_days * DAY_S, runs=runs)
    rows = []
    for item in found.rubbish:
        gone = delete and rubbish.delete(item)
        rows.append({"url": item.url, "kind": item.kind, "why": item.why, "bytes": item.bytes, "deleted": gone})
        if not as_json:
            done = "deleted" if gone else "in use by now" if delete else "can go"
            click.echo(f"{done}: {item.url} ({item.why}, {format_bytes(item.bytes)})")
    if as_json:
        kept = [{"name": one.name, "why": one.why, "bytes": one.bytes} for one in found.kept]
        click.echo(json.dumps({"rubbish": rows, "young": found.young, "kept": kept}, indent=1))
        return
    for one in found.kept:
        click.echo(f"stays: {one.name} {one.why}" + (f" ({format_bytes(one.bytes)})" if one.bytes else ""))
    if found.young:
        note(f"{found.young} more were changed less than {older_than_days:g} days ago (--older-than)")
    total = sum(item.bytes for item in found.rubbish)
    if not found.rubbish:
        note("nothing can go")
    elif not delete:
        note(f"{len(found.rubbish)} things, {format_bytes(total)}; --delete removes them")
