"""How do similarity maps look? Heat maps side by side on one colour scale, with the region, answers and the photo.

Shapes: pixels_HW3 is a photo of H rows, W columns and red, green, blue, 0..255.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from vlmx.cache_specs.geometry import Box, Geometry, convert_box
from vlmx.errors import DataError
from vlmx.evaluate.maps import RegionMap
from vlmx.evaluate.plot_text import as_written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Frame = Literal["source", "padded"]
Pixels = npt.NDArray[np.uint8]
COLORS = "viridis"  # even in lightness, so it reads without colour vision and in grey
TRUE, ANSWERED = "#ffffff", "#ff7f2a"
_PANEL_IN = 3.3
_MOST_LETTERS = 110


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One map.

    Attributes:
        title: above it.
        region: the numbers.
        answered: a model's box, x1 y1 x2 y2 in pixels of the photo; None without an answer that is a box.
        remark: below the title, e.g. that the answer is not a box; "" for none.
    """

    title: str
    region: RegionMap
    answered: Box | None = None
    remark: str = ""


def pixels_of(data: bytes, *, name: str) -> Pixels:
    """Decode a photo as it is stored; rotation that its EXIF data ask for is not applied, as in extraction.

    Args:
        data: bytes of an image file.
        name: what errors call it.

    Raises:
        DataError: it is not an image.
    """
    from matplotlib import image as images

    bomb = images.PIL.Image.DecompressionBombError  # type: ignore[attr-defined]  # the library with which it reads
    try:
        pixels = np.asarray(images.imread(io.BytesIO(data), format=None if data[:8] == b"\x89PNG\r\n\x1a\n" else "jpg"))
    except (OSError, ValueError, SyntaxError, bomb) as error:
        why = re.sub(r" *<_io[^>]*>", "", str(error))  # "cannot identify image file <_io.BytesIO object at 0x7f...>"
        raise DataError(f"cannot read {name}", why=why, fix="give an image file such as .jpg or .png") from error
    if pixels.dtype != np.uint8:  # PNG comes in 0..1
        pixels = np.round(255 * np.clip(pixels.astype(np.float64), 0, 1)).astype(np.uint8)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    return np.ascontiguousarray(pixels[:, :, :3])


def scale_of(regions: Sequence[RegionMap]) -> tuple[float, float]:
    """The colour scale that all maps share: the least and the greatest similarity that any has within the photo."""
    shown = [region.similarity_RC[region.photo_share_RC > 0] for region in regions]
    low, high = min(float(each.min()) for each in shown), max(float(each.max()) for each in shown)
    return (low, high) if high - low > 1e-6 else (low - 0.5, high + 0.5)


def draw_maps(
    panels: Sequence[Panel], *, title: str, frame: Frame = "source", photo_HW3: Pixels | None = None
) -> Figure:
    """Draw maps side by side; with a photo, a row of it above them, as in the paper's figure 2.

    Args:
        panels: one or more, of one photo.
        title: above all, e.g. the phrase that was asked.
        frame: "source" shows the photo without padding; "padded" the encoder's whole input.
        photo_HW3: the photo, in the size that the maps were made for.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    first = panels[0].region
    _, (width, height) = _frame_of(first, frame)
    rows = 1 if photo_HW3 is None else 2
    panel_height_in = _PANEL_IN * min(max(height / width, 0.4), 1.6)
    figure = Figure(
        figsize=(_PANEL_IN * len(panels) + 1.1, (0.92 * panel_height_in + 0.1) * rows + 1.0), layout="constrained"
    )
    grid = figure.subplots(rows, len(panels), squeeze=False)
    low, high = scale_of([panel.region for panel in panels])
    for column, panel in enumerate(panels):
        if photo_HW3 is not None:
            _show_photo(grid[0][column], panel.region, frame, photo_HW3)
            _finish(grid[0][column], panel, frame, title=_title(panel))
        map_axes = grid[-1][column]
        (left, top, right, bottom), _ = _frame_of(panel.region, frame)
        image = map_axes.imshow(
            panel.region.similarity_RC,
            cmap=COLORS,
            vmin=low,
            vmax=high,
            extent=(left, right, bottom, top),
            interpolation="nearest",
        )
        _finish(map_axes, panel, frame, title="" if rows == 2 else _title(panel))
    bar = figure.colorbar(image, ax=list(grid[-1]), shrink=0.9, pad=0.02)
    bar.set_label("cosine similarity with\nthe mean token of the box", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    if title:
        short = title if len(title) <= _MOST_LETTERS else title[: _MOST_LETTERS - 1] + "…"
        figure.suptitle(as_written(short), fontsize=11)
    keys = [Line2D([], [], color="#777777", linewidth=2.2, label="box")]
    if any(panel.answered for panel in panels):
        keys = [
            Line2D([], [], color="#777777", linewidth=2.2, label="true box"),
            Line2D([], [], color=ANSWERED, linewidth=2.2, linestyle=(0, (4, 2)), label="the model's answer"),
        ]
    figure.legend(handles=keys, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _title(panel: Panel) -> str:
    return "\n".join(filter(None, [panel.title, panel.remark]))


def _frame_of(region: RegionMap, frame: Frame) -> tuple[Box, tuple[float, float]]:
    """Where the grid lies in the frame, x1 y1 x2 y2, and the frame's width and height."""
    if frame == "source":
        return region.extent, (float(region.source_wh[0]), float(region.source_wh[1]))
    width, height = float(region.geometry.width), float(region.geometry.height)
    return (0.0, 0.0, width, height), (width, height)


def _in_frame(box: Box, region: RegionMap, frame: Frame) -> Box:
    return convert_box(box, region.geometry, region.source_wh, "source", frame)


def _show_photo(axes: Axes, region: RegionMap, frame: Frame, photo_HW3: Pixels) -> None:
    x1, y1, x2, y2 = _in_frame((0.0, 0.0, float(region.source_wh[0]), float(region.source_wh[1])), region, frame)
    axes.imshow(photo_HW3, extent=(x1, x2, y2, y1))
    axes.set_facecolor(_fill(region.geometry))


def _fill(geometry: Geometry) -> tuple[float, float, float]:
    red, green, blue = geometry.fill
    return (red / 255, green / 255, blue / 255)


def _finish(axes: Axes, panel: Panel, frame: Frame, *, title: str) -> None:
    """Boxes, limits and title of a panel."""
    from matplotlib.patches import Rectangle

    _, (width, height) = _frame_of(panel.region, frame)
    drawn: list[tuple[Box, str, str | tuple[int, tuple[int, int]]]] = [(panel.region.box, TRUE, "solid")]
    if panel.answered is not None:
        drawn.append((panel.answered, ANSWERED, (0, (4, 2))))
    for box, color, style in drawn:
        x1, y1, x2, y2 = _in_frame(box, panel.region, frame)
        for line, thick in (("#000000", 3.6), (color, 2.0)):  # a dark casing keeps it visible on any colour
            axes.add_patch(
                Rectangle(
                    (x1, y1),
                    x2 - x1,
                    y2 - y1,
                    fill=False,
                    edgecolor=line,
                    linewidth=thick,
                    linestyle="solid" if line == "#000000" else style,
                    alpha=0.55 if line == "#000000" else 1.0,
                )
            )
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    if title:
        axes.set_title(as_written(title), fontsize=9)


def save_figure(figure: Figure, suffix: str) -> bytes:
    """The figure as a file of the kind that the suffix says: the same figure gives the same bytes.

    Args:
        figure: any figure of matplotlib.
        suffix: ".png", ".svg" or ".pdf".
    """
    import matplotlib

    metadata: dict[str, dict[str, None]] = {
        ".png": {"Software": None},
        ".svg": {"Date": None, "Creator": None},
        ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "vlmx maps"}):
        figure.savefig(buffer, format=suffix.removeprefix("."), dpi=160, metadata=metadata[suffix])
    return buffer.getvalue()
