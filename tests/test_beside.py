"""Are a run's numbers put beside the paper's and another run's, with honest averages, marks and alarms?"""

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_files import make_data_root
from click.testing import CliRunner, Result

from vlmx.data.benchmarks import load_benchmark
from vlmx.data.records import Question
from vlmx.errors import RunError, UnknownNameError, UsageError
from vlmx.evaluate import beside
from vlmx.evaluate.aggregate import LOC_QUESTIONS, VQA_QUESTIONS
from vlmx.evaluate.answers import Answer, Header, answers_path
from vlmx.evaluate.beside import PAPER_QUESTIONS, beside_paper, part_of
from vlmx.evaluate.beside_run import Graded, beside_run
from vlmx.evaluate.compare_command import compare as command
from vlmx.evaluate.correlate_command import correlate
from vlmx.evaluate.paper_rows import paper_row
from vlmx.evaluate.score import BoxRule, Grade, Score, score_grades
from vlmx.runs import RunFolder, write_json

GEOMETRY = {"mode": "letterbox", "height": 512, "width": 512, "fill": [0, 0, 0]}
CACHE = "vmamba-s-coco@512x512-0123456789ab"


def header(benchmark: str, questions: int, **more: str | None) -> Header:
    return Header(
        benchmark=benchmark,
        control="none",
        questions=questions,
        limit=None,
        model="m",
        cache=CACHE,
        fingerprint="f",
        encoder_weights="ab" * 32,
        geometry=GEOMETRY,
        prompt_format="vicuna",
        **more,  # type: ignore[arg-type]  # texts, by the names of the header
    )


def graded(name: str, percents: Mapping[str, float], *, boxes: BoxRule = "exact", questions: int = 100) -> Graded:
    """A run that answered 100 questions of each benchmark, each about another image."""
    scores: dict[str, Score] = {}
    grades: dict[str, list[Grade]] = {}
    for benchmark, percent in percents.items():
        kind = "box" if benchmark in LOC_QUESTIONS or "ref" in benchmark else "text"
        grades[benchmark] = [
            Grade(
                question=Question(
                    id=str(number),
                    benchmark=benchmark,
                    image=f"{benchmark}{number}",
                    prompt="?",
                    kind=kind,  # type: ignore[arg-type]  # one of the two kinds
                    question_type="",
                    answers=("2",) if benchmark == "tallyqa" else ("yes",) * 10,
                    box=(0, 0, 2, 2),
                    image_wh=(4, 4),
                ),
                text="yes",
                value=float(number < percent),
                valid=True,
                overlap=0.0,
                overlaps={"corrected": 0.0, "raw": 0.0},
            )
            for number in range(100)
        ]
        scores[benchmark] = score_grades(header(benchmark, questions), grades[benchmark], box_rule=boxes)
    return Graded(name=name, connector="mlp2", resolution="512x512", scores=scores, grades=grades)


ROW = paper_row("vmamba-s-coco@512/mlp3")
LIKE_ROW = {name: round(score) for name, score in ROW.published.scores.items()}


def test_all_eleven_beside_a_row() -> None:
    run = graded("run", LIKE_ROW)
    found = beside_paper(run.scores, run.grades, ROW)
    assert [line.name for line in found.lines] == list(PAPER_QUESTIONS)
    vqav2 = found.lines[0]
    assert (vqav2.ours, vqav2.published, vqav2.difference, vqav2.within) == (66.0, 65.98, 0.02, True)
    assert vqav2.difference95[0] == pytest.approx(vqav2.interval95[0] - 65.98)
    assert vqav2.marks == ("partial: 100 of 214,354",)
    assert found.lines[-1].marks == ("partial: 100 of 18,342", "prompts default", "boxes exact")
    averages = {line.name: line for line in found.averages}
    printed = [averages[name].published for name in ("weighted_vqa", "weighted_loc", "weighted_overall")]
    assert printed == [ROW.published.weighted_vqa, ROW.published.weighted_loc, ROW.published.weighted_overall]
    loc = averages["weighted_loc"]
    exact = sum(LIKE_ROW[name] * count for name, count in LOC_QUESTIONS.items()) / sum(LOC_QUESTIONS.values())
    assert loc.ours_exact == pytest.approx(exact)
    assert loc.ours == round(exact, 2)
    assert loc.interval95[0] < exact < loc.interval95[1]
    assert loc.marks == ("partial: 4 of 4 benchmarks", "prompts default", "boxes exact")
    assert found.remark.split("; ") == [
        "its box prompts are worded as in training (vlmx eval --profile paper words them as the paper)",
        "its boxes are compared in the source image, the paper's raw (--boxes paper)",
    ]
    assert averages["macro"].ours_exact == pytest.approx(sum(LIKE_ROW.values()) / 11)
    assert averages["macro"].published == pytest.approx(sum(ROW.published.scores.values()) / 11, abs=0.005)
    assert found.collapse is None


def test_what_lies_outside_of_our_interval_is_said() -> None:
    run = graded("run", {"pope": 60})
    line = beside_paper(run.scores, run.grades, ROW).lines[0]
    assert (line.ours, line.published, line.within) == (60, 87.28, False)
    assert line.difference95[1] < 0
    all_right = graded("run", {"pope": 100})
    assert beside_paper(all_right.scores, all_right.grades, ROW).lines[0].within is None


def test_averages_over_some_benchmarks_compare_the_same_ones() -> None:
    run = graded("run", {"refcoco": 50, "refcocog": 20, "mini-ref": 30, "gqa": 55})
    found = beside_paper(run.scores, run.grades, ROW)
    assert found.left_out == ("mini-ref",)
    assert [line.name for line in found.lines] == ["gqa", "refcoco", "refcocog"]
    averages = {line.name: line for line in found.averages}
    loc = averages["weighted_loc"]
    assert loc.ours == round((50 * 10_834 + 20 * 4_896) / 15_730, 2)
    assert loc.published == round((65.09 * 10_834 + 57.13 * 4_896) / 15_730, 2)
    assert loc.marks[0] == "over 2 of 4 benchmarks"
    assert averages["weighted_vqa"].marks[0] == "over 1 of 7 benchmarks"
    only_boxes = graded("run", {"refcoco": 50})
    names = [line.name for line in beside_paper(only_boxes.scores, only_boxes.grades, ROW).averages]
    assert names == ["weighted_loc", "weighted_overall", "macro"]


def test_a_run_that_collapsed_against_its_row() -> None:
    run = graded("run", {**LIKE_ROW, "refcoco": 25, "refcoco+": 15, "refcocog": 17, "ocid_ref": 4})
    found = beside_paper(run.scores, run.grades, ROW)
    assert found.collapse is not None
    assert found.collapse.level == "collapsed"
    assert found.collapse.box_reference == ROW.published.weighted_loc
    nothing = graded("run", {**LIKE_ROW, **dict.fromkeys(LOC_QUESTIONS, 0)})  # an interval without width, of 100 images
    assert beside_paper(nothing.scores, nothing.grades, ROW).collapse is not None
    text = graded("run", {"gqa": 50})
    assert beside_paper(text.scores, text.grades, ROW).remark == ""


@pytest.mark.parametrize(
    ("n", "subset", "part"),
    [
        (8910, "", ""),
        (1024, "slim", "1,024 of 8,910 (slim)"),
        (9000, "", "9,000 of 8,910 published: another version"),
        (8950, "limit 8,950", "8,950 of 8,910 published (limit 8,950): another version"),
        (8910, "limit 8,910", "8,910 of 8,910 (limit 8,910)"),
    ],
)
def test_more_questions_than_the_papers_are_marked_too(n: int, subset: str, part: str) -> None:
    score = graded("run", {"pope": 60}).scores["pope"]
    assert part_of(replace(score, n=n, expected=8910, partial=n < 8910, missing=0, subset=subset)) == part


def test_two_runs_are_paired() -> None:
    first, second = graded("a", {"gqa": 60, "refcoco": 50, "pope": 80}), graded("b", {"refcoco": 40, "gqa": 60})
    found = beside_run(first, second)
    assert [line.name for line in found.lines] == ["gqa", "refcoco"]
    assert found.left_out == ("pope",)
    gqa, refcoco = (line.difference for line in found.lines)
    assert (gqa.points, gqa.interval95, gqa.separable) == (0, (0, 0), None)
    assert (refcoco.points, refcoco.first_percent, refcoco.second_percent) == (10, 50, 40)
    assert refcoco.separable
    overall = {line.name: line.difference for line in found.averages}["weighted_overall"]
    assert overall.points == pytest.approx(10 * 10_834 / (10_834 + 12_578))
    assert overall.n == 200
    assert {line.name for line in found.averages} == {"weighted_vqa", "weighted_loc", "weighted_overall", "macro"}


def test_marks_say_in_what_two_runs_differ() -> None:
    first, second = graded("a", {"refcoco": 60}, boxes="paper"), graded("b", {"refcoco": 60}, questions=200)
    marks = beside_run(first, second).lines[0].marks
    assert marks == (
        "a: partial: 100 of 10,834",
        "a: boxes paper",
        "b: partial: 100 of 10,834 (100 not answered yet)",
        "b: boxes exact",
        "prompts default",
    )


def test_the_alarm_names_the_run_whose_boxes_are_worse() -> None:
    good, bad = graded("good", {"mini-count": 60, "mini-ref": 60}), graded("bad", {"mini-count": 58, "mini-ref": 10})
    found = beside_run(good, bad)
    assert found.collapse is not None
    assert found.collapse.level == "collapsed"
    assert found.alarm.startswith("localization collapse of bad: boxes 10.0 where good has 60.0")
    assert beside_run(bad, good).alarm == found.alarm
    assert beside_run(good, graded("same", {"mini-count": 60, "mini-ref": 60})).alarm == ""
    assert beside_run(good, graded("text", {"mini-count": 60})).collapse is None


def first_of(run: Graded) -> Graded:
    """Its first question of each benchmark."""
    grades = {name: of[:1] for name, of in run.grades.items()}
    return replace(
        run, grades=grades, scores={name: score_grades(header(name, 100), of) for name, of in grades.items()}
    )


def test_one_image_raises_no_alarm() -> None:
    good, bad = (first_of(graded(name, {"vqav2": 50, "refcoco": percent})) for name, percent in (("a", 50), ("b", 0)))
    beside = beside_paper(bad.scores, bad.grades, ROW)
    loc = next(line for line in beside.averages if line.name == "weighted_loc")
    assert (loc.ours, loc.published, loc.interval95, loc.within) == (0, 65.09, (0, 0), None)
    assert beside.collapse is None
    pair = beside_run(good, bad)
    assert [(line.difference.points, line.difference.separable) for line in pair.lines] == [(0, None), (100, None)]
    assert (pair.collapse, pair.alarm) == (None, "")


def of_another_version(run: Graded, benchmark: str) -> Graded:
    others = [replace(g, question=replace(g.question, image=f"{g.question.image}x")) for g in run.grades[benchmark]]
    return replace(run, grades={**run.grades, benchmark: others})


def test_a_benchmark_without_a_question_in_common_is_left_out_alone() -> None:
    first, second = graded("a", {"gqa": 60, "pope": 80}), graded("b", {"gqa": 50, "pope": 70})
    found = beside_run(first, of_another_version(second, "pope"))
    assert [line.name for line in found.lines] == ["gqa"]
    assert (found.left_out, found.nothing_common) == ((), {"pope": 100})
    assert {line.difference.n for line in found.averages} == {100}
    with pytest.raises(
        UsageError, match=r"'a' and 'b' have answered no question in common.*200 questions with the same"
    ):
        beside_run(first, of_another_version(of_another_version(second, "pope"), "gqa"))


BENCHES = [*VQA_QUESTIONS, *LOC_QUESTIONS]


def text_of(question: Question, right: bool) -> str:
    if question.kind == "text":
        return question.answers[-1] if right else "no idea"
    assert question.box is not None
    assert question.image_wh is not None
    width, height = question.image_wh
    side = max(width, height)
    left, top = (side - width) / 2, (side - height) / 2
    x1, y1, x2, y2 = question.box
    box = [(x1 + left) / side, (y1 + top) / side, (x2 + left) / side, (y2 + top) / side]
    return str([round(edge, 3) for edge in box] if right else [0.0, 0.0, 0.01, 0.01])


def make_run(root: Path, name: str, wrong_of: tuple[str, ...] = (), connector: str = "mlp3") -> Path:
    """A run on disk that answered the tiny files of all eleven benchmarks; one box is always right."""
    run = RunFolder.create(root / "runs" / name, kind="train", config={"data": "llava_v1_5_mix665k.json"})
    write_json(run.path / "model/model.json", {"connector": connector, "llm": "mini"})
    data = root / "data"
    for benchmark in BENCHES:
        questions = load_benchmark(benchmark, root=data)
        answers = [
            Answer(
                id=q.id,
                image=q.image,
                prompt=q.prompt,
                text=text_of(q, benchmark not in wrong_of or (benchmark == "ocid_ref" and q is questions[0])),
            )
            for q in questions
        ]
        path = answers_path(run, benchmark, "none")
        path.parent.mkdir(parents=True)
        path.write_text(
            header(benchmark, len(questions), data_root=str(data)).line() + "".join(a.line() for a in answers)
        )
    return run.path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("beside")
    make_data_root(root / "data", images=False)
    return {
        "good": str(make_run(root, "good")),
        "bad": str(make_run(root, "bad", wrong_of=tuple(LOC_QUESTIONS))),
        "strange": str(make_run(root, "strange", connector="linear")),
    }


def run(*args: str) -> Result:
    return CliRunner().invoke(command, list(args), catch_exceptions=False, standalone_mode=False)


def test_the_command_beside_the_paper(runs: dict[str, str], tmp_path: Path) -> None:
    result = run(runs["good"], "--paper", "--csv", str(tmp_path / "lines.csv"))
    assert f"good beside {ROW.name} (IN1K COCO VMamba-S(f), 50M, 512x512)" in result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith("refcocog"))
    assert line.split()[:3] == ["refcocog", "100.00", "57.13"]
    assert "not as in the paper: its LLM is mini, the paper's Vicuna-7B" in result.stdout
    rows = list(csv.DictReader((tmp_path / "lines.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == [*BENCHES, "weighted_vqa", "weighted_loc", "weighted_overall", "macro"]
    assert rows[7]["marks"] == "partial: 3 of 10,834; prompts default; boxes exact"
    assert float(rows[7]["difference"]) == pytest.approx(100 - 65.09)
    assert float(rows[7]["difference_low95"]) == pytest.approx(100 - 65.09)


def test_the_command_raises_the_alarm(runs: dict[str, str]) -> None:
    result = run(runs["bad"], "--paper", "--json")
    found = json.loads(result.stdout)
    assert found[0]["alarm"].startswith(f"localization collapse of bad: boxes 13.6 where {ROW.name} has 47.4")
    assert "warning: localization collapse of bad" in run(runs["good"], runs["bad"]).stderr


def test_the_command_beside_another_run(runs: dict[str, str], tmp_path: Path) -> None:
    result = run(runs["good"], runs["bad"], "--csv", str(tmp_path / "lines.csv"))
    line = next(line for line in result.stdout.splitlines() if line.startswith("refcocog"))
    assert line.split()[:4] == ["refcocog", "100.00", "0.00", "+100.00"]
    rows = list(csv.DictReader((tmp_path / "lines.csv").read_text().splitlines()))
    assert (rows[0]["first_run"], rows[0]["second_run"], rows[0]["separable"]) == ("good", "bad", "")
    found = json.loads(run(runs["good"], runs["bad"], runs["strange"], "--json").stdout)
    assert [(one["first"], one["second"]) for one in found] == [
        ("good", "bad"),
        ("good", "strange"),
        ("bad", "strange"),
    ]


def test_the_command_says_which_benchmark_has_nothing_in_common(runs: dict[str, str], tmp_path: Path) -> None:
    for path in (make_data_root(tmp_path / "data", images=False) / "pope").iterdir():
        path.write_text(path.read_text().replace('"text": "', '"text": "So, '))
    result = run(runs["good"], str(make_run(tmp_path, "other")))
    assert "warning: pope: left out, the runs have answered no question of it in common: 12 questions with the" in (
        result.stderr
    )
    assert "tallyqa" in result.stdout
    assert "pope " not in result.stdout


def test_a_run_of_no_row_says_so_and_takes_the_one_that_is_named(runs: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"nothing can be compared with the paper.*strange: no row.*--row NAME"):
        run(runs["strange"], "--paper")
    both = run(runs["strange"], runs["good"], "--paper")
    assert "warning: strange: no row of the paper is vmamba-s-coco@512x512 with linear" in both.stderr
    assert "good beside" in both.stdout
    named = json.loads(run(runs["strange"], "--paper", "--row", ROW.name, "--json").stdout)
    assert "its connector is linear, the row's mlp3" in named[0]["remarks"]
    with pytest.raises(UnknownNameError, match="unknown row"):
        run(runs["good"], "--paper", "--row", "vit")


def test_a_row_that_collapsed_itself_is_named(runs: dict[str, str]) -> None:
    result = run(runs["bad"], "--paper", "--row", "vitdet-l-coco@1024/mlp2")
    assert "the paper calls this row itself a localization collapse" in result.stdout


def test_boxes_as_the_papers_evaluation_takes_them(runs: dict[str, str]) -> None:
    lines = json.loads(run(runs["good"], "--paper", "--boxes", "paper", "--json").stdout)[0]["lines"]
    marks = {line["name"]: line["marks"] for line in lines}
    assert marks["refcoco"] == ["partial: 3 of 10,834", "prompts default", "boxes paper"]


@pytest.mark.parametrize(
    ("names", "options", "match"),
    [
        (["good"], [], "one run alone"),
        (["good", "bad"], ["--row", ROW.name], "--row changes nothing"),
        (["good"], ["--paper", "--row", ROW.name, "--row", ROW.name], "2 rows for 1 runs"),
    ],
)
def test_options_that_do_not_go_together(
    runs: dict[str, str], names: list[str], options: list[str], match: str
) -> None:
    with pytest.raises(UsageError, match=match):
        run(*(runs[name] for name in names), *options)


def test_the_same_run_twice_is_an_error(runs: dict[str, str]) -> None:
    with pytest.raises(RunError, match="same name"):
        run(runs["good"], runs["good"])


def test_runs_and_rows_are_correlated_together(runs: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "PAPER_QUESTIONS", {})  # then the tiny files have all questions that there are
    arguments = [*runs.values(), "--published", "--columns", "gqa,loc,weighted_loc", "--json"]
    result = CliRunner().invoke(correlate, arguments, catch_exceptions=False, standalone_mode=False)
    found = json.loads(result.stdout)
    assert found["models"] == 102
    assert {pair["n"] for pair in found["pairs"]} == {102}
    assert "partial" not in result.stderr


def test_parts_of_benchmarks_are_not_correlated_with_published_rows(runs: dict[str, str]) -> None:
    arguments = [*runs.values(), "--published", "--columns", "gqa,loc,weighted_loc", "--json"]
    result = CliRunner().invoke(correlate, arguments, catch_exceptions=False, standalone_mode=False)
    assert json.loads(result.stdout)["models"] == 99
    assert "good, refcoco: left out, partial: 3 of 10,834" in result.stderr


def test_too_few_or_the_same_runs_are_not_correlated(runs: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="3 given, at least 4"):
        CliRunner().invoke(correlate, [*runs.values()], catch_exceptions=False, standalone_mode=False)
    with pytest.raises(UsageError, match="named twice"):
        CliRunner().invoke(correlate, [runs["good"], runs["good"]], catch_exceptions=False, standalone_mode=False)
