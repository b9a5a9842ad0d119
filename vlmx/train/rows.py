"""How does a training become one of the paper's rows? Its caches and connector follow from the row's name."""

from __future__ import annotations

from pathlib import Path

from vlmx.cache_specs.catalog import list_caches
from vlmx.cache_specs.places import Place, place_of
from vlmx.cache_specs.presets import Preset
from vlmx.cache_specs.token_source import DEFAULT_ROOT
from vlmx.errors import CacheError, UsageError
from vlmx.train.plan import TrainPlan


def cache_of(row: Preset, root: str | Path | Place, data: str) -> str:
    """Name of the row's cache below `root`, or of its caches with + between them.

    Args:
        row: the row.
        root: folder (or url) of all caches.
        data: what is trained on, as `vlmx extract --data` takes it; named in the error.

    Raises:
        CacheError: one of them does not exist, or there are several that differ in weights or dtype.
    """
    names = list_caches(root)
    found = {b: [name for name in names if name.startswith(f"{b}@{row.resolution}-")] for b in row.backbones}
    missing = [backbone for backbone, caches in found.items() if not caches]
    if missing:
        out = "" if place_of(root) == place_of(DEFAULT_ROOT) else f" --out {root}"
        raise CacheError(
            f"the row {row.name} has no cache below {root} yet",
            why=f"there is none of {' and '.join(f'{backbone}@{row.resolution}' for backbone in missing)}",
            fix=f"vlmx extract --row {row.name} --data {data}{out}",
        )
    several = [name for caches in found.values() if len(caches) > 1 for name in caches]
    if several:
        raise CacheError(
            f"the row {row.name} has more than one cache below {root}",
            why=", ".join(several),
            fix=f"say which with {' '.join(f'--cache {caches[0]}' for caches in found.values())}",
        )
    return "+".join(caches[0] for caches in found.values())


def require_row(plan: TrainPlan, row: Preset) -> None:
    """Make sure that a training is what its row says.

    Raises:
        UsageError: another cache or connector was given beside the row; both are named.
    """
    spec, connector = plan.reader.spec, plan.config.connector
    wanted = "+".join(row.backbones)
    problems = []
    if (spec.backbone, spec.resolution) != (wanted, row.resolution):
        problems.append(
            f"its tokens are {wanted} at {row.resolution}, the cache has {spec.backbone} at {spec.resolution}"
        )
    if connector != row.connector:
        problems.append(f"its connector is {row.connector}, {connector} is given")
    if problems:
        raise UsageError(
            f"this is not the row {row.name}",
            why="; ".join(problems),
            fix="leave --cache and --connector out, or --row (vlmx list rows)",
        )
