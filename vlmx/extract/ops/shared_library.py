"""How does a C file become a shared library: compiled once on a machine, kept, and never trusted when it is damaged?"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from vlmx.extract.ops.engines import Obstacle

FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-fPIC", "-shared")
COMPILERS = ("cc", "gcc", "clang")
COMPILE_TIMEOUT_S = 120


def kept_folders(kind: str) -> Iterator[Path]:
    """Where things may be kept between commands, best first: the user's cache folder, then one of the system's.

    Args:
        kind: name of the folder, e.g. "native".
    """
    if os.environ.get("XDG_CACHE_HOME"):
        yield Path(os.environ["XDG_CACHE_HOME"]) / "vlmx" / kind
    else:
        with suppress(RuntimeError):  # a user without a home folder
            yield Path.home() / ".cache" / "vlmx" / kind
    yield Path(tempfile.gettempdir()) / f"vlmx-{os.getuid()}" / kind


def library_of(source: Path) -> ctypes.CDLL | Obstacle:
    """The library that `source` gives on this machine: a kept one that is whole, or one that is compiled now.

    Several processes may ask for it at once. The name of a kept library holds the SHA-256 of its bytes, and nothing
    else is loaded: a file that was cut off would end the process.

    Args:
        source: a C file that includes no headers but those of the language.

    Returns:
        The library, or what is in the way.
    """
    parts = (source.read_bytes(), *map(str.encode, (*FLAGS, _machine())))
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folders = [folder / key for folder in kept_folders("native") if _is_ours(folder)]
    for folder in folders:
        for path in sorted(folder.glob("*.so")):
            if (library := _load(path)) is not None:
                return library
    content = _compile(source)
    if isinstance(content, Obstacle):
        return content
    reason = "no folder for it"
    for folder in folders:
        try:
            return ctypes.CDLL(str(_keep(folder, content)))
        except OSError as error:
            reason = str(error)
    return Obstacle(
        why=f"it cannot be kept or loaded: {reason}",
        fix="export XDG_CACHE_HOME=/a/folder/that/can/be/written/and/executed",
    )


def discard(library: ctypes.CDLL) -> None:
    """Do not keep a library that computes wrongly: the next process compiles it again, by a better compiler perhaps."""
    with suppress(OSError):
        Path(library._name).unlink()


def _load(path: Path) -> ctypes.CDLL | None:
    """A kept library; None, and the file is gone if that is allowed, when it is not what was kept."""
    try:
        whole = hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
        if whole:
            return ctypes.CDLL(str(path))
        path.unlink()
    except OSError:  # it cannot be read, executed or deleted
        return None
    return None


def _keep(folder: Path, content: bytes) -> Path:
    """Write a library so that it is there as a whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(content).hexdigest()}.so"
    handle, unfinished = tempfile.mkstemp(dir=folder)
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(unfinished, 0o755)
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return path


def _is_ours(folder: Path) -> bool:
    """Whether nobody else can put a library there: what lies in a folder of the system must belong to this user."""
    shared = folder.parent
    if shared.parent != Path(tempfile.gettempdir()):
        return True
    try:
        shared.mkdir(mode=0o700, exist_ok=True)
        found = shared.stat(follow_symlinks=False)
    except OSError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _compile(source: Path) -> bytes | Obstacle:
    """The bytes of the library from the first compiler that makes one."""
    commands = [shlex.split(os.environ["CC"])] if os.environ.get("CC") else []
    commands += [[path] for name in COMPILERS if (path := shutil.which(name))]
    if not commands:
        return Obstacle(why=f"no C compiler ({', '.join(COMPILERS)}) is on the PATH", fix="apt install gcc")
    target = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    reasons: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "built.so"
        for command in commands:
            for flags in ((*FLAGS, target), FLAGS):  # a compiler may not know the processor
                reason = _failure([*command, *flags, "-o", str(built), str(source)])
                if reason is None and built.is_file():
                    return built.read_bytes()
                reasons.setdefault(command[0], reason or "it wrote no library")
    failed = "; ".join(f"{compiler} cannot compile it: {reason}" for compiler, reason in reasons.items())
    fix = "apt install --reinstall gcc libc6-dev" if shutil.which("gcc") else "apt install gcc"
    return Obstacle(why=failed, fix=fix)


def _failure(command: list[str]) -> str | None:
    """What a command that failed said last; None when it did not fail."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=COMPILE_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if done.returncode == 0:
        return None
    said = done.stderr.decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(said) if line.strip()), f"status {done.returncode}")


@cache
def _machine() -> str:
    """What -march=native depends on: machine code for one CPU may be illegal on another that shares the home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        return f"{platform.machine()} {platform.processor()} {platform.version()}"
    kinds = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "\n" + "\n".join(sorted({line for line in lines if line.startswith(kinds)}))
