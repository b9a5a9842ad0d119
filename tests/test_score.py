"""Is a score a pure function of answers and annotations, with honest counts, frames and intervals?"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from vlmx.cache_specs.geometry import Geometry
from vlmx.data.mini import study
from vlmx.data.records import Question
from vlmx.errors import DataError, RunError, UsageError, VlmxError
from vlmx.evaluate.answers import Answer, AnswerFile, Control, Header, answers_path, write_answers
from vlmx.evaluate.answers_check import delete_lines
from vlmx.evaluate.baselines import baselines_of
from vlmx.evaluate.compare import compare, order
from vlmx.evaluate.groups import questions_sha256
from vlmx.evaluate.score import Grade, grade, grade_answers, grades_of_run, score_grades
from vlmx.evaluate.score_run import score_run
from vlmx.runs import RunFolder

SQUARE = Geometry(mode="letterbox", height=64, width=64, fill=(0, 0, 0))


def header(benchmark: str, questions: int, limit: int | None = None, control: Control = "none") -> Header:
    return Header(
        benchmark=benchmark,
        control=control,
        questions=questions,
        limit=limit,
        model="m",
        cache="c",
        fingerprint="f",
        encoder_weights="random:3",
        geometry=SQUARE.to_dict(),
        prompt_format="plain",
    )


def asked(benchmark: str, number: int, kind: str, *answers: str) -> Question:
    return Question(
        id=f"{benchmark}/{number}",
        benchmark=benchmark,
        image=f"i{number}",
        prompt="?",
        kind="text",
        question_type=kind,
        answers=answers,
        image_wh=(64, 64),
    )


def answered(questions: list[Question], *texts: str) -> list[Answer]:
    return [Answer(id=q.id, image=q.image, prompt=q.prompt, text=t) for q, t in zip(questions, texts, strict=True)]


def with_probabilities(answers: list[Answer], probabilities: Mapping[str, tuple[float, ...]]) -> list[Answer]:
    return [replace(answer, probabilities=probabilities[answer.id]) for answer in answers]


def region(image_wh: tuple[int, int], box: tuple[float, float, float, float], benchmark: str = "mini-ref") -> Question:
    return Question(
        id="r",
        benchmark=benchmark,
        image="i",
        prompt="?",
        kind="box",
        question_type="ref",
        box=box,
        object_boxes=(box,),
        image_wh=image_wh,
    )


def test_answered_boxes_are_in_the_encoders_input() -> None:
    wide = region((200, 100), (0, 0, 100, 100))  # letterboxed: the photo spans y from 0.25 to 0.75
    right = grade(wide, "[0.0, 0.25, 0.5, 0.75]", SQUARE)
    assert (right.value, right.overlap, right.box) == (1.0, 1.0, (0, 0, 100, 100))
    assert grade(wide, "[0.0, 0.0, 0.5, 1.0]", SQUARE).overlap == pytest.approx(0.5)


def test_the_papers_box_rule_ignores_the_letterbox_and_rounds_the_truth() -> None:
    wide = region((200, 100), (0, 0, 100.9, 100))
    assert grade(wide, "[0.0, 0.0, 0.5, 1.0]", SQUARE, box_rule="paper").overlap == 1.0
    assert grade(wide, "[0.0, 0.25, 0.5, 0.75]", SQUARE, box_rule="paper").value == 1.0
    assert grade(wide, "[0.0, 0.25, 0.4, 0.75]", SQUARE, box_rule="paper").value == 0.0


def test_both_comparisons_stand_beside_each_other() -> None:
    wide = region((200, 100), (0, 0, 100, 100), benchmark="ocid-ref")
    seen = grade(wide, "[0.0, 0.25, 0.125, 0.75]", SQUARE)
    assert (seen.value, seen.overlaps) == (1.0, {"corrected": 0.25, "raw": 0.125})  # a quarter is enough here
    assert grade(wide, "[0.0, 0.25, 0.125, 0.75]", SQUARE, box_rule="paper").value == 0.0
    score = score_grades(header("ocid-ref", 1), [seen])
    assert score.details == {
        "corrected_iou50": 0.0,
        "corrected_iou25": 100.0,
        "corrected_mean_iou": 25.0,
        "raw_iou50": 0.0,
        "raw_iou25": 0.0,
        "raw_mean_iou": 12.5,
    }
    assert score.metric.startswith("IoU >= 0.25 after")
    assert score.baselines == {"random_object": 100.0, "mean_box": 100.0}


def test_popes_score_is_the_mean_of_its_splits() -> None:
    questions = [asked("pope", n, "random" if n < 4 else "popular", "yes" if n % 2 else "no") for n in range(6)]
    answers = answered(questions, "no", "yes", "no", "yes", "no", "no")
    grades = grade_answers(header("pope", 6), answers, questions)
    score = score_grades(header("pope", 6), grades)
    assert score.score == 75.0  # 4 of 4 and 1 of 2, however many questions a split has
    assert score.interval95[0] < 75 < score.interval95[1]
    assert (score.details["random_accuracy"], score.details["popular_accuracy"]) == (100.0, 50.0)
    assert score.details["all_accuracy"] == pytest.approx(100 * 5 / 6)
    assert score.details["random_f1"] == 100.0
    assert score.baselines == {"prior": 50.0}
    assert "random_auc_roc" not in score.details
    strange = grade_answers(header("pope", 6), answered(questions, "", "a dog", "no", "yes", "no", "no"), questions)
    assert score_grades(header("pope", 6), strange).invalid == 2


def test_probabilities_count_instead_of_the_text() -> None:
    questions = [asked("pope", 0, "random", "yes"), asked("pope", 1, "random", "no")]
    probabilities = {"pope/0": (0.6, 0.4), "pope/1": (0.7, 0.3)}
    answers = with_probabilities(answered(questions, "", "No"), probabilities)
    grades = grade_answers(header("pope", 2), answers, questions)
    assert [g.value for g in grades] == [1.0, 0.0]
    score = score_grades(header("pope", 2), grades)
    assert (score.score, score.invalid) == (50.0, 0)
    assert (score.details["random_auc_roc"], score.details["random_yes_ratio"]) == (0.0, 100.0)
    half = grade_answers(header("pope", 2), [answers[0], *answered(questions[1:], "No")], questions)
    assert "random_auc_roc" not in score_grades(header("pope", 2), half).details  # not over a part of the answers
    with pytest.raises(DataError, match="have no options"):
        grade(asked("gqa", 0, "t", "yes"), "yes", SQUARE, probabilities=(0.5, 0.5))
    with pytest.raises(DataError, match="do not fit 2 options"):
        grade(questions[0], "yes", SQUARE, probabilities=(0.5, 0.3, 0.2))


def test_tallyqa_counts_over_all_questions() -> None:
    questions = [asked("tallyqa", n, "simple" if n else "complex", str(n)) for n in range(4)]
    one_hot = {q.id: tuple(float(n == int(q.answers[0])) for n in range(16)) for q in questions}
    one_hot["tallyqa/0"] = (*[0.0] * 15, 1.0)
    answers = with_probabilities(answered(questions, *"AAAA"), one_hot)
    grades = grade_answers(header("tallyqa", 4), answers, questions)
    score = score_grades(header("tallyqa", 4), grades)
    assert score.score == score.details["all_accuracy"] == 75.0
    assert (score.details["simple_accuracy"], score.details["complex_accuracy"]) == (100.0, 0.0)
    assert (score.details["simple_auc_roc"], score.details["simple_auc_pr"]) == (100.0, 100.0)


def test_vizwiz_with_its_unanswerable_scores_and_a_blind_prior() -> None:
    questions = [asked("vizwiz", 0, "answerable", *["red"] * 10)]
    questions += [asked("vizwiz", n, "unanswerable", *["unanswerable"] * 10) for n in (1, 2)]
    answers = answered(questions, "red", "Unanswerable", "a dog")
    score = score_grades(header("vizwiz", 3), grade_answers(header("vizwiz", 3), answers, questions))
    assert score.score == pytest.approx(100 * 2 / 3)
    assert (score.details["answerable"], score.details["unanswerable"]) == (100.0, 50.0)
    assert score.details["unanswerable_f1"] == pytest.approx(100 * 2 / 3)
    # whether it can be answered is not known to the blind: one answer for all
    assert baselines_of(questions) == {"prior": pytest.approx(100 * 2 / 3)}


def test_what_is_wrong_with_answers_is_told_by_file_and_line(tmp_path: Path) -> None:
    questions = study.questions("mini-read")
    run = RunFolder.create(tmp_path / "run", kind="train", config={})
    path = answers_path(run, "mini-read", "none")
    known = replace(header("mini-read", len(questions)), questions_sha256=questions_sha256(questions))
    AnswerFile(path, known)
    with pytest.raises(RunError, match=rf"{path} has no answers yet.*vlmx eval --run {run.path}"):
        grades_of_run(run, "mini-read", "none")
    good = answered(questions[:3], "A", "B", "C")

    def refused(*odd: Answer, as_header: Header = known) -> str:
        write_answers(path, as_header, [*good, *odd])
        with pytest.raises(VlmxError) as caught:
            grades_of_run(run, "mini-read", "none")
        return f"{caught.value.what} / {caught.value.why} / {caught.value.fix}"

    fix = " / delete these lines, and give `vlmx eval` again: it asks what is missing"
    assert delete_lines(replace(known, control="shuffled")).endswith(
        ", and give `vlmx eval --control shuffled` again: it asks what is missing"
    )
    write_answers(path, replace(known, wording="paper"), good)  # words that this benchmark's questions do not have
    assert grades_of_run(run, "mini-read", "none")[0].wording == "default"
    twice = refused(good[1])
    assert twice.startswith("1 questions of 'mini-read' are answered more than once / ")
    assert f"{path}, line 3: {good[1].id}; {path}, line 5: {good[1].id};" in twice
    assert twice.endswith(fix)
    strangers = refused(*(replace(good[0], id=f"x{number}") for number in range(5)))
    assert f" / {path}, line 5: x0; {path}, line 6: x1; {path}, line 7: x2 and 2 more; they" in strangers
    assert strangers.endswith(fix)
    (odd,) = answered(questions[3:4], "A")
    assert f" / {path}, line 5: {odd.id}; prompt or image is another" in refused(replace(odd, prompt="What else?"))
    of_options = refused(replace(odd, probabilities=(0.5, 0.5)))
    assert of_options.startswith(f"1 answers to 'mini-read' cannot be scored / {path}, line 5: {odd.id}; the first: ")
    assert of_options.endswith(fix)
    # made for other files, which the header tells: whatever else is wrong, no answer is to blame
    elsewhere = refused(replace(odd, id="x"), as_header=replace(known, questions_sha256="cd", data_root="/old"))
    assert elsewhere.startswith("the annotations of 'mini-read' are not the ones that its answers were made for")
    assert "give --data-root the folder of the files that were asked (they were in /old)" in elsewhere
    assert "delete" not in elsewhere
    unknown = refused(replace(odd, id="x"), as_header=replace(known, questions_sha256="", data_root="/old"))
    assert (
        "if they were made for other files, give --data-root their folder (they were in /old); else delete" in unknown
    )


def test_probabilities_that_do_not_fit_are_told_by_id() -> None:
    questions = [asked("pope", number, "random", "yes") for number in range(3)]
    answers = with_probabilities(
        answered(questions, *["Yes"] * 3),
        {"pope/0": (float("nan"), 0.5), "pope/1": (0.6, 0.4), "pope/2": (0.1,) * 15},
    )
    with pytest.raises(DataError, match=r"2 answers to 'pope' cannot be scored.*pope/0; pope/2; the first: these are"):
        grade_answers(header("pope", 3), answers, questions)


def test_a_limit_that_took_all_is_no_part(tmp_path: Path) -> None:
    """As older versions recorded it."""
    questions = study.questions("mini-read")
    run = RunFolder.create(tmp_path / "run", kind="train", config={})
    path, count = answers_path(run, "mini-read", "none"), len(questions)
    AnswerFile(path, header("mini-read", count))
    answers = answered(questions, *["A"] * count)

    def size(old: Header, asked: int) -> str:
        write_answers(path, old, answers[:asked])
        (score,) = score_run(run)
        return score.size

    assert size(replace(header("mini-read", count, 9999), asked=count), count) == f"{count}"
    assert size(replace(header("mini-read", count), slim=True, asked=count), count - 1) == (
        f"{count - 1} of {count} (1 not answered yet)"
    )
    assert size(replace(header("mini-read", count, 5), asked=5), 5) == f"5 of {count} (limit 5)"
    # a subset of a file with more questions than were published, as many as these
    assert size(replace(header("mini-read", 5, 5), asked=5), 5) == "5 (limit 5)"


def test_answers_of_another_benchmark_are_refused(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", kind="train", config={})
    path = answers_path(run, "mini-read", "none")
    AnswerFile(path, header("mini-count", 1))
    with pytest.raises(RunError, match="answers to another benchmark"):
        grades_of_run(run, "mini-read", "none")
    path.unlink()
    AnswerFile(path, header("mini-read", 1, control="shuffled"))
    with pytest.raises(RunError, match="control: shuffled"):
        grades_of_run(run, "mini-read", "none")


def test_invalid_answers_are_wrong_and_counted() -> None:
    questions = study.questions("mini-ref")[:4]
    boxes = [q.box for q in questions]
    texts = ["somewhere left", "", *(str([round(edge / 64, 2) for edge in box or ()]) for box in boxes[2:])]
    answers = [Answer(id=q.id, image=q.image, prompt=q.prompt, text=t) for q, t in zip(questions, texts, strict=True)]
    score = score_grades(header("mini-ref", 4), grade_answers(header("mini-ref", 4), answers, questions))
    assert (score.score, score.invalid, score.n, score.partial) == (50.0, 2, 4, False)
    assert 0 <= score.interval95[0] <= 50 <= score.interval95[1] <= 100
    assert (score.details["corrected_iou25"], score.details["raw_iou25"]) == (50.0, 50.0)
    assert "IoU >= 0.5 after the answer was converted" in score.metric


def test_partial_scores_are_marked_and_unknown_questions_refused() -> None:
    questions = study.questions("mini-count")
    answers = [Answer(id=q.id, image=q.image, prompt=q.prompt, text=q.answers[0] + ".") for q in questions[:5]]
    grades = grade_answers(header("mini-count", len(questions), 5), answers, questions)
    score = score_grades(header("mini-count", len(questions), 5), grades)
    assert (score.score, score.n, score.expected, score.partial) == (100.0, 5, len(questions), True)
    assert score.missing == 0  # five were to be asked
    assert score_grades(header("mini-count", len(questions), 8), grades).missing == 3
    stranger = Answer(id="mini-count/elsewhere", image="x", prompt="?", text="2")
    with pytest.raises(RunError, match="belong to no question"):
        grade_answers(header("mini-count", 9), [*answers, stranger], questions)


def test_a_score_says_how_it_came_about() -> None:
    questions = study.questions("mini-ref")
    answers = answered(questions[:4], *["[0, 0, 1, 1]"] * 4)
    plain = header("mini-ref", len(questions))
    as_paper = replace(plain, wording="paper", slim=True, asked=5, dtype="bf16")
    scores = [
        score_grades(h, grade_answers(h, answers, questions, box_rule=rule), box_rule=rule)
        for h, rule in ((plain, "exact"), (as_paper, "paper"))
    ]
    assert [(s.wording, s.boxes, s.dtype, s.subset) for s in scores] == [
        ("default", "exact", "fp32", ""),
        ("paper", "paper", "bf16", "slim"),
    ]
    total = f"{len(questions):,}"
    assert scores[0].size == f"4 of {total} ({len(questions) - 4:,} not answered yet)"
    assert scores[1].size == f"4 of {total} (slim, 1 not answered yet)"
    assert (
        scores[1].made_with == "prompts as in the paper's evaluation; boxes compared raw, as in the paper's evaluation"
    )
    read = study.questions("mini-read")
    h = header("mini-read", len(read))
    score = score_grades(h, grade_answers(h, answered(read, *["A"] * len(read)), read))
    assert (score.boxes, score.made_with, score.size) == (None, "prompts as in training", f"{len(read):,}")


def test_files_of_another_version_and_limits_are_named() -> None:
    questions = [asked("pope", number, "random", "yes") for number in range(9)]

    def size(published: int, answers: int, limit: int | None, to_ask: int) -> tuple[str, bool]:
        h = replace(header("pope", published, limit), asked=to_ask)
        score = score_grades(h, grade_answers(h, answered(questions[:answers], *["Yes"] * answers), questions))
        return score.size, score.partial

    assert size(8, 9, None, 9) == ("9 of 8 published: another version", False)
    assert size(8, 9, 12, 9) == ("9 of 8 published (limit 12): another version", False)
    assert size(8, 8, None, 9) == ("8 of 8 (1 not answered yet)", True)
    assert size(9, 9, 12, 9) == ("9 (limit 12)", False)
    assert size(9, 5, 5, 5) == ("5 of 9 (limit 5)", True)
    assert size(10, 9, None, 9) == ("9 of 10 (partial)", True)


def test_other_annotations_than_those_that_were_asked_are_refused() -> None:
    questions = study.questions("mini-read")
    known = replace(header("mini-read", len(questions)), questions_sha256=questions_sha256(questions))
    answers = answered(questions[:2], "A", "B")
    assert len(grade_answers(known, answers, questions)) == 2
    changed = [replace(questions[0], answers=("another",)), *questions[1:]]
    with pytest.raises(RunError, match=r"annotations of 'mini-read' are not the ones.*--data-root"):
        grade_answers(known, answers, changed)


def test_answers_that_were_given_to_other_questions_are_refused() -> None:
    """Files of older versions and of other programs have no digest of the questions, but an image and a prompt each."""
    questions = study.questions("mini-read")[:3]
    h, answers = header("mini-read", 3), answered(questions, "A", "B", "C")
    for changed in (replace(answers[1], prompt="What else?"), replace(answers[1], image="another")):
        with pytest.raises(
            RunError, match=rf"1 answers to 'mini-read'.*other questions.*{questions[1].id}.*--data-root"
        ):
            grade_answers(h, [answers[0], changed], questions)
    shuffled = replace(h, control="shuffled")  # every question is shown another image there
    assert len(grade_answers(shuffled, [replace(answers[1], image="another")], questions)) == 1
    with pytest.raises(RunError, match="other questions"):
        grade_answers(shuffled, [replace(answers[1], prompt="What else?")], questions)


def test_score_run_writes_what_it_returns_and_can_be_given_again(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", kind="train", config={})
    with pytest.raises(RunError, match="vlmx eval"):
        score_run(run)
    questions = study.questions("mini-read")
    file = AnswerFile(answers_path(run, "mini-read", "none"), header("mini-read", len(questions)))
    file.append(Answer(id=q.id, image=q.image, prompt=q.prompt, text="A") for q in questions)
    (score,) = score_run(run)
    path = tmp_path / "run/eval/mini-read/scores.json"
    first = path.read_bytes()
    assert json.loads(first) == json.loads(json.dumps(asdict(score)))
    assert score.score <= score.baselines["prior"] < 30
    assert score.encoder == "c (untrained)"
    score_run(run)
    assert path.read_bytes() == first


def grades(hits: list[int], name: str = "q") -> list[Grade]:
    box = (0.0, 0.0, 1.0, 1.0)
    return [
        Grade(
            question=Question(
                id=f"{name}{n}",
                benchmark="b",
                image=f"i{n}",
                prompt="?",
                kind="box",
                question_type="t",
                box=box,
                image_wh=(1, 1),
            ),
            text="",
            value=float(hit),
            valid=True,
        )
        for n, hit in enumerate(hits)
    ]


def test_differences_are_paired() -> None:
    better = compare("a", grades([1] * 60 + [0] * 40), "b", grades([1] * 50 + [0] * 50))
    assert better.points == pytest.approx(10)
    assert better.separable
    assert better.sentence("boxes").startswith("a > b on boxes: +10.0 [")
    chance = compare("a", grades([1, 0, 1, 0] * 25), "b", grades([0, 1, 0, 1] * 25))
    assert not chance.separable
    assert "not separable on boxes: +0.0 [" in chance.sentence("boxes")
    with pytest.raises(UsageError, match="no question in common"):
        compare("a", grades([1]), "b", grades([1], name="other"))


def test_order_goes_from_best_to_worst() -> None:
    ranked = order({"low": grades([0] * 90 + [1] * 10), "high": grades([1] * 100), "mid": grades([1] * 50 + [0] * 50)})
    assert [(d.first, d.second, d.separable) for d in ranked] == [("high", "mid", True), ("mid", "low", True)]
