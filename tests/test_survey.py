"""Is it said before a training what its data are: whose images, which are missing, what is cut or cannot be learned?"""

import json
import subprocess
import sys

import pytest
from train_world import arguments, make_world

from vlmx.cache_specs.ids import ImageEntry, ImageTable, image_id
from vlmx.cli import main
from vlmx.errors import DataError
from vlmx.models.prompts import choose_prompt
from vlmx.runs import RunFolder
from vlmx.train import survey as survey_module
from vlmx.train.collate import build_collator
from vlmx.train.command import train as train_command
from vlmx.train.plan import make_plan
from vlmx.train.settings import TrainConfig
from vlmx.train.survey import Survey, require_learnable, survey

FOLDERS = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The small world, with an image table like that of the LLaVA-1.5 mixture beside its own."""
    root = make_world(tmp_path_factory.mktemp("world"))
    entries = [
        ImageEntry(key=f"{FOLDERS[n % 6]}/{n}.jpg", id=image_id(f"image {n}".encode()), width=64, height=64)
        for n in range(20)
    ]
    ImageTable.merge(root / "caches", "llava_v1_5_mix665k", entries)
    return root


def row(number, image, answer="yes"):
    turns = [{"from": "human", "value": "<image>\nis it?"}, {"from": "gpt", "value": answer}]
    return {"id": f"c{number}", **({"image": image} if image else {}), "conversations": turns}


def write(path, rows):
    path.write_text(json.dumps(rows))
    return ["--data", str(path)]


def mixture(missing=0):
    """Twenty conversations with images in the published folders, four without, and some whose image is not there."""
    rows = [row(n, f"{FOLDERS[n % 6]}/{n}.jpg") for n in range(20)]
    rows += [row(20 + n, None) for n in range(4)]
    return rows + [row(24 + n, f"{FOLDERS[n % 3]}/x{n}.jpg") for n in range(missing)]


def call(world, out, *extra):
    train_command([*arguments(world, out), *extra], standalone_mode=False)


def test_the_mixture_is_counted_by_source(world, tmp_path, capsys):
    data = write(tmp_path / "llava_v1_5_mix665k.json", mixture())
    call(world, tmp_path / "none", *data, "--dry-run")
    shown = capsys.readouterr()
    lines = [line.split()[:5] for line in shown.out.splitlines()]
    assert ["coco/train2017", "4", "364,100", "LLaVA-Instruct,", "VQA-v2,"] in lines
    assert ["text", "only", "4", "40,688", "ShareGPT"] in lines
    assert "24: 20 about 20 images, 4 text only" in shown.out
    assert "0 are cut, 0 have nothing to learn, of 24 looked at" in shown.out
    assert "not the whole published LLaVA-1.5 mixture: coco/train2017 4 of 364,100" in shown.err
    assert not (tmp_path / "none").exists()
    call(world, tmp_path / "run", *data)
    said = capsys.readouterr().err
    assert "  vg                           6 of  86,417  Visual Genome\n" in said
    assert "  text only                    4 of  40,688  ShareGPT\n" in said
    assert said.index("ShareGPT") < said.index("steps an epoch")
    assert RunFolder(tmp_path / "run").status["state"] == "done"  # text-only rows are trained on, too


def test_other_data_are_not_taken_for_the_mixture(world, tmp_path, capsys):
    call(world, tmp_path / "none", "--dry-run")
    shown = capsys.readouterr()
    assert "40: 32 about 16 images, 8 text only" in shown.out
    assert "LLaVA" not in shown.out + shown.err


def test_missing_images_are_counted_by_folder_with_the_command_that_makes_them(world, tmp_path, capsys):
    data = write(tmp_path / "llava_v1_5_mix665k.json", mixture(missing=7))
    with pytest.raises(SystemExit) as caught:
        main(["train", *arguments(world, tmp_path / "run"), *data])
    said = capsys.readouterr().err
    assert caught.value.code == 5
    assert "error  7 of 27 images of" in said
    assert (
        "why    3 in coco/train2017, 2 in gqa/images, 2 in ocr_vqa/images; the first are coco/train2017/x0.jpg" in said
    )
    assert f"--data {tmp_path}/llava_v1_5_mix665k.json --out {world}/caches adds them" in said
    assert not (tmp_path / "run").exists()


LONG = "a b c d " * 40


@pytest.mark.parametrize("only_look", [[], ["--dry-run"]])
def test_too_many_conversations_that_are_cut_or_teach_nothing(world, tmp_path, capsys, only_look):
    command = [*arguments(world, tmp_path / "run"), "max_text_tokens=8", *only_look]
    with pytest.raises(SystemExit) as caught:
        main(["train", *command])
    shown = capsys.readouterr()
    assert caught.value.code == 3
    assert "error  too many of 40 conversations looked at cannot be learned from" in shown.err
    assert "40 are cut, more than watch.max_cut = 0.1: c0, c1, c2, c3, c4, ...;" in shown.err
    assert "40 have nothing to learn, more than watch.max_unlearned = 0.01: c0," in shown.err
    assert "raise max_text_tokens (8)" in shown.err
    assert ("40 are cut, 40 have nothing to learn, of 40 looked at" in shown.out) == bool(only_look)
    assert not (tmp_path / "run").exists()


def test_a_few_are_shown_and_trained_on(world, tmp_path, capsys):
    rows = [row(n, f"{n % 20}.jpg", LONG if n < 3 else "yes") for n in range(40)]
    limits = ["images=photos", "max_text_tokens=60"]
    call(world, tmp_path / "run", *write(tmp_path / "few.json", rows), *limits)
    assert "warning: conversations: 3 are cut, 0 have nothing to learn, of 40 looked at" in capsys.readouterr().err
    status = RunFolder(tmp_path / "run").status
    assert (status["conversations_truncated"], status["conversations_without_learned_tokens"]) == (3, 0)
    with pytest.raises(DataError, match="too many of 40") as caught:
        call(world, tmp_path / "strict", *write(tmp_path / "few.json", rows), *limits, "watch.max_cut=0.07")
    assert caught.value.why == "3 are cut, more than watch.max_cut = 0.07: c0, c1, c2"


def test_what_is_allowed_is_trained_on(world, tmp_path):
    rows = [row(n, f"{n % 20}.jpg", "yes") for n in range(36)] + [row(36 + n, None, "yes") for n in range(4)]
    for one in rows[:4]:
        one["conversations"][0]["value"] = LONG  # the question alone is longer than what is read
    data = write(tmp_path / "silent.json", rows)
    limits = ["images=photos", "max_text_tokens=60"]
    with pytest.raises(DataError, match="too many of 40") as caught:
        call(world, tmp_path / "run", *data, *limits)
    assert caught.value.why == "4 have nothing to learn, more than watch.max_unlearned = 0.01: c0, c1, c2, c3"
    assert caught.value.fix.endswith("or accept it with watch.max_unlearned=1")
    call(world, tmp_path / "run", *data, *limits, "watch.max_unlearned=1")
    assert RunFolder(tmp_path / "run").status["conversations_without_learned_tokens"] == 4


@pytest.mark.slow
def test_of_several_processes_the_first_one_says_what_is_wrong(world, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vlmx"]
    command += ["train", *arguments(world, tmp_path / "run"), "max_text_tokens=8"]
    done = subprocess.run(command, check=False, timeout=300, capture_output=True, text=True)
    assert done.stderr.count("error (process 0): too many of 40 conversations looked at") == 1
    assert done.stderr.count("fix: raise max_text_tokens (8)") == 1
    assert "exitcode  : 3 " in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_is_looked_at_is_spread_over_the_data(world, monkeypatch):
    monkeypatch.setattr(survey_module, "LOOKED_AT", 10)
    config = TrainConfig(cache="vit-mini", data=str(world / "photos.json"), llm=str(world / "llm"), max_text_tokens=8)
    plan = make_plan(config, caches=world / "caches", world_size=1)
    llm, tokenizer = survey_module.llm_without_weights(config.llm)
    found = survey(plan, build_collator(plan, choose_prompt("plain", tokenizer), llm.config))
    assert found.looked_at == 10
    assert found.cut == tuple(f"c{n}" for n in range(0, 40, 4))


def test_a_share_that_is_just_allowed():
    config = TrainConfig(cache="c")
    require_learnable(Survey(looked_at=100, cut=("a",) * 10, unlearned=("a",)), config)
    with pytest.raises(DataError, match="too many of 100"):
        require_learnable(Survey(looked_at=100, cut=("a",) * 11, unlearned=()), config)
    with pytest.raises(DataError, match="too many of 100") as caught:
        require_learnable(Survey(looked_at=100, cut=(), unlearned=("a", "b")), config)
    assert caught.value.fix.startswith("see whether their answers are empty")
