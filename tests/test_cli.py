"""The command as users type it: help, errors with what, why and fix, exit codes, nothing heavy before it is needed."""

import subprocess
import sys

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


def test_completion_knows_backbones() -> None:
    import os

    env = {
        **os.environ,
        "_VLMX_COMPLETE": "bash_complete",
        "COMP_WORDS": "vlmx extract --backbone vmamba-t",
        "COMP_CWORD": "3",
    }
    done = subprocess.run(
        [sys.executable, "-c", "from vlmx.cli import cli; cli(prog_name='vlmx')"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "vmamba-t-coco" in done.stdout


def test_completion_script_is_printed() -> None:
    assert "_VLMX_COMPLETE" in vlmx("completion", "bash").stdout
