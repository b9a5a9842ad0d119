"""Does no pickle, in any container, run anything, write anything, or change what later pickles become?"""

import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlmx.errors import WeightsError
from vlmx.extract import weights
from vlmx.extract.weights import pickles
from vlmx.extract.weights.torch_files import LEGACY_MAGIC

STATE = {"w": torch.arange(3.0)}

# Every container takes the bytes of a pickle that is not harmless.
Container = Callable[[Path, bytes], Path]


def torch_zip(path: Path, data: bytes) -> Path:
    """A torch file whose data.pkl is `data`; storage "0" holds 0, 1, 2."""
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("/data.pkl") else old.read(name))
    return path


def torch_legacy(path: Path, data: bytes) -> Path:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(part, 2) for part in (LEGACY_MAGIC, 1001, system)]
    path.write_bytes(b"".join(parts) + data + pickle.dumps([], 2))
    return path


def plain_pickle(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def inner_zip(path: Path, data: bytes) -> Path:
    inner = torch_zip(path.with_name("inner.pth"), data)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(inner, "w.pth")
    return path


def first_of_legacy(path: Path, data: bytes) -> Path:
    """In place of the magic number."""
    path.write_bytes(data + pickle.dumps(1001, 2))
    return path


CONTAINERS = [torch_zip, torch_legacy, plain_pickle, inner_zip, first_of_legacy]

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


class Reduces:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def hostile(trace: Path) -> dict[str, Any]:
    """Objects that touch `trace` when they are unpickled by a careless reader."""
    return {
        "os.system": Reduces(os.system, f"touch {trace}"),
        "Popen": Reduces(subprocess.Popen, ["touch", str(trace)]),
        "eval": Reduces(eval, f"open({str(trace)!r}, 'w')"),
        "exec": Reduces(exec, f"open({str(trace)!r}, 'w')"),
        "open": Reduces(open, str(trace), "w"),
        "import": Reduces(__import__, "os"),
        "nested": Reduces(pickle.loads, pickle.dumps(Reduces(os.system, f"touch {trace}"))),
        "torch.load": Reduces(torch.load, str(trace)),
        "fromfile": Reduces(np.fromfile, str(trace)),
        "getattr": Reduces(getattr, Reduces(__import__, "os"), "system"),
        "in an object array": np.array([Reduces(os.system, f"touch {trace}")], dtype=object),
    }


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", list(hostile(Path())))
@pytest.mark.parametrize("protocol", [2, 4])
def test_attacks_are_refused_and_not_run(tmp_path: Path, container: Container, kind: str, protocol: int) -> None:
    trace = tmp_path / "it-ran"
    data = pickle.dumps({"state_dict": {}, "hook": hostile(trace)[kind]}, protocol)
    with pytest.raises(WeightsError, match="tries to run code; nothing was run"):
        weights.read(container(tmp_path / "w.pth", data))
    assert not trace.exists()
    # The attack is one: Python's own reader, in a process of its own, does as it is told.
    if kind in ("os.system", "eval"):
        subprocess.run(
            [sys.executable, "-c", "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"],
            input=data,
            check=True,
        )
        assert trace.exists()


def text(value: str) -> bytes:
    """Opcode for a string."""
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def name(module: str, attribute: str) -> bytes:
    """Opcodes for a global of protocol 4, dots in the attribute allowed."""
    return text(module) + text(attribute) + b"\x93"


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x03tQ"
V2 = b"ctorch._utils\n_rebuild_tensor_v2\n"


def tensor(
    storage: bytes = STORAGE, offset: bytes = b"K\x00", size: bytes = b"K\x03\x85", stride: bytes = b"K\x01\x85"
) -> bytes:
    """Opcodes of a tensor."""
    return V2 + b"(" + storage + offset + size + stride + b"\x89)tR"


def state_of(value: bytes) -> bytes:
    """{"model": {"w": value}, "log": an object that torch's weights_only reader refuses}."""
    return b"\x80\x04}(" + text("log") + b"cmmengine\nLog\n)R" + text("model") + b"}" + text("w") + value + b"su."


def test_the_hand_made_file_is_right_without_an_attack(tmp_path: Path) -> None:
    assert weights.read(torch_zip(tmp_path / "w.pth", state_of(tensor())))["w"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "value",
    [
        name("torch._utils", "_rebuild_tensor_v2.__globals__"),
        name("builtins", "getattr") + b"(" + V2 + text("__globals__") + b"tR",
        name("collections", "OrderedDict.__init__.__globals__"),
        name("functools", "partial") + b"(" + name("builtins", "print") + b"tR",
        name("operator", "attrgetter") + b"(" + text("__class__") + b"tR",
        name("builtins", "type") + b"(" + text("X") + b")}tR",
        name("timm.models", "create_model") + b"(" + text("x") + b"tR",
        name("numpy", "ndarray.tofile"),
    ],
)
def test_names_that_reach_for_more_are_inert(tmp_path: Path, value: bytes) -> None:
    data = state_of(value)
    assert isinstance(pickles.TensorsOnlyUnpickler(io.BytesIO(data)).load()["model"]["w"], pickles._Inert | type)
    with pytest.raises(WeightsError, match="holds no state dict"):
        weights.read(torch_zip(tmp_path / "w.pth", data))


@pytest.mark.parametrize(
    "value",
    [
        tensor(size=b"J\x00\x00\x00\x40\x85"),
        tensor(size=b"J\xff\xff\xff\xff\x85"),
        tensor(offset=b"K\x01"),
        tensor(offset=b"J\xff\xff\xff\xff"),
        tensor(stride=b"J\x00\x00\x00\x40\x85"),
        tensor(stride=b"J\xff\xff\xff\xff\x85"),
        tensor(size=b"K\x03K\x03\x86"),
        tensor(size=b"K\x03K\x03\x86", stride=b"K\x00K\x01\x86"),  # more elements than there are
        tensor(size=b"G\x40\x08\x00\x00\x00\x00\x00\x00\x85"),
        tensor(storage=b"N"),
        tensor(storage=text("storage")),
        tensor(storage=STORAGE.replace(b"K\x03tQ", b"J\xff\xff\xff\x7ftQ")),  # a storage larger than its bytes
        tensor(storage=STORAGE.replace(b"K\x03tQ", b"K\x04tQ"), size=b"K\x04\x85"),  # ... by one
        tensor(storage=STORAGE.replace(b"K\x03tQ", b"J\xff\xff\xff\xfftQ")),
        tensor(storage=STORAGE.replace(text("0"), text("../../data.pkl"))),
        tensor(storage=STORAGE.replace(b"ctorch\nFloatStorage\n", b"ctorch\nNoSuchStorage\n")),
        tensor(storage=STORAGE.replace(text("storage"), text("module"))),
    ],
)
def test_tensors_outside_their_storage_are_refused(tmp_path: Path, value: bytes) -> None:
    reasons = "goes past its storage|not counts|no storage|no size|not to a storage|ends early|KeyError|argument 2"
    with pytest.raises(WeightsError, match=f"cannot be read as weights; .*({reasons})"):
        weights.read(torch_zip(tmp_path / "w.pth", state_of(value)))


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(K\x00tR"


def array(spec: str, shape: bytes, raw: bytes, *, dtype_state: bytes = b"") -> bytes:
    dtype = b"cnumpy\ndtype\n" + text(spec) + b"\x89\x88\x87R" + dtype_state
    return ARRAY + b"(K\x01" + shape + dtype + b"\x89B" + len(raw).to_bytes(4, "little") + raw + b"tb"


def test_the_hand_made_array_is_right_without_an_attack(tmp_path: Path) -> None:
    data = state_of(array("f4", b"K\x02\x85", np.array([1, 2], "<f4").tobytes()))
    assert weights.read(plain_pickle(tmp_path / "w.pkl", data))["w"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (array("f4", b"J\x00\x00\x00\x40\x85", bytes(8)), "do not have its shape"),
        (array("f4", b"J\xff\xff\xff\xff\x85", bytes(8)), "are not counts"),
        (array("O", b"K\x01\x85", bytes(8)), "NumPy array of type 'O'"),
        (array("O8", b"K\x01\x85", bytes(8)), "NumPy array of type 'O8'"),
        (array("V8", b"K\x01\x85", bytes(8)), "NumPy array of type 'V8'"),
        # A float dtype whose state claims that it holds objects, which NumPy would follow as pointers.
        (
            array(
                "f8", b"K\x01\x85", bytes(8), dtype_state=b"(K\x03" + text("|") + b"NNNJ\xff\xff\xff\xffK\x01K\x3ftb"
            ),
            "",
        ),
        (
            array(
                "f8",
                b"K\x01\x85",
                bytes(8),
                dtype_state=b"(K\x03" + text("|") + b"N" + text("x") + b"}K\x08K\x01K\x3ftb",
            ),
            "type 'structured'",
        ),
    ],
)
def test_arrays_that_lie(tmp_path: Path, value: bytes, message: str) -> None:
    path = plain_pickle(tmp_path / "w.pkl", state_of(value))
    if not message:  # taken for the plain number that its bytes are
        assert weights.read(path)["w"].tolist() == [0.0]
        return
    with pytest.raises(WeightsError, match=message):
        weights.read(path)


# What a pickle can try to change for all later pickles: attributes of the objects that names become.
CHANGES = [
    b"N}" + text(attribute) + b"K\x00s\x86b"  # (None, {attribute: value}): set with setattr
    for attribute in ("_make", "dtype", "numel", "size", "__call__", "__class__")
] + [
    b"}" + text("_make") + b"K\x00sb",  # {attribute: value}: put into __dict__
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "target",
    [
        V2,
        b"ctorch\nFloatStorage\n",
        b"ccollections\nOrderedDict\n",
        b"cmmengine\nLog\n",
        b"cmmengine\nLog\n)R",
        b"ctorch\nfloat32\n",
        b"cnumpy\ndtype\n",
        STORAGE,
        tensor(),
    ],
)
def test_a_pickle_changes_nothing_for_the_next(tmp_path: Path, target: bytes, change: bytes) -> None:
    path = torch_zip(tmp_path / "bad.pth", state_of(target + change + b"0" + tensor()))
    try:
        found = weights.read(path)
    except WeightsError:
        pass
    else:
        assert found["w"].tolist() == [0, 1, 2]
    assert weights.read(torch_zip(tmp_path / "good.pth", state_of(tensor())))["w"].tolist() == [0, 1, 2]


def test_a_source_patch_is_not_written(tmp_path: Path) -> None:
    # torch's general reader of the older format compares sources and, if an object says so, writes a patch file
    # wherever that object's name points to. With torch's own functions in reach of a pickle this writes any file.
    marked = V2 + b"N}" + text("dump_patches") + b"\x88s" + text("__name__") + text(str(tmp_path / "new")) + b"s\x86b0"
    module = b"(" + text("module") + V2 + text("source") + text("text of the attacker\n") + b"tQ"
    path = torch_legacy(tmp_path / "w.pth", b"\x80\x02" + marked + module + b".")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(WeightsError, match=r"cannot be read as weights.*not to a storage"):
        weights.read(path)
    assert sorted(tmp_path.iterdir()) == before
    assert torch._utils._rebuild_tensor_v2.__name__ == "_rebuild_tensor_v2"


def test_inert_objects_call_nothing_and_keep_nothing() -> None:
    called: list[int] = []
    inert = pickles._Inert(lambda: called.append(1))
    inert(lambda: called.append(1))
    inert[lambda: called.append(1)] = called
    inert.append(lambda: called.append(1))
    inert.__setstate__({"append": called.append})
    assert called == []
    assert isinstance(inert(), pickles._Inert)
    with pytest.raises(AttributeError):
        inert.attribute = 1  # type: ignore[attr-defined]
