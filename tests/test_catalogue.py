"""Does the catalogue say the same in all its columns, read without torch, and take rows of other packages?"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from vlmx.errors import UnknownNameError
from vlmx.extract.backbones.catalogue import row, rows

NAMES = """
vmamba-{t,s,b}-{in1k,coco,ade20k} vim-{t,t-ft,s,s-ft,b}-in1k
mambavision-{t,t2,s,b,l,l2}-in1k mambavision-{b,l}-in21k mambavision-l2-in21k-512 mambavision-l3-in21k-{256,512}
vit-{t,s,b,l}-in21k vit-{t,s,b,l}-in21k-in1k vit-{s,b}-in1k
maxvit-{t,s,b,l}-in1k-{224,384,512} maxvit-{b,l,xl}-in21k-224 maxvit-{b,l,xl}-in21k-in1k-{384,512}
clip-b clip-l clip-l-336 siglip-b16-{224,256,384} siglip-so400m-{224,384} dinov2-l vitdet-{b,l,h}-coco
adapter-{deit-s,deit-b,augreg-t,augreg-b,augreg-l,uniperceiver-l}-ade20k
adapter-{beit-l-640,beit-l-640-m2f,beit-l-896,beitv2-l-896}-ade20k
{vit,maxvit,mambavision,vmamba}-mini-scenes
"""


def expanded(pattern: str) -> list[str]:
    """Shell braces: "a-{b,c}" -> a-b, a-c."""
    before, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    choices, _, after = rest.partition("}")
    return [name for choice in choices.split(",") for name in expanded(before + choice + after)]


def test_exactly_the_promised_backbones_exist() -> None:
    promised = [name for pattern in NAMES.split() for name in expanded(pattern)]
    assert len(promised) == len(set(promised)) == 82
    assert {r.name for r in rows()} == set(promised)


def test_columns_agree() -> None:
    for r in rows():
        assert r == row(r.name)
        assert r.name.startswith(f"{r.family}-")
        assert importlib.util.find_spec(r.builder.partition(":")[0]) is not None, r.name
        assert bool(r.url) != bool(r.packaged), f"{r.name} is either published somewhere or shipped"
        assert all(0 < s < 1 for s in (*r.mean, *r.std))
        assert r.licence
        assert bool(r.published_size) == bool(r.url)
        if not r.url.endswith("/model.safetensors"):  # a name that says nothing outside its repository
            assert r.url.endswith(f"/{r.file}") or r.packaged.endswith(f"/{r.file}")
        r.check_size(r.native_res)
        assert 0.9 <= r.crop_pct <= 1
    assert len({r.file for r in rows()}) == len(rows())


def test_published_files() -> None:
    vmamba = "https://github.com/MzeroMiko/VMamba/releases/download/"
    assert row("vmamba-t-in1k").url == f"{vmamba}%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth"
    assert row("vmamba-b-coco").url == f"{vmamba}%23v2det/mask_rcnn_vssm_fpn_coco_base_epoch_11.pth"
    assert row("vmamba-t-ade20k").file == "upernet_vssm_4xb4-160k_ade20k-512x512_tiny_s_iter_160000.pth"
    assert [row(f"vmamba-{s}-in1k").arch["depths"] for s in "tsb"] == [(2, 2, 8, 2), (2, 2, 15, 2), (2, 2, 15, 2)]
    hub = "https://huggingface.co/"
    assert row("vim-s-ft-in1k").url == f"{hub}hustvl/Vim-small-midclstok/resolve/main/vim_s_midclstok_ft_81p6acc.pth"
    l2 = "nvidia/MambaVision-L2-512-21K/resolve/main/mambavision_L2_21k_240m_512.pth.tar"
    assert row("mambavision-l2-in21k-512").url == f"{hub}{l2}"
    clip = "timm/vit_large_patch14_clip_336.openai/resolve/main/model.safetensors"
    assert row("clip-l-336").url == f"{hub}{clip}"
    assert row("siglip-b16-256").file == "vit_base_patch16_siglip_256.webli.safetensors"
    assert row("vitdet-h-coco").url == (
        "https://dl.fbaipublicfiles.com/detectron2/ViTDet/COCO/mask_rcnn_vitdet_h/f329145471/model_final_7224f1.pkl"
    )
    assert row("adapter-beitv2-l-896-ade20k").url == (
        "https://github.com/czczup/ViT-Adapter/releases/download/"
        "v0.3.1/mask2former_beitv2_adapter_large_896_80k_ade20k.zip"
    )


def test_normalisation_and_crops_differ_within_a_family() -> None:
    half, imagenet = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)
    assert {name: row(name).mean for name in ("maxvit-t-in1k-224", "maxvit-t-in1k-384", "maxvit-b-in21k-224")} == {
        "maxvit-t-in1k-224": imagenet,
        "maxvit-t-in1k-384": half,
        "maxvit-b-in21k-224": half,
    }
    assert row("adapter-augreg-t-ade20k").mean == imagenet  # the only AugReg trunk with ImageNet's
    assert row("adapter-augreg-b-ade20k").mean == row("adapter-augreg-l-ade20k").mean == half
    assert {r.name: r.crop_pct for r in rows() if r.crop_pct != 1} == {
        "clip-b": 0.9,
        **{f"vit-{size}-in21k": 0.9 for size in "tsbl"},
        **{f"maxvit-{size}-in21k-224": 0.95 for size in ("b", "l", "xl")},
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
