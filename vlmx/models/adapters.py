"""How does an LLM learn through low-rank adapters (LoRA), and become a plain LLM again? On top of peft.

Adapters are put into the LLM itself, so that everything else sees the LLM it knows. Their start is a function of the
seed and their place, not of the number of processes. Source: LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from vlmx.errors import UsageError

BASE = ".base_layer"
RECOMPUTED = "_checkpoint_wrapped_module."  # part of the names of layers that are computed again
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"


def add_adapters(llm: Any, *, r: int, alpha: float, dropout: float, targets: Sequence[str] | None) -> list[str]:
    """Put an adapter beside linear layers of a Hugging Face LLM, and freeze all else of it; changes it in place.

    Their values are PyTorch's; `adapter_start` gives those of a run. Only layers get one that `merged` can add it to:
    linear ones and GPT-2's transposed ones, not experts that are slices of one tensor.

    Args:
        llm: the LLM, also on the meta device.
        r: rank.
        alpha: the adapter's output is multiplied by alpha / r.
        dropout: on the adapter's input.
        targets: last parts of the layers' names; None: all linear layers but the head.

    Returns:
        Names of the matrices inside layers that have no adapter although all layers were asked for, each kind once.

    Raises:
        UsageError: a name is that of no layer, or of one that cannot have an adapter.
    """
    from peft import LoraConfig, inject_adapter_in_model

    head = llm.get_output_embeddings()
    names = _linear_names(llm)  # before peft puts its own modules there
    if targets is None:
        chosen = {name: module for name, module in llm.named_modules() if _is_linear(module) and module is not head}
    else:
        chosen = _named_layers(llm, targets)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # it may be a fraction
        lora_dropout=dropout,
        target_modules=list(chosen),
        fan_in_fan_out=bool(chosen) and all(_is_transposed(module) for module in chosen.values()),
    )
    left = [] if targets is not None else _matrices_outside(llm, {*map(id, chosen.values()), id(head)})
    try:
        inject_adapter_in_model(config, llm)
    except ValueError as error:  # for instance parts of a state-space model, which peft does not take
        why = str(error).strip().splitlines()[0]
        raise _refused([name for name in names if f"'{name}'" not in why], targets, why) from error
    return left


def _named_layers(llm: Any, targets: Sequence[str]) -> dict[str, torch.nn.Module]:
    """The layers that are meant, by their full names."""
    modules = dict(llm.named_modules())
    head, embedding = llm.get_output_embeddings(), llm.get_input_embeddings()
    chosen: dict[str, torch.nn.Module] = {}
    problems = []
    for target in targets:
        found = {name: module for name, module in modules.items() if name == target or name.endswith(f".{target}")}
        if not found:
            problems.append(f"no layer is named {target}")
        elif not all(map(_is_linear, found.values())):
            kind = next(type(module).__name__ for module in found.values() if not _is_linear(module))
            problems.append(f"{target} is no linear layer but {kind}, into which an adapter could not be merged")
        elif head in found.values() and head.weight is embedding.weight:
            problems.append(f"{target} shares its weights with the embedding")
        chosen |= found
    if problems:
        raise _refused(_linear_names(llm), targets, "; ".join(problems))
    return chosen


def _linear_names(llm: Any) -> list[str]:
    """Last parts of the names of all linear layers but the head, sorted."""
    head = llm.get_output_embeddings()
    layers = {name for name, module in llm.named_modules() if _is_linear(module) and module is not head}
    return sorted({name.rpartition(".")[2] for name in layers})


def _refused(names: Sequence[str], targets: Sequence[str] | None, why: str) -> UsageError:
    """The error; `names` are those of layers that can have an adapter."""
    return UsageError(
        f"the adapters cannot be put into {', '.join(targets or ['the linear layers'])}",
        why=why,
        fix=f"choose lora.targets among {', '.join(names)}",
    )


def _matrices_outside(llm: Any, covered: set[int]) -> list[str]:
    """Last two parts of the names of parameters with two or more dimensions in other modules than these (by `id`)."""
    names = [
        f"{path.rpartition('.')[2]}.{name}"
        for path, module in llm.named_modules()
        if id(module) not in covered and not isinstance(module, torch.nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2 and not name.endswith("bias")
    ]
    return list(dict.fromkeys(names))


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or _is_transposed(module)


def _is_transposed(module: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def transposed_layers(model: torch.nn.Module) -> frozenset[str]:
    """Plain names of the layers whose weight is [in, out] instead of [out, in], as GPT-2's are."""
    names = (name for name, module in model.named_modules() if _is_transposed(module))
    return frozenset(plain_name(name).replace(RECOMPUTED, "") for name in names)


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


def merged(state: Mapping[str, Tensor], *, r: int, alpha: float, transposed: Collection[str] = ()) -> dict[str, Tensor]:
    """The state dict of the plain LLM that computes the same: each weight plus (alpha / r) B A.

    Args:
        state: whole tensors with any prefix; may have no adapters.
        r, alpha: of `add_adapters`.
        transposed: of `transposed_layers`, with the same prefix.
    """
    result: dict[str, Tensor] = {}
    left = {name for name in state if is_adapter(name)}
    for name, value in state.items():
        if is_adapter(name):
            continue
        stem = name.removesuffix(f"{BASE}.weight")
        if stem != name and stem + DOWN in state:
            added = (alpha / r) * (state[stem + UP] @ state[stem + DOWN])
            value = value + (added.T if stem in transposed else added).to(value.dtype)
            left -= {stem + UP, stem + DOWN}
        result[plain_name(name)] = value
    assert not left, f"adapters without a layer: {sorted(left)[:3]}"
    return result
