"""What does `vlmx extract` take, and what does it print? Heavy modules are imported only when it runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click
from click.shell_completion import CompletionItem

from vlmx.cache_specs.spec import Codec, DType
from vlmx.console import format_bytes, note, warn
from vlmx.data.published import DATA_ROOT
from vlmx.errors import UsageError
from vlmx.extract.arguments import (
    BatchSizeParam,
    check_engine,
    chosen_encoders,
    complete_backbone,
    complete_data,
    complete_engine,
    complete_row,
)
from vlmx.extract.many import ManyProcesses
from vlmx.extract.ops import engines
from vlmx.extract.ops.engines import ENGINE_NAMES
from vlmx.extract.worker import worker_of

if TYPE_CHECKING:
    from vlmx.extract.estimate import Estimate
    from vlmx.extract.runner import ExtractSummary

EPILOG = """\b
Worked examples:
  vlmx extract --backbone vit-mini-scenes
      the embedded study with an encoder that ships with vlmx
  vlmx extract --backbone vmamba-t-in1k --weights random:0 --res 224 --data photos/
      a folder of photos with an untrained encoder, to see that everything works
  vlmx extract --backbone vmamba-s-coco --res 512 --data llava_v1_5_mix665k.json --image-root images/
      every image that a LLaVA-style JSON names, once each
  vlmx extract --backbone vmamba-s-coco --res 512 --data vqav2,refcoco --data-root data/
      published benchmarks; a photo that several share is encoded once
  vlmx extract --backbone vmamba-s-coco --res 512 --data vqav2,refcoco --data-root data/ --dry-run
      what that would take, how long, and whether a cache pays; nothing is stored
  vlmx extract --backbone vmamba-s-coco --res 800x1328 --data 'shards/{000..015}.tar' --name photos --dtype bfloat16
      webdataset tars, 800 pixels high and 1328 wide
  vlmx extract --row dinov2-l+siglip-so400m-384@384/mlp3 --data llava_v1_5_mix665k.json --image-root images/
      what a row of the paper needs: here two caches, which training joins (vlmx list rows)
  vlmx extract --backbone vmamba-s-coco --res 512 --data photos/ --nproc 8
      a process for each of eight GPUs; on several machines: torchrun ... -m vlmx extract ..., or --slurm 32 > job.sh

\b
Stopped or killed, the same command goes on where it was. Images that the cache has already are not encoded again.
Photos are letterboxed: padded at their own size to the shape of --res, then resized. EXIF rotation is not applied.
"""


SHOWN_FAILURES = 5


@click.command(cls=ManyProcesses, epilog=EPILOG)
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
    multiple=True,
    default=("mini",),
    show_default=True,
    metavar="DATA",
    shell_complete=complete_data,
    help="mini (the embedded study), a published data set (vqav2, refcoco, ..., llava-665k), a folder, a LLaVA-style "
    ".json, .jsonl or .parquet, webdataset .tar files (also https:// and s3://), or images in .parquet files. Several: "
    "give it again, or separate them by commas.",
)
@click.option(
    "--image-root",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Where the image paths of a JSON, or of conversations in parquet, start. Default: the folder of the file.",
)
@click.option(
    "--data-root",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help=f"Folder of the published data sets' files. Default: {DATA_ROOT}.",
)
@click.option("--image-column", metavar="NAME", help="Column of the images in .parquet files. Default: found.")
@click.option("--name", "dataset", metavar="NAME", help="Name of the data set. Default: taken from DATA.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Take only the first N images of each data set.")
@click.option(
    "--weights",
    metavar="FILE",
    shell_complete=lambda ctx, param, text: [CompletionItem(text, type="file")],
    help="Checkpoint file, or random:SEED for an untrained encoder. Default: the published file, looked up.",
)
@click.option(
    "--out",
    "root",
    default="caches",
    show_default=True,
    metavar="FOLDER",
    help="Folder of all caches, or a url such as s3://bucket/caches.",
)
@click.option(
    "--dtype",
    type=click.Choice(get_args(DType)),
    default="float16",
    show_default=True,
    help="How tokens are stored. int8: half of float16, on a fixed scale for each channel; its error is measured.",
)
@click.option(
    "--codec",
    type=click.Choice(get_args(Codec)),
    default="crc32c",
    show_default=True,
    help="blosc compresses tokens without loss: 1.05 to 1.35 times smaller, and several times slower to read.",
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
    help="Threads that read and decode images ahead of the encoder. How many threads encode on a CPU is for "
    "OMP_NUM_THREADS to say; default: all cores.",
)
@click.option(
    "--nproc",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Processes that fill the cache together: one for each GPU, or each with its part of the cores.",
)
@click.option(
    "--slurm",
    type=click.IntRange(1),
    is_flag=False,
    flag_value=8,
    metavar="[N]",
    help="Print the script of a Slurm job array of N tasks (without a number: 8) that do this together, and stop.",
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
@click.option("--dry-run", is_flag=True, help="Say what this would do, take and pay, from a sample; store nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print it as JSON.")
@click.option("--force", is_flag=True, help="Begin also when the tokens do not fit on the disk.")
@click.option("--crop", is_flag=True, help="Crop the letterboxed photo's border where the reference's code does.")
def extract(
    name: str | None,
    row_name: str | None,
    res: str | None,
    data: tuple[str, ...],
    image_root: Path | None,
    data_root: Path | None,
    image_column: str | None,
    dataset: str | None,
    limit: int | None,
    weights: str | None,
    root: str,
    dtype: DType,
    codec: Codec,
    compute: str,
    scan: str | None,
    batch_size: int | Literal["auto"],
    threads: int,
    out_norm: str | None,
    block: int | None,
    feature: str | None,
    crop: bool,
    dry_run: bool,
    as_json: bool,
    force: bool,
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
    if as_json and not dry_run:
        raise UsageError("--json belongs to --dry-run", fix="add --dry-run, or leave --json out")

    from vlmx.extract.sources import open_sources

    sources = open_sources(data, image_root, dataset, data_root=data_root, image_column=image_column, limit=limit)

    import torch

    from vlmx.extract.backbones.base import build_backbone
    from vlmx.extract.originals import recipe
    from vlmx.extract.runner import extract as run

    worker = worker_of(os.environ)
    device = worker.device()
    engines.force(scan, device)
    torch.backends.cudnn.allow_tf32 = False  # --compute promises float32
    given = {"out_norm": out_norm, "block": block, "feature": feature}
    options: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
    if device.type == "cpu" and batch_size != "auto":
        note("--batch-size is for GPUs: a CPU has a size of its own, on which the bytes of a cache depend")
    if device.type == "cuda" and compute == "float32":
        note("computing in float32, so that tokens are those of any other machine; --compute bfloat16 is faster")
    if dry_run:
        from vlmx.cache_specs.places import place_of
        from vlmx.extract import estimate_text
        from vlmx.extract.estimate import estimate, read_sources

        inventories = read_sources(sources, place_of(root), threads=threads)
        estimates: list[Estimate] = []
        for row, size in encoders:
            estimates.append(
                estimate(
                    row,
                    size,
                    inventories,
                    root=place_of(root),
                    weights=weights,
                    dtype=dtype,
                    codec=codec,
                    compute=getattr(torch, compute),
                    device=device,
                    crop=crop,
                    options=options,
                    batch_size=batch_size,
                    threads=threads,
                    taken_bytes=sum(earlier.new_bytes for earlier in estimates),
                )
            )
        if worker.speaks:
            estimate_text.print_json(estimates) if as_json else estimate_text.print_text(estimates)
        return
    names, sealed = [], []
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
        if (below or right) and worker.speaks:
            warn(f"{row.name} sees whole patches only: {below} rows and {right} columns of pixels are left out")
        summary = run(
            backbone,
            sources,
            root=root,
            dtype=dtype,
            codec=codec,
            batch_size=batch_size,
            threads=threads,
            part=worker.part,
            stay=worker.stays,
            speaks=worker.speaks,
            force=force,
            recipe=recipe(
                data,
                image_root=image_root,
                name=dataset,
                data_root=data_root,
                image_column=image_column,
                limit=limit,
            ),
        )
        if worker.speaks:
            show(summary)
            if scan is not None and summary.scan is None:
                warn(f"{row.name} has no selective scan: --scan {scan} changed nothing")
        names.append(summary.cache.name)
        sealed.append(summary.sealed)
    worker.finish("+".join(names), sealed=all(sealed))


def show(summary: ExtractSummary) -> None:
    """Print what was done (stderr)."""
    new = f"{summary.new:,} new"
    if summary.several:
        new = f"{summary.missing:,} were missing, {summary.new:,} of them encoded by this process"
    note(
        f"done: {summary.images:,} images ({summary.different:,} different), {new}, "
        f"{format_bytes(summary.new_bytes)} written; image table{'s' if len(summary.datasets) > 1 else ''} "
        + ", ".join(f"'{name}'" for name in summary.datasets)
    )
    if summary.new:
        note(summary.seconds.describe(summary.new))
    if summary.scan:
        note(f"selective scan: {summary.scan.engine}")
        if summary.scan.fallback:
            warn(summary.scan.fallback)
    if summary.error:
        note(
            f"8 bits: relative error {summary.error.relative:.4f}, {summary.error.clipped:,} of "
            f"{summary.error.values:,} numbers clipped"
        )
    if summary.new_error and not summary.new_error.fits:
        warn(
            f"the 8-bit scales of this cache do not fit the images that were added: relative error "
            f"{summary.new_error.relative:.3f}, {summary.new_error.clipped:,} of {summary.new_error.values:,} numbers "
            "clipped; extract them in 16 bits, or everything in 8 bits into another --out with typical images first"
        )
    if not summary.sealed:
        note("other processes are still at work; the last one declares the cache complete")
    if summary.failed:
        warn(f"{len(summary.failed):,} images could not be decoded; the image table lists them all")
        for key, reason in list(summary.failed.items())[:SHOWN_FAILURES]:
            note(f"  {key}: {reason}")
    if summary.untrained:
        warn(summary.untrained)
