"""May this configuration go on with that run? What differs, and what of it may."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmx.console import warn
from vlmx.errors import ConfigError
from vlmx.runs import RunFolder
from vlmx.train.settings import TrainConfig

FREE = frozenset({"checkpoint", "watch", "log_every", "log_to"})
"""What has no influence on the trained weights."""
FIXED = frozenset(
    {"cache", "stream", "data", "images", "connector", "llm", "freeze_llm", "lora", "prompt", "seed", "order"}
    | {"global_batch"}
)
"""What the checkpoint's tensors, or the meaning of "after N steps", depend on."""


def require_same(run: RunFolder, config: TrainConfig, *, anyway: bool) -> None:
    """Compare the configuration of a run that is to be resumed with the one that it was started with.

    Args:
        run: the run.
        config: what it is to be gone on with.
        anyway: let differ what may; it is reported, and recorded in the run's status.

    Raises:
        ConfigError: something differs that may not; all keys are named.
    """
    before, now = _flat(run.config), _flat(config.model_dump(mode="json"))
    defaults = _flat(TrainConfig(cache="").model_dump(mode="json"))  # of keys that are younger than the run
    changed = {
        key: (before.get(key, defaults.get(key)), value)
        for key, value in now.items()
        if key.partition(".")[0] not in FREE and before.get(key, defaults.get(key)) != value
    }
    if not changed:
        return
    listed = "; ".join(f"{key}: {old!r}, now {new!r}" for key, (old, new) in changed.items())
    never = [key for key in changed if key.partition(".")[0] in FIXED]
    if never or not anyway:
        raise ConfigError(
            f"{run.path} was started with another configuration",
            why=listed,
            fix="give the command of the start, or --out and --resume alone, or another --out"
            + (f"; {', '.join(never)} cannot change in a run" if never else "; or insist with --resume-anyway"),
        )
    warn(f"going on with another configuration, so the result is not that of an uninterrupted run: {listed}")
    history = [*run.status.get("changed_when_resumed", []), {key: list(pair) for key, pair in changed.items()}]
    run.set_status(run.status["state"], changed_when_resumed=history)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result
