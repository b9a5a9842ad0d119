"""Which encoder, size and connector are behind each published row? The 99 rows of the paper's tables, by name.

The paper: "Do VLMs Need Vision Transformers? Evaluating State Space Models as Vision Encoders". What it prints is
resolved so:

* A size counts as height x width. 1333x800 with its 4150 tokens is 800 x 1328: the largest width in steps of 16 below
  1333, which gives 50 x 83 of them.
* Two backbones are two encoders whose tokens stand side by side on the channel axis: the printed "256+256" are 256
  tokens that are as wide as both together.
* The two BEiT rows at 640 pixels are one network, trained under UperNet (451M) and under Mask2Former (568M).

This is data alone: reading it imports no encoder, and the numbers that the paper measured are with `vlmx.evaluate`.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from vlmx.registry import unknown_name


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One published row.

    Attributes:
        backbones: catalogue names, one, or two that are joined in this order.
        res: input size of each of them, (height, width) in pixels.
        connector: "mlp2" or "mlp3", the paper's "(f)".
        tokens: visual tokens an image.
        pretrained, encoder, params, image_size: as the paper prints them.
    """

    backbones: tuple[str, ...]
    res: tuple[int, int]
    connector: str
    tokens: int
    pretrained: str
    encoder: str
    params: str
    image_size: str

    @property
    def name(self) -> str:
        """BACKBONES@SIZE/CONNECTOR, e.g. "vmamba-s-coco@512/mlp3"; a square's size is one number."""
        height, width = self.res
        size = f"{height}" if height == width else f"{height}x{width}"
        return f"{'+'.join(self.backbones)}@{size}/{self.connector}"

    @property
    def resolution(self) -> str:
        """Height x width as in a cache's name, e.g. "512x512"."""
        return f"{self.res[0]}x{self.res[1]}"


@cache
def presets() -> tuple[Preset, ...]:
    """All rows, in the order of the paper's table."""
    text = files("vlmx.cache_specs").joinpath("presets.csv").read_text()
    return tuple(
        Preset(
            backbones=tuple(row["backbones"].split("+")),
            res=(int(row["height"]), int(row["width"])),
            connector=row["connector"],
            tokens=int(row["tokens"]),
            pretrained=row["pretrained"],
            encoder=row["encoder"],
            params=row["params"],
            image_size=row["image_size"],
        )
        for row in csv.DictReader(text.splitlines())
    )


def preset(name: str) -> Preset:
    """The row that `name` stands for.

    Raises:
        UnknownNameError: no such row; the message carries near misses.
    """
    by_name = {row.name: row for row in presets()}
    if name not in by_name:
        raise unknown_name("row", name, by_name, listing="vlmx list rows")
    return by_name[name]
