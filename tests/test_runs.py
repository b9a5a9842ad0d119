"""Run folders: found by name, prefix, path and `latest`; anything else is refused; files are whole or absent."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from full_disk import FullDisk

from vlmx.errors import OutOfSpaceError, RunError, UnknownNameError
from vlmx.runs import RunFolder, list_runs, write_atomic


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("vit-mlp2", "vit-mlp3", "vmamba-mlp2"):
        RunFolder.create(tmp_path / name, kind="train", config={"connector": name[-4:]})
    return tmp_path


def test_found_by_name_prefix_path_and_latest(root: Path) -> None:
    assert RunFolder.open("vit-mlp3", root=root).config == {"connector": "mlp3"}
    assert RunFolder.open("vma", root=root).name == "vmamba-mlp2"
    assert RunFolder.open(str(root / "vit-mlp2"), root=root).name == "vit-mlp2"
    assert RunFolder.open("latest", root=root).name == "vmamba-mlp2"
    assert list_runs(root) == ["vit-mlp2", "vit-mlp3", "vmamba-mlp2"]


def test_ambiguous_and_unknown_names(root: Path) -> None:
    with pytest.raises(RunError, match="more than one run"):
        RunFolder.open("vit", root=root)
    with pytest.raises(UnknownNameError, match="did you mean 'vit-mlp2'"):
        RunFolder.open("vit-mpl2", root=root)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(RunError, match="not a run folder"):
        RunFolder.open(str(tmp_path))
    with pytest.raises(RunError, match="holds other files"):
        RunFolder.create(tmp_path, kind="train", config={})


def test_status_keeps_earlier_fields_and_metrics_are_lines(root: Path) -> None:
    run = RunFolder.open("vit-mlp2", root=root)
    run.set_status("done", loss=0.5)
    assert run.status["kind"] == "train"
    assert run.status["state"] == "done"
    run.log(step=1, loss=2.0)
    run.log(step=2, loss=1.0)
    assert [line["loss"] for line in run.metrics()] == [2.0, 1.0]


def test_a_line_of_metrics_is_whole_or_not_there(root: Path) -> None:
    run = RunFolder.open("vit-mlp2", root=root)
    run.log(step=1, loss=2.0)
    whole = (run.path / "metrics.jsonl").read_bytes()
    with FullDisk(len(whole) + 5), pytest.raises(OutOfSpaceError):
        run.log(step=2, loss=1.0)  # five bytes of it are written, and taken back
    assert (run.path / "metrics.jsonl").read_bytes() == whole
    with FullDisk(len(whole)), pytest.raises(OutOfSpaceError):
        run.log(step=2, loss=1.0)
    (run.path / "metrics.jsonl").write_bytes(whole + b'{"step": 2, "lo')
    assert [line["step"] for line in run.metrics()] == [1]
    run.log(step=3, loss=0.5)
    assert [line["step"] for line in run.metrics()] == [1, 3]


def test_a_damaged_line_of_metrics_is_named(root: Path) -> None:
    run = RunFolder.open("vit-mlp2", root=root)
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo{"step": 3}\n{"step": 4}\n')
    with pytest.raises(RunError, match="is damaged") as caught:
        list(run.metrics())
    assert caught.value.why.startswith("line 2: ")


def test_one_process_at_a_time_and_a_field_of_none_is_forgotten(root: Path) -> None:
    run = RunFolder.open("vit-mlp2", root=root)
    with run.held():
        run.set_status("failed", error="x")
        with pytest.raises(RunError, match="there is a training in"), RunFolder(run.path).held():
            pass
    started = run.status["started"]
    with run.held():
        run.set_status("running", started="long ago")
        assert "error" not in RunFolder.create(run.path, kind="train", config={}).status
    assert run.status["started"] == "long ago" != started


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    write_atomic(path, "old")
    code = (
        "import resource, sys, signal; from pathlib import Path; from vlmx.runs import write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "write_atomic(Path(sys.argv[1]), 'x' * 100)"
    )
    assert resource.RLIMIT_FSIZE
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=False)
    assert done.returncode != 0
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]
