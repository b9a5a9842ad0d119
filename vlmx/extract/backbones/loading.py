"""How is a family's network made from a catalogue row, and how do published tensors get into it?

Building: the family's module is imported by name; parameters that a checkpoint is going to overwrite are not filled
with random numbers first. Loading: after the family's explicit renames and drops everything must fit, and every problem
is named.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlmx.errors import UsageError, WeightsError
from vlmx.extract.backbones.row import BackboneRow

if TYPE_CHECKING:
    from vlmx.extract.backbones.base import FamilyNet

_LOADABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_COUNTER = "num_batches_tracked"  # batch norm's; nothing reads it in eval mode, and files need not have it


def build_net(
    row: BackboneRow, res: tuple[int, int], options: Mapping[str, object], *, device: str = "cpu", fill: bool = True
) -> FamilyNet:
    """The network of a row for images of `res` = (height, width), in float32.

    Args:
        options: keyword arguments of the family's `build`.
        device: "cpu", or "meta" for shapes alone.
        fill: whether parameters get random values; if not, they hold whatever was in memory.

    Raises:
        UsageError: the family does not have such an option, or such a choice of it.
    """
    module, _, function = row.builder.partition(":")
    build: Callable[..., FamilyNet] = getattr(importlib.import_module(module), function)
    known = [p.name for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(set(options) - set(known)):
        raise UsageError(
            f"{row.name} has no option {', '.join(repr(option) for option in unknown)}",
            fix=f"options of {row.family}: {', '.join(known)}" if known else f"{row.family} has no options",
        )
    with _float32(), torch.device(device):
        if fill:
            return build(row, res, **options)
        with _NoRandomFill():
            return build(row, res, **options)


@contextmanager
def _float32() -> Iterator[None]:
    """Build in float32, whatever the caller's default dtype is."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


class _NoRandomFill(TorchFunctionMode):
    """Leaves out what fills tensors with random numbers: half of the time that building a large network takes."""

    _FILLS = (Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, nn.init.trunc_normal_)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return args[0] if func in self._FILLS and args else func(*args, **(kwargs or {}))


def fit_problems(row: BackboneRow, state: Mapping[str, Tensor], *, shown: int | None = 4) -> list[str]:
    """Why a published state dict does not fit a backbone, by names and shapes alone; empty if it fits.

    Args:
        row: the backbone; it is built on the meta device, with its family's default options.
        state: published key names, with or without the published prefix; values are not looked at.
        shown: how many keys of each kind of problem are named; None for all.
    """
    net = build_net(row, row.native_res, {}, device="meta")
    try:
        own = net.adapt_state_dict({name: tensor.to("meta") for name, tensor in state.items()})
    except WeightsError as error:
        return [error.what + (f" ({error.why})" if error.why else "")]
    return _described(_problems(net, own), shown)


def load_strictly(net: FamilyNet, state: dict[str, Tensor], *, row: BackboneRow, source: str) -> None:
    """Load a published state dict: all keys, right shapes, finite numbers.

    Raises:
        WeightsError: something does not fit; it names the keys, and the backbones that would take the weights.
    """
    own = net.adapt_state_dict(state)
    problems = {**_problems(net, own), **_unusable(net, own)}
    if not problems:
        expected = net.state_dict()
        counters = {key: expected[key] for key in expected if key.endswith(_COUNTER) and key not in own}
        net.load_state_dict({**own, **counters}, strict=True)
        return
    published = f"'{row.file}'" + (f" from {row.url}" if row.url else " that ships with vlmx")
    if set(problems) == {_NOT_FINITE}:
        raise WeightsError(
            f"the weights ({source}) are damaged",
            why="; ".join(_described(problems, 4)),
            fix=f"get {published} again; if it is as published, tell its publisher",
        )
    raise WeightsError(
        f"the weights ({source}) do not fit {row.name}",
        why="; ".join([*_what_they_are(state, row), *_described(problems, 4)]),
        fix=f"give the file {published}",
    )


def check_overflow(net: nn.Module, name: str) -> None:
    """Make sure that no parameter became infinite when it was cast.

    Raises:
        WeightsError: one did.
    """
    lost = [key for key, value in net.named_parameters() if not _is_finite(value)]
    if lost:
        raise WeightsError(
            f"weights of {name} do not fit into float16",
            why=f"{len(lost)} tensors have values beyond 65504: {', '.join(lost[:4])}",
            fix="use dtype bfloat16 or float32",
        )


Problems = dict[tuple[str, str], list[str]]  # (of one key, of several) -> keys
_NOT_FINITE = ("tensor holds NaN or infinity", "tensors hold NaN or infinity")


def _problems(net: FamilyNet, own: Mapping[str, Tensor]) -> Problems:
    """What does not fit by name and shape, in published names."""
    expected = net.state_dict()
    told = net.published_name
    found: Problems = {
        ("key is missing", "keys are missing"): [
            told(key) for key in expected if key not in own and not key.endswith(_COUNTER)
        ],
        ("key is unexpected", "keys are unexpected"): [told(key) for key in own if key not in expected],
        ("shape differs", "shapes differ"): [
            f"{told(key)} is {tuple(own[key].shape)}, needed {tuple(value.shape)}"
            for key, value in expected.items()
            if key in own and own[key].shape != value.shape
        ],
    }
    return {what: keys for what, keys in found.items() if keys}


def _unusable(net: FamilyNet, own: Mapping[str, Tensor]) -> Problems:
    """Tensors whose values cannot be weights."""
    floats = {key: own[key] for key, value in net.state_dict().items() if key in own and value.is_floating_point()}
    strange = [key for key, value in floats.items() if value.dtype not in _LOADABLE]
    found: Problems = {
        ("tensor is not of floating point", "tensors are not of floating point"): [
            f"{net.published_name(key)} is {floats[key].dtype}" for key in strange
        ],
        _NOT_FINITE: [
            net.published_name(key) for key, value in floats.items() if key not in strange and not _is_finite(value)
        ],
    }
    return {what: keys for what, keys in found.items() if keys}


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are; least and greatest tell, since NaN is both, and take no memory."""
    if tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _described(problems: Problems, shown: int | None) -> list[str]:
    return [
        f"{len(keys)} {one if len(keys) == 1 else several}: {', '.join(keys[:shown])}"
        + (", ..." if len(keys) > len(keys[:shown]) else "")
        for (one, several), keys in problems.items()
    ]


def _what_they_are(state: Mapping[str, Tensor], row: BackboneRow) -> list[str]:
    """Which other backbones would take the weights, if any would; else the family with the most similar names."""
    from vlmx.extract.weights.identify import identify

    found = identify(state)
    if row.name in found.names:  # they lack only what an option asks for
        return []
    if found.names:
        return [f"they are the weights of {' or '.join(found.names)}"]
    return [f"by its names it is of the family '{found.nearest}'"] if found.nearest else []
