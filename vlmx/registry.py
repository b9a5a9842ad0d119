"""Which object a name stands for: exact names, lazy targets, entry points of plug-ins, and a hint for near misses."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from vlmx.errors import UnknownNameError

T = TypeVar("T")


def unknown_name(kind: str, name: str, known: Iterable[str], *, listing: str = "") -> UnknownNameError:
    """Build the error for a name that does not exist.

    Args:
        kind: what the name should have been, e.g. "backbone".
        name: what the user typed.
        known: the names that exist.
        listing: the command that lists them, e.g. "vlmx list backbones".
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        fix = "did you mean " + " or ".join(f"'{n}'" for n in near) + "?"
    elif len(names) <= 12:
        fix = f"known: {', '.join(names)}" if names else f"no {kind} exists yet"
    else:
        fix = f"{len(names)} names are known"
    if listing:
        fix += f" ({listing})"
    return UnknownNameError(f"unknown {kind} '{name}'", fix=fix)


class Registry(Generic[T]):
    """Exact names -> objects, imported on first use.

    Args:
        kind: the word for one entry in error messages, e.g. "connector".
        group: entry-point group through which other packages add entries, e.g. "vlmx.connectors".
        listing: the command that lists the names, shown in errors.
    """

    def __init__(self, kind: str, *, group: str, listing: str = "") -> None:
        self.kind = kind
        self.group = group
        self.listing = listing
        self._targets: dict[str, Any] = {}
        self._plugins_read = False

    def add(self, name: str, target: T | str) -> None:
        """Register `target`: the object itself, or "module:attribute" to import when the name is first used."""
        if name in self._targets:
            raise ValueError(f"{self.kind} '{name}' is registered twice")
        self._targets[name] = target

    def names(self) -> list[str]:
        """All names, sorted, plug-ins included."""
        self._read_plugins()
        return sorted(self._targets)

    def get(self, name: str) -> T:
        """The object that `name` stands for.

        Raises:
            UnknownNameError: no such name; the message carries near misses.
        """
        self._read_plugins()
        if name not in self._targets:
            raise unknown_name(self.kind, name, self._targets, listing=self.listing)
        target = self._targets[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = getattr(importlib.import_module(module), attribute)
            self._targets[name] = target
        return target  # type: ignore[no-any-return]

    def _read_plugins(self) -> None:
        if self._plugins_read:
            return
        self._plugins_read = True
        for point in entry_points(group=self.group):
            self._targets.setdefault(point.name, point.value)
