"""Are weights found in the promised order, and does the error name file, address, folder and why nothing came?"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vlmx.errors import WeightsError
from vlmx.extract import weights
from vlmx.extract.backbones.catalogue import BackboneRow, row, rows
from vlmx.extract.weights.lookup import HubFile, cache_folder, hub_file, in_hub_cache

VMAMBA_T = row("vmamba-t-in1k")


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMX_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in ("weights", "cache/vlmx/weights"):
        (tmp_path / folder).mkdir(parents=True)


def row_with(**changes: str) -> BackboneRow:
    return replace(VMAMBA_T, **changes)


def test_lookup_order(tmp_path: Path) -> None:
    mini = row_with(packaged="registry.py")  # any file of the package
    in_cache = tmp_path / "cache/vlmx/weights" / mini.file
    in_cache.touch()
    assert weights.find(VMAMBA_T) == in_cache
    assert weights.find(mini).name == "registry.py"
    hub_folder = tmp_path / "weights" / mini.name
    hub_folder.mkdir()
    assert weights.find(mini) == hub_folder
    converted = tmp_path / "weights" / f"{mini.name}.safetensors"
    converted.touch()
    assert weights.find(mini) == converted
    published = tmp_path / "weights" / mini.file
    published.touch()
    assert weights.find(mini) == published
    given = tmp_path / "mine.pth"
    given.touch()
    assert weights.find(mini, given) == given
    assert weights.find(mini, str(given)) == given
    assert weights.find(mini, tmp_path) == tmp_path  # a folder of the hub; reading it says if it is none


def test_without_a_named_folder_the_cache_folder_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLMX_WEIGHTS")
    assert cache_folder() == tmp_path / "cache/vlmx/weights"
    (cache_folder() / f"{VMAMBA_T.name}.safetensors").touch()
    assert weights.find(VMAMBA_T) == cache_folder() / f"{VMAMBA_T.name}.safetensors"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/vlmx/weights"


def test_missing_weights_name_file_source_folder_and_why_no_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WeightsError) as caught:
        weights.find(VMAMBA_T)
    expected = (
        VMAMBA_T.file,
        VMAMBA_T.url,
        str(tmp_path / "weights"),
        "offline mode (HF_HUB_OFFLINE is set)",
        "--weights",
    )
    assert all(part in str(caught.value) for part in expected)
    with pytest.raises(WeightsError, match=r"no download: it is not published; put '.*' in .*/weights"):
        weights.find(row_with(url=""))
    with pytest.raises(WeightsError, match=r"no weights file .*absent\.pth"):
        weights.find(VMAMBA_T, tmp_path / "absent.pth")
    monkeypatch.delenv("VLMX_WEIGHTS")
    with pytest.raises(WeightsError, match=r"VLMX_WEIGHTS \(not set\) or .*/cache/vlmx/weights"):
        weights.find(VMAMBA_T)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "yes")
    with pytest.raises(WeightsError, match="TRANSFORMERS_OFFLINE is set"):
        weights.find(VMAMBA_T)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE")
    with pytest.raises(WeightsError, match=r"ftp://x/w\.pth is no address"):
        weights.find(row_with(url="ftp://x/w.pth"))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "https://huggingface.co/timm/vit.x/resolve/main/model.safetensors",
            HubFile(repo="timm/vit.x", revision="main", file="model.safetensors"),
        ),
        (
            "https://huggingface.co/o/m/resolve/3f2a/sub/w.pth?download=true",
            HubFile(repo="o/m", revision="3f2a", file="sub/w.pth"),
        ),
        ("https://huggingface.co/gpt2/resolve/main/m.bin", HubFile(repo="gpt2", revision="main", file="m.bin")),
        ("https://github.com/o/m/releases/download/v1/w.pth", None),
        ("https://example.org/huggingface.co/o/m/resolve/main/w", None),
        ("", None),
    ],
)
def test_addresses_on_the_hub(url: str, expected: HubFile | None) -> None:
    assert hub_file(url) == expected


def test_every_hub_address_of_the_catalogue_is_understood() -> None:
    on_hub = [r for r in rows() if "huggingface.co" in r.url]
    assert on_hub
    assert [r.name for r in on_hub if hub_file(r.url) is None] == []


def test_the_cache_of_the_hub_is_searched(tmp_path: Path) -> None:
    url = "https://huggingface.co/org/name/resolve/main/sub/w.safetensors"
    repo = tmp_path / "hub/models--org--name"
    snapshot = repo / "snapshots/0123456789abcdef0123456789abcdef01234567/sub"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(snapshot.parent.name)
    snapshot.mkdir(parents=True)
    # huggingface_hub reads the place of its cache when it is imported.
    code = f"from vlmx.extract.weights.lookup import in_hub_cache; print(in_hub_cache({url!r}))"

    def found() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub")},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    assert found() == "None"
    (snapshot / "w.safetensors").touch()
    assert found() == str(snapshot / "w.safetensors")
    assert in_hub_cache("https://example.org/w.pth") is None
