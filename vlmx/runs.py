"""What a run leaves behind: resolved config, environment, metrics, status; every file written atomically."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import yaml

from vlmx.console import warn
from vlmx.errors import OutOfSpaceError, RunError
from vlmx.registry import unknown_name

State = Literal["running", "done", "failed", "interrupted"]
LOCK = ".lock"


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that it is either the old one or the whole new one: temporary name, fsync, rename, fsync folder.

    Raises:
        OutOfSpaceError: the disk is full; the old file is intact.
    """
    payload = data.encode() if isinstance(data, str) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise space_error(error, path) from error
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def space_error(error: OSError, path: Path) -> Exception:
    """The OutOfSpaceError for a full disk, or `error` itself when it is something else."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutOfSpaceError(
            f"no space left while writing {path}",
            why=f"{error.strerror}; everything committed before is intact",
            fix="free some space and give the same command again, it goes on where it stopped",
        )
    return error


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(value, indent=1, sort_keys=False) + "\n")


def now() -> str:
    """The local time, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S")


def environment() -> dict[str, Any]:
    """Versions and machine of this process, for the record; imports nothing heavy."""
    packages = {}
    for name in ("vlmx", "torch", "transformers", "timm", "zarr", "numpy", "pillow", "mamba-ssm"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "argv": sys.argv[1:],
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


class RunFolder:
    """One training run on disk.

    config.yaml        the resolved configuration
    environment.json   versions and machine
    status.json        state, start, end, the error it ended with, and what is known of each session
    metrics.jsonl      one line a logged step
    checkpoints/       what resume needs
    model/             connector and LLM after training
    eval/<benchmark>/  answers.jsonl and scores.json
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, *, kind: str, config: dict[str, Any]) -> RunFolder:
        """Make a new run folder, or take over one of the same path, which keeps the time of its first start.

        Raises:
            RunError: the path exists and is something else than a run.
        """
        run = cls(path)
        run._require_own()
        write_atomic(path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        write_json(path / "environment.json", environment())
        started = run.status.get("started") if (path / "status.json").exists() else None
        run.set_status("running", kind=kind, started=started or now(), error=None)
        return run

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes, of this machine or of others, from training in this folder while the block runs.

        The system takes the lock back from a process that dies.

        Raises:
            RunError: another process trains in it, or the path is something else than a run.
            OutOfSpaceError: the disk is full.
        """
        self._require_own()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise space_error(error, self.path) from error
        try:
            self._lock(descriptor)
            yield
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            raise RunError(
                f"there is a training in {self.path} already",
                why=f"{holder} holds {self.path / LOCK}",
                fix="wait for it, or stop it and give the same command again; or choose another --out",
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise space_error(error, self.path / LOCK) from error
            warn(f"{self.path} cannot be locked ({error.strerror}): do not start a second training in it")

    def _require_own(self) -> None:
        if (self.path / "status.json").exists() or not self.path.exists():
            return
        if any(child.name != LOCK for child in self.path.iterdir()):
            raise RunError(f"{self.path} is not a run folder", why="it holds other files", fix="choose another --out")

    @classmethod
    def open(cls, name_or_path: str, *, root: Path = Path("runs")) -> RunFolder:
        """Open a run by path, by name below `root`, by an unambiguous prefix of that name, or "latest".

        Raises:
            RunError: the folder is not a run, or the prefix is ambiguous.
            UnknownNameError: there is no such run.
        """
        direct = Path(name_or_path)
        if direct.is_dir():
            if not (direct / "status.json").exists():
                raise RunError(
                    f"{direct} is not a run folder",
                    why="it has no status.json",
                    fix="give a folder that `vlmx train` made (vlmx list runs)",
                )
            return cls(direct)
        names = list_runs(root)
        if name_or_path == "latest" and names:
            return cls(root / max(names, key=lambda name: (root / name / "config.yaml").stat().st_mtime))
        if name_or_path in names:
            return cls(root / name_or_path)
        matches = [name for name in names if name.startswith(name_or_path)]
        if len(matches) == 1:
            return cls(root / matches[0])
        if matches:
            raise RunError(
                f"'{name_or_path}' is more than one run", why=", ".join(matches), fix="type more of the name"
            )
        raise unknown_name("run", name_or_path, names, listing="vlmx list runs")

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration as plain data."""
        return dict(yaml.safe_load((self.path / "config.yaml").read_text()))

    @property
    def status(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "status.json").read_text()))

    def set_status(self, state: State, **fields: Any) -> None:
        """Record the state; earlier fields stay, but for those that are None now.

        Raises:
            OutOfSpaceError: the disk is full; what was recorded before is intact.
        """
        known = self.status if (self.path / "status.json").exists() else {}
        merged = {**known, "state": state, **fields}
        write_json(self.path / "status.json", {key: value for key, value in merged.items() if value is not None})

    def log(self, **fields: Any) -> None:
        """Append one line to metrics.jsonl, whole or not at all; a torn one at its end makes room.

        Raises:
            OutOfSpaceError: the disk is full; the lines before are intact.
        """
        path = self.path / "metrics.jsonl"
        line = (json.dumps(fields) + "\n").encode()
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise space_error(error, path) from error
        try:
            end = os.fstat(descriptor).st_size
            if end and os.pread(descriptor, 1, end - 1) != b"\n":
                end = path.read_bytes().rfind(b"\n") + 1
                os.ftruncate(descriptor, end)
            try:
                written = os.write(descriptor, line)
            except OSError as error:
                raise space_error(error, path) from error
            if written < len(line):  # what a disk does that has room for a part of it
                os.ftruncate(descriptor, end)
                raise space_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), path)
        finally:
            os.close(descriptor)

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The logged lines, oldest first; what follows the last whole one is the rest of a write that was cut off.

        Raises:
            RunError: a line is not JSON.
        """
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        *lines, _ = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise RunError(
                    f"{path} is damaged", why=f"line {number}: {error}", fix=f"remove line {number} of it"
                ) from error


def list_runs(root: Path = Path("runs")) -> list[str]:
    """Names of the run folders below `root`, sorted."""
    if not root.is_dir():
        return []
    return sorted(child.name for child in root.iterdir() if (child / "status.json").exists())
