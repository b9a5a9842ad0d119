"""What does a trained model answer? Cached tokens and prompts in, answers.jsonl out; no image is read.

questions ─ subset ─ groups ─ (control: tokens of another image) ─ those without answers ─ answer ─ write
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlmx.cache_specs.places import Place, place_of
from vlmx.console import note, progress
from vlmx.data.benchmarks import BENCHMARKS, MINI, load_benchmark
from vlmx.data.published import DATA_ROOT, refuse_missing
from vlmx.data.published_benchmarks import PUBLISHED_BENCHMARKS
from vlmx.data.records import Question
from vlmx.data.wording import Wording
from vlmx.evaluate.answers import Answer, Control, Dtype, Header, answers_path
from vlmx.evaluate.groups import Group, default_batch_size, groups_of, questions_sha256, subset
from vlmx.evaluate.many import Worker
from vlmx.evaluate.parts import Work
from vlmx.evaluate.score import questions_of
from vlmx.evaluate.tokens import image_ids, open_tokens, require_tables
from vlmx.processes import shared_device
from vlmx.runs import RunFolder

Answers = Callable[[Sequence[Group]], Iterable[list[Answer]]]
"""Groups of questions -> the answers to each group, in its order."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How questions are chosen, worded and answered.

    Attributes:
        limit: questions per benchmark; None for all.
        slim: 1,024 questions of each part of a benchmark.
        control: "shuffled" gives every question the tokens of another image.
        wording: as in training, or as the paper's evaluation words them.
        data_root: where the benchmarks' published files are.
        batch_size: questions that are answered together; None: as many as the LLM's memory allows for.
        exact: one question at a time, nothing shared.
        dtype: what the model computes in; "auto": bf16 on a GPU, fp32 elsewhere.
    """

    limit: int | None = None
    slim: bool = False
    control: Control = "none"
    wording: Wording = "default"
    data_root: str | Path = DATA_ROOT
    batch_size: int | None = None
    exact: bool = False
    dtype: Literal["auto"] | Dtype = "auto"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One benchmark of an evaluation.

    Attributes:
        name, table: of the benchmark, and of its image table.
        groups: all that is asked.
        work: this process's share of it.
    """

    name: str
    table: str
    groups: list[Group]
    work: Work


def plan_benchmark(path: Path, header: Header, questions: Sequence[Question], worker: Worker | None = None) -> Part:
    """Divide a benchmark into groups, and find out what is left to do of them.

    Args:
        path: the answers.jsonl; answers of the same model to the same questions are kept.
        header: `limit`, `slim`, `control` and `batch_size` say which questions are asked, with which images, and how
            many together.
        questions: all questions of the benchmark.
        worker: which of several processes this is.

    Raises:
        DataError: the benchmark has too few images for the control.
        RunError: see `Work`.
    """
    asked = subset(questions, header.limit, slim=header.slim)
    assert header.batch_size is not None
    groups = groups_of(asked, header.batch_size, shuffled=questions if header.control == "shuffled" else ())
    work = Work(path, header, [question.id for question in asked], groups, worker or Worker())
    return Part(name=header.benchmark, table=table_name(header.benchmark), groups=groups, work=work)


def answer_benchmark(part: Part, answers: Answers, *, control: Control = "none", parts: Sequence[Part] = ()) -> bool:
    """Answer this process's share of a benchmark.

    Args:
        part: of `plan_benchmark`.
        answers: gives the answers to groups.
        control: for the display.
        parts: all benchmarks of the evaluation.

    Returns:
        Whether this process was the last one of all that answer these benchmarks.
    """
    work = part.work
    label = f"eval {part.name}" + (" (shuffled)" if control == "shuffled" else "")
    if work.open:
        if work.kept:
            note(f"{label}: {work.kept:,} questions are answered already")
        with progress(label, sum(len(group.questions) for group in work.open), "questions") as bar:
            for group_answers in answers(work.open):
                work.write(group_answers)
                bar.advance(len(group_answers))
    return work.finish([each.work for each in parts or [part]])


def predict_run(
    run: RunFolder,
    benchmarks: Sequence[str],
    *,
    caches: str | Path | Place,
    asking: Asking | None = None,
    stream: Mapping[str, Any] | None = None,
    pull: str | None = None,
    worker: Worker | None = None,
) -> bool:
    """Answer benchmarks with the model of a finished run.

    Args:
        run: its `model/` is used.
        benchmarks: names, see vlmx.data.benchmarks.
        caches: folder of caches; the one that the run was trained on is used. A run that was trained without a cache
            is answered without one, too, unless there is one by now.
        asking: how; None: everything, as in training.
        stream: encode on the fly; holds what differs from what the run knows of its encoder (`StreamConfig`).
        pull: folder for copies of a remote cache's shards; see `open_cache`.
        worker: which of several processes this is; each answers its share.

    Returns:
        Whether this process is the one that shows the scores: all is answered, and it was the last one at work.

    Raises:
        RunError: the run has no trained model, or another process is at the same work.
        DataError: a benchmark's files are missing or damaged, or an image table lacks images.
        CacheError: the run's cache is missing, was made with another spec, or lacks images of a benchmark.
        SpecMismatchError: the encoder that works on the fly is another one.
        UsageError: a prompt is too long for the LLM; of all benchmarks this is found before the first answer.
    """
    from vlmx.models.folder import load_model, read_card

    asking, worker = asking or Asking(), worker or Worker()
    folder = run.path / "model"
    card = read_card(folder)
    device = shared_device(worker)
    dtype: Dtype = ("bf16" if device.type == "cuda" else "fp32") if asking.dtype == "auto" else asking.dtype
    visual_tokens = card.grid[0] * card.grid[1]
    batch_size = 1 if asking.exact else asking.batch_size or default_batch_size(visual_tokens)
    model = hashlib.sha256((folder / "connector.safetensors").read_bytes()).hexdigest()
    parts: list[Part] = []
    _require_files(benchmarks, Path(asking.data_root))
    with ExitStack() as stack:
        for name in benchmarks:
            files = None if table_name(name) == MINI else str(Path(asking.data_root).absolute())
            wording, questions = _worded(name, files, asking.wording)
            asked = subset(questions, asking.limit, slim=asking.slim)
            is_part = len(asked) < len(questions)
            header = Header(
                benchmark=name,
                control=asking.control,
                questions=BENCHMARKS.get(name).questions or len(questions),
                limit=asking.limit if is_part else None,
                model=model,
                cache=card.spec.name,
                fingerprint=card.spec.fingerprint,
                encoder_weights=card.spec.weights_sha256,
                geometry=card.spec.geometry.to_dict(),
                prompt_format=card.prompt,
                wording=wording,
                data_root=files,
                questions_sha256=questions_sha256(questions),
                slim=asking.slim and is_part,
                asked=len(asked),
                batch_size=batch_size,
                exact=asking.exact,
                dtype=dtype,
            )
            parts.append(plan_benchmark(answers_path(run, name, asking.control), header, questions, worker))
            stack.callback(parts[-1].work.close)
        if all(part.work.whole for part in parts):
            note("all of it is answered already")
            return worker.index == 0

        from vlmx.evaluate.answerer import Answerer

        root, place = asking.data_root, place_of(caches)
        tables = [part.table for part in parts]
        reader = open_tokens(run, card.spec, tables, place, stream=stream, pull=pull, data_root=root)
        reader.require_spec(card.spec)
        require_tables(reader, tables, place, data_root=root)
        shown = {part.name: dict.fromkeys(key for group in part.groups for key in group.images) for part in parts}
        ids = {part.name: image_ids(reader, part.table, shown[part.name], place, data_root=root) for part in parts}
        answerer = Answerer(load_model(folder), device, dtype=dtype, exact=asking.exact)
        for part in parts:
            answerer.check(part.name, part.work.open, reader.shape.num_tokens)
        last = False
        for part in parts:

            def answers(groups: Sequence[Group], name: str = part.name) -> Iterator[list[Answer]]:
                return answerer.answers(groups, reader, ids[name])

            last |= answer_benchmark(part, answers, control=asking.control, parts=parts)
        return last


def _require_files(benchmarks: Sequence[str], root: Path) -> None:
    """Say at once what lacks of all published benchmarks, before any is read.

    Raises:
        DataError: files are missing; it names each.
    """
    files = [file for name in benchmarks if name in PUBLISHED_BENCHMARKS for file in PUBLISHED_BENCHMARKS[name].files]
    refuse_missing([file for file in files if not (root / file.path).is_file()], root)


def _worded(name: str, files: str | None, wording: Wording) -> tuple[Wording, Sequence[Question]]:
    """The questions of a benchmark, and their wording: a wording that changes none of them is the default."""
    plain = questions_of(name, files)
    if wording == "default":
        return wording, plain
    worded = tuple(load_benchmark(name, root=files or DATA_ROOT, wording=wording))  # not kept: mostly it is the same
    return ("default", plain) if worded == plain else (wording, worded)


def table_name(benchmark: str) -> str:
    """The data set whose image table has a benchmark's images."""
    return BENCHMARKS.get(benchmark).table
