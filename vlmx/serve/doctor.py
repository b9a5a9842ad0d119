"""What works on this machine, what does not, and the one command that would change it."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vlmx.cache_specs.places import Place, place_of
from vlmx.console import format_bytes


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the check.

    Attributes:
        subject: what was looked at.
        ok: False when something that vlmx needs does not work.
        detail: what was found.
        fix: what to do, empty when nothing is to be done.
    """

    subject: str
    ok: bool
    detail: str
    fix: str = ""


def examine(caches: str | Path | Place) -> list[Finding]:
    """Look at the libraries, the devices, the weights folder and the disk.

    Args:
        caches: folder or url in which caches are kept; its free space is reported.
    """
    findings = [_library(name, needed_for) for name, needed_for in _LIBRARIES]
    findings += [_torch_device(), _scan(), _weights(), _disk(place_of(caches)), _hub()]
    return findings


_LIBRARIES = [
    ("torch", "everything"),
    ("torchvision", "timm"),
    ("timm", "vlmx extract with ViT and MaxViT"),
    ("transformers", "vlmx train, vlmx eval"),
    ("zarr", "opening caches with zarr-python"),
    ("PIL", "vlmx extract"),
    ("webdataset", "vlmx extract from tar shards"),
]
_DISTRIBUTION = {"PIL": "pillow"}


def _library(name: str, needed_for: str) -> Finding:
    package = _DISTRIBUTION.get(name, name)
    try:
        found = version(package)
    except PackageNotFoundError:
        return Finding(subject=name, ok=False, detail=f"missing; needed for {needed_for}", fix=f"pip install {package}")
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        fix = f"pip install --force-reinstall {package}, in the version that fits the installed torch"
        return Finding(subject=name, ok=False, detail=f"{found} does not import: {error}", fix=fix)
    return Finding(subject=name, ok=True, detail=found)


def _torch_device() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Finding(subject="device", ok=True, detail=f"CUDA {torch.version.cuda}: {names}")
    built = f"torch is built for CUDA {torch.version.cuda}, but no GPU answers" if torch.version.cuda else "CPU build"
    return Finding(
        subject="device", ok=True, detail=f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads ({built})"
    )


def _scan() -> Finding:
    """The engine that would run, what is in the way of each better one, and the command that enables the best one."""
    import torch

    from vlmx.extract.ops.engines import choose, engines_report

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = choose(device).name
    better = []
    for name, obstacle in engines_report(device):
        if name == chosen:
            break
        if obstacle is not None:
            better.append((name, obstacle))
    detail = f"{chosen} on {device}" + "".join(f"; not {name}: {obstacle.why}" for name, obstacle in better)
    fix = next((obstacle.fix for _, obstacle in better if obstacle.fix), "")
    return Finding(subject="selective scan", ok=True, detail=detail, fix=fix)


def _weights() -> Finding:
    folder = os.environ.get("VLMX_WEIGHTS")
    if not folder:
        return Finding(
            subject="weights folder",
            ok=True,
            detail="$VLMX_WEIGHTS is not set; the mini encoders ship with vlmx, others need --weights FILE",
            fix="export VLMX_WEIGHTS=/folder/with/checkpoints",
        )
    path = Path(folder)
    if not path.is_dir():
        return Finding(subject="weights folder", ok=False, detail=f"{path} is not a folder", fix=f"mkdir -p {path}")
    from vlmx.extract.backbones.catalogue import rows

    present = [row.name for row in rows() if row.file and (path / row.file).exists()]
    return Finding(subject="weights folder", ok=True, detail=f"{path}: {', '.join(present) or 'no known checkpoint'}")


def _disk(caches: Place) -> Finding:
    free = caches.free_bytes()
    detail = f"no limit is known of {caches}" if free is None else f"{format_bytes(free)} free at {caches}"
    return Finding(subject="disk", ok=True, detail=detail)


def _hub() -> Finding:
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    detail = (
        "HF_HUB_OFFLINE is set: language models come from local paths" if offline else "language models may be hub ids"
    )
    return Finding(subject="hub", ok=True, detail=detail)
