"""Exact names, lazy targets, hints."""

import pytest

from vlmx.errors import UnknownNameError
from vlmx.registry import Registry


def test_targets_are_imported_on_first_use() -> None:
    registry: Registry[type] = Registry("thing", group="vlmx.test")
    registry.add("path", "pathlib:Path")
    from pathlib import Path

    assert registry.get("path") is Path
    assert registry.names() == ["path"]


def test_unknown_names_get_a_hint() -> None:
    registry: Registry[type] = Registry("connector", group="vlmx.test", listing="vlmx list connectors")
    registry.add("mlp2", "builtins:int")
    registry.add("linear", "builtins:int")
    with pytest.raises(UnknownNameError) as caught:
        registry.get("mlp")
    assert caught.value.what == "unknown connector 'mlp'"
    assert caught.value.fix == "did you mean 'mlp2'? (vlmx list connectors)"


def test_a_name_is_registered_once() -> None:
    registry: Registry[type] = Registry("thing", group="vlmx.test")
    registry.add("a", "builtins:int")
    with pytest.raises(ValueError, match="registered twice"):
        registry.add("a", "builtins:int")
