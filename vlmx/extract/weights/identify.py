"""Which backbones does a state dict fit?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from vlmx.extract.backbones.catalogue import BackboneRow

# A family is tried if this share of its kinds of names is in the file. Its own files have nearly all of them; fewer
# only where a family gives them names of its own.
_NEAR = 0.25


@dataclass(frozen=True, kw_only=True)
class Identification:
    """Which backbones a state dict fits.

    Attributes:
        names: all that it fits by names and shapes; several if they share a network.
        nearest: if it fits none, the family whose names are most like those of the file, or "" if none is like them.
    """

    names: tuple[str, ...]
    nearest: str


def identify(state: Mapping[str, Tensor]) -> Identification:
    """Compare names and shapes with every network of the catalogue. Nothing is computed; takes seconds."""
    from vlmx.extract.backbones.catalogue import rows
    from vlmx.extract.backbones.loading import fit_problems

    shapes = {name: tensor.to("meta") for name, tensor in state.items()}
    families: dict[str, list[BackboneRow]] = {}
    for row in rows():
        families.setdefault(row.family, []).append(row)
    kinds = _kinds(shapes)
    shares = {family: _share(min(members, key=lambda row: row.params), kinds) for family, members in families.items()}
    names: list[str] = []
    for family, members in families.items():
        if shares[family] >= _NEAR:
            for alike in _networks(members):
                if not fit_problems(alike[0], shapes, shown=1):
                    names += [row.name for row in alike]
    best = max(shares, key=lambda family: shares[family])
    return Identification(names=tuple(sorted(names)), nearest=best if shares[best] >= _NEAR and not names else "")


def _networks(members: Iterable[BackboneRow]) -> list[list[BackboneRow]]:
    """Rows grouped by network: the same arguments, whatever the weights. A timm id is a network, a dot and weights."""
    groups: dict[str, list[BackboneRow]] = {}
    for row in members:
        arch = {key: str(value).split(".")[0] if key == "timm_id" else value for key, value in row.arch.items()}
        groups.setdefault(repr((row.builder, row.native_res, sorted(arch.items()))), []).append(row)
    return list(groups.values())


def _share(row: BackboneRow, kinds: set[str]) -> float:
    """How many of the kinds of names of a network are among `kinds`, 0..1."""
    from vlmx.extract.backbones.base import build_backbone

    own = _kinds(build_backbone(row.name, res=row.native_res, device="meta").net.state_dict())
    return len(own & kinds) / len(own)


def _kinds(names: Iterable[str]) -> set[str]:
    """The last three parts of each name, numbers as "#": they do not depend on depth or prefix."""
    return {re.sub(r"\d+", "#", ".".join(name.split(".")[-3:])) for name in names}
