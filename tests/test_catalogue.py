"""Does the catalogue say the same in all its columns, read without torch, and take rows of other packages?"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from vlmx.errors import UnknownNameError
from vlmx.extract.backbones.catalogue import row, rows

VIT = [f"vit-{s}-{w}" for w, sizes in {"in21k": "tsbl", "in21k-in1k": "tsbl", "in1k": "sb"}.items() for s in sizes]
VMAMBA = [f"vmamba-{size}-{weights}" for size in "tsb" for weights in ("in1k", "coco", "ade20k")]
MINI = [f"{family}-mini-scenes" for family in ("vit", "maxvit", "mambavision", "vmamba")]


def test_the_promised_backbones_exist() -> None:
    assert set(VIT + VMAMBA + MINI) <= {r.name for r in rows()}


def test_columns_agree() -> None:
    for r in rows():
        assert r == row(r.name)
        assert r.name.startswith(f"{r.family}-")
        assert importlib.util.find_spec(r.builder.partition(":")[0]) is not None, r.name
        assert bool(r.url) != bool(r.packaged), f"{r.name} is either published somewhere or shipped"
        assert all(0 < s < 1 for s in (*r.mean, *r.std))
        if r.family == "vmamba":
            assert r.url.endswith(f"/{r.file}") or r.packaged.endswith(f"/{r.file}")
            assert r.dim == r.arch["dims"][r.arch["tap"]]
            assert r.stride == 2 ** (r.arch["tap"] + 2)


def test_published_vmamba_files() -> None:
    releases = "https://github.com/MzeroMiko/VMamba/releases/download/"
    assert row("vmamba-t-in1k").url == f"{releases}%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth"
    assert row("vmamba-b-coco").url == f"{releases}%23v2det/mask_rcnn_vssm_fpn_coco_base_epoch_11.pth"
    assert row("vmamba-t-ade20k").file == "upernet_vssm_4xb4-160k_ade20k-512x512_tiny_s_iter_160000.pth"
    assert [row(f"vmamba-{s}-in1k").arch["depths"] for s in "tsb"] == [(2, 2, 8, 2), (2, 2, 15, 2), (2, 2, 15, 2)]


def test_native_sizes_give_the_token_counts_of_the_paper() -> None:
    def tokens(name: str) -> int:
        r = row(name)
        return (r.native_res[0] // r.stride) * (r.native_res[1] // r.stride)

    counts = {name: tokens(name) for name in ("vmamba-s-in1k", "vmamba-s-ade20k", "vmamba-s-coco", "vit-b-in1k", *MINI)}
    assert counts == {
        "vmamba-s-in1k": 196,
        "vmamba-s-ade20k": 1024,
        "vmamba-s-coco": 4150,
        "vit-b-in1k": 196,
        **dict.fromkeys(MINI, 64),
    }


def test_a_near_miss_is_named() -> None:
    with pytest.raises(UnknownNameError, match=r"vmamba-s-coco.*vlmx list backbones"):
        row("vmamba-s-cocoa")


def run(code: str, *, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    add = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    return subprocess.run([sys.executable, "-c", add + code], capture_output=True, text=True)


def test_reading_the_catalogue_imports_nothing_heavy() -> None:
    done = run(
        "import sys\n"
        "from vlmx.extract.backbones.catalogue import rows\n"
        "print(len(rows()) > 20, [m for m in ('torch', 'timm', 'numpy', 'transformers') if m in sys.modules])"
    )
    assert done.stdout.split(maxsplit=1) == ["True", "[]\n"], done.stderr


def test_another_package_adds_a_row(tmp_path: Path) -> None:
    info = tmp_path / "their_nets-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-nets\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[vlmx.backbones]\nvmamba-t-theirs = their_nets:ROW\nbroken-one = their_nets:NOT_A_ROW\n"
    )
    (tmp_path / "their_nets.py").write_text(
        "from dataclasses import replace\n"
        "from vlmx.extract.backbones.catalogue import row\n"
        "ROW = replace(row('vmamba-t-in1k'), name='vmamba-t-theirs', file='theirs.pth')\n"
        "NOT_A_ROW = 3\n"
    )
    done = run(
        "from vlmx.errors import UsageError\n"
        "from vlmx.extract.backbones.catalogue import row\n"
        "print(row('vmamba-t-theirs').file)\n"
        "try:\n    row('broken-one')\n"
        "except UsageError as error:\n    print(error)\n",
        path=tmp_path,
    )
    first, second = done.stdout.splitlines()
    assert first == "theirs.pth", done.stderr
    assert "'broken-one' is a int, not a BackboneRow" in second
