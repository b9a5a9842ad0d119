"""What were rotary positions like in the reference's library? Rounded: phases in bfloat16, for LLMs trained that way.

transformers 4.38.1, with which the reference was tested, multiplied positions and frequencies under autocast. In
bfloat16 neighbouring positions share a phase, the more of them the further they are from the start: of 64 positions
after the 2,048th only 5 are distinct (transformers, pull request 29285).

Shapes: B rows, T positions, F frequencies (half a head's width).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmx.errors import UsageError


def round_positions(llm: nn.Module) -> None:
    """Have every rotary module of an LLM compute its phases in bfloat16; changes it in place.

    Raises:
        UsageError: the LLM has no rotary positions of the plain kind, of which this rounding is known.
    """
    modules = [module for module in llm.modules() if hasattr(module, "inv_freq")]
    if not modules or not all(_is_plain(module) for module in modules):
        raise UsageError(
            "rope=bf16 does not work with this LLM",
            why="its positions are not rotary, or are scaled in a way of their own",
            fix="set rope=fp32",
        )
    for module in modules:
        module.register_forward_hook(_rounded, with_kwargs=True)


def _is_plain(module: Any) -> bool:
    """Whether a module gives cosine and sine of positions times frequencies, both halves of a head alike."""
    positions_BT = torch.tensor([[0, 1, 7]], device=module.inv_freq.device)
    given = module(torch.zeros(1, device=module.inv_freq.device), positions_BT)
    expected = _turns(module, positions_BT, torch.float32)
    return all(a.shape == b.shape and torch.allclose(a, b) for a, b in zip(given, expected, strict=True))


def _rounded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> tuple[Tensor, Tensor]:
    positions_BT = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    cos, sin = _turns(module, positions_BT, torch.bfloat16)
    return cos.to(output[0].dtype), sin.to(output[0].dtype)


@torch.no_grad()
def _turns(module: Any, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    phases_BTF = positions_BT[..., None].to(dtype) * module.inv_freq.to(dtype)
    both_halves = torch.cat((phases_BTF, phases_BTF), dim=-1)
    return both_halves.cos() * module.attention_scaling, both_halves.sin() * module.attention_scaling
