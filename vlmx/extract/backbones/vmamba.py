"""How does VMamba, in the form of its published checkpoints, turn an image into tokens?

Legend: B images, H x W pixels of an image or cells of a feature map, C channels of a stage, D scan channels, K the four
scan directions (row-major, column-major, and both reversed), R rank of the step-size projection, P = R + 2, E = 4 C
hidden width of the MLP, N tokens.

Source: Liu et al., "VMamba: Visual State Space Model" (2024), section 4; the "v2" models with one state a channel. The
network is token-major (channels last) throughout. The projections that feed the scans act on each token alone, so they
are computed once on the unpermuted grid; the four paths are four ways to walk that grid, and none needs a copy of it.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmx.errors import UsageError, WeightsError
from vlmx.extract.backbones.base import FamilyNet
from vlmx.extract.backbones.row import BackboneRow
from vlmx.extract.ops.dense import add, linear
from vlmx.extract.ops.selective_scan import scan_four_ways
from vlmx.extract.weights import backbone_of_detector

OutNorm = Literal["trained", "identity-affine", "none"]
_OUT_NORMS: tuple[OutNorm, ...] = ("trained", "identity-affine", "none")
_EPS = 1e-5


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W); free of copies when the map lies channels-last in memory."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SS2D(nn.Module):
    """2D selective scan: (B, H, W, C) -> (B, H, W, C). Parameter names and shapes are the published ones.

    Args:
        dim: C.
        ssm_ratio: D = ssm_ratio * C.
    """

    def __init__(self, dim: int, ssm_ratio: float) -> None:
        super().__init__()
        inner, rank = round(ssm_ratio * dim), math.ceil(dim / 16)
        self.rank = rank
        self.in_proj = nn.Linear(dim, inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        bound = inner**-0.5
        self.x_proj_weight = nn.Parameter(torch.empty(4, rank + 2, inner).uniform_(-bound, bound))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, rank).uniform_(-(rank**-0.5), rank**-0.5))
        # Mamba's initial step sizes: log-uniform in 0.001..0.1, stored through the inverse of softplus
        dt = torch.empty(4, inner).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_projs_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_logs = nn.Parameter(torch.zeros(4 * inner, 1))
        self.Ds = nn.Parameter(torch.ones(4 * inner))
        self.out_norm = nn.LayerNorm(inner, eps=_EPS)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        h_BDHW = linear(x_BHWC, self.in_proj.weight).permute(0, 3, 1, 2)
        u_BHWD = F.silu(self.conv2d(h_BDHW), inplace=not torch.is_grad_enabled()).permute(0, 2, 3, 1)
        low_BHWKP = linear(u_BHWD, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (4, self.rank + 2))
        y_BHWD = scan_four_ways(
            u_BHWD,
            low_BHWKP,
            self.dt_projs_weight,
            self.dt_projs_bias,
            -self.A_logs.exp().view(4, -1),
            self.Ds.view(4, -1).sum(0),
        )
        return linear(self.out_norm(y_BHWD.to(x_BHWC.dtype)), self.out_proj.weight)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        hidden_BHWE = linear(x_BHWC, self.fc1.weight, self.fc1.bias, gelu=True)
        return linear(hidden_BHWE, self.fc2.weight, self.fc2.bias)


class VSSBlock(nn.Module):
    """Pre-norm residual block: SS2D, then MLP; (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, ssm_ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.op = SS2D(dim, ssm_ratio)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = Mlp(dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BHWC = add(x_BHWC, self.op(self.norm(x_BHWC)))
        return add(x_BHWC, self.mlp(self.norm2(x_BHWC)))


class Stage(nn.Module):
    """The blocks of one stage and, unless it is the last one built, the strided convolution to the next."""

    def __init__(self, dim: int, depth: int, ssm_ratio: float, next_dim: int | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(VSSBlock(dim, ssm_ratio) for _ in range(depth)))
        self.downsample: nn.Sequential | None = None
        if next_dim is not None:
            conv = nn.Conv2d(dim, next_dim, 3, stride=2, padding=1)
            self.downsample = _numbered({1: conv, 3: ChannelNorm(next_dim, eps=_EPS)})

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.blocks(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x_BCHW if self.downsample is None else self.downsample(x_BCHW)


class VMambaTrunk(nn.Module):
    """VMamba up to the blocks of its last built stage: images (B, 3, H, W) -> features (B, H', W', C), not normalised.

    Each of the two stem convolutions and every downsampling halves the sides, rounding up; any image size works.

    Args:
        depths, dims: blocks and channels of each stage that is built.
        ssm_ratio: scan channels per channel of a stage.
    """

    def __init__(self, *, depths: Sequence[int], dims: Sequence[int], ssm_ratio: float) -> None:
        super().__init__()
        half, dim = dims[0] // 2, dims[0]
        self.patch_embed = _numbered(
            {
                0: nn.Conv2d(3, half, 3, stride=2, padding=1),
                2: ChannelNorm(half, eps=_EPS),
                4: nn.GELU(),
                5: nn.Conv2d(half, dim, 3, stride=2, padding=1),
                7: ChannelNorm(dim, eps=_EPS),
            }
        )
        next_dims = [*dims[1:], None]
        self.layers = nn.ModuleList(
            Stage(dim, depth, ssm_ratio, next_dim) for dim, depth, next_dim in zip(dims, depths, next_dims, strict=True)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """(B, H', W', C), the residual stream after the last built stage."""
        x_BCHW: Tensor = self.patch_embed(images_BCHW.contiguous(memory_format=torch.channels_last))
        for stage in self.layers:
            x_BCHW = stage(x_BCHW)
        return x_BCHW.permute(0, 2, 3, 1)


class VMambaClassifier(VMambaTrunk):
    """The whole network with its classifier: images (B, 3, H, W) -> logits (B, num_classes). For pretraining.

    `build_backbone` accepts its state dict: what the tokens do not need is dropped there.
    """

    def __init__(self, *, depths: Sequence[int], dims: Sequence[int], ssm_ratio: float, num_classes: int) -> None:
        super().__init__(depths=depths, dims=dims, ssm_ratio=ssm_ratio)
        head = nn.Linear(dims[-1], num_classes)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        self.classifier = nn.ModuleDict({"norm": nn.LayerNorm(dims[-1], eps=_EPS), "head": head})

    def forward(self, images_BCHW: Tensor) -> Tensor:
        pooled_BC = self.classifier["norm"](self.features(images_BCHW)).mean((1, 2))
        logits: Tensor = self.classifier["head"](pooled_BC)
        return logits


class VMambaNet(VMambaTrunk, FamilyNet):
    """VMamba up to the tapped stage, as a backbone: images (B, 3, H, W) -> tokens (B, N, C).

    Args:
        res: (height, width) of the images.
        depths, dims, ssm_ratio: of the whole published network.
        tap: index of the stage whose blocks give the tokens; no later stage and no downsampling after it is built.
        checkpoint_out_norm: "trained" when the row's checkpoint is a dense-prediction one, which holds a norm a stage.
        out_norm: what is applied to the tapped features: that norm, a LayerNorm with weight 1 and bias 0, or nothing.
    """

    forward_version = 1
    scans = "four ways"
    keep_float32 = ("A_logs", "Ds", "dt_projs_bias")

    def __init__(
        self,
        *,
        res: tuple[int, int],
        depths: Sequence[int],
        dims: Sequence[int],
        ssm_ratio: float,
        tap: int,
        checkpoint_out_norm: OutNorm,
        out_norm: OutNorm,
    ) -> None:
        super().__init__(depths=depths[: tap + 1], dims=dims[: tap + 1], ssm_ratio=ssm_ratio)
        stride = 2 ** (tap + 2)
        self.grid = (-(-res[0] // stride), -(-res[1] // stride))
        self.dim = dims[tap]
        self.feature = f"stage{tap + 1}"
        self.out_norm = out_norm
        self.tap = tap
        self.from_dense = checkpoint_out_norm == "trained"
        self.shape = _Shape(depths=tuple(depths), dims=tuple(dims), ssm_ratio=ssm_ratio)
        self.out_norm_key = f"outnorm{tap}"
        if out_norm != "none":
            affine = out_norm == "trained"
            self.add_module(self.out_norm_key, nn.LayerNorm(self.dim, eps=_EPS, elementwise_affine=affine))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        tokens_BND = self.features(images_BCHW).flatten(1, 2)
        if self.out_norm != "none":
            tokens_BND = self.get_submodule(self.out_norm_key)(tokens_BND)
        return tokens_BND

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `FamilyNet`. Takes classification, COCO and ADE20K files, prefixed or not, and both spellings of SS2D."""
        state = backbone_of_detector(state)
        self._refuse_other_variants(state)
        own = {}
        for key, tensor in state.items():
            if not self._is_past_the_tap(key):
                name, value = _published_form(key, tensor)
                own[name] = value
        return own

    def _is_past_the_tap(self, key: str) -> bool:
        """Keys of published networks that the tokens do not depend on."""
        if found := re.match(r"layers\.(\d+)\.(downsample\.)?", key):
            stage = int(found[1])
            return stage > self.tap or (stage == self.tap and found[2] is not None)
        if key.startswith("outnorm"):
            return self.out_norm != "trained" or not key.startswith(f"{self.out_norm_key}.")
        return key.startswith("classifier.")

    def _refuse_other_variants(self, state: dict[str, Tensor]) -> None:
        """Raise for the checkpoint of another size, or of another training than the row promises."""
        found = _Shape.of_state(state)
        if found and not (found.agrees_with(self.shape, stages=self.tap + 1) or found.is_part_of(self.shape)):
            raise WeightsError(
                f"the weights are {found.describe()}, not {self.shape.describe()}",
                fix="give the file that 'vlmx list backbones' shows for this backbone, or choose another backbone",
            )
        has_norms = any(key.startswith("outnorm") for key in state)
        has_classifier = any(key.startswith("classifier.") for key in state)
        if self.from_dense and has_classifier and not has_norms:
            raise WeightsError(
                "the weights are an ImageNet classification checkpoint, not one trained for detection or segmentation",
                fix="give the dense checkpoint, or use the '-in1k' backbone",
            )
        if has_norms and not self.from_dense:
            raise WeightsError(
                "the weights are a detection or segmentation checkpoint, not a classification one",
                why="they hold outnorm keys",
                fix="give the classification checkpoint, or use the '-coco' or '-ade20k' backbone",
            )


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """What tells one VMamba from another."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    ssm_ratio: float

    @staticmethod
    def of_state(state: dict[str, Tensor]) -> _Shape | None:
        """Read it from the keys and shapes of a checkpoint; None if they are not VMamba's."""
        blocks = [found for key in state if (found := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.norm\.weight$", key))]
        depths: dict[int, int] = {}
        for block in blocks:
            depths[int(block[1])] = max(depths.get(int(block[1]), 0), int(block[2]) + 1)
        dims = {int(block[1]): state[block[0]].numel() for block in blocks}
        scales = state.get("layers.0.blocks.0.op.Ds")
        if not dims or scales is None or sorted(dims) != list(range(len(dims))):
            return None
        return _Shape(
            depths=tuple(depths[i] for i in range(len(dims))),
            dims=tuple(dims[i] for i in range(len(dims))),
            ssm_ratio=scales.numel() / 4 / dims[0],
        )

    def agrees_with(self, other: _Shape, *, stages: int) -> bool:
        """Whether the first `stages` stages are the same."""
        return (self.depths[:stages], self.dims[:stages], self.ssm_ratio) == (
            other.depths[:stages],
            other.dims[:stages],
            other.ssm_ratio,
        )

    def is_part_of(self, other: _Shape) -> bool:
        """Whether a file that lacks blocks of `other`, but is no known variant, would look like this."""
        fewer = all(mine <= theirs for mine, theirs in zip(self.depths, other.depths, strict=False))
        same = self.dims == other.dims[: len(self.dims)] and self.ssm_ratio == other.ssm_ratio
        return fewer and same and self not in _KNOWN_SHAPES.values()

    def describe(self) -> str:
        """E.g. "VMamba-T s2l5 (depths 2,2,5,2, dims 96,192,384,768, ssm_ratio 2)"."""
        names = [name for name, known in _KNOWN_SHAPES.items() if known.agrees_with(self, stages=len(self.dims))]
        depths, dims = (",".join(map(str, values)) for values in (self.depths, self.dims))
        return f"{names[0] if names else 'a VMamba'} (depths {depths}, dims {dims}, ssm_ratio {self.ssm_ratio:g})"


_KNOWN_SHAPES = {
    f"VMamba-{size} s{ratio}l{depth}": _Shape(
        depths=(2, 2, depth, 2), dims=(width, 2 * width, 4 * width, 8 * width), ssm_ratio=float(ratio)
    )
    for size, width, ratio, depth in [
        ("T", 96, 1, 8),
        ("T", 96, 2, 5),
        ("S", 96, 2, 15),
        ("S", 96, 1, 20),
        ("B", 128, 2, 15),
        ("B", 128, 1, 20),
    ]
}


def _published_form(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Name and shape as in the published checkpoints, from any of the spellings that the reference code writes."""
    if key.endswith((".in_proj.weight", ".out_proj.weight", ".fc1.weight", ".fc2.weight")) and tensor.ndim == 4:
        return key, tensor.flatten(1)  # linear layers stored as 1x1 convolutions
    if key.endswith((".op.x_proj.weight", ".op.dt_projs.weight")):
        # the four directions stacked along the first axis, perhaps with a trailing axis of length 1
        per_direction = tensor.reshape(tensor.shape[0], -1).unflatten(0, (4, -1))
        return key.removesuffix(".weight") + "_weight", per_direction
    return key, tensor


def _numbered(modules: dict[int, nn.Module]) -> nn.Sequential:
    """A Sequential whose keys are these numbers: the published networks have parameterless modules between."""
    return nn.Sequential(OrderedDict((str(i), module) for i, module in modules.items()))


def build(row: BackboneRow, res: tuple[int, int], *, out_norm: str | None = None) -> VMambaNet:
    """Build the network of a VMamba row for images of `res` = (height, width).

    Args:
        row: a row of the family "vmamba".
        res: any size of at least one token; sides need not be multiples of the stride, the grid is rounded up.
        out_norm: "trained", "identity-affine" or "none"; None for what the row's checkpoint holds: "trained" for the
            dense ones, "none" for the classification ones.

    Raises:
        UsageError: the choice does not exist, or the checkpoint cannot have the norm.
    """
    in_checkpoint: OutNorm = row.arch["checkpoint_out_norm"]
    chosen = in_checkpoint if out_norm is None else next((o for o in _OUT_NORMS if o == out_norm), None)
    if chosen is None:
        raise UsageError(f"out_norm={out_norm!r} is not known", fix=f"choose one of {', '.join(_OUT_NORMS)}")
    if chosen == "trained" and in_checkpoint != "trained":
        raise UsageError(
            f"{row.name} has no trained out-norm",
            why="classification checkpoints hold none",
            fix="choose out_norm=none or out_norm=identity-affine, or a '-coco' or '-ade20k' backbone",
        )
    return VMambaNet(res=res, **row.arch, out_norm=chosen)
