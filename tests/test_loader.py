"""Does the loader give the batches in order, out of few buffers, with errors in their places and no thread left?"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_samples import GOOD, flip, tokens_of, write
from numpy.typing import NDArray

from vlmx.cache_specs.layout import shard_key
from vlmx.cache_specs.loader import TokenLoader
from vlmx.cache_specs.reader import TokenReader, open_cache
from vlmx.cache_specs.token_source import TokenSource
from vlmx.errors import CacheCorruptError, CacheError


@pytest.fixture
def source(tmp_path: Path) -> TokenSource:
    return open_cache(write(tmp_path))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("token-loader")] == []


def chosen(count: int, size: int = 3) -> list[list[str]]:
    dice = np.random.default_rng(0)
    return [[GOOD[k] for k in dice.integers(0, len(GOOD), size)] for _ in range(count)]


def expected(ids: list[str]) -> NDArray[Any]:
    return np.stack([tokens_of(image) for image in ids])


@pytest.mark.parametrize(("threads", "ahead"), [(1, 1), (2, 4), (4, 2), (3, 50)])
def test_batches_come_in_their_order(source: TokenSource, threads: int, ahead: int) -> None:
    batches = chosen(20)
    with TokenLoader(source, batches, threads=threads, ahead=ahead) as loader:
        for ids, tokens_BND in zip(batches, loader, strict=True):
            np.testing.assert_array_equal(tokens_BND, expected(ids))
        assert list(loader) == []


def test_few_buffers_are_used_again_and_again(source: TokenSource) -> None:
    with TokenLoader(source, chosen(30), threads=2, ahead=3) as loader:
        places = {tokens_BND.__array_interface__["data"][0] for tokens_BND in loader}
    assert len(places) <= 4  # three ahead and the one that was given
    assert all(place % 4096 == 0 for place in places)


def test_batches_of_all_sizes(source: TokenSource) -> None:
    batches = [GOOD[:size] for size in (1, 5, 2, 9, 0, 3, 9, 1)]
    with TokenLoader(source, batches) as loader:
        for ids, tokens_BND in zip(batches, loader, strict=True):
            assert tokens_BND.shape == (len(ids), 6, 4)
            np.testing.assert_array_equal(tokens_BND, expected(ids) if ids else np.empty((0, 6, 4)))


def test_batches_are_taken_only_a_little_before_they_are_read(source: TokenSource) -> None:
    taken: list[int] = []

    def endless() -> Iterator[list[str]]:
        while True:
            taken.append(1)
            yield GOOD[:2]

    with TokenLoader(source, endless(), ahead=3) as loader:
        for _ in range(5):
            next(loader)
        assert len(taken) == 5 + 3


def test_an_error_is_raised_in_its_place_and_the_others_come(tmp_path: Path) -> None:
    cache = write(tmp_path)
    flip(cache / shard_key(1), 5)
    batches = [GOOD[:2], [GOOD[4]], GOOD[:3], ["a stranger"], GOOD[7:]]
    with TokenLoader(open_cache(cache), batches) as loader:
        np.testing.assert_array_equal(next(loader), expected(GOOD[:2]))
        with pytest.raises(CacheCorruptError, match="shard 1"):
            next(loader)
        np.testing.assert_array_equal(next(loader), expected(GOOD[:3]))
        with pytest.raises(CacheError, match="1 of 1 images are not in cache"):
            next(loader)
        np.testing.assert_array_equal(next(loader), expected(GOOD[7:]))
        with pytest.raises(StopIteration):
            next(loader)


def test_closing_early_ends_the_threads(source: TokenSource, monkeypatch: pytest.MonkeyPatch) -> None:
    fill, reading, go_on = TokenReader._fill, threading.Event(), threading.Event()

    def slow(self: TokenReader, place_of_image: Mapping[str, int], out_BND: NDArray[Any]) -> None:
        reading.set()
        go_on.wait(20)
        fill(self, place_of_image, out_BND)

    monkeypatch.setattr(TokenReader, "_fill", slow)
    loader = TokenLoader(source, chosen(1000), threads=1, ahead=100)
    consumer = threading.Thread(target=lambda: next(loader))
    consumer.start()
    assert reading.wait(20)
    go_on.set()
    consumer.join()
    loader.close()
    loader.close()
    assert list(loader) == []


def test_an_error_of_the_consumer_ends_the_threads(source: TokenSource) -> None:
    def consume() -> None:
        with TokenLoader(source, chosen(100)) as loader:
            next(loader)
            raise KeyError

    with pytest.raises(KeyError):
        consume()


def test_page_locked_buffers_reach_the_gpu(source: TokenSource) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    batches = chosen(9)
    with TokenLoader(source, batches, ahead=2) as loader:
        for ids, tokens_BND in zip(batches, loader, strict=True):
            stored = torch.from_numpy(tokens_BND)
            assert stored.is_pinned()
            np.testing.assert_array_equal(stored.to("cuda", non_blocking=True).cpu().numpy(), expected(ids))
