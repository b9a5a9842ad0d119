"""Does `vlmx eval` answer all benchmarks from their published files, and say what is wrong with them?"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import pytest
from benchmark_files import make_data_root, real_pope_root
from eval_world import extract_images, source_of, train_run, write_llm

from vlmx.data.benchmarks import BENCHMARKS, expand, load_benchmark
from vlmx.errors import CacheError, DataError, RunError, UsageError, VlmxError
from vlmx.evaluate.answers import Answer, answers_path, read_answers
from vlmx.evaluate.command import evaluate, score
from vlmx.evaluate.many import Worker, worker_of
from vlmx.evaluate.score import questions_of
from vlmx.runs import RunFolder

ALL = expand("paper")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, caches/, llm/ and run/."""
    folder = tmp_path_factory.mktemp("world")
    root = make_data_root(folder / "data")
    keys: dict[str, list[str]] = {}
    for name in ALL:
        keys.setdefault(BENCHMARKS.get(name).table, []).extend(q.image for q in load_benchmark(name, root=root))
    extract_images(folder / "caches", [source_of(table, root, images) for table, images in keys.items()])
    train_run(folder / "run", folder / "caches", "pope", llm=write_llm(folder / "llm"))
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    """A copy of it whose run may be written to."""
    shutil.copytree(made / "run", tmp_path / "run")
    for name in ("data", "caches", "llm"):
        (tmp_path / name).symlink_to(made / name)
    return tmp_path


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmx.evaluate.answerer.MAX_NEW_TOKENS", 12)  # this model never ends one


def call(command: click.Command, *arguments: object) -> None:
    command.main([str(each) for each in arguments], standalone_mode=False)


def ask(world: Path, *arguments: object, bench: str = "paper") -> None:
    given = ["--run", world / "run", "--data-root", world / "data", "--caches", world / "caches"]
    call(evaluate, *given, "--bench", bench, *arguments)


def answers_of(world: Path, names: Sequence[str] = ALL) -> dict[str, list[Answer]]:
    return {name: read_answers(answers_path(RunFolder(world / "run"), name, "none"))[1] for name in names}


def files_of(world: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in (world / "run" / "eval").glob("*/answers.jsonl")}


def test_all_benchmarks_from_their_files_to_their_scores(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask(world)
    shown = capsys.readouterr()
    for name in ALL:
        questions = load_benchmark(name, root=world / "data")
        header, answers = read_answers(answers_path(RunFolder(world / "run"), name, "none"))
        assert [(a.id, a.image, a.prompt) for a in answers] == [(q.id, q.image, q.prompt) for q in questions]
        assert header.data_root == str(world / "data")
        scores = json.loads((world / "run" / "eval" / name / "scores.json").read_text())
        assert (scores["n"], scores["expected"]) == (len(questions), BENCHMARKS.get(name).questions)
        assert (scores["partial"], scores["wording"]) == (True, "default")
        assert name in shown.out
    assert (
        "boxes converted from the encoder's input to the source image: ocid_ref, refcoco, refcoco+, refcocog"
        in shown.out
    )
    said = answers_of(world)
    for name, options in (("pope", ("Yes", "No")), ("tallyqa", tuple("ABCDEFGHIJKLMNOP"))):
        for answer in said[name]:
            assert answer.probabilities is not None
            assert len(answer.probabilities) == len(options)
            assert sum(answer.probabilities) == pytest.approx(1)
            assert answer.text == options[answer.probabilities.index(max(answer.probabilities))]
    assert {a.probabilities for name in ALL if name not in ("pope", "tallyqa") for a in said[name]} == {None}
    assert "auc" in json.dumps(json.loads((world / "run/eval/pope/scores.json").read_text())["details"])

    before = files_of(world)
    ask(world)
    assert "answered already" in capsys.readouterr().err
    call(score, world / "run")
    assert capsys.readouterr().out.count("prompts as in training") == 2
    assert files_of(world) == before


def test_sharing_batches_and_one_at_a_time_give_the_same(world: Path) -> None:
    ask(world)
    shared = answers_of(world)
    assert len({a.text for name in ALL for a in shared[name]}) > 4
    for option in (["--exact"], ["--batch-size", "2"]):
        shutil.rmtree(world / "run" / "eval")
        ask(world, *option)
        for name, answers in answers_of(world).items():
            assert [a.text for a in answers] == [a.text for a in shared[name]]
            for one, other in zip(answers, shared[name], strict=True):
                assert (one.probabilities or ()) == pytest.approx(other.probabilities or (), rel=1e-4)
    assert read_answers(answers_path(RunFolder(world / "run"), "gqa", "none"))[0].batch_size == 2


def test_the_papers_profile(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask(world, "--profile", "paper", "--dtype", "bf16", bench="refcoco,pope")
    path = answers_path(RunFolder(world / "run"), "refcoco", "none")
    header, answers = read_answers(path)
    assert (header.wording, header.dtype) == ("paper", "bf16")
    # whose questions are the same in both wordings
    assert read_answers(answers_path(RunFolder(world / "run"), "pope", "none"))[0].wording == "default"
    worded = load_benchmark("refcoco", root=world / "data", wording="paper")
    assert [a.prompt for a in answers] == [q.prompt for q in worded]
    assert worded != load_benchmark("refcoco", root=world / "data")
    found = json.loads(path.with_name("scores.json").read_text())
    assert (found["wording"], found["boxes"], found["dtype"]) == ("paper", "paper", "bf16")
    out = capsys.readouterr().out
    assert "prompts as in the paper's evaluation; boxes compared raw, as in the paper's evaluation: refcoco" in out
    ask(world, "--profile", "paper", "--boxes", "exact", "--dtype", "bf16", bench="refcoco")
    assert json.loads(path.with_name("scores.json").read_text())["boxes"] == "exact"
    assert read_answers(path)[1] == answers


def test_subsets_are_marked(world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = answers_path(RunFolder(world / "run"), "gqa", "none")
    for options in (["--slim"], ["--limit", "9999"]):  # which take all
        ask(world, *options, bench="gqa")
        assert " of 12,578 (partial)" in capsys.readouterr().out
        header = read_answers(path)[0]
        assert (header.slim, header.limit, header.asked) == (False, None, len(read_answers(path)[1]))
        shutil.rmtree(world / "run" / "eval")
    monkeypatch.setattr("vlmx.evaluate.groups.SLIM", 1)
    ask(world, "--slim", bench="gqa")
    assert "1 of 12,578 (slim)" in capsys.readouterr().out
    assert read_answers(path)[0].slim
    ask(world, "--limit", "1", bench="pope")
    assert "1 of 8,910 (limit 1)" in capsys.readouterr().out
    with pytest.raises(UsageError, match="both choose a subset"):
        ask(world, "--slim", "--limit", "3")
    with pytest.raises(UsageError, match="one question at a time"):
        ask(world, "--exact", "--batch-size", "3")


def test_scores_follow_files_that_have_moved(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask(world, bench="gqa")
    (world / "data").rename(world / "elsewhere")
    questions_of.cache_clear()
    with pytest.raises(DataError):
        call(score, world / "run")
    capsys.readouterr()
    call(score, world / "run", "--data-root", world / "elsewhere")
    assert "gqa" in capsys.readouterr().out


def test_files_that_lack_are_named_for_all_benchmarks_at_once(world: Path) -> None:
    with pytest.raises(DataError, match="files or folders of published data are missing below") as caught:
        ask(world, "--data-root", world / "nope", bench="pope,refcoco")
    assert "coco_pope_random.json" in caught.value.why
    assert "refcoco/instances.json" in caught.value.why


def test_scores_by_other_annotations_are_refused(world: Path) -> None:
    ask(world, bench="gqa")
    other = make_data_root(world / "other", images=False)
    path = next(other.rglob("*balanced_questions.json"))
    rows = json.loads(path.read_text())
    next(iter(rows.values()))["answer"] = "another"
    path.write_text(json.dumps(rows))
    with pytest.raises(RunError, match="annotations of 'gqa' are not the ones"):
        call(score, world / "run", "--data-root", other)
    path.write_text(json.dumps({f"0{number}": row for number, row in rows.items()}))  # none has an id of the old ones
    questions_of.cache_clear()
    with pytest.raises(RunError, match="annotations of 'gqa' are not the ones") as caught:
        call(score, world / "run", "--data-root", other)
    assert f"--data-root the folder of the files that were asked (they were in {world / 'data'})" in caught.value.fix
    assert "delete" not in caught.value.fix


def edit(world: Path, change: object) -> None:
    """Change the lines of GQA's answers."""
    path = answers_path(RunFolder(world / "run"), "gqa", "none")
    first, *lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(change([first, *lines])))  # type: ignore[operator]


def test_bad_answers(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask(world, bench="gqa,refcoco,vqav2")
    run = world / "run" / "eval"
    whole = (run / "gqa/answers.jsonl").read_bytes()
    count = len(whole.splitlines()) - 1

    edit(world, lambda lines: [*lines, lines[1]])
    with pytest.raises(
        RunError, match=rf"1 questions of 'gqa' are answered more than once.*line 2: .*line {count + 2}:"
    ):
        call(score, world / "run")
    edit(world, lambda lines: [*lines[:-1], lines[1].replace('"id": "', '"id": "x')])
    with pytest.raises(RunError, match=rf"belong to no question of 'gqa'.*gqa/answers.jsonl, line {count + 2}: x"):
        call(score, world / "run")
    shutil.copy(run / "vqav2/answers.jsonl", run / "gqa/answers.jsonl")
    with pytest.raises(RunError, match=r"holds answers to another benchmark.*made for 'vqav2'"):
        call(score, world / "run")

    (run / "gqa/answers.jsonl").write_bytes(whole)
    edit(world, lambda lines: lines[:-1])
    path = answers_path(RunFolder(world / "run"), "refcoco", "none")
    header, boxes = read_answers(path)
    broken = [replace(boxes[0], text=""), replace(boxes[1], text="[0.1, 0.2"), *boxes[2:]]
    path.write_text("".join([header.line(), *(answer.line() for answer in broken)]))
    capsys.readouterr()
    call(score, world / "run")
    assert f"{count - 1} of 12,578 (1 not answered yet)" in capsys.readouterr().out
    assert json.loads(path.with_name("scores.json").read_text())["invalid"] >= 2


def test_one_bad_benchmark_does_not_keep_the_others_from_being_scored(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(world, bench="gqa,pope,vqav2")
    capsys.readouterr()
    for name, line in (("gqa", '{"id": "1", "text": null}'), ("vqav2", "{")):
        path = answers_path(RunFolder(world / "run"), name, "none")
        path.write_text(path.read_text() + line + "\n")
    scores = world / "run/eval/pope/scores.json"
    scores.unlink()
    with pytest.raises(RunError, match=r"vqav2/answers.jsonl is damaged.*line \d+ is not JSON"):
        call(score, world / "run")
    shown = capsys.readouterr()
    assert "pope" in shown.out
    assert "gqa" not in shown.out
    assert "gqa/answers.jsonl is damaged" in shown.err
    assert scores.exists()


def test_places_among_several_processes(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker_of({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}) == Worker()
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}
    assert worker_of(torchrun) == Worker(index=5, count=8, local=1, locals=8, launched=True)
    for wrong in ({"RANK": "x"}, {"RANK": "4", "WORLD_SIZE": "4"}, {"WORLD_SIZE": "-1"}):
        with pytest.raises(UsageError, match="gives this process no place"):
            worker_of(wrong)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    ask(world, "--batch-size", "1", bench="gqa")
    shown = capsys.readouterr()
    assert "process 0 of 4 (RANK=0, WORLD_SIZE=4) has answered its share alone" in shown.err
    assert "unset RANK and WORLD_SIZE" in shown.err
    assert shown.out == ""


def test_a_run_without_tokens_of_the_images_is_told_the_command(world: Path, tmp_path: Path) -> None:
    command = "vlmx extract --backbone vit-mini-scenes --res 64x64 --weights random:0 --data {} --out {}"

    def fix(**arguments: object) -> str:
        with pytest.raises(VlmxError) as caught:
            ask(world, **arguments)  # type: ignore[arg-type]
        return f"{caught.value.what} / {caught.value.fix}"

    caches = world / "caches"
    caches.unlink()
    assert fix(bench="pope,gqa") == (
        f"there is no cache {_cache_name(world)} below {caches} / "
        f"{command.format('pope,gqa', caches)} --data-root {world / 'data'}"
    )
    root, questions = world / "data", load_benchmark("pope", root=world / "data")
    images = list(dict.fromkeys(q.image for q in questions))
    extract_images(caches, [source_of("gqa", root, images[:1])])
    assert fix(bench="pope") == (
        f"the images of 'pope' have no tokens yet / {command.format('pope', caches)} --data-root {root}"
    )
    assert fix(bench="pope,gqa,vizwiz") == (
        f"the images of 'pope' and 'vizwiz' have no tokens yet / {command.format('pope,vizwiz', caches)}"
        f" --data-root {root}"
    )
    extract_images(caches, [source_of("pope", root, images[:1])])
    assert fix(bench="pope").startswith(
        f"{len(images) - 1} of {len(images)} images are not in the image table 'pope' / "
        + command.format("pope", caches)
    )
    source = source_of("pope", root, images)
    broken = (source.images[0], replace(source.images[1], load=lambda: b"no photo"))
    extract_images(caches, [replace(source, images=broken)])
    assert fix(bench="pope").startswith(f"1 of {len(images)} images of 'pope' could not be decoded")


def _cache_name(world: Path) -> str:
    from vlmx.models.folder import read_card

    return read_card(world / "run" / "model").spec.name


def test_a_table_without_tokens(world: Path) -> None:
    """The image table knows the images, because another encoder has seen them; the run's has not."""
    caches, root = world / "caches", world / "data"
    caches.unlink()
    images = list(dict.fromkeys(q.image for q in load_benchmark("pope", root=root)))
    extract_images(caches, [source_of("gqa", root, images[:1])])
    extract_images(caches, [source_of("pope", root, images)], backbone="vmamba-mini-scenes")
    with pytest.raises(CacheError) as caught:
        ask(world, bench="pope")
    assert f"{len(images) - 1} of {len(images)} images are not in cache" in caught.value.what
    assert f"--data pope --data-root {root}" in caught.value.fix


def test_options_of_several_tokens_are_asked_for_in_words(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_run(world / "plain", world / "caches", "pope", llm=world / "llm", prompt="plain")
    (world / "run").rename(world / "before")
    (world / "plain").rename(world / "run")
    ask(world, bench="gqa,pope")
    shown = capsys.readouterr().err
    assert shown.index("warning: pope: as an answer 'Yes' is 2 tokens") < shown.index("eval gqa")
    assert {answer.probabilities for answer in answers_of(world, ["pope"])["pope"]} == {None}
    details = json.loads((world / "run/eval/pope/scores.json").read_text())["details"]
    assert "random_accuracy" in details
    assert not any("auc" in name for name in details)


def test_what_cannot_be_had_changes_nothing(world: Path) -> None:
    ask(world, bench="pope,gqa")
    before = files_of(world)
    for options in (["--exact"], ["--dtype", "bf16", "--limit", "1"]):
        with pytest.raises(CacheError, match="there is no cache"):
            ask(world, *options, "--caches", world / "nowhere", bench="gqa,pope")
        assert files_of(world) == before
        assert sorted(each.name for each in (world / "run/eval/gqa").iterdir()) == ["answers.jsonl", "scores.json"]


def test_a_model_without_numbers(world: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = world / "run/model/connector.safetensors"
    tensors = load_file(path)
    tensors[next(iter(tensors))].fill_(float("nan"))
    save_file(tensors, path)
    with pytest.raises(VlmxError, match="logits are not numbers"):
        ask(world, bench="gqa")
    with pytest.raises(VlmxError, match="logits are not numbers"):
        ask(world, bench="pope")


def test_official_pope_questions_on_real_photos(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = real_pope_root(tmp_path / "data")
    questions = load_benchmark("pope", root=root)
    extract_images(tmp_path / "caches", [source_of("pope", root, [q.image for q in questions])])
    train_run(tmp_path / "run", tmp_path / "caches", "pope", llm=made / "llm")
    ask(tmp_path, bench="pope")
    assert "36 of 8,910 (partial)" in capsys.readouterr().out
    answers = answers_of(tmp_path, ["pope"])["pope"]
    asked = {(question.image, question.prompt) for question in questions}
    assert len({answer.probabilities for answer in answers}) >= len(asked) > 15  # some are in two of the three lists
    details = json.loads((tmp_path / "run/eval/pope/scores.json").read_text())["details"]
    assert {"random_auc_roc", "popular_accuracy", "adversarial_f1"} <= details.keys()
