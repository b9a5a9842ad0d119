"""In what was a run's training set otherwise than the paper's? Remarks from its configuration and its model card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# What decides about a model, as the preset `paper` and, where it says otherwise, the profile `paper` of `vlmx train`.
RECIPE: Mapping[str, Any] = {
    "prompt": "vicuna-v1.5",
    "turns": "causal",
    "global_batch": 128,
    "seed": 7,
    "max_text_tokens": 2048,
    "optim.lr": 2e-5,
    "optim.max_grad_norm": 1.0,
    "optim.warmup_ratio": 0.03,
    "precision": "bf16",
}
PROFILE: Mapping[str, Any] = {
    "optim.weight_decay": 0,
    "loss_mean": "microbatch",
    "order": "paper",
    "rope": "bf16",
    "reduce": "bf16",
}


def recipe_remarks(config: Mapping[str, Any], spec: Mapping[str, Any]) -> list[str]:
    """What a reader has to know about a training before its scores stand beside the paper's.

    Args:
        config: the run's resolved configuration; a key that it lacks is not judged.
        spec: of the tokens as plain data, of one encoder or of joined ones; empty where it is not known.
    """
    return [*_of_tokens(spec), *_of_length(config), *_of_llm(config), *_of_settings(config)]


def _of_tokens(spec: Mapping[str, Any]) -> Iterator[str]:
    parts = spec.get("parts", [spec])
    modes = {part["geometry"]["mode"] for part in parts if "geometry" in part} - {"letterbox"}
    if modes:
        yield f"its photos are brought to size by {', '.join(sorted(modes))}, the paper's by letterbox"
    if any(part.get("dtype") == "int8" for part in parts):
        yield "its tokens are stored in 8 bits, the paper's were never stored"


def _of_length(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("max_steps") is not None:
        yield f"its training was set to stop after {config['max_steps']:,} steps, the paper's is one epoch"
    if config.get("epochs", 1) != 1:
        yield f"it was trained for {config['epochs']} epochs, the paper's for one"


def _of_llm(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("freeze_llm"):
        yield "its LLM was frozen, the paper's was trained"
    rank = _value(config, "lora.r")
    if rank is not None:
        yield f"its LLM was trained through adapters of rank {rank}, the paper's as a whole"


def _of_settings(config: Mapping[str, Any]) -> Iterator[str]:
    for settings, what in (
        (RECIPE, "its training is set otherwise than the paper's"),
        (PROFILE, "it was trained without --profile paper"),
    ):
        found = {key: _value(config, key) for key in settings}
        other = [
            f"{key}={value} ({settings[key]})"
            for key, value in found.items()
            if value is not None and value != settings[key]
        ]
        if other:
            yield f"{what}: {', '.join(other)}"


def _value(config: Mapping[str, Any], key: str) -> Any:
    """The value of a key with dots; None where it is not there."""
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
