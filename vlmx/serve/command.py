"""Options of `vlmx demo`, `vlmx list`, `vlmx doctor` and `vlmx completion`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from vlmx.console import note, table
from vlmx.errors import UsageError
from vlmx.extract.arguments import complete_backbone
from vlmx.registry import unknown_name

if TYPE_CHECKING:
    from vlmx.extract.backbones.row import BackboneRow


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder for caches, runs and the report.",
)
@click.option(
    "--encoder",
    "encoders",
    multiple=True,
    metavar="NAME",
    help="A mini backbone; repeat for several.  [default: vit-mini-scenes, vmamba-mini-scenes]",
)
@click.option(
    "--connector",
    "connectors",
    multiple=True,
    metavar="NAME",
    help="A connector; repeat for several.  [default: mlp2, mlp3]",
)
@click.option(
    "--quick", is_flag=True, help="A few steps and questions: shows that everything runs, not what it can do."
)
def demo(out: Path, encoders: tuple[str, ...], connectors: tuple[str, ...], quick: bool) -> None:
    """Compare encoders and connectors on the embedded mini study: extract, train, evaluate, report."""
    from vlmx.serve.demo import CONNECTORS, ENCODERS, run_demo

    report = run_demo(out, encoders=encoders or ENCODERS, connectors=connectors or CONNECTORS, quick=quick)
    click.echo(str(report.resolve()))


@click.group(name="list")
def list_() -> None:
    """List backbones, rows of the paper, connectors, benchmarks, caches or runs."""


_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def _complete_family(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from vlmx.extract.backbones.catalogue import rows

    return [CompletionItem(name) for name in sorted({row.family for row in rows()}) if name.startswith(incomplete)]


@list_.command()
@click.argument("name", required=False, shell_complete=complete_backbone)
@click.option("--family", shell_complete=_complete_family, help="Only this family, e.g. vmamba.")
@click.option("--long", "long_", is_flag=True, help="Everything about each: sizes, checkpoint, URL, licence, ...")
@_JSON
def backbones(name: str | None, family: str | None, long_: bool, as_json: bool) -> None:
    """The vision encoders; with NAME everything about one of them."""
    from vlmx.extract.backbones import catalogue

    if name and family:
        raise UsageError("a name and --family were given", fix="give one of them")
    chosen = [catalogue.row(name)] if name else catalogue.rows(family)
    if as_json:
        more = [{"tokens": row.num_tokens, "allowed_sizes": row.allowed_sizes} for row in chosen]
        click.echo(json.dumps([{**asdict(row), **facts} for row, facts in zip(chosen, more, strict=True)], indent=1))
        return
    if name or long_:
        for number, row in enumerate(chosen):
            if number:
                click.echo("")
            _show(_facts(row))
        return
    cells = [
        [
            row.name,
            row.pretraining,
            _size(row.native_res),
            str(row.num_tokens),
            str(row.dim),
            _millions(row.params),
            row.published_size,
        ]
        for row in chosen
    ]
    table(["backbone", "pretraining", "native HxW", "tokens", "width", "frozen", "published"], cells)
    note("frozen: parameters that run here; published: as the paper prints them, often with a detector's heads")
    note("vlmx list backbones NAME, or --long for all: allowed sizes, checkpoint, URL, licence, normalisation")


def _facts(row: BackboneRow) -> list[tuple[str, str]]:
    """Everything about one backbone, by what it is called."""
    return [
        ("backbone", row.name),
        ("family", row.family),
        ("pretraining", row.pretraining),
        ("native size", f"{_size(row.native_res)} (height x width in pixels)"),
        ("allowed sizes", row.allowed_sizes),
        ("tokens", f"{row.num_tokens} ({row.grid[0]} x {row.grid[1]}) at the native size"),
        ("width", str(row.dim)),
        ("frozen parameters", f"{row.params:,}"),
        ("published size", row.published_size or "none"),
        ("checkpoint", f"{row.file}{' (ships with vlmx)' if row.packaged else ''}"),
        ("url", row.url or "none"),
        ("licence", row.licence),
        ("mean", ", ".join(f"{level:g}" for level in row.mean)),
        ("std", ", ".join(f"{level:g}" for level in row.std)),
        ("reference's crop", "none" if row.crop_pct == 1 else f"{row.crop_pct:g} of each side, with the option crop"),
        ("network", ", ".join(f"{key}={value}" for key, value in row.arch.items())),
    ]


def _size(res: tuple[int, int]) -> str:
    return f"{res[0]}x{res[1]}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M"


@list_.command("rows")
@click.option("--encoder", metavar="TEXT", help="Only rows with this in the encoder's printed name, e.g. vmamba.")
@_JSON
def rows_(encoder: str | None, as_json: bool) -> None:
    """The 99 models of the paper; `vlmx extract` and `vlmx train` take one with --row."""
    from vlmx.cache_specs.presets import presets

    chosen = [row for row in presets() if encoder is None or encoder.lower() in row.encoder.lower()]
    if encoder is not None and not chosen:
        raise unknown_name(
            "encoder of the paper", encoder, {row.encoder for row in presets()}, listing="vlmx list rows"
        )
    if as_json:
        click.echo(json.dumps([{"name": row.name, **asdict(row)} for row in chosen], indent=1))
        return
    cells = [
        [row.name, row.encoder, "+".join(row.backbones), _size(row.res), row.connector, str(row.tokens)]
        for row in chosen
    ]
    table(["row", "encoder", "backbone", "HxW", "connector", "tokens"], cells)


@list_.command()
@_JSON
def connectors(as_json: bool) -> None:
    """The connectors between visual tokens and the language model."""
    from vlmx.models.connectors import CONNECTORS

    _names(CONNECTORS.names(), as_json)


@list_.command()
@_JSON
def benchmarks(as_json: bool) -> None:
    """The benchmarks that `vlmx eval --bench` takes."""
    from vlmx.data.benchmarks import benchmark_names

    _names(benchmark_names(), as_json)


@list_.command()
@click.option("--root", metavar="FOLDER", default="caches", show_default=True, help="Folder or url of all caches.")
@_JSON
def caches(root: str, as_json: bool) -> None:
    """The caches below a folder or a url such as s3://bucket/caches."""
    from vlmx.cache_specs.catalog import list_caches

    _names(list_caches(root), as_json)


@list_.command()
@click.option("--root", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@_JSON
def runs(root: Path, as_json: bool) -> None:
    """The training runs below a folder, and their state."""
    from vlmx.runs import RunFolder, list_runs

    found = [RunFolder(root / name) for name in list_runs(root)]
    if as_json:
        click.echo(json.dumps([{"name": run.name, **run.status} for run in found], indent=1))
    else:
        table(["run", "state", "started"], [[run.name, run.status["state"], run.status["started"]] for run in found])


def _show(facts: Sequence[tuple[str, str]]) -> None:
    """Names and what they are, below each other, on stdout."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        click.echo(f"{name:<{width}}  {value}")


def _names(names: list[str], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(names))
    else:
        for name in names:
            click.echo(name)


@click.command()
@click.option("--caches", metavar="FOLDER", default="caches", show_default=True, help="Folder or url of all caches.")
@click.option("--json", "as_json", is_flag=True, help="Print a list of findings on stdout instead.")
def doctor(caches: str, as_json: bool) -> None:
    """Check libraries, devices, weights and disk of this machine. Exits 8 when something needed does not work."""
    from vlmx.serve.doctor import examine

    findings = examine(caches)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
        sys.exit(0 if all(f.ok for f in findings) else 8)
    table(["", "checked", "found"], [["ok" if f.ok else "FAIL", f.subject, f.detail] for f in findings])
    for finding in findings:
        if finding.fix:
            click.echo(f"{finding.subject}: {finding.fix}")
    sys.exit(0 if all(f.ok for f in findings) else 8)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell: backbones, caches and runs are completed too.

    \b
    bash: vlmx completion bash >> ~/.bashrc
    zsh:  vlmx completion zsh  >> ~/.zshrc
    fish: vlmx completion fish > ~/.config/fish/completions/vlmx.fish
    """
    from click.shell_completion import get_completion_class

    root = click.get_current_context().find_root().command
    completer = get_completion_class(shell)
    assert completer is not None
    click.echo(completer(root, {}, "vlmx", "_VLMX_COMPLETE").source())
