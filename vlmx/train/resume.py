"""May this configuration, on these data, go on with that run? What differs, and what of it may."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from vlmx.console import warn
from vlmx.errors import ConfigError, RunError
from vlmx.runs import RunFolder
from vlmx.train.plan import TrainPlan
from vlmx.train.sampler import epoch_batches, order_digest
from vlmx.train.settings import TrainConfig

Changes = dict[str, list[Any]]
"""[old, new] of each key that differs."""

FREE = frozenset({"checkpoint", "watch", "log_every", "log_to"})
"""What has no influence on the trained weights."""
FIXED = frozenset(
    {"cache", "stream", "data", "images", "connector", "llm", "freeze_llm", "lora", "prompt", "seed", "order"}
    | {"global_batch"}
)
"""What the checkpoint's tensors, or the meaning of "after N steps", depend on."""


def require_same(run: RunFolder, config: TrainConfig, *, anyway: bool, finished: bool = False) -> Changes:
    """Compare the configuration of a run that is to be resumed with the one that it was started with.

    Args:
        run: the run.
        config: what it is to be gone on with.
        anyway: let differ what may; it is reported.
        finished: the run has come to its end, and nothing can change it any more.

    Returns:
        What differs.

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
        return {}
    listed = "; ".join(f"{key}: {old!r}, now {new!r}" for key, (old, new) in changed.items())
    if finished:
        raise ConfigError(
            f"{run.path} is finished, and was trained with another configuration",
            why=listed,
            fix="choose another --out, or remove it",
        )
    never = [key for key in changed if key.partition(".")[0] in FIXED]
    if never or not anyway:
        raise ConfigError(
            f"{run.path} was started with another configuration",
            why=listed,
            fix="give the command of the start, or --out and --resume alone, or another --out"
            + (f"; {', '.join(never)} cannot change in a run" if never else "; or insist with --resume-anyway"),
        )
    warn(f"going on with another configuration, so the result is not that of an uninterrupted run: {listed}")
    return {key: list(pair) for key, pair in changed.items()}


def identity_of(plan: TrainPlan) -> dict[str, str]:
    """What "after N steps" means beside the configuration, as digests; seconds for a mixture of gigabytes.

    order_digest is of the ids of the first epoch's batches, data_digest of all conversations and the content of their
    images, fingerprint that of the cache.
    """
    config, conversations = plan.config, plan.conversations
    batches = epoch_batches(
        conversations, seed=config.seed, epoch=0, global_batch=config.global_batch, order=config.order
    )
    data = hashlib.sha256()
    for one in conversations:
        image = None if one.image is None else plan.image_ids[one.image]
        fields = [one.id, image, *([turn.question, turn.answer] for turn in one.turns)]
        data.update(json.dumps(fields).encode() + b"\n")
    return {
        "order_digest": order_digest(conversations, batches),
        "data_digest": data.hexdigest(),
        "fingerprint": plan.reader.spec.fingerprint,
    }


def require_same_data(run: RunFolder, plan: TrainPlan) -> dict[str, str]:
    """Compare the data of a run that is to be resumed with those that it was started with.

    Returns:
        `identity_of` both.

    Raises:
        RunError: they differ.
    """
    before, current = run.status, identity_of(plan)
    changed = {key: (before[key], value) for key, value in current.items() if before.get(key, value) != value}
    if changed:
        listed = (f"{key.replace('_', ' ')}: {old[:12]}, now {new[:12]}" for key, (old, new) in changed.items())
        raise RunError(
            f"{run.path} was started with other data",
            why="; ".join(listed),
            fix=f"put back {plan.config.data} and its images as they were, or train from the start with another --out",
        )
    return current


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result
