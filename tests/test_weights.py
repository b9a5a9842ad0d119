"""Are checkpoints found, read exactly, and never executed; does each kind of bad file get one clear error?"""

import hashlib
import io
import os
import pickle
import struct
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmx.errors import WeightsError
from vlmx.extract import weights
from vlmx.extract.backbones.base import build_backbone
from vlmx.extract.backbones.catalogue import BackboneRow, row

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(4), "c": torch.ones(2, dtype=torch.float16)}


class TrainingLog:
    """Like the log objects of training frameworks: its pickle names a class that readers do not have."""

    def __init__(self) -> None:
        self.values = [1.0, 2.0]


class Opens:
    """A pickle that writes a file when it is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor] = STATE) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("nested", [None, "model", "state_dict"])
def test_torch_files(tmp_path: Path, legacy: bool, nested: str | None) -> None:
    path = tmp_path / "w.pth.tar"
    torch.save({nested: STATE, "epoch": 3} if nested else STATE, path, _use_new_zipfile_serialization=not legacy)
    assert_same(weights.read(path))


@pytest.mark.parametrize("legacy", [False, True])
def test_files_with_foreign_objects_give_their_tensors_exactly(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "w.pth"
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    content = {
        "message_hub": TrainingLog(),
        "getter": getattr,
        "state_dict": STATE,
        "optimizer": optimizer.state_dict(),
    }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert_same(weights.read(path))


def test_safetensors_whatever_the_file_is_called(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(STATE, tmp_path / "w.bin")
    found = weights.read(tmp_path / "w.bin")
    assert_same({name: found[name] for name in STATE})


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    path, trace = tmp_path / "w.pth", tmp_path / "it-ran"
    torch.save({"state_dict": STATE, "hook": Opens(trace)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match=r"tries to run code; nothing was run.*system"):
        weights.read(path)
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "w.pkl", tmp_path / "it-ran"
    path.write_bytes(pickle.dumps(Opens(trace)))
    with pytest.raises(WeightsError):
        weights.read(path)
    assert not trace.exists()


def saved(legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(4000)}, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kept", [1, 20, 150, 700, 8000])
def test_truncated_torch_files(tmp_path: Path, legacy: bool, kept: int) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(saved(legacy)[:kept])
    with pytest.raises(WeightsError, match=rf"w.pth cannot be read as weights.*{kept} bytes long"):
        weights.read(path)


def test_truncated_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save

    path = tmp_path / "w.safetensors"
    path.write_bytes(save({"w": torch.zeros(4000)})[:9000])
    with pytest.raises(WeightsError, match="damaged, incomplete"):
        weights.read(path)


def zip_of_a_text() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "no weights here")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "is a web page, not weights"),
        (b"\n<html>rate limit</html>", "is a web page, not weights"),
        (b"not a checkpoint at all", "cannot be read as weights"),
        (zip_of_a_text(), "cannot be read as weights"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        weights.read(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {"a": 1}}, {}])
def test_files_without_a_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="holds no state dict"):
        weights.read(tmp_path / "w.pth")


def test_a_folder_is_not_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot read"):
        weights.read(tmp_path)


VMAMBA_T = row("vmamba-t-in1k")


def test_lookup_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, in_folder = tmp_path / "mine.pth", tmp_path / VMAMBA_T.file
    given.touch()
    in_folder.touch()
    monkeypatch.setenv("VLMX_WEIGHTS", str(tmp_path))
    assert weights.find(VMAMBA_T, given) == given
    assert weights.find(VMAMBA_T, str(given)) == given
    assert weights.find(VMAMBA_T) == in_folder


def test_packaged_weights_are_used_unless_the_folder_has_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mini = row_with(packaged="registry.py")  # any file of the package
    monkeypatch.setenv("VLMX_WEIGHTS", str(tmp_path))
    assert weights.find(mini).name == "registry.py"
    (tmp_path / mini.file).touch()
    assert weights.find(mini) == tmp_path / mini.file


def row_with(**changes: str) -> BackboneRow:
    return replace(VMAMBA_T, **changes)


def test_missing_weights_name_file_source_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMX_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        weights.find(VMAMBA_T)
    assert all(part in str(caught.value) for part in (VMAMBA_T.file, VMAMBA_T.url, str(tmp_path)))
    monkeypatch.delenv("VLMX_WEIGHTS")
    with pytest.raises(WeightsError, match=r"VLMX_WEIGHTS \(not set\)"):
        weights.find(VMAMBA_T)
    with pytest.raises(WeightsError, match=r"no weights file .*absent.pth"):
        weights.find(VMAMBA_T, tmp_path / "absent.pth")


def test_prefixes_go_only_if_all_names_have_them() -> None:
    one = torch.zeros(1)
    assert list(weights.strip_prefix({"m.a": one, "m.b": one}, "m.")) == ["a", "b"]
    assert list(weights.strip_prefix({"m.a": one, "b": one}, "m.")) == ["m.a", "b"]


def test_state_hash_sees_names_types_shapes_and_values_but_not_order() -> None:
    reference = weights.sha256_of_state(STATE)
    assert reference == weights.sha256_of_state(dict(reversed(STATE.items())))
    by_hand = b"b\0torch.int64\0()\0" + struct.pack("<q", 4) + b"c\0torch.float16\0(2,)\0" + struct.pack("<ee", 1, 1)
    assert weights.sha256_of_state({k: STATE[k] for k in "cb"}) == hashlib.sha256(by_hand).hexdigest()
    others = [
        {**STATE, "d": STATE["b"]},
        {**STATE, "a.weight": STATE["a.weight"].double()},
        {**STATE, "a.weight": STATE["a.weight"].reshape(3, 2)},
        {**STATE, "a.weight": STATE["a.weight"] + 1},
    ]
    assert len({reference, *map(weights.sha256_of_state, others)}) == 5


def test_a_backbone_built_from_a_file_records_it(tmp_path: Path) -> None:
    state = build_backbone("vmamba-mini-scenes", res=(64, 64), weights="random:1").net.state_dict()
    path = tmp_path / "mini.pth"
    torch.save({"model": state}, path)
    built = build_backbone("vmamba-mini-scenes", res=(64, 64), weights=path)
    assert built.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert built.weights_source == f"file {path}"
    assert_same(built.net.state_dict(), state)


def test_weights_with_nan_are_refused(tmp_path: Path) -> None:
    state = build_backbone("vmamba-mini-scenes", res=(64, 64), weights="random:1").net.state_dict()
    state["patch_embed.0.bias"][3] = float("nan")
    torch.save(state, tmp_path / "mini.pth")
    with pytest.raises(WeightsError, match=r"1 tensors hold NaN or infinity: patch_embed\.0\.bias"):
        build_backbone("vmamba-mini-scenes", res=(64, 64), weights=tmp_path / "mini.pth")
