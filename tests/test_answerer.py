"""Does the answerer give each question its own image's tokens, whatever the cache stores, and what its LLM can do?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_samples import GOOD, write
from tiny_llm import tiny_llm, tiny_tokenizer

from vlmx.cache_specs.fused import FusedSpec
from vlmx.cache_specs.reader import TokenReader, open_cache
from vlmx.cache_specs.spec import DType
from vlmx.data.records import Question
from vlmx.errors import UsageError
from vlmx.evaluate.answerer import Answerer
from vlmx.evaluate.answers import Answer
from vlmx.evaluate.groups import groups_of
from vlmx.models.connectors import build_connector
from vlmx.models.folder import ModelCard, SavedModel
from vlmx.models.options import option_ids
from vlmx.models.prompts import choose_prompt
from vlmx.models.vlm import VLM

CPU = torch.device("cpu")
KEYS = [f"{number}.jpg" for number in range(4)]
ID_OF = dict(zip(KEYS, GOOD, strict=False))


def saved_model(reader: TokenReader | Any, llm: Any = None) -> SavedModel:
    """Answers of this model depend on what it sees: its weights are large."""
    assert not isinstance(reader.spec, FusedSpec)
    prompt = choose_prompt("vicuna-v1.5", tiny_tokenizer())
    torch.manual_seed(0)
    connector = build_connector("mlp2", reader.shape.dim, 32)
    llm = tiny_llm() if llm is None else llm
    with torch.no_grad():
        for weight in [*connector.parameters(), *llm.parameters()]:
            if weight.dim() > 1:
                weight.normal_(0.0, 0.3)
    card = ModelCard(
        connector="mlp2",
        dim_vision=reader.shape.dim,
        dim_llm=32,
        prompt=prompt.name,
        llm="tiny",
        spec=reader.spec,
        grid=reader.shape.grid,
    )
    vlm = VLM(connector, llm, visual_at=prompt.visual_at, eos_ids=[1]).eval()
    return SavedModel(vlm=vlm, prompt=prompt, card=card)


def questions(options: tuple[str, ...] = ()) -> list[Question]:
    return [
        Question(
            id=f"{number}",
            benchmark="b",
            image=KEYS[number % len(KEYS)],
            prompt="what is it " + "now " * (number % 5),
            kind="text",
            question_type="t",
            options=options,
        )
        for number in range(11)
    ]


def said(reader: TokenReader | Any, asked: Sequence[Question], **options: Any) -> dict[str, Answer]:
    answerer = Answerer(saved_model(reader, options.pop("llm", None)), CPU, **options)
    groups = answerer.answers(groups_of(asked, 4), reader, ID_OF)
    return {answer.id: answer for group in groups for answer in group}


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmx.evaluate.answerer.MAX_NEW_TOKENS", 6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_answers_are_the_models_for_what_the_cache_stands_for(tmp_path: Path, dtype: DType) -> None:
    reader = open_cache(write(tmp_path, dtype=dtype))
    found = said(reader, questions())
    saved = saved_model(reader)
    for question in questions():
        tokens_1ND = torch.from_numpy(reader.read_float32([ID_OF[question.image]]))
        ids = saved.vlm.generate(tokens_1ND, [saved.prompt.encode_question(question.prompt)], 6)[0]
        answer = found[question.id]
        assert (answer.text, answer.image) == (saved.prompt.decode(ids), question.image)
    assert len({answer.text for answer in found.values()}) > 5


def test_probabilities_are_the_models_first_token(tmp_path: Path) -> None:
    reader = open_cache(write(tmp_path))
    found = said(reader, questions(("A", "B", "C")))
    saved = saved_model(reader)
    chosen = option_ids(saved.prompt, ("A", "B", "C"))
    for question in questions():
        tokens_1ND = torch.from_numpy(reader.read_float32([ID_OF[question.image]]))
        logits_V = saved.vlm.first_token_logits(tokens_1ND, [saved.prompt.encode_question(question.prompt)])[0]
        expected = logits_V.softmax(dim=0)[chosen]
        answer = found[question.id]
        assert answer.probabilities == pytest.approx((expected / expected.sum()).tolist(), rel=1e-4)
        assert answer.text == "ABC"[int(expected.argmax())]


def test_one_at_a_time_shares_nothing(tmp_path: Path) -> None:
    reader = open_cache(write(tmp_path))
    for options in ((), ("A", "B")):
        shared, exact = said(reader, questions(options)), said(reader, questions(options), exact=True)
        assert {name: a.text for name, a in shared.items()} == {name: a.text for name, a in exact.items()}
    calls = []
    saved = saved_model(reader)
    saved.vlm.connector.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    answerer = Answerer(saved, CPU, exact=True)
    assert sum(map(len, answerer.answers(groups_of(questions(), 1), reader, ID_OF))) == 11
    assert calls == [1] * 11


def test_an_llm_that_cannot_share_answers_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "mistral", vocab_size=320, **sizes, num_key_value_heads=2, sliding_window=9, pad_token_id=0
    )
    reader = open_cache(write(tmp_path))
    for options in ((), ("A", "B")):
        both = [
            said(reader, questions(options), exact=exact, llm=AutoModelForCausalLM.from_config(config))
            for exact in (False, True)
        ]
        assert {name: a.text for name, a in both[0].items()} == {name: a.text for name, a in both[1].items()}
    assert "do not share its prefix: some of its layers" in capsys.readouterr().err


def test_bf16_keeps_rotary_frequencies_and_ties(tmp_path: Path) -> None:
    reader = open_cache(write(tmp_path))
    saved = saved_model(reader, tiny_llm(tied=True))
    before = saved.vlm.llm.model.rotary_emb.inv_freq.clone()
    Answerer(saved, CPU, dtype="bf16")
    assert torch.equal(saved.vlm.llm.model.rotary_emb.inv_freq, before)
    assert {parameter.dtype for parameter in saved.vlm.parameters()} == {torch.bfloat16}
    assert saved.vlm.llm.lm_head.weight is saved.vlm.llm.model.embed_tokens.weight
    assert len(said(reader, questions(), dtype="bf16")) == 11


def test_a_table_of_positions_that_is_too_short(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    llm = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    reader = open_cache(write(tmp_path))
    with pytest.raises(UsageError, match=r"needs \d+ positions, and the LLM has 64"):
        said(reader, questions(), llm=llm)
    answerer = Answerer(saved_model(reader, llm), CPU)
    answerer.check("b", groups_of(questions(), 4)[:0], 999)
    with pytest.raises(UsageError, match=r"needs \d+ positions"):  # before anything is answered
        answerer.check("b", groups_of(questions(), 4), reader.shape.num_tokens)
