"""How do published names lose what a training framework put before and beside them?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# What mmdetection, mmsegmentation and detectron2 keep beside a backbone.
BESIDE_A_BACKBONE = (
    "neck.",
    "rpn_head.",
    "roi_head.",
    "bbox_head.",
    "mask_head.",
    "decode_head.",
    "auxiliary_head.",
    "data_preprocessor.",
    "ema_",
    "roi_heads.",
    "proposal_generator.",
    "pixel_mean",
    "pixel_std",
)


def strip_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove `prefix` from all names if all of them have it; otherwise change none."""
    if all(name.startswith(prefix) for name in state):
        return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes of data-parallel training and of torch.compile."""
    return strip_prefix(strip_prefix(strip_prefix(state, "module."), "_orig_mod."), "module.")


def backbone_of_detector(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone in a detection or segmentation checkpoint, without its prefix; a bare backbone stays as it is.

    A name that is neither known nor the backbone's stays, so that the strict load refuses it alone.
    """
    kept = {name: tensor for name, tensor in unwrapped(state).items() if not name.startswith(BESIDE_A_BACKBONE)}
    return {name.removeprefix("backbone."): tensor for name, tensor in kept.items()}
