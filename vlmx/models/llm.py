"""Where does the LLM come from? The embedded mini LM, a local Hugging Face folder, or a hub id."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from vlmx.errors import WeightsError
from vlmx.models.llm_files import MINI, MINI_FOLDER, checked_source


def is_mini(name_or_path: str) -> bool:
    """Whether this names the embedded mini LM."""
    return name_or_path == MINI or Path(name_or_path).resolve() == MINI_FOLDER


def load_llm(name_or_path: str) -> tuple[Any, Any]:
    """Load a causal LM in float32 and its tokenizer.

    Attention is transformers' own choice: PyTorch's scaled_dot_product_attention wherever the LLM supports it.

    Args:
        name_or_path: "mini", a folder that `save_pretrained` made, or a model id of the Hugging Face hub.

    Returns:
        (model, tokenizer), a `PreTrainedModel` with a language-model head and a fast tokenizer.

    Raises:
        WeightsError: the folder or id does not exist, or lacks weights, or the weights are damaged or do not fill the
            model, or the tokenizer is that of another one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = checked_source(name_or_path)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
        with no_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except load_errors() as error:
        raise unloadable(name_or_path, error) from error
    model, report = loaded
    shapes = sorted(
        f"{n} is {[*there]} there, {[*here]} by its config.json" for n, there, here in report["mismatched_keys"]
    )
    wrong = sorted(report["missing_keys"]) + shapes
    if wrong:
        raise WeightsError(
            f"the weights of the LLM '{name_or_path}' do not fill its model",
            why=f"{len(wrong)} tensors are missing or of another shape, e.g. {', '.join(wrong[:3])}",
            fix="download the folder again, or correct its config.json",
        )
    require_rows(model, tokenizer, name_or_path)
    return model, tokenizer


def load_errors() -> tuple[type[Exception], ...]:
    """What transformers raises for a folder that it cannot load, depending on what is wrong with it."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return (OSError, ValueError, RuntimeError, EOFError, UnpicklingError, SafetensorError, StrictDataclassError)


def require_rows(llm: Any, tokenizer: Any, name_or_path: str) -> None:
    """Make sure that every token has an embedding.

    Raises:
        WeightsError: some have none.
    """
    rows = llm.get_input_embeddings().num_embeddings
    beyond = [token for token, number in tokenizer.get_vocab().items() if number >= rows]
    if beyond:
        raise WeightsError(
            f"the tokenizer of the LLM '{name_or_path}' does not fit its weights",
            why=f"there are {rows:,} embeddings, and none for {len(beyond):,} tokens, e.g. {sorted(beyond)[0]!r}",
            fix="take the tokenizer that belongs to the weights; or add rows with"
            " llm.resize_token_embeddings(len(tokenizer)), and save both",
        )


def unloadable(name_or_path: str, error: Exception) -> WeightsError:
    """What to tell the user when transformers cannot load an LLM."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    why = " ".join(line.strip() for line in (lines[:2] if lines[0].endswith((":", ": ")) else lines[:1]))
    if isinstance(error, UnpicklingError):
        why = "its .bin files are damaged, or hold something else than tensors"
    return WeightsError(
        f"the LLM '{name_or_path}' cannot be loaded",
        why=why,
        fix="give a local folder with config.json, weights and tokenizer, or 'mini'"
        + (" (HF_HUB_OFFLINE is set: hub ids work only from the hub's cache)" if _offline() else ""),
    )


def has_sliding_window(config: Any) -> bool:
    """Whether some layers see only the last few positions, which a mask of isolated turns would override."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any("full" not in kind for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


def isolation_problem(llm: Any) -> str:
    """Why turns of a conversation cannot be hidden from each other in this LLM; empty if they can.

    It must take a mask of any form, and positions, which start again in every turn.
    """
    config = llm.config.get_text_config()
    if has_sliding_window(config):
        return "not all of its layers attend to all that came before (a sliding window, a state), as such a mask needs"
    if "position_ids" not in inspect.signature(llm.forward).parameters or getattr(config, "alibi", False):
        return "positions cannot be given to it: it counts them by itself (ALiBi), or has none"
    return ""


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing its own bars between ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def has_rotary_positions(config: Any) -> bool:
    """Whether positions beyond the LLM's context are computable at all (rotary) rather than rows of a table."""
    return any(getattr(config, key, None) is not None for key in ("rope_parameters", "rope_theta", "rope_scaling"))


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
