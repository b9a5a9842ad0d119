"""How fast and how large is a forward pass of our state-space encoders on one CPU core, beside the published code?

    .venv/bin/python benchmarks/extract.py [--official FOLDER]

FOLDER holds clones of the published repositories (benchmarks/official.py says which); without it only our own figures
are measured. Everything that a ratio is made of runs back to back in this process, in turns, and is measured in CPU
time of the process, so that another program on the machine disturbs both alike. A figure is the ratio of the fastest
turns; medians stand beside them. Both networks have the same weights and get the same images; a ratio is only printed
after their tokens were found equal. Takes about seven minutes with FOLDER, one without.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import argparse
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import official
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vlmx.console import note, table
from vlmx.extract.backbones import vmamba
from vlmx.extract.backbones.base import Backbone, build_backbone
from vlmx.extract.ops import dense
from vlmx.extract.ops.engines import choose

Whose = Literal["official", "ours"]
Seconds = list[float]

EQUAL_TOKENS = 5e-5  # largest difference, in standard deviations of the tokens, that rounding explains in float32
OWN = 1.3, 0.10  # goals: forward / products at most, scan / forward at most


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One network and one kind of input.

    Attributes:
        title: as the table shows it.
        backbone: our name.
        builder: function of the published code that builds it.
        res: side of the square images in pixels.
        batch: images of one forward pass.
        turns: how often each side is measured.
        goals: official / ours to be reached, for each dtype of ours.
    """

    title: str
    backbone: str
    builder: str
    res: int
    batch: int
    turns: int
    goals: dict[torch.dtype, float]

    def images(self) -> Tensor:
        return torch.randn(self.batch, 3, self.res, self.res, generator=torch.Generator().manual_seed(1))

    def ours(self, state: dict[str, Tensor] | None, dtype: torch.dtype = torch.float32) -> Backbone:
        weights = "random:0" if state is None else state
        return build_backbone(self.backbone, res=(self.res, self.res), weights=weights, dtype=dtype)

    def published(self, folder: Path) -> official.Official:
        return (official.vim if self.backbone.startswith("vim") else official.vmamba)(folder, self.builder)


_T, _S = "vmamba_tiny_s1l8", "vmamba_small_s2l15"
_VIM_S = "vim_small_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
_BOTH = {torch.float32: 5.0, torch.bfloat16: 9.0}
SETTINGS = (
    Setting(title="VMamba-T 512x512", backbone="vmamba-t-in1k", builder=_T, res=512, batch=1, turns=5, goals=_BOTH),
    Setting(title="VMamba-T 512x512", backbone="vmamba-t-in1k", builder=_T, res=512, batch=8, turns=2, goals=_BOTH),
    Setting(
        title="VMamba-S 224x224",
        backbone="vmamba-s-in1k",
        builder=_S,
        res=224,
        batch=1,
        turns=15,
        goals={torch.float32: 4.5},
    ),
    Setting(
        title="VMamba-S 224x224",
        backbone="vmamba-s-in1k",
        builder=_S,
        res=224,
        batch=8,
        turns=3,
        goals={torch.float32: 4.5},
    ),
    Setting(
        title="Vim-S 224x224",
        backbone="vim-s-in1k",
        builder=_VIM_S,
        res=224,
        batch=1,
        turns=9,
        goals={torch.float32: 8.0},
    ),
    Setting(
        title="Vim-S 224x224",
        backbone="vim-s-in1k",
        builder=_VIM_S,
        res=224,
        batch=8,
        turns=2,
        goals={torch.float32: 8.0},
    ),
)


def in_turns(turns: int, **calls: Callable[[], object]) -> dict[str, Seconds]:
    """CPU seconds of each call, made once a turn, one after the other. Make each once before: the first is slow."""
    seconds: dict[str, Seconds] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    return seconds


def difference(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square difference, in standard deviations of what is expected."""
    apart, std = (found.double() - expected.double()).abs(), expected.double().std()
    return float(apart.max() / std), float(apart.square().mean().sqrt() / std)


def compare(setting: Setting, folder: Path | None) -> list[list[str]]:
    """Rows of the table of speed: one for each dtype of ours."""
    images = setting.images()
    published = None if folder is None else setting.published(folder)
    state = None if published is None else published.state
    ours = {dtype: setting.ours(state, dtype) for dtype in setting.goals}
    expected = ours[torch.float32](images) if published is None else published.tokens(images)
    errors = {dtype: difference(net(images), expected) for dtype, net in ours.items()}
    if errors[torch.float32][0] > EQUAL_TOKENS:
        raise SystemExit(
            f"{setting.title}: tokens differ by {errors[torch.float32][0]:.1e} std; a ratio would say nothing"
        )
    calls: dict[str, Callable[[], object]] = {str(dtype): partial(net, images) for dtype, net in ours.items()}
    if published is not None:
        calls["tokens"] = lambda: published.tokens(images)
        if setting.batch == 1:
            calls["whole"] = lambda: published.whole(images)
    seconds = {name: [s / setting.batch for s in found] for name, found in in_turns(setting.turns, **calls).items()}
    rows = []
    for dtype, goal in setting.goals.items():
        name = str(dtype).removeprefix("torch.")
        row = [f"{setting.title}, batch {setting.batch}, {name}", shown(seconds[str(dtype)])]
        if published is not None:
            there, here = seconds["tokens"], seconds[str(dtype)]
            middle = statistics.median(there) / statistics.median(here)
            row += [
                shown(there),
                shown(seconds["whole"]) if "whole" in seconds else "",
                f"{min(there) / min(here):.2f} ({middle:.2f})",
            ]
            row += [f">= {goal:g}", "met" if min(there) / min(here) >= goal else "not met"]
        compared = published is not None or dtype != torch.float32
        rows.append([*row, "{:.1e} / {:.1e}".format(*errors[dtype]) if compared else ""])
        note("  ".join(rows[-1]))
    return rows


def shown(seconds: Seconds) -> str:
    return f"{min(seconds):.3f} ({statistics.median(seconds):.3f})"


class Recorded(TorchFunctionMode):
    """Remembers the products (`dense.linear`) and convolutions of a forward pass, without activations fused to them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Tensor], tuple[Any, ...]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv2d:
            assert not kwargs, kwargs
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
        self.calls.append((dense.linear, (x, weight, bias)))
        return dense.linear(x, weight, bias, gelu=gelu)

    def alone(self) -> Callable[[], None]:
        """The recorded calls on random data of the same sizes and layouts; equal inputs share their memory."""
        inputs: dict[tuple[Any, ...], Tensor] = {}

        def like(index: int, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            random = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).normal_()
            if index > 0:  # weights: every call has its own, as in the network
                return random
            return inputs.setdefault((value.shape, value.stride(), value.dtype), random)

        calls = [(func, [like(index, arg) for index, arg in enumerate(args)]) for func, args in self.calls]

        def run() -> None:
            for func, args in calls:
                func(*args)

        return run


def own_shares(setting: Setting) -> list[list[str]]:
    """Rows about our own forward pass alone: what it is made of."""
    net, images = setting.ours(None), setting.images()
    engine = choose(images.device)
    scan, recorded = engine.scan_four_ways, Recorded()
    in_scan: Seconds = []

    def measured_scan(*args: Tensor) -> Tensor:
        start = time.process_time()
        found = scan(*args)
        in_scan.append(time.process_time() - start)
        return found

    with torch.no_grad():
        scan_watched = mock.patch.object(engine, "scan_four_ways", measured_scan)
        with recorded, scan_watched, mock.patch.object(vmamba, "linear", recorded.linear):
            net(images)
        scans = len(in_scan)
        # each scan has a projection that is no module of its own
        expected = scans + sum(isinstance(module, torch.nn.Linear | torch.nn.Conv2d) for module in net.modules())
        assert len(recorded.calls) == expected, (len(recorded.calls), expected)
        products = recorded.alone()
        products()
        seconds = in_turns(2 * setting.turns, forward=lambda: net(images), products=products)
        in_scan.clear()
        with scan_watched:
            whole = in_turns(2 * setting.turns, forward=lambda: net(images))["forward"]
    per_turn = [sum(in_scan[i : i + scans]) for i in range(0, len(in_scan), scans)]
    ratio = min(seconds["forward"]) / min(seconds["products"])
    middle = statistics.median(seconds["forward"]) / statistics.median(seconds["products"])
    shares = sorted(part / all_of_it for part, all_of_it in zip(per_turn, whole, strict=True))
    share, middle_share = min(per_turn) / min(whole), statistics.median(shares)
    what = f"{setting.title}, batch {setting.batch}"
    kinds = f"{len(recorded.calls)} products and convolutions alone"
    return [
        [
            f"{what}: forward / its {kinds}",
            f"{shown(seconds['forward'])} / {shown(seconds['products'])}",
            f"{ratio:.2f} ({middle:.2f})",
            f"<= {OWN[0]:g}",
            "met" if ratio <= OWN[0] else "not met",
        ],
        [
            f"{what}: its {scans} scans / forward",
            f"{shown(per_turn)} / {shown(whole)}",
            f"{share:.1%} ({middle_share:.1%})",
            f"<= {OWN[1]:.0%}",
            "met" if share <= OWN[1] else "not met",
        ],
    ]


def peak_mib(whose: Whose, setting: Setting, dtype: torch.dtype, folder: Path | None) -> float:
    """MiB by which one forward pass raises the resident memory of a process that has built the network. Linux only."""
    torch.set_num_threads(1)
    images = setting.images()
    if whose == "ours":
        call: Callable[[Tensor], Tensor] = setting.ours(None, dtype)
    else:
        assert folder is not None
        call = setting.published(folder).tokens
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before = _status_mib("VmRSS")
    call(images)
    return _status_mib("VmHWM") - before


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def memory(setting: Setting, folder: Path | None) -> list[list[str]]:
    """Rows of the table of memory: one for each dtype of ours. Every number is a process of its own."""

    def peak(whose: Whose, dtype: torch.dtype) -> float:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(peak_mib, whose, setting, dtype, folder).result()

    there = None if folder is None else peak("official", torch.float32)
    rows = []
    for dtype in setting.goals:
        row = [f"{setting.title}, batch {setting.batch}, {str(dtype).removeprefix('torch.')}"]
        here = peak("ours", dtype)
        rows.append([*row, f"{here:.0f}", *([] if there is None else [f"{there:.0f}", f"{there / here:.1f}"])])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--official", type=Path, metavar="FOLDER", help="clones of the published repositories")
    folder: Path | None = parser.parse_args().official
    torch.set_num_threads(1)
    engine = choose(torch.device("cpu")).name
    load = f"load {os.getloadavg()[0]:.1f}, " if hasattr(os, "getloadavg") else ""
    print(f"{platform.machine()}, {load}torch {torch.__version__}, one thread, scan engine {engine}")
    print("CPU seconds an image: fastest turn (median of the turns); difference: largest / rms, in std of the tokens\n")
    rows = []
    for setting in SETTINGS:
        rows += compare(setting, folder)
    if folder is None:
        table(["tokens", "ours s", "difference to float32"], rows)
    else:
        columns = ["tokens", "ours s", "official s", "its whole network s", "official / ours", "goal", "", "difference"]
        table(columns, rows)
    print()
    table(["ours alone", "CPU seconds a forward", "figure", "goal", ""], own_shares(SETTINGS[0]))
    if Path("/proc/self/clear_refs").exists():
        print("\nMemory that a forward pass adds to that of the weights, MiB")
        rows = [row for setting in SETTINGS for row in memory(setting, folder)]
        table(["tokens", "ours", *([] if folder is None else ["official", "official / ours"])], rows)


if __name__ == "__main__":
    main()
