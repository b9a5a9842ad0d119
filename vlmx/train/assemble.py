"""How does the model of a run come into being: LLM, adapters, connector, on its device, whole or in shards?

One process loads the LLM as transformers does. Several divide a model that has no memory yet, and each reads its own
rows of the weights, so that none ever holds the whole. Both ways end in the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vlmx.console import note
from vlmx.errors import UsageError
from vlmx.models.adapters import adapter_start, add_adapters, is_adapter, plain_name
from vlmx.models.connectors import build_connector
from vlmx.models.folder import ModelCard
from vlmx.models.llm import is_mini, isolation_problem, load_llm
from vlmx.models.llm_parts import fill_rows, llm_without_weights, read_own_rows, restore_buffers, weight_files
from vlmx.models.packed import pack_attention
from vlmx.models.prompts import Prompt, choose_prompt
from vlmx.models.rope import round_positions
from vlmx.models.vlm import VLM
from vlmx.train.optim import decaying_names
from vlmx.train.packing import Packing, choose_packing
from vlmx.train.parallel import World, recompute_layers, shard
from vlmx.train.plan import TrainPlan
from vlmx.train.settings import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """What is trained, ready on its device.

    Attributes:
        vlm: the model.
        prompt: format of the conversations.
        tokenizer: the LLM's.
        card: what the model is.
        decaying: names of the parameters that decay.
        packing: whether its batches have packed rows.
    """

    vlm: VLM
    prompt: Prompt
    tokenizer: Any
    card: ModelCard
    decaying: frozenset[str]
    packing: Packing


def assemble(plan: TrainPlan, world: World, *, reports: bool = True) -> Trainee:
    """Load the LLM, put a new connector before it, and place both; every process takes part.

    Args:
        plan: of the training.
        world: the processes.
        reports: whether the first of them tells the user what is unusual about the LLM.

    Raises:
        WeightsError: the LLM cannot be loaded.
        UsageError: LLM, prompt format and the way of training do not go together.
    """
    config, reader = plan.config, plan.reader
    llm, tokenizer = llm_without_weights(config.llm) if world.distributed else load_llm(config.llm)
    files = weight_files(config.llm, llm) if world.distributed else None
    prompt = choose_prompt(config.prompt, tokenizer, mini_llm=is_mini(config.llm))
    require_fit(llm, config)
    notes = set_trained(llm, config)
    if world.first and reports:
        for line in (*notes, *prompt.notes):
            note(line)
    packing = choose_packing(config, llm.config, world.device)
    (packing_processes,) = world.sums([packing.on])
    if 0 < packing_processes < world.size:
        packing = Packing(on=False, text="rows padded (some processes have no fast kernel to pack them)")
    if packing.on:
        pack_attention(llm)
    dim_llm = llm.get_input_embeddings().embedding_dim
    connector = build_connector(config.connector, reader.shape.dim, dim_llm)
    vlm = VLM(connector, llm, visual_at=prompt.visual_at, eos_ids=prompt.end_ids)
    if config.activation_checkpointing:
        recompute_layers(llm)
    decaying = decaying_names(vlm)
    if world.distributed:
        _divide(vlm, config, files, world)
    else:
        vlm.to(world.device)
    for name, parameter in llm.named_parameters():
        if is_adapter(name):
            fill_rows(parameter, adapter_start(name, parameter.shape, config.seed))
    if config.rope == "bf16":
        round_positions(llm)
    card = ModelCard(
        connector=config.connector,
        dim_vision=reader.shape.dim,
        dim_llm=dim_llm,
        prompt=prompt.name,
        llm=config.llm,
        spec=reader.spec,
        grid=reader.shape.grid,
        rope=config.rope,
    )
    return Trainee(vlm=vlm, prompt=prompt, tokenizer=tokenizer, card=card, decaying=decaying, packing=packing)


def require_fit(llm: Any, config: TrainConfig) -> None:
    """Make sure that the LLM can be trained in the way that is set.

    Raises:
        UsageError: turns cannot be isolated in it.
    """
    problem = isolation_problem(llm) if config.turns == "isolated" else ""
    if problem:
        raise UsageError(
            f"turns=isolated does not work with the LLM '{config.llm}'",
            why=problem,
            fix="set turns=causal, or choose another LLM",
        )


def set_trained(llm: Any, config: TrainConfig) -> list[str]:
    """Put adapters into the LLM where they are wanted, and have trained what is to be; changes it in place.

    Returns:
        What the user should know of it, a line each.

    Raises:
        UsageError: `lora.targets` names no layer, or one that cannot have an adapter.
    """
    lora, left = config.lora, []
    if lora.r is not None:
        left = add_adapters(llm, r=lora.r, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets)
    for name, parameter in llm.named_parameters():
        parameter.requires_grad_(not config.freeze_llm and (lora.r is None or is_adapter(name)))
    return [f"no adapters for {', '.join(left)}, which are not linear layers: they stay as they are"] if left else []


def _divide(vlm: VLM, config: TrainConfig, files: Mapping[str, Path] | None, world: World) -> None:
    """Shard a model whose LLM is on the meta device, give it memory, and fill it."""
    start = {name: value.clone() for name, value in vlm.connector.state_dict().items()}
    shard(vlm, world, config.precision, config.reduce)
    vlm.to_empty(device=world.device)
    restore_buffers(vlm.llm)
    for name, target in vlm.connector.state_dict().items():
        fill_rows(target, start[name])
    if files is not None:
        read_own_rows(vlm.llm, files)
    else:
        _spread(vlm.llm, config.llm, world)


def _spread(llm: Any, name_or_path: str, world: World) -> None:
    """Have the first process load the weights as transformers does, and give each of the others its part."""
    weights = load_llm(name_or_path)[0].state_dict() if world.first else {}
    for name, target in llm.state_dict().items():
        if is_adapter(name):
            continue
        whole = torch.empty(target.shape, dtype=target.dtype, device=world.device)
        if world.first:
            whole.copy_(weights[plain_name(name)])
        dist.broadcast(whole, 0)
        fill_rows(target, whole)
