"""What does `vlmx weights` do? Say what is in a checkpoint file, and write it as safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vlmx.console import format_bytes, note, warn
from vlmx.errors import WeightsError
from vlmx.extract.arguments import complete_backbone
from vlmx.extract.backbones import catalogue

if TYPE_CHECKING:
    from vlmx.extract.weights.check import Report
    from vlmx.extract.weights.state_dicts import Checkpoint

EPILOG = """\b
Worked examples:
  vlmx weights check vssm_small_0229_ckpt_epoch_222.pth                 what it is, and which backbones it fits
  vlmx weights check model_final_61ccd1.pkl --backbone vitdet-b-coco    whether it fits this one; if not, every key
  vlmx weights convert model_final_61ccd1.pkl                           the same weights as safetensors, beside it
  vlmx weights convert model_final_61ccd1.pkl --backbone vitdet-b-coco  ... where `vlmx extract` looks for them

\b
Files are told apart by what they contain. Nothing that they contain is run.
"""

_FILE = click.argument("file", type=click.Path(path_type=Path))


@click.group(epilog=EPILOG)
def weights() -> None:
    """Check and convert checkpoints of encoders.

    FILE is a checkpoint as published (safetensors, torch, detectron2, a zip with one of these), a Hugging Face folder,
    or the index of a sharded checkpoint.
    """


@weights.command()
@_FILE
@click.option("--backbone", "name", metavar="NAME", shell_complete=complete_backbone, help="Compare with this one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def check(file: Path, name: str | None, as_json: bool) -> None:
    """Say what is in a checkpoint, and which backbones it fits.

    The exit code is 4 if it cannot be read, holds NaN or infinity, or fits no backbone (with --backbone: not this one).
    """
    row = catalogue.row(name) if name else None
    from dataclasses import asdict

    from vlmx.extract.weights.check import check as inspect

    report = inspect(file, row)
    if as_json:
        click.echo(json.dumps(asdict(report), indent=1))
    else:
        _show(report)
    report.raise_if_unfit()


def _show(report: Report) -> None:
    lines = [("file", report.path)]
    if len(report.files) > 1:
        lines.append(("shards", ", ".join(Path(file).name for file in report.files)))
    elif report.files[0] != report.path:
        lines.append(("read from", report.files[0]))
    lines.append(("format", report.format + (f", as {report.zip_member} in a zip" if report.zip_member else "")))
    lines.append(("size", f"{format_bytes(report.bytes)} ({report.bytes:,} bytes)"))
    if report.sha256:
        lines.append(("sha256", report.sha256))
    if report.identity != report.sha256:
        lines.append(("identity", f"{report.identity} ({'of its source' if report.sha256 else 'of all shards'})"))
    lines.append(("state dict", f"entry '{report.nested_under}'" if report.nested_under else "the file itself"))
    if report.not_taken:
        lines.append(("not taken", ", ".join(report.not_taken)))
    if report.not_tensors:
        lines.append(("no tensors", ", ".join(report.not_tensors)))
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in report.dtypes.items())
    lines.append(("tensors", f"{report.tensors:,} with {report.parameters:,} numbers: {dtypes}"))
    lines.append(("not finite", ", ".join(report.not_finite) or "none"))
    lines.append(("fits", ", ".join(report.fits) or "no backbone"))
    for label, text in lines:
        click.echo(f"{label:<11} {text}")


@weights.command()
@_FILE
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.option(
    "--backbone",
    "name",
    metavar="NAME",
    shell_complete=complete_backbone,
    help="Check that it fits this one first, and by default write NAME.safetensors where it is looked for.",
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
def convert(file: Path, out: Path | None, name: str | None, force: bool) -> None:
    """Write a checkpoint as safetensors: names as published, tensors alone.

    Caches made from OUT are the same as those made from FILE: it remembers FILE's SHA-256. Without OUT it is written
    beside FILE; with --backbone into the folder $VLMX_WEIGHTS, or ~/.cache/vlmx/weights if that is not set.
    """
    row = catalogue.row(name) if name else None

    from vlmx.extract.weights.convert import check_target, default_target
    from vlmx.extract.weights.convert import convert as write
    from vlmx.extract.weights.formats import read_checkpoint
    from vlmx.extract.weights.lookup import cache_folder, named_folder

    if out is None:
        folder = named_folder() or cache_folder()
        out = folder / f"{row.name}.safetensors" if row else default_target(file)
    check_target(file, out, force=force)
    checkpoint = read_checkpoint(file)
    if row:
        _refuse_unfit(row, checkpoint, file)
    write(file, checkpoint, out)
    if checkpoint.not_tensors:
        warn(f"not tensors, so not written: {', '.join(checkpoint.not_tensors)}")
    if checkpoint.not_taken:
        note(f"plain weights were written; left out: {', '.join(checkpoint.not_taken)}")
    before, after = sum(path.stat().st_size for path in checkpoint.files), out.stat().st_size
    note(f"{len(checkpoint.state):,} tensors; {format_bytes(before)} -> {format_bytes(after)}")
    click.echo(str(out))


def _refuse_unfit(row: catalogue.BackboneRow, checkpoint: Checkpoint, file: Path) -> None:
    from vlmx.extract.backbones.loading import fit_problems
    from vlmx.extract.weights.check import not_finite

    problems = fit_problems(row, checkpoint.state)
    if broken := not_finite(checkpoint.state):
        problems.append(f"{len(broken)} tensors hold NaN or infinity: {', '.join(broken[:4])}")
    if problems:
        raise WeightsError(
            f"{file} does not fit {row.name}; nothing was written",
            why="; ".join(problems),
            fix=f"vlmx weights check {file} shows which backbones it fits",
        )
