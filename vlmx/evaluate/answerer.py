"""How does a trained model answer groups of questions? Tokens are read ahead, and the text comes out.

Shapes: U images of a group, B questions, N visual tokens an image, D width of the encoder, V vocabulary, O options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmx.cache_specs.loader import TokenLoader
from vlmx.cache_specs.token_source import TokenSource
from vlmx.console import note, warn
from vlmx.data.records import Question
from vlmx.errors import UsageError
from vlmx.evaluate.answers import Answer, Dtype
from vlmx.evaluate.groups import Group
from vlmx.models.decoding import first_token_logits_shared, generate_shared, sharing_problem
from vlmx.models.folder import SavedModel
from vlmx.models.llm import has_rotary_positions
from vlmx.models.options import option_ids
from vlmx.models.tokens import to_floats

MAX_NEW_TOKENS = 128  # as in the paper's evaluation; answers normally end long before
TOKENS_AHEAD = 2
DTYPES: Mapping[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A group as the model takes it."""

    visual_UND: Tensor
    image_of_row: list[int]
    prompts_ids: list[list[int]]


class Answerer:
    """A model that answers.

    Args:
        saved: as `load_model` gives it; it is moved and converted in place.
        device: where it computes.
        dtype: what its parameters become.
        exact: one question at a time, nothing shared.
    """

    def __init__(self, saved: SavedModel, device: torch.device, *, dtype: Dtype = "fp32", exact: bool = False) -> None:
        self._prompt = saved.prompt
        for parameter in saved.vlm.parameters():  # buffers, such as rotary frequencies, keep their accuracy
            parameter.data = parameter.data.to(DTYPES[dtype])
        self._vlm = saved.vlm.to(device).eval()
        self._exact = exact
        self._ids_of: dict[tuple[str, ...], list[int] | None] = {}
        self._unfit: dict[tuple[str, ...], str] = {}
        config = self._vlm.llm.config.get_text_config()
        # An LLM with a table of positions ends where its table does.
        self._positions = None if has_rotary_positions(config) else getattr(config, "max_position_embeddings", None)
        problem = "" if exact else sharing_problem(self._vlm)
        self._apart = bool(problem)
        if problem:
            note(f"questions of an image do not share its prefix: {problem}; those of equal length go together")

    def check(self, benchmark: str, groups: Sequence[Group], visual_tokens: int) -> None:
        """Look at questions before any is answered: whether their options are tokens, and their prompts short enough.

        Where an option is not one token, the questions are answered in words, which a warning says.

        Raises:
            UsageError: an LLM with a table of positions has too few of them.
        """
        for options in dict.fromkeys(group.questions[0].options for group in groups):
            if options and self._option_ids(options) is None:
                warn(f"{benchmark}: {self._unfit[options]}; answers are generated and read, without probabilities")
        if groups and self._positions is not None:
            prompts = dict.fromkeys(question.prompt for group in groups for question in group.questions)
            self._check_length([self._prompt.encode_question(prompt) for prompt in prompts], visual_tokens)

    def _option_ids(self, options: tuple[str, ...]) -> list[int] | None:
        """The token of each option; None where they have none."""
        if options not in self._ids_of:
            try:
                self._ids_of[options] = option_ids(self._prompt, options)
            except ValueError as error:
                self._ids_of[options] = None
                self._unfit[options] = str(error)
        return self._ids_of[options]

    def answers(self, groups: Sequence[Group], source: TokenSource, id_of: Mapping[str, str]) -> Iterator[list[Answer]]:
        """The answers of each group, in its order; the tokens of an image are read once a group, ahead of it.

        Args:
            groups: what is asked.
            source: where the tokens are.
            id_of: image key -> image id.

        Raises:
            CacheError, CacheCorruptError: tokens cannot be read.
            WeightsError: the logits are not numbers.
            UsageError: see `check`.
        """
        images = [list(dict.fromkeys(group.images)) for group in groups]
        batches = ([id_of[key] for key in keys] for keys in images)
        readers = 2 if source.parts else 1  # an encoder that works on the fly does one batch at a time
        with TokenLoader(source, batches, threads=readers, ahead=TOKENS_AHEAD) as loader:
            for group, keys, stored_UND in zip(groups, images, loader, strict=True):
                yield self._answer(group, keys, self._floats(stored_UND, source))

    def _floats(self, stored_UND: NDArray[Any], source: TokenSource) -> Tensor:
        tokens_UND = torch.from_numpy(stored_UND)
        if source.logical_dtype == "bfloat16":
            tokens_UND = tokens_UND.view(torch.bfloat16)
        scales = source.quantization
        device = self._vlm.device
        return to_floats(
            tokens_UND.to(device),
            torch.float32,
            scale_D=None if scales is None else torch.from_numpy(scales.scale_D).to(device),
            offset_D=None if scales is None else torch.from_numpy(scales.offset_D).to(device),
        )

    def _answer(self, group: Group, keys: Sequence[str], visual_UND: Tensor) -> list[Answer]:
        place_of = {key: place for place, key in enumerate(keys)}
        asked = _Asked(
            visual_UND=visual_UND,
            image_of_row=[place_of[key] for key in group.images],
            prompts_ids=[self._prompt.encode_question(question.prompt) for question in group.questions],
        )
        self._check_length(asked.prompts_ids, visual_UND.shape[1])
        options = group.questions[0].options
        if options and self._option_ids(options) is not None:
            said = self._options(group.questions, asked)
        else:
            said = [(self._prompt.decode(ids), None) for ids in self._texts(asked)]
        return [
            Answer(id=question.id, image=key, prompt=question.prompt, text=text, probabilities=probabilities)
            for question, key, (text, probabilities) in zip(group.questions, group.images, said, strict=True)
        ]

    def _texts(self, asked: _Asked) -> list[list[int]]:
        if not (self._exact or self._apart):
            return generate_shared(self._vlm, asked.visual_UND, asked.image_of_row, asked.prompts_ids, MAX_NEW_TOKENS)
        return _by_rows(asked, self._exact, lambda visual_BND, ids: self._vlm.generate(visual_BND, ids, MAX_NEW_TOKENS))

    def _options(self, questions: Sequence[Question], asked: _Asked) -> list[tuple[str, tuple[float, ...] | None]]:
        """For each question its likeliest option, and the probabilities of all."""
        if not (self._exact or self._apart):
            logits: Iterable[Tensor] = first_token_logits_shared(
                self._vlm, asked.visual_UND, asked.image_of_row, asked.prompts_ids
            )
        else:
            logits = _by_rows(asked, self._exact, lambda visual, ids: list(self._vlm.first_token_logits(visual, ids)))
        said: list[tuple[str, tuple[float, ...] | None]] = []
        for question, logits_V in zip(questions, logits, strict=True):
            ids = self._option_ids(question.options)
            assert ids is not None, question.options
            probabilities_O = logits_V[ids].double().softmax(dim=0)
            said.append((question.options[int(probabilities_O.argmax())], tuple(probabilities_O.tolist())))
        return said

    def _check_length(self, prompts_ids: Sequence[Sequence[int]], visual_tokens: int) -> None:
        longest = max(map(len, prompts_ids)) + visual_tokens + MAX_NEW_TOKENS
        if self._positions is not None and longest > self._positions:
            raise UsageError(
                f"a question needs {longest} positions, and the LLM has {self._positions}",
                why=f"{visual_tokens} are visual tokens, {MAX_NEW_TOKENS} are kept for the answer",
                fix="use an encoder with fewer tokens, or an LLM with a longer context",
            )


def _by_rows(asked: _Asked, alone: bool, call: Callable[[Tensor, list[list[int]]], list[Any]]) -> list[Any]:
    """Each question with the tokens of its image: all in one call, or each in its own."""
    if not alone:
        return call(asked.visual_UND[asked.image_of_row], asked.prompts_ids)
    pairs = zip(asked.image_of_row, asked.prompts_ids, strict=True)
    return [call(asked.visual_UND[[image]], [ids])[0] for image, ids in pairs]
