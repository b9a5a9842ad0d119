"""How are the words of a command line understood that say which encoder, size, engine or data is meant?"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

import click
from click.shell_completion import CompletionItem

from vlmx.cache_specs.presets import preset, presets
from vlmx.data.published import PUBLISHED
from vlmx.errors import UsageError
from vlmx.extract.backbones import catalogue
from vlmx.extract.ops.engines import ENGINE_NAMES
from vlmx.registry import unknown_name

if TYPE_CHECKING:
    from vlmx.extract.backbones.row import BackboneRow


def complete_backbone(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of backbones for the shell."""
    return [
        CompletionItem(row.name, help=row.pretraining) for row in catalogue.rows() if row.name.startswith(incomplete)
    ]


def complete_data(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of data sets for the shell, and files."""
    named = [CompletionItem(name, help=each.title) for name, each in PUBLISHED.items() if name.startswith(incomplete)]
    return [*named, CompletionItem(incomplete, type="file")]


def complete_row(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of published rows for the shell."""
    return [CompletionItem(row.name) for row in presets() if row.name.startswith(incomplete)]


def complete_engine(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of scan engines for the shell."""
    return [CompletionItem(name) for name in ENGINE_NAMES if name.startswith(incomplete)]


def check_engine(name: str | None) -> None:
    """Make sure that `--scan` names an engine, if it is given; whether it can run here is asked later.

    Raises:
        UnknownNameError: it does not.
    """
    if name is not None and name not in ENGINE_NAMES:
        raise unknown_name("scan engine", name, ENGINE_NAMES, listing="vlmx doctor")


def parse_res(text: str) -> tuple[int, int]:
    """Height and width in pixels: "512" -> (512, 512), "800x1328" -> (800, 1328).

    Raises:
        UsageError: it is neither.
    """
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if not match:
        raise UsageError(f"'{text}' is not a resolution", fix="--res takes 512, or HEIGHTxWIDTH such as 800x1328")
    return int(match[1]), int(match[2] or match[1])


class BatchSizeParam(click.ParamType):
    """A positive number, or "auto"."""

    name = "batch size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Literal["auto"]:
        if value == "auto" or (isinstance(value, int) and value > 0):
            return value  # type: ignore[no-any-return]
        if re.fullmatch(r"[1-9]\d{0,5}", str(value)):
            return int(value)
        self.fail(f"'{value}' is neither a positive number nor auto", param, ctx)


def chosen_encoders(
    name: str | None, row_name: str | None, res: str | None
) -> list[tuple[BackboneRow, tuple[int, int]]]:
    """The encoders, each with its (height, width), that --backbone and --res, or --row, stand for.

    Raises:
        UsageError: both are given, or neither.
        UnknownNameError: there is no such backbone or row.
    """
    if (name is None) == (row_name is None) or (row_name is not None and res is not None):
        raise UsageError(
            "it is not clear which encoder is meant",
            why="--row stands for a backbone and its size" if row_name else "neither --backbone nor --row is given",
            fix="give --backbone NAME (and --res), or --row ROW alone",
        )
    if name is not None:
        row = catalogue.row(name)
        return [(row, parse_res(res) if res else row.native_res)]
    assert row_name is not None
    published = preset(row_name)
    return [(catalogue.row(each), published.res) for each in published.backbones]
