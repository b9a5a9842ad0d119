"""How does phase two train? The spine: plan -> model -> steps -> model folder, top to bottom."""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from vlmx.console import note, progress, warn
from vlmx.errors import OutOfSpaceError
from vlmx.models.folder import card_to_dict, save_model
from vlmx.models.prompts import Prompt
from vlmx.models.vlm import VLM
from vlmx.runs import RunFolder, write_atomic
from vlmx.train.assemble import Trainee, assemble
from vlmx.train.collate import build_collator
from vlmx.train.feed import Feed, Step
from vlmx.train.keeper import Keeper
from vlmx.train.meter import Alarm, Meter
from vlmx.train.optim import build_optimizer, learning_rate, lr_factor, set_learning_rates
from vlmx.train.parallel import World, full_weights
from vlmx.train.plan import TrainPlan
from vlmx.train.remarks import remarks
from vlmx.train.resume import Changes
from vlmx.train.sampler import repeats
from vlmx.train.session import Session, session
from vlmx.train.step import train_step
from vlmx.train.stopping import Stop, Stopped
from vlmx.train.trackers import open_trackers
from vlmx.train.watch import CollapseAlarm, Watch


def train(plan: TrainPlan, out: Path, world: World, *, resume: bool, changes: Changes | None = None) -> RunFolder:
    """Train, and leave a run folder with `model/` in it.

    Args:
        plan: what to train.
        out: the run folder.
        world: the processes that train together; each of them calls this.
        resume: go on from the newest whole checkpoint of `out`, or from the start if it has none.
        changes: of the run's configuration, which were insisted on; they are recorded.

    Raises:
        DataError, CacheError: the held-out questions (watch.benchmarks) or their tokens are missing; no run was made.
        WeightsError: the LLM cannot be loaded.
        UsageError: prompt format, LLM and visual tokens do not go together.
        RunError: the loss or the gradient is not finite, or the loss has exploded; another process trains in `out`, it
            is something else than a run, or a run with other data.
        CheckpointCorruptError: it cannot be resumed, as all its checkpoints are damaged.
        Stopped: SIGINT or SIGTERM came; there is a checkpoint of the last step.
        CacheCorruptError: tokens are damaged.
        OutOfSpaceError: the disk is full, at the end or when asked to stop; before that it is only reported.
    """
    run = RunFolder(out)
    watch = Watch(plan.config, plan.reader) if plan.config.watch.benchmarks else None
    with session(plan, run, world, resume=resume, changes=changes) as this:
        _train(plan, run, world, this, watch, resume=resume)
    world.barrier()
    return run


def _train(plan: TrainPlan, run: RunFolder, world: World, this: Session, watch: Watch | None, *, resume: bool) -> None:
    config = plan.config
    trainee = assemble(plan, world)
    vlm, prompt, card = trainee.vlm, trainee.prompt, trainee.card
    optimizer = build_optimizer(vlm, config.optim, trainee.decaying)
    collator = build_collator(plan, prompt, vlm.llm.config, packed=trainee.packing.on)
    feed = Feed(plan, collator, rank=world.rank, world=world.size)
    keeper = Keeper(run.path / "checkpoints", config.checkpoint, card_to_dict(card), world)
    restored = keeper.restore(vlm, optimizer) if resume else None
    start = this.start = this.done = restored.step if restored else 0
    alarm = Alarm(config.watch, restored.losses if restored else ())
    collapse = CollapseAlarm(connector=config.connector, geometry=plan.reader.spec.geometry)
    if world.first:
        notes = [*plan.notes, *remarks(config, vlm.llm.config, world)]
        _announce(plan, run, trainee, world, start, notes, resume=resume)
        for seen in watch.recall(run, start) if watch else ():
            collapse.add(seen)  # it is this process that says it, and what it said before it says no more
    counts = Counter(restored.counts if restored and world.first else {})
    vlm.train()
    with ExitStack() as stack:
        stack.callback(keeper.close)  # what is being written becomes whole, whatever ends the training
        meter = _meter(plan, run, start, stack) if world.first else None
        stop = stack.enter_context(Stop(world))
        for step in feed.steps(start):
            if meter is not None:
                meter.waited()
            done = step.index + 1
            set_learning_rates(optimizer, lr_factor(step.index, plan.schedule_steps, config.optim.warmup_ratio))
            result = train_step(vlm, optimizer, step, plan, world)
            this.done = done
            alarm.check(done, result.loss, step.example_ids)
            counts.update(_counts(step))
            if meter is not None:
                meter.trained(done, result, learning_rate(optimizer))
            if config.checkpoint.every_steps and done % config.checkpoint.every_steps == 0:
                accuracy = _look(watch, collapse, done, vlm, prompt, plan, world, meter) if watch else None
                keeper.save(done, vlm, optimizer, losses=alarm.losses, accuracy=accuracy, counts=_totals(counts, world))
            exit_code = stop.exit_code()
            if exit_code is not None and done < plan.total_steps:
                if keeper.last_step != done:
                    keeper.save(done, vlm, optimizer, losses=alarm.losses, counts=_totals(counts, world))
                keeper.close(must_be_saved=True)
                raise Stopped(done, plan.total_steps, str(run.path), exit_code)
            if meter is not None:
                meter.restart()
    weights = full_weights(vlm, world, config.lora)
    totals = _totals(counts, world)
    if world.first:
        save_model(run.path / "model", vlm, trainee.tokenizer, card, weights=weights)
        _warn_counts(totals["truncated"], totals["silent"], config.max_text_tokens)
        this.found = {
            "steps": plan.total_steps,
            "conversations_truncated": totals["truncated"],
            "conversations_without_learned_tokens": totals["silent"],
            "checkpoints_not_written": keeper.failed_steps,
            "metrics_not_written": meter.lines_lost if meter else 0,
        }


def _meter(plan: TrainPlan, run: RunFolder, start: int, stack: ExitStack) -> Meter:
    """What reports the steps, in the one process that does; closed with the stack."""
    bar = stack.enter_context(progress(f"train {run.name}", plan.total_steps - start, "steps"))
    meter = Meter(
        run,
        bar,
        open_trackers(plan.config.log_to, run, start=start),
        log_every=plan.config.log_every,
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=plan.total_steps,
    )
    stack.callback(meter.close)
    return meter


def _look(
    watch: Watch,
    collapse: CollapseAlarm,
    done: int,
    vlm: VLM,
    prompt: Prompt,
    plan: TrainPlan,
    world: World,
    meter: Meter | None,
) -> float:
    """Held-out accuracy after `done` steps; reported, with an alarm where it shows a collapse."""
    started_s = time.perf_counter()
    seen = watch.look(vlm, prompt, world, plan.config.precision)
    said = collapse.add(seen)
    if meter is not None:
        meter.paused(time.perf_counter() - started_s)
        meter.log(done, **seen.numbers)
        note(f"after step {done}: " + ", ".join(f"{name} {value:.1%}" for name, value in seen.numbers.items()))
        if said is not None:
            warn(said)
            try:
                meter.run.set_status("running", collapse=said)
            except OutOfSpaceError as error:
                warn(f"{error.what}: the alarm is not recorded")
    return seen.mean


def _announce(
    plan: TrainPlan, run: RunFolder, trainee: Trainee, world: World, start: int, notes: list[str], *, resume: bool
) -> None:
    config = plan.config
    repeated = repeats(plan.conversations, config.global_batch, config.order)
    note(
        f"{len(plan.conversations):,} conversations, {plan.steps_per_epoch:,} steps an epoch"
        + (f" ({repeated.text})" if repeated.text else "")
        + f", prompt {trainee.prompt.name}, turns {config.turns}, {trainee.packing.text},"
        f" {world.size} process{'es' if world.size > 1 else ''}, {config.precision} on {world.device.type}"
    )
    for line in notes:
        warn(line)
    lines = [line for line in run.metrics() if line["step"] <= start]
    if start:
        note(f"going on after step {start}")
    elif resume and any(run.metrics()):
        note("there is no checkpoint yet: starting from the beginning")
    write_atomic(run.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    run.set_status(
        "running",
        prompt=trainee.prompt.name,
        packed=trainee.packing.on,
        repeated_conversations=repeated.conversations,
        most_often_seen=repeated.most,
        resumed_after_step=start,
        notes=notes,
    )


def _counts(step: Step) -> dict[str, int]:
    return {
        "truncated": sum(m.truncated for m in step.micro_batches),
        "silent": sum(m.silent for m in step.micro_batches),
    }


def _totals(counts: Counter[str], world: World) -> dict[str, int]:
    """The counts of all processes."""
    names = ("truncated", "silent")
    return {name: int(total) for name, total in zip(names, world.sums([counts[n] for n in names]), strict=True)}


def _warn_counts(truncated: int, silent: int, max_text_tokens: int) -> None:
    if truncated:
        warn(f"{truncated} conversations were cut (max_text_tokens={max_text_tokens}, or the LLM's context)")
    if silent:
        warn(f"{silent} conversations had no token to learn from")
