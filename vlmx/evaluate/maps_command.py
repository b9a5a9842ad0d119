"""What does `vlmx maps` take, and which image, box and caches does it mean? Light until it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from vlmx.cache_specs.command import complete_caches
from vlmx.console import note, table
from vlmx.errors import UsageError
from vlmx.evaluate.command import RUNS_ROOT, caches_option, complete_run
from vlmx.runs import RunFolder

if TYPE_CHECKING:
    from vlmx.evaluate.maps_plot import Panel
    from vlmx.evaluate.maps_region import Region
    from vlmx.evaluate.score import Grade

NO_BOX = "the answer is not a box"
SUFFIXES = (".png", ".svg", ".pdf")

EPILOG = """\b
Worked examples:
  vlmx maps --cache vit-s-in1k --cache vmamba-t-in1k --image coco/val2014/COCO_val2014_000000000042.jpg \\
      --data vqav2 --box 120,80,60,40 --photo data/coco/val2014/COCO_val2014_000000000042.jpg
  vlmx maps --run vit-mlp2 --run vmamba-mlp2 --question "the red mug" -o mug.pdf
      the box that a question asks for, and what each run answered
  vlmx maps --cache vit-mini-scenes --image test/000000 --data mini --box 10,10,20,20

\b
Each map shows how similar every token is to the mean token of the box (cosine), as in the paper's figure 2; all maps
share one colour scale. Only caches are read, so neither an encoder nor a GPU is needed.
"""


@click.command(epilog=EPILOG)
@click.option(
    "--cache",
    "cache_names",
    multiple=True,
    metavar="CACHE",
    shell_complete=complete_caches,
    help="Name, beginning of a name, or folder; may be given several times. A+B joins two.",
)
@caches_option
@click.option("--image", metavar="ID|KEY", help="The image: its 64-digit id, or its key in a data set.")
@click.option("--data", "dataset", metavar="NAME", help="The data set that the key is of. Default: any that has it.")
@click.option("--box", "box_text", metavar="X,Y,W,H", help="The region, in pixels of the photo as it is stored.")
@click.option("--run", "run_names", multiple=True, metavar="RUN", shell_complete=complete_run, help="An evaluated run.")
@click.option("--question", metavar="ID|TEXT", help="With --run: a box question's id, or a part of its text.")
@click.option("--bench", "benchmark", metavar="NAME", help="With --run: the question's benchmark.  [default: any]")
@click.option(
    "--frame",
    type=click.Choice(["source", "padded"]),
    default="source",
    show_default=True,
    help="Show the photo alone, or the encoder's whole input with its padding.",
)
@click.option(
    "--photo", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="Draw this photo above the maps."
)
@click.option("--size", metavar="WxH", help="Width and height of the photo, where no data set and no --photo tells.")
@click.option(
    "--data-root",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where published benchmarks and their photos lie; a photo is drawn if it is there.  [default: data; with "
    "--run where they were when its questions were answered]",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("maps.png"),
    show_default=True,
    help="The picture to write: .png, .svg or .pdf.",
)
def maps(
    cache_names: tuple[str, ...],
    caches: str,
    image: str | None,
    dataset: str | None,
    box_text: str | None,
    run_names: tuple[str, ...],
    question: str | None,
    benchmark: str | None,
    frame: str,
    photo: Path | None,
    size: str | None,
    data_root: Path | None,
    out: Path,
) -> None:
    """Draw which tokens of an image are like those of a region, side by side for several caches.

    Say the region with --image and --box, or with --run and --question.
    """
    from vlmx.evaluate.maps_plot import Frame, draw_maps, pixels_of, save_figure
    from vlmx.evaluate.maps_region import source_wh_of
    from vlmx.runs import write_atomic

    if out.suffix not in SUFFIXES:
        raise UsageError(f"cannot draw a '{out.suffix}' file", fix=f"let -o end in {', '.join(SUFFIXES)}")
    region = _region(image, dataset, box_text, run_names, question, benchmark, caches=caches, data_root=data_root)
    if not (cache_names or region.answers):
        raise UsageError("no cache is named", fix="give --cache one or more times (vlmx list caches)")
    if photo is not None:
        region = replace(region, photo=photo.read_bytes())
    pixels_HW3 = None if region.photo is None else pixels_of(region.photo, name=str(photo or "the photo"))
    photo_wh = None if pixels_HW3 is None else (pixels_HW3.shape[1], pixels_HW3.shape[0])
    source_wh = source_wh_of(region, photo_wh, size)
    panels = _panels(region, cache_names, source_wh, caches)
    shown = next(known for known in get_args(Frame) if known == frame)
    figure = draw_maps(panels, title=region.title, frame=shown, photo_HW3=pixels_HW3)
    write_atomic(out, save_figure(figure, out.suffix))
    _print(panels)
    note(f"maps: {out.resolve()}")


def _region(
    image: str | None,
    dataset: str | None,
    box_text: str | None,
    run_names: Sequence[str],
    question: str | None,
    benchmark: str | None,
    *,
    caches: str,
    data_root: Path | None,
) -> Region:
    from vlmx.data.published import DATA_ROOT
    from vlmx.evaluate.maps_region import region_of_key, region_of_question

    if run_names or question is not None:
        extra = [name for name, value in (("--image", image), ("--box", box_text), ("--data", dataset)) if value]
        if extra:
            raise UsageError(
                f"{', '.join(extra)} cannot be given with --run and --question", why="the question says image and box"
            )
        if not run_names or question is None:
            raise UsageError("--run and --question belong together", fix="give both, or --image and --box")
        runs = [RunFolder.open(name, root=RUNS_ROOT) for name in run_names]
        return region_of_question(runs, question, caches, data_root=data_root, benchmark=benchmark)
    if benchmark is not None:
        raise UsageError("--bench changes nothing without --run and --question", fix="leave it out")
    if image is None or box_text is None:
        raise UsageError("no region is named", fix="give --image and --box, or --run and --question")
    return region_of_key(image, dataset, box_text, caches=caches, data_root=data_root or Path(DATA_ROOT))


def _panels(region: Region, cache_names: Sequence[str], source_wh: tuple[int, int], caches: str) -> list[Panel]:
    from vlmx.cache_specs.catalog import stem
    from vlmx.cache_specs.reader import open_cache
    from vlmx.evaluate.maps import region_map
    from vlmx.evaluate.maps_plot import Panel

    wanted: list[tuple[str, str, Grade | None]] = [*region.answers, *(("", cache, None) for cache in cache_names)]
    panels = []
    for run, cache, grade in wanted:
        found = region_map(open_cache(cache, caches, allow_partial=True), region.image, region.box, source_wh)
        panels.append(
            Panel(
                title=run or stem(found.cache),
                region=found,
                answered=grade.box if grade else None,
                remark="" if grade is None or grade.valid else NO_BOX,
            )
        )
    return panels


def _print(panels: Sequence[Panel]) -> None:
    columns = ["map", "cells", "similarity in the box", "elsewhere", "box or not, area under ROC", "cache"]
    with_remarks = any(panel.remark for panel in panels)
    rows = []
    for panel in panels:
        found = panel.region
        height, width = found.similarity_RC.shape
        area = found.area_under_roc
        numbers = (f"{found.inside:.3f}", f"{found.outside:.3f}", "" if area is None else f"{area:.3f}")
        remark = [panel.remark] if with_remarks else []
        rows.append((panel.title, f"{height} x {width}", *numbers, found.cache, *remark))
    title = "cosine similarity with the mean token of the box"
    table([*columns, "remark"] if with_remarks else columns, rows, title=title)
