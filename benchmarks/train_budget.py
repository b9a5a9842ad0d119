"""How much compute is padding, for each way to divide a global batch among processes?

    python benchmarks/train_budget.py

Simulates steps of 128 examples on 4 processes: texts of log-normal length (mean 266 tokens, sigma 0.85, at most 2048)
after 196 or 1024 visual tokens. A step has micro-batches that all processes begin together, and each lasts as long as
the dearest of them: rows x longest row, or their own tokens where rows are packed. Figures are these costs added up /
the real tokens of a process, so 1.00 is a step without padding in which nobody waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from vlmx.train.budget import padded_tokens, plan_micro_batches
from vlmx.train.sampler import BatchOrder, Indices, Sizes, batches_of, rank_share

WORLD = 4
GLOBAL_BATCH = 128
MICRO_BATCH = 16
MEAN_TEXT, SIGMA, MAX_TEXT = 266, 0.85, 2048
WAYS = (
    "16 at random",
    "16 of like length (default order)",
    "16 as in the paper",
    "token budget",
    "token budget, packed rows",
)

Divide = Callable[[Indices], Sequence[Sequence[Sequence[int]]]]  # a batch -> [process][micro-batch] -> examples


def simulate(visual_tokens: int, *, steps: int = 200, seed: int = 0) -> dict[str, float]:
    """Mean cost of a step / the cost without padding, by way to divide.

    Args:
        visual_tokens: tokens of an image; every example has one.
        steps: how many global batches.
        seed: of the lengths.
    """
    rng = np.random.default_rng(seed)
    text = rng.lognormal(np.log(MEAN_TEXT) - SIGMA**2 / 2, SIGMA, steps * GLOBAL_BATCH).clip(1, MAX_TEXT)
    words = text.astype(np.int64)
    lengths = (words + visual_tokens).tolist()
    budget = sum(lengths) * 5 // (4 * steps * WORLD * 2)  # two micro-batches a process suffice, with a quarter to spare
    sizes = Sizes(has_image=np.ones(len(words), dtype=bool), words=words)
    default = batches_of(sizes, seed=7, epoch=0, global_batch=GLOBAL_BATCH)
    paper = batches_of(sizes, seed=7, epoch=0, global_batch=GLOBAL_BATCH, order="paper", world=WORLD)

    def by_budget(batch: Indices, *, packed: bool) -> list[list[list[int]]]:
        plan = plan_micro_batches([lengths[example] for example in batch], WORLD, budget, packed=packed)
        return [[batch[part].tolist() for part in own] for own in plan]

    shuffled = rng.permutation(len(words)).reshape(-1, GLOBAL_BATCH)
    return {
        WAYS[0]: _ratio(shuffled, partial(_fixed, order="default"), lengths),
        WAYS[1]: _ratio(default, partial(_fixed, order="default"), lengths),
        WAYS[2]: _ratio(paper, partial(_fixed, order="paper"), lengths),
        WAYS[3]: _ratio(default, partial(by_budget, packed=False), lengths),
        WAYS[4]: _ratio(default, partial(by_budget, packed=True), lengths, packed=True),
    }


def _fixed(batch: Indices, order: BatchOrder) -> list[list[list[int]]]:
    """Micro-batches of 16."""
    shares = [rank_share(batch, rank=r, world=WORLD, micro_batch=MICRO_BATCH, order=order) for r in range(WORLD)]
    return [[part.tolist() for part in share] for share in shares]


def _ratio(batches: Indices, divide: Divide, lengths: Sequence[int], *, packed: bool = False) -> float:
    def cost_of(part: Sequence[int]) -> int:
        return sum(lengths[example] for example in part) if packed else padded_tokens(lengths, part)

    ratios = []
    for batch in batches:
        together = zip(*divide(batch), strict=True)
        cost = sum(max(cost_of(part) for part in parts) for parts in together)
        ratios.append(cost / (sum(lengths[example] for example in batch) / WORLD))
    return float(np.mean(ratios))


def main() -> None:
    results = {visual: simulate(visual) for visual in (196, 1024)}
    print(f"{'cost / ideal':<34} " + " ".join(f"{visual:>5} visual" for visual in results))
    for way in WAYS:
        print(f"{way:<34} " + " ".join(f"{result[way]:>12.2f}" for result in results.values()))


if __name__ == "__main__":
    main()
