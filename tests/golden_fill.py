"""Which weights and images were the reference outputs made with? One rule for each set, as its README states it."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor


def generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def fill_ssm(manifest: list[list[Any]]) -> dict[str, Tensor]:
    """State dict for a manifest [[key, shape, dtype], ...] of the VMamba, Vim and MambaVision set."""
    return {name: _fill_ssm_entry(name, tuple(shape)) for name, shape, _ in manifest}


def _fill_ssm_entry(name: str, shape: tuple[int, ...]) -> Tensor:
    rng, last = generator(name), name.rpartition(".")[2]
    if last == "num_batches_tracked":
        return torch.tensor(0)
    if last == "running_var":
        value = 0.05 + 0.5 * rng.random(shape)
    elif last == "dt_projs_bias" or name.endswith(("dt_proj.bias", "dt_proj_b.bias")):
        dt = np.exp(rng.random(shape) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        value = dt + np.log(-np.expm1(-dt))
    else:
        z = rng.standard_normal(shape)
        if last == "running_mean":
            value = 0.1 * z
        elif last in {"A_logs", "A_log", "A_b_log"}:
            value = np.log(np.arange(shape[-1]) + 1) + 0.3 * z
        elif last in {"Ds", "D", "D_b"}:
            value = 1 + 0.1 * z
        elif last in {"gamma", "gamma_1", "gamma_2"}:
            value = 0.5 + 0.1 * z
        elif last in {"pos_embed", "cls_token"}:
            value = 0.2 * z
        elif len(shape) == 1:
            value = 1 + 0.1 * z if last == "weight" else 0.05 * z
        else:
            gain = 0.5 if len(shape) == 4 else 1.0
            fan_in = shape[-1] if last in {"x_proj_weight", "dt_projs_weight"} else math.prod(shape[1:])
            value = gain / math.sqrt(fan_in) * z
    return torch.from_numpy(np.asarray(value).astype(np.float32))


_EMBEDDINGS = (
    "pos_embed",
    "cls_token",
    "level_embed",
    "rel_pos_h",
    "rel_pos_w",
    "relative_position_bias_table",
    "spatial_pos_embed.weight",
    "temporal_pos_embed.weight",
)


def fill_transformers(entries: list[list[Any]]) -> dict[str, Tensor]:
    """State dict for entries [[name, shape, dtype], ...] of the ViT, MaxViT, ViTDet and ViT-Adapter set.

    Integer entries: `num_batches_tracked` is 0; index tables are left out (the architecture computes them).
    """
    state = {}
    for name, shape, dtype in entries:
        if dtype.startswith("float"):
            state[name] = _fill_transformers_entry(name, tuple(shape))
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
    return state


def _fill_transformers_entry(name: str, shape: tuple[int, ...]) -> Tensor:
    n, last = generator(name).standard_normal(shape), name.rpartition(".")[2]
    if last == "running_mean":
        value = 0.05 * n
    elif last == "running_var":
        value = 1 + 0.1 * np.abs(n)
    elif name.endswith("sampling_offsets.bias"):
        value = 2 * n
    elif last in {"gamma", "gamma1", "gamma2", "gamma_1", "gamma_2"}:
        value = 0.5 + 0.05 * n
    elif any(name == e or name.endswith(f".{e}") for e in _EMBEDDINGS):
        value = 0.2 * n
    elif len(shape) <= 1:
        value = 0.02 * n if last.endswith("bias") else 1 + 0.05 * n
    else:
        value = n / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(np.asarray(value).astype(np.float32))


def ssm_image(height: int, width: int) -> Tensor:
    """(1, 3, height, width), already normalised."""
    values = generator(f"image:{height}x{width}").standard_normal((1, 3, height, width))
    return torch.from_numpy(values.astype(np.float32))


def transformers_image(height: int, width: int) -> Tensor:
    """(1, 3, height, width), already normalised."""
    return torch.from_numpy(generator("input").standard_normal((1, 3, height, width)).astype(np.float32))


def ssm_subsample(full: Tensor, *, at_most: int = 4096) -> np.ndarray:
    """The values that the set stores of an output: index floor(i * n / K), K = min(n, at_most)."""
    flat = full.reshape(-1).numpy()
    kept = min(flat.size, at_most)
    return flat[np.arange(kept) * flat.size // kept]


def transformers_subsample(full: Tensor) -> np.ndarray:
    """The values that the set stores of an output: all, or 4096 spread from the first to the last."""
    flat = full.reshape(-1).numpy()
    return flat if flat.size <= 4096 else flat[np.arange(4096) * (flat.size - 1) // 4095]


def assert_close_to_golden(found: np.ndarray, golden: np.ndarray, *, std: float) -> None:
    """max |difference| <= 5e-5 std and rms difference <= 1e-5 std: what separates rounding from a mistake."""
    difference = np.abs(found.astype(np.float64) - golden)
    rms = math.sqrt(float((difference**2).mean()))
    assert difference.max() <= 5e-5 * std, f"max {difference.max() / std:.2e} std"
    assert rms <= 1e-5 * std, f"rms {rms / std:.2e} std"
