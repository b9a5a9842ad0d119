"""What does `vlmx profile` take, and what does it print? Heavy modules are imported only when it runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from vlmx.console import note, table
from vlmx.extract.arguments import check_engine, complete_backbone, complete_engine, parse_res
from vlmx.extract.backbones import catalogue
from vlmx.extract.ops import engines

if TYPE_CHECKING:
    from vlmx.serve.profile import EncoderCost

BESIDE = ("vit-s-in21k", "vmamba-t-in1k")
GROWTH = ("224", "512", "1024")
EPILOG = """\b
Worked examples:
  vlmx profile encoders
      ViT-S beside VMamba-T at 224, 512 and 1024 pixels: a minute or two
  vlmx profile encoders --backbone vmamba-s-coco --backbone vitdet-b-coco --res 512 --res 800x1328 --compute bfloat16
  vlmx profile encoders --backbone vim-s-in1k --res 224 --scan torch --json
"""


@click.group()
def profile() -> None:
    """Measure what encoders cost on this machine."""


@profile.command(epilog=EPILOG)
@click.option(
    "--backbone",
    "names",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_backbone,
    help=f"An encoder; may be repeated. Default: {' and '.join(BESIDE)}.",
)
@click.option(
    "--res",
    "sizes",
    multiple=True,
    metavar="RES",
    help="Input size in pixels: 512, or HEIGHTxWIDTH; may be repeated. Default: the encoder's own; without --backbone "
    f"{', '.join(GROWTH)}.",
)
@click.option("--compute", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option(
    "--scan",
    metavar="ENGINE",
    shell_complete=complete_engine,
    help="Only this engine of the selective scan. Default: every one that runs here.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=2.0,
    show_default=True,
    help="How long passes are repeated for one figure; at least one is made.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def encoders(
    names: tuple[str, ...], sizes: tuple[str, ...], compute: str, scan: str | None, seconds: float, as_json: bool
) -> None:
    """Time encoders with random weights: an image, its scans, its matrix products alone, by engine and by size.

    On a CPU, times are processor time of one thread; `vlmx extract` runs such a pass on every core.
    """
    check_engine(scan)
    sizes = sizes or (() if names else GROWTH)
    resolutions = [parse_res(size) for size in sizes]
    for name in names:
        for res in resolutions:
            catalogue.row(name).check_size(res)

    import torch

    from vlmx.serve.profile import profile_encoders

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engines.force(scan, device)
    torch.backends.cudnn.allow_tf32 = False  # as in vlmx extract
    costs = profile_encoders(
        names or BESIDE, resolutions or [None], dtype=getattr(torch, compute), device=device, budget_s=seconds
    )
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "one thread of the CPU"
    if as_json:
        rows = [{**asdict(cost), "over_products": cost.over_products} for cost in costs]
        click.echo(json.dumps({"device": where, "compute": compute, "costs": rows}, indent=1))
        return
    note(f"{where}, {compute}, random weights")
    _show_costs(costs)
    if len(resolutions) > 1:
        click.echo("")
        _show_growth(costs)


def _show_costs(costs: Sequence[EncoderCost]) -> None:
    """One line for each measurement."""
    rows = [
        [
            cost.backbone,
            f"{cost.height}x{cost.width}",
            str(cost.tokens),
            cost.engine,
            f"{1000 * cost.image_s:.1f}",
            f"{1 / cost.image_s:.2f}",
            f"{100 * cost.scan_share:.1f} %" if cost.engine != "none" else "-",
            f"{cost.over_products:.2f}",
        ]
        for cost in costs
    ]
    table(["backbone", "HxW", "tokens", "scan engine", "ms/image", "images/s", "scan", "forward/products"], rows)
    note("forward/products: the whole pass / its matrix products, convolutions and attention alone")


def _show_growth(costs: Sequence[EncoderCost]) -> None:
    """One line for each size: milliseconds with the best engine, and how many times that of the first size it is."""
    best: dict[tuple[str, str], EncoderCost] = {}
    for cost in costs:
        best.setdefault((f"{cost.height}x{cost.width}", cost.backbone), cost)  # the best engine is measured first
    sizes = list(dict.fromkeys(size for size, _ in best))
    names = list(dict.fromkeys(name for _, name in best))
    rows = []
    for size in sizes:
        row = [size]
        for name in names:
            seconds, first = best[size, name].image_s, best[sizes[0], name].image_s
            row.append(f"{1000 * seconds:,.0f} (x{seconds / first:.1f})")
        rows.append(row)
    table(["HxW", *(f"{name}, ms/image" for name in names)], rows)
