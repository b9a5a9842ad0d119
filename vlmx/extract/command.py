"""What does `vlmx extract` take, and what does it print? Heavy modules are imported only when it runs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from click.shell_completion import CompletionItem

from vlmx.cache_specs.spec import DType
from vlmx.console import format_bytes, note, warn
from vlmx.errors import UsageError
from vlmx.extract.backbones import catalogue

if TYPE_CHECKING:
    from vlmx.extract.runner import ExtractSummary

EPILOG = """\b
Worked examples:
  vlmx extract --backbone vit-mini-scenes
      the embedded study with an encoder that ships with vlmx
  vlmx extract --backbone vmamba-t-in1k --weights random:0 --res 224 --data photos/
      a folder of photos with an untrained encoder, to see that everything works
  vlmx extract --backbone vmamba-s-coco --res 512 --data llava_v1_5_mix665k.json --image-root images/
      every image that a LLaVA-style JSON names, once each
  vlmx extract --backbone vmamba-s-coco --res 800x1328 --data 'shards/{000..015}.tar' --name photos --dtype bfloat16
      webdataset tars, 800 pixels high and 1328 wide

\b
Stopped or killed, the same command goes on where it was. Images that the cache has already are not encoded again.
Photos are letterboxed: padded at their own size to the shape of --res, then resized. EXIF rotation is not applied.
"""


SHOWN_FAILURES = 5


def complete_backbone(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of backbones for the shell."""
    return [
        CompletionItem(row.name, help=row.pretraining) for row in catalogue.rows() if row.name.startswith(incomplete)
    ]


def parse_res(text: str) -> tuple[int, int]:
    """Height and width in pixels: "512" -> (512, 512), "800x1328" -> (800, 1328).

    Raises:
        UsageError: it is neither.
    """
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if not match:
        raise UsageError(f"'{text}' is not a resolution", fix="--res takes 512, or HEIGHTxWIDTH such as 800x1328")
    return int(match[1]), int(match[2] or match[1])


@click.command(epilog=EPILOG)
@click.option(
    "--backbone",
    "name",
    required=True,
    metavar="NAME",
    shell_complete=complete_backbone,
    help="The encoder, e.g. vmamba-s-coco (vlmx list backbones).",
)
@click.option("--res", metavar="RES", help="Input size in pixels: 512, or HEIGHTxWIDTH. Default: the backbone's own.")
@click.option(
    "--data",
    default="mini",
    show_default=True,
    metavar="DATA",
    help="mini (the embedded study), a folder, a LLaVA-style .json or .jsonl, or webdataset .tar files.",
)
@click.option(
    "--image-root",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Where the image paths of a JSON start. Default: the folder of the JSON.",
)
@click.option("--name", "dataset", metavar="NAME", help="Name of the data set. Default: taken from DATA.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Take only the first N images.")
@click.option(
    "--weights",
    metavar="FILE",
    shell_complete=lambda ctx, param, text: [CompletionItem(text, type="file")],
    help="Checkpoint file, or random:SEED for an untrained encoder. Default: the published file, looked up.",
)
@click.option(
    "--out",
    "root",
    type=click.Path(path_type=Path, file_okay=False),
    default="caches",
    show_default=True,
    metavar="FOLDER",
    help="Folder of all caches.",
)
@click.option(
    "--dtype",
    type=click.Choice(get_args(DType)),
    default="float16",
    show_default=True,
    help="How tokens are stored. The encoder computes in float32.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Images a forward pass on a GPU. A CPU takes at most 8, so that bytes never depend on it.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=min(8, os.cpu_count() or 1),
    show_default="cores, at most 8",
    help="Threads that read and decode images ahead of the encoder.",
)
@click.option(
    "--out-norm",
    metavar="CHOICE",
    help="Normalisation of the tokens, for backbones that have it: trained, identity-affine, none.",
)
def extract(
    name: str,
    res: str | None,
    data: str,
    image_root: Path | None,
    dataset: str | None,
    limit: int | None,
    weights: str | None,
    root: Path,
    dtype: DType,
    batch_size: int,
    threads: int,
    out_norm: str | None,
) -> None:
    """Run a frozen encoder once over all images and store its visual tokens.

    Prints the name of the cache on stdout; `vlmx train --cache NAME` takes it.
    """
    row = catalogue.row(name)
    size = parse_res(res) if res else row.native_res

    from vlmx.extract.images import open_source

    source = open_source(data, image_root, dataset)
    if limit is not None:
        source = source.first(limit)

    import torch

    from vlmx.extract.backbones.base import build_backbone
    from vlmx.extract.runner import extract as run

    torch.backends.cudnn.allow_tf32 = False  # --dtype's help promises float32
    options: dict[str, Any] = {} if out_norm is None else {"out_norm": out_norm}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = build_backbone(name, res=size, weights=weights, device=device, **options)
    summary = run(backbone, source, root=root, dtype=dtype, batch_size=batch_size, threads=threads)
    show(summary)
    click.echo(summary.cache.name)


def show(summary: ExtractSummary) -> None:
    """Print what was done (stderr)."""
    note(
        f"done: {summary.images:,} images ({summary.different:,} different), {summary.new:,} new, "
        f"{format_bytes(summary.new_bytes)} written; image table '{summary.dataset}'"
    )
    if summary.new:
        took = summary.seconds
        note(f"time: encoder {took.encode:.1f} s, writing {took.write:.1f} s, waiting for images {took.wait:.1f} s")
    if summary.failed:
        warn(f"{len(summary.failed):,} images could not be decoded; the image table lists them all")
        for key, reason in list(summary.failed.items())[:SHOWN_FAILURES]:
            note(f"  {key}: {reason}")
    if summary.untrained:
        warn(summary.untrained)
