"""Which of several processes that work together is this one? Ranks, their GPUs, and commands that take --nproc."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from vlmx.errors import UsageError

if TYPE_CHECKING:
    import torch

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True, kw_only=True)
class Rank:
    """The place of one process, as torchrun tells it.

    Attributes:
        index: which, from 0.
        count: how many there are.
        local: which of those of its machine.
        locals: how many these are.
    """

    index: int = 0
    count: int = 1
    local: int = 0
    locals: int = 1


def rank_of(environment: Mapping[str, str]) -> Rank:
    """The place that torchrun's variables give; those that are empty count as not set, and without any it is alone.

    Raises:
        UsageError: they give no place.
    """
    said = {key: environment[key] for key in _VARIABLES if environment.get(key)}
    count = said.get("WORLD_SIZE", "1")
    index, local, locals_ = said.get("RANK", "0"), said.get("LOCAL_RANK", "0"), said.get("LOCAL_WORLD_SIZE", count)
    numbers = all(value.isdecimal() for value in (index, count, local, locals_))
    if not numbers or int(index) >= int(count) or int(local) >= int(locals_):
        raise UsageError(
            "the environment gives this process no place among several",
            why=f"{', '.join(f'{key}={value}' for key, value in said.items())}: ranks count from 0 to the size minus 1",
            fix=f"unset {', '.join(_VARIABLES)}, or let torchrun set them",
        )
    return Rank(index=int(index), count=int(count), local=int(local), locals=int(locals_))


def shared_device(rank: Rank) -> torch.device:
    """The processor of one of several processes that need no word from each other: a GPU of its own, while there are
    so many; then several share one.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", rank.local % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def threads_each(count: int) -> int:
    """How many threads each of `count` processes gets of the cores that this one may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // count)


def refuse_nested(count: int) -> None:
    """Refuse `--nproc` in a process that torchrun has started.

    Args:
        count: how many processes torchrun has started.

    Raises:
        UsageError: more than one.
    """
    if count > 1:
        raise UsageError(
            "--nproc within torchrun",
            why=f"torchrun has started {count} processes already",
            fix="leave one of the two away",
        )


class NprocCommand(click.Command):
    """A command that can start itself as several processes: its context keeps the arguments as they were given, in
    `meta["arguments"]`.
    """

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        given = list(args)
        context = super().make_context(info_name, args, parent, **extra)
        context.meta["arguments"] = given
        return context
