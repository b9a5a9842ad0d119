"""The demo refuses wrong names before any work, and stops when one of its commands fails."""

from pathlib import Path

import pytest

from vlmx.errors import RunError, UnknownNameError
from vlmx.serve.demo import Chain, _run_stage, run_demo


@pytest.mark.parametrize(("encoder", "connector"), [("vit-mini-scene", "mlp2"), ("vit-mini-scenes", "mpl2")])
def test_wrong_names_are_refused_before_any_work(tmp_path: Path, encoder: str, connector: str) -> None:
    with pytest.raises(UnknownNameError, match="did you mean"):
        run_demo(tmp_path / "demo", encoders=[encoder], connectors=[connector], quick=True)
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_fails_stops_the_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chain = Chain(label="vit mlp2", commands=[["report", str(tmp_path)], ["report", "never reached"]])
    with pytest.raises(RunError, match="stopped at 'vit mlp2'") as caught:
        _run_stage("phase two", [chain])
    assert "exit code 7" in caught.value.why
    assert "[vit mlp2] error  " + str(tmp_path) in capfd.readouterr().err
