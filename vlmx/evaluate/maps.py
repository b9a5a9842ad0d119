"""Where in a photo are tokens like those of a region? Similarity maps from cached tokens; no encoder and no image.

The tokens of a box are averaged, each weighted by how much of the box lies in its cell, and every token of the image is
compared with that mean by the cosine of the angle between them. So a box that ends on the cells' borders gives the
plain mean of the tokens within it, and a box smaller than a cell still has a token. The paper (figure 2) shows such
"token-region similarity maps" and does not say how it weighs; nothing is centred or rescaled here.

Shapes: N tokens of an image in a grid of R rows and C columns (N = R * C), D numbers a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlmx.cache_specs.geometry import Box, Geometry, convert_box
from vlmx.cache_specs.token_source import TokenSource
from vlmx.errors import UsageError
from vlmx.evaluate.metrics.ranking import area_under_roc

Floats = npt.NDArray[np.float64]
_INSIDE = 0.5  # a cell belongs to the box when at least this share of it does
_TOLERATED_PX = 1.0  # published boxes may end that far beyond the photo


@dataclass(frozen=True, kw_only=True)
class RegionMap:
    """How like the region's mean token each token of one image is.

    Attributes:
        cache, backbone, fingerprint: whose tokens.
        geometry: how the photo was brought to the encoder's input, which the grid divides evenly.
        source_wh: width and height of the photo in pixels.
        box: the region, x1 y1 x2 y2 in pixels of the photo.
        similarity_RC: cosine similarity, -1..1.
        share_RC: the share of each cell that the box covers, 0..1.
    """

    cache: str
    backbone: str
    fingerprint: str
    geometry: Geometry
    source_wh: tuple[int, int]
    box: Box
    similarity_RC: Floats
    share_RC: Floats

    @property
    def inside(self) -> float:
        """Mean similarity of the cells in the box, each weighted by its share."""
        return float((self.similarity_RC * self.share_RC).sum() / self.share_RC.sum())

    @property
    def outside(self) -> float:
        """Mean similarity of the rest of the photo; the padding does not count. NaN if the box is all of the photo."""
        rest_RC = np.clip(self.photo_share_RC - self.share_RC, 0, None)
        total = rest_RC.sum()
        return float((self.similarity_RC * rest_RC).sum() / total) if total > 1e-9 else float("nan")

    @property
    def area_under_roc(self) -> float | None:
        """Chance that a cell in the box is more similar than another cell of the photo; None without both kinds.

        0.5 is a map that knows nothing of the box, 1 one whose hottest cells are exactly the box's.
        """
        photo_RC = self.photo_share_RC >= _INSIDE
        in_box_RC = self.share_RC >= min(_INSIDE, float(self.share_RC.max()))
        return area_under_roc(self.similarity_RC[photo_RC], in_box_RC[photo_RC])

    @property
    def photo_share_RC(self) -> Floats:
        """The share of each cell that shows the photo and not its padding."""
        width, height = self.source_wh
        photo = convert_box((0.0, 0.0, float(width), float(height)), self.geometry, self.source_wh, "source", "padded")
        return cell_shares(photo, (self.similarity_RC.shape[0], self.similarity_RC.shape[1]), self.geometry)

    @property
    def extent(self) -> Box:
        """The rectangle of the whole grid in pixels of the photo, x1 y1 x2 y2: it reaches into the padding."""
        whole = (0.0, 0.0, float(self.geometry.width), float(self.geometry.height))
        return convert_box(whole, self.geometry, self.source_wh, "padded", "source")


def region_map(reader: TokenSource, image: str, box: Box, source_wh: tuple[int, int]) -> RegionMap:
    """Compare all tokens of an image with those of a region.

    Args:
        reader: the open cache, or several joined ones.
        image: image id.
        box: x1 y1 x2 y2 in pixels of the photo.
        source_wh: width and height of the photo in pixels.

    Raises:
        UsageError: the box is empty, ends beyond the photo, or lies in a border that the encoder does not see.
        CacheError: the cache lacks the image.
    """
    geometry, grid = reader.spec.geometry, reader.shape.grid
    check_box(box, source_wh)
    shares_RC = cell_shares(convert_box(box, geometry, source_wh, "source", "padded"), grid, geometry)
    if not shares_RC.any():
        raise UsageError(
            f"{reader.spec.name} has no tokens of this box",
            why=f"its encoder sees only the centre of a photo (crop_pct {geometry.crop_pct:g})",
            fix="choose a box nearer to the centre",
        )
    tokens_ND = reader.read_float32([image])[0].astype(np.float64)
    return RegionMap(
        cache=reader.spec.name,
        backbone=reader.spec.backbone,
        fingerprint=reader.spec.fingerprint,
        geometry=geometry,
        source_wh=source_wh,
        box=box,
        similarity_RC=similarity(tokens_ND, shares_RC.ravel()).reshape(grid),
        share_RC=shares_RC,
    )


def check_box(box: Box, source_wh: tuple[int, int]) -> None:
    """Make sure that a box is one, and of this photo.

    Raises:
        UsageError: it is empty, or ends more than a pixel beyond the photo.
    """
    x1, y1, x2, y2 = box
    text = f"x {x1:g}, y {y1:g}, width {x2 - x1:g}, height {y2 - y1:g}"
    if not (x2 > x1 and y2 > y1):
        raise UsageError("the box is empty", why=text, fix="give x,y,w,h in pixels, with w and h above 0")
    width, height = source_wh
    if min(x1, y1) < -_TOLERATED_PX or x2 > width + _TOLERATED_PX or y2 > height + _TOLERATED_PX:
        raise UsageError(
            "the box ends beyond the photo",
            why=f"the photo is {width} x {height} pixels, the box {text}",
            fix="give x,y,w,h in pixels of the photo as it is stored; x,y is the upper left corner",
        )


def cell_shares(box_padded: Box, grid: tuple[int, int], geometry: Geometry) -> Floats:
    """The share of each cell that a box covers, 0..1 [R, C].

    Args:
        box_padded: x1 y1 x2 y2 in pixels of the encoder's input.
        grid: rows and columns, which divide the input evenly.
        geometry: of the input.
    """
    rows, columns = grid
    x1, y1, x2, y2 = box_padded
    covered_R = _covered(y1 * rows / geometry.height, y2 * rows / geometry.height, rows)
    covered_C = _covered(x1 * columns / geometry.width, x2 * columns / geometry.width, columns)
    shares_RC: Floats = np.outer(covered_R, covered_C)
    return shares_RC


def _covered(start: float, end: float, count: int) -> Floats:
    """How much of each of the intervals 0..1, 1..2, ... lies between start and end."""
    at = np.arange(count, dtype=np.float64)
    covered: Floats = np.clip(np.minimum(at + 1, end) - np.maximum(at, start), 0.0, 1.0)
    return covered


def similarity(tokens_ND: Floats, weights_N: Floats) -> Floats:
    """Cosine between each token and the weighted mean of all [N]; a token of zeros has 0."""
    mean_D = weights_N @ tokens_ND / weights_N.sum()
    lengths_N = np.linalg.norm(tokens_ND, axis=1) * np.linalg.norm(mean_D)
    cosine_N: Floats = np.divide(tokens_ND @ mean_D, lengths_N, out=np.zeros(len(tokens_ND)), where=lengths_N > 0)
    return cosine_N
