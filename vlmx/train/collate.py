"""How do conversations become a micro-batch? Token ids, learned positions, visual tokens; padded or packed.

Shapes: B rows, T positions of a row (visual and text), N visual tokens an image, D their width, U different images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vlmx.cache_specs.token_source import TokenSource
from vlmx.console import warn
from vlmx.data.records import Conversation
from vlmx.errors import UsageError
from vlmx.models.llm import has_rotary_positions
from vlmx.models.prompts import IGNORED, EncodedConversation, Prompt
from vlmx.models.vlm import Batch
from vlmx.train.plan import TrainPlan

Ints = npt.NDArray[np.int64]
PADDING_TURN = -1
MIN_TEXT_POSITIONS = 16


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A batch and what is counted about it.

    Attributes:
        images: which of its step's images are the batch's, in the order in which it counts them.
        supervised: tokens that are learned.
        weight: sum of what they weigh in the loss: their number, or that of the answers if every answer weighs 1.
        tokens: tokens without padding, visual ones included.
        truncated: conversations that were cut.
        silent: conversations in which nothing is learned.
    """

    batch: Batch
    images: list[int]
    supervised: int
    weight: float
    tokens: int
    truncated: int
    silent: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversation with its visual tokens' places, all [T] of this row; and the content id of its image."""

    ids: Ints
    labels: Ints
    turns: Ints
    positions: Ints
    truncated: bool
    image: str | None


class Collator:
    """Builds micro-batches, all of them but the visual tokens.

    Args:
        prompt: turns conversations into token ids.
        reader: the cache, or several joined ones.
        image_ids: content id by the data's image key.
        isolated: turns of a conversation do not see each other, and positions start again in each.
        by_answer: every answer weighs the same in the loss, however many tokens it has.
        max_text_tokens: longer texts are cut.
        max_positions: text is cut where its position would reach this, the LLM's context; None: no limit.
        packed: rows share one, one after the other, instead of being padded; not with `isolated`.
    """

    def __init__(
        self,
        prompt: Prompt,
        reader: TokenSource,
        image_ids: dict[str, str],
        *,
        isolated: bool,
        by_answer: bool,
        max_text_tokens: int,
        max_positions: int | None,
        packed: bool = False,
    ) -> None:
        assert not (isolated and packed)
        self.prompt = prompt
        self.reader = reader
        self.image_ids = image_ids
        self.isolated = isolated
        self.by_answer = by_answer
        self.max_text_tokens = max_text_tokens
        self.max_positions = max_positions
        self.packed = packed

    def rows(self, conversations: Sequence[Conversation]) -> list[Row]:
        """Conversations as rows, each as long as it is."""
        encoded = self.prompt.encode_many(
            [[(turn.question, turn.answer) for turn in c.turns] for c in conversations], isolated=self.isolated
        )
        return [
            self._row(e, None if c.image is None else self.image_ids[c.image])
            for e, c in zip(encoded, conversations, strict=True)
        ]

    def batch(self, rows: Sequence[Row], number_of: Mapping[str, int]) -> MicroBatch:
        """One micro-batch, without the visual tokens.

        Args:
            rows: at least one.
            number_of: position of each image among those of the step.
        """
        images = [number_of[row.image] for row in rows if row.image is not None]
        unique = list(dict.fromkeys(images))
        place_of = {image: place for place, image in enumerate(unique)}
        scales = self.reader.quantization
        laid_out = _join if self.packed else _pad
        labels_BT = laid_out([row.labels for row in rows], IGNORED)
        learned_BT = labels_BT != IGNORED
        turns_BT = _pad([row.turns for row in rows], PADDING_TURN) if self.isolated else None
        positions_BT = laid_out([row.positions for row in rows], 0) if self.isolated or self.packed else None
        weight_S = _answer_weights(rows) if self.by_answer else None
        predictor_S = np.flatnonzero(learned_BT) - 1  # the token before; labels never stand first in a row
        return MicroBatch(
            batch=Batch(
                input_ids_BT=torch.from_numpy(laid_out([row.ids for row in rows], 0)),
                visual_UND=torch.empty(0, self.reader.num_tokens, self.reader.shape.dim),
                image_rows=torch.tensor([n for n, row in enumerate(rows) if row.image is not None]).long(),
                image_of_row=torch.tensor([place_of[image] for image in images]).long(),
                predictor_S=torch.from_numpy(predictor_S),
                target_S=torch.from_numpy(labels_BT[learned_BT]),
                weight_S=None if weight_S is None else torch.from_numpy(weight_S),
                turn_BT=None if turns_BT is None else torch.from_numpy(turns_BT),
                position_BT=None if positions_BT is None else torch.from_numpy(positions_BT),
                scale_D=None if scales is None else torch.from_numpy(scales.scale_D),
                offset_D=None if scales is None else torch.from_numpy(scales.offset_D),
                lengths=tuple(len(row.ids) for row in rows) if self.packed else None,
            ),
            images=unique,
            supervised=len(predictor_S),
            weight=len(predictor_S) if weight_S is None else float(weight_S.sum(dtype=np.float64)),
            tokens=sum(len(row.ids) for row in rows),
            truncated=sum(row.truncated for row in rows),
            silent=sum(bool((row.labels == IGNORED).all()) for row in rows),
        )

    def _row(self, encoded: EncodedConversation, image: str | None) -> Row:
        turns = np.array(encoded.turn_of_token, dtype=np.int64)
        at, visual = self.prompt.visual_at, 0 if image is None else self.reader.num_tokens
        positions = np.arange(len(turns)) + visual * (turns > 0)
        if self.isolated and len(turns) > at:
            first_of_turn = np.concatenate([[at], np.flatnonzero(np.diff(turns[at:])) + 1 + at])
            positions[at:] -= first_of_turn[turns[at:] - 1] - at
        fits = np.arange(len(turns)) < self.max_text_tokens
        if self.max_positions is not None:
            fits &= positions < self.max_positions
        ids = np.array(encoded.input_ids, dtype=np.int64)[fits]
        labels = np.array(encoded.labels, dtype=np.int64)[fits]
        turns, positions = turns[fits], positions[fits]
        if visual:
            ids = np.insert(ids, at, np.zeros(visual, dtype=np.int64))
            labels = np.insert(labels, at, np.full(visual, IGNORED))
            turns = np.insert(turns, at, np.zeros(visual, dtype=np.int64))
            positions = np.insert(positions, at, np.arange(at, at + visual))
        return Row(ids=ids, labels=labels, turns=turns, positions=positions, truncated=not fits.all(), image=image)


def build_collator(plan: TrainPlan, prompt: Prompt, llm_config: Any, *, packed: bool = False) -> Collator:
    """The collator of a run, whose LLM has packed attention if rows are to be packed.

    Raises:
        UsageError: visual tokens do not fit the LLM.
    """
    config = plan.config
    return Collator(
        prompt,
        plan.reader,
        plan.image_ids,
        isolated=config.turns == "isolated",
        by_answer=config.loss_mean == "answers",
        max_text_tokens=config.max_text_tokens,
        max_positions=check_context(llm_config, plan.reader.num_tokens),
        packed=packed,
    )


def check_context(llm_config: Any, visual_tokens: int) -> int | None:
    """The number of positions that an LLM was made for; None if it says none, or if it is rotary and has no room for
    the visual tokens and a short text: it then has to do with positions that it does not know, which is said.

    Raises:
        UsageError: the table has no room for the visual tokens and a short text.
    """
    context = getattr(llm_config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return None
    if visual_tokens + MIN_TEXT_POSITIONS <= context:
        return int(context)
    if has_rotary_positions(llm_config.get_text_config()):
        warn(f"{visual_tokens} visual tokens and a text are more than the LLM's context of {context}: no text is cut")
        return None
    raise UsageError(
        f"{visual_tokens} visual tokens do not fit the LLM",
        why=f"it has a table of {context} positions, and text needs some of them",
        fix="choose an LLM with a longer context, or a cache of a lower resolution",
    )


def _answer_weights(rows: Sequence[Row]) -> npt.NDArray[np.float32]:
    """1 / the number of learned tokens of its answer, for each learned token, [S]."""
    turns = 1 + max(int(row.turns.max(initial=0)) for row in rows)
    answer_S = np.concatenate([turns * n + row.turns[row.labels != IGNORED] for n, row in enumerate(rows)])
    _, index_S, length = np.unique(answer_S, return_inverse=True, return_counts=True)
    return (1 / length[index_S]).astype(np.float32)


def _pad(rows: Sequence[Ints], value: int) -> Ints:
    """Rows [T_b] -> [B, T], filled with `value` on the right."""
    padded_BT = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for padded_T, row in zip(padded_BT, rows, strict=True):
        padded_T[: len(row)] = row
    return padded_BT


def _join(rows: Sequence[Ints], _value: int) -> Ints:
    """Rows [T_b] -> [1, sum of T_b]."""
    return np.concatenate(rows)[None]
