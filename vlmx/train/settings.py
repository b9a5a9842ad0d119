"""What can be set for a training, and which presets and profiles exist?

A preset is a whole configuration: what is trained, on what, how long. A profile changes how some things are computed,
and goes on top of any preset: "paper" does them as the reference did, where that is not what its description says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from vlmx.cache_specs.streams import StreamConfig
from vlmx.config import Config
from vlmx.data.published import DATA_ROOT
from vlmx.errors import ConfigError
from vlmx.registry import unknown_name
from vlmx.train.sampler import BatchOrder

PRESETS = Path(__file__).parent / "configs"

Turns = Literal["causal", "isolated"]
Precision = Literal["fp32", "bf16"]
LossMean = Literal["tokens", "answers", "microbatch"]
Packed = bool | Literal["auto"]
Tracker = Literal["tensorboard", "trackio", "wandb"]

PROFILES: Mapping[str, tuple[str, ...]] = {
    "paper": (
        "optim.weight_decay=0",  # the reference's groups are made after sharding, where nothing has two dimensions
        "loss_mean=microbatch",
        "order=paper",
        "rope=bf16",
        "reduce=bf16",
        "packed=false",
        "prompt=vicuna-v1.5",
    )
}


class OptimConfig(Config):
    """AdamW with linear warm-up and cosine decay to zero."""

    lr: float = Field(default=2e-5, gt=0, description="peak learning rate of the LLM")
    connector_lr: float | None = Field(
        default=None, gt=0, description="peak learning rate of the connector; null: that of the LLM"
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW's decay rates of the moments")
    weight_decay: float = Field(default=0.1, ge=0, description="on matrices only, by their original shape")
    max_grad_norm: float = Field(default=1.0, gt=0, description="the gradient's global norm is clipped to this")
    warmup_ratio: float = Field(
        default=0.03, ge=0, le=1, description="part of the steps during which the rate rises from 0"
    )


class LoraConfig(Config):
    """Low-rank adapters (LoRA, arXiv 2106.09685) in the LLM, which itself stays as it is."""

    r: int | None = Field(default=None, ge=1, description="rank of the adapters; null: no adapters")
    alpha: float = Field(default=32.0, gt=0, description="what an adapter adds is multiplied by alpha / r")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on the input of the adapters")
    targets: tuple[str, ...] | None = Field(
        default=None, description="names of the layers that get one, e.g. [q_proj, v_proj]; null: all linear ones"
    )


class CheckpointConfig(Config):
    """What a killed training goes on from."""

    every_steps: int = Field(
        default=500, ge=0, description="save every so many steps; 0: only when the training is asked to stop"
    )
    keep: int = Field(default=2, ge=1, description="how many of the newest checkpoints are kept")
    keep_best: int = Field(
        default=0,
        ge=0,
        description="how many of the best are kept besides: by held-out accuracy if there is one (watch.benchmarks),"
        " else by the mean loss of the last 100 steps",
    )


class WatchConfig(Config):
    """What is looked at while the training runs, and when it is stopped."""

    benchmarks: str | None = Field(
        default=None,
        description="benchmarks that are answered before each checkpoint, with commas between them; null: none",
    )
    limit: int = Field(default=64, ge=1, description="how many questions of each of these benchmarks")
    data_root: str = Field(default=DATA_ROOT, description="folder with the files of published benchmarks")
    explode_factor: float | None = Field(
        default=5.0, gt=1, description="stop when the loss stays above its median so many times; null: never"
    )
    explode_steps: int = Field(default=20, ge=1, description="for how many steps it has to stay there")
    max_cut: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="do not start when a larger part of the conversations does not fit max_text_tokens (in LLaVA-1.5's"
        " mixture up to 6 %, the text-only ones, are long)",
    )
    max_unlearned: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="do not start when a larger part of the conversations has no token to learn",
    )


class TrainConfig(Config):
    """One training run of a connector and an LLM on one cache."""

    cache: str = Field(
        description="cache with the visual tokens: name, unambiguous prefix, or path; A+B joins two on the channels;"
        " none: encode on the fly, with the encoder of the group stream"
    )
    data: str = Field(
        default="mini", description="conversations: mini, or a LLaVA-style .json, .jsonl or .parquet file"
    )
    images: str | None = Field(
        default=None, description="image table of the data; null: named like the data (extract --name)"
    )
    stream: StreamConfig = Field(default_factory=StreamConfig)
    connector: str = Field(default="mlp2", description="linear, mlp2, mlp3, or a plug-in's name")
    llm: str = Field(default="mini", description="mini, a Hugging Face folder, or a hub id")
    freeze_llm: bool = Field(default=False, description="train the connector only")
    lora: LoraConfig = Field(default_factory=LoraConfig)
    prompt: str = Field(default="auto", description="vicuna-v1.5, plain, chat, or auto")
    turns: Turns = Field(
        default="causal", description="causal: a turn sees the earlier ones; isolated: only image and itself"
    )
    seed: int = Field(default=7, ge=0, lt=2**63, description="of the batch order and of dropout")
    epochs: int = Field(default=1, ge=1, description="passes over the data")
    max_steps: int | None = Field(
        default=None, ge=1, description="stop after so many steps, the schedule included; null: all epochs"
    )
    global_batch: int = Field(default=128, ge=1, description="conversations a step, over all processes")
    order: BatchOrder = Field(
        default="default", description="of the batches; paper: the very ones that the reference's sampler makes"
    )
    micro_batch: int = Field(default=16, ge=1, description="conversations at once in one process, at most")
    micro_tokens: int | None = Field(
        default=None,
        ge=1,
        description="instead of micro_batch: tokens at once in one process, at most, visual ones and padding included;"
        " same loss, less padding",
    )
    packed: Packed = Field(
        default="auto",
        description="put the rows of a micro-batch one after the other instead of padding them, same loss; auto: on a"
        " GPU with a kernel for it",
    )
    max_text_tokens: int = Field(
        default=2048,
        ge=8,
        description="longer conversations are cut here, visual tokens not counted; and at the LLM's context, visual"
        " tokens counted",
    )
    loss_mean: LossMean = Field(
        default="tokens",
        description="tokens: mean over a step's learned tokens; answers: over its answers, each the mean of its tokens;"
        " microbatch: mean of the micro-batches' means over tokens",
    )
    optim: OptimConfig = Field(default_factory=OptimConfig)
    precision: Precision = Field(
        default="fp32", description="bf16: compute in bfloat16, weights and optimiser stay float32"
    )
    reduce: Precision = Field(
        default="fp32", description="what several processes add their gradients up in when precision is bf16"
    )
    rope: Precision = Field(
        default="fp32", description="of rotary positions; bf16: rounded, as transformers 4.38.1 did under autocast"
    )
    activation_checkpointing: bool = Field(default=False, description="recompute the LLM's layers in the backward pass")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    watch: WatchConfig = Field(default_factory=WatchConfig)
    log_every: int = Field(default=10, ge=1, description="write a line of metrics every so many steps")
    log_to: tuple[Tracker, ...] = Field(
        default=(), description="where else metrics go: tensorboard, trackio, wandb; several as a list"
    )


def preset_names() -> list[str]:
    """Names of the presets that come with vlmx."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_path(name_or_file: str) -> Path:
    """The YAML file of a preset's name, or the file itself.

    Raises:
        ConfigError: the file does not exist.
        UnknownNameError: no preset has this name.
    """
    if name_or_file in preset_names():
        return PRESETS / f"{name_or_file}.yaml"
    path = Path(name_or_file)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"there is no configuration file {path}", fix=f"presets: {', '.join(preset_names())}")
        return path
    raise unknown_name("preset", name_or_file, preset_names())


def profile_overrides(name: str) -> list[str]:
    """The "key=value" items of a profile.

    Raises:
        UnknownNameError: no profile has this name.
    """
    if name not in PROFILES:
        raise unknown_name("profile", name, sorted(PROFILES))
    return list(PROFILES[name])


def described_keys(model: type[BaseModel] = TrainConfig, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, default, description) of every key, groups with dots; for the help text."""
    for key, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from described_keys(field.annotation, f"{prefix}{key}.")
        else:
            default = "required" if field.is_required() else "null" if field.default is None else str(field.default)
            yield f"{prefix}{key}", default, field.description or ""
