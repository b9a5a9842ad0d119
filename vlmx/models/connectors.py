"""How do visual tokens become LLM embeddings? The connectors by name, and their initialisation.

Layers and initialisation follow prismatic-vlms (`nn_utils.py`, `prismatic.py`), which the paper builds on: `linear`,
its `gelu-mlp` (here `mlp2`, the paper's default) and its `fused-gelu-mlp` (here `mlp3`, rows marked "(f)" in the
paper). All layers have a bias, GELU is the exact one, and there is neither norm nor dropout.

torch is imported when a connector is built, so that listing names stays light.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vlmx.registry import Registry

if TYPE_CHECKING:
    from torch import nn

ConnectorBuilder = Callable[[int, int], "nn.Module"]


def linear(dim_vision: int, dim_llm: int) -> nn.Module:
    """D -> E."""
    from torch import nn

    return nn.Linear(dim_vision, dim_llm)


def mlp2(dim_vision: int, dim_llm: int) -> nn.Module:
    """D -> E -> E with one GELU: the paper's default."""
    from torch import nn

    return nn.Sequential(nn.Linear(dim_vision, dim_llm), nn.GELU(), nn.Linear(dim_llm, dim_llm))


def mlp3(dim_vision: int, dim_llm: int) -> nn.Module:
    """D -> 4D -> E -> E with two GELUs: the paper's "(f)"."""
    from torch import nn

    return nn.Sequential(
        nn.Linear(dim_vision, 4 * dim_vision),
        nn.GELU(),
        nn.Linear(4 * dim_vision, dim_llm),
        nn.GELU(),
        nn.Linear(dim_llm, dim_llm),
    )


CONNECTORS: Registry[ConnectorBuilder] = Registry("connector", group="vlmx.connectors", listing="vlmx list connectors")
CONNECTORS.add("linear", linear)
CONNECTORS.add("mlp2", mlp2)
CONNECTORS.add("mlp3", mlp3)


def build_connector(name: str, dim_vision: int, dim_llm: int) -> nn.Module:
    """Build a connector that maps [..., dim_vision] to [..., dim_llm].

    Weights are PyTorch's defaults drawn with the seed `dim_vision`, as in the reference: two encoders of equal width
    start from the same connector. The caller's random state is not touched.

    Raises:
        UnknownNameError: no connector has this name.
    """
    import torch

    builder = CONNECTORS.get(name)
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(dim_vision)
    try:
        return builder(dim_vision, dim_llm)
    finally:
        torch.set_rng_state(state)
