"""Are answers that share a prefix, padding and a batch those of each question alone, and are options read rightly?"""

import random
import re

import pytest
import torch
from tiny_llm import tiny_llm, tiny_tokenizer

from vlmx.errors import WeightsError
from vlmx.models.connectors import build_connector
from vlmx.models.decoding import first_token_logits_shared, generate_shared, shared_prefix, sharing_problem
from vlmx.models.options import option_ids
from vlmx.models.prompts import choose_prompt
from vlmx.models.vlm import VLM

N, D = 7, 6
SIZES = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLMS = {
    "llama": ("llama", {"intermediate_size": 48}),
    "grouped heads": ("llama", {"intermediate_size": 48, "num_key_value_heads": 2}),
    "scaled positions": (
        "llama",
        {
            "intermediate_size": 48,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "table of positions": ("gpt2", {"n_inner": 48, "resid_pdrop": 0.0, "n_positions": 160}),
    "alibi": ("bloom", {}),
    "qwen3": ("qwen3", {"intermediate_size": 48, "head_dim": 16, "num_key_value_heads": 1}),
}


def vlm_of(name, *, visual_at=1, eos_ids=(1,)):
    from transformers import AutoConfig, AutoModelForCausalLM

    family, sizes = LLMS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **sizes, bos_token_id=0, eos_token_id=1, pad_token_id=0)
    llm = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in llm.parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, 0.4)  # answers differ, and depend on what stands far back
    return VLM(build_connector("mlp2", D, 32), llm, visual_at=visual_at, eos_ids=eos_ids).eval()


def questions(seed, *, images=5, rows=14, common=3, longest=20):
    """Tokens of images, the image of each prompt, and prompts of many lengths that begin alike."""
    dice = random.Random(seed)
    visual_UND = 3 * torch.randn(images, N, D, generator=torch.Generator().manual_seed(seed))
    start = [0, *(dice.randrange(2, 320) for _ in range(common))]
    prompts = [start + [dice.randrange(2, 320) for _ in range(dice.randint(1, longest))] for _ in range(rows)]
    return visual_UND, [dice.randrange(images) for _ in range(rows)], prompts


QUICK = ("llama", "table of positions")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LLMS])
def test_answers_are_those_of_each_question_alone(name):
    vlm = vlm_of(name)
    assert sharing_problem(vlm) == ""
    distinct = set()
    for seed in range(4):
        visual_UND, image_of_row, prompts = questions(seed, common=seed, rows=(14, 37)[seed % 2])
        alone = [vlm.generate(visual_UND[[u]], [ids], 40)[0] for u, ids in zip(image_of_row, prompts, strict=True)]
        # end tokens that some rows come to early, some late, and some never
        eos = {ids[min(len(ids) - 1, 3 * number)] for number, ids in enumerate(alone[:6]) if ids}
        ending = VLM(vlm.connector, vlm.llm, eos_ids=eos).eval()
        expected = [
            ending.generate(visual_UND[[u]], [ids], 40)[0] for u, ids in zip(image_of_row, prompts, strict=True)
        ]
        assert generate_shared(ending, visual_UND, image_of_row, prompts, 40) == expected
        assert generate_shared(vlm, visual_UND, image_of_row, prompts, 9) == [ids[:9] for ids in alone]
        distinct |= {len(ids) for ids in expected}
        logits_BV = first_token_logits_shared(vlm, visual_UND, image_of_row, prompts)
        torch.testing.assert_close(
            logits_BV, vlm.first_token_logits(visual_UND[image_of_row], prompts), rtol=1e-3, atol=1e-3
        )
    assert len(distinct) > 3  # rows left the batch at different times


def test_an_llm_without_bos():
    vlm = vlm_of("llama", visual_at=0)
    visual_UND, image_of_row, prompts = questions(9)
    prompts = [ids[4:] for ids in prompts]
    expected = [vlm.generate(visual_UND[[u]], [ids], 6)[0] for u, ids in zip(image_of_row, prompts, strict=True)]
    assert generate_shared(vlm, visual_UND, image_of_row, prompts, 6) == expected


def test_the_connector_sees_each_image_once():
    vlm = vlm_of("llama")
    shapes = []
    vlm.connector.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    generate_shared(vlm, *questions(0, images=3, rows=12), 4)
    assert shapes == [(3, N, D)]


def test_rows_that_have_ended_cost_nothing():
    vlm = vlm_of("llama")
    visual_UND, image_of_row, prompts = questions(1)
    alone = [vlm.generate(visual_UND[[u]], [ids], 12)[0] for u, ids in zip(image_of_row, prompts, strict=True)]
    eos = {ids[1] for ids in alone[:-1]} - set(alone[-1])
    ending = VLM(vlm.connector, vlm.llm, eos_ids=eos).eval()
    rows = []
    ending.llm.model.layers[0].register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    generate_shared(ending, visual_UND, image_of_row, prompts, 12)
    assert rows[:2] == [5, 14]  # images, then questions
    assert rows[-1] < 7


def test_what_prompts_begin_with():
    assert shared_prefix([[0, 5, 6, 7], [0, 5, 6, 8, 9]]) == [0, 5, 6]
    assert shared_prefix([[0, 5, 6], [0, 5, 6, 8]]) == [0, 5]  # something is left for each
    assert shared_prefix([[3, 4]]) == [3]
    assert shared_prefix([[3, 4], [5, 4]]) == []


@pytest.mark.parametrize(
    ("family", "sizes", "problem"),
    [
        ("gemma2", {"head_dim": 16, "num_key_value_heads": 1, "query_pre_attn_scalar": 16}, "last few positions"),
        ("mistral", {"sliding_window": 8, "num_key_value_heads": 1}, "last few positions"),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "change by|masks with gaps"),
        ("mamba", {}, "something else than keys and values"),
    ],
)
def test_llms_whose_questions_are_answered_apart(family, sizes, problem):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    base = {} if family == "mpt" else SIZES
    config = AutoConfig.for_model(family, **{**base, "vocab_size": 320, **sizes})
    vlm = VLM(build_connector("linear", D, 32), AutoModelForCausalLM.from_config(config), eos_ids=[1]).eval()
    assert re.search(problem, sharing_problem(vlm))


def test_logits_that_are_not_numbers():
    vlm = VLM(build_connector("linear", D, 32), tiny_llm(), eos_ids=[1]).eval()
    with torch.no_grad():
        vlm.llm.lm_head.weight[5] = float("nan")
    visual_UND, image_of_row, prompts = questions(0, images=2, rows=3)
    for call in (
        lambda: generate_shared(vlm, visual_UND, image_of_row, prompts, 3),
        lambda: first_token_logits_shared(vlm, visual_UND, image_of_row, prompts),
        lambda: vlm.generate(visual_UND[image_of_row], prompts, 3),
        lambda: vlm.first_token_logits(visual_UND[image_of_row], prompts),
    ):
        with pytest.raises(WeightsError, match="not numbers"):
            call()


def tokenizer_of(core, *words, chat=""):
    """A BPE tokenizer that has each of these words as one token, as it stands after nothing."""
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    letters = sorted({letter for word in words for letter in word} | set("▁Ġ"))
    vocabulary, merges = {token: number for number, token in enumerate(["<s>", "</s>", *letters])}, []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    core.model = models.BPE(vocab=vocabulary, merges=merges)
    core.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    if chat:
        tokenizer.chat_template = chat
    return tokenizer


def sentencepiece_like(*words):
    """As Llama's: a space before each text, and spaces as ▁."""
    from tokenizers import Tokenizer, models, normalizers

    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer_of(core, *words)


def byte_level(*words, chat=""):
    """As GPT-2's: nothing before a text, and spaces as Ġ."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer_of(core, *words, chat=chat)


def test_an_options_token_is_the_one_that_an_answer_begins_with():
    llama = sentencepiece_like("▁Yes", "▁No", "Yes", "No")
    ids = option_ids(choose_prompt("vicuna-v1.5", llama), ("Yes", "No"))
    assert llama.convert_ids_to_tokens(ids) == ["▁Yes", "▁No"]  # as when it is encoded alone
    assert ids == [llama(option, add_special_tokens=False)["input_ids"][0] for option in ("Yes", "No")]
    gpt = byte_level("ĠYes", "ĠNo", "Yes", "No")
    assert gpt.convert_ids_to_tokens(option_ids(choose_prompt("vicuna-v1.5", gpt), ("Yes", "No"))) == ["Yes", "No"]
    assert gpt.convert_ids_to_tokens(option_ids(choose_prompt("plain", gpt), ("Yes", "No"))) == ["ĠYes", "ĠNo"]
    template = (
        "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    chat = byte_level("Yes", "No", chat=template)
    assert chat.convert_ids_to_tokens(option_ids(choose_prompt("chat", chat), ("No", "Yes"))) == ["No", "Yes"]


def test_options_of_several_tokens_are_refused():
    with pytest.raises(ValueError, match=r"'Yes' .*3 tokens"):
        option_ids(choose_prompt("vicuna-v1.5", tiny_tokenizer()), ("Yes", "No"))
    with pytest.raises(ValueError, match="same token"):
        option_ids(choose_prompt("vicuna-v1.5", byte_level("Yes", "No")), ("Yes", "Yes"))
