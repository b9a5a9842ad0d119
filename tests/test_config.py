"""Configuration: overrides win over the file, all problems are reported at once with hints."""

from pathlib import Path

import pytest

from vlmx.config import Config, load_config
from vlmx.errors import ConfigError


class Optim(Config):
    lr: float = 2e-5
    weight_decay: float = 0.1


class Train(Config):
    seed: int = 7
    connector: str = "mlp2"
    optim: Optim = Optim()


def test_overrides_win_over_options_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("seed: 1\nconnector: linear\noptim: {lr: 0.5}\n")
    config = load_config(Train, file, ["seed=3", "optim.lr=1e-4"], connector="mlp3", seed=2)
    assert config == Train(seed=3, connector="mlp3", optim=Optim(lr=1e-4))


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Train, None, ["optim.rl=1", "sed=2", "optim.weight_decay=much"])
    assert caught.value.exit_code == 2
    assert "3 problems" in caught.value.what
    assert "optim.rl is not known (did you mean 'optim.lr'?)" in caught.value.why
    assert "sed is not known (did you mean 'seed'?)" in caught.value.why
    assert "optim.weight_decay: Input should be a valid number" in caught.value.why


def test_an_override_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not an override"):
        load_config(Train, None, ["optim.lr"])


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("- 1\n")
    with pytest.raises(ConfigError, match="is not a mapping"):
        load_config(Train, file, [])


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Train().seed = 4  # type: ignore[misc]
