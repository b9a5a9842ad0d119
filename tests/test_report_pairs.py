"""Does a report hold runs against each other on the same questions alone, and say which these are?"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import changed_root, make_data_root
from click.testing import CliRunner

from vlmx.cache_specs.geometry import Geometry
from vlmx.data.benchmarks import load_benchmark
from vlmx.data.records import Question
from vlmx.errors import RunError
from vlmx.evaluate.answers import Answer, Header, answers_path, write_answers
from vlmx.evaluate.compare_command import compare
from vlmx.evaluate.groups import questions_sha256
from vlmx.evaluate.report.collect import Report, collect
from vlmx.evaluate.report.html import render
from vlmx.evaluate.report.samples import choose_samples, said
from vlmx.runs import RunFolder

GEOMETRY = Geometry(mode="letterbox", height=64, width=64, fill=(0, 0, 0))


def make_run(folder: Path, data: Path, benchmarks: tuple[str, ...], answer: Callable[[Question], str]) -> RunFolder:
    """A run whose answers know their questions by digest, as those of `vlmx eval` do."""
    run = RunFolder.create(folder, kind="train", config={})
    for name in benchmarks:
        questions = load_benchmark(name, root=data)
        header = Header(
            benchmark=name,
            control="none",
            questions=len(questions),
            limit=None,
            model="cd" * 32,
            cache="enc@64x64-0123456789ab",
            fingerprint="ef" * 32,
            encoder_weights="ab" * 32,
            geometry=GEOMETRY.to_dict(),
            prompt_format="plain",
            data_root=str(data),
            questions_sha256=questions_sha256(questions),
        )
        answers = [Answer(id=q.id, image=q.image, prompt=q.prompt, text=answer(q)) for q in questions]
        write_answers(answers_path(run, name, "none"), header, answers)
    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_root(tmp_path_factory.mktemp("data"))


def without_first_line(rows: list[dict[str, Any]]) -> None:
    """As versions of POPE's files differ: one line fewer, and all others have another number."""
    del rows[0]
    for number, row in enumerate(rows, start=1):
        row["question_id"] = number


@pytest.fixture(scope="module")
def renumbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """POPE with another random split; its 8 questions of the other splits are the same."""
    return changed_root(tmp_path_factory.mktemp("other"), "pope/coco_pope_random.json", without_first_line)


def reported(*runs: RunFolder, tmp_path: Path) -> Report:
    return collect(runs, caches=tmp_path)


def test_only_questions_that_are_the_same_are_held_against_each_other(
    tmp_path: Path, data: Path, renumbered: Path
) -> None:
    first = make_run(tmp_path / "first", data, ("pope",), lambda q: q.answers[0])
    second = make_run(tmp_path / "second", renumbered, ("pope",), lambda q: q.answers[0])
    found = reported(first, second, tmp_path=tmp_path)
    (ranking,) = found.rankings
    assert ranking.basis == "both runs answered 8 questions of pope; 3 left out: same id, another question"
    assert [(step.n, step.points) for step in ranking.steps] == [(8, 0)]
    assert (found.pairs[0]["VQA"].n, found.pairs[0]["VQA"].unlike) == (8, 3)
    for sample in choose_samples(found):
        assert not sample.asked.id.startswith("random/")
    shown = CliRunner().invoke(compare, [str(first.path), str(second.path)], catch_exceptions=False)
    assert "pope: left out are 3 questions with the same id, but not the same image" in shown.stderr
    assert shown.stderr.count("left out are") == 1  # of the benchmark, and not of each average again


def test_a_group_without_a_common_question_is_said(tmp_path: Path, data: Path) -> None:
    runs = [
        make_run(tmp_path / name, data, (name, "refcoco"), lambda q: "[0.1, 0.1, 0.9, 0.9]")
        for name in ("vqav2", "gqa")
    ]
    found = reported(*runs, tmp_path=tmp_path)
    assert {ranking.group: (len(ranking.steps), ranking.basis) for ranking in found.rankings} == {
        "VQA": (0, "both runs answered no question in common"),
        "boxes": (1, "both runs answered 3 questions of refcoco"),
    }
    assert list(found.pairs[0]) == ["boxes"]
    assert {sample.benchmark for sample in choose_samples(found)} == {"vqav2", "gqa", "refcoco"}


def test_one_pair_without_a_common_question_does_not_hide_the_others(tmp_path: Path, data: Path) -> None:
    def swapped(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["text"] += " Really?"

    other = tmp_path / "elsewhere"
    for split in ("random", "popular", "adversarial"):
        changed_root(tmp_path / split, f"pope/coco_pope_{split}.json", swapped)
        target = other / f"pope/coco_pope_{split}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((tmp_path / split / f"pope/coco_pope_{split}.json").read_bytes())
    a, b = (make_run(tmp_path / name, data, ("pope",), lambda q: "yes") for name in "ab")
    c = make_run(tmp_path / "c", other, ("pope",), lambda q: "yes")
    shown = CliRunner().invoke(compare, [str(run.path) for run in (a, b, c)], catch_exceptions=False)
    assert "a beside b" in shown.output
    assert "'a' and 'c' have answered no question in common: 12 questions with the same id" in shown.stderr
    found = reported(a, c, tmp_path=tmp_path)
    assert choose_samples(found) == []
    assert "None of POPE: its runs have answered no question in common." in render(found)


def test_boxes_are_told_in_the_frame_of_the_truth(tmp_path: Path, data: Path) -> None:
    """The photo is 60 x 80: in the square input it lies between 0.125 and 0.875 of the width."""
    run = make_run(tmp_path / "run", data, ("refcoco",), lambda q: "[0.20, 0.13, 0.43, 0.88]")
    found = reported(run, tmp_path=tmp_path)
    samples = {sample.asked.id: sample for sample in choose_samples(found)}
    left = next(sample for sample in samples.values() if sample.asked.box == (6.0, 10.5, 24.0, 70.5))
    assert left.truth == "[0.10, 0.13, 0.40, 0.88]"
    assert said(left.grades["run"]) == "[0.10, 0.13, 0.41, 0.88], written [0.20, 0.13, 0.43, 0.88]"
    raw = collect([run], caches=tmp_path, box_rule="paper")
    assert said(choose_samples(raw)[0].grades["run"]) == "[0.20, 0.13, 0.43, 0.88]"


def test_no_control_character_of_an_answer_gets_into_the_page(tmp_path: Path, data: Path) -> None:
    run = make_run(tmp_path / "run", data, ("vqav2",), lambda q: "a\x00b\x1b[31mc\ud800d\u0301 \N{ZERO WIDTH JOINER}")
    page = render(reported(run, tmp_path=tmp_path))
    assert "<bdi>a\\x00b\\x1b[31mc\\ud800d\u0301 \N{ZERO WIDTH JOINER}</bdi>" in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", page)


def test_a_damaged_photo_is_noted_once_and_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data_root(tmp_path / "data")
    for key in {question.image for question in load_benchmark("refcoco", root=data)}:
        (data / key).write_bytes(b"no image at all")
    run = make_run(tmp_path / "run", data, ("refcoco", "refcoco+"), lambda q: "[0.20, 0.13, 0.43, 0.88]")
    assert len(choose_samples(reported(run, tmp_path=tmp_path))) > 2
    noted = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cannot read")]
    assert len(noted) == 1
    assert noted[0].endswith(".jpg: cannot identify image file; the page goes without this photo")


def test_answers_to_questions_of_other_files_are_refused(tmp_path: Path, data: Path, renumbered: Path) -> None:
    run = make_run(tmp_path / "run", data, ("pope",), lambda q: "yes")
    path = answers_path(run, "pope", "none")
    path.write_text(re.sub(r'"questions_sha256": "\w+"', '"questions_sha256": ""', path.read_text(), count=1))
    assert len(collect([run], caches=tmp_path).runs[0].grades["pope"]) == 12
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"random/4"' not in line))  # an id that is not there
    with pytest.raises(RunError, match="3 answers to 'pope' were given to other questions"):
        collect([run], caches=tmp_path, data_root=renumbered)
