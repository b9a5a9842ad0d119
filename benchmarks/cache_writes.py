"""What does writing a cache cost the processor, beside zarr-python? Run by `benchmarks/cache.py`, or alone.

    python benchmarks/cache_writes.py

Both write the same random tokens as shards of the same layout, a whole shard a call, on the same disk, in turn; the
files are compared byte for byte. The figure is processor time for each byte, of all threads, with ours brought to the
disk and recorded as an extraction does it, and zarr-python's not.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.layout import shard_key
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.cache_specs.writer import CacheWriter

SHAPES = {1024: TokenShape(grid=(32, 32), dim=384), 196: TokenShape(grid=(14, 14), dim=384)}
TURNS = 7


def writes(folder: Path, tokens: int) -> dict[str, float]:
    """Print and give zarr-python's processor time / ours."""
    shape = SHAPES[tokens]
    spec = CacheSpec(
        backbone=f"written-{tokens}",
        weights_sha256="random:0",
        forward_version=1,
        feature="last",
        out_norm="none",
        geometry=Geometry(mode="letterbox", height=512, width=512, fill=(127, 127, 127)),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    seconds: dict[str, list[float]] = {"zarr-python": [], "ours": []}
    for turn in range(TURNS):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            here = Path(name)
            with CacheWriter(here / "ours", spec, shape) as writer:
                slots = writer.images_per_shard
                ids = [f"{turn:02x}{number:062x}" for number in range(slots)]
                dice = np.random.default_rng(turn)
                tokens_BND = dice.standard_normal((slots, tokens, shape.dim), dtype=np.float32).astype(np.float16)
                (plan,) = writer.plan(ids)
                writer.next_share()
                theirs = _zarr_array(here / "theirs.zarr", slots, tokens, shape.dim)
                seconds["zarr-python"].append(_processor(partial(theirs.__setitem__, slice(None), tokens_BND)))
                seconds["ours"].append(_processor(partial(writer.commit, plan, tokens_BND)))
                ours = writer.place.read(shard_key(0))
            assert ours == (here / "theirs.zarr" / "c" / "0" / "0" / "0").read_bytes(), "the shards differ"
    gigabytes = tokens_BND.nbytes / 1e9
    print(f"\nwrites, {tokens} x 384, shards of {slots}, byte for byte the same")
    for way, values in seconds.items():
        print(f"  {way:44s} {gigabytes / statistics.median(values):7.2f} GB for a second of processor time")
    ratio = statistics.median(a / b for a, b in zip(seconds["zarr-python"], seconds["ours"], strict=True))
    print(f"  zarr-python / ours = {ratio:.2f}   goal 3.0: {'met' if ratio >= 3 else 'NOT met'}")
    return {f"writes, {tokens} x 384: zarr-python / ours": ratio}


def _zarr_array(path: Path, images: int, tokens: int, dim: int):  # type: ignore[no-untyped-def]
    import zarr
    from zarr.codecs import Crc32cCodec

    return zarr.create_array(
        path,
        shape=(images, tokens, dim),
        chunks=(1, tokens, dim),
        shards=(images, tokens, dim),
        dtype=np.float16,
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=0,
        config={"write_empty_chunks": True},
    )


def _processor(work: Callable[[], object]) -> float:
    """Processor seconds of all threads."""
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="vlmx-cache-") as folder:
        for tokens in SHAPES:
            writes(Path(folder), tokens)
