"""How does phase two train? The spine: plan -> model -> steps -> model folder, top to bottom.

The loss of a step is the sum over its learned tokens of all processes and micro-batches, divided by their number; so it
does not depend on how the batch is divided. With `loss_mean: answers` each answer counts the same, however long it is;
`loss_mean: microbatch` gives the reference's mean of means instead.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmx.console import Progress, note, progress, warn
from vlmx.errors import RunError, UsageError, VlmxError
from vlmx.models.connectors import build_connector
from vlmx.models.folder import ModelCard, save_model
from vlmx.models.llm import has_rotary_positions, has_sliding_window, is_mini, load_llm
from vlmx.models.prompts import Prompt, choose_prompt
from vlmx.models.vlm import VLM
from vlmx.runs import RunFolder, write_atomic
from vlmx.train.checkpoints import load_checkpoint, save_checkpoint, saved_steps
from vlmx.train.collate import Collator
from vlmx.train.feed import Feed, Step
from vlmx.train.optim import build_optimizer, clip_gradients, decaying_names, lr_factor, set_learning_rates
from vlmx.train.parallel import World, compute_in, full_weights, place, recompute_layers
from vlmx.train.plan import TrainPlan

MIN_TEXT_POSITIONS = 16


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimiser step did, over all processes."""

    loss: float
    grad_norm: float
    supervised: int
    tokens: int


def train(plan: TrainPlan, out: Path, world: World, *, resume: bool) -> RunFolder:
    """Train, and leave a run folder with `model/` in it.

    Args:
        plan: what to train.
        out: the run folder.
        world: the processes that train together; each of them calls this.
        resume: go on from the newest checkpoint of `out`, or from the start if it has none.

    Raises:
        WeightsError: the LLM cannot be loaded.
        UsageError: prompt format, LLM and visual tokens do not go together.
        RunError: the loss or the gradient is not finite.
        CacheCorruptError: tokens are damaged.
        OutOfSpaceError: the disk is full.
    """
    run = RunFolder(out)
    if world.first:
        RunFolder.create(out, kind="train", config=plan.config.model_dump(mode="json"))
    try:
        _train(plan, run, world, resume=resume)
    except (VlmxError, KeyboardInterrupt) as error:
        if world.first:
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            run.set_status(state, error=str(error))  # type: ignore[arg-type]  # one of two literals
        raise
    return run


def _train(plan: TrainPlan, run: RunFolder, world: World, *, resume: bool) -> None:
    config, started_s = plan.config, time.perf_counter()
    vlm, prompt, tokenizer, card = build_model(plan)
    max_positions = check_context(vlm.llm.config, plan.reader.num_tokens)
    if config.activation_checkpointing:
        recompute_layers(vlm.llm)
    decaying = decaying_names(vlm)
    place(vlm, world, config.precision)
    optimizer = build_optimizer(vlm, config.optim, decaying)
    collator = Collator(
        prompt,
        plan.reader,
        plan.image_ids,
        isolated=config.turns == "isolated",
        by_answer=config.loss_mean == "answers",
        max_text_tokens=config.max_text_tokens,
        max_positions=max_positions,
    )
    feed = Feed(plan, collator, rank=world.rank, world=world.size)
    checkpoints = run.path / "checkpoints"
    start = max(saved_steps(checkpoints), default=0) if resume else 0
    if start:
        load_checkpoint(checkpoints, start, vlm, optimizer, world)
    if world.first:
        _announce(plan, run, feed, prompt, world, start)
    counts: Counter[str] = Counter()
    vlm.train()
    shown = progress(f"train {run.name}", plan.total_steps - start, "steps") if world.first else nullcontext()
    with shown as bar:
        meter = _Meter(run, plan, bar)
        for step in feed.steps(start):
            meter.waited()
            factor = lr_factor(step.index, plan.total_steps, config.optim.warmup_ratio)
            set_learning_rates(optimizer, factor)
            result = train_step(vlm, optimizer, step, plan, world)
            counts.update(_counts(step))
            meter.trained(step.index + 1, result, factor * config.optim.lr)
            every = config.checkpoint.every_steps
            if every and (step.index + 1) % every == 0:
                keep = config.checkpoint.keep
                save_checkpoint(checkpoints, step.index + 1, vlm, optimizer, world, keep=keep)
            meter.restart()
    weights = full_weights(vlm, world)
    truncated, silent = world.sums([counts["truncated"], counts["silent"]])
    if world.first:
        save_model(run.path / "model", vlm, tokenizer, card, weights=weights)
        _warn_counts(int(truncated), int(silent), config.max_text_tokens)
        run.set_status(
            "done",
            ended=time.strftime("%Y-%m-%dT%H:%M:%S"),
            seconds=round(time.perf_counter() - started_s, 1),
            steps=plan.total_steps,
            conversations_truncated=int(truncated),
            conversations_without_learned_tokens=int(silent),
        )
    world.barrier()


def train_step(vlm: VLM, optimizer: torch.optim.Optimizer, step: Step, plan: TrainPlan, world: World) -> StepResult:
    """One optimiser step over the global batch.

    Raises:
        RunError: the loss or the gradient is not finite; the weights are those of the step before.
    """
    config = plan.config
    torch.manual_seed((config.seed << 40) + step.index * world.size + world.rank)  # dropout; makes resuming exact
    parts = step.micro_batches
    local = [sum(m.supervised for m in parts), sum(m.weight for m in parts), sum(m.tokens for m in parts), len(parts)]
    supervised, weight, tokens, micro_batches = world.sums(local)
    optimizer.zero_grad(set_to_none=True)
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    for micro in step.micro_batches:
        divisor = micro.supervised * micro_batches if config.loss_mean == "microbatch" else weight
        with compute_in(config.precision, world):
            loss = vlm(micro.batch.to(world.device)) / max(1.0, divisor)
        (loss * world.size).backward()  # gradients are averaged over processes: the factor makes them sums
        loss_sum += loss.detach()
    (loss_value,) = world.sums([float(loss_sum)])
    norm = clip_gradients(vlm.parameters(), config.optim.max_grad_norm, distributed=world.distributed)
    if not (math.isfinite(loss_value) and math.isfinite(norm)):
        raise RunError(
            f"training stopped at step {step.index + 1}: the loss is {loss_value}, the gradient's norm {norm}",
            why=f"its batch was {', '.join(step.example_ids)}",
            fix="look at these examples, or lower optim.lr; --resume goes on from the last checkpoint",
        )
    optimizer.step()
    return StepResult(loss=loss_value, grad_norm=norm, supervised=int(supervised), tokens=int(tokens))


def build_model(plan: TrainPlan) -> tuple[VLM, Prompt, Any, ModelCard]:
    """Load the LLM and put a new connector before it: (model, prompt format, tokenizer, card)."""
    config, reader = plan.config, plan.reader
    llm, tokenizer = load_llm(config.llm)
    prompt = choose_prompt(config.prompt, tokenizer, mini_llm=is_mini(config.llm))
    if config.turns == "isolated" and has_sliding_window(llm.config.get_text_config()):
        raise UsageError(
            f"turns=isolated does not work with the LLM '{config.llm}'",
            why="its layers attend within a sliding window, which the mask of isolated turns would lift",
            fix="set turns=causal, or choose another LLM",
        )
    dim_llm = llm.get_input_embeddings().embedding_dim
    connector = build_connector(config.connector, reader.shape.dim, dim_llm)
    vlm = VLM(connector, llm, visual_at=prompt.visual_at, eos_ids=[tokenizer.eos_token_id])
    card = ModelCard(
        connector=config.connector,
        dim_vision=reader.shape.dim,
        dim_llm=dim_llm,
        prompt=prompt.name,
        llm=config.llm,
        spec=reader.spec,
        grid=reader.shape.grid,
    )
    return vlm, prompt, tokenizer, card


def check_context(llm_config: Any, visual_tokens: int) -> int | None:
    """The number of positions that an LLM with a table of positions has; None for rotary LLMs, which have no such end.

    Raises:
        UsageError: the table has no room for the visual tokens and a short text.
    """
    context = getattr(llm_config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return None
    if has_rotary_positions(llm_config.get_text_config()):
        if visual_tokens >= context:
            warn(f"{visual_tokens} visual tokens are more than the LLM's context of {context}")
        return None
    if visual_tokens + MIN_TEXT_POSITIONS > context:
        raise UsageError(
            f"{visual_tokens} visual tokens do not fit the LLM",
            why=f"it has a table of {context} positions, and text needs some of them",
            fix="choose an LLM with a longer context, or a cache of a lower resolution",
        )
    return int(context)


class _Meter:
    """Where a run's time goes: the progress line, and metrics.jsonl every `log_every` steps."""

    def __init__(self, run: RunFolder, plan: TrainPlan, bar: Progress | None) -> None:
        self.run = run
        self.plan = plan
        self.bar = bar
        self.wait_s = 0.0
        self.tokens = 0
        self.window_start_s = self.mark_s = time.perf_counter()

    def restart(self) -> None:
        self.mark_s = time.perf_counter()

    def waited(self) -> None:
        self.wait_s += time.perf_counter() - self.mark_s

    def trained(self, done: int, result: StepResult, lr: float) -> None:
        if self.bar is None:
            return
        self.tokens += result.tokens
        now_s = time.perf_counter()
        elapsed_s = now_s - self.window_start_s
        rate, waiting = self.tokens / elapsed_s, self.wait_s / elapsed_s
        self.bar.advance(
            1, loss=f"{result.loss:.4f}", lr=f"{lr:.2e}", **{"tokens/s": f"{rate:,.0f}", "data wait": f"{waiting:.0%}"}
        )
        if done % self.plan.config.log_every == 0 or done == self.plan.total_steps:
            self.run.log(
                step=done,
                epoch=round(done / self.plan.steps_per_epoch, 4),
                loss=result.loss,
                lr=lr,
                grad_norm=result.grad_norm,
                supervised_tokens=result.supervised,
                tokens_per_s=round(rate, 1),
                data_wait=round(waiting, 4),
            )
            self.wait_s, self.tokens, self.window_start_s = 0.0, 0, now_s


def _announce(plan: TrainPlan, run: RunFolder, feed: Feed, prompt: Prompt, world: World, start: int) -> None:
    config = plan.config
    repeats = plan.steps_per_epoch * config.global_batch - len(plan.conversations)
    note(
        f"{len(plan.conversations):,} conversations, {plan.steps_per_epoch:,} steps an epoch"
        f" ({repeats} conversations are seen twice to complete batches), prompt {prompt.name}, turns {config.turns},"
        f" {world.size} process{'es' if world.size > 1 else ''}, {config.precision} on {world.device.type}"
    )
    for line in plan.notes:
        warn(line)
    if start:
        note(f"going on after step {start}")
    lines = [line for line in run.metrics() if line["step"] <= start]
    write_atomic(run.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    run.set_status(
        "running",
        prompt=prompt.name,
        order_digest=feed.digest(),
        fingerprint=plan.reader.spec.fingerprint,
        repeated_conversations=repeats,
        resumed_after_step=start,
        notes=list(plan.notes),
    )


def _counts(step: Step) -> dict[str, int]:
    return {
        "truncated": sum(m.truncated for m in step.micro_batches),
        "silent": sum(m.silent for m in step.micro_batches),
    }


def _warn_counts(truncated: int, silent: int, max_text_tokens: int) -> None:
    if truncated:
        warn(f"{truncated} conversations were cut (max_text_tokens={max_text_tokens}, or the LLM's table of positions)")
    if silent:
        warn(f"{silent} conversations had no token to learn from")
