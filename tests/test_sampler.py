"""Is the batch order a function of (seed, epoch, data) alone, with the reference's rules?"""

import numpy as np
import pytest

from vlmx.data.records import Conversation, Turn
from vlmx.train.sampler import epoch_batches, order_digest, rank_share, steps_an_epoch, word_count


def conversation(number, *, image):
    turn = Turn(question="w " * (number % 7 + 1), answer="a")
    return Conversation(id=f"c{number}", image=f"{number}.jpg" if image else None, turns=(turn,))


MIXED = [conversation(n, image=n % 3 != 0) for n in range(50)]  # 33 with an image, 17 without


def batches(seed=7, epoch=0, size=8, data=MIXED):
    return epoch_batches(data, seed=seed, epoch=epoch, global_batch=size)


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


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_divide_a_batch(world):
    batch = np.arange(16)
    shares = [rank_share(batch, rank=rank, world=world, micro_batch=2) for rank in range(world)]
    assert {len(share) for share in shares} == {8 // world}
    micro_batches = [tuple(m) for turn in zip(*shares, strict=True) for m in turn]
    assert micro_batches == [(n, n + 1) for n in range(0, 16, 2)]  # the same micro-batches in every world


def test_llava_mix_has_the_papers_number_of_steps():
    image, text = (conversation(0, image=kind) for kind in (True, False))
    assert steps_an_epoch([image] * 624_610 + [text] * 40_688, 128) == 5198
