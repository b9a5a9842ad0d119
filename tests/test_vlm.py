"""Does the VLM compute what its definition says: losses, isolated turns, answers, and its folder on disk?"""

from dataclasses import replace

import pytest
import torch
from cache_samples import spec_of
from tiny_llm import tiny_llm, tiny_tokenizer, write_tiny_llm

from vlmx.errors import RunError, WeightsError
from vlmx.models.connectors import build_connector
from vlmx.models.folder import ModelCard, load_model, save_model
from vlmx.models.llm import has_rotary_positions, has_sliding_window, load_llm
from vlmx.models.prompts import IGNORED, choose_prompt
from vlmx.models.vlm import VLM, Batch

N, D = 4, 6
TURNS = [("what is it?", "a cat"), ("where is it?", "[0.12, 0.34, 0.56, 0.78]"), ("is it red?", "yes")]


@pytest.fixture(scope="module")
def prompt():
    return choose_prompt("plain", tiny_tokenizer())


@pytest.fixture
def vlm():
    return VLM(build_connector("mlp2", D, 32), tiny_llm(), visual_at=1, eos_ids=[1]).eval()


STATEFUL = {  # LLMs that keep no keys and values
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
}


@pytest.mark.parametrize("family", sorted(STATEFUL))
def test_llms_that_ignore_a_cache_answer_as_without_one(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1}
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **STATEFUL[family]))
    for parameter in llm.parameters():
        parameter.data.mul_(3)  # so that what was said before matters
    vlm = VLM(build_connector("mlp2", D, 32), llm, visual_at=1).eval()
    ids, tokens = [0, 5, 6, 7, 8], visual(1)
    (answer,) = vlm.generate(tokens, [ids], 6)
    for number, token in enumerate(answer):
        logits_BV = vlm.first_token_logits(tokens, [[*ids, *answer[:number]]])
        assert int(logits_BV.argmax()) == token


def visual(count, seed=0):
    return 20 * torch.randn(count, N, D, generator=torch.Generator().manual_seed(seed))


def batch_of(rows, images):
    """Rows of (ids, labels) without visual tokens; images[b] is a row of the visual tokens or None."""
    widths = [len(ids) + (N if image is not None else 0) for (ids, _), image in zip(rows, images, strict=True)]
    ids_BT = torch.zeros(len(rows), max(widths), dtype=torch.long)
    labels_BT = torch.full_like(ids_BT, IGNORED)
    for b, ((ids, labels), image) in enumerate(zip(rows, images, strict=True)):
        gap = N if image is not None else 0
        ids_BT[b, : widths[b]] = torch.tensor([ids[0], *[0] * gap, *ids[1:]])
        labels_BT[b, : widths[b]] = torch.tensor([labels[0], *[IGNORED] * gap, *labels[1:]])
    with_image = [b for b, image in enumerate(images) if image is not None]
    learned = labels_BT != IGNORED
    batch = Batch(
        input_ids_BT=ids_BT,
        visual_UND=visual(max([1, *[i + 1 for i in images if i is not None]])) if with_image else visual(0),
        image_rows=torch.tensor(with_image, dtype=torch.long),
        image_of_row=torch.tensor([i for i in images if i is not None], dtype=torch.long),
        predictor_S=learned.flatten().nonzero()[:, 0] - 1,
        target_S=labels_BT[learned],
    )
    return batch, labels_BT


def test_loss_is_hugging_faces_over_all_positions(vlm, prompt):
    encoded = [prompt.encode(TURNS[:2]), prompt.encode(TURNS[2:]), prompt.encode(TURNS[1:])]
    batch, labels_BT = batch_of([(e.input_ids, e.labels) for e in encoded], [0, None, 1])
    loss = vlm(batch)
    embeds_BTE = vlm.llm.get_input_embeddings()(batch.input_ids_BT).clone()
    embeds_BTE[0, 1 : 1 + N] = vlm.connector(batch.visual_UND[0])
    embeds_BTE[2, 1 : 1 + N] = vlm.connector(batch.visual_UND[1])
    expected = vlm.llm(inputs_embeds=embeds_BTE, labels=labels_BT).loss
    torch.testing.assert_close(loss / len(batch.target_S), expected, rtol=1e-5, atol=1e-6)


OTHER_LLMS = {
    "gpt2": {"n_inner": 48, "resid_pdrop": 0.0},  # a table of positions
    "qwen3": {"head_dim": 16, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 16, "num_key_value_heads": 1, "query_pre_attn_scalar": 16},  # scales and caps its logits
}


@pytest.mark.parametrize("family", OTHER_LLMS)
def test_other_llms(family, prompt):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(family, **sizes, **OTHER_LLMS[family], bos_token_id=0, eos_token_id=1, pad_token_id=0)
    llm = AutoModelForCausalLM.from_config(config)
    vlm = VLM(build_connector("linear", D, 32), llm, eos_ids=[1]).eval()
    test_loss_is_hugging_faces_over_all_positions(vlm, prompt)
    test_generation_is_greedy_and_stops_at_the_end_token(vlm, prompt)
    assert has_sliding_window(config) == (family == "gemma2")
    assert has_rotary_positions(config) == (family != "gpt2")


def test_loss_does_not_depend_on_padding_and_neighbours(vlm, prompt):
    encoded = [prompt.encode(TURNS), prompt.encode(TURNS[2:])]
    together, _ = batch_of([(e.input_ids, e.labels) for e in encoded], [0, 1])
    alone = [batch_of([(e.input_ids, e.labels)], [i])[0] for i, e in enumerate(encoded)]
    alone = [replace(b, visual_UND=together.visual_UND) for b in alone]
    torch.testing.assert_close(vlm(together), vlm(alone[0]) + vlm(alone[1]), rtol=1e-5, atol=1e-5)


def test_text_only_rows_give_the_connector_gradients_of_zero(vlm, prompt):
    encoded = prompt.encode(TURNS)
    batch, _ = batch_of([(encoded.input_ids, encoded.labels)], [None])
    vlm(batch).backward()
    gradients = [p.grad for p in vlm.connector.parameters()]
    assert all(g is not None and not g.any() for g in gradients)
    assert vlm.llm.get_output_embeddings().weight.grad.any()


def test_text_only_rows_may_be_shorter_than_an_image(vlm):
    short = batch_of([([0, 5, 6], [IGNORED, 5, 6])], [None])[0]
    longer = batch_of([([0, 5, 6, *[0] * 9], [IGNORED, 5, 6, *[IGNORED] * 9])], [None])[0]
    loss = vlm(short)
    assert loss.item() == pytest.approx(vlm(longer).item(), rel=1e-6)
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in vlm.connector.parameters())


def test_nothing_learned_is_a_loss_of_zero(vlm, prompt):
    ids = prompt.encode_question("what?")
    batch, _ = batch_of([(ids, [IGNORED] * len(ids))], [0])
    loss = vlm(batch)
    loss.backward()
    assert loss == 0.0
    assert not any(p.grad.any() for p in vlm.connector.parameters())


def test_isolated_turns_equal_each_turn_alone(vlm, prompt):
    together = prompt.encode(TURNS, isolated=True)
    batch, _ = batch_of([(together.input_ids, together.labels)], [0])
    turns = torch.tensor([[0, *[0] * N, *together.turn_of_token[1:]]])
    positions = torch.tensor([[sum(1 for u in turns[0, :t] if u in (0, k)) for t, k in enumerate(turns[0])]])
    isolated = vlm(replace(batch, turn_BT=turns, position_BT=positions))
    alone = [batch_of([(e.input_ids, e.labels)], [0])[0] for e in (prompt.encode([turn]) for turn in TURNS)]
    torch.testing.assert_close(isolated, sum(vlm(b) for b in alone), rtol=1e-5, atol=1e-5)
    assert abs(isolated.item() - vlm(batch).item()) > 1e-3  # the mask matters


def test_generation_does_not_depend_on_grouping(vlm, prompt):
    questions = ["what is it?", "where?", "what is it?", "is it red?"]
    ids = [prompt.encode_question(question) for question in questions]
    tokens = visual(4)
    together = vlm.generate(tokens, ids, 6)
    alone = [vlm.generate(tokens[i : i + 1], [ids[i]], 6)[0] for i in range(4)]
    assert together == alone
    assert together[0] != together[2]  # same question, another image
    assert all(len(answer) == 6 or 1 not in answer for answer in together)


def test_generation_is_greedy_and_stops_at_the_end_token(vlm, prompt):
    ids = prompt.encode_question("where?")
    answer = vlm.generate(visual(1), [ids], 5)[0]
    text_ids = list(ids)
    for token in answer:
        assert vlm.first_token_logits(visual(1), [text_ids])[0].argmax() == token
        text_ids.append(token)
    ending = VLM(vlm.connector, vlm.llm, eos_ids=[answer[2]])
    assert ending.generate(visual(1), [ids], 5)[0] == answer[: answer.index(answer[2])]


def test_first_token_logits_in_the_order_of_the_prompts(vlm, prompt):
    ids = [prompt.encode_question(question) for question in ("where?", "what is it?", "where?")]
    logits_BV = vlm.first_token_logits(visual(3), ids)
    assert logits_BV.shape == (3, 320)
    for row in range(3):
        alone = vlm.first_token_logits(visual(3)[row : row + 1], [ids[row]])[0]
        torch.testing.assert_close(logits_BV[row], alone, rtol=1e-5, atol=1e-5)


CARD = ModelCard(
    connector="mlp2",
    dim_vision=D,
    dim_llm=32,
    prompt="plain",
    llm="tiny",
    spec=spec_of(),
    grid=(2, 2),
)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_is_the_same(tmp_path, vlm, prompt, tied):
    vlm = VLM(vlm.connector, tiny_llm(tied=tied), eos_ids=[1]).eval()
    save_model(tmp_path / "model", vlm, prompt.tokenizer, CARD)
    saved = load_model(tmp_path / "model")
    assert saved.card == CARD
    ids = saved.prompt.encode_question("where?")
    assert ids == prompt.encode_question("where?")
    assert all(torch.equal(value, vlm.state_dict()[key]) for key, value in saved.vlm.state_dict().items())
    logits = [model.first_token_logits(visual(1), [ids]) for model in (saved.vlm, vlm)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-6)


def test_half_a_model_folder_is_an_error(tmp_path, vlm, prompt):
    save_model(tmp_path, vlm, prompt.tokenizer, CARD)
    (tmp_path / "model.json").unlink()
    with pytest.raises(RunError, match="no trained model"):
        load_model(tmp_path)


def test_llm_folders_that_cannot_be_loaded(tmp_path):
    with pytest.raises(WeightsError, match="there is no LLM folder"):
        load_llm(str(tmp_path / "absent"))
    with pytest.raises(WeightsError, match="is not an LLM folder"):
        load_llm(str(tmp_path))
    folder = write_tiny_llm(tmp_path / "llm")
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="has no weights"):
        load_llm(str(folder))
    with pytest.raises(WeightsError, match="cannot be loaded") as caught:
        load_llm("someone/absent-model")
    assert "HF_HUB_OFFLINE" in caught.value.fix


def test_llm_with_missing_tensors(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_tiny_llm(tmp_path / "llm")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="do not fill") as caught:
        load_llm(str(folder))
    assert "model.norm.weight" in caught.value.why
