"""Does each kind of bad input end `vlmx train` with one clear error and its exit code?"""

import json
import shutil

import pytest
from train_world import arguments, make_world

from vlmx.cli import main
from vlmx.runs import RunFolder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    make_world(root, name="vmamba-mini-scenes", grid=(3, 3))
    return make_world(root)


def fails(capsys, command):
    """Exit code, and what, why and fix as lines."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["train", *command])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error ", "why ", "fix "))]
    return caught.value.code, dict(line.split(maxsplit=1) for line in lines)


def test_the_cache_lacks_images(world, tmp_path, capsys):
    rows = json.loads((world / "photos.json").read_text())
    rows += [{**rows[1], "id": f"new{n}", "image": f"new{n}.jpg"} for n in range(3)]
    (tmp_path / "photos.json").write_text(json.dumps(rows))
    command = [*arguments(world, tmp_path / "run"), "--data", str(tmp_path / "photos.json")]
    code, said = fails(capsys, command)
    assert code == 5
    assert said["error"].startswith("3 of 19 images of")
    assert said["fix"].startswith("vlmx extract --backbone vit-mini-scenes --res 64x64 ")


def test_two_caches_whose_grids_differ(world, tmp_path, capsys):
    code, said = fails(capsys, [*arguments(world, tmp_path / "run"), "--cache", "vmamba-mini"])
    assert code == 5
    assert "cannot be joined" in said["error"]
    assert "64" in said["why"]
    assert "96" in said["why"]


def test_an_llm_folder_without_weights(world, tmp_path, capsys):
    shutil.copytree(world / "llm", tmp_path / "llm")
    (tmp_path / "llm" / "model.safetensors").unlink()
    code, said = fails(capsys, [*arguments(world, tmp_path / "run"), "--llm", str(tmp_path / "llm")])
    assert code == 4
    assert "has no weights" in said["error"]


def test_a_config_with_unknown_keys(world, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("learning_rate: 1\noptim: {wd: 0}\ncheckpoint: {keep: -1}\n")
    command = [*arguments(world, tmp_path / "run", "watch.bench=x"), "--config", str(tmp_path / "config.yaml")]
    code, said = fails(capsys, command)
    assert code == 2
    assert said["error"].startswith("4 problems in the configuration")
    for key in ("learning_rate is not known", "optim.wd is not known", "checkpoint.keep: ", "watch.bench is not known"):
        assert key in said["why"]
    assert not (tmp_path / "run").exists()


def test_corrupt_checkpoints_and_another_configuration(world, tmp_path, capsys):
    out = tmp_path / "run"
    main(["train", *arguments(world, out)])
    (out / "model" / "model.json").unlink()
    RunFolder(out).set_status("failed")
    code, said = fails(capsys, ["--out", str(out), "--resume", "seed=8"])
    assert code == 2
    assert said["why"] == "seed: 7, now 8"
    for step in (2, 4):
        (out / "checkpoints" / f"step-{step}" / ".metadata").write_bytes(b"nothing")
    code, said = fails(capsys, ["--out", str(out), "--resume"])
    assert code == 7
    assert said["error"].startswith("all checkpoints in ")
    assert said["why"].count(".metadata is not what was written") == 2


@pytest.mark.parametrize("order", ["default", "paper"])
def test_a_seed_that_generators_cannot_take(world, tmp_path, capsys, order):
    command = [*arguments(world, tmp_path / "run"), "seed=18446744073709551616", f"order={order}", "optim.lr=-1"]
    code, said = fails(capsys, command)
    assert code == 2
    assert "seed" in said["why"]
    assert "optim.lr" in said["why"]
