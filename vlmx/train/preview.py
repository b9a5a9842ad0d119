"""What would a training do, how much memory and time does it want? `vlmx train --dry-run`: no run is written.

Steps and batches are exact. Tokens are counted on steps spread over the run, the largest micro-batch is looked for in
the steps with the most text. Memory is an estimate from shapes, for
LLMs of Llama's build; time is that of one measured step, where that takes seconds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlmx.console import format_bytes, format_seconds, note, table, warn
from vlmx.models.connectors import build_connector
from vlmx.models.llm import is_mini
from vlmx.models.llm_parts import llm_without_weights
from vlmx.models.prompts import choose_prompt
from vlmx.train.assemble import assemble, require_fit, set_trained
from vlmx.train.collate import build_collator
from vlmx.train.feed import Feed, Step
from vlmx.train.optim import build_optimizer, set_learning_rates
from vlmx.train.packing import Packing, choose_packing
from vlmx.train.parallel import World
from vlmx.train.plan import TrainPlan
from vlmx.train.step import train_step
from vlmx.train.survey import Survey, survey

BATCHES_SHOWN, IDS_SHOWN, STEPS_COUNTED, DEAREST = 3, 6, 16, 2
CHEAP_FLOPS = {"cpu": 1e12, "cuda": 1e14}  # seconds of work
LIBRARIES = "0.45 GB"  # peak of processes that trained 40 thousand parameters (torch 2.13 for CPUs, transformers 5.23)
STATE_BYTES = 16  # of a trained parameter in float32: itself, its gradient, two moments


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Numbers of an LLM that its memory follows from: parameters trained, frozen, of the dearest unit; and shapes."""

    trained: int
    frozen: int
    largest_unit: int
    layers: int
    width: int
    inner: int
    keys: int
    vocabulary: int


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a training would do.

    Attributes:
        digest: of the order of the first epoch.
        first_batches: example ids of the first steps.
        tokens, supervised, padded: of a mean step, over all processes: real ones, learned ones, computed ones.
        sizes: of the model.
        rows, positions, learned: of the largest micro-batch of all steps; packed rows share the positions.
        packing: whether rows are packed.
        state_bytes, gathered_bytes, activation_bytes: memory of one process.
        step_s: seconds of a mean step; None: not measured.
        survey: conversations that are cut, or have nothing to learn.
        prompt: format of the conversations.
        notes: what is unusual about the LLM and its prompts.
    """

    digest: str
    first_batches: tuple[tuple[str, ...], ...]
    tokens: float
    supervised: float
    padded: float
    sizes: ModelSizes
    rows: int
    positions: int
    learned: int
    packing: Packing
    state_bytes: float
    gathered_bytes: float
    activation_bytes: float
    step_s: float | None
    survey: Survey
    prompt: str
    notes: tuple[str, ...]


def preview(plan: TrainPlan, world_size: int) -> Preview:
    """Look at what a training would do.

    Args:
        plan: of the training.
        world_size: processes that would train together.

    Raises:
        WeightsError: there is no such LLM.
        UsageError: LLM, prompt format and visual tokens do not go together.
    """
    config = plan.config
    llm, tokenizer = llm_without_weights(config.llm)
    prompt = choose_prompt(config.prompt, tokenizer, mini_llm=is_mini(config.llm))
    packing = choose_packing(config, llm.config, _device())
    collator = build_collator(plan, prompt, llm.config, packed=packing.on)
    feeds = [Feed(plan, collator, rank=rank, world=world_size) for rank in range(world_size)]
    every = max(1, plan.total_steps // STEPS_COUNTED)
    counted = [[feed.draft(index) for feed in feeds] for index in range(0, plan.total_steps, every)]
    parts = [micro for step in counted for share in step for micro in share.micro_batches]
    dear = [micro for index in dearest_steps(feeds[0]) for feed in feeds for micro in feed.draft(index).micro_batches]
    largest = max((micro.batch for micro in parts + dear), key=lambda batch: batch.input_ids_BT.numel())
    learned = max(micro.supervised for micro in parts + dear)
    require_fit(llm, config)
    notes = set_trained(llm, config)
    sizes = _sizes(plan, llm)
    first = [_ids(feeds[0].draft(index)) for index in range(min(BATCHES_SHOWN, plan.total_steps))]
    padded = sum(micro.batch.input_ids_BT.numel() for micro in parts) / len(counted)
    return Preview(
        digest=feeds[0].digest(),
        first_batches=tuple(first),
        tokens=sum(micro.tokens for micro in parts) / len(counted),
        supervised=sum(micro.supervised for micro in parts) / len(counted),
        padded=padded,
        sizes=sizes,
        rows=len(largest.lengths or largest.input_ids_BT),
        positions=largest.input_ids_BT.shape[1],
        packing=packing,
        learned=learned,
        state_bytes=(STATE_BYTES * sizes.trained + 4 * sizes.frozen) / world_size,
        gathered_bytes=0 if world_size == 1 else 2 * sizes.largest_unit * (2 if config.precision == "bf16" else 4),
        activation_bytes=activation_bytes(
            sizes,
            tokens=largest.input_ids_BT.numel(),
            learned=learned,
            half=config.precision == "bf16",
            recompute=config.activation_checkpointing,
        ),
        step_s=_measured_step_s(plan, sizes, padded) if world_size == 1 else None,
        survey=survey(plan, collator),
        prompt=prompt.name,
        notes=(*prompt.notes, *notes, *_rough(llm)),
    )


def dearest_steps(feed: Feed) -> list[int]:
    """The steps of the first epoch that have the longest conversations or the most text, those with images and those
    without: the largest micro-batch is among theirs, unless words and tokens go far apart.
    """
    words_SB = feed.sizes.words[feed.batches_of(0)[: feed.plan.total_steps]]
    image_S = feed.sizes.has_image[feed.batches_of(0)[: feed.plan.total_steps]].any(axis=1)
    found: set[int] = set()
    for of_kind_S in (image_S, ~image_S):
        for words_S in (words_SB.max(axis=1), words_SB.sum(axis=1)):
            steps = np.flatnonzero(of_kind_S)
            found.update(steps[np.argsort(-words_S[steps], kind="stable")[:DEAREST]].tolist())
    return sorted(found)


def show(seen: Preview, plan: TrainPlan, world_size: int) -> None:
    """Print a preview for people."""
    config = plan.config
    for line in (*plan.notes, *seen.notes):
        warn(line)
    if plan.sources:
        rows = [[s.folder, f"{s.found:,}", f"{s.published:,}", ", ".join(s.data_sets)] for s in plan.sources]
        table(["images in", "found", "published", "data sets"], rows, title="the LLaVA-1.5 mixture, conversations")
    alone = sum(conversation.image is None for conversation in plan.conversations)
    total = seen.state_bytes + seen.gathered_bytes + seen.activation_bytes
    table(
        ["", ""],
        [
            [
                "conversations",
                f"{len(plan.conversations):,}: {len(plan.conversations) - alone:,} about"
                f" {len(plan.image_ids):,} images, {alone:,} text only",
            ],
            ["of these", seen.survey.text],
            ["prompt", seen.prompt],
            ["steps", f"{plan.total_steps:,} ({plan.steps_per_epoch:,} an epoch of {config.global_batch} a step)"],
            ["batch order", f"{config.order}, digest {seen.digest}"],
            ["tokens of a step", f"{seen.tokens:,.0f}, {seen.supervised:,.0f} of them learned"],
            ["tokens of the run", f"about {seen.tokens * plan.total_steps:,.0f}"],
            ["padding", f"{seen.padded / seen.tokens - 1:.0%} more are computed"],
            [
                "largest micro-batch",
                f"{seen.rows} rows {'in' if seen.packing.on else 'of'} {seen.positions} positions,"
                f" {seen.learned} learned; {seen.packing.text}",
            ],
            ["parameters", f"{seen.sizes.trained:,} trained, {seen.sizes.frozen:,} frozen"],
            [
                "memory of a process",
                f"about {format_bytes(total)}: weights, gradients and moments {format_bytes(seen.state_bytes)}"
                + (f", gathered weights {format_bytes(seen.gathered_bytes)}" if world_size > 1 else "")
                + f", activations {format_bytes(seen.activation_bytes)}{_besides()}",
            ],
            ["time", _time(seen, plan)],
        ],
        title=f"{config.cache} with {world_size} process{'es' if world_size > 1 else ''}",
    )
    for number, ids in enumerate(seen.first_batches, start=1):
        rest = f" and {len(ids) - IDS_SHOWN} more" if len(ids) > IDS_SHOWN else ""
        note(f"step {number}: {', '.join(ids[:IDS_SHOWN])}{rest}")


def activation_bytes(sizes: ModelSizes, *, tokens: int, learned: int, half: bool, recompute: bool) -> float:
    """Memory that the backward pass of one micro-batch needs beside the weights, estimated.

    A layer of Llama's build keeps four tensors of its inner width and eight of its own, in bfloat16 half of these are
    still float32; with recomputation it keeps its input, and one layer at a time all of it. Logits are held three
    times.

    Args:
        sizes: of the model.
        tokens: positions of the micro-batch, padding included.
        learned: positions at which there are logits.
        half: computed in bfloat16.
        recompute: layers are recomputed.
    """
    narrow = 2 if half else 4
    layer = narrow * (4 * sizes.inner + 2 * sizes.keys) + (34 if half else 32) * sizes.width
    stacked = 4 * sizes.width * sizes.layers + layer if recompute else layer * sizes.layers
    return float(tokens * stacked + 12 * learned * sizes.vocabulary)


def _sizes(plan: TrainPlan, llm: Any) -> ModelSizes:
    text = llm.config.get_text_config()
    width = llm.get_input_embeddings().embedding_dim
    heads = getattr(text, "num_attention_heads", None)  # state-space models have none
    head_dim = (getattr(text, "head_dim", None) or width // heads) if heads else width
    connector = build_connector(plan.config.connector, plan.reader.shape.dim, width)
    in_connector = sum(p.numel() for p in connector.parameters())
    whole = sum(p.numel() for p in llm.parameters())
    trained = sum(p.numel() for p in llm.parameters() if p.requires_grad)
    ends = sum(p.numel() for module in _ends(llm) for p in module.parameters())
    return ModelSizes(
        trained=trained + in_connector,
        frozen=whole - trained,
        largest_unit=max(ends + in_connector, (whole - ends) // text.num_hidden_layers),
        layers=text.num_hidden_layers,
        width=width,
        inner=getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * width,
        keys=(getattr(text, "num_key_value_heads", None) or heads or 1) * head_dim,
        vocabulary=text.vocab_size,
    )


def _ends(llm: Any) -> list[Any]:
    """Embedding and head, once if they are one matrix."""
    embedding, head = llm.get_input_embeddings(), llm.get_output_embeddings()
    return [embedding] if head.weight is embedding.weight else [embedding, head]


def _measured_step_s(plan: TrainPlan, sizes: ModelSizes, padded: float) -> float | None:
    """Seconds of a mean step in this process; None where a step is too dear to be tried."""
    device = _device()
    recomputed = 4 / 3 if plan.config.activation_checkpointing else 1
    if 6 * (sizes.trained + sizes.frozen) * padded * recomputed > CHEAP_FLOPS[device.type]:
        return None
    world = World(rank=0, size=1, device=device, distributed=False)
    trainee = assemble(plan, world, reports=False)
    optimizer = build_optimizer(trainee.vlm, plan.config.optim, trainee.decaying)
    set_learning_rates(optimizer, 0.0)
    trainee.vlm.train()
    collator = build_collator(plan, trainee.prompt, trainee.vlm.llm.config, packed=trainee.packing.on)
    feed = Feed(plan, collator, rank=0, world=1)
    steps = feed.steps(max(0, plan.total_steps - 2))
    taken_s = computed = 0.0
    for step in steps:  # the first one also allocates; the last one counts
        begin_s = time.perf_counter()
        train_step(trainee.vlm, optimizer, step, plan, world)
        taken_s = time.perf_counter() - begin_s
        computed = sum(micro.batch.input_ids_BT.numel() for micro in step.micro_batches)
    return taken_s * padded / computed


def _rough(llm: Any) -> tuple[str, ...]:
    if getattr(llm.config.get_text_config(), "num_attention_heads", None):
        return ()
    return ("the LLM has no attention heads: the memory of its activations is estimated as if it had, and may be more",)


def _besides() -> str:
    """What a process holds before it has a model; the memory that a GPU's allocator reports does not count it."""
    return "" if _device().type == "cuda" else f"; Python and its libraries, about {LIBRARIES}, come on top"


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _time(seen: Preview, plan: TrainPlan) -> str:
    if seen.step_s is None:
        return "not measured: a step takes too long to try, or needs all processes"
    return f"about {format_seconds(seen.step_s * plan.total_steps)} on this machine, {seen.step_s:.2f} s a step"


def _ids(step: Step) -> tuple[str, ...]:
    return tuple(step.example_ids)
