"""How much of the data can be learned from? Looked at before a training starts, with its tokenizer and its limits.

A conversation that is cut still teaches what stands before the cut. One without a learned token teaches nothing: its
answers lie behind the cut, or they are empty in the prompt's format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmx.console import note, warn
from vlmx.data.llava665k import SourceCount
from vlmx.errors import DataError
from vlmx.models.llm import is_mini
from vlmx.models.llm_parts import llm_without_weights
from vlmx.models.prompts import IGNORED, choose_prompt
from vlmx.train.collate import Collator, build_collator
from vlmx.train.plan import TrainPlan
from vlmx.train.settings import TrainConfig

LOOKED_AT = 1024  # a share of 1 % is then known to +-0.6 % (95 %), after seconds at most
SHOWN = 5
_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What some conversations of a training's data are like.

    Attributes:
        looked_at: how many; they are spread evenly over the data, and all of it if there are no more than LOOKED_AT.
        cut: ids of those that do not fit as a whole.
        unlearned: ids of those in which nothing is learned.
    """

    looked_at: int
    cut: tuple[str, ...]
    unlearned: tuple[str, ...]

    @property
    def text(self) -> str:
        """For people."""
        return (
            f"{len(self.cut):,} are cut, {len(self.unlearned):,} have nothing to learn, of {self.looked_at:,} looked at"
        )


def survey(plan: TrainPlan, collator: Collator) -> Survey:
    """Encode conversations as the training will, and count."""
    conversations = plan.conversations
    count = min(LOOKED_AT, len(conversations))
    some = [conversations[number * len(conversations) // count] for number in range(count)]
    cut: list[str] = []
    unlearned: list[str] = []
    for start in range(0, count, _AT_ONCE):
        part = some[start : start + _AT_ONCE]
        for conversation, row in zip(part, collator.rows(part), strict=True):
            if row.truncated:
                cut.append(conversation.id)
            if (row.labels == IGNORED).all():
                unlearned.append(conversation.id)
    return Survey(looked_at=count, cut=tuple(cut), unlearned=tuple(unlearned))


def survey_before_start(plan: TrainPlan, *, reports: bool) -> None:
    """Show what the data are, and make sure that they can be learned from; no weights are loaded.

    Args:
        plan: of the training.
        reports: whether this process tells the user.

    Raises:
        DataError: too much is cut or has nothing to learn; see `require_learnable`.
        WeightsError: there is no such LLM.
        UsageError: LLM, prompt format and visual tokens do not go together.
    """
    llm, tokenizer = llm_without_weights(plan.config.llm)
    prompt = choose_prompt(plan.config.prompt, tokenizer, mini_llm=is_mini(plan.config.llm))
    found = survey(plan, build_collator(plan, prompt, llm.config))
    if reports:
        for line in source_lines(plan.sources):
            note(line)
        if found.cut or found.unlearned:
            warn(f"conversations: {found.text}")
    require_learnable(found, plan.config)


def require_learnable(found: Survey, config: TrainConfig) -> None:
    """Compare with `watch.max_cut` and `watch.max_unlearned`.

    Raises:
        DataError: either is exceeded; both are reported if both are.
    """
    problems, keys = [], []
    for key, ids, what in (
        ("max_cut", found.cut, "are cut"),
        ("max_unlearned", found.unlearned, "have nothing to learn"),
    ):
        most = getattr(config.watch, key)
        if len(ids) > most * found.looked_at:
            more = ", ..." if len(ids) > SHOWN else ""
            problems.append(f"{len(ids):,} {what}, more than watch.{key} = {most:.3g}: {', '.join(ids[:SHOWN])}{more}")
            keys.append(f"watch.{key}=1")
    if not problems:
        return
    longer = (
        f"raise max_text_tokens ({config.max_text_tokens}), or choose an LLM with a longer context"
        if found.cut
        else "see whether their answers are empty"
    )
    raise DataError(
        f"too many of {found.looked_at:,} conversations looked at cannot be learned from as they are",
        why="; ".join(problems),
        fix=f"{longer}, take these conversations out, or accept it with {' '.join(keys)}",
    )


def source_lines(sources: Sequence[SourceCount]) -> list[str]:
    """The parts of the published LLaVA-1.5 mixture that data have, a line each; none for other data."""
    return [
        f"  {source.folder:<21}{source.found:>9,} of {source.published:>7,}  {', '.join(source.data_sets)}"
        for source in sources
    ]
