"""Is each format of a checkpoint read exactly, whatever its name; does each kind of bad file get one clear error?"""

import gzip
import hashlib
import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vlmx.errors import OutOfSpaceError, WeightsError
from vlmx.extract import weights
from vlmx.extract.backbones.base import build_backbone
from vlmx.extract.weights import formats

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(4), "c": torch.ones(2, dtype=torch.float16)}


class TrainingLog:
    """Like the log objects of training frameworks: its pickle names a class that readers do not have."""

    def __init__(self) -> None:
        self.values = [1.0, 2.0]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor] = STATE) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("nested", [None, "state_dict", "model", "module", "model_state"])
def test_torch_files(tmp_path: Path, legacy: bool, nested: str | None) -> None:
    path = tmp_path / "w.pth.tar"
    torch.save({nested: STATE, "epoch": 3} if nested else STATE, path, _use_new_zipfile_serialization=not legacy)
    found = weights.read_checkpoint(path)
    assert_same(found.state)
    assert found.nested_under == (nested or "")
    assert found.format == ("torch (before 1.6)" if legacy else "torch")


def with_foreign_objects(state: dict[str, Any]) -> dict[str, Any]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    return {
        "message_hub": TrainingLog(),
        "getter": getattr,
        "best": np.float64(0.5),
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
    }


SHARED = torch.arange(12.0)
ALL_KINDS = {
    **STATE,
    "transposed": torch.arange(6, dtype=torch.int16).reshape(2, 3).T,
    "view": SHARED[4:10].reshape(2, 3),
    "tied": SHARED,
    "bfloat16": torch.tensor([1.5, -2], dtype=torch.bfloat16),
    "bool": torch.tensor([True, False]),
    "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
    "empty": torch.zeros(0, 3),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


@pytest.mark.parametrize("legacy", [False, True])
def test_files_with_foreign_objects_give_their_tensors_exactly(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "w.pth"
    kinds = {k: v for k, v in ALL_KINDS.items() if not (legacy and k == "uint16")}  # torch cannot save it there
    torch.save(with_foreign_objects(OrderedDict(kinds)), path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    found = weights.read(path)
    assert_same(found, {name: tensor.detach() for name, tensor in kinds.items()})
    found["a.weight"].fill_(7)  # in memory, not in the file
    assert_same(weights.read(path), {name: tensor.detach() for name, tensor in kinds.items()})


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_torch_file_called_safetensors_and_one_of_another_protocol(tmp_path: Path, foreign: bool) -> None:
    path = tmp_path / "w.safetensors"
    torch.save(with_foreign_objects(STATE) if foreign else STATE, path, pickle_protocol=4)
    assert_same(weights.read(path))


def test_safetensors_whatever_the_file_is_called(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(STATE, tmp_path / "w.pth")
    assert_same(weights.read(tmp_path / "w.pth"))


def test_plain_weights_are_preferred_to_averages_and_it_is_said(tmp_path: Path) -> None:
    path, other = tmp_path / "w.pth", {"a.weight": torch.zeros(2, 3)}
    torch.save({"model_ema": other, "model": STATE}, path)
    found = weights.read_checkpoint(path)
    assert_same(found.state)
    assert (found.nested_under, found.not_taken) == ("model", ("model_ema",))
    torch.save({"state_dict": {**STATE, "ema_a_weight": torch.zeros(2, 3), "ema_own": torch.ones(1)}}, path)
    found = weights.read_checkpoint(path)
    assert_same(found.state, {**STATE, "ema_own": torch.ones(1)})  # the last is the average of nothing: a weight
    assert found.not_taken == ("ema_* (1 tensors)",)
    torch.save({"model_ema": other, "epoch": 3}, path)
    found = weights.read_checkpoint(path)
    assert_same(found.state, other)
    assert (found.nested_under, found.not_taken) == ("model_ema", ())


def test_values_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    torch.save({"model": {**STATE, "version": 2}}, tmp_path / "w.pth")
    found = weights.read_checkpoint(tmp_path / "w.pth")
    assert_same(found.state)
    assert found.not_tensors == ("version",)


ARRAYS = {
    "conv.weight": np.arange(24, dtype="f4").reshape(2, 3, 4),
    "fortran": np.asfortranarray(np.arange(6, dtype="f8").reshape(2, 3)),
    "big_endian": np.arange(3, dtype=">i4"),
    "half": np.array([1.5, 2], dtype="f2"),
    "scalar_array": np.array(5, dtype="i8"),
    "scalar": np.float32(2.5),
    "flag": np.array([True, False]),
    "empty": np.zeros((0, 2), dtype="f4"),
}


@pytest.mark.parametrize(
    ("protocol", "old_numpy"), [(2, False), (3, False), (4, False), (5, False), (2, True), (3, True)]
)
def test_detectron2_files(tmp_path: Path, protocol: int, old_numpy: bool) -> None:
    content = {"model": ARRAYS, "__author__": "Detectron2 Model Zoo", "matching_heuristics": True}
    data = pickle.dumps(content, protocol)
    if old_numpy:  # the module's name before NumPy 2
        data = data.replace(b"cnumpy._core.", b"cnumpy.core.")
    (tmp_path / "model_final.pkl").write_bytes(data)
    found = weights.read_checkpoint(tmp_path / "model_final.pkl")
    assert (found.format, found.nested_under) == ("pickle of arrays", "model")
    assert_same(
        found.state, {k: torch.from_numpy(np.array(v, dtype=v.dtype.newbyteorder("="))) for k, v in ARRAYS.items()}
    )


def test_a_python_2_pickle(tmp_path: Path) -> None:
    # {"model": {"w": array([1., 2.], "f4")}} as Python 2 writes it: bytes are "strings" of any character.
    raw = struct.pack("<2f", 1.0, -2.5)
    data = (
        b"\x80\x02}U\x05model}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"U" + bytes([len(raw)]) + raw + b"tbss."
    )
    (tmp_path / "w.pkl").write_bytes(data)
    assert_same(weights.read(tmp_path / "w.pkl"), {"w": torch.tensor([1.0, -2.5])})


@pytest.mark.parametrize(
    "array", [np.array([{}, "x"], dtype=object), np.array(["a"]), np.zeros(1, dtype=[("x", "f4")])]
)
def test_arrays_that_are_no_numbers_are_refused(tmp_path: Path, array: Any) -> None:
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": {"w": ARRAYS["half"], "bad": array}}, 2))
    with pytest.raises(WeightsError, match="bad is a NumPy array of type"):
        weights.read(tmp_path / "w.pkl")


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def torch_bytes(content: object, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


@pytest.mark.parametrize("member", ["folder/w.pth.tar", "w.pkl", "w.safetensors"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_zip_with_one_checkpoint(tmp_path: Path, member: str, legacy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    data = torch_bytes({"state_dict": STATE}, legacy=legacy)
    path = zipped(tmp_path / "w.zip", {"readme.txt": b"hello", member: data, "__MACOSX/._w.pth": b"junk"})
    found = weights.read_checkpoint(path)
    assert_same(found.state)
    assert (found.files, found.zip_member, found.nested_under) == ((path,), member, "state_dict")
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.pth": b"x", "b/c.pth.tar": b"x"}, r"with 2 checkpoints; checkpoints in it: a.pth, b/c.pth.tar"),
        ({"readme.txt": b"x"}, "with 0 checkpoints"),
        ({"../a.pth": b"x"}, "unsafe name"),
        ({"/a.pth": b"x"}, "unsafe name"),
        ({"a\\..\\..\\b.pth": b"x"}, "unsafe name"),
        ({"a.pth": b"<html>"}, r"w.zip \(a.pth\) is a web page"),
        ({"w.npy": b"x", "v.npy": b"x"}, "npz archive.*safetensors"),
    ],
)
def test_zips_of_another_kind(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        weights.read(zipped(tmp_path / "w.zip", members))


def test_a_zip_in_a_zip_is_not_followed(tmp_path: Path) -> None:
    inner = zipped(tmp_path / "inner.zip", {"w.pth": torch_bytes(STATE)}).read_bytes()
    with pytest.raises(WeightsError, match="a zip archive inside a zip archive"):
        weights.read(zipped(tmp_path / "w.zip", {"w.pth": inner}))


def test_zip_bombs_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped(tmp_path / "w.zip", {"w.pth": bytes(200_000)})
    monkeypatch.setattr(formats, "MAX_MEMBER_BYTES", 100_000)
    with pytest.raises(WeightsError, match="unpacks to 200000 bytes"):
        weights.read(path)
    # A size that lies: the archive's directory says 10 bytes, the data goes on.
    data = bytearray(path.read_bytes())
    size = data.rindex(struct.pack("<L", 200_000))
    data[size : size + 4] = struct.pack("<L", 10)
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        weights.read(path)


def test_a_zip_that_does_not_fit_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped(tmp_path / "w.zip", {"w.pth": bytes(200_000)})
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutOfSpaceError, match="200000 bytes are needed, 1000 are free"):
        weights.read(path)


def hub_folder(folder: Path, *, index: str = "model.safetensors.index.json") -> Path:
    """A sharded checkpoint as the hub has them."""
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({"a.weight": STATE["a.weight"], "b": STATE["b"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": STATE["c"]}, folder / "model-00002-of-00002.safetensors")
    shards = {"a.weight": 1, "b": 1, "c": 2}
    weight_map = {name: f"model-0000{shard}-of-00002.safetensors" for name, shard in shards.items()}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 36}, "weight_map": weight_map}))
    return folder


def test_sharded_checkpoints_by_folder_and_by_index(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "m")
    for path in (folder, folder / "model.safetensors.index.json"):
        found = weights.read_checkpoint(path)
        assert_same(found.state)
        assert [file.name[6:11] for file in found.files] == ["00001", "00002"]
    lines = "".join(f"{f.name} {hashlib.sha256(f.read_bytes()).hexdigest()}\n" for f in sorted(folder.glob("*.saf*rs")))
    assert weights.identity(folder) == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update(c="../other.safetensors"), "names shards outside its folder"),
        (lambda w: w.update(c="/etc/passwd"), "names shards outside its folder"),
        (lambda w: w.update(c="model-00003-of-00003.safetensors"), "1 shards of .* are missing"),
        (lambda w: w.update(d="model-00001-of-00002.safetensors"), "lack 1 of its tensors; d"),
        (lambda w: w.clear(), "is JSON, not weights"),
    ],
)
def test_indices_that_are_wrong(tmp_path: Path, change: Any, message: str) -> None:
    index = hub_folder(tmp_path / "m") / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=message):
        weights.read(tmp_path / "m")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "open_clip.safetensors"])
def test_hub_folders_with_one_file(tmp_path: Path, name: str) -> None:
    from safetensors.torch import save_file

    if name.endswith(".bin"):
        torch.save(STATE, tmp_path / name)
    else:
        save_file(STATE, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    assert_same(weights.read(tmp_path))
    assert weights.identity(tmp_path) == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_folders_that_are_no_hub_folders(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"is no folder of weights; it has none of model\.safetensors"):
        weights.read(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.safetensors").touch()
    with pytest.raises(WeightsError, match=r"and 2 other \.safetensors files"):
        weights.read(tmp_path)


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kept", [1, 20, 150, 700, 8000])
def test_truncated_torch_files(tmp_path: Path, legacy: bool, kept: int, foreign: bool) -> None:
    path, state = tmp_path / "w.pth", {"w": torch.zeros(4000)}
    path.write_bytes(torch_bytes(with_foreign_objects(state) if foreign else state, legacy=legacy)[:kept])
    with pytest.raises(WeightsError, match=rf"w.pth cannot be read as weights.*{kept} bytes long"):
        weights.read(path)


def test_truncated_safetensors_and_pickles(tmp_path: Path) -> None:
    from safetensors.torch import save

    path = tmp_path / "w.safetensors"
    for data in (save({"w": torch.zeros(4000)}), pickle.dumps({"model": {"w": np.zeros(4000, "f4")}}, 4)):
        path.write_bytes(data[:9000])
        with pytest.raises(WeightsError, match="damaged, incomplete"):
            weights.read(path)


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


def npz_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, w=np.zeros(2))
    return buffer.getvalue()


def script_bytes() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), buffer)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: b"", "is empty"),
        (lambda: b"<!DOCTYPE html><html><body>404</body></html>", "is a web page, not weights"),
        (lambda: b"\n<html>rate limit</html>", "is a web page, not weights"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a git-lfs pointer"),
        (lambda: b'{"error": "Repository not found"}', "is JSON, not weights"),
        (lambda: b"not a checkpoint at all", "cannot be read as weights.*begins with"),
        (lambda: gzip.compress(torch_bytes(STATE)), "is a gzip archive; unpack it"),
        (tar_bytes, "is a tar archive; unpack it"),
        (npz_bytes, "is a NumPy .npz archive.*safetensors"),
        (script_bytes, "is a TorchScript program, not weights"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content())
    with pytest.raises(WeightsError, match=message):
        weights.read(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {"a": 1}}, {}, 5])
@pytest.mark.parametrize("plain", [False, True])
def test_files_without_a_state_dict(tmp_path: Path, content: object, plain: bool) -> None:
    if plain:
        (tmp_path / "w.pth").write_bytes(pickle.dumps(content, 2))
    else:
        torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="holds no state dict"):
        weights.read(tmp_path / "w.pth")


def test_tensors_beside_other_things_are_no_state_dict(tmp_path: Path) -> None:
    torch.save({"model": torch.ones(1), "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="holds no state dict"):
        weights.read(tmp_path / "w.pth")


def test_tensors_that_pickle_wrote_are_explained(tmp_path: Path) -> None:
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(STATE, 2))
    with pytest.raises(WeightsError, match=r"written by pickle\.dump instead"):
        weights.read(tmp_path / "w.pkl")


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(10**12), torch.eye(2).to_sparse(), torch.empty(2, device="meta")],
    ids=["repeated", "sparse", "meta"],
)
def test_tensors_of_an_unusual_kind_are_refused(tmp_path: Path, tensor: Tensor) -> None:
    torch.save({"w": tensor}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="holds a tensor of an unusual kind"):
        weights.read(tmp_path / "w.pth")


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
    with pytest.raises(WeightsError, match=r"are damaged; 1 tensor holds NaN or infinity: patch_embed\.0\.bias"):
        build_backbone("vmamba-mini-scenes", res=(64, 64), weights=tmp_path / "mini.pth")
