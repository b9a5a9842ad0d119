"""Which backbones exist, under which names?

Reading the catalogue imports neither torch nor timm, except for names of the form "timm:ID.TAG", which timm knows.
Another package adds a backbone with an entry point in the group "vlmx.backbones" whose value is a `BackboneRow`.
"""

from __future__ import annotations

from vlmx.errors import UsageError
from vlmx.extract.backbones import rows_adapter, rows_mini, rows_ssm, rows_timm
from vlmx.extract.backbones.row import BackboneRow
from vlmx.registry import Registry, unknown_name

__all__ = ["BACKBONES", "BackboneRow", "row", "rows"]

TIMM = "timm:"

BACKBONES: Registry[BackboneRow] = Registry("backbone", group="vlmx.backbones", listing="vlmx list backbones")
for _row in (*rows_ssm.ROWS, *rows_timm.ROWS, *rows_adapter.ROWS, *rows_mini.ROWS):
    BACKBONES.add(_row.name, _row)


def row(name: str) -> BackboneRow:
    """The row that `name` stands for: a name of the catalogue, or "timm:ID.TAG" for any other model of timm.

    Raises:
        UnknownNameError: no such backbone; the message carries near misses.
        UsageError: a plug-in registered something that is not a `BackboneRow`, or a timm id without its tag.
    """
    if name.startswith(TIMM):
        from vlmx.extract.backbones.timm_any import timm_row

        return timm_row(name.removeprefix(TIMM))
    found = BACKBONES.get(name)
    if not isinstance(found, BackboneRow):
        raise UsageError(
            f"the plug-in backbone '{name}' is a {type(found).__name__}, not a BackboneRow",
            fix="let its entry point in the group 'vlmx.backbones' name a vlmx.BackboneRow",
        )
    return found


def rows(family: str | None = None) -> list[BackboneRow]:
    """All rows, or those of one family, sorted by name, plug-ins included.

    Raises:
        UnknownNameError: no such family.
    """
    found = [row(name) for name in BACKBONES.names()]
    if family is None:
        return found
    known = {each.family for each in found}
    if family not in known:
        raise unknown_name("family", family, known, listing="vlmx list backbones")
    return [each for each in found if each.family == family]
