"""Which engine computes an encoder's scans here, and is a better one a command away?"""

from __future__ import annotations

from dataclasses import dataclass

from vlmx.extract.backbones.base import Backbone
from vlmx.extract.ops import engines
from vlmx.extract.ops.engines import EngineName

_FAST: dict[str, tuple[EngineName, ...]] = {"cpu": ("native",), "cuda": ("mamba-ssm", "triton")}


@dataclass(frozen=True, kw_only=True)
class ScanChoice:
    """The engine of an extraction.

    Attributes:
        engine: its name; of VMamba's scan, which mamba-ssm leaves to triton, that of the one which computes it.
        fallback: why it is the slow one, and the commands that would enable faster ones; else empty. A GPU's engine may
            also fail in the middle of an extraction.
    """

    engine: EngineName
    fallback: str


def scan_choice(backbone: Backbone) -> ScanChoice | None:
    """The engine that computes the scans of `backbone` on its device; None when it has none.

    Raises:
        BackendError: the engine that was forced cannot run there.
    """
    if not backbone.net.scans:
        return None
    device = next(backbone.parameters()).device
    engine = engines.choose(device)
    chosen = engine.four_ways_engine(device) if backbone.net.scans == "four ways" else engine.name
    fallback = ""
    if failed := engines.engine(chosen).obstacle(device):
        return ScanChoice(engine="torch", fallback=f"'{chosen}' failed, and 'torch' took over: {failed.why}")
    if chosen == "torch" and engines.forced() is None:
        found = engines.engines_report(device)
        better = [(name, obstacle) for name, obstacle in found if obstacle and name in _FAST.get(device.type, ())]
        reasons = "; ".join(
            f"{name}: {obstacle.why}" + (f" (enable it: {obstacle.fix})" if obstacle.fix else "")
            for name, obstacle in better
        )
        fallback = f"the scan runs on the slow engine 'torch'; {reasons}" if reasons else ""
    return ScanChoice(engine=chosen, fallback=fallback)
