"""What a run leaves behind: resolved config, environment, metrics, status; every file written atomically."""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import yaml

from vlmx.errors import OutOfSpaceError, RunError
from vlmx.registry import unknown_name

State = Literal["running", "done", "failed", "interrupted"]


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
    status.json        state, start, end, the last error
    metrics.jsonl      one line a logged step
    checkpoints/       what resume needs
    model/             connector and LLM after training
    eval/<benchmark>/  answers.jsonl and scores.json
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, *, kind: str, config: dict[str, Any]) -> RunFolder:
        """Make a new run folder, or take over one of the same path.

        Raises:
            RunError: the path exists and is something else than a run.
        """
        if path.exists() and any(path.iterdir()) and not (path / "status.json").exists():
            raise RunError(f"{path} is not a run folder", why="it holds other files", fix="choose another --out")
        run = cls(path)
        write_atomic(path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        write_json(path / "environment.json", environment())
        run.set_status("running", kind=kind, started=time.strftime("%Y-%m-%dT%H:%M:%S"))
        return run

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
        """Record the state; earlier fields stay."""
        known = self.status if (self.path / "status.json").exists() else {}
        write_json(self.path / "status.json", {**known, "state": state, **fields})

    def log(self, **fields: Any) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(fields) + "\n")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The logged lines, oldest first."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            for line in path.read_text().splitlines():
                yield json.loads(line)


def list_runs(root: Path = Path("runs")) -> list[str]:
    """Names of the run folders below `root`, sorted."""
    if not root.is_dir():
        return []
    return sorted(child.name for child in root.iterdir() if (child / "status.json").exists())
