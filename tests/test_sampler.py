"""Is the batch order a function of (seed, epoch, data) alone, with the reference's rules, and the reference's own?"""

import hashlib
import time

import numpy as np
import pytest

from vlmx.data.records import Conversation, Turn
from vlmx.errors import UsageError
from vlmx.train.optim import lr_factor
from vlmx.train.sampler import (
    Sizes,
    batches_of,
    epoch_batches,
    order_digest,
    rank_share,
    repeats,
    steps_an_epoch,
    word_count,
)


def conversation(number, *, image):
    turn = Turn(question="w " * (number % 7 + 1), answer="a")
    return Conversation(id=f"c{number}", image=f"{number}.jpg" if image else None, turns=(turn,))


MIXED = [conversation(n, image=n % 3 != 0) for n in range(50)]  # 33 with an image, 17 without


def batches(seed=7, epoch=0, size=8, data=MIXED, **order):
    return epoch_batches(data, seed=seed, epoch=epoch, global_batch=size, **order)


def sha256(order):
    return hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()


def test_order_is_a_literal():
    assert batches(size=4)[:3].tolist() == [[27, 39, 30, 15], [11, 17, 37, 22], [41, 13, 25, 44]]
    assert order_digest(MIXED, batches()) == "4c98f1744e56fe63a0d2b9d6d7ad4273b3830db8fbcace0e6df28fba3531d9d1"


def test_seed_and_epoch_change_the_order():
    digests = {order_digest(MIXED, batches(seed=seed, epoch=epoch)) for seed in (7, 8) for epoch in (0, 1)}
    assert len(digests) == 4


def test_every_example_comes_and_the_last_batch_is_completed_from_the_first():
    order = batches()
    assert len(order) == steps_an_epoch(MIXED, 8) == 5 + 3
    counts = np.bincount(order.ravel(), minlength=50)
    assert counts.min() == 1
    assert counts.max() == 2
    assert counts.sum() == 64
    assert [int((counts[np.arange(50) % 3 != 0] == 2).sum()), int((counts[::3] == 2).sum())] == [7, 7]


def test_kinds_do_not_mix_and_their_batches_do():
    with_image = [{MIXED[i].image is not None for i in batch} for batch in batches()]
    assert all(len(kinds) == 1 for kinds in with_image)
    assert with_image != sorted(with_image, key=str)
    assert with_image != sorted(with_image, key=str, reverse=True)


def test_longer_conversations_first():
    for batch in batches():
        words = [word_count(MIXED[i]) for i in batch]
        assert words == sorted(words, reverse=True)


def test_fewer_examples_than_a_batch():
    few = [conversation(n, image=True) for n in range(3)]
    (batch,) = batches(data=few)
    assert sorted(np.bincount(batch).tolist()) == [2, 3, 3]


@pytest.mark.parametrize("order", ["default", "paper"])
@pytest.mark.parametrize("images", [3, 8, 9, 13, 16, 40, 50])
def test_repeats_are_those_of_the_batches(order, images):
    data = [conversation(n, image=n < images) for n in range(images + 6)]
    if order == "paper" and images == 3:
        return  # its batches cannot be cut
    seen = np.bincount(batches(data=data, order=order).ravel())
    found = repeats(data, 8, order)
    assert (found.conversations, found.most) == ((seen > 1).sum(), seen.max())


def test_repeats_are_said_as_they_are():
    rows = [conversation(n, image=n >= 3) for n in range(99)]
    assert repeats(rows, 32).text == "3 conversations are seen more than once, up to 11 times, to complete batches"
    assert repeats(rows, 8).text == "3 conversations are seen more than once, up to 3 times, to complete batches"
    assert repeats(rows, 3).text == ""
    assert repeats(MIXED, 8).text == "14 conversations are seen twice to complete batches"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_divide_a_batch(world):
    batch = np.arange(16)
    shares = [rank_share(batch, rank=rank, world=world, micro_batch=2) for rank in range(world)]
    assert {len(share) for share in shares} == {8 // world}
    micro_batches = [tuple(m) for turn in zip(*shares, strict=True) for m in turn]
    assert micro_batches == [(n, n + 1) for n in range(0, 16, 2)]  # the same micro-batches in every world


# What prismatic-vlms' SplitModalitySampler (commit 874c5bb) gives for the lengths of MIXED: its ranks side by side.
REFERENCE = {
    (1, 7, 0): ([34, 11, 4, 2, 16, 43, 1, 35], "0c016e488dbfeb8f"),
    (2, 7, 0): ([34, 2, 16, 35, 11, 4, 43, 1], "59a7fce8b23ac12b"),
    (4, 7, 0): ([34, 35, 11, 43, 4, 1, 2, 16], "1ddd84c90214db9b"),
    (1, 7, 1): ([41, 26, 46, 44, 22, 29, 7, 49], "598848844d744b1c"),
    (2, 7, 1): ([41, 44, 22, 7, 26, 46, 29, 49], "d247bd0efe12ce70"),
    (4, 8, 0): ([41, 49, 26, 7, 46, 29, 44, 22], "7e3f9e107e24997e"),
}


@pytest.mark.parametrize(("world", "seed", "epoch"), REFERENCE)
def test_the_papers_order_is_the_references(world, seed, epoch):
    order = batches(seed, epoch, order="paper", world=world)
    first, digest = REFERENCE[world, seed, epoch]
    assert order[0].tolist() == first
    assert sha256(order)[:16] == digest
    assert len(order) == steps_an_epoch(MIXED, 8, "paper") == 8


@pytest.mark.parametrize("world", [2, 4])
def test_the_papers_batches_have_the_same_members_in_every_world(world):
    alone, together = batches(order="paper"), batches(order="paper", world=world)
    assert np.sort(alone).tolist() == np.sort(together).tolist()
    assert alone.tolist() != together.tolist()


def test_the_papers_longest_batch_comes_first():
    lengths = [word_count(c) + 577 * (c.image is not None) for c in MIXED]
    longest = [max(lengths[example] for example in batch) for batch in batches(order="paper")]
    assert longest[0] == max(longest) > min(longest)


def test_in_the_papers_order_a_process_takes_slices_of_its_part():
    batch = np.arange(16)
    shares = [rank_share(batch, rank=rank, world=2, micro_batch=4, order="paper") for rank in range(2)]
    assert [[part.tolist() for part in share] for share in shares] == [
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[8, 9, 10, 11], [12, 13, 14, 15]],
    ]


def test_the_papers_short_kinds_run_into_each_other():
    data = [conversation(n, image=n != 2) for n in range(4)]  # 3 with an image, 1 without; each is completed only once
    assert batches(data=data, order="paper").tolist() == [[3, 3, 1, 1, 0, 0, 2, 2]]  # the reference's, too
    assert batches(data=data, order="paper", world=2).tolist() == [[3, 1, 0, 3, 1, 0, 2, 2]]
    assert steps_an_epoch(data, 8, "paper") == 1
    assert steps_an_epoch(data, 8) == len(batches(data=data)) == 2
    assert all(len({data[i].image is None for i in batch}) == 1 for batch in batches(data=data))


@pytest.mark.parametrize(
    ("data", "world", "text"),
    [
        (MIXED[::3], 1, "needs examples with an image"),
        ([c for c in MIXED if c.image][:11] + MIXED[:1], 1, "cannot cut this data"),
        (MIXED, 3, "cannot be divided among 3 processes"),
    ],
)
def test_where_the_references_sampler_fails_the_papers_order_says_why(data, world, text):
    with pytest.raises(UsageError, match=text):
        batches(data=data, order="paper", world=world)
    assert len(batches(data=data)) == steps_an_epoch(data, 8)


def test_llava_mix_has_the_papers_number_of_steps():
    image, text = (conversation(0, image=kind) for kind in (True, False))
    mix = [image] * 624_610 + [text] * 40_688
    assert steps_an_epoch(mix, 128) == steps_an_epoch(mix, 128, "paper") == 5198
    rising = [lr_factor(step, 5198, 0.03) for step in range(157)]
    assert rising.index(1.0) == 155
    assert rising[156] < 1.0


def test_orders_of_the_whole_llava_mix():
    position = np.arange(665_298)
    has_image = position % 16 != 5
    has_image[np.flatnonzero(~has_image)[40_688:]] = True
    sizes = Sizes(has_image=has_image, words=position * 7919 % 613 + 2 - has_image)
    for order in ("default", "paper"):
        started_s = time.process_time()
        rows = batches_of(sizes, seed=7, epoch=0, global_batch=128, order=order)
        assert time.process_time() - started_s < 3
        assert rows.shape == (5198, 128)
        with_image = has_image[rows]
        assert (with_image.all(axis=1).sum(), (~with_image).all(axis=1).sum()) == (4880, 318)
        times = np.bincount(rows.ravel(), minlength=len(position))
        assert (times.min(), times.max(), (times == 2).sum()) == (1, 2, 46)
        assert ((times == 2) & has_image).sum() == 30
    eight = batches_of(sizes, seed=7, epoch=0, global_batch=128, order="paper", world=8)
    assert sha256(rows) == "560a2190842685b4b67e9fe9c14424168fba245efca35eb049e33817520c2dec"  # of the reference
    assert sha256(eight) == "0cd6d63c74d5f4e04d7d331c6318ea3074def52f4f83f9ccd9bd5974326d52dd"
