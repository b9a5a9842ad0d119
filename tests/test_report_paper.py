"""Does a report show the paper's benchmarks as the paper does? Tables, photos, maps and alarms, from real schemas."""

import csv
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from benchmark_files import make_data_root
from click.testing import CliRunner, Result

from vlmx.cache_specs.geometry import Geometry, convert_box
from vlmx.cache_specs.ids import ImageEntry, ImageTable, image_id
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.cache_specs.writer import CacheWriter
from vlmx.data.benchmarks import BENCHMARKS, load_benchmark
from vlmx.data.records import Question
from vlmx.errors import RunError, UsageError
from vlmx.evaluate.aggregate import LOC_QUESTIONS, VQA_QUESTIONS, published_rows
from vlmx.evaluate.answers import Answer, Header, answers_path, write_answers
from vlmx.evaluate.beside_run import beside_run, read_graded
from vlmx.evaluate.report.collect import collect
from vlmx.evaluate.report.command import report
from vlmx.evaluate.report.correlation import colors_of
from vlmx.evaluate.report.paper_table import escaped, printed
from vlmx.evaluate.report.plots import number_of
from vlmx.evaluate.report.published_plots import family_of
from vlmx.evaluate.report.samples import text_of
from vlmx.runs import RunFolder, write_json

GEOMETRY = Geometry(mode="letterbox", height=224, width=224, fill=(0, 0, 0))
SPEC = CacheSpec(
    backbone="vmamba-t-in1k",
    weights_sha256="ab" * 32,
    forward_version=1,
    feature="stage 3",
    out_norm="none",
    geometry=GEOMETRY,
    mean=(0, 0, 0),
    std=(1, 1, 1),
)
ALL = (*VQA_QUESTIONS, *LOC_QUESTIONS)
Answerer = Callable[[Question], str]


def right(question: Question) -> str:
    if question.kind == "text":
        return question.answers[-1]
    box, image_wh = question.region
    edges = convert_box(box, GEOMETRY, image_wh, "source", "padded_unit")
    return "[" + ", ".join(f"{edge:.3f}" for edge in edges) + "]"


def wrong_boxes(question: Question) -> str:
    return right(question) if question.kind == "text" else "[0.90, 0.90, 0.99, 0.99]"


def make_run(folder: Path, data: Path, benchmarks: tuple[str, ...], answer: Answerer) -> RunFolder:
    """A run of the row vmamba-t-in1k@224/mlp2."""
    run = RunFolder.create(folder, kind="train", config={"data": "llava_v1_5_mix665k.json"})
    write_json(run.path / "model/model.json", {"connector": "mlp2", "llm": "lmsys/vicuna-7b-v1.5", "grid": [14, 14]})
    for name in benchmarks:
        questions = load_benchmark(name, root=data)
        header = Header(
            benchmark=name,
            control="none",
            questions=len(questions),
            limit=None,
            model="cd" * 32,
            cache=SPEC.name,
            fingerprint=SPEC.fingerprint,
            encoder_weights=SPEC.weights_sha256,
            geometry=GEOMETRY.to_dict(),
            prompt_format="vicuna-v1",
            data_root=str(data),
        )
        answers = [Answer(id=q.id, image=q.image, prompt=q.prompt, text=answer(q)) for q in questions]
        write_answers(answers_path(run, name, "none"), header, answers)
    return run


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(report, [str(each) for each in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_root(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A folder with a report of a run that answered all eleven benchmarks, with published rows, and its cache."""
    folder = tmp_path_factory.mktemp("whole")
    questions = load_benchmark("refcoco", root=data)
    sizes = {q.image: q.region[1] for q in questions}
    entries = [ImageEntry(key=key, id=image_id(key.encode()), width=w, height=h) for key, (w, h) in sizes.items()]
    ImageTable.merge(folder / "caches", BENCHMARKS.get("refcoco").table, entries)
    tokens = np.random.default_rng(0).standard_normal((196, 4)).astype(np.float16)
    with CacheWriter(folder / "caches", SPEC, TokenShape(grid=(14, 14), dim=4)) as writer:
        for plan in writer.plan([entry.id for entry in entries]):
            writer.commit(plan, np.stack([tokens] * len(plan.ids)), {})
        writer.seal()
    run = make_run(folder / "vmamba", data, ALL, right)
    tables = ("--csv", folder / "t.csv", "--latex", folder / "t.tex", "--caches", folder / "caches")
    assert call(run.path, "--published", "-o", folder / "r.html", *tables).exit_code == 0
    return folder


def test_numbers_stand_beside_those_of_the_right_row(whole: Path) -> None:
    page = (whole / "r.html").read_text()
    assert "IN1K VMamba-T, 30M, 224x224" in page
    beside = page[page.index("Beside the paper") : page.index("Which encoder")]
    assert re.search(r"RefCOCO</th>\s*<td class=\"first-of-run\"><b>100.00</b>", beside)
    assert "<td>58.25</td>" in beside
    assert "+41.75" in beside
    assert "compared in the source image, the paper" in beside
    assert "boxes exact" in beside
    assert "weighted overall" in beside
    assert re.search(r"macro<span class=\"sub\">every benchmark the same", beside)
    alike = re.search(r"RefCOCO</th>.*?</tr>", beside, re.DOTALL)
    assert alike is not None  # every answer is right, so there is no interval to be outside of
    assert "answers worth the same" in alike[0]


def test_photos_and_maps_are_in_the_page(whole: Path, data: Path) -> None:
    page = (whole / "r.html").read_text()
    assert page.count("data:image/jpeg;base64,") > 8
    assert "image not at hand" not in page
    maps = page[page.index("Where are tokens like") : page.index("Samples and failures")]
    assert any(f"<h3><bdi>{text_of(q)}</bdi></h3>" in maps for q in load_benchmark("refcoco", root=data))
    assert "vmamba-t-in1k@224x224" in maps
    assert "data:image/png;base64," in maps
    addresses = set(re.findall(r"""(?:src|href)=["']([^"']{0,24})""", page))
    assert all(address.startswith(("data:image/", "#")) for address in addresses)


def test_too_few_questions_are_marked_everywhere(whole: Path) -> None:
    page = (whole / "r.html").read_text()
    assert "<b>Partial.</b>" in page
    assert "3 of 10,834" in page
    assert "100.00†" in page
    assert re.search(r"<b>100\.0</b>†.*partial: 7 of 7 benchmarks", page)  # averages
    assert "vmamba †</text>" in page  # the star
    assert "Outlined bar" in page
    rows = list(csv.DictReader((whole / "t.csv").read_text().splitlines()))
    assert "refcoco: 3 of 10,834" in rows[0]["remarks"]
    assert r"100.00\textsuperscript{\textdagger}" in (whole / "t.tex").read_text()


def test_the_csv_has_the_columns_and_rows_of_the_paper(whole: Path) -> None:
    rows = list(csv.DictReader((whole / "t.csv").read_text().splitlines()))
    published = published_rows()
    assert list(rows[0]) == [*published[0].model, *_columns(), "run", "remarks"]
    assert (rows[0]["run"], rows[0]["encoder"], rows[0]["params"], rows[0]["tokens"]) == (
        "vmamba",
        "VMamba-T",
        "30M",
        "196",
    )
    assert len(rows) == 1 + 99
    for row, paper in zip(rows[1:], published, strict=True):
        assert {name: row[name] for name in paper.model} == paper.model
        assert {name: float(row[name]) for name in ALL} == paper.scores
        assert float(row["weighted_overall"]) == paper.weighted_overall
    assert rows[1]["textvqa"] == "12.30"


def _columns() -> list[str]:
    return [*VQA_QUESTIONS, "weighted_vqa", *LOC_QUESTIONS, "weighted_loc", "weighted_overall"]


def test_latex_has_the_papers_rows_with_the_best_in_bold(tmp_path: Path) -> None:
    call("--published", "-o", tmp_path / "r.html", "--latex", tmp_path / "t.tex")
    text = (tmp_path / "t.tex").read_text()
    first = (
        r"IN1K & ViT-S & 22M & 224$\times$224 & 196 & 59.86 & 50.48 & 46.69 & 44.02 & 12.30 & 77.76 & 48.96 & 57.25 \\"
    )
    assert first in text
    assert r"1333$\times$800 & 4150 & 60.24" in text
    assert (
        r"\textbf{78.83} & \textbf{70.25} & \textbf{75.29} & \textbf{49.50} & \textbf{64.38} & \textbf{74.22}" in text
    )
    assert "DINOv2-L/SigLIP-SO400M(f)" in text
    floats = text.split(r"\end{table*}")[:-1]
    assert len(floats) == text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2 * 3
    rows = [line for line in text.splitlines() if r"$\times$" in line]
    assert [line.count("&") for line in rows] == [12] * 99 + [10] * 99
    assert max(part.count(r"$\times$") for part in floats) == 45
    assert [part.count("continued") for part in floats] == [0, 1, 1, 0, 1, 1]


@pytest.mark.skipif(
    shutil.which("kpsewhich") is None or subprocess.run(["kpsewhich", "booktabs.sty", "graphicx.sty"]).returncode != 0,
    reason="needs LaTeX with booktabs and graphicx",
)
def test_latex_fits_the_page(tmp_path: Path, data: Path) -> None:
    names = ("a" * 70, 'b <i> | \N{CJK UNIFIED IDEOGRAPH-65E5} é"~', "c")
    runs = [make_run(tmp_path / name, data, ALL, right).path for name in names]
    call(*runs, "--published", "-o", tmp_path / "r.html", "--latex", tmp_path / "t.tex", "--caches", tmp_path)
    assert r"VMamba-T (run 1) &" in (tmp_path / "t.tex").read_text()
    (tmp_path / "page.tex").write_text(
        r"\documentclass[twocolumn]{article}\usepackage[letterpaper,textwidth=7in]{geometry}"
        r"\usepackage{booktabs,graphicx}\begin{document}\input{t.tex}\end{document}"
    )
    made = subprocess.run(["pdflatex", "-halt-on-error", "page.tex"], cwd=tmp_path, capture_output=True, timeout=60)
    log = made.stdout.decode(errors="replace")
    assert made.returncode == 0, log
    assert "Overfull" not in log
    assert "too large" not in log


def test_published_rows_alone_make_a_page(tmp_path: Path) -> None:
    assert call("--published", "-o", tmp_path / "r.html").exit_code == 0
    page = (tmp_path / "r.html").read_text()
    assert page.count('<th scope="row" class="model">') == 99
    assert ">0.97</td>" in page  # VQA-v2 and GQA
    assert "Samples and failures" not in page
    assert len(page) < 500_000
    with pytest.raises(RunError, match="nothing to report"):
        call("-o", tmp_path / "none.html")


def test_collapsed_boxes_raise_the_alarm(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One image proves no collapse; these boxes shall stand for those of many images.
    monkeypatch.setattr("vlmx.evaluate.beside.highest_of_equal", lambda box, images: box)
    run = make_run(tmp_path / "bad", data, ("vqav2", "gqa", "refcoco", "refcoco+"), wrong_boxes)
    result = call(run.path, "-o", tmp_path / "r.html", "--caches", tmp_path)
    assert "localization collapse of bad" in result.output
    assert "Localization collapse of bad" in (tmp_path / "r.html").read_text()


def test_report_and_compare_rank_alike(tmp_path: Path, data: Path) -> None:
    """VQA-v2 has 64 % of the paper's questions, and as many as any other in these tiny files."""
    benchmarks = ("vqav2", "gqa", "tallyqa", "refcoco")
    big = make_run(tmp_path / "big", data, benchmarks, lambda q: right(q) if q.benchmark == "vqav2" else "no idea")
    others = make_run(
        tmp_path / "others", data, benchmarks, lambda q: "no idea" if q.benchmark == "vqav2" else right(q)
    )
    found = collect([others, big], caches=tmp_path)
    (ranking,) = [one for one in found.rankings if one.group == "VQA"]
    assert (ranking.steps[0].first, ranking.steps[0].second) == ("big", "others")
    lines = {line.name: line.difference for line in beside_run(read_graded(others), read_graded(big)).averages}
    assert found.pairs[0]["VQA"] == lines["weighted_vqa"]
    assert found.pairs[0]["VQA"].points < 0
    pooled = {run.name: run.pooled["VQA"].score for run in found.runs}
    assert pooled["big"] == pytest.approx(lines["weighted_vqa"].second_percent)
    assert pooled["big"] == pytest.approx(found.runs[1].averages.vqa_exact if found.runs[1].averages else 0)


@pytest.mark.parametrize("benchmarks", [("vqav2", "tallyqa"), ("refcoco", "ocid_ref")])
def test_only_words_or_only_boxes(tmp_path: Path, data: Path, benchmarks: tuple[str, ...]) -> None:
    run = make_run(tmp_path / "part", data, benchmarks, right)
    files = ("--csv", tmp_path / "t.csv", "--latex", tmp_path / "t.tex", "--scores", tmp_path / "s.csv")
    assert call(run.path, "-o", tmp_path / "r.html", "--caches", tmp_path, "--boxes", "paper", *files).exit_code == 0
    (row,) = csv.DictReader((tmp_path / "t.csv").read_text().splitlines())
    assert {name for name in ALL if row[name]} == set(benchmarks)
    assert row["weighted_overall"] == ""
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 3


def test_a_row_that_is_named(tmp_path: Path, data: Path) -> None:
    run = make_run(tmp_path / "run", data, ("refcoco",), right)
    named = ("--row", "vmamba-s-coco@512/mlp3", "--csv", tmp_path / "t.csv")
    call(run.path, "-o", tmp_path / "r.html", "--caches", tmp_path, *named)
    page = (tmp_path / "r.html").read_text()
    assert "VMamba-S(f), 50M, 512x512" in page
    assert "its connector is mlp2, the row" in page
    (row,) = csv.DictReader((tmp_path / "t.csv").read_text().splitlines())
    assert (row["encoder"], row["connector"]) == ("VMamba-T", "mlp2")  # what it is, not what it is compared with
    with pytest.raises(UsageError, match="2 rows for 1 runs"):
        call(run.path, "--row", "a", "--row", "b")


def test_a_run_named_like_a_formula_with_a_damaged_photo(tmp_path: Path, data: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(data, root)
    for key in {question.image for question in load_benchmark("vqav2", root=data)}:
        (root / key).write_bytes((root / key).read_bytes()[:100])
    run = make_run(tmp_path / "run $^$", root, ALL, right)
    result = call(run.path, "--published", "-o", tmp_path / "r.html", "--caches", tmp_path)
    assert result.exit_code == 0
    assert "cannot read" in result.stderr
    page = (tmp_path / "r.html").read_text()
    assert "run $^$ †</text>" in page
    assert "image not at hand" in page
    assert page.count("data:image/jpeg;base64,") > 5


def test_photos_elsewhere_or_nowhere(tmp_path: Path, data: Path) -> None:
    run = make_run(tmp_path / "run", data, ("vqav2",), right)
    without = make_data_root(tmp_path / "no_images", images=False)
    found = collect([run], caches=tmp_path, data_root=without)
    assert found.data_roots == {"vqav2": without}
    assert collect([run], caches=tmp_path).data_roots == {"vqav2": data}
    call(run.path, "-o", tmp_path / "r.html", "--caches", tmp_path, "--data-root", without)
    assert "image not at hand" in (tmp_path / "r.html").read_text()


def test_a_long_answer_is_cut_and_right_to_left_text_stays_in_its_place(tmp_path: Path, data: Path) -> None:
    run = make_run(tmp_path / "run", data, ("vqav2",), lambda _: "\N{RIGHT-TO-LEFT OVERRIDE}" + "x" * 2000)
    call(run.path, "-o", tmp_path / "r.html", "--caches", tmp_path)
    page = (tmp_path / "r.html").read_text()
    assert f"<bdi>\N{RIGHT-TO-LEFT OVERRIDE}{'x' * 599}… (1,401 more characters)</bdi>" in page


def test_the_alarm_tells_what_the_run_itself_has_not(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row has 512 x 512, the run 224 x 224."""
    # One image proves no collapse; these boxes shall stand for those of many images.
    monkeypatch.setattr("vlmx.evaluate.beside.highest_of_equal", lambda box, images: box)
    run = make_run(tmp_path / "bad", data, ("vqav2", "gqa", "refcoco", "refcoco+"), wrong_boxes)
    arguments = (run.path, "-o", tmp_path / "r.html", "--caches", tmp_path, "--row", "vmamba-s-coco@512/mlp3")
    assert "square input, a cache at --res 512" in call(*arguments).output


def test_tables_mark_parts_and_name_runs_that_look_alike(tmp_path: Path, data: Path) -> None:
    benchmarks = ("vqav2", "refcoco")
    runs = [make_run(tmp_path / name, data, benchmarks, right).path for name in ("a_1", "a_2")]
    files = ("--latex", tmp_path / "t.tex", "--scores", tmp_path / "s.csv")
    result = call(*runs, "-o", tmp_path / "r.html", "--caches", tmp_path, *files)
    (row,) = [line.split() for line in result.output.splitlines() if line.startswith("a_1 ")]
    assert row == ["a_1", "100.0†", "100.0†", "100.0†", "100.0†", "100.0†"]
    words, boxes = (tmp_path / "t.tex").read_text().split(r"\end{table*}")[:2]
    assert r"VMamba-T (a\_1) &" in words
    assert r"VMamba-T (a\_2) &" in words
    assert "refcoco" not in words
    assert "vqav2" not in boxes
    score = next(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    assert (score["benchmark"], score["part"], score["boxes"]) == ("refcoco", "3 of 10,834", "exact")
    assert [score[name] for name in ("wording", "subset", "dtype", "exact")] == ["default", "", "fp32", "False"]


def test_an_average_over_fewer_benchmarks_says_so(tmp_path: Path, data: Path) -> None:
    more = make_run(tmp_path / "more", data, ("vqav2", "gqa", "refcoco"), right)
    less = make_run(tmp_path / "less", data, ("vqav2",), right)
    call(more.path, less.path, "-o", tmp_path / "r.html", "--caches", tmp_path)
    found = collect([more, less], caches=tmp_path)
    assert found.parts_of(found.runs[0], "VQA") == ("partial: 2 of 2 benchmarks",)
    assert found.parts_of(found.runs[1], "VQA") == ("over 1 of 2 benchmarks", "partial: 1 of 1 benchmarks")
    page = (tmp_path / "r.html").read_text()
    assert page.count("over 1 of 2 benchmarks") == 1
    pairs = page[page.index("Every pair of runs") : page.index("Samples and failures")]
    shared = f"{len(load_benchmark('vqav2', root=data))} questions of vqav2"
    assert shared in pairs
    assert "no question in common" in pairs  # of boxes
    assert f"both runs answered {shared}." in page


def test_runs_that_look_alike_are_told_apart(tmp_path: Path, data: Path) -> None:
    """There are eight colours."""
    runs = [make_run(tmp_path / f"seed{number}", data, ("vqav2",), right).path for number in range(9)]
    call(*runs, "--published", "-o", tmp_path / "r.html", "--caches", tmp_path)
    page = (tmp_path / "r.html").read_text()
    results = page[page.index("<h2>Results") : page.index("Among the paper")]
    assert re.search(r">9</span>seed8<span class=\"sub\">vmamba-t-in1k, mlp2</span></th>", results)
    assert results.count("number") >= 9
    assert re.search(r">9</text>", results)  # in its bar
    assert "IN1K, VMamba-T, mlp2, 30M" in page[page.index("All rows") :]


def test_small_things() -> None:
    assert [printed(value) for value in (12.345, 0.005, 7)] == ["12.35", "0.01", "7.00"]
    assert escaped("a_b & 50% {x}") == r"a\_b \& 50\% \{x\}"
    assert (
        escaped('<b>|"é\N{CJK UNIFIED IDEOGRAPH-65E5}') == r"\textless{}b\textgreater{}\textbar{}\textquotedblright{}é?"
    )
    assert escaped("Łódź naïve — nguyễn \u037e") == "Łódź naïve — nguy?n ?"
    assert [number_of(8, 9), number_of(7, 8)] == ["9", ""]
    assert family_of("ViTDet-B")[0] == "ViTDet"
    assert family_of("ViT-B")[0] == "ViT"
    assert family_of("DINOv2-L/CLIP-L")[0] == "contrastive, self-supervised"
    assert colors_of(0.0)[1] == "#000000"
    assert colors_of(1.0)[1] == "#ffffff"
