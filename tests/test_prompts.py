"""Are prompts the reference's, and is exactly the answer learned?"""

import json

import pytest
from tiny_llm import tiny_tokenizer, write_tiny_llm

from vlmx.errors import UnknownNameError, UsageError
from vlmx.models.llm import load_llm
from vlmx.models.options import option_ids
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


def test_tokenizer_without_bos_puts_the_image_first():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    prompt = choose_prompt("plain", tokenizer)
    assert prompt.visual_at == 0
    assert tokenizer.decode(prompt.encode_question("q")) == "USER: q ASSISTANT:"


def chat(template, *, bos="<s>", eos="</s>", special=()):
    """The chat format of a template; each of `special` is one token."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*special]})
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    tokenizer.chat_template = template
    return choose_prompt("chat", tokenizer)


def marked(prompt, turns, **how):
    """The text, with | where the image goes, and what is learned in brackets."""
    encoded = prompt.encode(turns, **how)
    texts, learned = [], False
    for place, (token, label) in enumerate(zip(encoded.input_ids, encoded.labels, strict=True)):
        texts.append("|" if place == prompt.visual_at else "")
        if (label != IGNORED) != learned:
            texts.append("]" if learned else "[")
            learned = not learned
        texts.append(prompt.tokenizer.decode([token]))
    return "".join(texts) + ("]" if learned else "")


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDS = ("<|im_start|>", "<|im_end|>")
QA = [("q", "red"), ("where", "here")]


def test_a_bos_that_opens_every_message_is_part_of_the_message():
    """As SmolLM2's: the image stands before it."""
    prompt = chat(CHATML, bos="<|im_start|>", eos="<|im_end|>", special=ENDS)
    assert prompt.visual_at == 0
    assert marked(prompt, QA) == (
        "|<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[red<|im_end|>]\n"
        "<|im_start|>user\nwhere<|im_end|>\n<|im_start|>assistant\n[here<|im_end|>]"
    )


def test_an_end_of_turn_that_is_not_eos_is_the_end():
    """As Gemma's: what follows it is not learned, and generation stops at it."""
    template = (
        "{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>model\n{% endif %}"
    )
    prompt = chat(template, special=("<turn>", "<end>"))
    # the template's own generation prompt counts, not the role in its messages
    assert marked(prompt, QA) == (
        "<s>|<turn>user\nq<end>\n<turn>model\n[red<end>]\n<turn>user\nwhere<end>\n<turn>model\n[here<end>]"
    )
    assert [prompt.tokenizer.decode([token]) for token in prompt.end_ids] == ["</s>", "<end>"]
    assert prompt.notes == ()
    assert prompt.tokenizer.decode(option_ids(prompt, ("a", "b"))) == "ab"


def test_an_eos_at_the_end_of_the_conversation_alone_is_not_learned():
    """As Phi-3's."""
    template = (
        "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% else %}{{ eos_token }}{% endif %}"
    )
    prompt = chat(template, special=("<user>", "<assistant>", "<end>"))
    assert marked(prompt, QA) == (
        "|<user>\nq<end>\n<assistant>\n[red<end>]\n<user>\nwhere<end>\n<assistant>\n[here<end>]"
    )


def test_thinking_is_off_and_stays_as_it_was_asked():
    """As Qwen3's, which takes the empty block out of earlier turns: each answer is learned right after the prompt."""
    template = CHATML.replace(
        "m['content'] +", "('<think></think>' if loop.last and loop.index0 % 2 else '') + m['content'] +"
    ).replace(
        "assistant\n' }}",
        "assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}",
    )
    prompt = chat(template, bos=None, eos="<|im_end|>", special=ENDS)
    assert marked(prompt, QA) == (
        "|<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think></think>[red<|im_end|>]\n"
        "<|im_start|>user\nwhere<|im_end|>\n<|im_start|>assistant\n<think></think>[here<|im_end|>]"
    )


def test_what_a_template_puts_before_an_answer_is_not_learned():
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}U: {{ m['content'] }}{% else %}"
        "A: <think></think>{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    prompt = chat(template)
    assert marked(prompt, QA[:1]) == "<s>|U: qA: <think></think>[red</s>]"
    assert prompt.tokenizer.decode(prompt.encode_question("q")) == "<s>U: qA: <think></think>"


@pytest.mark.parametrize("answer", ["the red one", "it"])
def test_a_generation_prompt_that_ends_in_a_blank_is_kept(answer):
    """Together, the blank and the answer's first word would be one token."""
    prompt = choose_prompt("chat", tiny_tokenizer(chat=True))
    assert prompt.tokenizer.tokenize(f" {answer}")[0] != "\u0120"
    assert marked(prompt, [("q", answer)]) == f"<s>|[user] q\n[assistant] [{answer}</s>]"


@pytest.mark.parametrize(
    "date", ["{{ date_string }}", "{{ strftime_now('%d %b %Y') }}", '{{ strftime_now( "%d %b %Y" ) }}']
)
def test_the_date_is_always_the_same(tmp_path, date):
    template = "{{ bos_token }}" + date + "{% for m in messages %} {{ m['content'] }}</s>{% endfor %}"
    prompt = chat(template)
    assert marked(prompt, QA[:1]) == "<s>|26 Jul 2024 q</s>[ red</s>]"
    prompt.tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = choose_prompt("chat", AutoTokenizer.from_pretrained(tmp_path))
    assert again.tokenizer.chat_template == prompt.tokenizer.chat_template
    assert again.encode(QA[:1]) == prompt.encode(QA[:1])


def test_a_template_without_ends_gets_eos_and_says_so():
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    prompt = chat(template)
    assert marked(prompt, QA) == "<s>|user: q\nassistant:[ red</s>]\nuser: where\nassistant:[ here</s>]"
    assert prompt.notes == ("the LLM's chat template does not end answers: </s> is put after each, and learned",)


def test_a_template_that_rewrites_the_past_can_be_used_turn_by_turn():
    prompt = chat("{{ bos_token }}{{ messages | length }} {{ messages[-1]['content'] }}")
    assert marked(prompt, QA, isolated=True) == "<s>|1 q[red</s>]1 where[here</s>]"


def test_a_template_that_raises_or_hides_answers_is_refused():
    with pytest.raises(UsageError, match="chat template cannot be used") as caught:
        chat("{{ raise_exception('no system text') }}")
    assert caught.value.why == "no system text"
    with pytest.raises(UsageError, match="cannot be trained on"):
        chat("{{ messages | length }}")


def test_a_sentencepiece_tokenizer_without_its_json(tmp_path):
    """Vicuna's own folder has only tokenizer.model: ids are those of sentencepiece, and each part is encoded alone."""
    import sentencepiece

    folder = write_tiny_llm(tmp_path)
    for left in tmp_path.glob("tokenizer*"):
        left.unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([VICUNA_SYSTEM, "USER: what is it? ASSISTANT: a cat, and where? [0.12, 0.34]"]),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    _, tokenizer = load_llm(str(folder))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    prompt = choose_prompt("auto", tokenizer)
    assert prompt.name == "vicuna-v1.5"
    asked = pieces.encode(f"{VICUNA_SYSTEM} USER: what is it? ASSISTANT:")
    answered = [*pieces.encode("a cat"), pieces.eos_id()]
    encoded = prompt.encode([("what is it?", "a cat")])
    assert encoded.input_ids == [pieces.bos_id(), *asked, *answered]
    assert encoded.labels == [IGNORED] * (1 + len(asked)) + answered
