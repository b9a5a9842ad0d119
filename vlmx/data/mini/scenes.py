"""What is in picture number i of the mini study? Scenes as pure functions of (split, index); nothing is drawn here.

All boxes are x1, y1, x2, y2 in pixels of the 64x64 image, right and bottom edges exclusive; `box` encloses what is
visible of an object.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from vlmx.data.mini.dice import Dice

Shape = Literal["circle", "square", "triangle", "cross", "sign"]
Color = Literal["red", "green", "blue", "yellow", "purple", "white"]
Size = Literal["small", "large"]
Split = Literal["train", "test", "pretrain", "language"]
PixelBox = tuple[int, int, int, int]

IMAGE_PX = 64
SHAPES: tuple[Shape, ...] = ("circle", "square", "triangle", "cross")  # what questions ask for; a sign is always white
COLORS: tuple[Color, ...] = ("red", "green", "blue", "yellow", "purple")
LETTERS: tuple[str, ...] = ("A", "C", "E", "H", "L", "T", "X", "Z")
SIGN_WH_PX = (14, 18)
SMALL_PX = (12, 14)
LARGE_PX = (19, 23)
BIN_BOX: PixelBox = (3, 3, 61, 61)


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One thing in a scene.

    Attributes:
        drawn_box: where the shape is drawn, hidden parts included.
        box: the visible part's box.
        letter: what a sign shows; None for all other shapes.
    """

    shape: Shape
    color: Color
    size: Size
    drawn_box: PixelBox
    box: PixelBox
    letter: str | None = None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One picture's content.

    Attributes:
        key: "<split>/<six digits>", the image's key in the study.
        objects: in the order of painting, so later ones hide earlier ones.
        cluttered: a bin of 7-9 overlapping objects; otherwise nothing overlaps.
    """

    key: str
    objects: tuple[SceneObject, ...]
    cluttered: bool

    @property
    def sign_letter(self) -> str | None:
        """The letter on the scene's sign, None without a sign."""
        return next((thing.letter for thing in self.objects if thing.letter is not None), None)


@lru_cache(maxsize=1024)  # all benchmarks of the study ask about the same test scenes
def sample_scene(split: Split, index: int) -> Scene:
    """Draw scene `index` of `split`.

    "pretrain" holds one object or one sign, for classification; of the other splits every fifth scene is a bin and the
    rest are 3-5 objects that do not overlap, in six of ten scenes with a sign.

    Raises:
        ValueError: no such split, or a negative index.
    """
    if split not in get_args(Split) or index < 0:
        raise ValueError(f"no scene {index} in split {split!r}; splits are {', '.join(get_args(Split))}")
    dice = Dice(f"vlmx mini scene:{split}:{index}")
    key = f"{split}/{index:06d}"
    if split == "pretrain":
        return Scene(key=key, objects=_solo(dice), cluttered=False)
    if index % 5 == 4:
        return Scene(key=key, objects=_bin(dice), cluttered=True)
    return Scene(key=key, objects=_table(dice), cluttered=False)


def scene_of(key: str) -> Scene:
    """The scene with this key, e.g. "train/000123".

    Raises:
        ValueError: not a key that `sample_scene` gives.
    """
    split, _, digits = key.partition("/")
    if not digits.isdigit():
        raise ValueError(f"not a scene key: {key!r}")
    return sample_scene(split, int(digits))  # sample_scene checks the split


def owner_map(objects: tuple[SceneObject, ...]) -> npt.NDArray[np.int8]:
    """Which object is seen at each pixel: int8 [64, 64] of positions in `objects`, -1 where none is."""
    owner = np.full((IMAGE_PX, IMAGE_PX), -1, dtype=np.int8)
    for number, thing in enumerate(objects):
        x1, y1, x2, y2 = thing.drawn_box
        owner[y1:y2, x1:x2][shape_mask(thing.shape, x2 - x1, y2 - y1)] = number
    return owner


@cache
def shape_mask(shape: Shape, width: int, height: int) -> npt.NDArray[np.bool_]:
    """Pixels of a shape that fills a width x height box: bool [height, width], touching all four edges."""
    u = np.abs(2 * np.arange(width) + 1 - width)[None, :]  # twice the distance of pixel centres from the middle
    v = (2 * np.arange(height) + 1 - height)[:, None]
    if shape == "circle":
        mask = u * u + v * v <= width * height
    elif shape == "triangle":
        mask = 2 * u <= v + height + 1
    elif shape == "cross":
        mask = (3 * u <= width) | (3 * np.abs(v) <= height)
    else:
        mask = np.ones((height, width), dtype=np.bool_)
    return np.asarray(mask, dtype=np.bool_)


def _side_px(size: Size, dice: Dice) -> int:
    return dice.between(*(SMALL_PX if size == "small" else LARGE_PX))


def _put(shape: Shape, color: Color, size: Size, box: PixelBox, letter: str | None = None) -> SceneObject:
    return SceneObject(shape=shape, color=color, size=size, drawn_box=box, box=box, letter=letter)


def _free_box(width: int, height: int, taken: list[SceneObject], dice: Dice) -> PixelBox | None:
    for _ in range(40):
        x1, y1 = dice.between(1, IMAGE_PX - 1 - width), dice.between(1, IMAGE_PX - 1 - height)
        x2, y2 = x1 + width, y1 + height
        if all(x2 < t.box[0] or x1 > t.box[2] or y2 < t.box[1] or y1 > t.box[3] for t in taken):
            return x1, y1, x2, y2
    return None


def _solo(dice: Dice) -> tuple[SceneObject, ...]:
    if dice.chance(30):
        box = _free_box(*SIGN_WH_PX, [], dice)
        assert box is not None
        return (_put("sign", "white", "large", box, dice.pick(LETTERS)),)
    size: Size = "small" if dice.chance(50) else "large"
    side = _side_px(size, dice)
    box = _free_box(side, side, [], dice)
    assert box is not None
    return (_put(dice.pick(SHAPES), dice.pick(COLORS), size, box),)


def _table(dice: Dice) -> tuple[SceneObject, ...]:
    placed: list[SceneObject] = []
    if dice.chance(60):
        box = _free_box(*SIGN_WH_PX, placed, dice)
        assert box is not None
        placed.append(_put("sign", "white", "large", box, dice.pick(LETTERS)))
    wanted = len(placed) + dice.between(3, 5)
    shapes = dice.shuffled(SHAPES)[: dice.between(2, 4)]  # few kinds a scene, so that counts above one are common
    colors = dice.shuffled(COLORS)[: dice.between(2, 4)]
    while len(placed) < wanted:
        size: Size = "small" if dice.chance(50) else "large"
        side = _side_px(size, dice)
        box = _free_box(side, side, placed, dice)
        if box is None:
            size, side = "small", SMALL_PX[0]
            box = _free_box(side, side, placed, dice)
        if box is None:
            break
        placed.append(_put(dice.pick(shapes), dice.pick(colors), size, box))
    return tuple(placed) if len(placed) >= 3 else _table(dice)


def _bin(dice: Dice) -> tuple[SceneObject, ...]:
    """7-9 objects of which at least half of each is seen."""
    x1, y1, x2, y2 = BIN_BOX
    objects: list[SceneObject] = []
    wanted = dice.between(7, 9)
    while len(objects) < wanted:
        size: Size = "small" if dice.chance(50) else "large"
        side = _side_px(size, dice)
        left, top = dice.between(x1 + 2, x2 - 2 - side), dice.between(y1 + 2, y2 - 2 - side)
        new = _put(dice.pick(SHAPES), dice.pick(COLORS), size, (left, top, left + side, top + side))
        seen = _with_visible_boxes((*objects, new))
        if seen is not None:
            objects = list(seen)
    return tuple(objects)


def _with_visible_boxes(objects: tuple[SceneObject, ...]) -> tuple[SceneObject, ...] | None:
    """The objects with `box` set from what is seen; None if less than half of one is seen."""
    owner = owner_map(objects)
    result = []
    for number, thing in enumerate(objects):
        x1, y1, x2, y2 = thing.drawn_box
        seen = owner == number
        if 2 * int(seen.sum()) < int(shape_mask(thing.shape, x2 - x1, y2 - y1).sum()):
            return None
        columns, rows = np.flatnonzero(seen.any(axis=0)), np.flatnonzero(seen.any(axis=1))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        result.append(replace(thing, box=box))
    return tuple(result)
