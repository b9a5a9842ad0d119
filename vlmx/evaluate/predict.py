"""What does a trained model answer? Cached tokens and prompts in, answers.jsonl out; no image is read.

    questions ─ subset ─ unanswered ones ─ (control: tokens of another image) ─ generate ─ append

Shapes: B questions of a batch, N visual tokens an image, D width of the encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmx.cache_specs.places import Place, place_of
from vlmx.console import note, progress
from vlmx.data.records import Question
from vlmx.errors import DataError, UsageError
from vlmx.evaluate.answers import Answer, AnswerFile, Control, Header, answers_path
from vlmx.evaluate.score import questions_of
from vlmx.runs import RunFolder

if TYPE_CHECKING:
    from vlmx.cache_specs.fused import TokenSpec
    from vlmx.cache_specs.token_source import TokenSource

_OF_TRAINING_DATA = ("images", "image_root", "data_root", "image_column")
MAX_NEW_TOKENS = 128  # as in the paper's evaluation; answers normally end long before
BATCH_SIZE = 64

Answerer = Callable[[Sequence[str], Sequence[str]], list[str]]
"""(prompts, image keys of equal number) -> the generated texts."""


def subset(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """`limit` questions in the benchmark's order, the same on every machine; a larger subset contains the smaller ones.

    Those with the smallest SHA-256 of their ids are taken, so that a subset does not follow the benchmark's order.
    """
    if limit is None:
        return list(questions)
    chosen = {q.id for q in sorted(questions, key=lambda q: _digest(q.id))[:limit]}
    return [q for q in questions if q.id in chosen]


def shuffled_images(questions: Sequence[Question]) -> dict[str, str]:
    """For each image of a benchmark another one of it: a fixed permutation that leaves none in its place.

    Args:
        questions: all questions of the benchmark, not a subset, so that a subset gets the same images as the whole.

    Raises:
        DataError: the benchmark has fewer than two images.
    """
    images = sorted({q.image for q in questions}, key=_digest)
    if len(images) < 2:
        raise DataError(
            "the control with shuffled images is not possible",
            why=f"the benchmark has {len(images)} image{'' if len(images) == 1 else 's'}",
        )
    return dict(zip(images, [*images[1:], images[0]], strict=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def predict_benchmark(
    path: Path, header: Header, questions: Sequence[Question], answer: Answerer, *, batch_size: int = BATCH_SIZE
) -> int:
    """Answer those questions of a benchmark that have no answer yet.

    Args:
        path: the answers.jsonl; answers of the same model to the same questions in it are kept.
        header: `header.limit` and `header.control` say which questions are asked and with which images.
        questions: all questions of the benchmark.
        answer: gives the texts for prompts and image keys.
        batch_size: questions a call; it does not change the answers.

    Returns:
        How many questions were asked now.
    """
    other_image = shuffled_images(questions) if header.control == "shuffled" else {}
    file = AnswerFile(path, header)
    if file.replaced:
        note(f"{path}: {file.replaced} answers of another model or cache are replaced")
    open_questions = [q for q in subset(questions, header.limit) if q.id not in file.done]
    open_questions.sort(key=lambda q: (len(q.prompt), q.id))  # prompts of equal length are decoded together
    label = f"eval {header.benchmark}" + (" (shuffled)" if header.control == "shuffled" else "")
    with progress(label, len(open_questions), "questions") as bar:
        for start in range(0, len(open_questions), batch_size):
            batch = open_questions[start : start + batch_size]
            images = [other_image.get(q.image, q.image) for q in batch]
            texts = answer([q.prompt for q in batch], images)
            file.append(
                Answer(id=q.id, image=image, prompt=q.prompt, text=text)
                for q, image, text in zip(batch, images, texts, strict=True)
            )
            bar.advance(len(batch))
    return len(open_questions)


def predict_run(
    run: RunFolder,
    benchmarks: Sequence[str],
    *,
    caches: str | Path | Place,
    limit: int | None = None,
    control: Control = "none",
    batch_size: int = BATCH_SIZE,
    stream: Mapping[str, Any] | None = None,
    pull: str | None = None,
) -> None:
    """Answer benchmarks with the model of a finished run.

    Args:
        run: its `model/` is used.
        benchmarks: names, see vlmx.data.benchmarks.
        caches: folder of caches; the one that the run was trained on is used. A run that was trained without a cache
            is answered without one, too, unless there is one by now.
        limit: questions per benchmark; None for all.
        control: "shuffled" gives every question the tokens of another image.
        batch_size: questions that are generated together.
        stream: encode on the fly; holds what differs from what the run knows of its encoder (`StreamConfig`).
        pull: folder for copies of a remote cache's shards; see `open_cache`.

    Raises:
        RunError: the run has no trained model.
        CacheError: the run's cache is missing, was made with another spec, or lacks images of a benchmark.
        SpecMismatchError: the encoder that works on the fly is another one.
    """
    import torch

    from vlmx.models.folder import load_model

    folder = run.path / "model"
    saved = load_model(folder)
    reader = _tokens(run, saved.card.spec, [table_name(b) for b in benchmarks], place_of(caches), stream, pull)
    reader.require_spec(saved.card.spec)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vlm = saved.vlm.to(device)
    connector_sha256 = hashlib.sha256((folder / "connector.safetensors").read_bytes()).hexdigest()
    for benchmark in benchmarks:
        questions = questions_of(benchmark)
        id_of = _image_ids(questions, benchmark, caches)
        reader.require(id_of.values(), data=table_name(benchmark))

        def answer(prompts: Sequence[str], images: Sequence[str], id_of: dict[str, str] = id_of) -> list[str]:
            visual_BND = torch.from_numpy(reader.read_float32([id_of[image] for image in images])).to(device)
            prompts_ids = [saved.prompt.encode_question(prompt) for prompt in prompts]
            return [saved.prompt.decode(ids) for ids in vlm.generate(visual_BND, prompts_ids, MAX_NEW_TOKENS)]

        header = Header(
            benchmark=benchmark,
            control=control,
            questions=len(questions),
            limit=limit,
            model=connector_sha256,
            cache=reader.spec.name,
            fingerprint=reader.spec.fingerprint,
            encoder_weights=reader.spec.weights_sha256,
            geometry=reader.spec.geometry.to_dict(),
            prompt_format=saved.card.prompt,
        )
        predict_benchmark(answers_path(run, benchmark, control), header, questions, answer, batch_size=batch_size)


def _tokens(
    run: RunFolder,
    spec: TokenSpec,
    datasets: Sequence[str],
    caches: Place,
    stream: Mapping[str, Any] | None,
    pull: str | None,
) -> TokenSource:
    """The tokens that a run needs: from its cache, or encoded on the fly."""
    from vlmx.cache_specs.catalog import list_caches
    from vlmx.cache_specs.fused import FusedSpec
    from vlmx.cache_specs.reader import open_cache
    from vlmx.cache_specs.streams import NO_CACHE, open_stream, stream_of

    trained_without = run.config.get("cache") == NO_CACHE
    if stream is None and not (trained_without and spec.name not in list_caches(caches)):
        return open_cache(spec.name, caches, pull=pull)
    if pull is not None:
        raise UsageError("--pull copies a cache, and encoding on the fly uses none", fix="leave --pull out")
    if isinstance(spec, FusedSpec):
        raise UsageError(
            f"the tokens of {spec.name} cannot be encoded on the fly", why="several encoders are joined in them"
        )
    if stream is None:
        note(f"{caches} has no cache {spec.name}: encoding on the fly, as in training")
    known = stream_of(spec)
    if trained_without:  # it knows the options; its images are those of the training
        recorded = {key: value for key, value in run.config["stream"].items() if key not in _OF_TRAINING_DATA}
        known = known.model_copy(update=recorded)
    config = known.model_copy(update=dict(stream or {}))
    if config.images is not None and len(set(datasets)) > 1:
        raise UsageError(
            "stream.images cannot be the images of several data sets",
            why=", ".join(dict.fromkeys(datasets)),
            fix="evaluate their benchmarks one after the other with --bench",
        )
    return open_stream(config, {name: config.images or name for name in datasets}, caches)


def table_name(benchmark: str) -> str:
    """The data set whose image table has a benchmark's images."""
    from vlmx.data.benchmarks import BENCHMARKS

    return BENCHMARKS.get(benchmark).table


def _image_ids(questions: Sequence[Question], benchmark: str, caches: str | Path | Place) -> dict[str, str]:
    from vlmx.cache_specs.ids import ImageTable

    table = ImageTable.open(caches, table_name(benchmark))
    return {image: table.id_of(image) for image in dict.fromkeys(q.image for q in questions)}
