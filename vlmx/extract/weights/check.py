"""What is in a checkpoint, and is it fit to be used?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmx.errors import WeightsError
from vlmx.extract.weights.formats import read_checkpoint
from vlmx.extract.weights.hashing import identity, sha256_of_file
from vlmx.extract.weights.identify import identify

if TYPE_CHECKING:
    from torch import Tensor

    from vlmx.extract.backbones.catalogue import BackboneRow


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `vlmx weights check` prints.

    Attributes:
        path: what was given.
        files: the files that were read.
        format, zip_member, nested_under, not_taken, not_tensors: see `Checkpoint`.
        bytes: size of the files.
        sha256: of the file; "" for several.
        identity: what caches record (see `vlmx.extract.weights.hashing`).
        tensors, parameters: how many tensors, and numbers in them.
        dtypes: parameters of each type.
        not_finite: names of the tensors that hold NaN or infinity.
        fits: backbones whose network it fits.
        nearest: the family with the most similar names, or "".
        backbone: the backbone that was asked for, or "".
        problems: why it does not fit that one; every key is named.
    """

    path: str
    files: tuple[str, ...]
    format: str
    zip_member: str
    nested_under: str
    not_taken: tuple[str, ...]
    not_tensors: tuple[str, ...]
    bytes: int
    sha256: str
    identity: str
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]
    not_finite: tuple[str, ...]
    fits: tuple[str, ...]
    nearest: str
    backbone: str
    problems: tuple[str, ...]

    def raise_if_unfit(self) -> None:
        """Raise for weights that cannot be used.

        Raises:
            WeightsError: they hold NaN, do not fit the backbone that was asked for, or fit none.
        """
        if self.not_finite:
            raise WeightsError(
                f"{self.path} holds NaN or infinity",
                why=f"in {len(self.not_finite)} tensors: {', '.join(self.not_finite[:4])}",
                fix="get the file again; if it is as published, tell its publisher",
            )
        if self.problems:
            raise WeightsError(
                f"{self.path} does not fit {self.backbone}: {self._hint()}",
                why="; ".join(self.problems),
                fix=f"use --backbone {self.fits[0]}" if self.fits else "vlmx list backbones shows the file of each",
            )
        if not self.fits and not self.backbone:
            raise WeightsError(
                f"{self.path} fits no backbone that vlmx knows",
                why=f"its names are most like those of the family '{self.nearest}'"
                if self.nearest
                else "its names are like those of no family",
                fix="give --backbone NAME to see every key that is missing, too much, or of another shape",
            )

    def _hint(self) -> str:
        if self.fits:
            return f"it fits {', '.join(self.fits)}"
        return "it fits no other backbone either" + (f"; the nearest family is {self.nearest}" if self.nearest else "")


def check(path: Path, row: BackboneRow | None) -> Report:
    """Read `path` and compare it with `row`, or with all backbones.

    Raises:
        WeightsError: it cannot be read.
    """
    from vlmx.extract.backbones.loading import fit_problems

    checkpoint = read_checkpoint(path)
    state = checkpoint.state
    dtypes: Counter[str] = Counter()
    for tensor in state.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    found = identify(state)
    problems = fit_problems(row, state, shown=None) if row else []
    fits = set(found.names)
    if row and not problems:
        fits.add(row.name)
    files = checkpoint.files
    return Report(
        path=str(path),
        files=tuple(map(str, files)),
        format=checkpoint.format,
        zip_member=checkpoint.zip_member,
        nested_under=checkpoint.nested_under,
        not_taken=checkpoint.not_taken,
        not_tensors=checkpoint.not_tensors,
        bytes=sum(file.stat().st_size for file in files),
        sha256=sha256_of_file(files[0]) if len(files) == 1 else "",
        identity=identity(path),
        tensors=len(state),
        parameters=sum(dtypes.values()),
        dtypes=dict(dtypes),
        not_finite=tuple(not_finite(state)),
        fits=tuple(sorted(fits)),
        nearest=found.nearest,
        backbone=row.name if row else "",
        problems=tuple(problems),
    )


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    import torch

    return [
        name for name, tensor in state.items() if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
