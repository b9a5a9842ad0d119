"""Are the micro-batches of a token budget complete, in step, within the budget, and nearly without padding?"""

import importlib.util
import random
from pathlib import Path

import pytest

from vlmx.errors import UsageError
from vlmx.train.budget import padded_tokens, plan_micro_batches

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "train_budget.py"


def test_a_plan_is_a_literal():
    lengths = [10, 30, 10, 20, 10, 30, 10, 20]
    assert plan_micro_batches(lengths, 1, 1000) == [[[1, 5, 3, 7, 0, 2, 4, 6]]]
    assert plan_micro_batches(lengths, 2, 100) == [[[7, 0, 2, 4, 6]], [[1, 5, 3]]]  # 5 x 20, 3 x 30
    assert plan_micro_batches(lengths, 2, 60) == [[[3, 7], [5]], [[0, 2, 4, 6], [1]]]  # 40, 30; 40, 30


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("budget", [40, 300, 1500, 10_000])
def test_every_example_once_as_many_steps_and_within_the_budget(world, budget):
    draw = random.Random(world * budget)
    for _ in range(50):
        lengths = [draw.choice([draw.randint(1, 20), draw.randint(1, 500)]) for _ in range(world * draw.randint(1, 12))]
        plan = plan_micro_batches(lengths, world, budget)
        assert sorted(i for own in plan for part in own for i in part) == list(range(len(lengths)))
        assert len(plan) == world
        assert len({len(own) for own in plan}) == 1
        for part in (part for own in plan for part in own):
            assert part
            assert len(part) == 1 or padded_tokens(lengths, part) <= budget
            assert [lengths[i] for i in part] == sorted((lengths[i] for i in part), reverse=True)


def test_an_example_beyond_the_budget_is_alone_and_first():
    plan = plan_micro_batches([5, 900, 5, 5], 2, 100)
    assert plan == [[[1]], [[0, 2, 3]]]


def test_as_few_steps_as_the_budget_allows():
    lengths = [100] * 16
    steps = {budget: len(plan_micro_batches(lengths, 2, budget)[0]) for budget in (800, 799, 400, 200, 100, 1)}
    assert steps == {800: 1, 799: 2, 400: 2, 200: 4, 100: 8, 1: 8}


def test_equal_examples_are_divided_equally():
    plan = plan_micro_batches([7] * 24, 3, 7 * 5)
    assert [[len(part) for part in own] for own in plan] == [[4, 4]] * 3


def test_examples_that_do_not_go_round():
    with pytest.raises(UsageError, match="batch of 6 cannot be divided among 4 processes"):
        plan_micro_batches([1] * 6, 4, 100)


def test_little_is_padding_in_the_simulation():
    spec = importlib.util.spec_from_file_location("train_budget", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    for visual, bound in ((196, 1.25), (1024, 1.12)):
        ratios = benchmark.simulate(visual, steps=40)
        assert 1.0 <= ratios["token budget"] <= bound
        assert ratios["16 at random"] > ratios["16 as in the paper"] > ratios["token budget"]
