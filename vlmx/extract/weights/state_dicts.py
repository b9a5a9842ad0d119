"""Where in the content of a torch file or pickle is the state dict, and which of several is taken?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlmx.errors import WeightsError
from vlmx.extract.weights.pickles import StoredArray, StoredTensor
from vlmx.extract.weights.torch_files import Materialise

if TYPE_CHECKING:
    from torch import Tensor

Format = Literal["safetensors", "torch", "torch (before 1.6)", "pickle of arrays"]

# The entries that hold the state dict, in the order of preference; averaged weights only if there are no plain ones.
PLAIN_ENTRIES = ("state_dict", "model", "module", "model_state")
EMA_ENTRIES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was read.

    Attributes:
        state: all tensors by name, on the CPU, as stored.
        format: how they are stored.
        files: the files that were read; several for a sharded checkpoint.
        zip_member: the name inside the zip that they came in, or "".
        nested_under: the entry that held them, e.g. "state_dict", or "" if the file is the state dict itself.
        not_taken: other weights of the file, e.g. averages over the training, that were left out.
        not_tensors: names in the state dict whose values are no tensors; left out.
    """

    state: dict[str, Tensor]
    format: Format
    files: tuple[Path, ...]
    zip_member: str = ""
    nested_under: str = ""
    not_taken: tuple[str, ...] = ()
    not_tensors: tuple[str, ...] = ()


def checkpoint_of(path: Path, kind: Format, content: object, materialise: Materialise | None) -> Checkpoint:
    """Find the state dict in what a torch file or pickle holds, and make tensors of it."""
    entry, found = _state_dict_in(content)
    if found is None:
        entries = ", ".join(PLAIN_ENTRIES + EMA_ENTRIES)
        raise WeightsError(
            f"{path} holds no state dict",
            why=f"neither the file nor its entries {entries} are tensors by name",
            fix="give a checkpoint, not a pickled model or another kind of file",
        )
    not_taken = []
    if entry and isinstance(content, Mapping):
        not_taken = [name for name in EMA_ENTRIES if name != entry and name in content]
    # mmcv keeps averages in the same dict: "ema_" and the plain name with underscores for dots.
    averages = {f"ema_{str(name).replace('.', '_')}" for name in found} & set(map(str, found))
    if averages:
        not_taken.append(f"ema_* ({len(averages)} tensors)")
    to_tensor = _tensor_maker(path, materialise)
    state = {
        str(name): to_tensor(str(name), value)
        for name, value in found.items()
        if _is_tensor(value) and str(name) not in averages
    }
    return Checkpoint(
        state=state,
        format=kind,
        files=(path,),
        nested_under=entry,
        not_taken=tuple(not_taken),
        not_tensors=tuple(str(name) for name, value in found.items() if not _is_tensor(value)),
    )


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor | StoredTensor | StoredArray)


def _state_dict_in(content: object) -> tuple[str, Mapping[Any, object] | None]:
    """(entry, its tensors by name), (\"\", content) if it is the state dict itself, or (\"\", None)."""
    if not isinstance(content, Mapping):
        return "", None
    for entry in PLAIN_ENTRIES:
        if isinstance(value := content.get(entry), Mapping) and any(map(_is_tensor, value.values())):
            return entry, value
    if content and all(map(_is_tensor, content.values())):
        return "", content
    for entry in EMA_ENTRIES:
        if isinstance(value := content.get(entry), Mapping) and any(map(_is_tensor, value.values())):
            return entry, value
    return "", None


def _tensor_maker(path: Path, materialise: Materialise | None) -> Callable[[str, object], Tensor]:
    import torch

    def to_tensor(name: str, value: object) -> Tensor:
        if isinstance(value, StoredArray):
            if value.tensor is None:
                raise WeightsError(
                    f"{path} holds arrays that are no numbers", why=f"{name} is a NumPy array of type {value.type!r}"
                )
            return value.tensor
        if isinstance(value, StoredTensor):
            assert materialise is not None
            return materialise(value)
        assert isinstance(value, torch.Tensor)
        tensor = value.detach()
        # Views that repeat elements would let a small file ask for any amount of memory.
        plain = tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
        if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise WeightsError(
                f"{path} holds a tensor of an unusual kind",
                why=f"{name} is sparse, quantised, repeated or without values",
                fix="save it as an ordinary tensor",
            )
        return tensor

    return to_tensor
