"""Are answers kept through crashes, subsets and reruns, and does the control show every question another image?"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from vlmx.data.mini import study
from vlmx.data.records import Question
from vlmx.errors import DataError, RunError
from vlmx.evaluate.answers import PARTS, Answer, AnswerFile, Header, answered_benchmarks, answers_path, read_answers
from vlmx.evaluate.groups import Group, default_batch_size, groups_of, questions_sha256, shuffled_images, subset
from vlmx.evaluate.many import Worker
from vlmx.evaluate.predict import answer_benchmark, plan_benchmark, table_name
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
        "batch_size": 4,
    }
    return Header(**{**values, **fields})  # type: ignore[arg-type]


class Echo:
    """Answers each question with the image that it was shown, and counts; a power cut comes after so many groups."""

    def __init__(self, *, groups: int | None = None) -> None:
        self.asked: list[str] = []
        self.groups = groups

    def __call__(self, groups: Sequence[Group]) -> Iterator[list[Answer]]:
        for number, group in enumerate(groups):
            if number == self.groups:
                raise KeyboardInterrupt
            self.asked += [question.id for question in group.questions]
            yield [
                Answer(id=q.id, image=image, prompt=q.prompt, text=image)
                for q, image in zip(group.questions, group.images, strict=True)
            ]


def ask(
    path: Path, asked_with: Header, echo: Echo, questions: Sequence[Question] = QUESTIONS, worker: Worker | None = None
) -> bool:
    part = plan_benchmark(path, asked_with, questions, worker)
    try:
        return answer_benchmark(part, echo, control=asked_with.control)
    except KeyboardInterrupt:
        return False
    finally:
        part.work.close()


def test_a_subset_is_fixed_nested_and_in_order() -> None:
    small, large = subset(QUESTIONS, 5), subset(QUESTIONS, 12)
    assert (len(small), len(large)) == (5, 12)
    assert {q.id for q in small} < {q.id for q in large}
    assert small == [q for q in QUESTIONS if q in small]
    assert subset(QUESTIONS, None) == subset(QUESTIONS, 999) == QUESTIONS
    assert small != QUESTIONS[:5]


def many(benchmark: str, kinds: Sequence[str]) -> list[Question]:
    return [
        Question(
            id=f"{n}",
            benchmark=benchmark,
            image=f"{n % 7}",
            prompt="?",
            kind="text",
            question_type=kind,
            answers=("a",),
        )
        for n, kind in enumerate(kinds)
    ]


def test_slim_is_1024_of_each_part() -> None:
    kinds = ["random"] * 1500 + ["popular"] * 1100 + ["adversarial"] * 900
    pope = subset(many("pope", kinds), None, slim=True)
    assert Counter(q.question_type for q in pope) == {"random": 1024, "popular": 1024, "adversarial": 900}
    numbers = [int(q.id) for q in pope]
    assert numbers == sorted(set(numbers))  # in the benchmark's order
    assert len(subset(many("vqav2", kinds), None, slim=True)) == 1024  # its question types are no parts


def test_the_control_moves_every_image() -> None:
    other = shuffled_images(QUESTIONS)
    assert all(image != shown for image, shown in other.items())
    assert sorted(other.values()) == sorted(other) == sorted({q.image for q in QUESTIONS})
    assert other == shuffled_images(QUESTIONS[::-1])
    with pytest.raises(DataError, match="1 image"):
        shuffled_images(QUESTIONS[:1])


def test_groups_keep_images_together_and_lengths_apart() -> None:
    questions = study.questions("mini-attribute")[:80]
    groups = groups_of(questions, 16)
    assert sorted(q.id for group in groups for q in group.questions) == sorted(q.id for q in questions)
    assert max(len(group.questions) for group in groups) == 16
    assert [group.number for group in groups] == list(range(len(groups)))
    homes = Counter(image for group in groups for image in set(group.images))
    per_image = Counter(q.image for q in questions)
    assert all(homes[image] == 1 for image in per_image if per_image[image] <= 16)
    longest = [max(len(q.prompt) for q in group.questions) for group in groups]
    assert longest == sorted(longest)
    assert groups == groups_of(questions, 16)
    assert all(len(group.questions) == 1 for group in groups_of(questions, 1))


def test_an_image_with_many_questions_is_divided() -> None:
    one = many("vqav2", ["a"] * 70)
    assert [len(group.questions) for group in groups_of(one, 8)] == [8, 2] * 7
    assert groups_of([], 8) == []


def test_options_and_texts_are_not_asked_together() -> None:
    questions = [
        Question(
            id=f"{n}",
            benchmark="b",
            image="i",
            prompt="?",
            kind="text",
            question_type="t",
            options=("A", "B")[: n % 2 * 2],
        )
        for n in range(6)
    ]
    groups = groups_of(questions, 8)
    assert [[bool(q.options) for q in group.questions] for group in groups] == [[False] * 3, [True] * 3]


def test_long_images_go_in_small_batches() -> None:
    assert [default_batch_size(tokens) for tokens in (64, 196, 1024, 4150, 10**6)] == [64, 64, 53, 15, 1]


def test_a_finished_file_is_in_the_benchmarks_order_and_a_rerun_asks_nothing(tmp_path: Path) -> None:
    path, echo = tmp_path / "b/answers.jsonl", Echo()
    assert ask(path, header(), echo)
    stored, answers = read_answers(path)
    assert stored == header()
    assert [(a.id, a.image, a.prompt, a.text) for a in answers] == [
        (q.id, q.image, q.prompt, q.image) for q in QUESTIONS
    ]
    whole = path.read_bytes()
    assert not ask(path, header(), echo)
    assert not ask(path, header(batch_size=7), echo)
    assert not ask(path, header(limit=5), echo)  # is part of what is there
    assert path.read_bytes() == whole
    assert Counter(echo.asked) == Counter(q.id for q in QUESTIONS)
    assert not (path.parent / PARTS).exists()


@pytest.mark.parametrize("groups", range(9))
def test_every_interruption_ends_with_the_same_bytes(tmp_path: Path, groups: int) -> None:
    whole, path = tmp_path / "whole/answers.jsonl", tmp_path / "b/answers.jsonl"
    ask(whole, header(), Echo())
    first, second = Echo(groups=groups), Echo()
    ask(path, header(), first)
    if first.asked and not path.exists():
        stored, answers = read_answers(path)  # what there is can be looked at
        assert (stored, sorted(a.id for a in answers)) == (header(), sorted(first.asked))
    ask(path, header(), second)
    assert path.read_bytes() == whole.read_bytes()
    assert Counter([*first.asked, *second.asked]) == Counter(q.id for q in QUESTIONS)


@pytest.mark.parametrize("cut", [1, 30, 200, 500, 900])
def test_a_group_that_was_written_in_part_is_done_again(tmp_path: Path, cut: int) -> None:
    whole, path = tmp_path / "whole/answers.jsonl", tmp_path / "b/answers.jsonl"
    ask(whole, header(), Echo())
    ask(path, header(), Echo(groups=4))
    (part,) = (path.parent / PARTS).glob("*/*.jsonl")
    part.write_bytes(part.read_bytes()[:-cut])
    echo = Echo()
    ask(path, header(), echo)
    assert path.read_bytes() == whole.read_bytes()
    groups = groups_of(QUESTIONS, 4)
    again = {q.id for group in groups for q in group.questions if q.id in echo.asked}
    assert again == set(echo.asked)
    assert all({q.id for q in g.questions} <= again or not {q.id for q in g.questions} & again for g in groups)


@pytest.mark.parametrize("count", [2, 3, 20])
def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path, count: int) -> None:
    whole, path = tmp_path / "whole/answers.jsonl", tmp_path / "b/answers.jsonl"
    ask(whole, header(), Echo())
    ask(path, header(), Echo(groups=2))  # begun by one
    echoes = [Echo() for _ in range(count)]
    echoes[0].groups = 1  # one of many dies
    last = [ask(path, header(), echo, worker=Worker(index=i, count=count)) for i, echo in enumerate(echoes)]
    if any(last):
        assert count == 20  # the one that died had nothing else to do
    else:
        assert ask(path, header(), Echo())
    assert path.read_bytes() == whole.read_bytes()
    asked = [name for echo in echoes for name in echo.asked]
    assert len(asked) == len(set(asked))


def test_the_last_of_several_benchmarks_is_told(tmp_path: Path) -> None:
    parts = [
        [
            plan_benchmark(tmp_path / name / "answers.jsonl", header(), QUESTIONS, Worker(index=i, count=2))
            for name in ("a", "b")
        ]
        for i in range(2)
    ]
    order = [(0, 0), (1, 1), (0, 1), (1, 0)]  # which process ends which benchmark
    told = [answer_benchmark(parts[i][j], Echo(), parts=parts[i]) for i, j in order]
    assert told == [False, False, False, True]


def test_a_second_process_at_the_same_work_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b/answers.jsonl"
    first = plan_benchmark(path, header(), QUESTIONS)
    with pytest.raises(RunError, match="another process is answering 'mini-read'"):
        plan_benchmark(path, header(), QUESTIONS)
    first.work.close()
    assert ask(path, header(), Echo())


def test_a_short_look_does_not_cost_what_a_long_evaluation_has_done(tmp_path: Path) -> None:
    path, first, second = tmp_path / "b/answers.jsonl", Echo(groups=5), Echo()
    ask(path, header(), first)
    assert ask(path, header(limit=3), Echo())
    assert (read_answers(path)[0].limit, len(read_answers(path)[1])) == (3, 3)
    assert ask(path, header(), second)
    assert read_answers(path)[0].limit is None
    assert Counter([*first.asked, *second.asked]) == Counter(q.id for q in QUESTIONS)
    assert sorted(each.name for each in path.parent.iterdir()) == ["answers.jsonl"]


def test_the_control_is_recorded_with_the_image_that_was_shown(tmp_path: Path) -> None:
    path = tmp_path / "b/answers.jsonl"
    ask(path, header(control="shuffled", limit=8), Echo())
    _, answers = read_answers(path)
    other, image_of = shuffled_images(QUESTIONS), {q.id: q.image for q in QUESTIONS}
    assert [a.text for a in answers] == [a.image for a in answers] == [other[image_of[a.id]] for a in answers]


def test_damage_elsewhere_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "b/answers.jsonl"
    with pytest.raises(RunError, match="no answers at"):
        read_answers(path)
    ask(path, header(), Echo())
    whole = path.read_bytes()
    lines = whole.decode().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-9], *lines[2:]]) + "\n")
    with pytest.raises(RunError, match=r"damaged.*line 2 is not JSON.*delete this line, and give `vlmx eval` again"):
        ask(path, header(), Echo())
    control = tmp_path / "eval-shuffled/mini-read/answers.jsonl"
    control.parent.mkdir(parents=True)
    control.write_text(path.read_text())
    with pytest.raises(RunError, match="delete this line, and give `vlmx eval --control shuffled` again"):
        read_answers(control)
    path.write_text("\n".join([lines[0], *lines[2:]]) + "\n")  # as it says
    again = Echo()
    ask(path, header(), again)
    assert path.read_bytes() == whole
    assert 0 < len(again.asked) <= 4
    path.write_bytes(whole[:20])  # torn within the header, by another version
    ask(path, header(), Echo())
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"model": "m2"}, "another model"),
        ({"fingerprint": "g"}, "another fingerprint"),
        ({"questions": 31}, "another questions"),
        ({"exact": True, "dtype": "bf16"}, "another exact, dtype"),
        ({"wording": "paper", "questions_sha256": "cd"}, "another wording, questions sha256"),
    ],
)
def test_answers_with_other_settings_stay_until_the_new_ones_are_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, object], why: str
) -> None:
    path = tmp_path / "b/answers.jsonl"
    old, new = header(questions_sha256="ab"), header(**{"questions_sha256": "ab", **changed}, limit=7)
    ask(path, old, Echo())
    whole = path.read_bytes()
    for groups in (0, 1):
        ask(path, new, Echo(groups=groups))  # no model could be had, or it was stopped
        assert path.read_bytes() == whole
        assert f"its 30 answers stay until the new ones are finished: they were made with {why}" in (
            capsys.readouterr().err
        )
        assert (path.parent / PARTS).exists() == bool(groups)
    assert ask(path, new, Echo())
    assert len(read_answers(path)[1]) == 7
    kept = path.with_name(f"answers.replaced-{hashlib.sha256(whole).hexdigest()[:8]}.jsonl")
    assert kept.read_bytes() == whole
    assert f"30 answers are replaced: they were made with {why}; kept as {kept.name}" in capsys.readouterr().err
    echo = Echo()
    assert ask(path, old, echo)  # and back again: nothing has to be asked
    assert (path.read_bytes(), echo.asked) == (whole, [])


def test_a_wording_that_changes_no_question_is_no_other_setting(tmp_path: Path) -> None:
    path, echo = tmp_path / "b/answers.jsonl", Echo()
    ask(path, header(questions_sha256="ab"), Echo())
    assert not ask(path, header(questions_sha256="ab", wording="paper", limit=3), echo)
    ask(tmp_path / "c/answers.jsonl", header(questions_sha256="ab"), Echo(groups=4))
    ask(tmp_path / "c/answers.jsonl", header(questions_sha256="ab", wording="paper"), echo)
    assert len(echo.asked) == len(QUESTIONS) - 16


@pytest.mark.parametrize("small_first", [True, False])
def test_of_two_evaluations_at_once_the_larger_one_stays(tmp_path: Path, small_first: bool) -> None:
    whole, path = tmp_path / "whole/answers.jsonl", tmp_path / "b/answers.jsonl"
    ask(whole, header(), Echo())
    large, small = plan_benchmark(path, header(), QUESTIONS), plan_benchmark(path, header(limit=3), QUESTIONS)
    large.work.write(next(Echo()(large.work.open)))
    for part in (small, large) if small_first else (large, small):
        assert answer_benchmark(part, Echo())  # each ends, and shows scores
    assert path.read_bytes() == whole.read_bytes()
    assert [each.name for each in path.parent.iterdir()] == ["answers.jsonl"]


def test_a_process_of_another_number_is_not_disturbed(tmp_path: Path) -> None:
    path = tmp_path / "b/answers.jsonl"
    slow = plan_benchmark(path, header(), QUESTIONS, Worker(index=0, count=2))
    assert ask(path, header(), Echo())
    before = path.read_bytes()
    assert not answer_benchmark(slow, Echo())
    assert path.read_bytes() == before
    assert not (path.parent / PARTS).exists()


def test_answers_with_the_same_settings_are_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, whole = tmp_path / "b/answers.jsonl", tmp_path / "whole/answers.jsonl"
    ask(whole, header(), Echo())
    asked: list[str] = []
    for limit in (1, 2, 5):
        echo = Echo()
        assert ask(path, header(limit=limit), echo)
        asked += echo.asked
    assert len(asked) == len(set(asked)) == 5
    first, second = Echo(groups=2), Echo()
    ask(path, header(batch_size=6), first)
    assert ask(path, header(), second)  # after a power cut, with another batch size
    assert "answers with the same settings are taken over" in capsys.readouterr().err
    assert Counter([*asked, *first.asked, *second.asked]) == Counter(q.id for q in QUESTIONS)
    assert path.read_bytes() == whole.read_bytes()
    assert [each.name for each in path.parent.iterdir()] == ["answers.jsonl"]


@pytest.mark.parametrize("lost", [1, 7])
def test_lines_that_are_lost_are_asked_again_with_their_groups(tmp_path: Path, lost: int) -> None:
    path, echo = tmp_path / "b/answers.jsonl", Echo()
    ask(path, header(), Echo())
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-lost]) + b'{"id": "torn')
    assert ask(path, header(), echo)
    assert path.read_bytes() == whole
    gone = {q.id for q in QUESTIONS[-lost:]}
    groups = [{q.id for q in group.questions} for group in groups_of(QUESTIONS, 4)]
    assert set(echo.asked) == set().union(*(group for group in groups if group & gone))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"id": "1", "image": "i", "prompt": "p", "text": null}', "line 2: 'text' is null, where a text belongs"),
        ('{"id": "1", "image": "i", "prompt": "p", "text": 3}', "line 2: 'text' is 3"),
        ('{"id": "1", "image": "i", "prompt": "p"}', "line 2: 'text' is missing"),
        ('{"id": "1", "image": "i", "prompt": "p", "text": "", "probabilities": "x"}', "line 2: 'probabilities' are"),
        ("[]", "line 2 is no answer"),
    ],
)
def test_odd_lines_are_named(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(header().line() + line + "\n")
    with pytest.raises(RunError, match=re.escape(why)) as caught:
        read_answers(path)
    assert caught.value.fix.startswith("delete this line")


def test_odd_files(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    answer = Answer(id="1", image="i", prompt="p", text="t")
    newer = json.dumps({**json.loads(header().line()), "of_a_later_version": 1})
    path.write_text(f"{newer}\n\n" + answer.line().replace('{"id"', '{"later": [], "id"') + "\n")
    assert read_answers(path) == (header(), [answer])
    path.write_text('{"kind": "header", "benchmark": "gqa", "questions": null}\n')
    with pytest.raises(RunError, match="the header in line 1 lacks control, questions, model"):
        read_answers(path)
    path.write_text(answer.line())
    with pytest.raises(RunError, match="line 1 is no header"):
        read_answers(path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(RunError, match=r"line 1 is not text.*move the file away"):
        read_answers(path)
    path.write_bytes(header().line().encode() + answer.line().encode() + b"\xff\xfe\n")
    with pytest.raises(RunError, match=r"line 3 is not text.*delete this line, and give `vlmx eval` again"):
        read_answers(path)


def test_files_of_older_versions_are_read(tmp_path: Path) -> None:
    """As they were before wording, options and subsets were recorded; a whole one is kept, a part of one is not."""
    path = tmp_path / "b/answers.jsonl"
    path.parent.mkdir()
    first = {
        "kind": "header",
        "benchmark": "mini-read",
        "control": "none",
        "questions": 30,
        "limit": 12,
        "model": "m1",
        "cache": "c",
        "fingerprint": "f",
        "encoder_weights": "ab" * 32,
        "geometry": {"mode": "letterbox", "height": 64, "width": 64, "fill": [0, 0, 0], "resampling": "bicubic"},
        "prompt_format": "plain",
    }
    lines = [{"id": q.id, "image": q.image, "prompt": q.prompt, "text": "old"} for q in QUESTIONS]
    path.write_text("".join(json.dumps(line) + "\n" for line in [first, *lines]))
    old, answers = read_answers(path)
    assert (old.wording, old.dtype, old.exact, old.to_ask) == ("default", "fp32", False, 12)
    assert {answer.probabilities for answer in answers} == {None}
    before = path.read_bytes()
    assert not ask(path, header(questions_sha256="ab"), Echo())
    assert path.read_bytes() == before
    path.write_text("".join(json.dumps(line) + "\n" for line in [first, *lines[:-1]]))
    assert ask(path, header(questions_sha256="ab"), Echo())
    assert "old" not in path.read_text()


def test_where_answers_lie(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", kind="train", config={})
    for control in ("none", "shuffled"):
        path = answers_path(run, "mini-read", control)
        path.parent.mkdir(parents=True)
        AnswerFile(path, header(control=control)).append(
            [
                Answer(id="q", image="i", prompt="p", text="t"),
                Answer(id="r", image="i", prompt="p", text="Yes", probabilities=(0.75, 0.25)),
            ]
        )
        assert answered_benchmarks(run, control) == ["mini-read"]
        assert read_answers(path)[1][1].probabilities == (0.75, 0.25)
    lines = (tmp_path / "run/eval-shuffled/mini-read/answers.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"id": "q", "image": "i", "prompt": "p", "text": "t"}
    assert json.loads(lines[2])["probabilities"] == [0.75, 0.25]


def test_unfinished_benchmarks_are_among_those_answered(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", kind="train", config={})
    ask(answers_path(run, "mini-read", "none"), header(), Echo(groups=2))
    (run.path / "eval/mini-count").mkdir()
    assert answered_benchmarks(run, "none") == ["mini-read"]


def test_which_image_table_a_benchmark_uses() -> None:
    assert table_name("mini-count") == "mini"


def test_the_digest_of_questions_sees_what_counts() -> None:
    def one(**changed: object) -> Question:
        fields = {"id": "1", "benchmark": "b", "image": "i", "prompt": "p", "kind": "text", "question_type": "t"}
        return Question(**{**fields, "answers": ("a",), **changed})  # type: ignore[arg-type]

    changes: list[dict[str, object]] = [
        {},
        {"id": "2"},
        {"prompt": "q"},
        {"answers": ("a", "b")},
        {"box": (0, 0, 1, 1)},
        {"options": ("A",)},
    ]
    digests = {questions_sha256([one(**change)]) for change in changes}
    assert len(digests) == len(changes)
    assert questions_sha256([one(), one(id="2")]) != questions_sha256([one(id="2"), one()])
