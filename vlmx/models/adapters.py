"""How does an LLM learn through low-rank adapters (LoRA), and become a plain LLM again? On top of peft.

Adapters are put into the LLM itself, so that everything else sees the LLM it knows. Their start is a function of the
seed and their place, not of the number of processes. Source: LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from vlmx.errors import UsageError

BASE = ".base_layer"
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"


def add_adapters(llm: Any, *, r: int, alpha: float, dropout: float, targets: Sequence[str] | None) -> None:
    """Put an adapter beside linear layers of a Hugging Face LLM, and freeze all else of it; changes it in place.

    Call `start_adapters` when the weights have memory.

    Args:
        llm: the LLM, also on the meta device.
        r: rank.
        alpha: the adapter's output is multiplied by alpha / r.
        dropout: on the adapter's input.
        targets: last parts of the layers' names; None: all linear layers but the head.

    Raises:
        UsageError: no layer has one of these names.
    """
    from peft import LoraConfig, inject_adapter_in_model

    target_modules = "all-linear" if targets is None else list(targets)
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules)  # type: ignore[arg-type]  # alpha may be a fraction
    try:
        inject_adapter_in_model(config, llm)
    except ValueError as error:
        names = {name.rpartition(".")[2] for name, module in llm.named_modules() if isinstance(module, torch.nn.Linear)}
        raise UsageError(
            f"the adapters cannot be put into {', '.join(targets or ['the linear layers'])}",
            why=str(error).strip().splitlines()[0],
            fix=f"choose lora.targets among {', '.join(sorted(names))}",
        ) from error


def adapter_start(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """What an adapter's matrix is before training: uniform as PyTorch's linear layers, or zeros for the second one.

    Args:
        name: of the parameter; with `seed`, all that it depends on.
        shape: of the whole matrix, whatever part a process holds.
        seed: of the run.
    """
    if name.endswith(UP):
        return torch.zeros(*shape)
    generator = torch.Generator().manual_seed(crc32(f"{seed} {name}".encode()))  # it looks at 32 bits only
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.endswith((DOWN, UP))


def plain_name(name: str) -> str:
    """The name that a parameter has in the LLM without adapters."""
    return name.replace(BASE, "")


def merged(state: Mapping[str, Tensor], *, r: int, alpha: float) -> dict[str, Tensor]:
    """The state dict of the plain LLM that computes the same: each weight plus (alpha / r) B A.

    Args:
        state: whole tensors with any prefix; may have no adapters.
        r, alpha: of `add_adapters`.
    """
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if is_adapter(name):
            continue
        stem = name.removesuffix(f"{BASE}.weight")
        if stem != name and stem + DOWN in state:
            value = value + (alpha / r) * (state[stem + UP] @ state[stem + DOWN]).to(value.dtype)
        result[plain_name(name)] = value
    return result
