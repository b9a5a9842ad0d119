"""How are weights changed? AdamW's parameter groups, the learning rate of each step, and clipping.

Formulas and constants are those of prismatic-vlms (`training/strategies/fsdp.py`), which the paper follows, with one
difference: groups are built here from the original shapes, before sharding flattens them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlmx.train.settings import OptimConfig


def decaying_names(model: nn.Module) -> frozenset[str]:
    """Parameters that decay: two or more dimensions, and not a bias. Call it after wrapping and before sharding."""
    return frozenset(n for n, p in model.named_parameters() if p.ndim >= 2 and not n.endswith(".bias"))


def build_optimizer(model: nn.Module, config: OptimConfig, decaying: frozenset[str]) -> torch.optim.AdamW:
    """AdamW over what is trained, with up to four groups, connector or LLM, decaying or not; each group knows its own
    "peak_lr".
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    assert decaying <= {name for name, _ in model.named_parameters()}, "modules were wrapped in between"
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        groups.setdefault((name.startswith("connector."), name in decaying), []).append(parameter)
    connector_lr = config.connector_lr or config.lr
    optimizer = torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if decays else 0.0,
                "peak_lr": connector_lr if in_connector else config.lr,
            }
            for (in_connector, decays), parameters in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        foreach=True,
    )
    # All moments are there from the start, so that a checkpoint has those of the connector even before its first image.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return optimizer


def lr_factor(step: int, total_steps: int, warmup_ratio: float) -> float:
    """The part of the peak learning rate at `step` (from 0): up linearly from 0, which the first step has, then down
    along a cosine.
    """
    warmup = int(total_steps * warmup_ratio)
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give each group its peak rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The present rate of the LLM, or of the connector where only that learns."""
    return float(optimizer.param_groups[-1]["lr"])  # the connector's parameters come first


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, *, distributed: bool) -> float:
    """Scale gradients down to a global norm of `max_norm` and return the norm before.

    Squares are summed in float64, so the norm hardly depends on how the parameters are spread over processes. Nothing
    is scaled when the norm is not finite: the caller stops then. Either all processes have gradients or none has.
    """
    gradients = [_local(p.grad) for p in parameters if p.grad is not None]
    if not gradients:  # only the connector learns, and the batch has no image
        return 0.0
    squares = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in gradients]).sum()
    if distributed:
        torch.distributed.all_reduce(squares)
    norm = math.sqrt(float(squares))
    if math.isfinite(norm) and norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / norm)
    return norm


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
