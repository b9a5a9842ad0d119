"""Where do the visual tokens of a benchmark's images come from, and what is to be typed when they are not there?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmx.cache_specs.catalog import list_caches
from vlmx.cache_specs.fused import FusedSpec, TokenSpec
from vlmx.cache_specs.ids import ImageTable, table_names
from vlmx.cache_specs.places import Place, place_of
from vlmx.cache_specs.reader import open_cache
from vlmx.cache_specs.spec import CacheSpec
from vlmx.cache_specs.streams import NO_CACHE, open_stream, stream_of
from vlmx.cache_specs.token_source import DEFAULT_ROOT, TokenSource, extract_commands
from vlmx.console import note
from vlmx.data.published import DATA_ROOT
from vlmx.errors import CacheError, DataError, UnknownNameError, UsageError
from vlmx.runs import RunFolder

_OF_TRAINING_DATA = ("images", "image_root", "data_root", "image_column")
_SHOWN = 3


def open_tokens(
    run: RunFolder,
    spec: TokenSpec,
    datasets: Sequence[str],
    caches: Place,
    *,
    stream: Mapping[str, Any] | None = None,
    pull: str | None = None,
    data_root: str | Path = DATA_ROOT,
) -> TokenSource:
    """The tokens that a run needs: from its cache, or encoded on the fly.

    Args:
        run: a finished one.
        spec: what it was trained on.
        datasets: names of the image tables of what is asked.
        caches: folder of all caches.
        stream, pull: see `predict_run`.
        data_root: where published files are.

    Raises:
        CacheError: there is no such cache; the fix is the commands that make it.
        UsageError: tokens of several encoders, or of several data sets from one folder, are to be made on the fly.
    """
    trained_without = run.config.get("cache") == NO_CACHE
    if stream is None and not (trained_without and spec.name not in list_caches(caches)):
        try:
            return open_cache(spec.name, caches, pull=pull)
        except UnknownNameError as error:
            raise CacheError(
                f"there is no cache {spec.name} below {caches}",
                why="the run was trained on it, and its tokens of the benchmark's images are needed",
                fix=_commands(spec, datasets, caches, data_root),
            ) from error
    if pull is not None:
        raise UsageError("--pull copies a cache, and encoding on the fly uses none", fix="leave --pull out")
    if isinstance(spec, FusedSpec):
        raise UsageError(
            f"the tokens of {spec.name} cannot be encoded on the fly", why="several encoders are joined in them"
        )
    if stream is None:
        note(f"{caches} has no cache {spec.name}: encoding on the fly, as in training")
    known = stream_of(spec)
    if trained_without:  # it knows the options; its images are those of the training
        recorded = {key: value for key, value in run.config["stream"].items() if key not in _OF_TRAINING_DATA}
        known = known.model_copy(update=recorded)
    elsewhere = {} if str(data_root) == DATA_ROOT else {"data_root": str(data_root)}
    config = known.model_copy(update={**elsewhere, **(stream or {})})
    if config.images is not None and len(set(datasets)) > 1:
        raise UsageError(
            "stream.images cannot be the images of several data sets",
            why=", ".join(dict.fromkeys(datasets)),
            fix="evaluate their benchmarks one after the other with --bench",
        )
    return open_stream(config, {name: config.images or name for name in datasets}, caches)


def require_tables(
    reader: TokenSource, tables: Iterable[str], caches: Place, *, data_root: str | Path = DATA_ROOT
) -> None:
    """See that all these image tables are there.

    Raises:
        DataError: some are not; the fix is one command an encoder that makes all of them.
    """
    there = set(table_names(caches))
    missing = [table for table in dict.fromkeys(tables) if table not in there]
    if missing:
        names = " and ".join(f"'{table}'" for table in missing)
        raise DataError(
            f"the images of {names} have no tokens yet",
            why=f"{caches} has no image table {names}",
            fix=" && ".join(
                extract_commands([part], ",".join(missing)) + _elsewhere(data_root) for part in reader.parts
            ),
        )


def image_ids(
    reader: TokenSource, table: str, keys: Iterable[str], caches: Place, *, data_root: str | Path = DATA_ROOT
) -> dict[str, str]:
    """Image key -> image id, after a look whether all these images have tokens.

    Raises:
        DataError: there is no image table, or it lacks images; the fix is the commands that add them.
        CacheError: the cache lacks images.
    """
    wanted = list(dict.fromkeys(keys))
    commands = extract_commands(reader.parts, table) + _elsewhere(data_root)
    if table not in table_names(caches):
        raise DataError(
            f"the images of '{table}' have no tokens yet",
            why=f"{caches} has no image table '{table}'",
            fix=commands,
        )
    images = ImageTable.open(caches, table)
    lacking = [key for key in wanted if key not in images]
    if lacking:
        raise DataError(
            f"{len(lacking):,} of {len(wanted):,} images are not in the image table '{table}'",
            why="the first are " + ", ".join(lacking[:_SHOWN]),
            fix=f"{commands} adds them, and encodes nothing twice",
        )
    broken = images.failed()
    undecoded = [key for key in wanted if key in broken]
    if undecoded:
        raise DataError(
            f"{len(undecoded):,} of {len(wanted):,} images of '{table}' could not be decoded",
            why="; ".join(f"{key}: {broken[key]}" for key in undecoded[:_SHOWN]),
            fix=f"replace their files, then {commands}",
        )
    ids = {key: images.id_of(key) for key in wanted}
    reader.require({image: key for key, image in ids.items()}, data=table + _elsewhere(data_root))
    return ids


def _commands(spec: TokenSpec, datasets: Sequence[str], caches: Place, data_root: str | Path) -> str:
    """What to type for a cache that does not exist yet, as far as its spec tells; a command an encoder."""
    specs = spec.parts if isinstance(spec, FusedSpec) else (spec,)
    return " && ".join(_command(part, ",".join(dict.fromkeys(datasets)), caches, data_root) for part in specs)


def _command(spec: CacheSpec, data: str, caches: Place, data_root: str | Path) -> str:
    words = ["vlmx extract --backbone", spec.backbone, "--res", spec.resolution]
    words += ["--weights", spec.weights_sha256] if spec.random_weights else []
    words += ["--dtype", spec.dtype] if spec.dtype != "float16" else []
    words += ["--codec", spec.codec] if spec.codec != "crc32c" else []
    words += ["--compute", spec.compute] if spec.compute != "float32" else []
    words += ["--data", data]
    words += ["--out", caches.url] if caches != place_of(DEFAULT_ROOT) else []
    return " ".join(words) + _elsewhere(data_root)


def _elsewhere(data_root: str | Path) -> str:
    return "" if str(data_root) == DATA_ROOT else f" --data-root {data_root}"
