"""How fast are questions answered and answers scored, and what does bfloat16 change?

    python benchmarks/evaluate.py [--only answers|options|scoring|report|flips] [--log FILE]
                                  [--run RUN --caches FOLDER]

A Llama (512 wide, 6 layers, 8 heads, 32,000 words, random weights) and the two-layer connector answer in float32 on one
thread: 5 questions an image, 196 visual tokens, prompts of Vicuna's form (a system text of 40 tokens, questions of 6 to
18, a request of 12). Random weights end no answer, so answers have a fixed number of tokens: 3, as a word and its end,
and 28, as a box. The other way is the reference's: one question at a time, nothing shared, the connector each time.

"options": the probabilities of the first token for all questions, beside answering them as text one at a time and
reading the first token then: 2 tokens, as a trained model does ("Yes" and the end), and 128, as the reference's limit.

Both ways run in turn in one process; figures are questions a processor second, or seconds. "flips" is the share of
answers that are others in bfloat16 than in float32, for the random model, and for a trained one with --run: its
answers to 400 questions of each benchmark of the mini study.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmx.cache_specs.geometry import Geometry
from vlmx.evaluate.answers import Answer, Header, answers_path, write_answers
from vlmx.evaluate.groups import groups_of, questions_sha256, subset
from vlmx.models.connectors import build_connector
from vlmx.models.decoding import first_token_logits_shared, generate_shared
from vlmx.models.vlm import VLM
from vlmx.runs import RunFolder

DIM, TOKENS, PER_IMAGE, BATCH = 384, 196, 5, 64
WORDS = 32_000
SYSTEM, REQUEST, QUESTION = 40, 12, (6, 18)
ROUNDS = 3
GOALS = {"answers": 5.0, "options": 10.0, "scoring": 30.0, "report": 10.0}
VQAV2 = 214_354
TRAINED_QUESTIONS = 400


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Questions as the model takes them."""

    visual_UND: Tensor
    image_of_row: list[int]
    prompts_ids: list[list[int]]


def build_vlm() -> VLM:
    """The model, with weights that make answers depend on the question."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=None,
    )
    return VLM(build_connector("mlp2", DIM, 512), LlamaForCausalLM(config)).eval()


def ask(questions: int, seed: int) -> Asked:
    """Questions in the order of their lengths, 5 an image."""
    dice = random.Random(seed)

    def words(count: int) -> list[int]:
        return [dice.randrange(3, WORDS) for _ in range(count)]

    system, request = [1, *words(SYSTEM)], words(REQUEST)
    return Asked(
        visual_UND=torch.randn(questions // PER_IMAGE, TOKENS, DIM, generator=torch.Generator().manual_seed(seed)),
        image_of_row=[row // PER_IMAGE for row in range(questions)],
        prompts_ids=[system + words(dice.randint(*QUESTION)) + request for _ in range(questions)],
    )


def one_at_a_time(vlm: VLM, asked: Asked, new_tokens: int) -> list[list[int]]:
    """The reference's way."""
    pairs = zip(asked.image_of_row, asked.prompts_ids, strict=True)
    return [vlm.generate(asked.visual_UND[[image]], [ids], new_tokens)[0] for image, ids in pairs]


def shared(vlm: VLM, asked: Asked, new_tokens: int) -> list[list[int]]:
    """Ours."""
    return generate_shared(vlm, asked.visual_UND, asked.image_of_row, asked.prompts_ids, new_tokens)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, and what came out."""
    started = time.process_time()
    result = call()
    return time.process_time() - started, result


def in_turn(ours: Callable[[Asked], Any], theirs: Callable[[Asked], Any], few: int) -> tuple[float, float]:
    """Questions a processor second of both ways, medians; the other way gets fewer questions.

    Each round asks new questions. What both answered must be alike.
    """
    rates: list[tuple[float, float]] = []
    for seed in range(ROUNDS):
        many = ask(BATCH // PER_IMAGE * PER_IMAGE, seed)
        some = replace(many, image_of_row=many.image_of_row[:few], prompts_ids=many.prompts_ids[:few])
        ours_s, our_answers = timed(lambda many=many: ours(many))
        theirs_s, their_answers = timed(lambda some=some: theirs(some))
        assert our_answers[:few] == their_answers, "the two ways should have answered alike"
        rates.append((len(many.prompts_ids) / ours_s, few / theirs_s))
    return statistics.median(rate for rate, _ in rates), statistics.median(rate for _, rate in rates)


def measure_answers() -> dict[str, float]:
    """Questions a second, ours / one at a time, for short and for long answers."""
    vlm, figures = build_vlm(), {}
    for new_tokens in (3, 28):
        ours, theirs = in_turn(
            lambda asked, count=new_tokens: shared(vlm, asked, count),
            lambda asked, count=new_tokens: one_at_a_time(vlm, asked, count),
            few=10,
        )
        print(
            f"answers of {new_tokens:>2} tokens: {ours:.2f} / {theirs:.2f} questions/s = {ours / theirs:.1f}",
            flush=True,
        )
        figures[f"answers_{new_tokens}"] = ours / theirs
    return figures


def measure_options() -> dict[str, float]:
    """Questions a second, probabilities of the first token / generated one at a time."""
    vlm, figures = build_vlm(), {}

    def first_tokens(asked: Asked) -> list[int]:
        logits_BV = first_token_logits_shared(vlm, asked.visual_UND, asked.image_of_row, asked.prompts_ids)
        return logits_BV.argmax(dim=-1).tolist()

    for new_tokens, few in ((2, 10), (128, 2)):
        ours, theirs = in_turn(
            first_tokens,
            lambda asked, count=new_tokens: [ids[0] for ids in one_at_a_time(vlm, asked, count)],
            few=few,
        )
        rates = f"{ours:.2f} / {theirs:.2f} questions/s = {ours / theirs:.1f}"
        print(f"options, beside {new_tokens} generated tokens: {rates}", flush=True)
        figures[f"options_{new_tokens}"] = ours / theirs
    return figures


def measure_scoring() -> dict[str, float]:
    """Seconds of `vlmx score` on 214,354 answers to VQA-v2: reading both published files, checking, scoring."""
    from vlmx.data.benchmarks import load_benchmark
    from vlmx.evaluate.score_run import score_run

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        write_vqav2(root)
        run = RunFolder.create(Path(folder) / "run", kind="train", config={})
        questions = load_benchmark("vqav2", root=root)
        header = header_of("vqav2", len(questions), data_root=str(root), questions_sha256=questions_sha256(questions))
        answers = [Answer(id=q.id, image=q.image, prompt=q.prompt, text=q.answers[0]) for q in questions]
        write_answers(answers_path(run, "vqav2", "none"), header, answers)
        del questions, answers
        seconds, scores = timed(lambda: score_run(run))
        assert scores[0].n == VQAV2
        print(
            f"scoring {VQAV2:,} answers to VQA-v2, files included: {seconds:.1f} s ({scores[0].score:.2f})", flush=True
        )
    return {"scoring": seconds}


def write_vqav2(root: Path) -> None:
    """Files of VQA-v2's form and size, filled at random."""
    from vlmx.data.downloads import VQAV2_ANNOTATIONS
    from vlmx.data.published import PUBLISHED

    dice = random.Random(0)
    kinds = [f"what is the {number}" for number in range(65)]
    said = ["yes", "no", "2", "a dog", "Red.", "on the left", "it's blue", "two", "man's hat", "1,000"]
    questions, annotations = [], []
    for number in range(VQAV2):
        image = number * 40_504 // VQAV2 + 1
        text = f"What is the {number} thing beside the tree?"
        questions.append({"image_id": image, "question": text, "question_id": image * 1000 + number})
        likely = dice.sample(said, 3)
        answers = [
            {"answer": dice.choice(likely), "answer_confidence": "yes", "answer_id": each} for each in range(1, 11)
        ]
        annotations.append(
            {
                "question_type": dice.choice(kinds),
                "multiple_choice_answer": answers[0]["answer"],
                "answers": answers,
                "image_id": image,
                "answer_type": "other",
                "question_id": image * 1000 + number,
            }
        )
    files = {
        PUBLISHED["vqav2"].annotations[0].path: {"data_subtype": "val2014", "questions": questions},
        VQAV2_ANNOTATIONS.path: {"annotations": annotations},
    }
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps(content))


def measure_report() -> dict[str, float]:
    """Seconds of `vlmx report` on the paper's 99 models and 11 benchmarks: the page, LaTeX and CSV, start included."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        command = [sys.executable, "-m", "vlmx", "report", "--published", "-o", str(page)]
        command += ["--latex", str(page.with_suffix(".tex")), "--csv", str(page.with_suffix(".csv"))]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*command, "--caches", folder], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"report of 99 rows x 11 benchmarks: {seconds:.1f} s, {page.stat().st_size / 1e6:.1f} MB", flush=True)
    return {"report": seconds}


def header_of(benchmark: str, questions: int, **fields: Any) -> Header:
    """Of answers that no model gave."""
    return Header(
        benchmark=benchmark,
        control="none",
        questions=questions,
        limit=None,
        model="none",
        cache="vmamba-s-coco@512x512-0123456789ab",
        fingerprint="0" * 64,
        encoder_weights="random:0",
        geometry=Geometry(mode="letterbox", height=512, width=512, fill=(0, 0, 0)).to_dict(),
        prompt_format="vicuna-v1.5",
        **fields,
    )


def measure_flips(run: str | None, caches: str) -> dict[str, float]:
    """Percent of answers that bfloat16 changes."""
    vlm, asked = build_vlm(), ask(60, 0)
    exact = shared(vlm, asked, 3)
    for parameter in vlm.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    flips = share_of_flips(exact, shared(vlm, asked, 3))
    print(f"bfloat16 flips, random weights, 3 tokens: {flips:.1f} % of 60", flush=True)
    figures = {"flips_random": flips}
    if run is not None:
        figures |= trained_flips(RunFolder.open(run), caches)
    return figures


def share_of_flips(one: list[Any], other: list[Any]) -> float:
    """Percent of pairs that differ."""
    return 100 * sum(a != b for a, b in zip(one, other, strict=True)) / len(one)


def trained_flips(run: RunFolder, caches: str) -> dict[str, float]:
    """The same for a trained model's answers to the mini study."""
    from vlmx.cache_specs.ids import ImageTable
    from vlmx.cache_specs.reader import open_cache
    from vlmx.data.benchmarks import expand, load_benchmark
    from vlmx.evaluate.answerer import Answerer
    from vlmx.models.folder import load_model

    table = ImageTable.open(caches, "mini")
    keys = table.keys()
    ids = {key: table.id_of(key) for key in keys}
    said: dict[str, list[list[str]]] = {}
    for dtype in ("fp32", "bf16"):
        saved = load_model(run.path / "model")
        reader = open_cache(saved.card.spec.name, caches)
        answerer = Answerer(saved, torch.device("cpu"), dtype="fp32" if dtype == "fp32" else "bf16")
        for name in expand("mini"):
            groups = groups_of(subset(load_benchmark(name), TRAINED_QUESTIONS), BATCH)
            answers = [answer.text for group in answerer.answers(groups, reader, ids) for answer in group]
            said.setdefault(name, []).append(answers)
    figures = {f"flips_{name}": share_of_flips(*both) for name, both in said.items()}
    for name, (exact, _) in said.items():
        print(f"bfloat16 flips, {run.name}, {name}: {figures[f'flips_{name}']:.2f} % of {len(exact)}", flush=True)
    total = share_of_flips(*([text for both in said.values() for text in both[way]] for way in (0, 1)))
    print(f"bfloat16 flips, {run.name}, all: {total:.2f} %", flush=True)
    return {**figures, "flips_trained": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["answers", "options", "scoring", "report", "flips"])
    parser.add_argument("--run")
    parser.add_argument("--caches", default="caches")
    parser.add_argument("--log", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "answers": measure_answers,
        "options": measure_options,
        "scoring": measure_scoring,
        "report": measure_report,
        "flips": lambda: measure_flips(arguments.run, arguments.caches),
    }
    for name, measure in parts.items():
        if arguments.only in (None, name):
            figures = measure()
            if arguments.log is not None:
                with open(arguments.log, "a") as file:
                    file.write(json.dumps({"part": name, "goal": GOALS.get(name), **figures}) + "\n")


if __name__ == "__main__":
    main()
