"""Does a training pack its rows, and if not, why?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlmx.errors import UsageError
from vlmx.models.packed import has_kernel, why_not
from vlmx.train.settings import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Whether rows are packed, and what the user is told of it."""

    on: bool
    text: str


def choose_packing(config: TrainConfig, llm_config: Any, device: torch.device) -> Packing:
    """What `packed` comes to with this LLM on this device.

    Raises:
        UsageError: rows are to be packed and cannot be.
    """
    if config.packed is False or (config.packed == "auto" and device.type == "cpu"):
        return Packing(on=False, text="rows padded")
    problem = "isolated turns need a mask" if config.turns == "isolated" else why_not(llm_config)
    if config.packed is True:
        if problem is not None:
            raise UsageError(
                f"packed=true does not work with the LLM '{config.llm}' and turns={config.turns}",
                why=problem,
                fix="set packed=auto or packed=false",
            )
        slow = _why_slow(config, llm_config, device)
        return Packing(on=True, text="rows packed" + (f" (attention row by row: {slow})" if slow else ""))
    problem = problem or _why_slow(config, llm_config, device)
    if problem is not None:
        return Packing(on=False, text=f"rows padded (not packed: {problem})")
    return Packing(on=True, text="rows packed")


def _why_slow(config: TrainConfig, llm_config: Any, device: torch.device) -> str | None:
    """Why attention of packed rows does not run in the kernel; None if it does."""
    if config.precision != "bf16":
        return "there is no fast kernel for precision=fp32"
    if any(getattr(llm_config, key, 0) for key in ("attention_dropout", "attn_pdrop")):
        return "the fast kernel has no dropout of attention"
    return None if has_kernel(device) else "there is no fast kernel here"
