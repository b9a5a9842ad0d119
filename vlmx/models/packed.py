"""How do the rows of a batch share one row without seeing each other? Attention that knows where each of them ends.

Rows of different length are put one after the other instead of being padded, so that nothing is computed for nothing.
Positions start again at each row, and attention is done within it: by PyTorch's variable-length kernel on CUDA in half
precision, elsewhere row by row. Both are exact: no row has any influence on another.

The function of this file is registered with transformers as an attention implementation. Calls without `packed_rows`
(answering, padded batches) it hands on to transformers' own scaled_dot_product_attention.

Shapes: P positions of all rows, B rows, H heads, K heads of keys and values, C channels of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmx.models.llm import has_sliding_window

ATTENTION = "vlmx_packed"
MOST_CHANNELS = 256  # of a head, in the kernel
CHANNELS_OF = 8  # their number is a multiple of this, in the kernel
CAPABILITY = (8, 0)  # of the GPU: Ampere
TRIED_LENGTHS, TRIED_HEADS, TRIED_CHANNELS = (5, 1, 18, 130), (4, 2, 2), 64
TRIED_TOLERANCE = 0.05  # of the norm; bfloat16 differs from float32 by 0.004 there
FAMILIES = frozenset(
    {"apertus", "cohere", "ernie4_5", "gemma", "glm", "glm4", "gpt2", "gpt_neox", "granite", "helium", "llama"}
    | {"mistral", "mixtral", "olmo", "olmo2", "olmoe", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"}
    | {"seed_oss", "smollm3", "starcoder2"}
)
"""LLMs (`model_type` of their configuration) with which packed rows are tested to be what each row alone is. Others may
mix tokens elsewhere than in attention, or not hand arguments on to it.
"""


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Where the rows are in the one that they share.

    Attributes:
        lengths: of each row, in order, at least 1.
        bounds: where each starts, and where the last one ends, int32 [B + 1], where the LLM computes.
    """

    lengths: tuple[int, ...]
    bounds: Tensor

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> PackedRows:
        """Rows of these lengths."""
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(lengths=lengths, bounds=bounds.to(device, non_blocking=True))

    def arguments(self, position_BT: Tensor) -> dict[str, Any]:
        """What an LLM with packed attention gets beside the embeddings.

        The mask of no size is one that every attention but ours fails on, so that none can mix rows unnoticed; and with
        it transformers does not look for packed rows itself, which would wait for the GPU.
        """
        nothing = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=position_BT.device)
        return {"position_ids": position_BT, "attention_mask": nothing, "packed_rows": self}


def why_not(llm_config: Any) -> str | None:
    """Why the rows of an LLM cannot be packed; None if they can."""
    if llm_config.model_type not in FAMILIES:
        return f"packed rows are not tested with LLMs of the family {llm_config.model_type}"
    if has_sliding_window(llm_config):
        return "its layers attend within a sliding window"
    return None


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether the variable-length kernel is there for half precision, and right: it is tried on small tensors beside
    attention row by row.
    """
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= CAPABILITY
        and _kernel_is_new()
        and is_right(attend_by_kernel, device, torch.bfloat16)
    )


def is_right(
    attention: Callable[[Tensor, Tensor, Tensor, PackedRows, float | None], Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    """Whether an attention of packed rows runs here, and it and its gradients are those of attention row by row."""
    rows = PackedRows.of(TRIED_LENGTHS, device)
    random = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(TRIED_LENGTHS), TRIED_CHANNELS) for heads in TRIED_HEADS]
    given = [torch.randn(shape, generator=random).to(device, dtype).requires_grad_() for shape in shapes]
    query_BHPC, key_BKPC, value_BKPC = given
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            output = attention(query_BHPC, key_BKPC, value_BKPC, rows, None)
            gradients = torch.autograd.grad(output.square().sum(), given)
            expected = attend_by_row(query_BHPC, key_BKPC, value_BKPC, rows, None)
            expected_gradients = torch.autograd.grad(expected.square().sum(), given)
    except RuntimeError:  # this build of PyTorch has no such kernel for this device
        return False
    pairs = zip((output.detach(), *gradients), (expected.detach(), *expected_gradients), strict=True)
    return all(float((one - other).norm()) <= TRIED_TOLERANCE * float(other.norm()) for one, other in pairs)


def pack_attention(llm: Any) -> None:
    """Have an LLM's attention understand packed rows; changes it in place."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    llm.set_attn_implementation(ATTENTION)


def attend(
    module: nn.Module,
    query_BHPC: Tensor,
    key_BKPC: Tensor,
    value_BKPC: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_rows: PackedRows | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, [B, P, H, C]; of packed rows B is 1."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain: Callable[..., tuple[Tensor, None]] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if packed_rows is None:
        assert attention_mask is None or attention_mask.numel(), "an LLM does not hand packed_rows on to its attention"
        options = {"dropout": dropout, "scaling": scaling, **rest}
        return plain(module, query_BHPC, key_BKPC, value_BKPC, attention_mask, **options)
    dtype = _computed_in(value_BKPC)
    if dropout == 0 and fits_kernel(query_BHPC, value_BKPC, dtype):
        # under autocast rotary positions leave queries and keys in float32
        query_BHPC, key_BKPC = query_BHPC.to(dtype), key_BKPC.to(dtype)
        return attend_by_kernel(query_BHPC, key_BKPC, value_BKPC.to(dtype), packed_rows, scaling), None
    return attend_by_row(query_BHPC, key_BKPC, value_BKPC, packed_rows, scaling, dropout), None


def fits_kernel(query_BHPC: Tensor, value_BKPC: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel is there, and takes these in this dtype."""
    channels = query_BHPC.shape[-1]
    return (
        dtype in (torch.bfloat16, torch.float16)
        and channels == value_BKPC.shape[-1] <= MOST_CHANNELS
        and channels % CHANNELS_OF == 0
        and has_kernel(query_BHPC.device)
    )


def attend_by_row(
    query_BHPC: Tensor,
    key_BKPC: Tensor,
    value_BKPC: Tensor,
    packed_rows: PackedRows,
    scaling: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention within each row, [1, P, H, C], one after the other."""
    parts = zip(*(x.split(packed_rows.lengths, dim=2) for x in (query_BHPC, key_BKPC, value_BKPC)), strict=True)
    options: dict[str, Any] = {"dropout_p": dropout, "is_causal": True, "scale": scaling, "enable_gqa": True}
    outputs = [F.scaled_dot_product_attention(*part, **options) for part in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def attend_by_kernel(
    query_BHPC: Tensor, key_BKPC: Tensor, value_BKPC: Tensor, packed_rows: PackedRows, scaling: float | None
) -> Tensor:
    """Causal attention within each row, [1, P, H, C], by PyTorch's variable-length kernel; in half precision."""
    from torch.nn.attention.varlen import varlen_attn

    query_PHC, key_PKC, value_PKC = (x[0].transpose(0, 1) for x in (query_BHPC, key_BKPC, value_BKPC))
    bounds, longest = packed_rows.bounds, max(packed_rows.lengths)
    output: Tensor = varlen_attn(  # type: ignore[assignment]  # a tuple only when more is asked for
        query_PHC,
        key_PKC,
        value_PKC,
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=True,
    )
    return output[None]


def _computed_in(value: Tensor) -> torch.dtype:
    kind = value.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype


@cache
def _kernel_is_new() -> bool:
    """Whether PyTorch's kernel knows fewer heads of keys than of queries, as it does since 2.12."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
