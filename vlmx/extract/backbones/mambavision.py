"""How does MambaVision turn an image into tokens: conv stages first, then Mamba mixers and attention inside windows.

An independent implementation after the paper (Hatamizadeh and Kautz, "MambaVision: A Hybrid Mamba-Transformer Vision
Backbone", arXiv 2407.08083, sections 3.1-3.3) that takes the state-dict names of the published checkpoints. NVIDIA's
code is under a non-commercial licence and is not used here; its published weights are CC-BY-NC-SA-4.0.

Legend: B batch, C channels, H W pixels of the current map, N tokens, L tokens of one window, D inner channels
(C / 2), S states (8), R rank of the time step, E hidden width of the MLP, P window side.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmx.extract.backbones.base import FamilyNet
from vlmx.extract.backbones.row import BackboneRow
from vlmx.extract.ops.dense import add, linear
from vlmx.extract.ops.selective_scan import conv_silu, scan_tokens
from vlmx.extract.weights import strip_prefix, unwrapped

STEM_BN_EPS = 1e-4
STATES = 8


class PatchEmbed(nn.Module):
    """Image (B, 3, H, W) -> map (B, dim, H/4, W/4): two stride-2 convolutions with batch norm; odd sizes round up."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv_down = nn.Sequential(
            nn.Conv2d(3, in_dim, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(in_dim, eps=STEM_BN_EPS),
            nn.ReLU(),
            nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(dim, eps=STEM_BN_EPS),
            nn.ReLU(),
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        map_BCHW: Tensor = self.conv_down(images_BCHW)
        return map_BCHW


class ConvBlock(nn.Module):
    """Residual pair of 3x3 convolutions, each followed by batch norm, with a tanh-GELU between; shape is kept."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(dim)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden = F.gelu(self.norm1(self.conv1(x_BCHW)), approximate="tanh")
        out_BCHW: Tensor = x_BCHW + self.norm2(self.conv2(hidden))
        return out_BCHW


class MambaMixer(nn.Module):
    """One-directional selective scan over half of the channels, a plain convolution over the other half (section 3.3).

    The time-step bias is added twice, by `dt_proj` itself and again before the softplus: the published weights were
    trained so. Both width-3 depthwise convolutions are centred, not causal, and without bias.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = dim // 2
        self.rank = math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.conv1d_x = nn.Conv1d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.conv1d_z = nn.Conv1d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.x_proj = nn.Linear(inner, self.rank + 2 * STATES, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.A_log = nn.Parameter(torch.arange(1.0, STATES + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self._init_time_step()

    def _init_time_step(self) -> None:
        """Start with time steps spread evenly in log space over [0.001, 0.1] (Gu and Dao, Mamba, section 3.6)."""
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        log_dt = torch.empty(self.dt_proj.out_features).uniform_(math.log(0.001), math.log(0.1))
        dt = log_dt.exp()
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(self, x_BLC: Tensor) -> Tensor:
        u_BLD, z_BLD = linear(x_BLC, self.in_proj.weight).chunk(2, dim=2)
        u_BLD = conv_silu(u_BLD, self.conv1d_x.weight.flatten(1), None, before=1)
        z_BLD = conv_silu(z_BLD, self.conv1d_z.weight.flatten(1), None, before=1)
        dt_BLR, b_BLS, c_BLS = linear(u_BLD, self.x_proj.weight).split([self.rank, STATES, STATES], dim=-1)
        y_BLD = scan_tokens(
            u_BLD,
            F.linear(dt_BLR, self.dt_proj.weight) + self.dt_proj.bias,
            -torch.exp(self.A_log),
            b_BLS[:, :, None],
            c_BLS[:, :, None],
            skip_D=self.D,
            bias_D=self.dt_proj.bias,
        )
        return linear(torch.cat([y_BLD, z_BLD], dim=2), self.out_proj.weight)


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of a window, without position terms: (B, L, C) -> (B, L, C)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BLC: Tensor) -> Tensor:
        qkv = linear(x_BLC, self.qkv.weight, self.qkv.bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return linear(mixed.transpose(1, 2).flatten(2), self.proj.weight, self.proj.bias)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between: (B, L, C) -> (B, L, C)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x_BLC: Tensor) -> Tensor:
        hidden_BLE = linear(x_BLC, self.fc1.weight, self.fc1.bias, gelu=True)
        return linear(hidden_BLE, self.fc2.weight, self.fc2.bias)


class MixerBlock(nn.Module):
    """Pre-norm residual block: a token mixer, then an MLP, each optionally scaled per channel."""

    def __init__(self, dim: int, mixer: nn.Module, *, mlp_ratio: float, layer_scale: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma_1 = nn.Parameter(torch.full((dim,), 1e-5)) if layer_scale else 1.0
        self.gamma_2 = nn.Parameter(torch.full((dim,), 1e-5)) if layer_scale else 1.0

    def forward(self, x_BLC: Tensor) -> Tensor:
        x_BLC = add(x_BLC, self.gamma_1 * self.mixer(self.norm1(x_BLC)))
        return add(x_BLC, self.gamma_2 * self.mlp(self.norm2(x_BLC)))


class Downsample(nn.Module):
    """Halve the map and double the channels with one strided convolution; odd sizes round up."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Sequential(nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        half_BCHW: Tensor = self.reduction(x_BCHW)
        return half_BCHW


class ConvStage(nn.Module):
    """A stage of conv blocks at full map size; `downsample` exists only when a later stage does."""

    def __init__(self, dim: int, depth: int, *, downsample: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConvBlock(dim) for _ in range(depth))
        self.downsample = Downsample(dim) if downsample else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        return x_BCHW


class WindowStage(nn.Module):
    """A stage of Mamba mixers followed by attention blocks, inside windows of `window` x `window` tokens.

    The second half of the blocks is attention, one fewer when the depth is odd. Maps that are no multiple of the
    window are padded with zeros at the right and the bottom; the padding takes part in scan and attention, as in the
    published nets, and is cut off after the stage.
    """

    def __init__(
        self, dim: int, depth: int, *, heads: int, window: int, mlp_ratio: float, layer_scale: bool, downsample: bool
    ) -> None:
        super().__init__()
        self.window = window
        first_attention = (depth + 1) // 2
        self.blocks = nn.ModuleList(
            MixerBlock(
                dim,
                Attention(dim, heads) if index >= first_attention else MambaMixer(dim),
                mlp_ratio=mlp_ratio,
                layer_scale=layer_scale,
            )
            for index in range(depth)
        )
        self.downsample = Downsample(dim) if downsample else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        batch, _, height, width = x_BCHW.shape
        side = self.window
        padded = F.pad(x_BCHW, (0, -width % side, 0, -height % side))
        rows, columns = padded.shape[2] // side, padded.shape[3] // side
        windows_BLC = (
            padded.unflatten(3, (columns, side))
            .unflatten(2, (rows, side))
            .permute(0, 2, 4, 3, 5, 1)
            .reshape(batch * rows * columns, side * side, -1)
        )
        for block in self.blocks:
            windows_BLC = block(windows_BLC)
        map_BCHW: Tensor = (
            windows_BLC.reshape(batch, rows, columns, side, side, -1)
            .permute(0, 5, 1, 3, 2, 4)
            .flatten(4, 5)
            .flatten(2, 3)
        )
        return map_BCHW[:, :, :height, :width]


class MambaVision(FamilyNet):
    """MambaVision up to the blocks of stage `tap` (counted from 0): images (B, 3, H, W) -> tokens (B, N, C).

    The tokens are the map of the tapped stage before its downsample and without any norm, row-major. Nothing after
    that stage is built. Any image size of at least one token is accepted.

    The scan and what parameterises it (A_log, D, the time-step bias) stay float32 whatever the rest computes in.

    Args:
        res: image (height, width) in pixels.
        depths, heads, windows: one entry a stage; heads and windows of conv stages are not used.
        in_dim, dim: channels inside the stem and of stage 0; every later stage doubles them.
        conv_stages: how many of the first stages are convolutional (2 in the published nets).
        layer_scale: whether blocks have gamma_1 and gamma_2 (published B and larger).
        tap: the stage whose map is returned (2 in the published nets, "stage 3" of the paper).
    """

    scans = "sequences"
    keep_float32 = ("A_log", "D", "dt_proj.bias")

    def __init__(
        self,
        *,
        res: tuple[int, int],
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        windows: tuple[int, ...],
        in_dim: int,
        dim: int,
        conv_stages: int,
        tap: int,
        mlp_ratio: float = 4.0,
        layer_scale: bool = False,
    ) -> None:
        super().__init__()
        self.tap = tap
        self.stages_total = len(depths)
        self.dim = dim * 2**tap
        stride = 4 * 2**tap
        self.grid = (math.ceil(res[0] / stride), math.ceil(res[1] / stride))
        self.feature = f"stage{tap + 1}"
        self.out_norm = "none"
        self.forward_version = 1
        self.patch_embed = PatchEmbed(in_dim, dim)
        levels: list[ConvStage | WindowStage] = []
        for index in range(tap + 1):
            width, last = dim * 2**index, index == tap
            if index < conv_stages:
                levels.append(ConvStage(width, depths[index], downsample=not last))
            else:
                levels.append(
                    WindowStage(
                        width,
                        depths[index],
                        heads=heads[index],
                        window=windows[index],
                        mlp_ratio=mlp_ratio,
                        layer_scale=layer_scale,
                        downsample=not last,
                    )
                )
        self.levels = nn.ModuleList(levels)
        self.apply(_init_linear)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Published names -> own names: prefixes (`module.`, the hub's `model.`) go, and all after the tapped stage."""
        state = strip_prefix(unwrapped(state), "model.")
        if any(name.startswith("encoder.") for name in state):  # beside it is what the encoder was trained with
            state = {name.removeprefix("encoder."): value for name, value in state.items() if name[:8] == "encoder."}
        after = tuple(f"levels.{index}." for index in range(self.tap + 1, self.stages_total))
        dropped = (f"levels.{self.tap}.downsample.", *after, "norm.", "head.")
        return {name: value for name, value in state.items() if not name.startswith(dropped)}

    def map_of_stage(self, images_BCHW: Tensor) -> Tensor:
        """The tapped stage's map (B, C, H, W), before any downsample or norm."""
        x_BCHW: Tensor = self.patch_embed(images_BCHW)
        for level in self.levels:
            assert isinstance(level, ConvStage | WindowStage)
            x_BCHW = level(x_BCHW)
            if level.downsample is not None:
                x_BCHW = level.downsample(x_BCHW)
        return x_BCHW

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.map_of_stage(images_BCHW).flatten(2).transpose(1, 2)


class MambaVisionClassifier(MambaVision):
    """The whole network with its classifier: images (B, 3, H, W) -> logits (B, num_classes). For pretraining."""

    def __init__(self, *, num_classes: int, **arch: Any) -> None:
        super().__init__(**{**arch, "tap": len(arch["depths"]) - 1})
        self.norm = nn.BatchNorm2d(self.dim)
        self.head = nn.Linear(self.dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.map_of_stage(images_BCHW)).mean(dim=(2, 3)))
        return logits


def build(row: BackboneRow, res: tuple[int, int]) -> MambaVision:
    """The frozen-feature network of a catalogue row, with fresh random weights."""
    return MambaVision(res=res, **row.arch)


def build_classifier(row: BackboneRow, res: tuple[int, int], num_classes: int) -> MambaVisionClassifier:
    """The whole network of a catalogue row with a classifier, for pretraining; published key names."""
    return MambaVisionClassifier(res=res, num_classes=num_classes, **row.arch)


def _init_linear(module: nn.Module) -> None:
    """Small normal weights for plain linear layers; the time-step projection keeps its own initialisation."""
    if isinstance(module, MambaMixer):
        plain = [module.in_proj, module.x_proj, module.out_proj]
    elif isinstance(module, Attention):
        plain = [module.qkv, module.proj]
    elif isinstance(module, Mlp):
        plain = [module.fc1, module.fc2]
    else:
        return
    for layer in plain:
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
