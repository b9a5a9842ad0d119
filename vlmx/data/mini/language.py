"""Which words does the mini LM know, and what did it see before pictures? Its tokenizer, and symbolic cells.

Shapes: B scenes, 64 cells (8 rows of 8, row by row), F features a cell.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from vlmx.data.mini.questions import BOX_REQUEST, SHORT_ANSWER
from vlmx.data.mini.scenes import COLORS, IMAGE_PX, LETTERS, SHAPES, Scene, owner_map

CELLS_A_SIDE = 8
CELL_PX = IMAGE_PX // CELLS_A_SIDE
PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"

_WORDS = (
    "USER: ASSISTANT: Is Where What How is are the a there to of on at in that many color shape size letter does show "
    "relative left right above below top bottom yes no object objects small large white sign signs crosses"
)
_WORD_PATTERN = r" ?\[|, |\]|\d\.\d\d| \d| ?[A-Za-z]+:?|[?.]"

_KINDS = (*SHAPES, "sign")
_TINTS = (*COLORS, "white")
FEATURE_GROUPS: dict[str, slice] = {}
for _name, _count in [
    ("cover", 1),
    ("shape", 5),
    ("color", 6),
    ("size", 2),
    ("letter", 8),
    ("extent", 4),
    ("edges", 4),
]:
    _start = max((s.stop for s in FEATURE_GROUPS.values()), default=0)
    FEATURE_GROUPS[_name] = slice(_start, _start + _count)
FEATURES = FEATURE_GROUPS["edges"].stop


def vocabulary() -> list[str]:
    """All tokens, in the order of their ids. Words carry the space before them; two sentences are one token each."""
    words = _WORDS.split() + list(SHAPES) + [f"{s}s" for s in SHAPES if s != "cross"] + list(COLORS) + list(LETTERS)
    spaced = [f" {word}" for word in dict.fromkeys([*words, *"01234", "["])]
    numbers = [f"{hundredth / 100:.2f}" for hundredth in range(101)]
    return [PAD, BOS, EOS, UNK, SHORT_ANSWER, BOX_REQUEST, *spaced, ", ", "]", "?", ".", *numbers]


def write_tokenizer(folder: Path) -> None:
    """Write the mini LM's tokenizer as a Hugging Face folder.

    The text of an answer survives encoding and decoding unchanged, with or without a space before it.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = vocabulary()
    core = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=UNK))
    core.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Prepend(" ")])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD_PATTERN), "isolated")
    core.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.add_tokens([AddedToken(t, normalized=False) for t in (SHORT_ANSWER, BOX_REQUEST)])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    tokenizer.save_pretrained(str(folder))


def prompt_text(question: str) -> str:
    """What stands before an answer: the form that the project calls "plain"."""
    return f"USER: {question} ASSISTANT:"


def cell_features(scene: Scene) -> npt.NDArray[np.float32]:
    """A scene as 64 symbolic cells: float32 [64, F], each value in -1 .. 2.

    A cell holds, weighted by the part of it that an object covers: what the object is (shape, color, size, letter),
    where in the cell its pixels begin and end (x1, y1, x2, y2 in cells), and how far its visible box's edges are from
    the cell's middle (in units of 16 px, cut at one and a half).
    """
    owner_CKCK = owner_map(scene.objects).reshape(CELLS_A_SIDE, CELL_PX, CELLS_A_SIDE, CELL_PX)
    cells = owner_CKCK.transpose(0, 2, 1, 3).reshape(CELLS_A_SIDE**2, CELL_PX, CELL_PX)
    features = np.zeros((CELLS_A_SIDE**2, FEATURES), dtype=np.float32)
    middle = np.arange(CELLS_A_SIDE) * CELL_PX + CELL_PX / 2
    middle_x, middle_y = np.tile(middle, CELLS_A_SIDE), np.repeat(middle, CELLS_A_SIDE)
    for number, thing in enumerate(scene.objects):
        seen = cells == number
        cover = seen.mean(axis=(1, 2), dtype=np.float32)
        columns, rows = seen.any(axis=1), seen.any(axis=2)
        row = np.zeros((CELLS_A_SIDE**2, FEATURES), dtype=np.float32)
        row[:, 0] = 1
        for group, position in (
            ("shape", _KINDS.index(thing.shape)),
            ("color", _TINTS.index(thing.color)),
            ("size", ("small", "large").index(thing.size)),
            ("letter", LETTERS.index(thing.letter) if thing.letter else None),
        ):
            if position is not None:
                row[:, FEATURE_GROUPS[group].start + position] = 1
        first_last = [columns.argmax(1), rows.argmax(1), 8 - columns[:, ::-1].argmax(1), 8 - rows[:, ::-1].argmax(1)]
        row[:, FEATURE_GROUPS["extent"]] = np.stack(first_last, axis=1) / CELL_PX
        x1, y1, x2, y2 = thing.box
        edges = np.stack([middle_x - x1, middle_y - y1, x2 - middle_x, y2 - middle_y], axis=1) / 16
        row[:, FEATURE_GROUPS["edges"]] = edges.clip(-0.5, 1.5)
        features += row * cover[:, None]
    return features


def blurred(
    features: npt.NDArray[np.float32], rng: np.random.Generator, *, strength: float = 1.0
) -> npt.NDArray[np.float32]:
    """The same cells as an imperfect eye would give them: float32 [B, 64, F] -> the same shape.

    Each scene draws how bad its eye is: noise on all features, edges, extents or sizes that are missing, features that
    leak into neighbouring cells. The LM learns to rely on no single hint.
    """
    batch = features.shape[0]
    grid = features.reshape(batch, CELLS_A_SIDE, CELLS_A_SIDE, -1)
    around = np.pad(grid, ((0, 0), (1, 1), (1, 1), (0, 0)))
    leaked = (around[:, :-2, 1:-1] + around[:, 2:, 1:-1] + around[:, 1:-1, :-2] + around[:, 1:-1, 2:]) / 4
    leak = strength * 0.5 * rng.random((batch, 1, 1, 1), dtype=np.float32) * (rng.random((batch, 1, 1, 1)) < 0.5)
    mixed = (grid + leak * (leaked - grid)).reshape(features.shape).astype(np.float32)
    noise = strength * 0.25 * rng.random((batch, 1, 1), dtype=np.float32)
    mixed += noise * rng.standard_normal(features.shape, dtype=np.float32)
    for group, missing in (("edges", 0.4), ("extent", 0.2), ("size", 0.5)):
        kept = rng.random((batch, 1, 1)) >= strength * missing
        mixed[..., FEATURE_GROUPS[group]] *= kept
    return mixed
