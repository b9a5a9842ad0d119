"""How can torchvision, and so timm, be imported when its compiled operators do not load?

The torchvision on PyPI is built for CUDA. Beside a CPU build of torch its operators do not load; torchvision tolerates
that until it registers shape functions for two of them (`nms` and `qnms`) without looking, and its import dies with
"operator torchvision::nms does not exist". Declaring those two names is enough: transforms and model classes then work,
and calling an operator that is not there still raises torch's own error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRATIONS = "torchvision._meta_registrations"
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[object] = []  # torch forgets the declarations of a Library that is garbage collected


class _Guard(MetaPathFinder):
    """Finds nothing; uses the moment just before torchvision registers its shape functions."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # torchvision has tried to load its operators by now, and knows whether it has them.
        if fullname == _REGISTRATIONS and not sys.modules["torchvision.extension"]._has_ops():
            _declare()
        return None


def _declare() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + _SCHEMA)
    _declared.append(library)


def install() -> None:
    """Arm the guard. Costs nothing: neither torch nor torchvision is imported; a second call does nothing."""
    if _REGISTRATIONS not in sys.modules and not any(isinstance(finder, _Guard) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Guard())
