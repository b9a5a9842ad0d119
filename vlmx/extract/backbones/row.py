"""What is fixed about one backbone: network arguments, checkpoint file, input sizes, normalisation. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vlmx.errors import UsageError

Sizes = Literal["any", "patch", "multiple", "fixed"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class BackboneRow:
    """One backbone: a network with the weights that one published file holds.

    Attributes:
        name: "family-size-weights", e.g. "vmamba-s-coco".
        family: the family's name, e.g. "vmamba".
        builder: "module:function", imported on first use; `function(row, res, **options)` returns a `FamilyNet`.
        arch: arguments of the family's network (depths, widths, a timm id, ...).
        pretraining: data sets of the weights in the order of training, e.g. "IN1K + COCO".
        native_res: input size (height, width) in pixels that the weights are meant for.
        grid: rows and columns of the tokens at `native_res`.
        dim: width of a token.
        params: parameters of what runs here, all frozen: the network up to the layer that the tokens are taken from.
        mean, std: normalisation of RGB values in 0..1.
        file: the checkpoint's file name; for files that every repository calls alike, the name to save it under.
        url: where the file is published; empty when it ships with vlmx.
        licence: licence of the weights, or of the project that publishes them where the weights have none of their own.
        published_size: parameters as the paper prints them; often the size of a whole detector, not of what runs here.
        packaged: path inside the vlmx package for weights that ship with it, else empty.
        sizes: which input sizes the network takes besides the native one.
            "any": every size of at least `size_step` pixels; a partial token at the border counts as a token.
            "patch": every size of at least `size_step` pixels; pixels beyond the last whole patch are not seen.
            "multiple": multiples of `size_step`.
            "fixed": none.
        size_step: pixels, see `sizes`.
        crop_pct: share of the resized photo's side that the reference's evaluation transform keeps in the centre crop
            that follows its letterbox; 1 where it keeps all. Applied only with the option `crop`.
    """

    name: str
    family: str
    builder: str
    arch: Mapping[str, Any] = field(hash=False)
    pretraining: str
    native_res: tuple[int, int]
    grid: tuple[int, int]
    dim: int
    params: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    file: str
    url: str
    licence: str
    published_size: str
    packaged: str = ""
    sizes: Sizes = "any"
    size_step: int = 1
    crop_pct: float = 1.0

    @property
    def num_tokens(self) -> int:
        """Tokens of an image of the native size."""
        return self.grid[0] * self.grid[1]

    @property
    def allowed_sizes(self) -> str:
        """The input sizes, for people: "any from 16x16", "multiples of 32", "224x224 only"."""
        if self.sizes == "fixed":
            return f"{self.native_res[0]}x{self.native_res[1]} only"
        if self.sizes == "multiple":
            return f"multiples of {self.size_step}"
        return f"any from {self.size_step}x{self.size_step}"

    def check_size(self, res: tuple[int, int]) -> None:
        """Make sure that the network takes images of `res` = (height, width) pixels.

        Raises:
            UsageError: it does not; the message says which sizes it takes.
        """
        native = f"{self.native_res[0]}x{self.native_res[1]}"
        why, fix = "", ""
        if self.sizes == "fixed":
            if res != self.native_res:
                why = "its position tables or windows are made for one image size"
                fix = f"use {native}"
                if self.family == "maxvit":
                    fix += ", or the variant of this backbone for your size (vlmx list backbones --family maxvit)"
        elif min(res) < self.size_step:
            why = f"a side is shorter than {self.size_step} pixels"
            fix = f"use {self.allowed_sizes}; its own size is {native}"
        elif self.sizes == "multiple" and (res[0] % self.size_step or res[1] % self.size_step):
            near = "x".join(str(max(round(side / self.size_step), 1) * self.size_step) for side in res)
            why = f"its sides must be multiples of {self.size_step} pixels"
            fix = f"use {near}; its own size is {native}"
        if why:
            raise UsageError(f"{self.name} cannot take images of {res[0]}x{res[1]} pixels", why=why, fix=fix)

    def unseen(self, res: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of pixels, at the bottom and the right of an image of `res`, that no token covers."""
        if self.sizes != "patch":
            return (0, 0)
        return (res[0] % self.size_step, res[1] % self.size_step)
