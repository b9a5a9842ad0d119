"""What can be read linearly from frozen tokens, before any LLM? Ridge regressions on a cache of the mini study.

Fitted on train scenes, measured on test scenes, which the encoder has not seen either:

    position     row and column of the token's own cell; R squared: 1 is perfect, 0 is no better than the mean
    objectness   whether an object covers at least half of the cell; area under the ROC curve
    box          the visible box of that object; share of such cells whose predicted box has IoU >= 0.5

Position is read from the token alone, the other two from the token and its cell's position (one indicator a cell).
The same two fits with the position alone are the baselines: what the layout of the scenes gives away.

Shapes: S scenes, N tokens (cells) a scene, D numbers a token, T = S * N rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vlmx.cache_specs.places import Place, place_of
from vlmx.evaluate.metrics.ranking import area_under_roc

if TYPE_CHECKING:
    from vlmx.cache_specs.token_source import TokenSource
    from vlmx.data.mini.scenes import Scene

TRAIN_SCENES = 1000
TEST_SCENES = 400
RIDGE = 10.0  # on standardised features; with 64,000 rows this only keeps dead or doubled features harmless
_COVERED = 0.5

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What was read from the tokens of one cache; the content of <caches>/probes/<cache>.json.

    Attributes:
        cache, backbone, fingerprint: whose tokens.
        train_scenes, test_scenes: how many scenes were used for fitting and measuring.
        position_r2: R squared of row and column (mean of both) from the token.
        objectness_auc, objectness_auc_position: from token and position, from position alone.
        box_hit, box_hit_position: percent of object cells with IoU >= 0.5, likewise.
        box_iou, box_iou_position: mean IoU in percent, likewise.
    """

    cache: str
    backbone: str
    fingerprint: str
    train_scenes: int
    test_scenes: int
    position_r2: float
    objectness_auc: float
    objectness_auc_position: float
    box_hit: float
    box_hit_position: float
    box_iou: float
    box_iou_position: float


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Tokens of some scenes and the truth about each token's cell.

    Attributes:
        tokens_TD: the tokens.
        place_TN: one indicator a cell.
        row_column_T2: row and column of each cell.
        covered_T: whether an object covers at least half of the cell.
        edges_T4: distances in pixels from the cell's middle to the left, top, right and bottom edge of the visible box
            of the object that covers most of the cell; zero where `covered_T` is False.
    """

    tokens_TD: Floats
    place_TN: Floats
    row_column_T2: Floats
    covered_T: npt.NDArray[np.bool_]
    edges_T4: Floats

    @property
    def tokens_and_place_TF(self) -> Floats:
        """Tokens and indicators side by side, F = D + N."""
        return np.concatenate([self.tokens_TD, self.place_TN], axis=1)


def probe_cache(reader: TokenSource, root: str | Path | Place) -> ProbeResult:
    """Probe a cache that holds the mini study.

    Args:
        reader: the open cache, or several joined ones.
        root: folder or url of all caches, which holds the mini study's image table.

    Raises:
        CacheError: the cache lacks scenes of the study.
    """
    from vlmx.data.mini.study import scene_keys

    train = _cells(reader, root, scene_keys("train")[:TRAIN_SCENES])
    test = _cells(reader, root, scene_keys("test")[:TEST_SCENES])
    position = _read_out(train.tokens_TD, train.row_column_T2, test.tokens_TD)
    both = (train.tokens_and_place_TF, test.tokens_and_place_TF)
    place = (train.place_TN, test.place_TN)
    hit, overlap = _box_quality(both, train, test)
    hit_position, overlap_position = _box_quality(place, train, test)
    return ProbeResult(
        cache=reader.spec.name,
        backbone=reader.spec.backbone,
        fingerprint=reader.spec.fingerprint,
        train_scenes=len(train.covered_T) // reader.num_tokens,
        test_scenes=len(test.covered_T) // reader.num_tokens,
        position_r2=_r_squared(position, test.row_column_T2),
        objectness_auc=_objectness(both, train, test),
        objectness_auc_position=_objectness(place, train, test),
        box_hit=hit,
        box_hit_position=hit_position,
        box_iou=overlap,
        box_iou_position=overlap_position,
    )


def _cells(reader: TokenSource, root: str | Path | Place, keys: Sequence[str]) -> Cells:
    from vlmx.cache_specs.ids import ImageTable
    from vlmx.data.mini.scenes import scene_of

    table = ImageTable.open(root, "mini")
    ids = [table.id_of(key) for key in keys]
    reader.require(ids, data="mini")
    tokens_SND = reader.read_float32(ids).astype(np.float64)
    rows, columns = reader.shape.grid
    truths = [cell_truth(scene_of(key), rows, columns) for key in keys]
    row, column = np.divmod(np.tile(np.arange(rows * columns), len(keys)), columns)
    return Cells(
        tokens_TD=tokens_SND.reshape(-1, tokens_SND.shape[-1]),
        place_TN=np.tile(np.eye(rows * columns), (len(keys), 1)),
        row_column_T2=np.stack([row, column], axis=1).astype(np.float64),
        covered_T=np.concatenate([covered for covered, _ in truths]),
        edges_T4=np.concatenate([edges for _, edges in truths]),
    )


def cell_truth(scene: Scene, rows: int, columns: int) -> tuple[npt.NDArray[np.bool_], Floats]:
    """`Cells.covered_T` (bool [N]) and `Cells.edges_T4` (float [N, 4]) of one scene on a rows x columns grid."""
    from vlmx.data.mini.scenes import IMAGE_PX, owner_map

    height, width = IMAGE_PX // rows, IMAGE_PX // columns
    owner = owner_map(scene.objects).reshape(rows, height, columns, width).transpose(0, 2, 1, 3)
    owner_NP = owner.reshape(rows * columns, height * width)
    share_NK = np.stack([(owner_NP == number).mean(axis=1) for number in range(len(scene.objects))], axis=1)
    boxes_K4 = np.array([thing.box for thing in scene.objects], dtype=np.float64)
    covered_N = share_NK.max(axis=1) >= _COVERED
    x1, y1, x2, y2 = boxes_K4[share_NK.argmax(axis=1)].T
    row, column = np.divmod(np.arange(rows * columns), columns)
    middle_x, middle_y = (column + 0.5) * width, (row + 0.5) * height
    edges_N4 = np.stack([middle_x - x1, middle_y - y1, x2 - middle_x, y2 - middle_y], axis=1)
    return covered_N, edges_N4 * covered_N[:, None]


def _read_out(train_TF: Floats, targets_TK: Floats, test_TF: Floats) -> Floats:
    """Fit a ridge regression with intercept on standardised features, and apply it to the test rows: [T_test, K]."""
    mean, scale = train_TF.mean(axis=0), train_TF.std(axis=0) + 1e-6
    standard = (train_TF - mean) / scale
    offset = targets_TK.mean(axis=0)
    gram = standard.T @ standard + RIDGE * np.eye(standard.shape[1])
    weights = np.linalg.solve(gram, standard.T @ (targets_TK - offset))
    result: Floats = (test_TF - mean) / scale @ weights + offset
    return result


def _r_squared(predicted: Floats, truth: Floats) -> float:
    unexplained = ((predicted - truth) ** 2).sum(axis=0)
    return float((1 - unexplained / ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)).mean())


def _objectness(features: tuple[Floats, Floats], train: Cells, test: Cells) -> float:
    train_TF, test_TF = features
    predicted = _read_out(train_TF, train.covered_T[:, None].astype(np.float64), test_TF)[:, 0]
    area = area_under_roc(predicted, test.covered_T)
    assert area is not None  # the scenes have cells of both kinds
    return area


def _box_quality(features: tuple[Floats, Floats], train: Cells, test: Cells) -> tuple[float, float]:
    """Percent of object cells with IoU >= 0.5, and their mean IoU in percent, from features of train and test cells."""
    train_TF, test_TF = features
    predicted = _read_out(train_TF[train.covered_T], train.edges_T4[train.covered_T], test_TF[test.covered_T])
    overlap = _iou_of_edges(predicted, test.edges_T4[test.covered_T])
    return 100 * float((overlap >= 0.5).mean()), 100 * float(overlap.mean())


def _iou_of_edges(one_T4: Floats, other_T4: Floats) -> Floats:
    """IoU of boxes given as distances of their edges from one common point."""
    shared = np.minimum(one_T4, other_T4)
    shared_sides = np.maximum(shared[:, :2] + shared[:, 2:], 0)
    one_sides = np.maximum(one_T4[:, :2] + one_T4[:, 2:], 0)
    other_sides = other_T4[:, :2] + other_T4[:, 2:]
    area = shared_sides.prod(axis=1)
    result: Floats = area / (one_sides.prod(axis=1) + other_sides.prod(axis=1) - area)
    return result


def probe_key(cache: str) -> str:
    """Where the probe of a cache is kept: beside the caches, because a cache's own bytes depend on its tokens alone."""
    return f"probes/{cache}.json"


def write_probe(root: str | Path | Place, result: ProbeResult) -> None:
    """Keep a result where `read_probe` finds it."""
    place_of(root).write(probe_key(result.cache), (json.dumps(asdict(result), indent=1) + "\n").encode())


def read_probe(root: str | Path | Place, cache: str) -> ProbeResult | None:
    """The kept result of a cache; None if it was not probed."""
    place, key = place_of(root), probe_key(cache)
    return ProbeResult(**json.loads(place.read(key))) if place.exists(key) else None
