"""Are answers kept through crashes, subsets and reruns, and does the control show every question another image?"""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from vlmx.data.mini import study
from vlmx.data.records import Question
from vlmx.errors import DataError, RunError
from vlmx.evaluate.answers import Answer, AnswerFile, Header, answered_benchmarks, answers_path, read_answers
from vlmx.evaluate.predict import predict_benchmark, shuffled_images, subset, table_name
from vlmx.runs import RunFolder

QUESTIONS = study.questions("mini-read")[:30]


def header(**fields: object) -> Header:
    values: dict[str, object] = {
        "benchmark": "mini-read",
        "control": "none",
        "questions": len(QUESTIONS),
        "limit": None,
        "model": "m1",
        "cache": "c",
        "fingerprint": "f",
        "encoder_weights": "ab" * 32,
        "geometry": {"mode": "letterbox", "height": 64, "width": 64, "fill": [0, 0, 0], "resampling": "bicubic"},
        "prompt_format": "plain",
    }
    return Header(**{**values, **fields})  # type: ignore[arg-type]


class Echo:
    """Answers each prompt with the image that it was shown, and counts."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompts: Sequence[str], images: Sequence[str]) -> list[str]:
        self.asked += images
        return list(images)


def test_a_subset_is_fixed_nested_and_in_order() -> None:
    small, large = subset(QUESTIONS, 5), subset(QUESTIONS, 12)
    assert (len(small), len(large)) == (5, 12)
    assert {q.id for q in small} < {q.id for q in large}
    assert small == [q for q in QUESTIONS if q in small]
    assert subset(QUESTIONS, None) == subset(QUESTIONS, 999) == QUESTIONS
    assert small != QUESTIONS[:5]


def test_the_control_moves_every_image() -> None:
    other = shuffled_images(QUESTIONS)
    assert all(image != shown for image, shown in other.items())
    assert sorted(other.values()) == sorted(other) == sorted({q.image for q in QUESTIONS})
    assert other == shuffled_images(QUESTIONS[::-1])
    with pytest.raises(DataError, match="1 image"):
        shuffled_images(QUESTIONS[:1])


def test_answers_are_kept_and_a_rerun_asks_nothing(tmp_path: Path) -> None:
    path, echo = tmp_path / "answers.jsonl", Echo()
    assert predict_benchmark(path, header(limit=10), QUESTIONS, echo, batch_size=4) == 10
    assert predict_benchmark(path, header(), QUESTIONS, echo, batch_size=4) == 20
    assert predict_benchmark(path, header(), QUESTIONS, echo, batch_size=7) == 0
    assert sorted(echo.asked) == sorted(q.image for q in QUESTIONS)
    stored, answers = read_answers(path)
    assert stored == header()
    assert {(a.id, a.prompt, a.text) for a in answers} == {(q.id, q.prompt, q.image) for q in QUESTIONS}


def test_the_control_is_recorded_with_the_image_that_was_shown(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    predict_benchmark(path, header(control="shuffled", limit=8), QUESTIONS, Echo())
    stored, answers = read_answers(path)
    other, image_of = shuffled_images(QUESTIONS), {q.id: q.image for q in QUESTIONS}
    assert stored.control == "shuffled"
    assert [a.text for a in answers] == [a.image for a in answers] == [other[image_of[a.id]] for a in answers]


def test_a_torn_last_line_is_dropped_and_asked_again(tmp_path: Path) -> None:
    path, echo = tmp_path / "answers.jsonl", Echo()
    predict_benchmark(path, header(), QUESTIONS, echo)
    whole = path.read_bytes()
    path.write_bytes(whole[:-17])
    assert len(read_answers(path)[1]) == len(QUESTIONS) - 1
    assert predict_benchmark(path, header(), QUESTIONS, echo) == 1
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())
    path.write_bytes(whole[:20])  # torn within the header
    assert predict_benchmark(path, header(), QUESTIONS, echo) == len(QUESTIONS)
    assert path.read_bytes() == whole


def test_damage_elsewhere_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with pytest.raises(RunError, match="no answers at"):
        read_answers(path)
    predict_benchmark(path, header(), QUESTIONS, Echo())
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-9], *lines[2:]]) + "\n")
    with pytest.raises(RunError, match=r"damaged.*line 2 is not JSON"):
        predict_benchmark(path, header(), QUESTIONS, Echo())


@pytest.mark.parametrize("changed", [{"model": "m2"}, {"fingerprint": "g"}, {"questions": 31}])
def test_answers_of_another_model_are_replaced_and_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, object]
) -> None:
    path = tmp_path / "answers.jsonl"
    predict_benchmark(path, header(), QUESTIONS, Echo())
    predict_benchmark(path, header(**changed, limit=3), QUESTIONS, Echo())
    assert len(read_answers(path)[1]) == 3
    assert "30 answers of another model" in capsys.readouterr().err


def test_where_answers_lie(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", kind="train", config={})
    for control in ("none", "shuffled"):
        path = answers_path(run, "mini-read", control)
        AnswerFile(path, header(control=control)).append([Answer(id="q", image="i", prompt="p", text="t")])
        assert answered_benchmarks(run, control) == ["mini-read"]
    assert json.loads((tmp_path / "run/eval-shuffled/mini-read/answers.jsonl").read_text().splitlines()[1]) == {
        "id": "q",
        "image": "i",
        "prompt": "p",
        "text": "t",
    }


def test_which_image_table_a_benchmark_uses() -> None:
    assert table_name("mini-count") == "mini"


def test_questions_are_asked_in_an_order_that_groups_lengths(tmp_path: Path) -> None:
    shown: list[list[int]] = []

    def answer(prompts: Sequence[str], images: Sequence[str]) -> list[str]:
        shown.append([len(prompt) for prompt in prompts])
        return ["" for _ in prompts]

    questions: list[Question] = study.questions("mini-attribute")[:40]
    predict_benchmark(tmp_path / "a.jsonl", header(questions=40), questions, answer, batch_size=16)
    flat = [length for batch in shown for length in batch]
    assert [len(batch) for batch in shown] == [16, 16, 8]
    assert flat == sorted(flat)
