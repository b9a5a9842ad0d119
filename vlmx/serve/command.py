"""Options of `vlmx demo`, `vlmx list`, `vlmx doctor` and `vlmx completion`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from vlmx.console import table


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
    """List backbones, connectors, benchmarks, caches or runs."""


_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


@list_.command()
@click.option("--family", help="Only this family, e.g. vmamba.")
@_JSON
def backbones(family: str | None, as_json: bool) -> None:
    """The vision encoders, and the checkpoint file that each one reads."""
    import dataclasses

    from vlmx.extract.backbones.catalogue import rows

    chosen = [row for row in rows() if family in (None, row.family)]
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(row) for row in chosen], indent=1))
        return
    cells = [
        [
            row.name,
            row.pretraining,
            f"{row.native_res[0]}x{row.native_res[1]}",
            str(row.dim),
            str(row.stride),
            row.published_size,
            "ships with vlmx" if row.packaged else row.file,
        ]
        for row in chosen
    ]
    table(["backbone", "pretraining", "native HxW", "width", "stride", "size", "checkpoint"], cells)


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
@click.option("--root", type=click.Path(path_type=Path), default=Path("caches"), show_default=True)
@_JSON
def caches(root: Path, as_json: bool) -> None:
    """The caches below a folder."""
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


def _names(names: list[str], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(names))
    else:
        for name in names:
            click.echo(name)


@click.command()
@click.option(
    "--caches", type=click.Path(path_type=Path), default=Path("caches"), show_default=True, help="Folder of caches."
)
def doctor(caches: Path) -> None:
    """Check libraries, devices, weights and disk of this machine. Exits 8 when something needed does not work."""
    from vlmx.serve.doctor import examine

    findings = examine(caches)
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
