"""What does `vlmx cache` do? Show what is in a cache, and check that it is what was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from click.shell_completion import CompletionItem

EPILOG = """\b
Worked examples:
  vlmx cache info vmamba-s-coco@512              what it is, how much, and how it was made
  vlmx cache verify vmamba-s-coco@512            manifest, sizes and indices: seconds
  vlmx cache verify vmamba-s-coco@512 --full     every byte
  vlmx cache verify vmamba-s-coco@512 --full --repair
"""


def complete_caches(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of caches below the folder that --root or --caches names, or below `caches`."""
    from vlmx.cache_specs.catalog import list_caches

    root = Path(context.params.get("root") or context.params.get("caches") or "caches")
    return [CompletionItem(name) for name in list_caches(root) if name.startswith(incomplete)]


_cache_argument = click.argument("cache", shell_complete=complete_caches)
_root_option = click.option(
    "--root",
    type=click.Path(path_type=Path),
    default=Path("caches"),
    show_default=True,
    is_eager=True,
    help="Folder of all caches.",
)


@click.group(epilog=EPILOG)
def cache() -> None:
    """Show and check caches of visual tokens.

    CACHE is a name, any unambiguous beginning of one, or a folder.
    """


@cache.command()
@_cache_argument
@_root_option
def info(cache: str, root: Path) -> None:
    """Show what a cache holds and how it was made."""
    from vlmx.cache_specs import audit
    from vlmx.cache_specs.catalog import find
    from vlmx.console import format_bytes

    found = audit.info(find(root, cache))
    spec, geometry = found.spec, found.spec.geometry
    grid = f"{found.shape.grid[0]} x {found.shape.grid[1]}"
    rows = [
        ("folder", str(found.path)),
        ("backbone", spec.backbone),
        ("weights", f"{spec.weights_sha256} (untrained)" if spec.random_weights else spec.weights_sha256),
        ("feature", f"{spec.feature}, norm {spec.out_norm}, forward version {spec.forward_version}"),
        ("input", f"{geometry.height} x {geometry.width} {geometry.mode}, fill {geometry.fill}, {geometry.resampling}"),
        ("mean, std", f"{spec.mean}, {spec.std}"),
        ("tokens", f"{found.shape.num_tokens} ({grid}) x {found.shape.dim} {spec.dtype}, computed in {spec.compute}"),
        ("images", f"{found.images:,} in {found.shards:,} shards of {found.images_per_shard}"),
        ("undecodable", f"{len(found.failed):,}"),
        ("size", format_bytes(found.bytes)),
        ("sealed", "yes" if found.sealed else "no: the extraction has not come to its end"),
        ("fingerprint", spec.fingerprint),
    ]
    _show([("cache", found.path.name), *rows])
    for number, run in enumerate(found.runs, start=1):
        click.echo("")
        _show([("extraction", str(number)), *((key, str(value)) for key, value in run.items())])
    for image, why in found.failed.items():
        click.echo(f"undecodable {image}: {why}")


@cache.command()
@_cache_argument
@_root_option
@click.option("--full", is_flag=True, help="Read every byte, not only sizes and indices.")
@click.option("--repair", is_flag=True, help="Forget damaged shards, so that `vlmx extract` makes them again.")
def verify(cache: str, root: Path, full: bool, repair: bool) -> None:
    """Check that a cache is what was written; exit code 5 and a list when it is not."""
    from vlmx.cache_specs import audit
    from vlmx.cache_specs.catalog import find
    from vlmx.cache_specs.writer import forget_shards
    from vlmx.console import format_bytes, note
    from vlmx.errors import CacheCorruptError

    report = audit.verify(find(root, cache), full=full)
    rows = [("damaged", f"shard {index}: {why}") for index, why in report.damaged.items()]
    rows += [("problem", problem) for problem in report.problems]
    checked = "every byte read" if full else "manifest, sizes and indices (--full reads every byte)"
    rows.append(("checked", checked))
    rows.append(("images", f"{report.images:,} in {report.shards:,} shards, {report.failed:,} undecodable"))
    rows.append(("intact", f"{report.shards - len(report.damaged):,} shards, {format_bytes(report.bytes)}"))
    rows.append(("sealed", "yes" if report.sealed else "no"))
    _show([("cache", report.path.name), *rows])
    if report.ok:
        return
    if repair:
        forget_shards(report.path, list(report.damaged))
        note(f"{len(report.damaged)} shards are forgotten; the `vlmx extract` command of this cache makes them again")
        return
    raise CacheCorruptError(
        f"cache {report.path.name} is damaged",
        why=f"{len(report.damaged)} of {report.shards} shards, {len(report.problems)} other problems",
        fix="--repair forgets what is damaged, then the `vlmx extract` command of this cache makes it again",
    )


def _show(facts: Sequence[tuple[str, str]]) -> None:
    """Names and what they are, below each other, on stdout."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        click.echo(f"{name:<{width}}  {value}")
