"""What would this training do, and can it? Everything is checked here, before an LLM is loaded or a file written."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmx.cache_specs.audit import read_runs
from vlmx.cache_specs.catalog import list_caches
from vlmx.cache_specs.fused import FusedSpec
from vlmx.cache_specs.ids import ImageTable, list_images, table_key
from vlmx.cache_specs.places import Place, place_of
from vlmx.cache_specs.reader import open_cache
from vlmx.cache_specs.streams import NO_CACHE, StreamConfig, open_stream
from vlmx.cache_specs.token_source import DEFAULT_ROOT, TokenSource, extract_commands
from vlmx.data.llava665k import SourceCount, check_mixture, missing_images
from vlmx.data.mixtures import MIXTURES, Mixture, load_mixture
from vlmx.data.published import DATA_ROOT
from vlmx.data.records import Conversation
from vlmx.errors import CacheError, DataError, UsageError
from vlmx.models.connectors import CONNECTORS
from vlmx.train.sampler import epoch_batches, steps_an_epoch
from vlmx.train.settings import TrainConfig

_OPTIONS = {key: f"--{key.replace('_', '-')}" for key in ("backbone", "res", "weights", "image_root")}


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

    @property
    def schedule_steps(self) -> int:
        """Optimiser steps after which the learning rate is 0: all of the run. In the paper's order the reference's
        number, which is made from the conversations: a step or two less an epoch where each kind fills up its last
        batch, after which the rate rises again.
        """
        if self.config.order != "paper" or self.config.max_steps is not None:
            return self.total_steps
        return math.ceil(len(self.conversations) / self.config.global_batch) * self.config.epochs


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
    streamed = {key: value for key, value in config.stream if value != StreamConfig.model_fields[key].default}
    if streamed:
        raise UsageError(
            "it is not clear where the tokens come from",
            why=f"cache is {config.cache}, and for encoding on the fly there is "
            + ", ".join(f"{_OPTIONS.get(key, f'stream.{key}')} {value}" for key, value in streamed.items()),
            fix=f"leave {', '.join(_OPTIONS.get(key, f'stream.{key}') for key in streamed)} out, or give --cache none",
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
    data = shlex.quote(config.data)

    def options() -> list[str]:
        return [*([] if name == data_name else ["--name", name]), *_image_root(config.data, keys, root)]

    def commands() -> str:
        if not reader.parts:
            return "say with stream.images=DATA where they are"
        return extract_commands(reader.parts, data, options())

    if not root.exists(table_key(name)):
        raise DataError(
            f"the images of '{config.data}' were never extracted",
            why=f"{root} has no image table '{name}'",
            fix=f"{commands()}; or set images=NAME if they were extracted under another name",
        )
    table = ImageTable.open(root, name)
    unknown = [key for key in keys if key not in table]
    if unknown:
        raise CacheError(
            f"{len(unknown):,} of {len(keys):,} images of '{config.data}' "
            + ("were never extracted" if reader.parts else "are not among those to encode"),
            why=list_images(unknown),
            fix=f"{commands()} adds them, and encodes nothing twice" if reader.parts else commands(),
        )
    broken = table.failed()
    image_ids = {key: table.id_of(key) for key in keys if key not in broken}
    if reader.missing(image_ids.values()):
        key_of = {image: key for key, image in image_ids.items()}
        reader.require(key_of, data=" ".join([data, *options()]))
    usable = tuple(c for c in conversations if c.image is None or c.image in image_ids)
    if len(usable) == len(conversations):
        return usable, image_ids, ()
    lost = [key for key in keys if key in broken]
    note = f"{len(conversations) - len(usable)} conversations are left out: {len(lost)} images could not be decoded"
    return usable, image_ids, (f"{note}, e.g. {lost[0]} ({broken[lost[0]]})",)


def _image_root(data: str, keys: Sequence[str], caches: Place) -> list[str]:
    """`--image-root` for `vlmx extract --data`: where most of the images lie, of the folder of the data (which needs no
    option), the folder of published data, and the folders from which caches were made; else a placeholder.
    """
    if data in MIXTURES.names():
        return []
    beside = Path(data).parent
    found = {
        folder: _images_below(folder, keys)
        for folder in dict.fromkeys([beside, Path(DATA_ROOT), *_extracted_folders(caches)])
    }
    best = max(found, key=lambda folder: found[folder])
    if not found[best]:
        return ["--image-root", "FOLDER"]
    return [] if best == beside else ["--image-root", shlex.quote(str(best))]


def _images_below(folder: Path, keys: Sequence[str]) -> int:
    try:
        return len(keys) - len(missing_images(keys, folder).missing)
    except OSError:  # it may not be looked into
        return 0


def _extracted_folders(caches: Place) -> list[Path]:
    """The folders of this machine that the caches' images came from."""
    texts: list[str] = []
    try:
        runs = [run for name in list_caches(caches) for run in reversed(read_runs(caches.child(name)))]
    except CacheError:  # a web server does not list what it has
        return []
    for images in (run["images"] for run in runs if run.get("images")):
        texts += [images.get("image_root"), images.get("data_root"), *images.get("data", [])]
    return [Path(text) for text in texts if text and os.path.isdir(text)]
