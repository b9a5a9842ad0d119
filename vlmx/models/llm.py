"""Where does the LLM come from? The embedded mini LM, a local Hugging Face folder, or a hub id."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vlmx.errors import WeightsError

MINI = "mini"
MINI_FOLDER = Path(__file__).parent.parent / "data" / "mini" / "lm"


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
        WeightsError: the folder or id does not exist, or lacks weights, or the weights do not fill the model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = checked_source(name_or_path)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
        with no_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise unloadable(name_or_path, error) from error
    model, report = loaded
    wrong = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if wrong:
        raise WeightsError(
            f"the weights of the LLM '{name_or_path}' do not fill its model",
            why=f"{len(wrong)} tensors are missing or of another shape, e.g. {', '.join(wrong[:3])}",
            fix="download the folder again, or correct its config.json",
        )
    return model, tokenizer


def unloadable(name_or_path: str, error: Exception) -> WeightsError:
    """What to tell the user when transformers cannot load an LLM."""
    return WeightsError(
        f"the LLM '{name_or_path}' cannot be loaded",
        why=str(error).strip().splitlines()[0],
        fix="give a local folder with config.json, weights and tokenizer, or 'mini'"
        + (" (HF_HUB_OFFLINE is set: hub ids work only from the hub's cache)" if _offline() else ""),
    )


def has_sliding_window(config: Any) -> bool:
    """Whether some layers see only the last few positions, which a mask of isolated turns would override."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any("full" not in kind for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


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


def checked_source(name_or_path: str) -> str:
    """The folder or hub id to load, after the checks whose failure transformers reports in many ways.

    Raises:
        WeightsError: there is no such folder, or it is not that of an LLM with weights.
    """
    folder = MINI_FOLDER if name_or_path == MINI else Path(name_or_path).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
            raise WeightsError(
                f"there is no LLM folder {name_or_path}", fix="check the path, or give 'mini' or a hub id"
            )
        return name_or_path
    if not (folder / "config.json").exists():
        raise WeightsError(
            f"{folder} is not an LLM folder",
            why="it has no config.json",
            fix="give a folder that save_pretrained made",
        )
    if not any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", "pytorch_model*.bin")):
        raise WeightsError(
            f"the LLM folder {folder} has no weights",
            why="there is neither *.safetensors nor pytorch_model*.bin in it",
            fix="download the weights into it; the configuration alone is not enough",
        )
    return str(folder)
