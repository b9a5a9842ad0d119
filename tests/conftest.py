"""One OpenMP thread and no hub for every test and every process that a test starts."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest

import vlmx  # noqa: F401  makes torchvision, and so timm, importable on CPU torch

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with reference data beside the checkout; tests that need it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("reference data is not beside this checkout")
    return SHARED
