"""How many floating-point operations does an encoder need for one image, and what is that beside a language model?

Legend: B images, L tokens, D channels, N states a channel, R rank of the step size, K directions of a scan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vlmx.extract.backbones.base import build_backbone
from vlmx.extract.ops import engines

META = torch.device("meta")
STATE_FLOPS = 9  # of a state at a token: dt A, its exponential, dt B u, decay and sum, C h and sum, softplus of dt


def encoder_flops(name: str, res: tuple[int, int], options: Mapping[str, Any]) -> int:
    """Operations of one forward pass of one image; a multiplication and an addition are two.

    Matrix products, convolutions and attention are counted by torch, selective scans by their shapes. What works on
    single elements (norms, activations) is left out, as it is for language models.

    Args:
        name: the backbone.
        res: (height, width) in pixels of the image.
        options: of its family.
    """
    height, width = res
    forced = engines.forced()
    engines.force(None)  # nothing is computed on the meta device, whatever engine was asked for
    try:
        backbone = build_backbone(name, res=res, device="meta", **options)
        with _counted_scans() as scans, FlopCounterMode(display=False) as products, torch.inference_mode():
            backbone(torch.empty(1, 3, height, width, device=META))
        return int(products.get_total_flops()) + sum(scans)
    finally:
        engines.force(forced)


def llm_training_flops(params: float, tokens: int) -> float:
    """Operations of a training step for an example of `tokens` tokens, when activations are recomputed.

    8 for each parameter and token: 2 forward, 4 backward, 2 for the second forward pass.
    """
    return 8 * params * tokens


@contextmanager
def _counted_scans() -> Iterator[list[int]]:
    """While the block runs, scans on the meta device are not computed: their operations are appended to the list."""
    counts: list[int] = []

    def scan(u_BLD: Tensor, dt_BLD: Tensor, A_DN: Tensor, *rest: Any, **options: Any) -> Tensor:
        counts.append(u_BLD.numel() * STATE_FLOPS * A_DN.shape[1])
        return torch.empty_like(u_BLD)

    def scan_four_ways(u_BHWD: Tensor, low_BHWKP: Tensor, dt_weight_KDR: Tensor, *rest: Tensor) -> Tensor:
        directions, _, rank = dt_weight_KDR.shape
        counts.append(u_BHWD.numel() * directions * (2 * rank + STATE_FLOPS))
        return torch.empty_like(u_BHWD, dtype=torch.promote_types(u_BHWD.dtype, torch.float32))

    own = vars(engines.choose(META))  # what is set there goes before the methods of its class
    own.update(scan=scan, scan_four_ways=scan_four_ways)
    try:
        yield counts
    finally:
        del own["scan"], own["scan_four_ways"]
