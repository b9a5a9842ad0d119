"""Does `vlmx data check` tell whole benchmarks from others, and say what is missing and where it comes from?"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import FILES, IMAGES, REAL_DATA, make_data_root, real_pope_root, write_file
from click.testing import CliRunner, Result

from vlmx.data.check import check_benchmark
from vlmx.data.command import data
from vlmx.data.published_benchmarks import PUBLISHED_BENCHMARKS
from vlmx.errors import UnknownNameError


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(data, [str(arg) for arg in args])


def whole_pope(root: Path) -> Path:
    """POPE in its published size: 8,910 questions about 500 photos, which are empty files."""
    names = [f"COCO_val2014_{number:012d}.jpg" for number in range(500)]
    for split, count in (("random", 2_910), ("popular", 3_000), ("adversarial", 3_000)):
        rows = [
            {"question_id": n, "image": names[n % 500], "text": f"Is there a {split} in the image?", "label": "no"}
            for n in range(1, count + 1)
        ]
        write_file(root, f"pope/coco_pope_{split}.json", rows)
    (root / "coco/val2014").mkdir(parents=True)
    for name in names:
        (root / "coco/val2014" / name).touch()
    return root


def test_a_whole_benchmark_exits_with_zero(tmp_path: Path) -> None:
    result = run("check", "pope", "--data-root", whole_pope(tmp_path))
    assert result.exit_code == 0, result.output
    assert "whole, 8,910 questions (2,910 random, 3,000 popular, 3,000 adversarial) about 500 images" in result.output
    assert "1 of 1 benchmarks are whole" in result.output
    assert "problem" not in result.output


def test_photos_that_are_missing_are_counted_by_folder(tmp_path: Path) -> None:
    root = whole_pope(tmp_path)
    for number in (7, 8, 9, 10):
        (root / f"coco/val2014/COCO_val2014_{number:012d}.jpg").unlink()
    result = run("check", "pope", "--data-root", root)
    assert result.exit_code == 3
    assert f"4 of 500 photos in {root / 'coco/val2014'} are missing" in result.output
    assert "e.g. COCO_val2014_000000000007.jpg, COCO_val2014_000000000008.jpg, COCO_val2014_000000000009.jpg\n" in (
        result.output
    )
    assert run("check", "pope", "--data-root", root, "--no-images").exit_code == 0


def test_annotations_alone_are_enough_for_scoring(tmp_path: Path) -> None:
    root = whole_pope(tmp_path)
    for path in (root / "coco/val2014").iterdir():
        path.unlink()
    (root / "coco/val2014").rmdir()
    assert run("check", "pope", "--data-root", root, "--no-images").exit_code == 0
    result = run("check", "pope", "--data-root", root)
    assert result.exit_code == 3
    assert "missing  coco/val2014  [each photo under its own Flickr licence]" in result.output
    assert "8,910 questions" in result.output


def test_everything_missing_is_named_with_source_licence_and_state_of_its_host(tmp_path: Path) -> None:
    result = run("check", "--data-root", tmp_path)
    assert result.exit_code == 3
    for each in PUBLISHED_BENCHMARKS.values():
        assert f"{each.name:<12} {each.title}: not readable" in result.output
        for file in (*each.files, *each.data.images):
            assert f"missing  {file.path}  [{file.licence}]" in result.output
            assert f"from {file.url}\n" in result.output
    assert result.output.count("dead host; a copy: https://web.archive.org/web/") == 6  # two files of each of three
    assert "links to it change; a copy: https://drive.google.com/drive/folders/" in result.output
    assert "0 of 11 benchmarks are whole" in result.output


def test_other_counts_are_told_by_part(tmp_path: Path) -> None:
    root = make_data_root(tmp_path)
    report = check_benchmark("tallyqa", root)
    (problem,) = report.problems
    assert problem.what == (
        "other counts than the published ones: 3 questions (published: 38,589), 2 simple questions (published: 22,991),"
        " 1 complex questions (published: 15,598)"
    )
    assert not report.whole
    assert report.images is not None
    assert report.images.found == 2


def test_the_later_version_of_pope_is_told_from_the_papers(tmp_path: Path) -> None:
    root = real_pope_root(tmp_path)
    for path in (REAL_DATA / "pope").glob("*.json"):
        write_file(root, f"pope/{path.name}", [json.loads(line) for line in path.read_text().splitlines()])
    result = run("check", "pope", "--data-root", root)
    assert result.exit_code == 3
    assert "9,000 questions (published: 8,910), 3,000 random questions (published: 2,910)" in result.output
    assert "this version has 2,910 questions, later ones have 3,000" in result.output
    assert f"498 of 500 photos in {root / 'coco/val2014'} are missing" in result.output


def test_a_wrong_split_is_a_problem_with_what_why_and_fix(tmp_path: Path) -> None:
    root = make_data_root(tmp_path, images=False)
    rows: list[dict[str, Any]] = copy.deepcopy(FILES["vizwiz/val.json"])
    for row in rows:
        del row["answers"]
    write_file(root, "vizwiz/val.json", rows)
    result = run("check", "vizwiz", "--no-images", "--data-root", root)
    assert result.exit_code == 3
    assert f"problem  {root / 'vizwiz/val.json'} is the annotation file of the wrong split" in result.output
    assert "why      none of its 3 rows has 'answers': test splits come without" in result.output
    assert "fix      this benchmark is VizWiz val, val.json" in result.output


@pytest.mark.parametrize(
    ("box_xywh", "outside"),
    [([30.0, 10.0, 40.0, 20.0], True), ([10.0, 10.0, 0.0, 20.0], True), ([40.0, 10.0, 20.4, 20.0], False)],
)
def test_boxes_outside_of_their_image_are_named(tmp_path: Path, box_xywh: list[float], outside: bool) -> None:
    instances = copy.deepcopy(FILES["refcoco/instances.json"])
    instances["annotations"][3]["bbox"] = box_xywh  # of the only expression 6, in an image of 60 x 80
    root = make_data_root(tmp_path, images=False)
    write_file(root, "refcoco/instances.json", instances)
    texts = [problem.what for problem in check_benchmark("refcoco", root, images=False).problems]
    assert ("1 boxes are empty or outside of their image" in texts) == outside


def test_json_has_the_same(tmp_path: Path) -> None:
    root = make_data_root(tmp_path)
    (root / "refcoco/instances.json").unlink()
    result = run("check", "refcoco", "gqa", "mini-count", "--json", "--data-root", root)
    assert result.exit_code == 3
    content = json.loads(result.output)
    refcoco, gqa, mini = content["benchmarks"]
    assert not content["whole"]
    assert [file["path"] for file in refcoco["files"] if not file["there"]] == ["refcoco/instances.json"]
    assert refcoco["files"][1]["host"] == "dead"
    assert refcoco["questions"] is None
    assert gqa["questions"] == {"found": 3, "published": 12_578}
    assert gqa["images"] == {"found": 2, "published": 398}
    assert not gqa["whole"]
    assert mini["whole"]
    assert mini["files"] == []


def test_an_unknown_benchmark_is_an_error(tmp_path: Path) -> None:
    result = run("check", "popes", "--data-root", tmp_path)
    assert isinstance(result.exception, UnknownNameError)
    assert "did you mean 'pope'" in result.exception.fix


def test_a_benchmark_without_files_is_whole(tmp_path: Path) -> None:
    result = run("check", "mini-read", "--data-root", tmp_path)
    assert result.exit_code == 0
    assert "mini-read    mini study, mini-read: whole" in result.output


def test_show_prints_questions_as_they_are_asked(tmp_path: Path) -> None:
    root = make_data_root(tmp_path, images=False)
    result = run("show", "ocid-ref", "-n", "1", "--prompts", "paper", "--data-root", root)
    assert result.exit_code == 0, result.output
    assert 'the region this sentence describes: "The apple on the left."' in result.output
    assert "right: box 112, 130, 160, 180 (corners, pixels) in 640 x 480" in result.output
    shown = run("show", "pope", "-n", "2", "--data-root", root).output
    assert "asked for the probabilities of Yes, No\n    right: yes" in shown
    assert shown.count("right:") == 2
    assert "right: down (8x) | at table | skateboard" in run("show", "vqav2", "--data-root", root).output


def test_show_as_json_has_whole_questions(tmp_path: Path) -> None:
    root = make_data_root(tmp_path, images=False)
    lines = run("show", "refcoco", "-n", "2", "--json", "--data-root", root).output.splitlines()
    first, second = map(json.loads, lines)
    assert first["box"] == [6.0, 10.5, 24.0, 70.5]
    assert second["id"] == "4"
    assert second["image"] in IMAGES
