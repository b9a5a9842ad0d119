"""Does the mini LM's language lose nothing, and do symbolic cells say what the scene says?"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmx.data.mini.language import (
    FEATURE_GROUPS,
    FEATURES,
    blurred,
    cell_features,
    prompt_text,
    vocabulary,
    write_tokenizer,
)
from vlmx.data.mini.scenes import sample_scene
from vlmx.data.mini.study import BENCHMARKS, conversations, questions

LM = Path(__file__).resolve().parent.parent / "vlmx" / "data" / "mini" / "lm"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_ids_do_not_move(tokenizer: Any) -> None:
    assert len(tokenizer) == len(vocabulary()) == 178
    prompt = prompt_text("Is there a red circle?\nAnswer the question using a single word or phrase.")
    assert tokenizer(prompt)["input_ids"] == [6, 8, 16, 15, 54, 47, 75, 4, 7]


@pytest.mark.parametrize("answer", ["yes", "red", "3", "K", "[0.12, 0.34, 0.56, 0.78]", "[0.00, 0.05, 1.00, 0.99]"])
def test_answers_survive(answer: str, tokenizer: Any) -> None:
    if answer == "K":  # not one of the study's letters: unknown, and seen to be unknown
        assert tokenizer(answer)["input_ids"] == [tokenizer.unk_token_id]
        return
    plain, spaced = tokenizer(answer)["input_ids"], tokenizer(f" {answer}</s>")["input_ids"]
    assert [*plain, tokenizer.eos_token_id] == spaced
    assert tokenizer.decode(plain) == answer
    assert len(plain) <= 9


def test_all_of_the_study_is_in_the_language(tokenizer: Any) -> None:
    turns = {(t.question, t.answer) for c in conversations() for t in c.turns}
    prompts = {q.prompt for name in BENCHMARKS for q in questions(name)} | {question for question, _ in turns}
    answers = sorted({answer for _, answer in turns})
    ids = tokenizer([prompt_text(prompt) for prompt in sorted(prompts)])["input_ids"]
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert max(map(len, ids)) <= 40
    assert [tokenizer.decode(row) for row in tokenizer(answers)["input_ids"]] == answers


def test_cells_name_what_covers_them() -> None:
    scene = sample_scene("language", 0)
    cells = cell_features(scene)
    assert cells.shape == (64, FEATURES)
    assert cells[:, FEATURE_GROUPS["cover"]].max() <= 1
    for thing in scene.objects:
        x1, y1, x2, y2 = thing.box
        cell = cells[(y1 + y2) // 16 * 8 + (x1 + x2) // 16]  # where the middle of the object is
        colors = ("red", "green", "blue", "yellow", "purple", "white")
        assert colors[int(cell[FEATURE_GROUPS["color"]].argmax())] == thing.color


def test_blur_keeps_the_shape_and_changes_the_values() -> None:
    clean = np.stack([cell_features(sample_scene("language", i)) for i in range(4)])
    seen = blurred(clean, np.random.default_rng(0))
    assert seen.shape == clean.shape
    assert seen.dtype == np.float32
    assert not np.array_equal(seen, clean)
    assert np.array_equal(seen, blurred(clean, np.random.default_rng(0)))
    assert np.allclose(blurred(clean, np.random.default_rng(0), strength=0.0), clean)


def test_the_shipped_lm_loads_and_speaks_this_language() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(LM, dtype=torch.float32)
    shipped = AutoTokenizer.from_pretrained(LM)
    assert shipped.get_vocab() == {token: number for number, token in enumerate(vocabulary())}
    assert model.config.vocab_size == len(vocabulary())
    assert model.config.n_positions == 256
    assert (LM / "model.safetensors").stat().st_size < 2_000_000
