"""Do the eleven benchmarks ask what their published files have, worded as in the paper's evaluation?"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from benchmark_files import (
    BEACH,
    IMAGES,
    PILE,
    QUESTIONS,
    REAL_DATA,
    SHORT,
    TABLE,
    changed_root,
    make_data_root,
    real_pope_root,
    write_file,
)

from vlmx import cli
from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.ids import ImageTable
from vlmx.cache_specs.reader import open_cache
from vlmx.data import wording
from vlmx.data.benchmarks import BENCHMARKS, expand, load_benchmark
from vlmx.data.mini import questions, study
from vlmx.data.published import PUBLISHED
from vlmx.data.published_benchmarks import PUBLISHED_BENCHMARKS
from vlmx.data.records import Question
from vlmx.errors import UnknownNameError
from vlmx.evaluate.metrics.options import COUNTS, POPE
from vlmx.evaluate.score import grade
from vlmx.extract.sources import open_sources

REGION = "Please provide the bounding box coordinate of the region this sentence describes:"
UNKNOWN = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
COUNT = (
    "\nA. 0\nB. 1\nC. 2\nD. 3\nE. 4\nF. 5\nG. 6\nH. 7\nI. 8\nJ. 9\nK. 10\nL. 11\nM. 12\nN. 13\nO. 14\nP. 15"
    "\nAnswer with the option's letter from the given choices directly."
)
MAN = "coco/train2014/COCO_train2014_000000581857.jpg"
PHOTO_WITH_TEXT = "textvqa/train_images/003a8ae2ef43b901.jpg"

FIRST = {  # the first question of each benchmark of the small data root
    "vqav2": Question(
        id="262148000",
        benchmark="vqav2",
        image=BEACH,
        prompt=f"Where is he looking?{SHORT}",
        kind="text",
        question_type="where is the",
        answers=("at table", "skateboard", *["down"] * 8),
    ),
    "gqa": Question(
        id="201307251",
        benchmark="gqa",
        image="gqa/images/n161313.jpg",
        prompt=f"Is it overcast?{SHORT}",
        kind="text",
        question_type="verify",
        answers=("no",),
    ),
    "vizwiz": Question(
        id="VizWiz_val_00000000.jpg",
        benchmark="vizwiz",
        image="vizwiz/val/VizWiz_val_00000000.jpg",
        prompt=f"Ok. There is another picture I hope it is a better one.{UNKNOWN}{SHORT}",
        kind="text",
        question_type="unanswerable",
        answers=("poor image", *["unanswerable"] * 9),
    ),
    "textvqa_ocr": Question(
        id="34602",
        benchmark="textvqa_ocr",
        image=PHOTO_WITH_TEXT,
        prompt="What is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL, Single-Use" + SHORT + SHORT,
        kind="text",
        question_type="all",
        answers=("nous les gosses", *["dakota"] * 9),
    ),
    "textvqa": Question(
        id="34602",
        benchmark="textvqa",
        image=PHOTO_WITH_TEXT,
        prompt=f"What is the brand of this camera?{SHORT}",
        kind="text",
        question_type="all",
        answers=("nous les gosses", *["dakota"] * 9),
    ),
    "pope": Question(
        id="random/1",
        benchmark="pope",
        image="coco/val2014/COCO_val2014_000000310196.jpg",
        prompt=f"Is there a snowboard in the image?{SHORT}",
        kind="text",
        question_type="random",
        answers=("yes",),
        options=("Yes", "No"),
    ),
    "tallyqa": Question(
        id="30095774",
        benchmark="tallyqa",
        image="vg/VG_100K_2/2410408.jpg",
        prompt=f"How many headlights does the bus have?{COUNT}",
        kind="text",
        question_type="simple",
        answers=("2",),
        options=tuple("ABCDEFGHIJKLMNOP"),
    ),
    **{
        name: Question(
            id="3",
            benchmark=name,
            image=MAN,
            prompt=f"{REGION} left man.",
            kind="box",
            question_type="all",
            box=(6.0, 10.5, 24.0, 70.5),
            image_wh=(60, 80),
            object_boxes=((6.0, 10.5, 24.0, 70.5), (36.0, 12.0, 56.25, 68.0), (0.0, 70.0, 60.0, 80.0)),
        )
        for name in ("refcoco", "refcoco+", "refcocog")
    },
    "ocid_ref": Question(
        id="17",
        benchmark="ocid_ref",
        image=TABLE,
        prompt=f"{REGION} The apple on the left.",
        kind="box",
        question_type="free",
        box=(112.0, 130.0, 160.0, 180.0),
        image_wh=(640, 480),
    ),
}
VQAV2_QUESTIONS = "vqav2/v2_OpenEnded_mscoco_val2014_questions.json"
SQUARE = Geometry(mode="letterbox", height=64, width=64, fill=(0, 0, 0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_root(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", PUBLISHED_BENCHMARKS)
def test_questions_are_those_of_the_files(root: Path, name: str) -> None:
    asked = load_benchmark(name, root=root)
    assert asked[0] == FIRST[name]
    assert tuple(question.id for question in asked) == QUESTIONS[name]
    assert {question.benchmark for question in asked} == {name}
    assert {question.image for question in asked} <= set(IMAGES)


def test_the_other_parts_are_named_as_scores_name_them(root: Path) -> None:
    types = {name: Counter(q.question_type for q in load_benchmark(name, root=root)) for name in PUBLISHED_BENCHMARKS}
    assert types["pope"] == {"random": 4, "popular": 4, "adversarial": 4}
    assert types["tallyqa"] == {"simple": 2, "complex": 1}
    assert types["vizwiz"] == {"answerable": 2, "unanswerable": 1}
    assert types["ocid_ref"] == {"free": 1, "touching": 1, "stacked": 1}
    assert types["gqa"] == {"verify": 1, "query": 1, "choose": 1}
    assert set(types["vqav2"]) == {"where is the", "what are the", "how many", "is it"}


@pytest.mark.parametrize(
    ("take", "clutter"), [(0, "free"), (9, "free"), (10, "touching"), (16, "touching"), (17, "stacked")]
)
def test_clutter_is_told_by_the_take(tmp_path: Path, take: int, clutter: str) -> None:
    path = "ocid-ref/val_expressions.json"
    data = changed_root(tmp_path, path, lambda content: content["17"].update(take_id=take))
    assert load_benchmark("ocid_ref", root=data)[0].question_type == clutter


def test_the_paper_quotes_what_is_to_be_located_and_words_the_rest_alike(root: Path) -> None:
    for name in PUBLISHED_BENCHMARKS:
        usual, paper = load_benchmark(name, root=root), load_benchmark(name, root=root, wording="paper")
        if usual[0].kind == "text":
            assert paper == usual
        assert [q.id for q in paper] == [q.id for q in usual]
    assert load_benchmark("refcoco+", root=root, wording="paper")[1].prompt == f'{REGION} "man in a red hat"'
    located = [q.prompt for q in load_benchmark("ocid_ref", root=root, wording="paper")]
    assert located[:2] == [f'{REGION} "The apple on the left."', f'{REGION} "The red box touching the mug"']


def test_the_mini_study_asks_in_the_same_words() -> None:
    assert questions.SHORT_ANSWER == wording.SHORT_ANSWER == SHORT
    assert questions.BOX_REQUEST == wording.BOX_REQUEST == REGION


def test_only_one_period_follows_what_is_to_be_located(root: Path) -> None:
    assert [q.prompt.removeprefix(REGION) for q in load_benchmark("ocid_ref", root=root)] == [
        " The apple on the left.",
        " The red box touching the mug.",
        " The mug on top of the box.",
    ]


def test_options_are_those_of_the_scoring_rules_in_their_order(root: Path) -> None:
    pope, tally = load_benchmark("pope", root=root)[0], load_benchmark("tallyqa", root=root)[0]
    assert tuple(option.lower() for option in pope.options) == POPE.options
    assert len(tally.options) == len(COUNTS)
    assert [f"{letter}. {count}" for letter, count in zip(tally.options, COUNTS, strict=True)] == tally.prompt.split(
        "\n"
    )[1:-1]


def test_the_right_answer_scores_in_full_everywhere(root: Path) -> None:
    for name in PUBLISHED_BENCHMARKS:
        for question in load_benchmark(name, root=root):
            assert grade(question, right_text(question), SQUARE, box_rule="paper").value == 1.0, question.id


def right_text(question: Question) -> str:
    """What a perfect model says."""
    if question.kind == "box":
        (x1, y1, x2, y2), (width, height) = question.region
        return f"[{x1 / width:.3f}, {y1 / height:.3f}, {x2 / width:.3f}, {y2 / height:.3f}]"
    answer = Counter(question.answers).most_common()[0][0]
    if question.benchmark == "tallyqa":
        return question.options[int(answer)]
    return answer


def test_tables_and_counts_are_those_of_the_published_data() -> None:
    counts: dict[str, int | None] = {name: BENCHMARKS.get(name).questions for name in expand("paper")}
    assert counts == {
        "vqav2": 214_354,
        "gqa": 12_578,
        "vizwiz": 4_319,
        "textvqa_ocr": 5_000,
        "textvqa": 5_000,
        "pope": 8_910,
        "tallyqa": 38_589,
        "refcoco": 10_834,
        "refcoco+": 10_758,
        "refcocog": 4_896,
        "ocid_ref": 18_342,
    }
    assert sum(count for count in counts.values() if count is not None) == 333_580
    assert BENCHMARKS.get("textvqa_ocr").table == "textvqa"
    assert BENCHMARKS.get("ocid_ref").table == "ocid-ref"
    assert {BENCHMARKS.get(name).table for name in expand("paper")} < {each.table for each in PUBLISHED.values()}
    for each in PUBLISHED_BENCHMARKS.values():
        assert not each.parts or sum(each.parts.values()) == each.questions


def test_names_and_groups() -> None:
    assert expand("textvqa-ocr,ocid-ref,refcoco+") == ["textvqa_ocr", "ocid_ref", "refcoco+"]
    assert expand("loc") == ["refcoco", "refcoco+", "refcocog", "ocid_ref"]
    assert expand("paper") == list(PUBLISHED_BENCHMARKS) == [*expand("vqa"), *expand("loc")]
    assert expand("mini, pope, mini-count") == [*study.BENCHMARKS, "pope"]
    with pytest.raises(UnknownNameError, match="did you mean 'refcoco'"):
        expand("refcco")


def test_texts_keep_what_the_files_have(tmp_path: Path) -> None:
    asked = '  Wo ist "Zoë\'s" Café?\n'
    data = changed_root(tmp_path, VQAV2_QUESTIONS, lambda c: c["questions"][0].update(question=asked))
    assert load_benchmark("vqav2", root=data)[0].prompt == asked + SHORT


def test_equal_answers_are_one_object_in_memory(root: Path) -> None:
    answers = [answer for q in load_benchmark("vqav2", root=root) for answer in q.answers if answer == "down"]
    assert len(answers) == 8
    assert len({id(answer) for answer in answers}) == 1


def test_the_official_pope_questions_run_on_real_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = real_pope_root(tmp_path)
    asked = load_benchmark("pope", root=data)
    assert Counter(q.question_type for q in asked) == {"random": 12, "popular": 12, "adversarial": 12}
    assert Counter(q.answers for q in asked) == {("yes",): 18, ("no",): 18}
    (source,) = open_sources(["pope"], data_root=data)
    assert [record.key for record in source.images] == list(dict.fromkeys(q.image for q in asked))
    assert len(source.images) == 2
    assert all(record.load().startswith(b"\xff\xd8") for record in source.images)
    caches = tmp_path / "caches"
    encoder = ["--backbone", "vit-mini-scenes", "--weights", "random:0"]
    cli.main(["extract", *encoder, "--data", "pope", "--data-root", str(data), "--out", str(caches), "--threads", "1"])
    cache = open_cache(caches / capsys.readouterr().out.strip())
    table = ImageTable.open(caches, BENCHMARKS.get("pope").table)
    assert {table.id_of(question.image) for question in asked} == set(cache.ids)


def test_the_official_pope_files_are_read_whole(tmp_path: Path) -> None:
    data = real_pope_root(tmp_path)
    for path in (REAL_DATA / "pope").glob("*.json"):
        write_file(data, f"pope/{path.name}", [json.loads(line) for line in path.read_text().splitlines()])
    asked = load_benchmark("pope", root=data)
    assert len(asked) == 9000  # this version of the random split has 3,000 questions
    assert len({q.id for q in asked}) == 9000


def test_boxes_are_in_pixels_of_the_source_image(root: Path) -> None:
    boxes = {q.id: q.box for q in load_benchmark("refcocog", root=root)}
    assert boxes == {"3": (6.0, 10.5, 24.0, 70.5), "4": (6.0, 10.5, 24.0, 70.5), "6": (36.0, 12.0, 56.25, 68.0)}
    stacked = load_benchmark("ocid_ref", root=root)[2]
    assert (stacked.image, stacked.box) == (PILE, (300.0, 120.0, 380.0, 210.0))
