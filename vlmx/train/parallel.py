"""How do several processes train one model? Joining them, FSDP2, sums over them, and leaving.

One process uses the plain modules, with autocast for bfloat16. Several use FSDP2 (`fully_shard`), whose mixed precision
computes in bfloat16 too; the two are equal in float32 and within bfloat16's accuracy otherwise.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from vlmx.errors import UsageError
from vlmx.models.adapters import merged, transposed_layers
from vlmx.models.vlm import VLM
from vlmx.processes import rank_of, shared_device
from vlmx.train.settings import LoraConfig, Precision

DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes that train together, as torchrun started them; or this one alone."""

    rank: int
    size: int
    device: torch.device
    distributed: bool

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes, in float64."""
        if not self.distributed:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.distributed:
            dist.barrier()


def join() -> World:
    """Take the place that torchrun's environment variables give this process.

    Raises:
        UsageError: they give none, or this machine has more processes than GPUs, which NCCL cannot join.
    """
    rank = rank_of(os.environ)
    if torch.cuda.is_available() and rank.locals > torch.cuda.device_count():
        raise UsageError(
            f"this machine has {torch.cuda.device_count()} GPUs for {rank.locals} processes",
            why="in a training each process needs a GPU of its own",
            fix=f"torchrun --nproc-per-node {torch.cuda.device_count()}, or CUDA_VISIBLE_DEVICES= for the CPU",
        )
    device = shared_device(rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if rank.count > 1:
        dist.init_process_group(backend)
        dist.barrier()  # none goes on, and makes the run folder, before all have looked at it
    return World(rank=rank.index, size=rank.count, device=device, distributed=rank.count > 1)


def recompute_layers(llm: Any) -> None:
    """Have the LLM's layers compute their activations again in the backward pass; changes it in place, before
    sharding.
    """
    layers = decoder_layers(llm)
    for number, layer in enumerate(layers):
        layers[number] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.NO_REENTRANT)


def shard(vlm: VLM, world: World, precision: Precision, reduce: Precision) -> None:
    """Divide the parameters of the model among the processes, those on the meta device, too; changes it in place.

    Args:
        precision: of the computation; weights stay in float32.
        reduce: what gradients are added up in, where the computation is in bfloat16.
    """
    options: dict[str, Any] = {"mesh": init_device_mesh(world.device.type, (world.size,))}
    if precision == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=DTYPES[reduce])
    for layer in decoder_layers(vlm.llm):
        fully_shard(layer, **options)
    fully_shard(vlm, **options)


def compute_in(precision: Precision, world: World) -> AbstractContextManager[Any]:
    """The context of a forward pass: autocast where no FSDP2 policy sets the precision."""
    if precision == "bf16" and not world.distributed:
        return torch.autocast(world.device.type, torch.bfloat16)
    return nullcontext()


def decoder_layers(llm: Any) -> nn.ModuleList:
    """The LLM's stack of layers: the first list of modules that is as long as its configuration says."""
    count = llm.config.get_text_config().num_hidden_layers
    lists = (module for module in llm.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    return next(lists, nn.ModuleList())


def full_weights(vlm: VLM, world: World, lora: LoraConfig) -> Mapping[str, Tensor]:
    """The whole state dict on the CPU, gathered from all processes, adapters merged into what they adapt; empty on all
    but the first one.
    """
    if world.distributed:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: Mapping[str, Any] = get_model_state_dict(vlm, options=options)
    else:
        weights = {key: value.cpu() for key, value in vlm.state_dict().items()}
    if lora.r is None or not world.first:
        return weights
    return merged(weights, r=lora.r, alpha=lora.alpha, transposed=transposed_layers(vlm))


def leave(world: World) -> None:
    """Part from the other processes after success."""
    if world.distributed:
        dist.barrier()
        dist.destroy_process_group()


def exit_now(code: int) -> NoReturn:
    """End the process without tearing the interpreter down.

    gloo's threads can outlive the process group and abort the process while the interpreter is finalised
    (pytorch/pytorch#190489); after success that would turn a finished run into a failed job.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
