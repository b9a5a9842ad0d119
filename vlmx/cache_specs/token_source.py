"""What can phase two ask of visual tokens, whether they lie in one cache or side by side in several?

Shapes: out_BND [images, tokens, channels] in storage dtype (bfloat16 as the uint16 of its bits).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlmx.cache_specs.buffers import aligned_empty
from vlmx.cache_specs.ids import list_images
from vlmx.cache_specs.places import Place, place_of
from vlmx.cache_specs.quantize import Quantization
from vlmx.cache_specs.spec import DType, TokenShape
from vlmx.errors import CacheError, SpecMismatchError

if TYPE_CHECKING:
    from vlmx.cache_specs.fused import TokenSpec
    from vlmx.cache_specs.reader import TokenReader

DEFAULT_ROOT = Path("caches")


class TokenSource(ABC):
    """Random access to visual tokens, by image id: a `TokenReader`, or a `FusedReader` over several of them.

    Any number of threads may read from one source, and it may be handed to other processes, forked or spawned.

    Attributes:
        spec: the identity of the tokens.
        shape: token grid and width of one image.
        ids: the images that have tokens, as keys.
        failed: image id -> why it could not be decoded.
        sealed: whether the extraction came to its end.
        quantization: 8-bit caches: what the stored numbers stand for, see `quantize`; None in others.
    """

    spec: TokenSpec
    shape: TokenShape
    ids: Mapping[str, int]
    failed: Mapping[str, str]
    sealed: bool
    quantization: Quantization | None = None

    @property
    @abstractmethod
    def parts(self) -> tuple[TokenReader, ...]:
        """The caches, in the order of their channels."""

    @abstractmethod
    def _fill(self, place_of_image: Mapping[str, int], out_BND: NDArray[Any]) -> None:
        """Read different images that are known to be here, each into its place in `out_BND`."""

    @abstractmethod
    def announce(self, ids: Iterable[str]) -> None:
        """Say that images will be read soon, so that a disk can begin; images that are not here are passed over."""

    def read(self, ids: Sequence[str], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """The tokens of `ids`, in that order; an id may come more than once and is then read once.

        Args:
            ids: image ids.
            out: filled and returned when given: [len(ids), tokens, channels], C-contiguous, `storage_dtype`. Best from
                `buffers.aligned_empty`, and used again and again.

        Returns:
            [len(ids), tokens, channels] in storage dtype.

        Raises:
            CacheError: the cache lacks images (`require`).
            CacheCorruptError: bytes are not what was written; names the shard and the image.
        """
        shape = (len(ids), self.shape.num_tokens, self.shape.dim)
        if out is None:
            out = aligned_empty(shape, self.storage_dtype)
        if out.shape != shape or out.dtype != self.storage_dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"out is {out.dtype} {out.shape}, {'' if out.flags.c_contiguous else 'not '}C-contiguous; "
                f"{self.storage_dtype} {shape}, C-contiguous, is needed"
            )
        place_of_image = dict(zip(ids, range(len(ids)), strict=True))  # the last place where it comes more than once
        if not self.ids.keys() >= place_of_image.keys():
            self.require(ids)
        if place_of_image:
            self._fill(place_of_image, out)
        if len(place_of_image) < len(ids):
            for place, image in enumerate(ids):
                if place_of_image[image] != place:
                    out[place] = out[place_of_image[image]]
        return out

    def read_float32(self, ids: Sequence[str]) -> NDArray[np.float32]:
        """As `read`, as the numbers that the stored ones stand for: without loss, or decoded from 8 bits."""
        stored_BND = self.read(ids)
        if self.quantization is not None:
            return self.quantization.decode(stored_BND)
        if self.logical_dtype == "bfloat16":
            return (stored_BND.astype(np.uint32) << 16).view(np.float32)
        return stored_BND.astype(np.float32, copy=False)

    @property
    def scale(self) -> NDArray[np.float32] | None:
        """8-bit caches: one step of each channel, [channels]; else None."""
        return None if self.quantization is None else self.quantization.scale_D

    @property
    def offset(self) -> NDArray[np.float32] | None:
        """8-bit caches: what the code 0 of each channel stands for, [channels]; else None."""
        return None if self.quantization is None else self.quantization.offset_D

    @property
    def name(self) -> str:
        """Name of the folder, joined with + where there are several."""
        return "+".join(part.place.name for part in self.parts)

    @property
    def root(self) -> Place:
        """The folder that the (first) cache lies in."""
        return self.parts[0].place.parent

    @property
    def num_tokens(self) -> int:
        """Tokens of one image."""
        return self.shape.num_tokens

    @property
    def logical_dtype(self) -> DType:
        """What the numbers are; bfloat16 comes as the uint16 of its bits, int8 as codes (`quantization`)."""
        return self.spec.dtype

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        """dtype of what `read` gives."""
        return np.dtype(self.spec.storage_dtype)

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, image: str) -> bool:
        return image in self.ids

    def missing(self, ids: Iterable[str]) -> list[str]:
        """Those of `ids` that have no tokens here, each once, in order of appearance."""
        return [image for image in dict.fromkeys(ids) if image not in self.ids]

    def require_spec(self, spec: TokenSpec) -> None:
        """Make sure that these are the tokens of `spec`.

        Raises:
            SpecMismatchError: they are not; the message lists every field that differs.
        """
        if type(self.spec) is type(spec):
            differences = self.spec.differences(spec)  # type: ignore[arg-type]  # equal types, as was just checked
        else:
            differences = [f"caches: {self.spec.name}, not {spec.name}"]
        if differences:
            raise SpecMismatchError(
                f"cache {self.name} was made with another spec than {spec.name}",
                why="; ".join(differences),
                fix=f"use the cache {spec.name}, or extract it",
            )

    def require(self, ids: Iterable[str], *, data: str = "") -> None:
        """Make sure that all of `ids` have tokens.

        Args:
            ids: image ids. If it is a mapping from them to the data's own keys, errors call the images by these.
            data: what they are images of, as `vlmx extract --data` takes it, further options included; named in the
                error.

        Raises:
            CacheError: how many are missing, in which cache, the first few, and the commands that make them.
        """
        wanted = list(dict.fromkeys(ids))
        lacking = {part: missing for part in self.parts if (missing := part.missing(wanted))}
        if not lacking:
            return
        names: Mapping[str, str] = ids if isinstance(ids, Mapping) else {}
        raise CacheError(
            "; ".join(
                f"{len(ids)} of {len(wanted)} images are not in cache {part.name}" for part, ids in lacking.items()
            ),
            why="; ".join(_examples(part, missing, names) for part, missing in lacking.items()),
            fix=_fix(lacking, data or "DATA"),
        )


def _fix(lacking: Mapping[TokenReader, Sequence[str]], data: str) -> str:
    commands = extract_commands(lacking, data)
    if all(image in part.failed for part, missing in lacking.items() for image in missing):
        return f"leave them out, or put readable files in their place and give {commands}"
    return f"{commands} adds them, and encodes nothing twice"


def _examples(part: TokenReader, missing: Sequence[str], names: Mapping[str, str]) -> str:
    if names:
        few = list_images([names[image] for image in missing])
    else:
        few = "the first are " + ", ".join(image[:12] for image in missing[:3]) + (", ..." if len(missing) > 3 else "")
    broken = [image for image in missing if image in part.failed]
    if not broken:
        return few
    return f"{few}; {len(broken)} of them could not be decoded, e.g. {part.failed[broken[0]]}"


def extract_commands(parts: Iterable[TokenReader], data: str, options: Sequence[str] = ()) -> str:
    """What to type so that each of these caches gets the images of `data`: a command for each, joined with &&.

    Args:
        parts: the caches.
        data: as `vlmx extract --data` takes it.
        options: further words for `vlmx extract`.
    """
    return " && ".join(_extract_command(part, data, options) for part in parts)


def _extract_command(part: TokenReader, data: str, options: Sequence[str]) -> str:
    spec = part.spec
    words = ["vlmx extract --backbone", spec.backbone, "--res", spec.resolution]
    words += ["--weights", spec.weights_sha256] if spec.random_weights else []
    words += ["--dtype", spec.dtype] if spec.dtype != "float16" else []
    words += ["--codec", spec.codec] if spec.codec != "crc32c" else []
    words += ["--compute", spec.compute] if spec.compute != "float32" else []
    words += _encoder_options(part.place)
    words += [*options, "--data", data]
    words += ["--out", part.root.url] if part.root != place_of(DEFAULT_ROOT) else []
    return " ".join(words)


def _encoder_options(cache: Place) -> list[str]:
    """The options of the encoder that made a cache, as `vlmx extract` takes them; all its extractions had the same."""
    from vlmx.cache_specs.audit import read_runs

    words: list[str] = []
    for name, value in (read_runs(cache) or [{}])[0].get("options", {}).items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words
