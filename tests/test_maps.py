"""Do similarity maps compare the right tokens, in the right place of a photo? On caches with tokens known by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
from benchmark_files import make_data_root
from click.testing import CliRunner, Result

from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.ids import ImageEntry, ImageTable, image_id
from vlmx.cache_specs.reader import open_cache
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.cache_specs.writer import CacheWriter
from vlmx.data.benchmarks import load_benchmark
from vlmx.data.mini.study import image_bytes_of
from vlmx.errors import DataError, UsageError, VlmxError
from vlmx.evaluate.answers import Answer, Header, answers_path, write_answers
from vlmx.evaluate.correlate import Cell, Correlation
from vlmx.evaluate.correlate_plot import heat_map
from vlmx.evaluate.maps import cell_shares, check_box, region_map, similarity
from vlmx.evaluate.maps_command import maps
from vlmx.evaluate.maps_plot import Panel, draw_maps, pixels_of, save_figure, scale_of
from vlmx.evaluate.maps_region import find_image, region_of_question
from vlmx.evaluate.score import questions_of
from vlmx.runs import RunFolder

SQUARE = Geometry(mode="letterbox", height=64, width=64, fill=(9, 9, 9))
WIDE_WH = (128, 64)  # in a square input: 16 rows of padding above and below
WIDE = image_id(b"a wide photo")
KEY = "test/000002"  # 64 x 64
SCENE = image_id(image_bytes_of(KEY))


def make_cache(root: Path, backbone: str, tokens_ND: np.ndarray, grid: tuple[int, int], geometry: Geometry) -> str:
    spec = CacheSpec(
        backbone=backbone,
        weights_sha256="ab" * 32,
        forward_version=1,
        feature="by hand",
        out_norm="none",
        geometry=geometry,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        dtype="float32",
    )
    with CacheWriter(root, spec, TokenShape(grid=grid, dim=tokens_ND.shape[1])) as writer:
        for plan in writer.plan([WIDE, SCENE]):
            writer.commit(plan, np.stack([tokens_ND.astype(np.float32)] * len(plan.ids)), {})
        writer.seal()
    return spec.name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of two encoders with a 4 x 4 grid, and tables of a wide photo and of a scene of the mini study."""
    folder = tmp_path_factory.mktemp("maps")
    caches = folder / "caches"
    by_row = np.repeat(np.eye(4), 4, axis=0)  # the tokens of a row are equal, those of two rows are at right angles
    make_cache(caches, "rows", by_row, (4, 4), SQUARE)
    make_cache(caches, "columns", np.tile(np.eye(4), (4, 1)), (4, 4), SQUARE)
    ImageTable.merge(caches, "wide", [ImageEntry(key="a/wide.jpg", id=WIDE, width=128, height=64)])
    ImageTable.merge(caches, "mini", [ImageEntry(key=KEY, id=SCENE, width=64, height=64)])
    return folder


def call(root: Path, *arguments: str) -> Result:
    options = ["--caches", str(root / "caches"), "-o", str(root / "out.svg")]
    return CliRunner().invoke(maps, [*arguments, *options], catch_exceptions=False)


def test_cosine_with_the_weighted_mean() -> None:
    tokens_ND = np.array([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [0.0, 0.0]])
    found = similarity(tokens_ND, np.array([1.0, 0.0, 0.0, 0.0]))
    assert found.tolist() == [1.0, 0.0, -1.0, 0.0]
    half = similarity(tokens_ND, np.array([5.0, 2.0, 0.0, 0.0]))  # their mean is along (1, 1)
    assert half == pytest.approx([math.sqrt(0.5), math.sqrt(0.5), -math.sqrt(0.5), 0.0])


def test_share_of_each_cell_in_a_box() -> None:
    shares = cell_shares((16.0, 0.0, 40.0, 24.0), (4, 4), SQUARE)  # cells of 16 x 16 pixels
    assert shares.tolist() == [[0, 1, 0.5, 0], [0, 0.5, 0.25, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    tall = Geometry(mode="letterbox", height=100, width=20, fill=(0, 0, 0))
    assert cell_shares((10.0, 0.0, 20.0, 50.0), (2, 1), tall).tolist() == [[0.5], [0.0]]


def test_letterbox_puts_a_box_into_the_right_row(root: Path) -> None:
    reader = open_cache("rows", root / "caches")
    upper = region_map(reader, WIDE, (0, 0, 128, 32), WIDE_WH)  # the photo fills rows 1 and 2 of the 4
    assert upper.share_RC.tolist() == [[0] * 4, [1] * 4, [0] * 4, [0] * 4]
    assert upper.similarity_RC[1].tolist() == [1, 1, 1, 1]
    assert not upper.similarity_RC[[0, 2, 3]].any()
    assert upper.extent == (0, -32, 128, 96)
    assert upper.photo_share_RC.sum(axis=1).tolist() == [0, 4, 4, 0]
    assert (upper.inside, upper.outside, upper.area_under_roc) == (1.0, 0.0, 1.0)


def test_a_box_smaller_than_a_cell_and_one_of_the_whole_photo(root: Path) -> None:
    reader = open_cache("columns", root / "caches")
    small = region_map(reader, WIDE, (1, 1, 3, 3), WIDE_WH)
    assert small.similarity_RC[:, 0].tolist() == [1, 1, 1, 1]
    assert small.area_under_roc == pytest.approx(13 / 14)  # ties with the cell below it
    whole = region_map(reader, WIDE, (0, 0, 128, 64), WIDE_WH)
    assert math.isnan(whole.outside)
    assert whole.area_under_roc is None
    assert whole.inside == pytest.approx(0.5)


def test_a_cropped_border_has_no_tokens(tmp_path: Path) -> None:
    cropping = Geometry(mode="letterbox", height=64, width=64, fill=(0, 0, 0), crop_pct=0.5)
    make_cache(tmp_path, "centre", np.eye(16), (4, 4), cropping)
    reader = open_cache("centre", tmp_path)
    with pytest.raises(UsageError, match="sees only the centre"):
        region_map(reader, WIDE, (0, 0, 10, 10), (128, 128))
    assert region_map(reader, WIDE, (32, 32, 48, 48), (128, 128)).share_RC[0, 0] == 1


@pytest.mark.parametrize(
    ("box", "what"),
    [((5, 5, 5, 9), "is empty"), ((5, 5, 2, 9), "is empty"), ((0, 0, 200, 9), "beyond"), ((-3, 0, 9, 9), "beyond")],
)
def test_boxes_that_are_none(box: tuple[float, float, float, float], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        check_box(box, WIDE_WH)


def test_all_maps_share_one_scale(root: Path) -> None:
    both = [region_map(open_cache(name, root / "caches"), WIDE, (0, 0, 9, 9), WIDE_WH) for name in ("rows", "columns")]
    assert scale_of(both) == (0.0, 1.0)
    flat = region_map(open_cache("rows", root / "caches"), WIDE, (0, 0, 128, 32), WIDE_WH)
    object.__setattr__(flat, "similarity_RC", np.ones((4, 4)))
    low, high = scale_of([flat])
    assert low < 1.0 < high


def test_the_command_draws_caches_side_by_side(root: Path) -> None:
    region = ("--image", "a/wide.jpg", "--box", "0,0,128,32")
    result = call(root, "--cache", "rows", "--cache", "columns", *region)
    rows = [line.split()[:7] for line in result.output.splitlines() if line.startswith(("rows@", "columns@"))]
    assert rows[0][:7] == ["rows@64x64", "4", "x", "4", "1.000", "0.000", "1.000"]
    assert rows[1][:7] == ["columns@64x64", "4", "x", "4", "0.500", "0.500", "0.500"]
    first = (root / "out.svg").read_bytes()
    call(root, "--cache", "rows", "--cache", "columns", *region)
    assert (root / "out.svg").read_bytes() == first
    padded = call(root, "--cache", "rows", *region, "--frame", "padded")
    assert padded.exit_code == 0
    assert (root / "out.svg").read_bytes() != first


def test_dollar_signs_are_drawn_as_they_are_written(root: Path) -> None:
    found = region_map(open_cache("rows", root / "caches"), WIDE, (0, 0, 128, 32), WIDE_WH)
    text = r"the $^$ and \$ or $\frac$"
    figure = draw_maps([Panel(title=text, region=found)], title=text)
    assert save_figure(figure, ".png")[:4] == b"\x89PNG"
    cells = {("$^$", "b"): Cell(r=0.5, interval95=(0.1, 0.9), n=9)}
    heat = heat_map(Correlation(columns=("$^$", "b"), pairs=cells, models=9, interval="fisher"), title=text)
    assert save_figure(heat, ".svg")[:5] == b"<?xml"


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_with_a_photo_in_other_formats(root: Path, suffix: str) -> None:
    photo, out = root / "photo.ppm", root / f"out{suffix}"
    photo.write_bytes(image_bytes_of(KEY))
    arguments = ["--cache", "rows", "--image", SCENE, "--box", "4,4,8,8", "--photo", str(photo), "-o", str(out)]
    result = CliRunner().invoke(maps, [*arguments, "--caches", str(root / "caches")], catch_exceptions=False)
    assert result.exit_code == 0
    assert out.read_bytes()[:5] in (b"\x89PNG\r", b"%PDF-")


def test_photos_are_read_as_stored() -> None:
    pixels = pixels_of(b"P6\n2 1\n255\n" + bytes([1, 2, 3, 4, 5, 6]), name="it")
    assert pixels.tolist() == [[[1, 2, 3], [4, 5, 6]]]
    for unreadable in (b"no image", b"P6\n40000 40000\n255\n"):  # the second one is too large to be decoded
        with pytest.raises(DataError, match="cannot read it") as raised:
            pixels_of(unreadable, name="it")
        assert "BytesIO" not in str(raised.value)


def header_of(benchmark: str, questions: int, cache: str, data_root: str = "") -> Header:
    return Header(
        benchmark=benchmark,
        control="none",
        questions=questions,
        limit=None,
        model="cd" * 32,
        cache=cache,
        fingerprint="ef" * 32,
        encoder_weights="ab" * 32,
        geometry=SQUARE.to_dict(),
        prompt_format="plain",
        data_root=data_root,
    )


def make_run(root: Path, cache: str, text: str) -> RunFolder:
    """A run that has answered one question about the scene, and another one elsewhere."""
    run = RunFolder.create(root / "runs" / cache.partition("@")[0], kind="train", config={})
    questions = questions_of("mini-ref-plain")
    header = header_of("mini-ref-plain", len(questions), cache)
    chosen = [next(q for q in questions if q.image == KEY), questions[0]]
    answers = [Answer(id=q.id, image=q.image, prompt=q.prompt, text=text) for q in chosen]
    write_answers(answers_path(run, "mini-ref-plain", "none"), header, answers)
    return run


def test_a_question_of_runs(root: Path) -> None:
    caches = [open_cache(name, root / "caches").spec.name for name in ("rows", "columns")]
    first, second = (make_run(root, cache, "[0.10, 0.10, 0.60, 0.60]") for cache in caches)
    question = next(q for q in questions_of("mini-ref-plain") if q.image == KEY)
    runs = ["--run", str(first.path), "--run", str(second.path)]
    by_id = call(root, *runs, "--question", question.id)
    assert by_id.exit_code == 0
    drawn = (root / "out.svg").read_bytes()
    phrase = question.prompt.rpartition(": ")[2].upper()
    call(root, *runs, "--question", phrase)
    assert (root / "out.svg").read_bytes() == drawn
    with pytest.raises(UsageError, match="is in 2 questions") as raised:
        call(root, *runs, "--question", "bounding box")
    assert raised.value.fix == "give the id of one of them, or more of its text"
    with pytest.raises(UsageError, match="no box question like 'zebra'"):
        call(root, *runs, "--question", "zebra")
    with pytest.raises(UsageError, match="--box cannot be given"):
        call(root, *runs, "--question", "x", "--box", "1,1,2,2")


def test_an_answer_that_is_no_box_is_said(root: Path) -> None:
    texts = {"rows": "[0.10, 0.10, 0.60, 0.60]", "columns": "on the left"}
    runs = []
    for backbone, text in texts.items():
        run = make_run(root / "boxes", open_cache(backbone, root / "caches").spec.name, text)
        runs += ["--run", str(run.path)]
    question = next(q for q in questions_of("mini-ref-plain") if q.image == KEY)
    shown = [line for line in call(root, *runs, "--question", question.id).output.splitlines() if "@64x64" in line]
    assert [line.endswith("the answer is not a box") for line in map(str.rstrip, shown)] == [False, True]
    assert (root / "out.svg").read_bytes().count(b"<!-- the answer is not a box -->") == 1
    assert "remark" not in call(root, *runs[:2], "--question", question.id).output


def test_an_id_of_several_benchmarks_is_not_guessed(root: Path, tmp_path: Path) -> None:
    data, elsewhere = make_data_root(tmp_path / "data", images=False), tmp_path / "none"
    run = RunFolder.create(tmp_path / "run", kind="train", config={})
    cache = open_cache("rows", root / "caches").spec.name
    for name in ("refcoco", "refcoco+", "vqav2"):
        questions = load_benchmark(name, root=data)
        answers = [Answer(id=q.id, image=q.image, prompt=q.prompt, text="x") for q in questions]
        if name == "vqav2":  # has no boxes, so nobody looks into it
            answers = [Answer(id="no question", image="x", prompt="x", text="x")]
        write_answers(
            answers_path(run, name, "none"), header_of(name, len(questions), cache, data_root=str(elsewhere)), answers
        )
    shared = next(iter({q.id for q in load_benchmark("refcoco", root=data)}))
    of_plus = next(q for q in load_benchmark("refcoco+", root=data) if q.id == shared)
    with pytest.raises(UsageError, match=rf"'{shared}' is in 2 questions of refcoco, refcoco\+.*--bench NAME"):
        region_of_question([run], shared, str(root / "caches"), data_root=data)
    phrase = of_plus.prompt.partition(": ")[2]
    with pytest.raises(UsageError, match=r"questions of refcoco, refcoco\+") as raised:
        region_of_question([run], phrase, str(root / "caches"), data_root=data)
    assert raised.value.fix.startswith("say which benchmark with --bench NAME, and give the id")
    ImageTable.merge(tmp_path / "caches", "refcoco+", [ImageEntry(key=of_plus.image, id=WIDE, width=9, height=9)])
    found = region_of_question([run], shared, str(tmp_path / "caches"), data_root=data, benchmark="refcoco+")
    assert found.box == of_plus.box
    with pytest.raises(UsageError, match="has no answers to 'refcocog'"):
        region_of_question([run], shared, str(root / "caches"), data_root=data, benchmark="refcocog")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache", "rows", "--image", WIDE, "--box", "1,2,3,4", "--bench", "gqa"], "--bench changes nothing"),
        (["--cache", "rows"], "no region is named"),
        (["--cache", "rows", "--image", "a/wide.jpg", "--box", "1,2,3"], "is not a box"),
        (["--cache", "rows", "--image", "a/wide.jpg", "--box", "1,2,0,3"], "is empty"),
        (["--cache", "rows", "--image", "a/wide.jpg", "--box", "1,2,300,3"], "ends beyond the photo"),
        (["--cache", "rows", "--image", "a/narrow.jpg", "--box", "1,2,3,4"], "has an image 'a/narrow.jpg'"),
        (["--cache", "rows", "--image", "12" * 32, "--box", "1,2,3,4"], "size of the photo is not known"),
        (["--cache", "rows", "--image", "12" * 32, "--box", "1,2,3,4", "--size", "64x64"], "1 of 1 images are not in"),
        (["--cache", "rows", "--image", "12" * 32, "--box", "1,2,3,4", "--size", "big"], "is not a size"),
        (["--cache", "rows", "--image", WIDE, "--box", "1,2,3,4", "--size", "64x64"], "do not agree"),
        (["--image", "a/wide.jpg", "--box", "1,2,3,4"], "no cache is named"),
        (["--cache", "rose", "--image", "a/wide.jpg", "--box", "1,2,3,4"], "rose"),
        (["--run", "x"], "--run and --question belong together"),
        (["--cache", "rows", "--image", "a/wide.jpg", "--box", "1,2,3,4", "-o", "x.bmp"], "cannot draw"),
    ],
)
def test_what_cannot_be_drawn(root: Path, arguments: list[str], message: str) -> None:
    options = ["--caches", str(root / "caches"), *([] if "-o" in arguments else ["-o", str(root / "no.png")])]
    with pytest.raises(VlmxError, match=message):
        CliRunner().invoke(maps, [*arguments, *options], catch_exceptions=False)
    assert not (root / "no.png").exists()


def test_an_equal_key_in_two_data_sets_is_not_guessed(tmp_path: Path) -> None:
    for name, size in (("one", 10), ("two", 20)):
        ImageTable.merge(tmp_path, name, [ImageEntry(key="x.jpg", id=image_id(name.encode()), width=size, height=size)])
    with pytest.raises(DataError, match="--data"):
        find_image("x.jpg", None, str(tmp_path))
    assert find_image("x.jpg", "two", str(tmp_path)) == (image_id(b"two"), (20, 20), "two")
