"""What in a configuration does less, or other things, than one might expect? Said once, before the first step."""

from __future__ import annotations

from typing import Any

from vlmx.train.parallel import World
from vlmx.train.settings import TrainConfig

NOT_OF_THE_STACK = ("classifier", "summary")  # heads that a language model does not have


def remarks(config: TrainConfig, llm_config: Any, world: World) -> list[str]:
    """A sentence for each.

    Args:
        config: of the training.
        llm_config: the LLM's, as transformers has it.
        world: the processes that train together.
    """
    found = []
    if config.reduce == "bf16" and (config.precision != "bf16" or not world.distributed):
        why = "there is one process" if config.precision == "bf16" else "precision is fp32"
        found.append(f"reduce=bf16 changes nothing here: {why}, so no gradients are added up in bfloat16")
    dropout = dropout_of(config, llm_config)
    if dropout:
        found.append(
            f"dropout is on ({', '.join(f'{key}={value:g}' for key, value in dropout.items())}): what it drops depends"
            " on micro-batches and number of processes, so the same run divided otherwise is another draw of the curve"
        )
    return found


def dropout_of(config: TrainConfig, llm_config: Any) -> dict[str, float]:
    """The settings by which something is dropped in training, with their probabilities; empty if nothing is."""
    text = llm_config.get_text_config().to_dict()
    found = {
        key: float(value)
        for key, value in sorted(text.items())
        if "drop" in key
        and not key.startswith(NOT_OF_THE_STACK)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and value > 0
    }
    if config.lora.r is not None and config.lora.dropout > 0:
        found["lora.dropout"] = config.lora.dropout
    return found
