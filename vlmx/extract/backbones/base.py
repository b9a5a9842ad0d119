"""What is a backbone to the rest of vlmx: a frozen network that turns images into a grid of tokens.

Legend: B images, C channels (3), H x W pixels, N tokens (row-major over the grid), D token width.

A family module (vmamba.py, timm_models.py, ...) provides one function

    def build(row: BackboneRow, res: tuple[int, int], *, some_option: str | None = None) -> FamilyNet

whose keyword-only parameters are the options of that family. It builds only what the tokens need. Everything else
(allowed sizes, weights, strict loading, freezing, dtype, device) happens here. `forward` may be called from several
threads at once. Families with a selective scan share `scan_tokens` and `scan_four_ways` of
`vlmx.extract.ops.selective_scan`, which choose the engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vlmx.console import note
from vlmx.errors import BackendError, UsageError, WeightsError
from vlmx.extract import weights as weight_files
from vlmx.extract.backbones.catalogue import row as catalogue_row
from vlmx.extract.backbones.loading import build_net, check_overflow, load_strictly
from vlmx.extract.backbones.row import BackboneRow

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FamilyNet(nn.Module, ABC):
    """Base of what a family's `build` returns. A subclass sets the attributes and implements the two methods.

    Attributes:
        grid: (rows, columns) of the tokens.
        dim: token width.
        feature: where the tokens are taken, e.g. "stage3" or "blocks.10".
        out_norm: what is applied to them there, e.g. "none" or "trained".
        forward_version: raised whenever a change of the code changes the tokens of the same weights.
        keep_float32: ends of the dotted names of parameters and buffers that stay float32 when the rest is cast to
            bfloat16 or float16, e.g. "A_log" or "dt_proj.bias". Batch norms always do.
        scans: which selective scans it computes, through `vlmx.extract.ops.selective_scan`: of sequences, or of grids
            in four directions; empty when it computes none.
    """

    keep_float32: ClassVar[tuple[str, ...]] = ()
    scans: ClassVar[Literal["", "sequences", "four ways"]] = ""

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

    def published_name(self, own: str) -> str:
        """What messages call a parameter: its name in the published file, as far as it differs from the own one."""
        return own

    @abstractmethod
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Tokens (B, N, D) of normalised RGB images (B, 3, H, W), row-major over `grid`."""


class Backbone(nn.Module):
    """A frozen encoder. It is always in eval mode, whatever the caller does, and computes no gradients.

    Attributes:
        name, row: the catalogue entry.
        res: (height, width) in pixels of the images it takes.
        grid, dim, num_tokens, feature, out_norm, forward_version: see `FamilyNet`; num_tokens = rows * columns.
        dtype: of the tokens.
        mean, std: normalisation of RGB values in 0..1 that the images must have had.
        crop_pct: share of the letterboxed image that is kept by a centre crop; 1 without the option `crop`.
        weights_sha256: SHA-256 (hex) of the weights file, or of the named tensors of a state dict; "random:SEED".
        weights_source: "file PATH", "state dict" or "random seed SEED".
        options: what was asked for beside the defaults: the family's options and `crop`.
    """

    def __init__(
        self,
        net: FamilyNet,
        *,
        row: BackboneRow,
        res: tuple[int, int],
        dtype: torch.dtype,
        weights_sha256: str,
        weights_source: str,
        crop_pct: float = 1.0,
        options: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        _cast(net, dtype)
        self.net = net
        self.dtype = dtype
        self.crop_pct = crop_pct
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
        self.options = dict(options or {})
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode: a frozen encoder has no training mode."""
        super().train(False)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        """What `to`, `cuda`, `half`, ... call: it may move, but every tensor keeps its dtype.

        Raises:
            UsageError: another dtype than the backbone's is asked for.
        """
        of_own, of_float32 = (fn(torch.empty(0, dtype=dtype, device="cpu")) for dtype in (self.dtype, torch.float32))
        if of_own.dtype != self.dtype:
            known = of_own.dtype in DTYPES
            raise UsageError(
                f"{self.name} was built for {self.dtype} and cannot be cast to {of_own.dtype}",
                why="parts of it must stay float32, which a cast of the whole module would undo",
                fix=f"build it with dtype={of_own.dtype}" if known else "leave it as it is",
            )
        if of_float32.dtype != torch.float32:  # `fn` casts, too: to the dtype that the backbone has already
            device = of_own.device
            super()._apply(lambda tensor: tensor.to(device), recurse)
        else:
            super()._apply(fn, recurse)
        return self

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Tokens (B, N, D) of normalised RGB images (B, 3, H, W), in `dtype`, row-major over `grid`.

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
        self.eval()  # in case that someone put a part of it into training mode
        device = images_BCHW.device.type
        autocast = torch.autocast(device, enabled=False) if device in ("cpu", "cuda") else nullcontext()
        with autocast:  # the dtype was chosen when the backbone was built
            tokens_BND: Tensor = self.net(images_BCHW.to(self.dtype))
        assert tokens_BND.dtype == self.dtype, tokens_BND.dtype
        assert tokens_BND.shape[1:] == (self.num_tokens, self.dim), tokens_BND.shape
        return tokens_BND


def build_backbone(
    name: str,
    *,
    res: tuple[int, int],
    weights: str | Path | Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    crop: bool = False,
    **options: object,
) -> Backbone:
    """Build a frozen backbone.

    Args:
        name: a name of the catalogue, or "timm:ID.TAG".
        res: (height, width) in pixels of the images.
        weights: a file or a Hugging Face folder; a state dict with published key names, with or without the published
            prefix; "random:SEED" for a reproducible random network; None to look the row's file up (see
            `vlmx.extract.weights.find`).
        dtype: of the tokens and of what computes them: float32, bfloat16 or float16. Scans, their parameters and batch
            norms stay float32.
        device: where the module is put. "meta" gives the network without weights, to ask for its shapes.
        crop: whether the letterboxed photo is enlarged and cropped as the reference's code does for some encoders;
            nothing changes in the network, but it is part of what the tokens are.
        options: options of the family, e.g. `out_norm` of VMamba, `block` of ViTs, `feature` of ViTDet.

    Raises:
        UnknownNameError: no backbone of that name.
        UsageError: an option that the family does not have, or a size that it cannot take.
        WeightsError: the weights are not found, damaged, or of another network.
        BackendError: the device cannot be used.
    """
    row = catalogue_row(name)
    res = _checked_res(res)
    row.check_size(res)
    if crop and row.crop_pct == 1.0:
        raise UsageError(f"the reference does not crop the images of {row.name}", fix="leave the option crop away")
    if dtype not in DTYPES:
        raise UsageError(f"{dtype} is no dtype for a backbone", fix="choose float32, bfloat16 or float16")
    target = _checked_device(device)
    seed = _random_seed(weights)
    if target.type == "meta":
        if weights is not None:
            raise UsageError("on the meta device there are no weights", fix="leave weights away, or choose a device")
        net, sha256, source = build_net(row, res, options, device="meta"), "none", "no weights"
    elif seed is not None:
        # A fork: building a network must not move the caller's random state, on this device or another.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            net, sha256, source = build_net(row, res, options), f"random:{seed}", f"random seed {seed}"
    else:
        with torch.random.fork_rng(devices=[]):
            net = build_net(row, res, options, fill=False)
        with torch.device("cpu"):  # whatever the caller's default device is
            if isinstance(weights, Mapping):
                state = _checked_mapping(weights)
                sha256, source = weight_files.sha256_of_state(state), "state dict"
            elif weights is None or isinstance(weights, str | Path):
                path = weight_files.find(row, weights)
                state = _read(path)
                sha256, source = weight_files.identity(path), f"file {path}"
            else:
                raise UsageError(f"weights cannot be a {type(weights).__name__}", fix="give a path or a state dict")
            load_strictly(net, state, row=row, source=source)
    backbone = Backbone(
        net,
        row=row,
        res=res,
        dtype=dtype,
        crop_pct=row.crop_pct if crop else 1.0,
        weights_sha256=sha256,
        weights_source=source,
        options={**options, "crop": True} if crop else options,
    )
    if dtype == torch.float16 and target.type != "meta":
        check_overflow(backbone, row.name)
    return backbone.to(target)


def _checked_res(res: object) -> tuple[int, int]:
    """(height, width) as a tuple."""
    sides = tuple(res) if isinstance(res, list | tuple) else ()
    if len(sides) != 2 or not all(type(side) is int for side in sides):
        raise UsageError(f"res={res!r} is not (height, width)", fix="give two integers, e.g. res=(224, 224)")
    return (sides[0], sides[1])


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError) as error:  # torch's own, and its complaint about a build without CUDA
        raise BackendError(
            f"the device '{device}' cannot be used",
            why=str(error).splitlines()[0],
            fix="choose 'cpu', or a device that vlmx doctor shows",
        ) from error
    return checked


def _cast(net: FamilyNet, dtype: torch.dtype) -> None:
    """Cast to `dtype` what is floating point, except what must stay float32."""
    if dtype == torch.float32:
        return
    endings = tuple(f".{name}" for name in net.keep_float32)
    for path, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not f".{path}.{name}".endswith(endings):
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and not f".{path}.{name}".endswith(endings):
                setattr(module, name, buffer.to(dtype))


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file; a choice that was made among them is said."""
    checkpoint = weight_files.read_checkpoint(path)
    if checkpoint.not_taken:
        note(f"{path.name}: averaged weights beside the plain ones are not used ({', '.join(checkpoint.not_taken)})")
    return checkpoint.state


def _checked_mapping(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the mapping, made sure that it holds tensors with values, by name."""
    state = dict(weights)
    if strange := [repr(k) for k, value in state.items() if not (isinstance(k, str) and isinstance(value, Tensor))]:
        raise WeightsError(
            "the state dict holds more than tensors",
            why=f"no tensors by name: {', '.join(strange[:4])}",
            fix="give the state dict itself, often the entry 'model' or 'state_dict' of a checkpoint",
        )
    if unusable := [key for key, value in state.items() if value.is_meta or value.layout != torch.strided]:
        raise WeightsError(
            "the state dict holds tensors without plain values",
            why=f"on the meta device, or sparse: {', '.join(unusable[:4])}",
            fix="give dense tensors on the CPU or a GPU",
        )
    return state


def _random_seed(weights: object) -> int | None:
    """The seed of "random:SEED", or None for every other kind of weights."""
    if not isinstance(weights, str) or not weights.startswith("random:"):
        return None
    digits = weights.removeprefix("random:")
    if not digits.isascii() or not digits.isdigit() or int(digits) >= 2**63:
        raise UsageError(f"'{weights}' names no seed", fix="give a non-negative integer, e.g. random:0")
    return int(digits)
