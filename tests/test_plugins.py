"""Does the example in docs/plug-ins.md work as it stands: installed with pip, listed, tested, and used?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs" / "plug-ins.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example's source and, in `site`, the installed package."""
    folder = tmp_path_factory.mktemp("plugin")
    module, test = blocks("python")
    package = folder / "package"
    package.mkdir()
    (package / "edge_net.py").write_text(module)
    (package / "pyproject.toml").write_text(blocks("toml")[0])
    (folder / "test_edge_net.py").write_text(test)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", "site", "./package"], cwd=folder, check=True, capture_output=True)
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(folder / "site")}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)


def test_the_example_is_complete_and_short() -> None:
    code = blocks("python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    assert "def build(" in code


def test_it_is_listed_and_extracts(installed: Path) -> None:
    shown = run(installed, "-m", "vlmx", "list", "backbones", "edges-s-in1k")
    assert "multiples of 16" in shown.stdout, shown.stderr
    command = ["extract", "--backbone", "edges-s-in1k", "--weights", "random:0", "--data", "mini", "--limit", "3"]
    done = run(installed, "-m", "vlmx", *command, "--res", "64")
    assert re.fullmatch(r"edges-s-in1k@64x64-[0-9a-f]{12}\n", done.stdout), done.stderr
    refused = run(installed, "-m", "vlmx", *command, "--res", "65")
    assert refused.returncode == 2
    assert "multiples of 16 pixels" in refused.stderr


def test_it_passes_the_suite(installed: Path) -> None:
    done = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_edge_net.py")
    assert re.search(r"^9 passed", done.stdout, flags=re.MULTILINE), done.stdout


def test_a_broken_plugin_fails_the_suite(installed: Path) -> None:
    source = (installed / "site" / "edge_net.py").read_text()
    broken = source.replace("self.grid, self.dim", "self.unused = nn.Linear(2, 2)\n        self.grid, self.dim")
    (installed / "site" / "edge_net.py").write_text(broken)
    done = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_edge_net.py")
    (installed / "site" / "edge_net.py").write_text(source)
    assert "parameters are not used, e.g. ['net.unused.weight', 'net.unused.bias']" in done.stdout
    assert "the row says" in done.stdout
