"""How fast are caches, beside a raw file, zarr-python and torch's DataLoader?

    python benchmarks/cache.py                     all sections
    python benchmarks/cache.py --only warm cold    some of them; --json FILE keeps the figures

Whatever is compared runs turn by turn in one process on the same tokens (random numbers: fp16, 1024 x 384 and 196 x 384
an image), batches of 16 random images; the figures are medians of the turns and their ratios. "warm": all files were
read from their beginning to their end before, so that they are in the page cache; what takes no waiting and one thread
is compared in processor seconds, which other programs disturb less. "cold": the page cache was emptied of them with
posix_fadvise before every turn, and each image is read once. Files lie below --folder, on the disk that is to be
measured; they take 6 GB.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cache_remote import remote
from cache_writes import writes
from numpy.typing import NDArray

from vlmx.cache_specs.buffers import aligned_empty
from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.layout import SHARDS
from vlmx.cache_specs.loader import TokenLoader
from vlmx.cache_specs.places import LocalPlace
from vlmx.cache_specs.reader import TokenReader, Verify, open_cache
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.cache_specs.writer import CacheWriter

BATCH = 16
TURNS = 15
SHAPES = {1024: TokenShape(grid=(32, 32), dim=384), 196: TokenShape(grid=(14, 14), dim=384)}
IMAGES = {1024: 2048, 196: 8192}
COLD_IMAGES = {1024: 512, 196: 2048}  # of a turn

Figures = dict[str, float]


@dataclass(frozen=True)
class Store:
    """The same tokens as a cache and as a raw file."""

    tokens: int
    cache: Path
    raw: Path
    ids: list[str]

    @property
    def image_bytes(self) -> int:
        return self.tokens * 384 * 2

    @property
    def files(self) -> list[Path]:
        return [self.raw, *sorted(path for path in (self.cache / SHARDS).rglob("*") if path.is_file())]


def make_store(folder: Path, tokens: int) -> Store:
    shape, images = SHAPES[tokens], IMAGES[tokens]
    ids = [f"{number:064x}" for number in range(images)]
    raw = folder / f"raw-{tokens}.bin"
    dice = np.random.default_rng(tokens)
    with CacheWriter(folder / "caches", spec_of(tokens), shape) as writer, open(raw, "wb") as file:
        plans = writer.plan(ids)
        while share := writer.next_share():
            for plan in share:
                tokens_BND = dice.standard_normal((len(plan.ids), tokens, 384), dtype=np.float32).astype(np.float16)
                writer.commit(plan, tokens_BND)
                file.write(tokens_BND.data)
        assert plans
        writer.seal()
        path = Path(writer.place.url)
    os.sync()
    return Store(tokens=tokens, cache=path, raw=raw, ids=ids)


def spec_of(tokens: int, dtype: str = "float16") -> CacheSpec:
    side = SHAPES[tokens].grid[0] * 16
    return CacheSpec(
        backbone=f"random-{tokens}",
        weights_sha256="random:0",
        forward_version=1,
        feature="last",
        out_norm="none",
        geometry=Geometry(mode="letterbox", height=side, width=side, fill=(127, 127, 127)),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        dtype=dtype,  # type: ignore[arg-type]
    )


def in_turns(ways: dict[str, Callable[[], Any]], turns: int = TURNS) -> Figures:
    """Median processor seconds of each way, called turn by turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def show(
    title: str, figures: Figures, images: int, image_bytes: int, ratios: Sequence[tuple[str, str, float | None]]
) -> Figures:
    """Print rates, and ratios of rates (name, reference, goal)."""
    print(f"\n{title}")
    for name, seconds in figures.items():
        rate = images / seconds
        print(f"  {name:44s} {rate:10,.0f} images/s {rate * image_bytes / 1e9:7.2f} GB/s")
    result = {}
    for name, reference, goal in ratios:
        ratio = figures[reference] / figures[name]
        result[f"{title}: {name} / {reference}"] = ratio
        verdict = "" if goal is None else f"   goal {goal}: {'met' if ratio >= goal else 'NOT met'}"
        print(f"  {name} / {reference} = {ratio:.2f}{verdict}")
    return result


def batches(store: Store, seed: int, count: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, len(store.ids), (count, BATCH)).tolist()


def warm_up(store: Store) -> None:
    """Read every file in order, as after a copy, until all of it is in the page cache."""
    for path in store.files:
        with open(path, "rb", buffering=0) as file:
            room = bytearray(1 << 22)
            while file.readinto(room):
                pass


def chill(store: Store) -> None:
    for path in store.files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def reader_of(store: Store, verify: Verify = "first-touch") -> TokenReader:
    reader = open_cache(LocalPlace(store.cache), verify=verify)
    assert isinstance(reader, TokenReader)
    return reader


def warm(store: Store) -> Figures:
    """Random batches from the page cache; our reader has verified every image before."""
    import zarr

    chill(store)
    warm_up(store)
    shape, ids = (BATCH, store.tokens, 384), store.ids
    raw_BND = np.memmap(store.raw, np.float16, "r", shape=(len(ids), *shape[1:]))
    out_BND, reader = aligned_empty(shape, np.dtype(np.float16)), reader_of(store)
    array = zarr.open_group(store.cache / "tokens.zarr", mode="r")["tokens"]
    for start in range(0, len(ids), BATCH):
        numbers = list(range(start, start + BATCH))
        assert np.array_equal(reader.read([ids[k] for k in numbers], out_BND), raw_BND[numbers])
    dice = np.random.default_rng(1)

    def each(way: Callable[[list[int]], Any], count: int = 10) -> Callable[[], None]:
        def run() -> None:
            for numbers in dice.integers(0, len(ids), (count, BATCH)).tolist():  # nobody reads what is hot already
                way(numbers)

        return run

    def ours(numbers: list[int]) -> None:
        reader.read([ids[k] for k in numbers], out_BND)

    def zarr_loop(numbers: list[int]) -> None:
        for place, number in enumerate(numbers):
            out_BND[place] = array[number]

    each(ours, 400)()
    figures = in_turns(
        {
            "memmap[ids]": each(lambda n: raw_BND[n]),
            "memmap take, aligned buffer used again": each(
                lambda n: np.take(raw_BND, n, axis=0, out=out_BND, mode="clip")
            ),
            "ours": each(ours),
            "ours, a new array each time": each(lambda n: reader.read([ids[k] for k in n])),
        }
    )
    slow = {"zarr-python a[i]": each(zarr_loop, 1), "zarr-python oindex": each(lambda n: array.oindex[n], 1)}
    figures |= {name: seconds * 10 for name, seconds in in_turns(slow, 5).items()}
    goal = 0.85 if store.tokens == 1024 else 0.7
    ratios = [
        ("ours", "memmap[ids]", goal),
        ("ours", "memmap take, aligned buffer used again", None),
        ("ours", "zarr-python a[i]", 12.0),
        ("ours", "zarr-python oindex", 100.0),
    ]
    return show(f"warm reads, {store.tokens} x 384", figures, BATCH * 10, store.image_bytes, ratios)


def verification(store: Store) -> Figures:
    """Every image once by a reader that was just opened, with checksums and without."""
    out_BND = aligned_empty((BATCH, store.tokens, 384), np.dtype(np.float16))

    def once(verify: Verify, *, cold: bool) -> Callable[[int], float]:
        clock = time.perf_counter if cold else time.process_time
        images = COLD_IMAGES[store.tokens] if cold else len(store.ids)

        def run(turn: int) -> float:
            reader = reader_of(store, verify)
            order = np.random.default_rng(turn).permutation(len(store.ids))[:images]
            chosen = [[store.ids[k] for k in part] for part in order.reshape(-1, BATCH)]
            if cold:
                chill(store)
            start = clock()
            for ids in chosen:
                reader.read(ids, out_BND)
            return clock() - start

        return run

    result: Figures = {}
    for name, cold in (("warm", False), ("cold", True)):
        warm_up(store)
        ways = {"compared": once("first-touch", cold=cold), "not compared": once("never", cold=cold)}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(7):
            for way, run in ways.items():
                seconds[way].append(run(turn))
        figures = {way: statistics.median(values) for way, values in seconds.items()}
        images = COLD_IMAGES[store.tokens] if cold else len(store.ids)
        title = f"first touch, {name}, {store.tokens} x 384"
        show(title, figures, images, store.image_bytes, [])
        cost = figures["compared"] / figures["not compared"] - 1
        result[f"{title}: cost"] = cost
        print(f"  verification costs {cost:.1%}   goal 15 %: {'met' if cost <= 0.15 else 'NOT met'}")
    return result


def cold(store: Store) -> Figures:
    """Every image at most once, from the disk; beside reads of the same size that bypass the page cache."""
    pages = -(-store.image_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    room = aligned_empty((BATCH, pages), np.dtype(np.uint8))
    out_BND = aligned_empty((BATCH, store.tokens, 384), np.dtype(np.float16))
    direct = os.open(store.raw, os.O_RDONLY | os.O_DIRECT)
    last = os.fstat(direct).st_size - pages
    images = COLD_IMAGES[store.tokens]
    with ThreadPoolExecutor(4) as pool:

        def read_direct(place: int, number: int) -> None:
            offset = min(number * store.image_bytes, last) // mmap.PAGESIZE * mmap.PAGESIZE
            os.preadv(direct, [room[place].data], offset)

        def one_by_one(order: Sequence[Sequence[int]]) -> None:
            for numbers in order:
                for place, number in enumerate(numbers):
                    read_direct(place, number)

        def four_threads(order: Sequence[Sequence[int]]) -> None:
            for numbers in order:
                list(pool.map(read_direct, range(BATCH), numbers))

        def ours(order: Sequence[Sequence[int]]) -> None:
            reader = reader_of(store)
            for numbers in order:
                reader.read([store.ids[k] for k in numbers], out_BND)

        def ours_loader(order: Sequence[Sequence[int]]) -> None:
            chosen = [[store.ids[k] for k in numbers] for numbers in order]
            with TokenLoader(reader_of(store), chosen) as source:
                assert sum(len(tokens_BND) for tokens_BND in source) == images

        ways = {
            "O_DIRECT, one after the other": one_by_one,
            "O_DIRECT, four threads": four_threads,
            "ours, verified": ours,
            "ours, verified, loader of 2 threads": ours_loader,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(7):
            for name, way in ways.items():
                chill(store)
                order = np.random.default_rng(turn).permutation(len(store.ids))[:images].reshape(-1, BATCH).tolist()
                start = time.perf_counter()
                way(order)
                seconds[name].append(time.perf_counter() - start)
    os.close(direct)
    figures = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [
        ("ours, verified", "O_DIRECT, one after the other", 0.85),
        ("ours, verified, loader of 2 threads", "O_DIRECT, one after the other", 0.85),
        ("ours, verified, loader of 2 threads", "O_DIRECT, four threads", None),
    ]
    return show(f"cold reads, {store.tokens} x 384", figures, images, store.image_bytes, ratios)


def loader(store: Store) -> Figures:
    """The threaded loader beside torch's DataLoader with two processes over the same reader, from the page cache."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Batches(Dataset[NDArray[Any]]):
        def __init__(self, reader: TokenReader, chosen: list[list[str]]) -> None:
            self.reader, self.chosen = reader, chosen

        def __len__(self) -> int:
            return len(self.chosen)

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.from_numpy(self.reader.read(self.chosen[index]))

    torch.set_num_threads(1)
    warm_up(store)
    reader, count = reader_of(store), 60
    chosen = [[store.ids[k] for k in numbers] for numbers in batches(store, 5, count)]
    reader.read(store.ids[:BATCH])

    def timed(source: Iterator[Any]) -> float:
        """Seconds for all batches after the first, which waits for processes to start."""
        next(source)
        start = time.perf_counter()
        done = sum(1 for _ in source)
        assert done == count - 1
        return time.perf_counter() - start

    def ours(threads: int) -> float:
        with TokenLoader(reader, chosen, threads=threads) as source:
            return timed(iter(source))

    def theirs(workers: int) -> float:
        return timed(iter(DataLoader(Batches(reader, chosen), batch_size=None, num_workers=workers)))

    ways = {
        "ours, 1 thread": lambda: ours(1),
        "ours, 2 threads": lambda: ours(2),
        "DataLoader, in the process itself": lambda: theirs(0),
        "DataLoader, 2 workers": lambda: theirs(2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(7):
        for name, way in ways.items():
            seconds[name].append(way())
    figures = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [("ours, 2 threads", "DataLoader, 2 workers", 4.0), ("ours, 2 threads", "ours, 1 thread", None)]
    return show(f"loader, {store.tokens} x 384", figures, (count - 1) * BATCH, store.image_bytes, ratios)


def memory(folder: Path) -> Figures:
    """What a reader over a store of 300 GB keeps in memory; the shards are sparse files."""
    program = Path(__file__).with_name("cache_memory.py")
    done = subprocess.run([sys.executable, str(program), str(folder)], check=True, capture_output=True, text=True)
    print(f"\nmemory of a reader over a store of 300 GB\n{done.stdout}", end="")
    return {f"memory: {key}": value for key, value in json.loads(done.stdout.splitlines()[-1]).items()}


SECTIONS: dict[str, Callable[[Store], Figures]] = {
    "warm": warm,
    "verification": verification,
    "cold": cold,
    "loader": loader,
    "writes": lambda store: writes(store.raw.parent, store.tokens),
}
WITHOUT_STORE: dict[str, Callable[[Path], Figures]] = {"memory": memory, "remote": lambda folder: remote()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*SECTIONS, *WITHOUT_STORE]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--tokens", nargs="+", type=int, choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--folder", type=Path, help="where to put the files (default: a new temporary folder)")
    parser.add_argument("--json", type=Path, help="write the ratios to this file")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="vlmx-cache-", dir=arguments.folder))
    figures: Figures = {}
    print(f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}, {folder}")
    try:
        sections = [name for name in arguments.only if name in SECTIONS]
        for tokens in arguments.tokens if sections else ():
            store = make_store(folder, tokens)
            for name in sections:
                figures |= SECTIONS[name](store)
        for name in arguments.only:
            if name in WITHOUT_STORE:
                figures |= WITHOUT_STORE[name](folder)
    finally:
        shutil.rmtree(folder)
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
