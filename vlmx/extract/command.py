"""What does `vlmx extract` take, and what does it print? Heavy modules are imported only when it runs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click
from click.shell_completion import CompletionItem

from vlmx.cache_specs.presets import preset, presets
from vlmx.cache_specs.spec import DType
from vlmx.console import format_bytes, note, warn
from vlmx.errors import UsageError
from vlmx.extract.backbones import catalogue
from vlmx.extract.ops import engines
from vlmx.extract.ops.engines import ENGINE_NAMES
from vlmx.registry import unknown_name

if TYPE_CHECKING:
    from vlmx.extract.backbones.row import BackboneRow
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
  vlmx extract --row dinov2-l+siglip-so400m-384@384/mlp3 --data llava_v1_5_mix665k.json --image-root images/
      what a row of the paper needs: here two caches, which training joins (vlmx list rows)

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


def complete_row(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of published rows for the shell."""
    return [CompletionItem(row.name) for row in presets() if row.name.startswith(incomplete)]


def complete_engine(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of scan engines for the shell."""
    return [CompletionItem(name) for name in ENGINE_NAMES if name.startswith(incomplete)]


def check_engine(name: str | None) -> None:
    """Make sure that `--scan` names an engine, if it is given; whether it can run here is asked later.

    Raises:
        UnknownNameError: it does not.
    """
    if name is not None and name not in ENGINE_NAMES:
        raise unknown_name("scan engine", name, ENGINE_NAMES, listing="vlmx doctor")


def parse_res(text: str) -> tuple[int, int]:
    """Height and width in pixels: "512" -> (512, 512), "800x1328" -> (800, 1328).

    Raises:
        UsageError: it is neither.
    """
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if not match:
        raise UsageError(f"'{text}' is not a resolution", fix="--res takes 512, or HEIGHTxWIDTH such as 800x1328")
    return int(match[1]), int(match[2] or match[1])


class BatchSizeParam(click.ParamType):
    """A positive number, or "auto"."""

    name = "batch size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Literal["auto"]:
        if value == "auto" or (isinstance(value, int) and value > 0):
            return value  # type: ignore[no-any-return]
        if re.fullmatch(r"[1-9]\d{0,5}", str(value)):
            return int(value)
        self.fail(f"'{value}' is neither a positive number nor auto", param, ctx)


@click.command(epilog=EPILOG)
@click.option(
    "--backbone",
    "name",
    metavar="NAME",
    shell_complete=complete_backbone,
    help="The encoder, e.g. vmamba-s-coco (vlmx list backbones), or timm:ID.TAG for any other model of timm.",
)
@click.option(
    "--row",
    "row_name",
    metavar="ROW",
    shell_complete=complete_row,
    help="A row of the paper (vlmx list rows) in place of --backbone and --res.",
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
    help="How tokens are stored.",
)
@click.option(
    "--compute",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="How the encoder computes. bfloat16 is faster where the hardware has it; its tokens are another cache's.",
)
@click.option(
    "--scan",
    metavar="ENGINE",
    shell_complete=complete_engine,
    help=f"Engine of the selective scan: {', '.join(ENGINE_NAMES)}. Default: the first that runs here (vlmx doctor).",
)
@click.option(
    "--batch-size",
    type=BatchSizeParam(),
    metavar="N|auto",
    default="auto",
    show_default=True,
    help="Images a forward pass on a GPU; auto tries sizes out. A CPU takes at most 8: its bytes never depend on it.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=min(32, os.cpu_count() or 1),
    show_default="cores, at most 32",
    help="Threads that read and decode images ahead of the encoder. On a CPU, that has OMP_NUM_THREADS, or all cores.",
)
@click.option(
    "--out-norm",
    metavar="CHOICE",
    help="Normalisation of the tokens, for VMamba: trained, identity-affine, none.",
)
@click.option(
    "--block",
    type=int,
    metavar="N",
    help="Block whose output is taken, for ViT, CLIP, SigLIP, DINOv2 and timm. Default: -2, the second to last.",
)
@click.option("--feature", metavar="CHOICE", help="Map that is taken, for ViTDet: last_feat, p4. Default: last_feat.")
@click.option("--crop", is_flag=True, help="Crop the letterboxed photo's border where the reference's code does.")
def extract(
    name: str | None,
    row_name: str | None,
    res: str | None,
    data: str,
    image_root: Path | None,
    dataset: str | None,
    limit: int | None,
    weights: str | None,
    root: Path,
    dtype: DType,
    compute: str,
    scan: str | None,
    batch_size: int | Literal["auto"],
    threads: int,
    out_norm: str | None,
    block: int | None,
    feature: str | None,
    crop: bool,
) -> None:
    """Run a frozen encoder once over all images and store its visual tokens.

    Prints the name of the cache on stdout; `vlmx train --cache NAME` takes it.
    """
    encoders = chosen_encoders(name, row_name, res)
    if weights is not None and len(encoders) > 1 and not weights.startswith("random:"):
        raise UsageError(
            f"--weights cannot be the weights of {len(encoders)} encoders",
            why=f"the row has {' and '.join(row.name for row, _ in encoders)}",
            fix="extract them one after the other with --backbone",
        )

    check_engine(scan)

    from vlmx.extract.images import open_source

    source = open_source(data, image_root, dataset)
    if limit is not None:
        source = source.first(limit)

    import torch

    from vlmx.extract.backbones.base import build_backbone
    from vlmx.extract.runner import extract as run

    device = "cuda" if torch.cuda.is_available() else "cpu"
    engines.force(scan, torch.device(device))
    torch.backends.cudnn.allow_tf32 = False  # --compute promises float32
    given = {"out_norm": out_norm, "block": block, "feature": feature}
    options: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
    if device == "cuda" and compute == "float32":
        note("computing in float32, so that tokens are those of any other machine; --compute bfloat16 is faster")
    names = []
    for row, size in encoders:
        backbone = build_backbone(
            row.name,
            res=size,
            weights=weights,
            dtype=getattr(torch, compute),
            device=device,
            crop=crop,
            **options,
        )
        below, right = row.unseen(size)
        if below or right:
            warn(f"{row.name} sees whole patches only: {below} rows and {right} columns of pixels are left out")
        summary = run(backbone, source, root=root, dtype=dtype, batch_size=batch_size, threads=threads)
        show(summary)
        if scan is not None and summary.scan is None:
            warn(f"{row.name} has no selective scan: --scan {scan} changed nothing")
        names.append(summary.cache.name)
    click.echo("+".join(names))


def chosen_encoders(
    name: str | None, row_name: str | None, res: str | None
) -> list[tuple[BackboneRow, tuple[int, int]]]:
    """The encoders, each with its (height, width), that --backbone and --res, or --row, stand for.

    Raises:
        UsageError: both are given, or neither.
        UnknownNameError: there is no such backbone or row.
    """
    if (name is None) == (row_name is None) or (row_name is not None and res is not None):
        raise UsageError(
            "it is not clear which encoder is meant",
            why="--row stands for a backbone and its size" if row_name else "neither --backbone nor --row is given",
            fix="give --backbone NAME (and --res), or --row ROW alone",
        )
    if name is not None:
        row = catalogue.row(name)
        return [(row, parse_res(res) if res else row.native_res)]
    assert row_name is not None
    published = preset(row_name)
    return [(catalogue.row(each), published.res) for each in published.backbones]


def show(summary: ExtractSummary) -> None:
    """Print what was done (stderr)."""
    note(
        f"done: {summary.images:,} images ({summary.different:,} different), {summary.new:,} new, "
        f"{format_bytes(summary.new_bytes)} written; image table '{summary.dataset}'"
    )
    if summary.new:
        note(summary.seconds.describe(summary.new))
    if summary.scan:
        note(f"selective scan: {summary.scan.engine}")
        if summary.scan.fallback:
            warn(summary.scan.fallback)
    if summary.failed:
        warn(f"{len(summary.failed):,} images could not be decoded; the image table lists them all")
        for key, reason in list(summary.failed.items())[:SHOWN_FAILURES]:
            note(f"  {key}: {reason}")
    if summary.untrained:
        warn(summary.untrained)
