"""How do stored tokens become floats where the model computes?"""

from __future__ import annotations

import torch
from torch import Tensor


def to_floats(
    stored_UND: Tensor, dtype: torch.dtype, *, scale_D: Tensor | None = None, offset_D: Tensor | None = None
) -> Tensor:
    """Tokens in `dtype`, on the device that the stored ones are on.

    Args:
        stored_UND: what a cache holds: any float dtype, or the int8 codes of an 8-bit cache, which cross to the GPU as
            they are.
        dtype: of the result.
        scale_D, offset_D: float32, of an 8-bit cache (`TokenSource.quantization`): token = offset + scale * code. The
            sum is taken in float32.
    """
    if scale_D is None or offset_D is None:
        assert stored_UND.is_floating_point(), "codes without their scale"
        return stored_UND.to(dtype)
    return torch.addcmul(offset_D, stored_UND.to(torch.float32), scale_D).to(dtype)
