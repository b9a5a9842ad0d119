"""How was the mini study's small LM made? It learned the study's language on symbolic scenes; it never saw a pixel.

    python scripts/mini_pretrain_lm.py --seed 7 --out vlmx/data/mini/lm

Each scene is 64 symbolic cells (vlmx/data/mini/language.py) that a linear layer, thrown away afterwards, brings to the
LM's width. They stand right after <s>; then come the scene's turns, each of which sees the cells and itself only, at
positions that start anew after the cells.

Binding words to things is what such a small net finds last, so it is told where to look: two heads of the second layer
are drawn from each name in a question ("red circle") to the cells of the things it fits, two heads of the last layer
from the answer to the cells of the thing asked for. This fades out as the training ends; at use nothing is told.

Shapes: B scenes, T tokens, E width of the LM, 64 cells, A answer tokens of a batch.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vlmx.data.mini.dice import Dice
from vlmx.data.mini.language import FEATURES, blurred, cell_features, prompt_text, write_tokenizer
from vlmx.data.mini.questions import Asked, named
from vlmx.data.mini.scenes import COLORS, Scene, owner_map, sample_scene
from vlmx.data.mini.study import turns_of

if TYPE_CHECKING:  # imported where it is used: after vlmx, whose guard it needs beside CPU builds of torch
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

PREFIX = 65  # <s> and 64 cells
HELD_OUT_FROM = 10_000_000  # scenes of split "language" from this index on are never trained on


NAME = re.compile(
    rf"((small|large) )?(({'|'.join((*COLORS, 'white'))}) )?((circle|square|triangle|sign|object)s?|cross(es)?)\b"
)
GROUP_WEIGHTS = {"mini-relation": 2.0, "mini-attribute": 1.5, "mini-ref-plain": 1.5}  # what is learned last counts more

Cells = npt.NDArray[np.bool_]  # [64], which cells a thing covers


@dataclass(frozen=True, kw_only=True)
class Coded:
    """One turn as token ids; `answer` includes the end token.

    `names` holds the position in `prompt` of each name's last word and the cells of all things that it fits; `target`
    the cells of the thing that the answer is about, None if it is not about one thing.
    """

    prompt: list[int]
    answer: list[int]
    asked: Asked
    names: tuple[tuple[int, Cells], ...] = ()
    target: Cells | None = None


@dataclass(frozen=True, kw_only=True)
class Gaze:
    """From which text positions heads shall look at which cells."""

    rows_G: Tensor
    positions_G: Tensor
    cells_GC: Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token ids after the prefix, their positions, who sees whom, and where answers are predicted from."""

    ids_BT: Tensor
    positions_BT: Tensor
    mask_B1TT: Tensor  # of prefix and text together
    predict_from_A: Tensor  # flat positions in [B, PREFIX + T]
    targets_A: Tensor
    weights_A: Tensor  # each answer of a group weighs the same, however long; they sum to one
    names: Gaze
    targets: Gaze


def encode(tokenizer: PreTrainedTokenizerBase, asked: Asked, scene: Scene) -> Coded:
    """Token ids of a turn, and where its names and its answer shall look."""
    text = prompt_text(asked.prompt)
    coded = tokenizer(text, return_offsets_mapping=True)
    answer = [*tokenizer(asked.answer)["input_ids"], tokenizer.eos_token_id]
    cells = covered_cells(scene)
    names = []
    for match in NAME.finditer(text):
        fitting = [cells[at] for at, thing in enumerate(scene.objects) if thing in named(scene, singular(match[0]))]
        ends = [at for at, (first, last) in enumerate(coded["offset_mapping"]) if first < match.end() <= last]
        if fitting and ends:
            names.append((ends[0], np.any(fitting, axis=0)))
    target: Cells | None = None
    if asked.box is not None:
        target = next(cells[at] for at, thing in enumerate(scene.objects) if thing.box == asked.box)
    elif asked.group == "mini-read":
        target = next(cells[at] for at, thing in enumerate(scene.objects) if thing.letter is not None)
    elif asked.group == "mini-attribute" and names:
        target = names[-1][1]
    return Coded(prompt=coded["input_ids"], answer=answer, asked=asked, names=tuple(names), target=target)


def singular(name: str) -> str:
    """The name of one thing: "red circles" -> "red circle", "crosses" -> "cross"."""
    if name.endswith("crosses"):
        return name.removesuffix("es")
    return name if name.endswith("cross") else name.removesuffix("s")


def covered_cells(scene: Scene) -> npt.NDArray[np.bool_]:
    """The cells of which each object covers enough to be seen there: bool [objects, 64]."""
    owner = owner_map(scene.objects).reshape(8, 8, 8, 8).transpose(0, 2, 1, 3).reshape(64, 64)
    cover = np.stack([(owner == number).mean(axis=1) for number in range(len(scene.objects))])
    return np.asarray(cover >= 0.25 * cover.max(axis=1, keepdims=True))


def collate(conversations: list[list[Coded]], pad: int) -> Batch:
    """Pack each conversation's turns behind its prefix, isolated from each other."""
    longest = max(sum(len(t.prompt) + len(t.answer) - 1 for t in turns) for turns in conversations)
    size, total = len(conversations), PREFIX + longest
    ids = torch.full((size, longest), pad)
    positions = torch.zeros((size, longest), dtype=torch.long)
    turn_of = torch.full((size, total), -1)
    turn_of[:, :PREFIX] = 0
    sources: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    to_names: list[tuple[int, int, Cells]] = []
    to_targets: list[tuple[int, int, Cells]] = []
    for row, turns in enumerate(conversations):
        at = 0
        for number, turn in enumerate(turns, start=1):
            tokens = turn.prompt + turn.answer[:-1]  # nothing is predicted from the end token
            end = at + len(tokens)
            ids[row, at:end] = torch.tensor(tokens)
            positions[row, at:end] = torch.arange(PREFIX, PREFIX + len(tokens))
            turn_of[row, PREFIX + at : PREFIX + end] = number
            first = row * total + PREFIX + at + len(turn.prompt) - 1
            sources += range(first, first + len(turn.answer))
            targets += turn.answer
            weights += [GROUP_WEIGHTS.get(turn.asked.group, 1.0) / len(turn.answer)] * len(turn.answer)
            to_names += [(row, PREFIX + at + position, cells) for position, cells in turn.names]
            if turn.target is not None:
                start = PREFIX + at + len(turn.prompt) - 1
                to_targets += [(row, start + ahead, turn.target) for ahead in range(len(turn.answer) - 1)]
            at = end
    same = turn_of[:, :, None] == turn_of[:, None, :]
    prefix = (turn_of == 0)[:, None, :]
    mask = (same | prefix) & torch.ones(total, total, dtype=torch.bool).tril()
    return Batch(
        ids_BT=ids,
        positions_BT=positions,
        mask_B1TT=mask[:, None],
        predict_from_A=torch.tensor(sources),
        targets_A=torch.tensor(targets),
        weights_A=torch.tensor(weights) / sum(weights),
        names=gather(to_names),
        targets=gather(to_targets),
    )


def gather(looks: list[tuple[int, int, Cells]]) -> Gaze:
    return Gaze(
        rows_G=torch.tensor([row for row, _, _ in looks], dtype=torch.long),
        positions_G=torch.tensor([position for _, position, _ in looks], dtype=torch.long),
        cells_GC=torch.from_numpy(np.array([cells for _, _, cells in looks], dtype=np.bool_).reshape(-1, 64)),
    )


def gaze_loss(qkv_BTX: Tensor, gaze: Gaze, heads: int) -> Tensor:
    """Mean negative log of the attention, among the cells, that the first two heads give to the right ones."""
    if len(gaze.rows_G) == 0:
        return qkv_BTX.new_zeros(())
    query_BTE, key_BTE, _ = qkv_BTX.chunk(3, dim=2)
    query_GHD = query_BTE[gaze.rows_G, gaze.positions_G].unflatten(1, (heads, -1))[:, :2]
    key_BCHD = key_BTE[:, 1:PREFIX].unflatten(2, (heads, -1))[:, :, :2]
    scores_GHC = torch.einsum("ghd,gchd->ghc", query_GHD, key_BCHD[gaze.rows_G]) / math.sqrt(query_GHD.shape[2])
    log_GHC = scores_GHC.log_softmax(dim=2).masked_fill(~gaze.cells_GC[:, None], -torch.inf)
    return -log_GHC.logsumexp(dim=2).mean()


def answer_logits(model: GPT2LMHeadModel, visual_BNE: Tensor, batch: Batch) -> Tensor:
    """Logits [A, vocabulary] where answers are predicted."""
    embed = model.get_input_embeddings()
    bos_B1E = embed(torch.full((visual_BNE.shape[0], 1), model.config.bos_token_id))
    embeds_BTE = torch.cat([bos_B1E, visual_BNE, embed(batch.ids_BT)], dim=1)
    prefix = torch.arange(PREFIX).expand(visual_BNE.shape[0], -1)
    hidden_BTE = model.transformer(
        inputs_embeds=embeds_BTE,
        attention_mask=batch.mask_B1TT,
        position_ids=torch.cat([prefix, batch.positions_BT], dim=1),
        use_cache=False,
    ).last_hidden_state
    logits_AV: Tensor = model.lm_head(hidden_BTE.flatten(0, 1)[batch.predict_from_A])
    return logits_AV


@torch.no_grad()
def accuracy(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, visual_BNE: Tensor, conversations: list[list[Coded]]
) -> dict[str, tuple[float, int]]:
    """Share of right greedy answers a group (boxes: IoU of at least one half) and their number."""
    right: dict[str, list[bool]] = {}
    for start in range(0, len(conversations), 32):
        chunk = conversations[start : start + 32]
        rows = torch.tensor([start + row for row, turns in enumerate(chunk) for _ in turns])
        turns = [turn for turns in chunk for turn in turns]
        said: list[list[int]] = [[] for _ in turns]
        for _ in range(max(len(turn.answer) for turn in turns)):
            tried = [[Coded(prompt=t.prompt + s, answer=[0], asked=t.asked)] for t, s in zip(turns, said, strict=True)]
            best = answer_logits(model, visual_BNE[rows], collate(tried, tokenizer.pad_token_id)).argmax(1).tolist()
            for words, token in zip(said, best, strict=True):
                words.append(token)
        for turn, words in zip(turns, said, strict=True):
            end = words.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in words else len(words)
            right.setdefault(turn.asked.group, []).append(is_right(turn.asked, str(tokenizer.decode(words[:end]))))
    return {group: (sum(hits) / len(hits), len(hits)) for group, hits in sorted(right.items())}


def is_right(asked: Asked, said: str) -> bool:
    if asked.box is None:
        return said == asked.answer
    if not re.fullmatch(r"\[\d\.\d\d, \d\.\d\d, \d\.\d\d, \d\.\d\d\]", said):
        return False
    x1, y1, x2, y2 = (64 * float(edge) for edge in said[1:-1].split(", "))
    a1, b1, a2, b2 = asked.box
    inter = max(0.0, min(x2, a2) - max(x1, a1)) * max(0.0, min(y2, b2) - max(y1, b1))
    union = max(0.0, x2 - x1) * max(0.0, y2 - y1) + (a2 - a1) * (b2 - b1) - inter
    return inter >= 0.5 * union


@torch.no_grad()
def start_positions(model: GPT2LMHeadModel) -> None:
    """Let the learned positions of the cells start as waves along rows and columns: neighbours start alike."""
    model.transformer.wte.weight.mul_(5)
    model.transformer.wpe.weight.mul_(5)
    waves = model.config.n_embd // 4
    turns_8W = torch.arange(8)[:, None] / 8 * torch.linspace(0.5, 3.0, waves) * math.pi
    line_8H = torch.cat([turns_8W.sin(), turns_8W.cos()], dim=1)
    grid = torch.cat([line_8H[:, None].expand(8, 8, -1), line_8H[None].expand(8, 8, -1)], dim=2)
    model.transformer.wpe.weight[1:PREFIX] = 0.2 * grid.flatten(0, 1)


def load_scenes(
    tokenizer: PreTrainedTokenizerBase, first: int, count: int
) -> tuple[npt.NDArray[np.float16], list[list[Coded]]]:
    """Clean cells float16 [count, 64, F] and encoded turns of scenes of split "language"."""
    cells = np.empty((count, 64, FEATURES), dtype=np.float16)
    conversations = []
    for row in range(count):
        scene = sample_scene("language", first + row)
        cells[row] = cell_features(scene)
        asked = turns_of(scene, Dice(f"turns:{scene.key}"))
        conversations.append([encode(tokenizer, turn, scene) for turn in asked])
    return cells, conversations


def save(model: GPT2LMHeadModel, out: Path, card: dict[str, object]) -> None:
    """Write the LM in half precision with its card."""
    from transformers import GPT2LMHeadModel

    half = GPT2LMHeadModel(model.config)
    half.load_state_dict(model.state_dict())
    half.to(torch.float16).save_pretrained(out)
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def main() -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--blur", type=float, default=0.6, help="how bad the eyes of the second half are")
    parser.add_argument("--scenes", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--muon-lr", type=float, default=0.01)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    args.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(args.out)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=256,
            n_embd=args.width,
            n_layer=args.layers,
            n_head=4,
            n_inner=2 * args.width,
            activation_function="relu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    start_positions(model)
    cells_to_lm = nn.Linear(FEATURES, args.width)
    started_s = time.process_time()
    cells, conversations = load_scenes(tokenizer, 0, args.scenes)
    held_cells, held_out = load_scenes(tokenizer, HELD_OUT_FROM, 150)
    held_blurred = blurred(held_cells.astype(np.float32), np.random.default_rng(1))
    print(f"{args.scenes} scenes in {time.process_time() - started_s:.0f} CPU-s", flush=True)

    # Not c_attn: queries, keys and values are one matrix there; the values' larger gradients would crowd out both.
    matrices = [p for name, p in model.transformer.h.named_parameters() if p.ndim == 2 and "c_attn" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in [*model.parameters(), *cells_to_lm.parameters()] if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=args.lr, weight_decay=0.01, betas=(0.9, 0.98)),
    ]

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 200, max(0.02, 2.5 * (1 - step / args.steps)))  # flat, then down from 60 % on

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    seen_by: dict[int, Tensor] = {}
    for layer in (1, args.layers - 1):
        attention = model.transformer.h[layer].attn.c_attn
        attention.register_forward_hook(lambda _, __, output, layer=layer: seen_by.__setitem__(layer, output))
    running, order = np.zeros(3), np.empty(0, dtype=np.int64)
    for step in range(1, args.steps + 1):
        if len(order) < args.batch:
            order = rng.permutation(args.scenes)
        rows, order = order[: args.batch], order[args.batch :]
        batch = collate([conversations[row] for row in rows], tokenizer.pad_token_id)
        visual_BNE = cells_to_lm(
            torch.from_numpy(
                blurred(cells[rows].astype(np.float32), rng, strength=args.blur * min(1.0, 2 * step / args.steps))
            )
        )
        logits = answer_logits(model, visual_BNE, batch)
        loss = nn.functional.cross_entropy(logits, batch.targets_A, reduction="none") @ batch.weights_A
        to_names = gaze_loss(seen_by[1], batch.names, model.config.n_head)
        to_targets = gaze_loss(seen_by[args.layers - 1], batch.targets, model.config.n_head)
        (loss + 0.5 * max(0.1, 1 - step / args.steps) * (to_names + to_targets)).backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *cells_to_lm.parameters()], 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        running += np.array([loss.item(), to_names.item(), to_targets.item()]) / 100
        if step % 100 == 0:
            told = f"loss {running[0]:.3f} gaze {running[1]:.3f} {running[2]:.3f}"
            print(f"{step:6d} {told} {time.process_time() - started_s:6.0f} CPU-s", flush=True)
            running[:] = 0
        if step % 1000 == 0 or step == args.steps:
            last = step == args.steps
            count = 150 if last else 60
            scores = {}
            for eye, seen in (("clean", held_cells), ("blurred", held_blurred)):
                with torch.no_grad():
                    visual = cells_to_lm(torch.from_numpy(seen[:count].astype(np.float32)))
                found = accuracy(model, tokenizer, visual, held_out[:count])
                scores[eye] = {group: round(share, 3) for group, (share, _) in found.items()}
                print(eye, scores[eye], flush=True)
            card: dict[str, object] = {
                "what": "LM of the mini study, trained on symbolic scenes only",
                "seed": args.seed,
                "blur": args.blur,
                "steps": step,
                "of_steps": args.steps,
                "scenes": args.scenes,
                "scenes_a_step": args.batch,
                "cpu_seconds": round(time.process_time() - started_s),
                "torch": torch.__version__,
                "parameters": sum(p.numel() for p in model.parameters()),
                "held_out_scenes": count,
                "accuracy": scores,
            }
            save(model, args.out, card)


if __name__ == "__main__":
    main()
