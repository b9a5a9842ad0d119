"""Is the page whole, offline and honest? Runs on disk, made from simulated answers, go through the real commands."""

import csv
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.cache_specs.writer import CacheWriter
from vlmx.data.records import Question
from vlmx.errors import RunError
from vlmx.evaluate import command as evaluate
from vlmx.evaluate.answers import Answer, Control, Header, answers_path, write_answers
from vlmx.evaluate.groups import subset
from vlmx.evaluate.maps_plot import pixels_of
from vlmx.evaluate.probe import ProbeResult, write_probe
from vlmx.evaluate.report.collect import collect
from vlmx.evaluate.report.command import report
from vlmx.evaluate.report.html import render
from vlmx.evaluate.report.pictures import png_of, smaller
from vlmx.evaluate.report.rankings import Contestant, is_balanced
from vlmx.evaluate.score import questions_of
from vlmx.runs import RunFolder, write_json

BENCHMARKS = ("mini-read", "mini-ref-plain")
GEOMETRY = Geometry(mode="letterbox", height=64, width=64, fill=(0, 0, 0))


def spec_of(encoder: str) -> CacheSpec:
    return CacheSpec(
        backbone=encoder,
        weights_sha256="ab" * 32,
        forward_version=1,
        feature="stage 2",
        out_norm="none",
        geometry=GEOMETRY,
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )


def text_of(question: Question, right: bool) -> str:
    if question.kind == "text":
        return question.answers[0] if right else "no idea <b>&"
    assert question.box is not None
    edges = question.box if right else (0.0, 0.0, 3.0, 3.0)
    return "[" + ", ".join(f"{edge / 64:.2f}" for edge in edges) + "]"


def make_run(root: Path, encoder: str, connector: str, right_of_ten: int, limit: int | None = 60) -> RunFolder:
    spec = spec_of(encoder)
    run = RunFolder.create(
        root / "runs" / f"{encoder}-{connector}", kind="train", config={"data": "mini", "optim": {"lr": 0.00123}}
    )
    run.set_status("done")
    for step in range(1, 40):
        run.log(step=step, loss=3 / step, lr=0.1)
    write_json(run.path / "model/model.json", {"connector": connector, "llm": "mini"})
    for benchmark in BENCHMARKS:
        questions = questions_of(benchmark)
        controls: tuple[tuple[Control, int], ...] = (("none", right_of_ten), ("shuffled", 1))
        for control, share in controls:
            header = Header(
                benchmark=benchmark,
                control=control,
                questions=len(questions),
                limit=limit,
                model="cd" * 32,
                cache=spec.name,
                fingerprint=spec.fingerprint,
                encoder_weights=spec.weights_sha256,
                geometry=GEOMETRY.to_dict(),
                prompt_format="plain",
            )
            answers = [
                Answer(id=q.id, image=q.image, prompt=q.prompt, text=text_of(q, number % 10 < share))
                for number, q in enumerate(subset(questions, limit))
            ]
            write_answers(answers_path(run, benchmark, control), header, answers)
    return run


@pytest.fixture(scope="module")
def study_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    for encoder, share in (("enc-a", 8), ("enc-b", 5)):
        with CacheWriter(root / "caches", spec_of(encoder), TokenShape(grid=(8, 8), dim=4)):
            pass
        for connector in ("mlp2", "mlp3"):
            make_run(root, encoder, connector, share)
    spec = spec_of("enc-a")
    result = ProbeResult(
        cache=spec.name,
        backbone="enc-a",
        fingerprint=spec.fingerprint,
        train_scenes=1000,
        test_scenes=400,
        position_r2=0.4321,
        objectness_auc=0.9,
        objectness_auc_position=0.7,
        box_hit=61.25,
        box_hit_position=20.0,
        box_iou=50.0,
        box_iou_position=30.0,
    )
    write_probe(root / "caches", result)
    return root


@pytest.fixture(scope="module")
def page(study_root: Path) -> str:
    runs = sorted(str(path) for path in (study_root / "runs").iterdir())
    out, table = study_root / "out/report.html", study_root / "out/scores.csv"
    arguments = [*runs, "-o", str(out), "--scores", str(table), "--caches", str(study_root / "caches")]
    result = CliRunner().invoke(report, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "enc-a > enc-b on boxes: +30.0 [" in result.output
    assert "mlp2 and mlp3 are not separable on VQA: +0.0 [0.0, 0.0]" in result.output
    assert str(out) in result.output
    assert "no linear probe of enc-b" in result.output
    return out.read_text()


def test_the_page_is_one_offline_file(page: str) -> None:
    addresses = set(re.findall(r"""(?:src|href)=["']([^"']{0,40})""", page))
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    outside = set(re.findall(r"https?://[^\s\"'<]+", page)) - {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert outside == set()
    assert "<script" not in page
    assert "@import" not in page
    assert len(page) < 1_500_000


def test_those_who_hear_the_page_know_what_is_where(page: str) -> None:
    assert all("scope=" in head for head in re.findall(r"<th[ >][^>]*", page))
    assert all("aria-label=" in box for box in re.findall(r'<div class="scroll[^>]*>', page))
    drawings = re.findall(r"<svg[^>]*>", page)
    assert len(drawings) > 4
    assert all("aria-label=" in svg or "aria-hidden=" in svg for svg in drawings)
    assert '<span class="vh">enc-a-mlp2</span>' in page  # beside a dot that says it by its colour


def test_answers_are_shown_as_text_not_as_markup(page: str) -> None:
    assert "no idea &lt;b&gt;&amp;" in page
    assert "no idea <b>" not in page


def test_every_number_has_its_origin(page: str) -> None:
    assert spec_of("enc-a").fingerprint in page
    assert "ab" * 32 in page  # weights of the encoder
    assert "cd" * 32 in page  # weights of the connector
    assert "lr: 0.00123" in page
    assert "platform:" in page
    assert "0.43" in page  # the probe
    assert "61.2" in page


def test_partial_scores_are_marked_everywhere(page: str) -> None:
    in_table, in_origins, in_remarks = 1, 1, 1
    assert page.count("60 of ") == len(BENCHMARKS) * 4 * (in_table + in_origins + in_remarks)
    assert "Partial." in page


def test_baselines_control_and_failures_are_on_the_page(page: str) -> None:
    assert page.count("shuffled 10.0") == len(BENCHMARKS) * 4
    assert "random object" in page
    assert page.count("\N{MULTIPLICATION SIGN} base") == len(BENCHMARKS) * 4
    assert "✗" in page
    assert "stroke-dasharray" in page  # true boxes
    assert page.count("data:image/png") >= 4


def test_the_same_runs_give_the_same_page(study_root: Path, page: str) -> None:
    runs = sorted(str(path) for path in (study_root / "runs").iterdir())
    again = study_root / "again.html"
    arguments = [*runs, "-o", str(again), "--caches", str(study_root / "caches")]
    CliRunner().invoke(report, arguments, catch_exceptions=False)
    assert again.read_text() == page


def test_the_scores_have_a_row_per_run_benchmark_and_control(study_root: Path, page: str) -> None:
    rows = list(csv.DictReader((study_root / "out/scores.csv").read_text().splitlines()))
    assert len(rows) == 4 * len(BENCHMARKS) * 2
    first = rows[0]
    assert (first["run"], first["benchmark"], first["control"], first["n"]) == ("enc-a-mlp2", "mini-read", "none", "60")
    assert float(first["low95"]) < float(first["score"]) == 80.0 < float(first["high95"])
    assert (first["partial"], first["fingerprint"]) == ("True", spec_of("enc-a").fingerprint)


def test_one_run_without_cache_and_boxes_still_makes_a_page(tmp_path: Path, study_root: Path) -> None:
    run = RunFolder.open(str(study_root / "runs/enc-a-mlp2"))
    alone = RunFolder.create(tmp_path / "alone", kind="train", config={})
    target = answers_path(alone, "mini-read", "none")
    target.parent.mkdir(parents=True)
    target.write_bytes(answers_path(run, "mini-read", "none").read_bytes())
    out = tmp_path / "r.html"
    arguments = [str(alone.path), "-o", str(out), "--caches", str(tmp_path)]
    result = CliRunner().invoke(report, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "is not at hand" in result.output
    assert "One run alone has no order." in out.read_text()


def test_the_mini_study_stands_beside_the_papers_benchmarks(tmp_path: Path, study_root: Path) -> None:
    run = str(study_root / "runs/enc-a-mlp2")
    files = ["--csv", str(tmp_path / "t.csv"), "--latex", str(tmp_path / "t.tex"), "--caches", str(tmp_path)]
    CliRunner().invoke(report, [run, "--published", "-o", str(tmp_path / "r.html"), *files], catch_exceptions=False)
    ours, *published = csv.DictReader((tmp_path / "t.csv").read_text().splitlines())
    assert list(ours)[-5:] == ["weighted_overall", *BENCHMARKS, "run", "remarks"]
    assert [ours[name] for name in ("vqav2", *BENCHMARKS)] == ["", "80.00", "80.00"]
    assert {row["mini-read"] for row in published} == {""}
    *of_paper, of_mini = (tmp_path / "t.tex").read_text().split(r"\begin{table*}")[1:]
    assert r"80.00\textsuperscript{\textdagger} & 80.00" in of_mini
    assert "ViT-S" not in of_mini
    assert not any("enc-a" in part for part in of_paper)
    assert "The last 2 columns: benchmarks that the paper does not have." in (tmp_path / "r.html").read_text()


def test_each_score_stands_against_the_baseline_of_its_own_questions(tmp_path: Path) -> None:
    few = make_run(tmp_path, "few", "mlp2", 8, limit=20)
    more = make_run(tmp_path, "more", "mlp2", 8, limit=60)
    found = collect([few, more], caches=tmp_path)
    small, large = (run.scores["mini-read"].baselines["prior"] for run in found.runs)
    assert small != large
    assert found.baselines_of("mini-read")["prior"] == large
    page = render(found)
    assert page.count(f"\N{MULTIPLICATION SIGN} base {small:.1f}</span>") == 1
    assert f"prior {large:.1f}" in page


def test_runs_that_cannot_be_reported(tmp_path: Path) -> None:
    empty = RunFolder.create(tmp_path / "a/run", kind="train", config={})
    with pytest.raises(RunError, match="vlmx eval"):
        collect([empty], caches=tmp_path)
    twin = RunFolder.create(tmp_path / "b/run", kind="train", config={})
    with pytest.raises(RunError, match="same name"):
        collect([empty, twin], caches=tmp_path)


def test_encoders_are_only_averaged_over_a_full_set_of_connectors() -> None:
    def runs(*names: str) -> list[Contestant]:
        parts = [name.split("+") for name in names]
        return [Contestant(run=e + c, encoder=e, connector=c, grades={}) for e, c in parts]

    assert is_balanced(runs("a+2", "a+3", "b+2", "b+3"))
    assert not is_balanced(runs("a+2", "a+3", "b+2"))
    assert not is_balanced(runs("a+2", "a+2", "a+3", "b+2", "b+3"))
    assert not is_balanced(runs("a+2", "b+2"))


def test_png_has_the_pixels() -> None:
    pixels_HW3 = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    png = png_of(pixels_HW3)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">IIBB", png[16:26]) == (4, 5, 8, 2)
    assert pixels_of(png, name="it").tolist() == pixels_HW3.tolist()


def test_photos_are_made_smaller_by_whole_blocks() -> None:
    pixels_HW3 = np.zeros((4, 7, 3), np.uint8)
    pixels_HW3[:2, :2] = 100
    pixels_HW3[0, 2] = 40
    small = smaller(pixels_HW3, 4)
    assert small[:, :, 0].tolist() == [[100, 10, 0], [0, 0, 0]]
    assert smaller(pixels_HW3, 7) is pixels_HW3


def test_scores_can_be_given_again_by_command(study_root: Path) -> None:
    result = CliRunner().invoke(
        evaluate.score, [str(study_root / "runs/enc-a-mlp2"), "--boxes", "paper"], catch_exceptions=False
    )
    assert "mini-ref-plain" in result.output
    assert "60 of " in result.output
    stored = (study_root / "runs/enc-a-mlp2/eval/mini-ref-plain/scores.json").read_text()
    assert "letterbox ignored" in stored
