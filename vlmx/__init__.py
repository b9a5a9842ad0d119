"""vlmx: what does this frozen vision encoder give my vision-language model?

    photo - letterbox - backbone - tokens -> [ Zarr cache ] -> batch - connector - LLM - answer - score - report

The public names below are imported on first use, so that `import vlmx` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

from vlmx import torchvision_guard

__version__ = "0.1.0"

_PUBLIC = {
    "build_backbone": "vlmx.extract.backbones.base",
    "FamilyNet": "vlmx.extract.backbones.base",
    "BackboneRow": "vlmx.extract.backbones.row",
    "open_cache": "vlmx.cache_specs.reader",
    "open_zarr": "vlmx.cache_specs.foreign",
    "TokenLoader": "vlmx.cache_specs.loader",
    "CacheSpec": "vlmx.cache_specs.spec",
    "build_connector": "vlmx.models.connectors",
    "weighted_averages": "vlmx.evaluate.aggregate",
}
__all__ = ["__version__", *_PUBLIC]

torchvision_guard.install()


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'vlmx' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
