"""What does a training step cost beside the usual way, and beside encoding on the fly?

    python benchmarks/train.py [--only step|packed|memory|feed|stream] [--log FILE]

A small Llama (256 wide, 6 layers, 32,000 words, random weights) and the two-layer connector learn in float32 on one
thread. "mixed": 32 conversations of log-normal length (mean 266 tokens, sigma 0.85, at most 1,024, half of them
answers) after 196 visual tokens. "long": 16 conversations of 128 tokens, 30 of them learned, after 1,024.

The reference is written out below: micro-batches of 16 in the reference's order, padded, with an attention mask,
logits at all positions, Hugging Face's loss. Both ways run in turn in one process; figures are examples a processor
second. "packed" is our step with rows packed beside the same one with rows padded. Peak memory is that of a process of
its own. "feed" is a step whose tokens come from a cache beside one whose tokens are in memory already. "stream" is a
step on a cache beside one that encodes with VMamba-T at 512 x 512.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import nn

from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.ids import ImageEntry, ImageTable, image_id
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.cache_specs.streams import StreamConfig
from vlmx.cache_specs.writer import CacheWriter
from vlmx.models.llm import no_progress_bars
from vlmx.train.assemble import Trainee, assemble
from vlmx.train.collate import Collator, build_collator
from vlmx.train.feed import Feed, Step
from vlmx.train.optim import build_optimizer
from vlmx.train.parallel import World
from vlmx.train.plan import TrainPlan, make_plan
from vlmx.train.preview import preview
from vlmx.train.settings import TrainConfig
from vlmx.train.step import train_step

ALONE = World(rank=0, size=1, device=torch.device("cpu"), distributed=False)
DIM = 384  # channels of VMamba's third stage
MICRO_BATCH, MICRO_TOKENS = 16, 4096
QUESTION_START, QUESTION_END = "USER: ", " ASSISTANT:"  # of the prompt format
GOALS = {"mixed": 3.5, "long": 2.5}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained on.

    Attributes:
        grid: rows and columns of visual tokens.
        text: tokens of each conversation.
        learned: those of them that are answers.
    """

    grid: tuple[int, int]
    text: Sequence[int]
    learned: Sequence[int]


def cases() -> dict[str, Case]:
    bell = NormalDist(np.log(266) - 0.85**2 / 2, 0.85)
    shares = np.random.default_rng(0).permutation((np.arange(32) + 0.5) / 32)  # a draw without luck
    drawn = [int(min(1024, np.exp(bell.inv_cdf(share)))) for share in shares]
    return {
        "mixed": Case(grid=(14, 14), text=drawn, learned=[length // 2 for length in drawn]),
        "long": Case(grid=(32, 32), text=[128] * 16, learned=[30] * 16),
    }


def write_llm(folder: Path) -> None:
    """Random weights of a small Llama, and a tokenizer that makes a token of every byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *letters])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )
    with no_progress_bars():
        LlamaForCausalLM(config).save_pretrained(folder)


def words(tokens: int) -> str:
    """Text of so many bytes, half of them blanks, so that words count as long as tokens."""
    return ("x " * tokens)[:tokens].rstrip() + "x" * (tokens > 0 and ("x " * tokens)[:tokens].endswith(" "))


def write_case(root: Path, name: str, case: Case) -> None:
    """A cache of random tokens, and conversations about its images."""
    ids = [image_id(f"{name} {number}".encode()) for number in range(len(case.text))]
    spec = CacheSpec(
        backbone=f"vit-{name}",
        weights_sha256="random:0",
        forward_version=1,
        feature="last",
        out_norm="none",
        geometry=Geometry(mode="letterbox", height=16 * case.grid[0], width=16 * case.grid[1], fill=(127, 127, 127)),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    rng = np.random.default_rng(0)
    with CacheWriter(root / "caches", spec, TokenShape(grid=case.grid, dim=DIM)) as writer:
        for plan in writer.plan(ids):
            shape = (len(plan.ids), case.grid[0] * case.grid[1], DIM)
            writer.commit(plan, rng.normal(size=shape).astype(np.float16), {})
        writer.seal()
    entries = [ImageEntry(key=f"{n}.jpg", id=i, width=64, height=64) for n, i in enumerate(ids)]
    ImageTable.merge(root / "caches", name, entries)
    frame = 1 + len(QUESTION_START) + len(QUESTION_END)  # BOS, and what stands around the question
    rows = []
    for number, (text, learned) in enumerate(zip(case.text, case.learned, strict=True)):
        question, answer = (
            words(text - learned - frame),
            words(learned - 2),
        )  # a blank before it, the end token after it
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"{name}{number}", "image": f"{number}.jpg", "conversations": turns})
    (root / f"{name}.json").write_text(json.dumps(rows))


def plan_of(root: Path, name: str, case: Case, **changes: object) -> TrainPlan:
    config = TrainConfig(
        cache=f"vit-{name}",
        data=str(root / f"{name}.json"),
        llm=str(root / "llm"),
        prompt="plain",
        **{"global_batch": len(case.text), **changes},  # type: ignore[arg-type]  # keys of the configuration
    )
    return make_plan(config, caches=root / "caches", world_size=1)


def trainee_of(plan: TrainPlan) -> tuple[Trainee, torch.optim.Optimizer, Collator]:
    trainee = assemble(plan, ALONE)
    trainee.vlm.train()
    optimizer = build_optimizer(trainee.vlm, plan.config.optim, trainee.decaying)
    collator = build_collator(plan, trainee.prompt, trainee.vlm.llm.config, packed=trainee.packing.on)
    return trainee, optimizer, collator


def our_step(plan: TrainPlan) -> Callable[[], None]:
    trainee, optimizer, collator = trainee_of(plan)
    feed = Feed(plan, collator, rank=0, world=1)

    def step() -> None:
        train_step(trainee.vlm, optimizer, next(feed.steps(0)), plan, ALONE)

    return step


def reference_step(plan: TrainPlan, world: int) -> Callable[[], None]:
    """The usual step: as `world` processes would do it, one after the other."""
    trainee, optimizer, collator = trainee_of(plan)
    llm, connector = trainee.vlm.llm, trainee.vlm.connector
    batch = Feed(plan, collator, rank=0, world=world).batches_of(0)[0]
    parts = batch.reshape(-1, MICRO_BATCH)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for part in parts:
            rows = collator.rows([plan.conversations[index] for index in part])
            length = max(len(row.ids) for row in rows)
            ids_BT = torch.stack([torch.from_numpy(np.pad(row.ids, (0, length - len(row.ids)))) for row in rows])
            padded = [np.pad(row.labels, (0, length - len(row.ids)), constant_values=-100) for row in rows]
            labels_BT = torch.from_numpy(np.stack(padded))
            mask_BT = torch.arange(length)[None] < torch.tensor([len(row.ids) for row in rows])[:, None]
            visual_BND = torch.from_numpy(plan.reader.read([str(row.image) for row in rows])).float()
            text_BTE = llm.get_input_embeddings()(ids_BT)
            visual_BNE = connector(visual_BND)
            rest_BTE = text_BTE[:, 1 + visual_BNE.shape[1] :]
            embeds_BTE = torch.cat([text_BTE[:, :1], visual_BNE, rest_BTE], dim=1)
            out = llm(inputs_embeds=embeds_BTE, attention_mask=mask_BT, labels=labels_BT, use_cache=False)
            (out.loss / len(parts)).backward()
        nn.utils.clip_grad_norm_(trainee.vlm.parameters(), 1.0)
        optimizer.step()

    return step


def processor_s(step: Callable[[], None]) -> float:
    begin_s = time.process_time()
    step()
    return time.process_time() - begin_s


def measure_steps(root: Path, rounds: int) -> dict[str, Any]:
    """Examples a processor second of both ways, in turn."""
    results: dict[str, Any] = {}
    for name, case in cases().items():
        ours = our_step(plan_of(root, name, case, micro_tokens=MICRO_TOKENS))
        world = len(case.text) // MICRO_BATCH
        reference = reference_step(plan_of(root, name, case, order="paper"), world)
        ours()
        taken = [(processor_s(ours), processor_s(reference)) for _ in range(rounds)]
        ours_s, reference_s = (min(column) for column in zip(*taken, strict=True))
        results[name] = {
            "ours_per_s": len(case.text) / ours_s,
            "reference_per_s": len(case.text) / reference_s,
            "ratio": reference_s / ours_s,
            "ratios": [reference_s / ours_s for ours_s, reference_s in taken],
        }
        print(
            f"{name}: {len(case.text) / ours_s:.2f} examples/s beside {len(case.text) / reference_s:.2f},"
            f" {reference_s / ours_s:.2f} x (goal {GOALS[name]}; rounds "
            + ", ".join(f"{ratio:.2f}" for ratio in results[name]["ratios"])
            + ")",
            flush=True,
        )
    return results


def measure_packed(root: Path, rounds: int) -> dict[str, Any]:
    """Processor seconds of steps with padded and with packed rows, in turn; on a CPU attention is done row by row."""
    case = cases()["mixed"]
    results: dict[str, Any] = {}
    for name, changes in {
        "by number": {"micro_batch": MICRO_BATCH},
        "by tokens": {"micro_tokens": MICRO_TOKENS},
    }.items():
        plans = [plan_of(root, "mixed", case, packed=packed, **changes) for packed in (False, True)]
        expected = [preview(plan, 1).padded for plan in plans]
        steps = [our_step(plan) for plan in plans]
        taken = [tuple(processor_s(step) for step in steps) for _ in range(rounds + 1)][1:]  # the first one allocates
        padded_s, packed_s = (min(column) for column in zip(*taken, strict=True))
        results[name] = {"positions": expected, "padded_s": padded_s, "packed_s": packed_s}
        print(
            f"packed, micro-batches {name}: {expected[0]:.0f} positions padded, {expected[1]:.0f} packed,"
            f" {expected[0] / expected[1]:.2f} x; processor time {padded_s / packed_s:.2f} x",
            flush=True,
        )
    return results


def peak(root: Path, name: str, way: str) -> None:
    """In a process of its own: memory before the first step, and at most, in bytes."""
    case = cases()[name]
    if way == "ours":
        step = our_step(plan_of(root, name, case, micro_tokens=MICRO_TOKENS))
    else:
        step = reference_step(plan_of(root, name, case, order="paper"), len(case.text) // MICRO_BATCH)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    step()
    print(json.dumps({"before": before, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def measure_memory(root: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, case in cases().items():
        results[name] = {}
        for way in ("ours", "reference"):
            command = [sys.executable, __file__, "--peak", str(root), name, way]
            lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
            results[name][way] = json.loads(lines[-1])
        ours, reference = results[name]["ours"], results[name]["reference"]
        expected = preview(plan_of(root, name, case, micro_tokens=MICRO_TOKENS), 1).activation_bytes
        above = [(way["peak"] - way["before"]) / 1e9 for way in (ours, reference)]
        results[name]["ratio"] = ours["peak"] / reference["peak"]
        print(
            f"{name}: peak {ours['peak'] / 1e9:.2f} GB beside {reference['peak'] / 1e9:.2f} GB,"
            f" {results[name]['ratio']:.2f} (goal 0.7); above the loaded model {above[0]:.2f} beside {above[1]:.2f} GB,"
            f" of which --dry-run expects {expected / 1e9:.2f} GB in activations",
            flush=True,
        )
    return results


def measure_feed(root: Path, rounds: int) -> dict[str, Any]:
    """Wall seconds of steps with tokens from a cache and from memory, in turn, each way first every other time."""
    case = cases()["long"]
    plan = plan_of(root, "long", case, micro_tokens=MICRO_TOKENS, epochs=rounds, global_batch=4)
    trainee, optimizer, collator = trainee_of(plan)
    fed = Feed(plan, collator, rank=0, world=1).steps(0)
    held: Step = next(Feed(plan, collator, rank=0, world=1).steps(0))
    pairs: list[tuple[float, float]] = []
    waited_s = 0.0
    for number in range(rounds):
        taken_s = {}
        for way in ("cache", "memory") if number % 2 else ("memory", "cache"):
            begin_s = time.perf_counter()
            step = next(fed) if way == "cache" else held
            waited_s += time.perf_counter() - begin_s
            train_step(trainee.vlm, optimizer, step, plan, ALONE)
            taken_s[way] = time.perf_counter() - begin_s
        pairs.append((taken_s["memory"], taken_s["cache"]))
        if number == 0:  # allocates, and starts the threads
            pairs, waited_s = [], 0.0
    fed.close()
    ratio = statistics.median(memory_s / cache_s for memory_s, cache_s in pairs)
    wait = waited_s / sum(cache_s for _, cache_s in pairs)
    print(f"feed: in memory / from a cache {ratio:.3f} (goal 0.98); waited for {wait:.2%} of the time", flush=True)
    return {"ratio": ratio, "waited": wait}


def measure_stream(root: Path, photos: int) -> dict[str, Any]:
    """A step on a cache, and one that encodes; seconds an example, and after how many runs the cache has paid."""
    from PIL import Image

    from vlmx.extract.backbones.base import build_backbone
    from vlmx.extract.runner import extract
    from vlmx.extract.sources import open_source

    folder = root / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(photos):
        smooth = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((640, 480))
        smooth.save(folder / f"{number:03}.jpg", quality=90)
    turns = [{"from": "human", "value": f"<image>\n{words(80)}"}, {"from": "gpt", "value": words(28)}]
    rows = [{"id": f"p{n}", "image": f"{n:03}.jpg", "conversations": turns} for n in range(photos)]
    (root / "photos.json").write_text(json.dumps(rows))
    stream = StreamConfig(backbone="vmamba-t-in1k", res=512, weights="random:0", image_root=str(folder))
    source = open_source(str(root / "photos.json"), folder)
    begin_s = time.perf_counter()
    extract(build_backbone("vmamba-t-in1k", res=(512, 512), weights="random:0"), [source], root=root / "caches")
    extracted_s = (time.perf_counter() - begin_s) / photos
    seconds: dict[str, float] = {}
    for way, changes in {
        "cached": {"cache": "vmamba-t-in1k"},
        "on the fly": {"cache": "none", "stream": stream},
    }.items():
        config = TrainConfig(
            data=str(root / "photos.json"),
            llm=str(root / "llm"),
            prompt="plain",
            global_batch=photos // 2,
            micro_tokens=MICRO_TOKENS,
            **changes,  # type: ignore[arg-type]  # keys of the configuration
        )
        plan = make_plan(config, caches=root / "caches", world_size=1)
        trainee, optimizer, collator = trainee_of(plan)
        begin_s = time.perf_counter()
        for step in Feed(plan, collator, rank=0, world=1).steps(0):
            train_step(trainee.vlm, optimizer, step, plan, ALONE)
        seconds[way] = (time.perf_counter() - begin_s) / photos
    pays = extracted_s / (seconds["on the fly"] - seconds["cached"])
    print(
        f"stream: {1 / seconds['cached']:.2f} examples/s from the cache, {1 / seconds['on the fly']:.2f} encoding,"
        f" {seconds['on the fly'] / seconds['cached']:.2f} x; extraction takes {extracted_s:.2f} s an image:"
        f" it has paid after {pays:.2f} epochs in which each image is used once",
        flush=True,
    )
    return {**seconds, "extracted": extracted_s, "break_even_epochs": pays}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=["step", "packed", "memory", "feed", "stream"])
    parser.add_argument("--rounds", type=int, default=2, help="of the two ways to take a step")
    parser.add_argument("--log", type=Path, help="write the figures as JSON")
    parser.add_argument("--peak", nargs=3, metavar=("FOLDER", "CASE", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        peak(Path(options.peak[0]), options.peak[1], options.peak[2])
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_llm(root / "llm")
        for key, case in cases().items():
            write_case(root, key, case)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "step": lambda: measure_steps(root, options.rounds),
            "packed": lambda: measure_packed(root, options.rounds),
            "memory": lambda: measure_memory(root),
            "feed": lambda: measure_feed(root, 17),
            "stream": lambda: measure_stream(root, 8),
        }
        results = {part: measure() for part, measure in parts.items() if options.only in (None, part)}
    if options.log:
        options.log.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
