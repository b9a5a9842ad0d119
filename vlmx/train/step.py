"""What happens in one optimiser step?

The loss of a step is the sum over its learned tokens of all processes and micro-batches, divided by their number; so it
does not depend on how the batch is divided. With `loss_mean: answers` each answer counts the same, however long it is;
`loss_mean: microbatch` gives the reference's mean of means instead.
"""

from __future__ import annotations

import math
from zlib import crc32

import torch

from vlmx.errors import RunError
from vlmx.models.vlm import VLM
from vlmx.train.feed import Step
from vlmx.train.meter import StepResult
from vlmx.train.optim import clip_gradients
from vlmx.train.parallel import World, compute_in
from vlmx.train.plan import TrainPlan


def train_step(vlm: VLM, optimizer: torch.optim.Optimizer, step: Step, plan: TrainPlan, world: World) -> StepResult:
    """One optimiser step over the global batch.

    Raises:
        RunError: the loss or the gradient is not finite; the weights are those of the step before.
    """
    config = plan.config
    torch.manual_seed(crc32(f"{config.seed} {step.index} {world.rank}".encode()))  # dropout; makes resuming exact
    parts = step.micro_batches
    local = [sum(m.supervised for m in parts), sum(m.weight for m in parts), sum(m.tokens for m in parts), len(parts)]
    supervised, weight, tokens, micro_batches, images = world.sums([*local, len(step.images)])
    optimizer.zero_grad(set_to_none=True)
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    for micro in step.micro_batches:
        divisor = micro.supervised * micro_batches if config.loss_mean == "microbatch" else weight
        with compute_in(config.precision, world):
            loss = vlm(micro.batch.to(world.device)) / max(1.0, divisor)
        (loss * world.size).backward()  # gradients are averaged over processes: the factor makes them sums
        loss_sum += loss.detach()
    if not images:
        # The connector took part, as each process must, but has learned nothing: moments of earlier steps, and decay,
        # are not to move it, as in the reference, which does not call it for a batch of text.
        vlm.connector.zero_grad(set_to_none=True)
    (loss_value,) = world.sums([float(loss_sum)])
    norm = clip_gradients(vlm.parameters(), config.optim.max_grad_norm, distributed=world.distributed)
    if not (math.isfinite(loss_value) and math.isfinite(norm)):
        raise RunError(
            f"training stopped at step {step.index + 1}: the loss is {loss_value}, the gradient's norm {norm}",
            why=f"its batch was {', '.join(step.example_ids)}",
            fix="look at these examples; --resume goes on from the last checkpoint, --resume-anyway optim.lr=... with"
            " another learning rate",
        )
    optimizer.step()
    return StepResult(loss=loss_value, grad_norm=norm, supervised=int(supervised), tokens=int(tokens))
