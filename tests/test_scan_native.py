"""Does the C kernel come to any machine, heal when it is damaged, and compute whatever torch's defaults are?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROBE = """
import torch
from vlmx.extract.ops.engines import choose, engine
cpu = torch.device("cpu")
obstacle = engine("native").obstacle(cpu)
print(choose(cpu).name, "|", "" if obstacle is None else obstacle.why, "|", "" if obstacle is None else obstacle.fix)
"""


def probe(home: Path, **environment: str) -> list[str]:
    """Chosen engine, and why and how native is not it, in a process of its own that keeps things below `home`."""
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    env: dict[str, Any] = {**os.environ, "XDG_CACHE_HOME": str(home), "TMPDIR": str(home / "tmp"), **environment}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=env, check=True)
    return [part.strip() for part in done.stdout.strip().split("|")]


def kept(home: Path) -> list[Path]:
    return sorted(path for path in home.rglob("*.so"))


def fake_compilers(folder: Path, script: str) -> str:
    """A PATH on which every compiler is a shell script."""
    folder.mkdir()
    for name in ("cc", "gcc", "clang"):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None and shutil.which("gcc") is None, reason="there is no C compiler"
)


def test_without_a_compiler_torch_computes_and_the_reason_is_known(tmp_path: Path) -> None:
    chosen, why, fix = probe(tmp_path, PATH=str(tmp_path))
    assert (chosen, fix) == ("torch", "apt install gcc")
    assert "compiler" in why


@pytest.mark.slow
@needs_compiler
def test_a_kept_kernel_needs_no_compiler_and_heals_when_it_is_damaged(tmp_path: Path) -> None:
    assert probe(tmp_path)[0] == "native"
    (library,) = kept(tmp_path)
    whole = library.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:4096] + bytes(4096) + whole[8192:]):
        library.write_bytes(damaged)
        assert probe(tmp_path)[0] == "native"
        assert library.read_bytes() == whole
    assert probe(tmp_path, PATH=str(tmp_path))[0] == "native"


@needs_compiler
def test_a_folder_that_cannot_be_written_and_a_missing_home_cost_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert probe(tmp_path / "a", XDG_CACHE_HOME=str(tmp_path / "file"))[0] == "native"
    assert len(kept(tmp_path / "a" / "tmp")) == 1


@needs_compiler
def test_a_compiler_that_does_not_know_the_processor_is_asked_again(tmp_path: Path) -> None:
    real = shutil.which("cc") or shutil.which("gcc")
    path = fake_compilers(
        tmp_path / "bin", f'case "$*" in *native\\ *) echo "bad -march" >&2; exit 1;; esac\nexec {real} "$@"'
    )
    assert probe(tmp_path / "home", PATH=path)[0] == "native"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('echo "no such flag" >&2; exit 1', "no such flag"),
        ("exit 3", "status 3"),
        (r"printf 'b\\303(d\\377\\n' >&2; exit 1", "cannot compile"),
        ("exit 0", "it wrote no library"),
    ],
)
def test_a_compiler_that_fails_or_lies_is_no_catastrophe(tmp_path: Path, script: str, said: str) -> None:
    chosen, why, _ = probe(tmp_path, PATH=fake_compilers(tmp_path / "bin", script))
    assert chosen == "torch"
    assert said in why
    assert kept(tmp_path) == []


@needs_compiler
def test_a_miscompiled_kernel_is_never_used_nor_kept(tmp_path: Path) -> None:
    # exp2 of a slightly wrong constant: it compiles, and it is wrong
    path = fake_compilers(
        tmp_path / "bin",
        f'for last; do :; done\nsed s/0.6931470036506653f/0.7f/ "$last" > {tmp_path}/wrong.c\n'
        f'set -- "$@" {tmp_path}/wrong.c\n'
        f'i=$#; for a; do shift; case "$a" in */native.c) ;; *) set -- "$@" "$a";; esac; done\n'
        f'exec {shutil.which("cc") or shutil.which("gcc")} "$@"',
    )
    chosen, why, _ = probe(tmp_path / "cache", PATH=path)
    assert chosen == "torch"
    assert "off by" in why
    assert kept(tmp_path / "cache") == []
    assert probe(tmp_path / "cache")[0] == "native"


DEFAULTS = """
import torch
from vlmx.extract.ops.engines import engine, force
force("native")
from vlmx.extract.ops.selective_scan import selective_scan
g = torch.Generator().manual_seed(0)
u, dt, B, C = (torch.randn(2, n, 50, generator=g) for n in (6, 6, 3, 3))
A = -torch.rand(6, 3, generator=g)
for dtype in (torch.float64, torch.bfloat16):
    torch.set_default_dtype(dtype)
    y = selective_scan(u, dt, A, B, C, delta_softplus=True)
    torch.set_default_dtype(torch.float32)
    assert y.dtype == torch.float32
    with torch.device("meta"):
        z = selective_scan(u, dt, A, B, C, delta_softplus=True)
    assert torch.equal(y, z)
print("fine")
"""


@needs_compiler
def test_torchs_defaults_do_not_reach_the_kernel() -> None:
    done = subprocess.run([sys.executable, "-c", DEFAULTS], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr


@needs_compiler
def test_the_kernel_is_compiled_once_by_processes_that_start_together(tmp_path: Path) -> None:
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", PROBE], stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)
    ]
    assert [process.communicate()[0].split()[0] for process in running] == ["native", "native"]
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 1
