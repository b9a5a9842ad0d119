"""How is the published code of VMamba and Vim run beside ours, on a CPU, as it is?

Nothing of those repositories is part of this one. Bring them yourself, into one folder:

    git clone https://github.com/MzeroMiko/VMamba FOLDER/VMamba      # compared with commit 2ed52ea
    git clone https://github.com/hustvl/Vim FOLDER/Vim               # compared with commit dd0358a
    pip install einops                                               # which their code imports

Both are written for CUDA. Without it they can be imported only with stand-ins for triton and for their compiled
extensions; what then computes is their own code in plain torch:

- VMamba: its `selective_scan_torch` and its torch cross-scan and cross-merge. Their wrapper asks for a CUDA device even
  for a CPU tensor; that question is answered with nothing.
- Vim: its `selective_scan_ref` and `rms_norm_ref`, and the `causal_conv1d_ref` that it ships, connected as its CUDA
  function `mamba_inner_fn_no_out_proj` connects their kernels. (The branch of Vim without CUDA leaves out the backward
  direction, so that it computes another function.)

Legend: B images, H x W pixels, N tokens, C token width, L = N + 1 sequence with the class token, D scan channels, S
states a channel, R rank of the step size.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmx  # noqa: F401  it makes timm, which the published code imports, importable with a torch without CUDA

# Modules that the published code imports and that are not needed, or not to be had, on a CPU.
_STAND_INS = (
    "triton",
    "triton.language",
    "fvcore",
    "fvcore.nn",
    "selective_scan_cuda",
    "causal_conv1d",
    "causal_conv1d_cuda",
    "mamba_ssm.utils.generation",
    "mamba_ssm.utils.hf",
)
# Names that the published code takes; whatever the user has installed under them is hidden meanwhile.
_ROOTS = {"triton", "fvcore", "selective_scan_cuda", "causal_conv1d", "causal_conv1d_cuda", "mamba_ssm", "rope"}


@dataclass(frozen=True, kw_only=True)
class Official:
    """A published network with random weights, in eval mode.

    Attributes:
        state: its weights with their published names.
        tokens: images (B, 3, H, W) -> tokens (B, N, C), stopping where they are computed.
        whole: the same images through the whole network; what comes out does not matter.
    """

    state: dict[str, Tensor]
    tokens: Callable[[Tensor], Tensor]
    whole: Callable[[Tensor], object]


class _Inert(types.ModuleType):
    """A module of which every name is itself, and which as a decorator changes nothing."""

    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs and callable(args[0]) else self

    def __le__(self, other: object) -> bool:
        return False  # lists of kernel settings are filtered while they are defined


@contextlib.contextmanager
def _foreign_imports(*folders: Path) -> Iterator[None]:
    """Import from these folders, with the stand-ins; afterwards `sys.modules` and `sys.path` are as before."""

    def taken() -> dict[str, types.ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in _ROOTS}

    importlib.import_module("timm.models")  # before triton's stand-in, which it must not find
    before, path = taken(), list(sys.path)
    for name in before:
        del sys.modules[name]
    sys.modules.update({name: _Inert(name) for name in _STAND_INS})
    sys.path[:0] = map(str, folders)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # each missing extension is complained of
            yield
    finally:
        for name in taken():
            del sys.modules[name]
        sys.modules.update(before)
        sys.path[:] = path


def _module(name: str, file: Path) -> Any:
    """Import one file, or a package by its `__init__.py`, under a name of our choice."""
    if not file.is_file() or importlib.util.find_spec("einops") is None:
        clones = (__doc__ or "").partition("\n\n")[2].partition("Both are")[0].partition("folder:\n\n")[2]
        raise SystemExit(f"{file} or einops is not there; --official FOLDER needs\n\n{clones.rstrip()}")
    places = [str(file.parent)] if file.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=places)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def vmamba(folder: Path, builder: str) -> Official:
    """VMamba from its published classification code; tokens are the output of the third stage's blocks.

    Args:
        folder: holds the clone `VMamba`.
        builder: the name of the function that builds it: "vmamba_tiny_s1l8" or "vmamba_small_s2l15".
    """
    with _foreign_imports():
        _module("official_vmamba", folder / "VMamba/classification/models/__init__.py")
        code = sys.modules["official_vmamba.vmamba"]
    # The name by which its layers reach the scan. Its own choice would be a CUDA extension wherever one is installed.
    code.selective_scan_fn = sys.modules["official_vmamba.csms6s"].selective_scan_torch  # type: ignore[attr-defined]
    net = getattr(code, builder)().eval().requires_grad_(False)
    state = _load_lively_weights(net)

    def whole(images_BCHW: Tensor) -> object:
        with torch.no_grad(), mock.patch.object(torch.cuda, "device", contextlib.nullcontext):
            return net(images_BCHW)

    def tokens(images_BCHW: Tensor) -> Tensor:
        hook = net.layers[2].blocks.register_forward_hook(_stop_here)
        try:
            whole(images_BCHW)
        except _Reached as reached:
            tokens_BNC: Tensor = reached.output.flatten(2).transpose(1, 2)
            return tokens_BNC
        finally:
            hook.remove()
        raise AssertionError("the third stage was never reached")

    return Official(state=state, tokens=tokens, whole=whole)


class _Reached(Exception):
    """The network has come to where the tokens are; it need not go on."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def _stop_here(module: nn.Module, inputs: object, output: Tensor) -> None:
    raise _Reached(output)


def vim(folder: Path, builder: str) -> Official:
    """Vim from its published code; tokens are the rows of its last norm without the class token.

    Args:
        folder: holds the clone `Vim`.
        builder: the name of the function that builds it, "vim_small_patch16_224_bimambav2_..._midclstok_div2".
    """
    root = folder / "Vim"
    with _foreign_imports(root / "vim"):
        package = types.ModuleType("mamba_ssm")  # without its __init__.py, which imports language models
        package.__path__ = [str(root / "mamba-1p1p1/mamba_ssm")]
        sys.modules["mamba_ssm"] = package
        code = _module("official_vim", root / "vim/models_mamba.py")
        mixer = importlib.import_module("mamba_ssm.modules.mamba_simple")
        scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_ref
        norm = importlib.import_module("mamba_ssm.ops.triton.layer_norm").rms_norm_ref
        conv_file = root / "causal-conv1d/causal_conv1d/causal_conv1d_interface.py"
        conv = _module("official_causal_conv1d", conv_file).causal_conv1d_ref

    def inner(
        xz_BDL: Tensor,
        conv_weight_D1W: Tensor,
        conv_bias_D: Tensor,
        low_weight_PD: Tensor,
        dt_weight_DR: Tensor,
        A_DS: Tensor,
        B: None,
        C: None,
        skip_D: Tensor,
        *,
        delta_bias: Tensor,
        delta_softplus: bool,
    ) -> Tensor:
        """One direction of a block up to its gate: what their fused function computes, with their references."""
        x_BDL, gate_BDL = xz_BDL.chunk(2, dim=1)
        u_BDL = conv(x_BDL, conv_weight_D1W.squeeze(1), conv_bias_D, activation="silu")
        sizes = [dt_weight_DR.shape[1], A_DS.shape[1], A_DS.shape[1]]
        dt_BLR, B_BLS, C_BLS = F.linear(u_BDL.transpose(1, 2), low_weight_PD).split(sizes, dim=-1)
        dt_BDL = dt_weight_DR @ dt_BLR.transpose(1, 2)
        B_BSL, C_BSL = B_BLS.transpose(1, 2).contiguous(), C_BLS.transpose(1, 2).contiguous()
        y_BDL: Tensor = scan(u_BDL, dt_BDL, A_DS, B_BSL, C_BSL, skip_D, gate_BDL, delta_bias, delta_softplus)
        return y_BDL

    last: list[Tensor] = []

    def add_and_norm(
        x: Tensor,
        weight: Tensor,
        bias: None,
        *,
        residual: Tensor | None,
        prenorm: bool,
        residual_in_fp32: bool,
        eps: float,
    ) -> Any:
        out = norm(x, weight, bias, residual=residual, prenorm=prenorm, eps=eps)
        if not prenorm:  # only the last norm hands no residual on; the network then returns its class token alone
            last[:] = [out]
        return out

    mixer.mamba_inner_fn_no_out_proj = inner  # type: ignore[attr-defined]
    code.rms_norm_fn = add_and_norm
    net = getattr(code, builder)().eval().requires_grad_(False)
    state = _load_lively_weights(net)

    def whole(images_BCHW: Tensor) -> object:
        with torch.no_grad():
            return net(images_BCHW)

    def tokens(images_BCHW: Tensor) -> Tensor:
        with torch.no_grad():
            net.forward_features(images_BCHW)
        (sequence_BLC,) = last
        class_index = sequence_BLC.shape[1] // 2
        return torch.cat([sequence_BLC[:, :class_index], sequence_BLC[:, class_index + 1 :]], dim=1)

    return Official(state=state, tokens=tokens, whole=whole)


def _load_lively_weights(net: nn.Module) -> dict[str, Tensor]:
    """Give a network random weights with which every layer matters, and return them.

    Fresh networks have projections so small that the tokens are little more than the embedded patches: an error of a
    scan would hardly show. Here matrices keep the scale of what they multiply; the parameters of the scans stay fresh.
    """
    draw = torch.Generator().manual_seed(0)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for name, value in state.items():
        if name.endswith(("weight", "pos_embed", "cls_token")) and value.ndim > 1:
            fan_in = math.prod(value.shape[1:]) if name.endswith(".weight") else value.shape[-1]
            state[name] = torch.randn(value.shape, generator=draw) / math.sqrt(fan_in)
    net.load_state_dict(state)
    return state
