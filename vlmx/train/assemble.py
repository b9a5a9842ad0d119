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

from vlmx.errors import UsageError
from vlmx.models.adapters import adapter_start, add_adapters, is_adapter, plain_name
from vlmx.models.connectors import build_connector
from vlmx.models.folder import ModelCard
from vlmx.models.llm import has_sliding_window, is_mini, load_llm
from vlmx.models.llm_parts import fill_rows, llm_without_weights, read_own_rows, restore_buffers, weight_files
from vlmx.models.prompts import Prompt, choose_prompt
from vlmx.models.rope import round_positions
from vlmx.models.vlm import VLM
from vlmx.train.optim import decaying_names
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
    """

    vlm: VLM
    prompt: Prompt
    tokenizer: Any
    card: ModelCard
    decaying: frozenset[str]


def assemble(plan: TrainPlan, world: World) -> Trainee:
    """Load the LLM, put a new connector before it, and place both; every process takes part.

    Raises:
        WeightsError: the LLM cannot be loaded.
        UsageError: LLM, prompt format and the way of training do not go together.
    """
    config, reader = plan.config, plan.reader
    llm, tokenizer = llm_without_weights(config.llm) if world.distributed else load_llm(config.llm)
    files = weight_files(config.llm, llm) if world.distributed else None
    prompt = choose_prompt(config.prompt, tokenizer, mini_llm=is_mini(config.llm))
    if config.turns == "isolated" and has_sliding_window(llm.config.get_text_config()):
        raise UsageError(
            f"turns=isolated does not work with the LLM '{config.llm}'",
            why="its layers attend within a sliding window, which the mask of isolated turns would lift",
            fix="set turns=causal, or choose another LLM",
        )
    set_trained(llm, config)
    dim_llm = llm.get_input_embeddings().embedding_dim
    connector = build_connector(config.connector, reader.shape.dim, dim_llm)
    vlm = VLM(connector, llm, visual_at=prompt.visual_at, eos_ids=[tokenizer.eos_token_id])
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
    return Trainee(vlm=vlm, prompt=prompt, tokenizer=tokenizer, card=card, decaying=decaying)


def set_trained(llm: Any, config: TrainConfig) -> None:
    """Put adapters into the LLM where they are wanted, and have trained what is to be; changes it in place.

    Raises:
        UsageError: no layer has one of the names in `lora.targets`.
    """
    lora = config.lora
    if lora.r is not None:
        add_adapters(llm, r=lora.r, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets)
    for name, parameter in llm.named_parameters():
        parameter.requires_grad_(not config.freeze_llm and (lora.r is None or is_adapter(name)))


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
