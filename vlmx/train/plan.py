"""What would this training do, and can it? Everything is checked here, before an LLM is loaded or a file written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmx.cache_specs.fused import FusedSpec
from vlmx.cache_specs.ids import ImageTable, table_key
from vlmx.cache_specs.places import Place, place_of
from vlmx.cache_specs.reader import open_cache
from vlmx.cache_specs.streams import NO_CACHE, open_stream
from vlmx.cache_specs.token_source import DEFAULT_ROOT, TokenSource, extract_commands
from vlmx.data.llava665k import SourceCount, check_mixture
from vlmx.data.mixtures import Mixture, load_mixture
from vlmx.data.records import Conversation
from vlmx.errors import CacheError, DataError, UsageError
from vlmx.models.connectors import CONNECTORS
from vlmx.train.sampler import epoch_batches, steps_an_epoch
from vlmx.train.settings import TrainConfig

SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """A training whose names all exist and whose images are all there.

    Attributes:
        config: as given, with the cache's full name (or names), or its path or url if it is not in the default root.
        reader: the cache, several joined ones, or an encoder that works on the fly.
        conversations: what is trained on, in the data's order.
        image_ids: content id of each conversation's image, by the data's own key.
        steps_per_epoch: optimiser steps a pass over the data takes.
        total_steps: optimiser steps of the whole run.
        micro_batch: conversations at once in one process.
        notes: what was left out and why, and an untrained encoder, for the user.
        sources: how much of each part of the published LLaVA-1.5 mixture the data have; none if they are others.
    """

    config: TrainConfig
    reader: TokenSource
    conversations: tuple[Conversation, ...]
    image_ids: dict[str, str]
    steps_per_epoch: int
    total_steps: int
    micro_batch: int
    notes: tuple[str, ...]
    sources: tuple[SourceCount, ...] = ()


def make_plan(
    config: TrainConfig, *, caches: str | Path | Place, world_size: int, pull: str | None = None
) -> TrainPlan:
    """Check a configuration against what is on disk.

    Args:
        config: of the training.
        caches: folder of all caches, and of the image tables.
        world_size: processes that train together.
        pull: folder for copies of a remote cache's shards; see `open_cache`.

    Raises:
        UnknownNameError: no such cache, connector, data or backbone.
        UsageError: the batch cannot be divided among the processes, the data has no batches in the paper's order,
            settings do not go together, or it is not clear where tokens come from.
        CacheError: the cache lacks images of the data.
        DataError: the data breaks its schema, its images were never extracted, or cannot be found.
        BackendError, WeightsError: the encoder cannot work on the fly here.
    """
    CONNECTORS.get(config.connector)
    _require_consistent(config)
    micro_batch = divided_batch(config, world_size)
    mixture, reader = _tokens(config, place_of(caches), pull)
    home = place_of(DEFAULT_ROOT)
    places = [part.place for part in reader.parts]
    name = "+".join(place.name if place.parent == home else place.url for place in places) or NO_CACHE
    conversations, image_ids, dropped = _with_images(mixture.conversations, config, reader, mixture.name)
    if not conversations:
        raise DataError("there is nothing to train on", why="; ".join(dropped), fix="extract the data's images again")
    if config.order == "paper":  # not every data set has one, which is said before anything is loaded
        epoch_batches(
            conversations, seed=config.seed, epoch=0, global_batch=config.global_batch, order="paper", world=world_size
        )
    mixed = check_mixture(mixture.conversations)
    steps_per_epoch = steps_an_epoch(conversations, config.global_batch, config.order)
    return TrainPlan(
        config=config.model_copy(update={"cache": name}),
        reader=reader,
        conversations=conversations,
        image_ids=image_ids,
        steps_per_epoch=steps_per_epoch,
        total_steps=config.max_steps or steps_per_epoch * config.epochs,
        micro_batch=micro_batch,
        notes=(*mixture.notes, *dropped, *_untrained(reader)),
        sources=mixed.sources if mixed else (),
    )


def _tokens(config: TrainConfig, caches: Place, pull: str | None) -> tuple[Mixture, TokenSource]:
    """The conversations, and where their tokens come from."""
    if config.cache == NO_CACHE:
        if pull is not None:
            raise UsageError("--pull copies a cache, and --cache none uses none", fix="leave --pull out")
        mixture = load_mixture(config.data)
        images = {config.images or mixture.name: config.stream.images or config.data}
        return mixture, open_stream(config.stream, images, caches)
    if config.stream.backbone is not None:
        raise UsageError(
            "it is not clear where the tokens come from",
            why=f"cache is {config.cache}, and {config.stream.backbone} shall encode on the fly",
            fix="leave --backbone out, or give --cache none",
        )
    reader = open_cache(config.cache, caches, pull=pull)
    return load_mixture(config.data), reader


def _untrained(reader: TokenSource) -> tuple[str, ...]:
    specs = reader.spec.parts if isinstance(reader.spec, FusedSpec) else (reader.spec,)
    return tuple(
        f"the encoder {spec.backbone} is untrained ({spec.weights_sha256})" for spec in specs if spec.random_weights
    )


def _require_consistent(config: TrainConfig) -> None:
    """Make sure that no setting takes another's meaning away.

    Raises:
        UsageError: some do; all are named.
    """
    problems = []
    if config.micro_tokens is not None and config.loss_mean == "microbatch":
        problems.append("loss_mean=microbatch is a mean over equal micro-batches, and micro_tokens makes them unequal")
    if config.lora.r is not None and config.freeze_llm:
        problems.append("freeze_llm trains nothing of the LLM, and lora.r puts something into it that is trained")
    if problems:
        raise UsageError("some settings do not go together", why="; ".join(problems), fix="leave out one of each pair")


def divided_batch(config: TrainConfig, world_size: int) -> int:
    """The micro-batch of one process: `config.micro_batch`, or its whole share of the global batch if that is smaller,
    or if micro-batches are divided by tokens.

    Raises:
        UsageError: the shares would not be equal.
    """
    share, rest = divmod(config.global_batch, world_size)
    if config.micro_tokens is not None:
        if rest or share == 0:
            raise UsageError(
                f"a global batch of {config.global_batch} cannot be divided among {world_size} processes",
                why="every process must have as many micro-batches, and none of them may be empty",
                fix="set global_batch to a multiple of the number of processes",
            )
        return share
    micro_batch = min(config.micro_batch, share)
    if rest or share == 0 or share % micro_batch:
        raise UsageError(
            f"a global batch of {config.global_batch} cannot be divided among {world_size} processes"
            f" in micro-batches of {config.micro_batch}",
            why="every process must have as many equal micro-batches",
            fix="set global_batch to a multiple of processes x micro_batch",
        )
    return micro_batch


def _with_images(
    conversations: tuple[Conversation, ...], config: TrainConfig, reader: TokenSource, data_name: str
) -> tuple[tuple[Conversation, ...], dict[str, str], tuple[str, ...]]:
    """Conversations whose image has tokens, those images' content ids, and a note on what was left out.

    Images that could not be decoded are left out and noted; images that were never extracted are an error.
    """
    keys = list(dict.fromkeys(c.image for c in conversations if c.image is not None))
    if not keys:
        return conversations, {}, ()
    root, name = reader.root, config.images or data_name
    commands = (
        extract_commands(reader.parts, config.data) if reader.parts else "say with stream.images=DATA where they are"
    )
    if not root.exists(table_key(name)):
        raise DataError(
            f"the images of '{config.data}' were never extracted",
            why=f"{root} has no image table '{name}'",
            fix=f"{commands}; or set images=NAME if they were extracted under another name",
        )
    table = ImageTable.open(root, name)
    unknown = [key for key in keys if key not in table]
    if unknown:
        raise CacheError(
            f"{len(unknown):,} of {len(keys):,} images of '{config.data}' "
            + ("were never extracted" if reader.parts else "are not among those to encode"),
            why=f"{_by_folder(unknown)}the first are {', '.join(unknown[:SHOWN])}",
            fix=f"{commands} adds them, and encodes nothing twice" if reader.parts else commands,
        )
    broken = table.failed()
    image_ids = {key: table.id_of(key) for key in keys if key not in broken}
    reader.require(image_ids.values(), data=config.data)
    usable = tuple(c for c in conversations if c.image is None or c.image in image_ids)
    if len(usable) == len(conversations):
        return usable, image_ids, ()
    lost = [key for key in keys if key in broken]
    note = f"{len(conversations) - len(usable)} conversations are left out: {len(lost)} images could not be decoded"
    return usable, image_ids, (f"{note}, e.g. {lost[0]} ({broken[lost[0]]})",)


def _by_folder(keys: Sequence[str]) -> str:
    """How many images are in each folder, the fullest ones first; empty if they are all in one."""
    counts = Counter(key.rpartition("/")[0] for key in keys).most_common()
    if len(counts) == 1:
        return ""
    shown = [f"{count:,} in {folder or 'no folder'}" for folder, count in counts[:SHOWN]]
    rest = [f"{sum(count for _, count in counts[SHOWN:]):,} in {len(counts) - SHOWN} others"] if counts[SHOWN:] else []
    return f"{', '.join(shown + rest)}; "
