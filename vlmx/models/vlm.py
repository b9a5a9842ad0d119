"""What is the model? A connector in front of a causal LM: [bos][visual tokens][text] -> token losses, or answers.

Shapes: B rows, T positions of a row (visual and text), U different images of a batch, N visual tokens an image, D width
of the encoder, E width of the LLM, S supervised tokens of a batch, V vocabulary.

Rows are padded on the right and nothing is masked for it: in causal attention no token sees what comes after it. Packed
rows share one row of the batch instead, one after the other (`vlmx.models.packed`). Logits are computed at the S
positions that are supervised and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmx.errors import WeightsError
from vlmx.models.packed import PackedRows
from vlmx.models.tokens import to_floats

_LIKE_WITHOUT_CACHE = 0.1  # of the logits' spread; small Llamas are within 1e-6 in float32 and in bfloat16


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch, ready for the model.

    Attributes:
        input_ids_BT: text ids; any valid id at the places of visual tokens and of padding.
        visual_UND: tokens of the batch's different images, in the cache's dtype; U may be 0.
        scale_D, offset_D: 8-bit caches only: what their codes stand for, see `to_floats`.
        image_rows: the rows that have an image, [R].
        image_of_row: which of the U images each of these rows has, [R].
        predictor_S: flat positions (row * T + position) whose next token is learned.
        target_S: those next tokens.
        weight_S: what each of them weighs in the loss; None: each weighs 1.
        turn_BT: isolated turns only: 0 for the shared prefix, k for the k-th turn; None: plain causal attention.
        position_BT: isolated turns only: positions, which start again after the prefix in every turn. Packed rows
            only: positions, which start again in every row.
        lengths: packed rows only: of each row. B is 1 then, and T their sum; `image_rows` counts the packed rows.
    """

    input_ids_BT: Tensor
    visual_UND: Tensor
    image_rows: Tensor
    image_of_row: Tensor
    predictor_S: Tensor
    target_S: Tensor
    weight_S: Tensor | None = None
    turn_BT: Tensor | None = None
    position_BT: Tensor | None = None
    scale_D: Tensor | None = None
    offset_D: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device; a copy from page-locked memory runs by itself."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return replace(self, **moved)


class VLM(nn.Module):
    """Connector and LLM.

    Args:
        connector: maps [..., D] to [..., E].
        llm: a Hugging Face causal LM.
        visual_at: position of the first visual token: 1, right after BOS, or 0 for LLMs without BOS.
        eos_ids: ids that end an answer, beside those of the LLM's generation config.
    """

    def __init__(self, connector: nn.Module, llm: Any, *, visual_at: int = 1, eos_ids: Iterable[int] = ()) -> None:
        super().__init__()
        self.connector = connector
        self.llm = llm
        self.visual_at = visual_at
        configured = getattr(llm.generation_config, "eos_token_id", None)
        configured = [configured] if isinstance(configured, int) else configured or []
        self.eos_ids = frozenset([*eos_ids, *configured])
        self._head_positions: Tensor | None = None
        llm.get_output_embeddings().register_forward_pre_hook(self._select_positions)

    def forward(self, batch: Batch) -> Tensor:
        """The weighted sum of the S token losses, a scalar in float32; 0 with a gradient of zeros if S is 0."""
        packed = None if batch.lengths is None else PackedRows.of(batch.lengths, batch.input_ids_BT.device)
        embeds_BTE = self._embed(batch, packed)
        extra: dict[str, Any] = {}
        if batch.turn_BT is not None:
            assert batch.position_BT is not None
            extra = {
                "attention_mask": isolating_mask(batch.turn_BT, embeds_BTE.dtype),
                "position_ids": batch.position_BT,
            }
        if packed is not None:
            assert batch.position_BT is not None
            extra = packed.arguments(batch.position_BT)
        logits_SV = self.logits(embeds_BTE, batch.predictor_S, **extra)
        if batch.weight_S is None:
            return F.cross_entropy(logits_SV.float(), batch.target_S, reduction="sum")
        return F.cross_entropy(logits_SV.float(), batch.target_S, reduction="none") @ batch.weight_S

    @property
    def device(self) -> torch.device:
        """Where the LLM computes."""
        device: torch.device = self.llm.get_input_embeddings().weight.device
        return device

    def connect(self, visual_UND: Tensor) -> Tensor:
        """What the LLM gets for visual tokens of any float dtype, [U, N, E]."""
        visual_UNE: Tensor = self.connector(visual_UND.to(self.device, _dtype_of(self.connector)))
        return visual_UNE

    @torch.inference_mode()
    def first_token_logits(self, visual_BND: Tensor, prompts_ids: Sequence[Sequence[int]]) -> Tensor:
        """Logits of the first answer token after each prompt, float32 [B, V]; the input is that of `generate`."""
        result: dict[int, Tensor] = {}
        for rows, embeds_BTE in self._prompt_groups(visual_BND, prompts_ids):
            logits_BV = self.logits(embeds_BTE, _last_of_each(embeds_BTE)).float()
            check_numbers(logits_BV)
            result.update(zip(rows, logits_BV, strict=True))
        return torch.stack([result[row] for row in range(len(prompts_ids))])

    @torch.inference_mode()
    def generate(
        self, visual_BND: Tensor, prompts_ids: Sequence[Sequence[int]], max_new_tokens: int
    ) -> list[list[int]]:
        """Answer prompts greedily.

        Rows with prompts of equal length are decoded together, so that nothing is padded and no answer depends on its
        neighbours.

        Args:
            visual_BND: tokens of each prompt's image, in any float dtype.
            prompts_ids: ids of each prompt, BOS included (`Prompt.encode_question`).
            max_new_tokens: where to stop if no end token comes.

        Returns:
            The generated ids of each prompt, the end token excluded.

        Raises:
            WeightsError: the logits are not numbers.
        """
        answers: list[list[int]] = [[] for _ in prompts_ids]
        for rows, embeds_BTE in self._prompt_groups(visual_BND, prompts_ids):
            generated_BK = self._decode(embeds_BTE, max_new_tokens)
            for row, ids in zip(rows, generated_BK.tolist(), strict=True):
                end = next((index for index, token in enumerate(ids) if token in self.eos_ids), len(ids))
                answers[row] = ids[:end]
        return answers

    @cached_property
    def _remembers(self) -> bool:
        """Whether the LLM goes on from a cache. Those that keep their state elsewhere (Mamba, RWKV) ignore or refuse
        one; they read the whole text again for each token.

        Beside the signature it is tried: the third token's logits from the cache must be those without one.
        """
        from transformers import DynamicCache

        if "past_key_values" not in inspect.signature(self.llm.forward).parameters:
            return False
        embedding = self.llm.get_input_embeddings()
        embeds_1TE = embedding(torch.arange(3, device=self.device)[None] % embedding.num_embeddings)
        last_1 = torch.tensor([2], device=self.device)
        expected_V = self.logits(embeds_1TE, last_1)[0].float()
        cache = DynamicCache(config=self.llm.config)
        try:
            self.logits(embeds_1TE[:, :2], last_1 - 1, past_key_values=cache, use_cache=True)
            found_V = self.logits(embeds_1TE[:, 2:], last_1 - 2, past_key_values=cache, use_cache=True)[0].float()
        except (TypeError, ValueError, AttributeError):
            return False
        return bool((found_V - expected_V).std() <= _LIKE_WITHOUT_CACHE * expected_V.std())

    def _decode(self, embeds_BTE: Tensor, max_new_tokens: int) -> Tensor:
        from transformers import DynamicCache

        cached: dict[str, Any] = {}
        if self._remembers:
            cached = {"past_key_values": DynamicCache(config=self.llm.config), "use_cache": True}
        eos = torch.tensor(sorted(self.eos_ids), device=embeds_BTE.device)
        ended_B = torch.zeros(len(embeds_BTE), dtype=torch.bool, device=embeds_BTE.device)
        chosen: list[Tensor] = []
        for _ in range(max_new_tokens):
            logits_BV = self.logits(embeds_BTE, _last_of_each(embeds_BTE), **cached)
            check_numbers(logits_BV)
            chosen.append(logits_BV.argmax(dim=-1))
            ended_B |= torch.isin(chosen[-1], eos)
            if bool(ended_B.all()):
                break
            next_B1E = self.llm.get_input_embeddings()(chosen[-1])[:, None]
            embeds_BTE = next_B1E if cached else torch.cat([embeds_BTE, next_B1E], dim=1)
        return torch.stack(chosen, dim=1)

    def _embed(self, batch: Batch, packed: PackedRows | None) -> Tensor:
        """Text embeddings with the visual ones put in their places, [B, T, E].

        The connector runs even on zero images: where ranks train together, each must take part in every collective of
        its gradients.
        """
        embeds_BTE: Tensor = self.llm.get_input_embeddings()(batch.input_ids_BT)
        dtype = _dtype_of(self.connector)
        visual_UND = to_floats(batch.visual_UND, dtype, scale_D=batch.scale_D, offset_D=batch.offset_D)
        visual_UNE = self.connector(visual_UND).to(embeds_BTE.dtype)
        if packed is not None:
            offsets_N = torch.arange(self.visual_at, self.visual_at + visual_UNE.shape[1], device=embeds_BTE.device)
            places_RN = packed.bounds[batch.image_rows, None] + offsets_N
            embeds_BTE[0, places_RN] = visual_UNE[batch.image_of_row]
            return embeds_BTE
        places_BNE = embeds_BTE[:, self.visual_at : self.visual_at + visual_UNE.shape[1]]
        # rows of text alone may be shorter than an image
        places_BNE[batch.image_rows] = visual_UNE[batch.image_of_row, : places_BNE.shape[1]]
        return embeds_BTE

    def _prompt_groups(
        self, visual_BND: Tensor, prompts_ids: Sequence[Sequence[int]]
    ) -> Iterable[tuple[list[int], Tensor]]:
        """(row numbers, embeddings [rows, T, E]) of the prompts of each length."""
        rows_of: dict[int, list[int]] = {}
        for row, ids in enumerate(prompts_ids):
            rows_of.setdefault(len(ids), []).append(row)
        embedding = self.llm.get_input_embeddings()
        for rows in rows_of.values():
            text_BTE = embedding(torch.tensor([list(prompts_ids[row]) for row in rows], device=self.device))
            visual_BNE = self.connect(visual_BND[rows]).to(text_BTE.dtype)
            parts = text_BTE[:, : self.visual_at], visual_BNE, text_BTE[:, self.visual_at :]
            yield rows, torch.cat(parts, dim=1)

    def logits(self, embeds_BTE: Tensor, positions_S: Tensor, use_cache: bool = False, **extra: Any) -> Tensor:
        """Logits [S, V] at flat positions of embeddings, and nowhere else; the rest of the LLM's forward, which gets
        `extra`, stays its own, its scaling of logits included.
        """
        self._head_positions = positions_S
        try:
            output = self.llm(inputs_embeds=embeds_BTE, use_cache=use_cache, **extra)
        finally:
            self._head_positions = None
        logits_SV: Tensor = output.logits[0]
        return logits_SV

    def _select_positions(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._head_positions is None:
            return inputs
        return (inputs[0].flatten(0, 1)[self._head_positions][None], *inputs[1:])


def check_numbers(logits_BV: Tensor) -> None:
    """Make sure that a choice by these logits means something.

    Raises:
        WeightsError: some are NaN.
    """
    if bool(logits_BV.isnan().any()):
        raise WeightsError(
            "the model's logits are not numbers",
            why="NaN comes out of it: its training diverged, its weights are damaged, or the dtype overflows",
            fix="look at the losses of its training; if they are numbers, try --dtype fp32",
        )


def isolating_mask(turn_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive attention mask [B, 1, T, T] with which each turn sees the prefix (turn 0) and its own past."""
    length = turn_BT.shape[1]
    past_TT = torch.ones(length, length, dtype=torch.bool, device=turn_BT.device).tril()
    seen_BTT = (turn_BT[:, :, None] == turn_BT[:, None, :]) | (turn_BT == 0)[:, None, :]
    hidden_BTT = ~(seen_BTT & past_TT)
    mask_BTT = torch.zeros(hidden_BTT.shape, dtype=dtype, device=turn_BT.device)
    return mask_BTT.masked_fill_(hidden_BTT, torch.finfo(dtype).min)[:, None]


def _last_of_each(embeds_BTE: Tensor) -> Tensor:
    """Flat position of the last token of each row."""
    rows, length = embeds_BTE.shape[:2]
    return torch.arange(1, rows + 1, device=embeds_BTE.device) * length - 1


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in module.parameters()), torch.float32)
