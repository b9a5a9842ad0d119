"""How does an LLM come into memory in parts, so that no process ever holds all of it?

The model is made without memory (on the meta device), divided, given memory, and each process reads its own rows of
each tensor from the safetensors files. What is in no file, such as the frequencies of rotary positions, is lost on the
meta device and computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmx.errors import WeightsError
from vlmx.models.adapters import is_adapter, plain_name
from vlmx.models.llm import load_errors, require_rows, unloadable
from vlmx.models.llm_files import INDEX, WHOLE, checked_source, tensors_index


def llm_without_weights(name_or_path: str) -> tuple[Any, Any]:
    """A causal LM in float32 on the meta device, and its tokenizer; see `load_llm`.

    Raises:
        WeightsError: the folder or id does not exist, or lacks weights, or files of it are damaged.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = checked_source(name_or_path)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            llm: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except load_errors() as error:
        raise unloadable(name_or_path, error) from error
    require_rows(llm, tokenizer, name_or_path)
    if (Path(source) / "generation_config.json").exists():
        llm.generation_config = GenerationConfig.from_pretrained(source)
    return llm, tokenizer


def restore_buffers(llm: Any) -> None:
    """Compute the buffers again that no file holds. Call it when they have memory, before weights are read."""
    for module in llm.modules():
        if module._non_persistent_buffers_set:
            llm._init_weights(module)  # as transformers itself does: its loading starts on the meta device, too


def weight_files(name_or_path: str, llm: Any) -> Mapping[str, Path] | None:
    """Name of each tensor of an LLM -> the safetensors file that it is in under this name.

    None if the LLM is not a folder of such files, or if names in it are not those of the model, so that only
    transformers knows how to load it.
    """
    from safetensors import safe_open

    folder = Path(checked_source(name_or_path))
    if (folder / WHOLE).exists():
        with safe_open(folder / WHOLE, framework="pt") as opened:
            files = dict.fromkeys(opened.keys(), folder / WHOLE)
    elif (folder / INDEX).exists():
        files = {name: folder / file for name, file in tensors_index(folder, INDEX).items()}
    else:
        return None
    tied = llm.all_tied_weights_keys
    state = {plain_name(name): value for name, value in llm.state_dict().items() if not is_adapter(name)}
    absent = {name for name in state if name not in files}
    return None if any(tied.get(name) not in files for name in absent) else files


def read_own_rows(llm: Any, files: Mapping[str, Path]) -> None:
    """Fill an LLM's weights, or this process's parts of them, but not those of adapters; changes it in place.

    Args:
        llm: its parameters are tensors, or DTensors divided by rows.
        files: of `weight_files`.

    Raises:
        WeightsError: a tensor has another shape than its configuration says.
    """
    from safetensors import safe_open

    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for full_name, target in llm.state_dict().items():
            name = plain_name(full_name)
            if is_adapter(full_name) or name not in files:
                continue  # one that is tied to another tensor has no rows of its own
            path = files[name]
            if path not in opened:
                opened[path] = stack.enter_context(safe_open(path, framework="pt"))
            rows = opened[path].get_slice(name)
            if list(target.shape) != rows.get_shape():
                raise WeightsError(
                    f"the weights in {path.parent} do not fill their model",
                    why=f"{name} is {rows.get_shape()} there, {list(target.shape)} by its config.json",
                    fix="download the folder again, or correct its config.json",
                )
            fill_rows(target, rows)


class Rows(Protocol):
    """A tensor, or a part of a file that gives one."""

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@torch.no_grad()
def fill_rows(target: Tensor, rows: Rows) -> None:
    """Copy into a tensor, or into this process's part of one that is divided by rows as FSDP2 does it.

    Args:
        target: what is filled.
        rows: all rows, in any dtype and on any device; only those that are needed are read.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(target, DTensor):
        target.copy_(rows[: len(target)])
        return
    local = target.to_local()
    most = -(-target.shape[0] // target.device_mesh.size())
    first = min(target.device_mesh.get_local_rank() * most, target.shape[0])
    if len(local):
        local.copy_(rows[first : first + len(local)])
