"""What does a scene look like? Pixels in integer arithmetic, so that every machine gets the same bytes.

Shapes: canvas_HW3 is an image of H rows, W columns and red, green, blue.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vlmx.data.mini.dice import Dice
from vlmx.data.mini.scenes import BIN_BOX, IMAGE_PX, Color, Scene, owner_map

_RGB: dict[Color, tuple[int, int, int]] = {
    "red": (205, 45, 45),
    "green": (50, 165, 65),
    "blue": (50, 85, 210),
    "yellow": (228, 205, 50),
    "purple": (155, 55, 175),
    "white": (232, 232, 226),
}

_INK: dict[str, tuple[str, ...]] = {  # 5 x 7 cells a letter, drawn twice as large
    "A": (" ### ", "#   #", "#   #", "#####", "#   #", "#   #", "#   #"),
    "C": (" ####", "#    ", "#    ", "#    ", "#    ", "#    ", " ####"),
    "E": ("#####", "#    ", "#    ", "#### ", "#    ", "#    ", "#####"),
    "H": ("#   #", "#   #", "#   #", "#####", "#   #", "#   #", "#   #"),
    "L": ("#    ", "#    ", "#    ", "#    ", "#    ", "#    ", "#####"),
    "T": ("#####", "  #  ", "  #  ", "  #  ", "  #  ", "  #  ", "  #  "),
    "X": ("#   #", "#   #", " # # ", "  #  ", " # # ", "#   #", "#   #"),
    "Z": ("#####", "    #", "   # ", "  #  ", " #   ", "#    ", "#####"),
}


def render(scene: Scene) -> npt.NDArray[np.uint8]:
    """Draw a scene: uint8 [64, 64, 3], RGB; a pure function of the scene."""
    dice = Dice(f"vlmx mini paint:{scene.key}")
    canvas_HW3 = _background(dice)
    if scene.cluttered:
        _paint_bin(canvas_HW3, dice)
    owner = owner_map(scene.objects)
    for number, thing in enumerate(scene.objects):
        rgb = np.array(_RGB[thing.color]) + dice.grid((3,), 31) - 15
        canvas_HW3[owner == number] = rgb
        if thing.letter is not None:
            x1, y1, _, _ = thing.drawn_box
            ink = np.array([[cell == "#" for cell in row] for row in _INK[thing.letter]])
            ink = ink.repeat(2, axis=0).repeat(2, axis=1)
            canvas_HW3[y1 + 2 : y1 + 16, x1 + 2 : x1 + 12][ink] = dice.grid((3,), 40)
    canvas_HW3 += dice.grid(canvas_HW3.shape, 17) - 8
    return np.clip(canvas_HW3, 0, 255).astype(np.uint8)


def image_bytes(scene: Scene) -> bytes:
    """The scene as an image file, binary PPM; its SHA-256 is the image's content id."""
    return f"P6\n{IMAGE_PX} {IMAGE_PX}\n255\n".encode() + render(scene).tobytes()


def _background(dice: Dice) -> npt.NDArray[np.int64]:
    """Muted clouds: random levels on a coarse lattice, blended linearly, over a dim base colour."""
    cells = dice.pick((2, 4, 8))
    step = IMAGE_PX // cells
    lattice: npt.NDArray[np.int64] = dice.grid((cells + 1, cells + 1, 3), 50) + dice.grid((cells + 1, cells + 1, 1), 40)
    at, inside = np.arange(IMAGE_PX) // step, np.arange(IMAGE_PX) % step
    down = lattice[at] * (step - inside)[:, None, None] + lattice[at + 1] * inside[:, None, None]
    right = inside[None, :, None]
    clouds_HW3 = (down[:, at] * (step - right) + down[:, at + 1] * right) // (step * step)
    return np.asarray(clouds_HW3, dtype=np.int64) + 25 + dice.below(50)


def _paint_bin(canvas_HW3: npt.NDArray[np.int64], dice: Dice) -> None:
    x1, y1, x2, y2 = BIN_BOX
    brown = np.array((112, 84, 58)) + dice.grid((3,), 21) - 10
    canvas_HW3[y1:y2, x1:x2] = brown // 2
    canvas_HW3[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2] = brown
