"""The command as users type it: help, errors with what, why and fix, exit codes, nothing heavy before it is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "timm", "zarr", "matplotlib", "PIL", "pydantic", "rich", "numpy")


def vlmx(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vlmx", *args], capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize("args", [["--help"], ["extract", "--help"], ["train", "--help"], ["eval", "--help"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys\nfrom vlmx.cli import main\n"
        f"try:\n    main({args!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "Usage: vlmx" in done.stdout


def test_help_lists_every_command_with_examples() -> None:
    done = vlmx("--help")
    for word in ("extract", "train", "eval", "report", "list", "doctor", "cache", "demo", "Worked examples"):
        assert word in done.stdout


def test_unknown_command_suggests_the_near_one() -> None:
    done = vlmx("extrat")
    assert done.returncode == 2
    assert "Did you mean 'extract'?" in done.stderr


def test_unknown_backbone_suggests_the_near_one() -> None:
    done = vlmx("extract", "--backbone", "vmamba-s-coca")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error  unknown backbone 'vmamba-s-coca'"
    assert "did you mean 'vmamba-s-coco'" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback() -> None:
    done = vlmx("--debug", "extract", "--backbone", "vmamba-s-coca")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_doctor_finds_this_machine_fit() -> None:
    done = vlmx("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torchvision" in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("vlmx extract --backbone vmamba-t", "vmamba-t-coco"),
        ("vlmx train --connector ml", "mlp3"),
        ("vlmx train --cache vi", "vit-mini-scenes@64x64-0123456789ab"),
        ("vlmx cache info vi", "vit-mini-scenes@64x64-0123456789ab"),
        ("vlmx eval --run fi", "first-run"),
    ],
)
def test_completion_knows_names(tmp_path: Path, words: str, expected: str) -> None:
    for file in ("caches/vit-mini-scenes@64x64-0123456789ab/manifest.jsonl", "runs/first-run/status.json"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    asked = {"_VLMX_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", "from vlmx.cli import cli; cli(prog_name='vlmx')"],
        env={**os.environ, **asked},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"plain,{expected}" in done.stdout.splitlines()


def test_completion_script_is_printed() -> None:
    assert "_VLMX_COMPLETE" in vlmx("completion", "bash").stdout


def test_the_exit_code_of_a_command_is_that_of_the_process(tmp_path: Path) -> None:
    done = vlmx("data", "check", "pope", "--data-root", str(tmp_path))
    assert done.returncode == 3
    assert "0 of 1 benchmarks are whole" in done.stdout
