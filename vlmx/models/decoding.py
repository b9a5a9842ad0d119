"""How do many questions become answers at once? The prefix that they share is computed once an image, the rest in one
batch.

    [bos][visual tokens][what all prompts begin with]     one row an image, prefilled together
                                                    ╰─▶  keys and values, copied to each question of the image
    [the rest of each prompt][padding][answer ...]        one row a question, decoded together, greedily

Padding stands between a prompt and its answer: it is masked, and positions are counted without it. Rests are taken in
a few at a time, those of like length together. A row that has ended leaves the batch. `VLM.generate` says what the
answers are; in float32 these are the same.

Shapes: U images, B questions (rows), P positions of the shared prefix, R of the longest rest, T all positions so far, N
visual tokens an image, D width of the encoder, E width of the LLM, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vlmx.models.llm import has_sliding_window
from vlmx.models.vlm import VLM, check_numbers

ROOM = 32  # positions for answers that memory is taken for at a time
ROWS_OF_LIKE_LENGTH = 16  # rests of prompts that are padded to the same length
WORTH_LEAVING = 0.75  # rows that have ended leave the batch when at most so many would be left
_PROBE = (5, (1, 12, 4), 2)  # positions of the prefix, of the rests, and of the answer
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_PROBE_TOLERANCE_16_BITS = 5e-2


class _RoomyLayer(DynamicLayer):
    """Keys and values of one layer with room for more: what `DynamicLayer` copies at each new token stays in place.

    Args:
        memory: of keys and of values, [rows, heads, room, width].
        length: how many positions of it are in use.
    """

    def __init__(self, memory: Sequence[Tensor], length: int) -> None:
        super().__init__()
        self._memory = tuple(memory)
        self.dtype, self.device, self.is_initialized = memory[0].dtype, memory[0].device, True
        self.show(length)

    @classmethod
    def copy_of(cls, layer: DynamicLayer, rows: Tensor, room: int) -> _RoomyLayer:
        """Some rows of another layer, one of them as often as it is named."""
        assert layer.keys is not None
        assert layer.values is not None
        return cls([_with_room(each[rows], room) for each in (layer.keys, layer.values)], layer.get_seq_length())

    def part(self, rows: slice) -> _RoomyLayer:
        """Some rows, in the same memory."""
        return _RoomyLayer([memory[rows] for memory in self._memory], self.get_seq_length())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self._memory[0].shape[-2]:
            self._memory = tuple(_with_room(memory, end + ROOM) for memory in self._memory)
        for memory, new in zip(self._memory, (key_states, value_states), strict=True):
            memory[..., start:end, :] = new
        return self.show(end)

    def show(self, length: int) -> tuple[Tensor, Tensor]:
        """Use so many positions."""
        self.keys, self.values = (memory[..., :length, :] for memory in self._memory)
        return self.keys, self.values


def _with_room(states: Tensor, room: int) -> Tensor:
    """A copy with room for so many positions; zeros there, because what is masked still has to be a number."""
    memory = states.new_zeros(*states.shape[:-2], room, states.shape[-1])
    memory[..., : states.shape[-2], :] = states
    return memory


class _Rows:
    """Rows that are being decoded together: what they have seen, and where they go on.

    Args:
        prefix_UPE: embeddings that the rows begin with, one row an image.
        image_of_row: which of the U images each prompt has.
        rests_ids: ids of the rest of each prompt, at least one each.

    Attributes:
        order: which prompt each row is.
        logits_BV: those of the next token of each row.
    """

    def __init__(
        self, vlm: VLM, prefix_UPE: Tensor, image_of_row: Sequence[int], rests_ids: Sequence[Sequence[int]]
    ) -> None:
        self._vlm = vlm
        self._takes_positions = "position_ids" in inspect.signature(vlm.llm.forward).parameters
        self.order = sorted(range(len(rests_ids)), key=lambda row: len(rests_ids[row]))
        rests_ids = [rests_ids[row] for row in self.order]
        start, longest = prefix_UPE.shape[1], len(rests_ids[-1])

        shared = DynamicCache(config=vlm.llm.config)
        _forward(vlm, prefix_UPE, past_key_values=shared)
        image_B = torch.tensor([image_of_row[row] for row in self.order], device=vlm.device)
        self._cache = _copied(shared, image_B, room=start + longest + ROOM)
        length_B = torch.tensor([len(ids) for ids in rests_ids], device=vlm.device)
        seen_BR = torch.arange(longest, device=vlm.device) < length_B[:, None]
        self._seen_BT = torch.cat((seen_BR.new_ones(len(rests_ids), start), seen_BR), dim=1).long()
        self._position_B = start + length_B  # of the next token
        self.logits_BV = torch.cat(
            [self._read(rests_ids, start, rows) for rows in _slices(len(rests_ids), ROWS_OF_LIKE_LENGTH)]
        )
        for layer in self._cache.layers:
            layer.show(start + longest)

    def _read(self, rests_ids: Sequence[Sequence[int]], start: int, rows: slice) -> Tensor:
        """Take in the rests of some prompts, which are padded to the longest of these; gives logits."""
        some = rests_ids[rows]
        longest = len(some[-1])
        device = self._vlm.device
        ids_BR = torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in some], device=device)
        last_B = torch.tensor([len(ids) - 1 for ids in some], device=device)
        positions_BR = start + torch.arange(longest, device=device).minimum(last_B[:, None])
        cache = DynamicCache()
        cache.layers = [layer.part(rows) for layer in self._cache.layers]
        flat_B = torch.arange(len(some), device=device) * longest + last_B
        return self._step(ids_BR, positions_BR, flat_B, self._seen_BT[rows, : start + longest], cache)

    def append(self, chosen_B: Tensor) -> None:
        """Give each row one more token; `logits_BV` are those of the next one."""
        self._seen_BT = torch.cat((self._seen_BT, self._seen_BT.new_ones(len(chosen_B), 1)), dim=1)
        last_B = torch.arange(len(chosen_B), device=chosen_B.device)
        self.logits_BV = self._step(chosen_B[:, None], self._position_B[:, None], last_B, self._seen_BT, self._cache)
        self._position_B = self._position_B + 1

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows alone."""
        self._cache = _copied(self._cache, rows, room=self._seen_BT.shape[1] + ROOM)
        self._seen_BT, self._position_B = self._seen_BT[rows], self._position_B[rows]
        self.order = [self.order[row] for row in rows.tolist()]

    def _step(self, ids_BR: Tensor, positions_BR: Tensor, last_B: Tensor, seen_BT: Tensor, cache: Any) -> Tensor:
        positions = {"position_ids": positions_BR} if self._takes_positions else {}
        embeds_BRE = self._vlm.llm.get_input_embeddings()(ids_BR)
        return self._vlm.logits(
            embeds_BRE, last_B, past_key_values=cache, use_cache=True, attention_mask=seen_BT, **positions
        )


def _forward(vlm: VLM, embeds_BTE: Tensor, **extra: Any) -> None:
    """Run the LLM for its keys and values; logits are computed at one position, because none is not possible."""
    vlm.logits(embeds_BTE, torch.zeros(1, dtype=torch.long, device=embeds_BTE.device), use_cache=True, **extra)


def _copied(cache: Any, rows: Tensor, *, room: int) -> Any:
    """A cache of some rows of another one."""
    copy = DynamicCache()
    copy.layers = [_RoomyLayer.copy_of(layer, rows, room) for layer in cache.layers]
    return copy


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


@torch.inference_mode()
def generate_shared(
    vlm: VLM,
    visual_UND: Tensor,
    image_of_row: Sequence[int],
    prompts_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[list[int]]:
    """Answer prompts greedily, as `VLM.generate` does.

    Args:
        vlm: a model for which `sharing_problem` knows none.
        visual_UND: tokens of the images, in any float dtype.
        image_of_row: which of the U images each prompt asks about.
        prompts_ids: ids of each prompt, BOS included (`Prompt.encode_question`).
        max_new_tokens: where to stop if no end token comes.

    Returns:
        The generated ids of each prompt, the end token excluded.

    Raises:
        WeightsError: the logits are not numbers.
    """
    rows = _begin(vlm, visual_UND, image_of_row, prompts_ids)
    eos = torch.tensor(sorted(vlm.eos_ids), device=rows.logits_BV.device)
    answers: list[list[int]] = [[] for _ in prompts_ids]
    ended_B = torch.zeros(len(prompts_ids), dtype=torch.bool, device=eos.device)
    for step in range(max_new_tokens):
        check_numbers(rows.logits_BV)
        chosen_B = rows.logits_BV.argmax(dim=-1)
        ended_B = ended_B | torch.isin(chosen_B, eos)
        ended = ended_B.tolist()
        for row, token, is_over in zip(rows.order, chosen_B.tolist(), ended, strict=True):
            if not is_over:
                answers[row].append(token)
        if all(ended) or step == max_new_tokens - 1:
            break
        if len(ended) - sum(ended) <= WORTH_LEAVING * len(ended):
            left = (~ended_B).nonzero()[:, 0]
            rows.keep(left)
            chosen_B, ended_B = chosen_B[left], ended_B[left]
        rows.append(chosen_B)
    return answers


@torch.inference_mode()
def first_token_logits_shared(
    vlm: VLM, visual_UND: Tensor, image_of_row: Sequence[int], prompts_ids: Sequence[Sequence[int]]
) -> Tensor:
    """Logits of the first answer token after each prompt, float32 [B, V]; arguments and errors as `generate_shared`."""
    rows = _begin(vlm, visual_UND, image_of_row, prompts_ids)
    check_numbers(rows.logits_BV)
    logits_BV = torch.empty_like(rows.logits_BV, dtype=torch.float32)
    logits_BV[rows.order] = rows.logits_BV.float()
    return logits_BV


def _begin(vlm: VLM, visual_UND: Tensor, image_of_row: Sequence[int], prompts_ids: Sequence[Sequence[int]]) -> _Rows:
    """Prompts up to their ends; the connector runs once an image."""
    assert len(image_of_row) == len(prompts_ids)
    shared_ids = shared_prefix(prompts_ids)
    text_TE = vlm.llm.get_input_embeddings()(torch.tensor(shared_ids, device=vlm.device, dtype=torch.long))
    visual_UNE = vlm.connect(visual_UND).to(text_TE.dtype)
    text_UTE = text_TE.expand(len(visual_UNE), -1, -1)
    prefix_UPE = torch.cat((text_UTE[:, : vlm.visual_at], visual_UNE, text_UTE[:, vlm.visual_at :]), dim=1)
    return _Rows(vlm, prefix_UPE, image_of_row, [ids[len(shared_ids) :] for ids in prompts_ids])


def shared_prefix(prompts_ids: Sequence[Sequence[int]]) -> list[int]:
    """The ids that all prompts begin with, short of the last id of any."""
    shortest = min(map(len, prompts_ids)) - 1
    first = prompts_ids[0]
    alike: Iterable[int] = (k for k in range(shortest) if any(ids[k] != first[k] for ids in prompts_ids))
    return list(first[: next(iter(alike), shortest)])


@torch.inference_mode()
def sharing_problem(vlm: VLM) -> str:
    """Why this LLM's questions cannot share a prefix; empty if they can.

    Beside what its configuration tells, it is tried: logits after a shared prefix and padding must be those of each
    text alone, which does not hold, for instance, where an LLM counts positions by itself and padding with them.
    """
    if not all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=vlm.llm.config).layers):
        return "it remembers something else than keys and values"
    if has_sliding_window(vlm.llm.config.get_text_config()):
        return "some of its layers see only the last few positions"
    prefix, rests, answer = _PROBE
    embedding = vlm.llm.get_input_embeddings()
    dice = torch.Generator().manual_seed(0)
    ids = torch.randint(embedding.num_embeddings, (prefix + max(rests) + answer,), generator=dice).tolist()
    try:
        prefix_UPE = embedding(torch.tensor([ids[:prefix]], device=vlm.device))
        rows = _Rows(vlm, prefix_UPE, [0] * len(rests), [ids[prefix : prefix + rest] for rest in rests])
        worst = 0.0
        for number in range(answer + 1):
            for row, rest in enumerate(sorted(rests)):
                alone_1TE = embedding(torch.tensor([ids[: prefix + rest] + ids[-answer:][:number]], device=vlm.device))
                last_1 = torch.tensor([alone_1TE.shape[1] - 1], device=vlm.device)
                expected_V = vlm.logits(alone_1TE, last_1)[0].float()
                difference = (rows.logits_BV[row].float() - expected_V).std() / expected_V.std().clamp_min(1e-9)
                worst = max(worst, float(difference))
            if number < answer:
                rows.append(torch.tensor([ids[-answer:][number]] * len(rests), device=vlm.device))
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"it does not take masks with gaps: {str(error).strip().splitlines()[0]}"
    tolerance = _PROBE_TOLERANCE.get(embedding.weight.dtype, _PROBE_TOLERANCE_16_BITS)
    return f"its logits change by {worst:.1e} with padding" if worst > tolerance else ""
