"""How does phase two get visual tokens without a cache: what can be set, and who encodes?

`--cache none` has a frozen encoder work while a model is trained or evaluated. The encoder is part of phase one, which
phase two must not import: it is reached by name, through a registry, and only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from pydantic import Field

from vlmx.cache_specs.places import Place
from vlmx.cache_specs.spec import CacheSpec, Codec, DType
from vlmx.cache_specs.token_source import TokenSource
from vlmx.config import Config
from vlmx.errors import BackendError, UsageError
from vlmx.registry import Registry

NO_CACHE = "none"


class StreamConfig(Config):
    """An encoder that works on the fly, and the images that it takes; used with cache=none."""

    backbone: str | None = Field(default=None, description="the encoder (vlmx list backbones)")
    res: str | int | None = Field(
        default=None, description="input size: 512, or HEIGHTxWIDTH; null: the backbone's own"
    )
    weights: str | None = Field(
        default=None, description="checkpoint file, or random:SEED; null: the published file, looked up"
    )
    images: str | None = Field(
        default=None, description="the images, as `vlmx extract --data` takes them; null: those of the data"
    )
    image_root: str | None = Field(default=None, description="where the image paths of a JSON start; null: its folder")
    data_root: str | None = Field(default=None, description="as --data-root of `vlmx extract`")
    image_column: str | None = Field(default=None, description="as --image-column of `vlmx extract`")
    dtype: DType = Field(default="float16", description="type of the tokens, as a cache would store them")
    codec: Codec = Field(default="crc32c", description="of the cache that this stands for; changes no token")
    compute: Literal["float32", "bfloat16"] = Field(default="float32", description="how the encoder computes")
    out_norm: str | None = Field(default=None, description="as --out-norm of `vlmx extract`")
    block: int | None = Field(default=None, description="as --block of `vlmx extract`")
    feature: str | None = Field(default=None, description="as --feature of `vlmx extract`")
    crop: bool = Field(default=False, description="as --crop of `vlmx extract`")
    threads: int | None = Field(default=None, ge=1, description="that decode images; null: one a core, at most 32")
    batch_size: int = Field(default=16, ge=1, description="images a pass on a GPU; a CPU has a size of its own")
    keep_mb: int = Field(default=256, ge=0, description="MB of tokens of recent images that are kept in memory")


Open = Callable[[StreamConfig, Mapping[str, str], Place], TokenSource]

TOKEN_STREAMS: Registry[Open] = Registry("token stream", group="vlmx.token_streams")
TOKEN_STREAMS.add("encoder", "vlmx.extract.streaming:open_encoder")


def open_stream(config: StreamConfig, datasets: Mapping[str, str], root: Place) -> TokenSource:
    """Tokens of images that are encoded when they are asked for.

    Args:
        config: the encoder.
        datasets: name of the image table -> the images, as `vlmx extract --data` takes them.
        root: folder of all caches: the image tables lie there, and are made if they do not.

    Raises:
        UsageError: no backbone is named, or it cannot take the size or the options.
        BackendError: phase one's libraries are not installed.
        DataError: images are missing or cannot be read.
        WeightsError: the weights are missing or of another network.
    """
    if config.backbone is None:
        raise UsageError(
            "without a cache an encoder is needed",
            why="--cache none encodes on the fly",
            fix="add --backbone NAME (vlmx list backbones)",
        )
    try:
        opener = TOKEN_STREAMS.get("encoder")
    except ImportError as error:
        raise BackendError(
            "encoding on the fly is not possible here",
            why=f"a library of phase one is not installed: {error}",
            fix="pip install timm pillow, or use a cache that was made elsewhere",
        ) from error
    return opener(config, datasets, root)


def stream_of(spec: CacheSpec) -> StreamConfig:
    """What to set for tokens of `spec`, as far as a spec tells: options of the encoder's family are not in it."""
    return StreamConfig(
        backbone=spec.backbone,
        res=spec.resolution,
        weights=spec.weights_sha256 if spec.random_weights else None,
        dtype=spec.dtype,
        codec=spec.codec,
        compute="bfloat16" if spec.compute == "bfloat16" else "float32",
        crop=spec.geometry.crop_pct != 1.0,
    )
