"""Do connectors have the reference's layers and initialisation?"""

import pytest
import torch
from torch import nn

from vlmx import build_connector
from vlmx.errors import UnknownNameError
from vlmx.models.connectors import CONNECTORS


@pytest.mark.parametrize(
    ("name", "widths"),
    [("linear", [(6, 8)]), ("mlp2", [(6, 8), (8, 8)]), ("mlp3", [(6, 24), (24, 8), (8, 8)])],
)
def test_layers(name, widths):
    connector = build_connector(name, 6, 8)
    linears = [m for m in connector.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == widths
    assert all(m.bias is not None for m in linears)
    others = [m for m in connector.modules() if not isinstance(m, nn.Linear | nn.Sequential)]
    assert len(others) == len(widths) - 1
    assert all(isinstance(m, nn.GELU) and m.approximate == "none" for m in others)
    assert connector(torch.zeros(2, 5, 6)).shape == (2, 5, 8)
    assert connector(torch.zeros(0, 5, 6)).shape == (0, 5, 8)


def test_paper_sizes():
    counts = {
        (name, dim): sum(p.numel() for p in build_connector(name, dim, 4096).parameters())
        for name in ("mlp2", "mlp3")
        for dim in (384,)
    }
    assert counts == {("mlp2", 384): 18_358_272, ("mlp3", 384): 23_668_224}


def test_initialisation_is_pytorchs_under_the_width_as_seed():
    torch.manual_seed(6)
    expected = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8))
    connector = build_connector("mlp2", 6, 8)
    for key, value in expected.state_dict().items():
        assert torch.equal(connector.state_dict()[key], value)


def test_building_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    build_connector("mlp3", 6, 8)
    assert torch.equal(torch.rand(3), expected)


def test_unknown_connector():
    with pytest.raises(UnknownNameError, match="unknown connector 'mlp4'") as caught:
        build_connector("mlp4", 6, 8)
    assert "mlp2" in caught.value.fix
    assert CONNECTORS.names()[:3] == ["linear", "mlp2", "mlp3"]
