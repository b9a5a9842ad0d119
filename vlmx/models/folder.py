"""What does a trained model look like on disk? A folder with the connector, the LLM as Hugging Face saves it, and a
card.

    model/connector.safetensors    the connector's weights
    model/llm/                     `AutoModelForCausalLM.from_pretrained` reads it; the tokenizer is in it
    model/model.json               the card: names, dimensions, prompt, and the cache that it was trained on

The card is written last, so a folder with a card is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from vlmx.cache_specs.fused import TokenSpec, spec_from_dict
from vlmx.errors import OutOfSpaceError, RunError, WeightsError
from vlmx.models.connectors import build_connector
from vlmx.models.llm import load_llm, no_progress_bars
from vlmx.models.prompts import Prompt, choose_prompt
from vlmx.models.rope import round_positions
from vlmx.models.vlm import VLM
from vlmx.runs import space_error, write_json

CARD = "model.json"


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What is needed to build the model again, and what it was trained on.

    Attributes:
        connector: name of the connector.
        dim_vision: width D of a visual token.
        dim_llm: width E of the LLM's embeddings.
        prompt: name of the prompt format, never "auto".
        llm: what the LLM was before training, a name or a path.
        spec: what the visual tokens are; its name is the cache's, or the caches' with + between them.
        grid: rows and columns of visual tokens.
        rope: whether the LLM learned with rotary positions in float32, or rounded to bfloat16 as in the reference.
    """

    connector: str
    dim_vision: int
    dim_llm: int
    prompt: str
    llm: str
    spec: TokenSpec
    grid: tuple[int, int]
    rope: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A model read from disk, in evaluation mode on the CPU in float32."""

    vlm: VLM
    prompt: Prompt
    card: ModelCard


def save_model(
    folder: Path, vlm: VLM, tokenizer: Any, card: ModelCard, *, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write a model folder.

    Args:
        weights: full state dict of `vlm` where its own parameters are sharded; None: take them from `vlm`.

    Raises:
        OutOfSpaceError: the disk is full; what was written is removed.
    """
    state = dict(vlm.state_dict() if weights is None else weights)
    with _whole_or_not(folder):
        _write_model(folder, vlm, tokenizer, card, state)


def _write_model(folder: Path, vlm: VLM, tokenizer: Any, card: ModelCard, state: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    connector = {
        key.removeprefix("connector."): value.contiguous()
        for key, value in state.items()
        if key.startswith("connector.")
    }
    save_file(connector, folder / "connector.safetensors")
    llm = {key.removeprefix("llm."): value for key, value in state.items() if key.startswith("llm.")}
    vlm.llm.generation_config.eos_token_id = sorted(vlm.eos_ids)  # so that whoever generates with it stops there
    with no_progress_bars():
        vlm.llm.save_pretrained(folder / "llm", state_dict=llm)
    tokenizer.save_pretrained(folder / "llm")
    write_json(folder / CARD, card_to_dict(card))


@contextmanager
def _whole_or_not(folder: Path) -> Iterator[None]:
    """What the block writes is removed when there is no room for all of it, so that at least a log has some."""
    try:
        yield
    except Exception as error:  # tokenizers raises nothing more special, and tells the system's error in words only
        told = re.search(r"\(os error (\d+)\)", str(error))
        cause: Exception = OSError(int(told[1]), os.strerror(int(told[1]))) if told else error
        if isinstance(cause, OSError):
            cause = space_error(cause, folder)
        if not isinstance(cause, OutOfSpaceError):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        raise OutOfSpaceError(
            f"no space left for the model in {folder}",
            why=f"{cause.why}; what was written of the model is removed",
            fix="free some space and give the same command again; a training goes on with --resume",
        ) from error


def card_to_dict(card: ModelCard) -> dict[str, Any]:
    """Plain data for JSON; `card_from_dict` reads it back."""
    return {**asdict(card), "spec": card.spec.to_dict()}


def card_from_dict(fields: Mapping[str, Any]) -> ModelCard:
    """A card from plain data."""
    return ModelCard(**{**fields, "spec": spec_from_dict(fields["spec"]), "grid": tuple(fields["grid"])})


def read_card(folder: Path) -> ModelCard:
    """The card of what `save_model` wrote.

    Raises:
        RunError: there is no whole model in the folder.
    """
    if not (folder / CARD).exists():
        raise RunError(
            f"there is no trained model in {folder}",
            why=f"it has no {CARD}, so the training did not finish",
            fix="finish it: vlmx train --resume --out RUN",
        )
    return card_from_dict(json.loads((folder / CARD).read_text()))


def load_model(folder: Path) -> SavedModel:
    """Read what `save_model` wrote.

    Raises:
        RunError: there is no whole model in the folder.
        WeightsError: its weights do not fit its card.
    """
    from safetensors.torch import load_file

    card = read_card(folder)
    llm, tokenizer = load_llm(str(folder / "llm"))
    connector = build_connector(card.connector, card.dim_vision, card.dim_llm)
    try:
        connector.load_state_dict(load_file(folder / "connector.safetensors"))
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"the connector in {folder} cannot be loaded",
            why=str(error).strip().splitlines()[-1].strip(),
            fix="train again, or restore the folder",
        ) from error
    if card.rope == "bf16":
        round_positions(llm)
    prompt = choose_prompt(card.prompt, tokenizer)
    vlm = VLM(connector, llm, visual_at=prompt.visual_at, eos_ids=prompt.end_ids)
    return SavedModel(vlm=vlm.eval(), prompt=prompt, card=card)
