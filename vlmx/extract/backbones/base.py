"""What is a backbone to the rest of vlmx: a frozen network that turns images into a grid of tokens.

Legend: B images, C channels (3), H x W pixels, N tokens (row-major over the grid), D token width.

A family module (vmamba.py, timm_models.py, ...) provides one function

    def build(row: BackboneRow, res: tuple[int, int], *, some_option: str | None = None) -> FamilyNet

whose keyword-only parameters are the options of that family. It builds only what the tokens need, and raises a
UsageError before any work when the network cannot take images of size `res`. Everything else (weights, strict loading,
freezing, dtype, device) happens here. Families with a selective scan share `selective_scan` of
`vlmx.extract.ops.selective_scan`, which takes channels before length: (B, D, L).
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vlmx.errors import UsageError, WeightsError
from vlmx.extract import weights as weight_files
from vlmx.extract.backbones.catalogue import BackboneRow
from vlmx.extract.backbones.catalogue import row as catalogue_row


class FamilyNet(nn.Module, ABC):
    """Base of what a family's `build` returns. A subclass sets the attributes and implements the two methods.

    Attributes:
        grid: (rows, columns) of the tokens.
        dim: token width.
        feature: where the tokens are taken, e.g. "stage3" or "blocks.10".
        out_norm: what is applied to them there, e.g. "none" or "trained".
        forward_version: raised whenever a change of the code changes the tokens of the same weights.
    """

    grid: tuple[int, int]
    dim: int
    feature: str
    out_norm: str
    forward_version: int

    @abstractmethod
    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Map a checkpoint (published key names, with or without their published prefix) to the names of this module.

        Only explicit renames, reshapes and drops: a key that is not known stays, so that the strict load refuses it.

        Raises:
            WeightsError: the checkpoint is recognised as another variant; the message names which.
        """

    @abstractmethod
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Tokens (B, N, D) of normalised RGB images (B, 3, H, W), row-major over `grid`."""


class Backbone(nn.Module):
    """A frozen encoder. It is always in eval mode, whatever the caller does, and computes no gradients.

    Attributes:
        name, row: the catalogue entry.
        res: (height, width) in pixels of the images it takes.
        grid, dim, num_tokens, feature, out_norm, forward_version: see `FamilyNet`; num_tokens = rows * columns.
        mean, std: normalisation of RGB values in 0..1 that the images must have had.
        weights_sha256: SHA-256 (hex) of the weights file, or of the named tensors of a state dict; "random:SEED".
        weights_source: "file PATH", "state dict" or "random seed SEED".
    """

    def __init__(
        self, net: FamilyNet, *, row: BackboneRow, res: tuple[int, int], weights_sha256: str, weights_source: str
    ) -> None:
        super().__init__()
        self.net = net
        self.name = row.name
        self.row = row
        self.res = res
        self.grid = net.grid
        self.dim = net.dim
        self.num_tokens = net.grid[0] * net.grid[1]
        self.mean = row.mean
        self.std = row.std
        self.feature = net.feature
        self.out_norm = net.out_norm
        self.forward_version = net.forward_version
        self.weights_sha256 = weights_sha256
        self.weights_source = weights_source
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode: a frozen encoder has no training mode."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Tokens (B, N, D) of normalised RGB images (B, 3, H, W), in the module's dtype, row-major over `grid`.

        Raises:
            UsageError: the images are not of shape (B, 3, *res) or not of a floating-point dtype.
        """
        if images_BCHW.ndim != 4 or tuple(images_BCHW.shape[1:]) != (3, *self.res):
            raise UsageError(
                f"{self.name} was built for images of shape (B, 3, {self.res[0]}, {self.res[1]})",
                why=f"got {tuple(images_BCHW.shape)}",
                fix="resize the images, or build the backbone with another res",
            )
        if not images_BCHW.is_floating_point():
            raise UsageError(
                f"{self.name} needs normalised floating-point images",
                why=f"got {images_BCHW.dtype}",
                fix="scale to 0..1, subtract backbone.mean, divide by backbone.std",
            )
        dtype = next(self.net.parameters()).dtype
        tokens_BND: Tensor = self.net(images_BCHW.to(dtype))
        assert tokens_BND.shape[1:] == (self.num_tokens, self.dim), tokens_BND.shape
        return tokens_BND


def build_backbone(
    name: str,
    *,
    res: tuple[int, int],
    weights: str | Path | Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    **options: object,
) -> Backbone:
    """Build a frozen backbone.

    Args:
        name: a name of the catalogue.
        res: (height, width) in pixels of the images.
        weights: a file; a state dict with published key names, with or without the published prefix; "random:SEED" for
            a reproducible random network; None to look the row's file up (see `vlmx.extract.weights.find`).
        dtype: of parameters and tokens.
        device: where the module is put.
        options: options of the family, e.g. `out_norm` of VMamba.

    Raises:
        UnknownNameError: no backbone of that name.
        UsageError: an option that the family does not have, or a size that it cannot take.
        WeightsError: the weights are not found, damaged, or of another network.
    """
    row = catalogue_row(name)
    build = _family_builder(row, options)
    seed = _random_seed(weights)
    # A fork: building a network must not move the caller's random state, on this device or another.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0 if seed is None else seed)
        net = build(row, res, **options)
    if seed is not None:
        sha256, source = f"random:{seed}", f"random seed {seed}"
    elif isinstance(weights, Mapping):
        state = dict(weights)
        if strange := [str(key) for key, value in state.items() if not isinstance(value, Tensor)]:
            raise WeightsError(
                "the state dict holds more than tensors",
                why=f"not tensors: {', '.join(strange[:4])}",
                fix="give the state dict itself, often the entry 'model' or 'state_dict' of a checkpoint",
            )
        sha256, source = weight_files.sha256_of_state(state), "state dict"
        _load_strictly(net, state, row=row, source=source)
    else:
        path = weight_files.find(row, weights)
        sha256, source = weight_files.sha256_of_file(path), f"file {path}"
        _load_strictly(net, weight_files.read(path), row=row, source=source)
    backbone = Backbone(net, row=row, res=res, weights_sha256=sha256, weights_source=source)
    return backbone.to(device=device, dtype=dtype)


def _family_builder(row: BackboneRow, options: Mapping[str, object]) -> Callable[..., FamilyNet]:
    """Import the row's builder and check the names of its options."""
    module, _, function = row.builder.partition(":")
    build: Callable[..., FamilyNet] = getattr(importlib.import_module(module), function)
    known = [p.name for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UsageError(
            f"{row.name} has no option {', '.join(repr(o) for o in unknown)}",
            fix=f"options of {row.family}: {', '.join(known)}" if known else f"{row.family} has no options",
        )
    return build


def _random_seed(weights: object) -> int | None:
    """The seed of "random:SEED", or None for every other kind of weights."""
    if not isinstance(weights, str) or not weights.startswith("random:"):
        return None
    digits = weights.removeprefix("random:")
    if not digits.isascii() or not digits.isdigit() or int(digits) >= 2**63:
        raise UsageError(f"'{weights}' names no seed", fix="give a non-negative integer, e.g. random:0")
    return int(digits)


def _load_strictly(net: FamilyNet, state: dict[str, Tensor], *, row: BackboneRow, source: str) -> None:
    """Load a published state dict: all keys, right shapes, finite values, or a WeightsError that names the keys."""
    own = net.adapt_state_dict(state)
    expected = net.state_dict()
    missing = [k for k in expected if k not in own]
    unexpected = [k for k in own if k not in expected]
    shared = [k for k in expected if k in own]
    shapes = [
        f"{k} is {tuple(own[k].shape)}, needed {tuple(expected[k].shape)}"
        for k in shared
        if own[k].shape != expected[k].shape
    ]
    not_finite = [k for k in shared if own[k].is_floating_point() and not bool(torch.isfinite(own[k]).all())]
    problems = [
        f"{len(found)} {what}: {', '.join(found[:4])}{', ...' if len(found) > 4 else ''}"
        for what, found in [
            ("keys are missing", missing),
            ("keys are unexpected", unexpected),
            ("shapes differ", shapes),
            ("tensors hold NaN or infinity", not_finite),
        ]
        if found
    ]
    if problems:
        raise WeightsError(
            f"the weights ({source}) do not fit {row.name}",
            why="; ".join(problems),
            fix=f"give the file '{row.file}'" + (f" from {row.url}" if row.url else " that ships with vlmx"),
        )
    net.load_state_dict(own, strict=True)
