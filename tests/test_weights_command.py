"""Do `vlmx weights check` and `convert` say what is in a file, refuse bad ones with code 4, and keep identities?"""

import hashlib
import json
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vlmx.cli import main
from vlmx.errors import WeightsError
from vlmx.extract import weights
from vlmx.extract.backbones.base import build_backbone
from vlmx.extract.weights.convert import default_target
from vlmx.extract.weights.identify import identify

MINI = "vmamba-mini-scenes"


@pytest.fixture
def vlmx(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command as a user gives it: (exit code, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        code = 0
        try:
            main([*map(str, args)])
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def mini() -> dict[str, Tensor]:
    return build_backbone(MINI, res=(64, 64), weights="random:1").net.state_dict()


@pytest.fixture
def mini_file(tmp_path: Path, mini: dict[str, Tensor]) -> Path:
    path = tmp_path / "mini.pth.tar"
    torch.save({"model": {**mini, "epoch": 3}, "model_ema": mini}, path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_check_says_what_a_file_is_and_what_it_fits(vlmx: Any, mini_file: Path, mini: dict[str, Tensor]) -> None:
    code, out, err = vlmx("weights", "check", mini_file, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["fits"] == [MINI]
    assert (found["format"], found["nested_under"], found["not_taken"]) == ("torch", "model", ["model_ema"])
    assert found["not_tensors"] == ["epoch"]
    assert found["sha256"] == found["identity"] == sha256(mini_file)
    assert found["bytes"] == mini_file.stat().st_size
    assert found["tensors"] == len(mini)
    assert found["parameters"] == sum(tensor.numel() for tensor in mini.values())
    assert found["dtypes"] == {"float32": found["parameters"]}
    assert (found["not_finite"], found["problems"]) == ([], [])


def test_check_with_another_backbone_names_every_key(vlmx: Any, mini_file: Path, mini: dict[str, Tensor]) -> None:
    code, out, err = vlmx("weights", "check", mini_file, "--backbone", "vit-mini-scenes")
    assert code == 4
    assert f"fits        {MINI}" in out
    assert f"error  {mini_file} does not fit vit-mini-scenes: it fits {MINI}" in err
    assert f"fix    use --backbone {MINI}" in err
    assert all(name in err for name in mini)
    vit = build_backbone("vit-mini-scenes", res=(64, 64), device="meta").net.state_dict()
    assert all(name.removeprefix("net.") in err for name in vit)
    assert "..." not in err


def test_check_of_weights_that_nothing_knows(vlmx: Any, tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.ones(2, 2, dtype=torch.float16)}, tmp_path / "w.pth")
    code, out, err = vlmx("weights", "check", tmp_path / "w.pth")
    assert code == 4
    assert "tensors     1 with 4 numbers: 4 float16" in out
    assert "fits        no backbone" in out
    assert "fits no backbone that vlmx knows" in err
    assert "its names are like those of no family" in err


def test_check_of_nan(vlmx: Any, tmp_path: Path, mini: dict[str, Tensor]) -> None:
    broken = {**mini, "patch_embed.0.bias": mini["patch_embed.0.bias"] * float("inf")}
    torch.save(broken, tmp_path / "w.pth")
    code, out, err = vlmx("weights", "check", tmp_path / "w.pth", "--backbone", MINI)
    assert code == 4
    assert "not finite  patch_embed.0.bias" in out
    assert "holds NaN or infinity" in err


@pytest.mark.slow
def test_published_files_with_one_network_are_all_named(shared: Path) -> None:
    manifest = json.loads((shared / "golden/ssm/manifests/vmamba_T_det.json").read_text())
    state = {name: torch.empty(shape, device="meta") for name, shape, _ in manifest}
    assert identify(state).names == ("vmamba-t-ade20k", "vmamba-t-coco")
    del state["patch_embed.0.bias"]
    found = identify(state)
    assert (found.names, found.nearest) == ((), "vmamba")


def bad(kind: str, path: Path) -> None:
    """Write a file, or a folder, that cannot be read."""

    class Attack:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {path}.ran",)

    contents: dict[str, bytes] = {
        "empty": b"",
        "html": b"<!doctype html>",
        "lfs": b"version https://git-lfs.github.com/spec/v1\n",
        "gzip": b"\x1f\x8b\x08\x00",
        "text": b"hello",
        "attack": pickle.dumps(Attack()),
    }
    if kind == "folder":
        path.mkdir()
    elif kind == "truncated":
        torch.save({"w": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:1000])
    elif kind in contents:
        path.write_bytes(contents[kind])


@pytest.mark.parametrize(
    ("kind", "what", "fix"),
    [
        ("absent", "cannot read", "check the path"),
        ("empty", "is empty", "get the file again"),
        ("html", "is a web page, not weights", "get the file again"),
        ("lfs", "is a git-lfs pointer", "git lfs pull"),
        ("gzip", "is a gzip archive", "unpack it"),
        ("text", "cannot be read as weights", "get it again"),
        ("truncated", "cannot be read as weights", "get it again"),
        ("attack", "tries to run code; nothing was run", "do not use this file"),
        ("folder", "is no folder of weights", "give the file itself"),
    ],
)
@pytest.mark.parametrize("command", ["check", "convert"])
def test_bad_files_end_with_code_4(vlmx: Any, tmp_path: Path, command: str, kind: str, what: str, fix: str) -> None:
    path = tmp_path / "w.pth"
    bad(kind, path)
    before = sorted(tmp_path.iterdir())
    code, out, err = vlmx("weights", command, path)
    assert (code, out) == (4, "")
    lines = err.splitlines()
    assert lines[0].startswith("error  ")
    assert what in lines[0]
    assert lines[-1].startswith("fix    ")
    assert fix in lines[-1]
    assert sorted(tmp_path.iterdir()) == before


def test_convert_keeps_every_tensor_and_the_identity(vlmx: Any, tmp_path: Path) -> None:
    shared = torch.arange(12.0)
    state = {
        "tied": shared,
        "view": shared[4:10].reshape(2, 3),
        "same": shared,
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "bn.num_batches_tracked": torch.tensor(7),
        "half": torch.ones(2, dtype=torch.float16),
        "bfloat16": torch.ones(2, dtype=torch.bfloat16),
        "relative_position_index": torch.arange(4).reshape(2, 2),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }
    source, target = tmp_path / "w.pth.tar", tmp_path / "w.safetensors"
    torch.save({"state_dict": {**state, "note": "text"}, "state_dict_ema": {"tied": shared * 2}}, source)
    code, out, err = vlmx("weights", "convert", source)
    assert (code, out) == (0, f"{target}\n")
    assert "not tensors, so not written: note" in err
    assert "left out: state_dict_ema" in err
    found = weights.read(target)
    assert sorted(found) == sorted(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert weights.identity(target) == weights.identity(source) == sha256(source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.pth.tar", "w.safetensors"]
    # ... and so has a copy of the copy.
    assert vlmx("weights", "convert", target, tmp_path / "again.safetensors")[0] == 0
    assert weights.identity(tmp_path / "again.safetensors") == sha256(source)


def test_convert_replaces_nothing_without_force(vlmx: Any, mini_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "mini.safetensors"
    target.write_bytes(b"mine")
    code, _, err = vlmx("weights", "convert", mini_file)
    assert code == 2
    assert f"{target} exists" in err
    assert target.read_bytes() == b"mine"
    assert vlmx("weights", "convert", mini_file, "--force")[0] == 0
    code, _, err = vlmx("weights", "convert", target, "--force")
    assert code == 2
    assert "would be overwritten by itself" in err
    assert weights.identity(target) == sha256(mini_file)


def test_convert_with_a_backbone_writes_where_it_is_looked_for(
    vlmx: Any, tmp_path: Path, mini: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = tmp_path / "mini.pth", tmp_path / "weights"
    torch.save(mini, source)
    monkeypatch.setenv("VLMX_WEIGHTS", str(folder))
    code, _, err = vlmx("weights", "convert", source, "--backbone", "maxvit-mini-scenes")
    assert code == 4
    assert "does not fit maxvit-mini-scenes; nothing was written" in err
    assert not folder.exists()
    code, out, _ = vlmx("weights", "convert", source, "--backbone", MINI)
    assert (code, out) == (0, f"{folder / MINI}.safetensors\n")
    (folder / f"{MINI}.safetensors").rename(folder / f"{MINI}.other")  # the published name of the mini is the same
    monkeypatch.delenv("VLMX_WEIGHTS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert vlmx("weights", "convert", source, "--backbone", MINI)[1] == f"{tmp_path}/vlmx/weights/{MINI}.safetensors\n"


def test_nan_is_not_converted_for_a_backbone(vlmx: Any, tmp_path: Path, mini: dict[str, Tensor]) -> None:
    torch.save({**mini, "patch_embed.0.bias": mini["patch_embed.0.bias"] * float("nan")}, tmp_path / "w.pth")
    code, _, err = vlmx("weights", "convert", tmp_path / "w.pth", tmp_path / "out.safetensors", "--backbone", MINI)
    assert code == 4
    assert "1 tensors hold NaN or infinity: patch_embed.0.bias" in err
    assert not (tmp_path / "out.safetensors").exists()


def test_a_converted_file_that_was_changed_has_no_identity(vlmx: Any, tmp_path: Path, mini_file: Path) -> None:
    assert vlmx("weights", "convert", mini_file, tmp_path / "w.safetensors")[0] == 0
    data = bytearray((tmp_path / "w.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match="was changed after vlmx had converted it"):
        weights.identity(tmp_path / "w.safetensors")


def test_detectron2_becomes_safetensors(vlmx: Any, tmp_path: Path) -> None:
    source = tmp_path / "model_final_61ccd1.pkl"
    source.write_bytes(pickle.dumps({"model": {"w": np.arange(3, dtype="f4")}, "__author__": "x"}, 2))
    assert vlmx("weights", "convert", source)[0] == 0
    target = tmp_path / "model_final_61ccd1.safetensors"
    assert weights.read(target)["w"].tolist() == [0, 1, 2]
    out = vlmx("weights", "check", target)[1]
    assert f"sha256      {sha256(target)}\n" in out
    assert f"identity    {sha256(source)} (of its source)\n" in out


def test_check_of_zips_and_folders(vlmx: Any, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.write(tmp_path / "w.pth", "inner/w.pth")
    assert "format      torch, as inner/w.pth in a zip\n" in vlmx("weights", "check", tmp_path / "w.zip")[1]
    folder = tmp_path / "model"
    folder.mkdir()
    for name in "ab":
        assert vlmx("weights", "convert", tmp_path / "w.pth", folder / f"{name}.safetensors")[0] == 0
    torch.save({"v": torch.ones(1)}, tmp_path / "v.pth")
    assert vlmx("weights", "convert", tmp_path / "v.pth", folder / "b.safetensors", "--force")[0] == 0
    index = {"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    out = vlmx("weights", "check", folder)[1]
    assert "shards      a.safetensors, b.safetensors\n" in out
    assert f"identity    {weights.identity(folder)} (of all shards)\n" in out
    assert "tensors     2 with 2 numbers: 2 float32\n" in out


def test_a_full_disk_leaves_the_old_file(
    vlmx: Any, tmp_path: Path, mini_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        (disk / "w.safetensors").write_bytes(b"old")
        assert vlmx("weights", "convert", mini_file, disk / "w.safetensors", "--force")[0] == 6  # known before
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
        assert vlmx("weights", "convert", mini_file, disk / "w.safetensors", "--force")[0] == 6  # found while writing
        assert [path.name for path in disk.iterdir()] == ["w.safetensors"]
        assert (disk / "w.safetensors").read_bytes() == b"old"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a.pth", "a.safetensors"),
        ("a.pth.tar", "a.safetensors"),
        ("a.v1.zip", "a.v1.safetensors"),
        ("folder", "folder.safetensors"),
    ],
)
def test_default_names(source: str, expected: str) -> None:
    assert default_target(Path("x") / source) == Path("x") / expected
