"""Which of the paper's rows does a run correspond to, and in what does it differ from that row?

A row is found by what the tokens are and by the connector: backbones, input size, "mlp2" or "mlp3". Whatever else makes
a run another experiment (its LLM, its training data, ...) does not choose the row; it is named as a remark.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from vlmx.cache_specs.catalog import backbone_of, stem
from vlmx.cache_specs.presets import Preset, preset, presets
from vlmx.errors import UsageError
from vlmx.evaluate.aggregate import PublishedRow, published_rows
from vlmx.evaluate.paper_recipe import recipe_remarks
from vlmx.runs import RunFolder

PAPER_LLM, PAPER_LLM_NAME = "Vicuna-7B v1.5", "vicuna-7b-v1.5"
PAPER_DATA = "LLaVA-1.5's 665K mixture"
PAPER_DATA_STEM = "llava_v1_5_mix665k"
# The rows that the paper calls collapsed: sections 4.4.2 and 4.5.1, and 4.5.2 for the one with the 3-layer connector.
CALLED_COLLAPSED = frozenset(
    {
        "vitdet-l-coco@1024/mlp2",
        "vitdet-h-coco@1024/mlp2",
        "vmamba-t-coco@800x1328/mlp2",
        "vmamba-b-coco@800x1328/mlp2",
        "vmamba-b-coco@800x1328/mlp3",
    }
)


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One of the paper's 99 models.

    Attributes:
        preset: what it was built from.
        published: what the paper prints of it.
    """

    preset: Preset
    published: PublishedRow

    @property
    def name(self) -> str:
        """As `vlmx list rows` has it, e.g. "vmamba-s-coco@512/mlp3"."""
        return self.preset.name

    @property
    def label(self) -> str:
        """As the paper's tables have it, e.g. "IN1K COCO VMamba-S(f), 50M, 512x512"."""
        row = self.preset
        mark = "(f)" if row.connector == "mlp3" else ""
        return f"{row.pretrained} {row.encoder}{mark}, {row.params}, {row.image_size}".strip()

    @property
    def called_collapsed(self) -> bool:
        """Whether the paper names it as a case of localization collapse."""
        return self.name in CALLED_COLLAPSED


@dataclass(frozen=True, kw_only=True)
class RowMatch:
    """What was found for a run.

    Attributes:
        row: the published row; None if there is none.
        remarks: what is different from the row, or why there is none and what to do then.
    """

    row: PaperRow | None
    remarks: tuple[str, ...]


@cache
def paper_rows() -> tuple[PaperRow, ...]:
    """All 99, in the order of the paper's table."""
    return tuple(PaperRow(preset=p, published=r) for p, r in zip(presets(), published_rows(), strict=True))


def paper_row(name: str) -> PaperRow:
    """The row of that name.

    Raises:
        UnknownNameError: no such row; the message carries near misses.
    """
    wanted = preset(name)
    return next(row for row in paper_rows() if row.preset is wanted)


def named_rows(rows: Sequence[str], runs: int) -> list[str | None]:
    """The row that is meant for each of `runs` runs, from what the user gave with --row: nothing, one, or one for each.

    Raises:
        UsageError: it is not clear which row is meant for which run.
    """
    if len(rows) not in (0, 1, runs):
        raise UsageError(
            "it is not clear which row is meant for which run",
            why=f"{len(rows)} rows for {runs} runs",
            fix="give --row once, or once for each run",
        )
    return [*rows] if len(rows) == runs else [rows[0] if rows else None] * runs


def match_row(
    *, cache: str, connector: str, llm: str = "", data: str = "", encoder_weights: str = "", row: str | None = None
) -> RowMatch:
    """The row of a run, from plain facts about it.

    Args:
        cache: name of the cache, or of several with + between them.
        connector: its name; "" if it is not known, which no row fits.
        llm: what the LLM was before training, a name or a path, whose last part counts; "" if it is not known.
        data: what was trained on, a file, whose stem counts; "" if it is not known.
        encoder_weights: SHA-256 of the encoder's weights or "random:SEED".
        row: name of the row where the user says it; then it is taken, and what does not fit is remarked.

    Raises:
        UnknownNameError: `row` is no row.
    """
    found = paper_row(row) if row is not None else _fitting(cache, connector, encoder_weights)
    if found is None:
        return RowMatch(row=None, remarks=(_no_row(cache, connector, encoder_weights),))
    remarks = []
    if _tokens(found.preset) != stem(cache):
        remarks.append(f"its tokens are {stem(cache)}, the row's {_tokens(found.preset)}")
    if connector != found.preset.connector:
        remarks.append(f"its connector is {connector or 'not known'}, the row's {found.preset.connector}")
    if "random:" in encoder_weights:
        remarks.append("its encoder is untrained")
    elif encoder_weights:
        digests = ", ".join(digest[:12] for digest in encoder_weights.split("+"))
        remarks.append(
            f"its encoder's weights (sha256 {digests}) are not compared with the paper's: no digest is known"
        )
    if PurePath(llm).name.lower() != PAPER_LLM_NAME:
        remarks.append(f"its LLM is {llm or 'not known'}, the paper's {PAPER_LLM}")
    if PurePath(data).stem != PAPER_DATA_STEM:
        remarks.append(f"it was trained on {data or 'unknown data'}, the paper's on {PAPER_DATA}")
    return RowMatch(row=found, remarks=tuple(remarks))


def row_of_run(run: RunFolder, *, cache: str, encoder_weights: str = "", row: str | None = None) -> RowMatch:
    """The row of a run folder, with what is remarkable about its training, too (see `paper_recipe`).

    Args:
        run: its model card and configuration say connector, LLM, data and recipe.
        cache, encoder_weights: what its answers were made with, as their header says.
        row: see `match_row`.

    Raises:
        UnknownNameError: `row` is no row.
    """
    match = match_row(cache=cache, encoder_weights=encoder_weights, row=row, **facts_of_run(run))
    if match.row is None:
        return match
    card = _json(run.path / "model" / "model.json")
    # the card names the prompt that "auto" has chosen
    config = {**run.config, **({"prompt": card["prompt"]} if "prompt" in card else {})}
    return RowMatch(row=match.row, remarks=(*match.remarks, *recipe_remarks(config, card.get("spec") or {})))


def facts_of_run(run: RunFolder) -> dict[str, str]:
    """Connector, LLM and data of a run, as its model card and its configuration say; "" for what they do not."""
    card, config = _json(run.path / "model" / "model.json"), run.config
    return {
        "connector": str(card.get("connector") or config.get("connector") or ""),
        "llm": str(card.get("llm") or config.get("llm") or ""),
        "data": str(config.get("data") or ""),
    }


def _fitting(cache: str, connector: str, encoder_weights: str) -> PaperRow | None:
    if "random:" in encoder_weights:
        return None
    fitting = [r for r in paper_rows() if _tokens(r.preset) == stem(cache) and r.preset.connector == connector]
    return fitting[0] if fitting else None


def _tokens(row: Preset) -> str:
    """As in a cache's name without its fingerprint: "dinov2-l@336x336+clip-l-336@336x336"."""
    return "+".join(f"{backbone}@{row.resolution}" for backbone in row.backbones)


def _no_row(cache: str, connector: str, encoder_weights: str) -> str:
    what = f"{stem(cache)} with {connector or 'an unknown connector'}"
    if "random:" in encoder_weights:
        return f"no row of the paper has an untrained encoder ({what}); --row NAME compares all the same"
    near = [row.name for row in paper_rows() if "+".join(row.preset.backbones) == backbone_of(cache)]
    hint = f"--row NAME says which one to compare with, e.g. {near[0]}" if near else "--row NAME says which one"
    return f"no row of the paper is {what}; {hint} (vlmx list rows)"


def _json(path: Path) -> Mapping[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}
