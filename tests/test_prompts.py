"""Are prompts the reference's, and is exactly the answer learned?"""

import pytest
from tiny_llm import tiny_tokenizer

from vlmx.errors import UnknownNameError, UsageError
from vlmx.models.prompts import IGNORED, VICUNA_SYSTEM, choose_prompt

TURNS = [("<image>\nwhat is it?", "a cat"), ("\nwhere?", "[0.12, 0.34, 0.5, 0.78]")]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def learned_texts(tokenizer, encoded):
    """Runs of supervised tokens, as text."""
    runs, run = [], []
    for label in [*encoded.labels, IGNORED]:
        if label != IGNORED:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def test_vicuna_text_and_labels(tokenizer):
    prompt = choose_prompt("vicuna-v1.5", tokenizer)
    encoded = prompt.encode(TURNS)
    assert tokenizer.decode(encoded.input_ids) == (
        f"<s>{VICUNA_SYSTEM} USER: what is it? ASSISTANT:a cat</s>USER: where? ASSISTANT:[0.12, 0.34, 0.5, 0.78]</s>"
    )
    assert learned_texts(tokenizer, encoded) == ["a cat</s>", "[0.12, 0.34, 0.5, 0.78]</s>"]
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    assert encoded.labels[0] == IGNORED
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1


def test_vicuna_segments_are_tokenised_separately(tokenizer):
    encoded = choose_prompt("vicuna-v1.5", tokenizer).encode(TURNS[:1])
    parts = [f"{VICUNA_SYSTEM} USER: what is it? ASSISTANT:", "a cat</s>"]
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    assert encoded.input_ids == [tokenizer.bos_token_id, *ids[0], *ids[1]]


def test_vicuna_empty_answer_is_a_space(tokenizer):
    encoded = choose_prompt("vicuna-v1.5", tokenizer).encode([("q", "")])
    assert learned_texts(tokenizer, encoded) == [" </s>"]


def test_plain_text_and_labels(tokenizer):
    encoded = choose_prompt("plain", tokenizer).encode(TURNS)
    assert tokenizer.decode(encoded.input_ids) == (
        "<s>USER: what is it? ASSISTANT: a cat</s>USER: where? ASSISTANT: [0.12, 0.34, 0.5, 0.78]</s>"
    )
    assert learned_texts(tokenizer, encoded) == [" a cat</s>", " [0.12, 0.34, 0.5, 0.78]</s>"]


def test_chat_learns_the_answers_of_the_template():
    tokenizer = tiny_tokenizer(chat=True)
    encoded = choose_prompt("chat", tokenizer).encode(TURNS)
    assert tokenizer.decode(encoded.input_ids) == (
        "<s>[user] what is it?\n[assistant] a cat</s>\n[user] where?\n[assistant] [0.12, 0.34, 0.5, 0.78]</s>"
    )
    assert learned_texts(tokenizer, encoded) == ["a cat</s>", "[0.12, 0.34, 0.5, 0.78]</s>"]


def test_chat_refuses_a_template_that_rewrites_the_past():
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{{ bos_token }}{{ messages | length }} {{ messages[-1]['content'] }}"
    with pytest.raises(UsageError, match="turn by turn"):
        choose_prompt("chat", tokenizer).encode(TURNS)


@pytest.mark.parametrize("name", ["vicuna-v1.5", "plain", "chat"])
def test_question_is_the_start_of_the_conversation(name):
    tokenizer = tiny_tokenizer(chat=True)
    prompt = choose_prompt(name, tokenizer)
    encoded = prompt.encode(TURNS[:1])
    question = prompt.encode_question(TURNS[0][0])
    assert question == encoded.input_ids[: len(question)]
    assert encoded.labels[len(question)] != IGNORED
    assert set(encoded.labels[: len(question)]) == {IGNORED}


@pytest.mark.parametrize("name", ["vicuna-v1.5", "plain", "chat"])
def test_isolated_turns_are_single_conversations_behind_one_bos(name):
    prompt = choose_prompt(name, tiny_tokenizer(chat=True))
    together = prompt.encode(TURNS, isolated=True)
    alone = [prompt.encode([turn]) for turn in TURNS]
    assert together.input_ids == [*alone[0].input_ids, *alone[1].input_ids[1:]]
    assert together.labels == [*alone[0].labels, *alone[1].labels[1:]]
    assert together.turn_of_token == [0, *[1] * (len(alone[0].labels) - 1), *[2] * (len(alone[1].labels) - 1)]


def test_auto(tokenizer):
    assert choose_prompt("auto", tokenizer).name == "vicuna-v1.5"
    assert choose_prompt("auto", tokenizer, mini_llm=True).name == "plain"
    assert choose_prompt("auto", tiny_tokenizer(chat=True)).name == "chat"


def test_errors(tokenizer):
    with pytest.raises(UnknownNameError, match="vicuna"):
        choose_prompt("vicuna", tokenizer)
    with pytest.raises(UsageError, match="no chat template"):
        choose_prompt("chat", tokenizer)


def test_nothing_learned_is_counted(tokenizer):
    assert choose_prompt("plain", tokenizer).encode([]).supervised_count == 0
    assert choose_prompt("plain", tokenizer).encode([("q", "a")]).supervised_count == 3


def test_tokenizer_without_bos_puts_the_image_first():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    prompt = choose_prompt("plain", tokenizer)
    assert prompt.visual_at == 0
    assert tokenizer.decode(prompt.encode_question("q")) == "USER: q ASSISTANT:"
