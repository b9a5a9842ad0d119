"""The command `vlmx train`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vlmx.cache_specs.command import complete_caches
from vlmx.console import note
from vlmx.errors import ConfigError, RunError, UsageError, VlmxError
from vlmx.processes import rank_of
from vlmx.runs import RunFolder

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from vlmx.cache_specs.presets import Preset
    from vlmx.train.settings import TrainConfig

SAYS_FIRST_S = 20.0

EPILOG = """
\b
Examples
  vlmx train --cache vit-mini-scenes --connector mlp2
  vlmx train --cache vit-mini-scenes optim.lr=5e-4 max_steps=200 --out runs/try
  vlmx train --out runs/try --resume
  vlmx train --cache vit-mini-scenes --cache vmamba-mini-scenes
  vlmx train --cache none --backbone vit-mini-scenes
  vlmx train --cache vit-mini-scenes --dry-run
  torchrun --nproc-per-node 2 -m vlmx train --cache vmamba-mini-scenes
  torchrun --nproc-per-node 8 -m vlmx train --cache vmamba-s-coco@512 \\
      --config paper --profile paper --llm models/vicuna-7b --data llava_v1_5_mix665k.json
  vlmx train --row dinov2-l+siglip-so400m-384@384/mlp3 --llm models/vicuna-7b --data llava_v1_5_mix665k.json

`vlmx train --keys` lists all keys with their defaults.
"""


def _complete_connector(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from vlmx.models.connectors import CONNECTORS

    return [CompletionItem(name) for name in CONNECTORS.names() if name.startswith(incomplete)]


def _complete_row(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from vlmx.cache_specs.presets import presets

    return [CompletionItem(row.name) for row in presets() if row.name.startswith(incomplete)]


def _complete_preset(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from vlmx.train.settings import preset_names

    return [CompletionItem(name) for name in preset_names() if name.startswith(incomplete)]


def _list_keys(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value:
        return
    from vlmx.console import table
    from vlmx.train.settings import described_keys

    table(["key", "default", "meaning"], [list(row) for row in described_keys()])
    ctx.exit()


@click.command("train", epilog=EPILOG, short_help="Train a connector and a language model on a cache.")
@click.option(
    "--cache",
    "cache_names",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_caches,
    help="Cache: name, prefix of it, path or url. Given twice, the tokens of both are joined on the channel axis. "
    "none: no cache, --backbone encodes on the fly.",
)
@click.option("--caches", metavar="FOLDER", default="caches", show_default=True, help="Folder (or url) of all caches.")
@click.option("--pull", metavar="FOLDER", help="Copy a remote cache to this folder, shard by shard, as it is used.")
@click.option("--backbone", metavar="NAME", help="With --cache none: the encoder (vlmx list backbones).")
@click.option("--res", metavar="RES", help="With --cache none: its input size, 512 or HEIGHTxWIDTH.")
@click.option("--weights", metavar="FILE", help="With --cache none: its checkpoint, or random:SEED.")
@click.option("--image-root", metavar="FOLDER", help="With --cache none: where the image paths of --data start.")
@click.option("--connector", metavar="NAME", shell_complete=_complete_connector, help="linear, mlp2, mlp3.")
@click.option(
    "--row",
    "row_name",
    metavar="ROW",
    shell_complete=_complete_row,
    help="A row of the paper (vlmx list rows): its cache or caches, and its connector.",
)
@click.option("--llm", metavar="LLM", help="mini, a Hugging Face folder, or a hub id.")
@click.option("--data", metavar="DATA", help="mini, or a LLaVA-style .json, .jsonl or .parquet file.")
@click.option(
    "--config",
    metavar="PRESET|FILE",
    shell_complete=_complete_preset,
    help="A preset (mini, paper) or a YAML file. Without it: mini for the mini study, paper for other data.",
)
@click.option(
    "--profile",
    metavar="PROFILE",
    help="paper: compute as the reference did where that is not what its description says; goes with any --config.",
)
@click.option("--dry-run", is_flag=True, help="Show batches, tokens, memory and time; train nothing, write no run.")
@click.option("--out", metavar="FOLDER", help="Run folder.  [default: runs/<cache>-<connector>-<data>]")
@click.option("--resume", is_flag=True, help="Go on with the run in --out: same command again, or --out alone.")
@click.option(
    "--resume-anyway",
    is_flag=True,
    help="Like --resume, even with another configuration, as far as weights and batches allow.",
)
@click.option(
    "--log-to",
    multiple=True,
    metavar="TRACKER",
    help="Where else metrics go: tensorboard, trackio, wandb; may be given more than once.",
)
@click.option("--keys", is_flag=True, is_eager=True, expose_value=False, callback=_list_keys, help="List all keys.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def train(
    cache_names: tuple[str, ...],
    caches: str,
    pull: str | None,
    backbone: str | None,
    res: str | None,
    weights: str | None,
    image_root: str | None,
    connector: str | None,
    row_name: str | None,
    llm: str | None,
    data: str | None,
    config: str | None,
    profile: str | None,
    dry_run: bool,
    out: str | None,
    resume: bool,
    resume_anyway: bool,
    log_to: tuple[str, ...],
    overrides: tuple[str, ...],
) -> None:
    """Train a connector and an LLM on the visual tokens of a cache.

    Reads the cache and the conversations, needs no image and no encoder (--cache none needs both), and leaves a run
    folder: metrics.jsonl, checkpoints, and the trained model. Options and KEY=VALUE items override the configuration
    file. Starts several processes under torchrun. Ctrl-C and SIGTERM save a checkpoint before they stop it.
    """
    ours = rank_of(os.environ)
    rank, world_size = ours.index, ours.count
    options = {"cache": "+".join(cache_names) or None, "connector": connector, "llm": llm, "data": data}
    given = {"backbone": backbone, "res": res, "weights": weights, "image_root": image_root}
    stream = {key: value for key, value in given.items() if value is not None}
    resume = resume or resume_anyway
    try:
        row = _row(row_name)
        if row is not None:
            _fill_in(options, row, list(overrides), caches)
        items = [*_of_profile(profile), *_with_trackers(overrides, log_to)]
        folder, resolved = _resolve(options, stream, config, items, out, resume)
        if dry_run:
            _preview(resolved, row, caches, rank, world_size, pull)
            return
        if folder is not None and _is_finished(folder, resume) and _has_config(folder, resolved):
            note(f"{folder} is finished, there is nothing to resume")
        else:
            folder = _run(resolved, row, caches, folder, world_size, resume, resume_anyway, pull)
    except VlmxError as error:
        if world_size == 1:
            raise
        from vlmx.train.parallel import exit_now

        if rank == 0 or error.exit_code not in (2, 3):  # those are the same on every process
            lines = [f"error (process {rank}): {error.what}", f"why: {error.why}", f"fix: {error.fix}"]
            note("\n  ".join(line for line in lines if not line.endswith(": ")))
        else:
            time.sleep(SAYS_FIRST_S)  # torchrun ends all as soon as one ends, and the first has to say it before
        exit_now(error.exit_code)
    if rank == 0:
        click.echo(folder)
    if world_size > 1:
        from vlmx.train.parallel import exit_now

        exit_now(0)


def _of_profile(name: str | None) -> list[str]:
    from vlmx.train.settings import profile_overrides

    return [] if name is None else profile_overrides(name)


def _with_trackers(overrides: Sequence[str], log_to: Sequence[str]) -> list[str]:
    return [*overrides, *([f"log_to=[{', '.join(log_to)}]"] if log_to else [])]


def _row(name: str | None) -> Preset | None:
    from vlmx.cache_specs.presets import preset

    return None if name is None else preset(name)


def _fill_in(options: dict[str, str | None], row: Preset, overrides: Sequence[str], caches: str) -> None:
    """Set the options that follow from the row and are not given."""
    from vlmx.train.rows import cache_of

    given = {item.partition("=")[0] for item in overrides} | {key for key, value in options.items() if value}
    if "cache" not in given:
        options["cache"] = cache_of(row, caches, options["data"] or "DATA")
    if "connector" not in given:
        options["connector"] = row.connector


def _resolve(
    options: dict[str, str | None],
    stream: dict[str, str],
    config: str | None,
    overrides: list[str],
    out: str | None,
    resume: bool,
) -> tuple[Path | None, TrainConfig]:
    """The run folder, None if it follows from the cache's full name, and the configuration."""
    from vlmx.config import load_config
    from vlmx.train.settings import TrainConfig, preset_path

    if resume and not any(options.values()) and not stream and config is None:
        if out is None:
            raise ConfigError(
                "--resume needs to know what to go on with", fix="give --out RUN, or the whole command again"
            )
        run = RunFolder.open(out)
        return run.path, load_config(TrainConfig, None, overrides, **run.config)
    preset = config or ("mini" if (options["data"] or "mini") == "mini" else "paper")
    if config is None and options["cache"] is None and not any(item.startswith("cache=") for item in overrides):
        raise UsageError(
            "--cache is missing",
            fix="name a cache that `vlmx extract` made (vlmx list caches), or a row of the paper (vlmx list rows); "
            "or encode on the fly with --cache none --backbone NAME",
        )
    resolved = load_config(TrainConfig, preset_path(preset), overrides, **options)
    if stream:
        resolved = resolved.model_copy(update={"stream": resolved.stream.model_copy(update=stream)})
    return Path(out) if out else None, resolved


def _is_finished(folder: Path, resume: bool) -> bool:
    """Whether a training has come to its end there.

    Raises:
        RunError: there is a run in the folder, and it shall not be gone on with.
    """
    if not (folder / "status.json").exists():
        return False
    if not resume:
        raise RunError(
            f"there is a run in {folder} already",
            why=f"it is {RunFolder(folder).status['state']}",
            fix="--resume goes on with it; or choose another --out, or remove it",
        )
    return bool(RunFolder(folder).status["state"] == "done")


def _has_config(folder: Path, config: TrainConfig) -> bool:
    """Whether the run there was given this configuration; keys that are younger than the run have their defaults."""
    from vlmx.config import load_config
    from vlmx.train.settings import TrainConfig

    return load_config(TrainConfig, None, [], **RunFolder(folder).config) == config


def _preview(
    config: TrainConfig, row: Preset | None, caches: str, rank: int, world_size: int, pull: str | None
) -> None:
    from vlmx.train.plan import make_plan
    from vlmx.train.preview import preview, show
    from vlmx.train.rows import require_row
    from vlmx.train.survey import require_learnable

    plan = make_plan(config, caches=caches, world_size=world_size, pull=pull)
    if row is not None:
        require_row(plan, row)
    if rank == 0:
        seen = preview(plan, world_size)
        show(seen, plan, world_size)
        require_learnable(seen.survey, config)


def _run(
    config: TrainConfig,
    row: Preset | None,
    caches: str,
    folder: Path | None,
    world_size: int,
    resume: bool,
    resume_anyway: bool,
    pull: str | None,
) -> Path:
    from vlmx.train.loop import train as train_run
    from vlmx.train.parallel import exit_now, join, leave
    from vlmx.train.plan import make_plan
    from vlmx.train.resume import require_same
    from vlmx.train.rows import require_row
    from vlmx.train.stopping import Stopped
    from vlmx.train.survey import survey_before_start
    from vlmx.train.trackers import require_trackers
    from vlmx.train.watch import watched

    require_trackers(config.log_to)
    watched(config)

    plan = make_plan(config, caches=caches, world_size=world_size, pull=pull)
    if row is not None:
        require_row(plan, row)
    if folder is None:
        folder = Path("runs") / f"{plan.reader.name}-{plan.config.connector}-{Path(plan.config.data).stem}"
    finished, changes = _is_finished(folder, resume), None
    if resume and (folder / "status.json").exists():
        changes = require_same(RunFolder(folder), plan.config, anyway=resume_anyway, finished=finished)
    if finished:
        note(f"{folder} is finished, there is nothing to resume")
        return folder
    survey_before_start(plan, reports=int(os.environ.get("RANK", "0")) == 0)
    world = join()
    try:
        train_run(plan, folder, world, resume=resume, changes=changes)
    except Stopped as stopped:
        if world.first:
            note(f"{stopped.what}; {stopped.fix}")
        leave(world)
        if world.distributed:
            exit_now(stopped.exit_code)
        sys.exit(stopped.exit_code)
    leave(world)
    return folder
