"""Does a damaged, incomplete or unsuitable LLM get one clear error, whole or in parts, and is a hub's copy found?"""

import json
import re
import shutil

import pytest
import torch
from step_checks import ALONE, plan_of
from tiny_llm import tiny_llm, tiny_tokenizer, write_tiny_llm
from train_world import make_world

from vlmx.errors import UsageError, WeightsError
from vlmx.models.llm import isolation_problem, load_llm
from vlmx.models.llm_files import checked_source
from vlmx.models.llm_parts import llm_without_weights, read_own_rows, weight_files
from vlmx.train.assemble import assemble
from vlmx.train.collate import build_collator, check_context
from vlmx.train.preview import preview

SIZES = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
WHOLE, SHARD, BIN = "model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_tiny_llm(tmp_path_factory.mktemp("llm") / "whole")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def in_parts(source):
    llm, _ = llm_without_weights(source)
    files = weight_files(source, llm)
    assert files is not None
    read_own_rows(llm.to_empty(device="cpu"), files)


LOADERS = pytest.mark.parametrize("load", [load_llm, in_parts])


def damage(folder, kind):
    weights = folder / WHOLE
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "pointer":
        weights.write_text(POINTER)
    elif kind == "shard":
        weights.rename(folder / SHARD)
        names = {"lm_head.weight": SHARD, "model.norm.weight": "model-00002-of-00002.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    elif kind == "index":
        weights.rename(folder / SHARD)
        (folder / "model.safetensors.index.json").write_text("{")
    elif kind == "configuration":
        (folder / "config.json").write_text("[]")
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "hidden_size": {"shape": 64, "type": "x"}[kind]}))


@LOADERS
@pytest.mark.parametrize(
    ("kind", "what", "why"),
    [
        ("cut", "are not whole", "model.safetensors: .*incomplete"),
        ("empty", "are not whole", "model.safetensors is empty"),
        ("pointer", "are not whole", "model.safetensors is a pointer of git-lfs"),
        ("shard", "are not whole", "model-00002-of-00002.safetensors is missing"),
        ("index", "index.json is damaged", "no JSON object with a weight_map"),
        ("configuration", "config.json is damaged", "no JSON object"),
        (
            "shape",
            "do not fill",
            r"lm_head.weight is \[320, 32\] there, \[320, 64\] by|embed_tokens.weight is \[320, 32",
        ),
        ("type", "cannot be loaded", "Validation error for field 'hidden_size': .*expected int"),
    ],
)
def test_a_damaged_folder_has_one_clear_error(folder, load, kind, what, why):
    damage(folder, kind)
    with pytest.raises(WeightsError, match=what) as caught:
        load(str(folder))
    assert re.search(why, caught.value.why)
    assert caught.value.fix


def test_a_damaged_bin_file_is_never_executed(folder):
    (folder / WHOLE).unlink()
    (folder / BIN).write_bytes(b"garbage" * 100)
    with pytest.raises(WeightsError, match="cannot be loaded") as caught:
        load_llm(str(folder))
    assert caught.value.why == "its .bin files are damaged, or hold something else than tensors"


@LOADERS
def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(folder, load):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"red{n}" for n in range(40)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(WeightsError, match=r"tokenizer of the LLM .* does not fit") as caught:
        load(str(folder))
    beyond = len(tokenizer) - 320
    assert caught.value.why == f"there are 320 embeddings, and none for {beyond} tokens, e.g. 'red{40 - beyond}'"


def hub_copy(whole, cache):
    """The hub's cache with one model in it."""
    model = cache / "models--some--model"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0123")
    return shutil.copytree(whole, model / "snapshots" / "0123")


def test_a_hub_id_in_the_hubs_cache_is_a_folder(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert checked_source("some/model") == "some/model"
    snapshot = hub_copy(whole, tmp_path)
    assert checked_source("some/model") == str(snapshot)
    llm, _ = llm_without_weights("some/model")
    assert set(weight_files("some/model", llm).values()) == {snapshot / WHOLE}
    (snapshot / WHOLE).unlink()
    assert checked_source("some/model") == "some/model"  # transformers fetches the rest


def of_family(kind, **more):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **more))


def test_turns_are_isolated_only_where_positions_can_be_given():
    assert isolation_problem(tiny_llm()) == ""
    assert isolation_problem(of_family("gpt2")) == ""
    assert "ALiBi" in isolation_problem(of_family("bloom"))
    assert "ALiBi" in isolation_problem(of_family("mpt", d_model=32, n_heads=2, n_layers=2))
    assert "ALiBi" in isolation_problem(of_family("falcon", alibi=True))
    assert isolation_problem(of_family("falcon", alibi=False)) == ""
    assert "a state" in isolation_problem(of_family("mamba"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    long = {"from": "gpt", "value": "y " * 500}
    talks = [[{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}] for _ in range(2000)]
    talks[700][1] = long
    rows = [{"id": f"a{n}", "conversations": talk} for n, talk in enumerate(talks)]
    (folder / "long.json").write_text(json.dumps(rows))
    return folder


def test_isolated_turns_are_refused_before_the_training(world):
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **SIZES)).save_pretrained(world / "bloom")
    tiny_tokenizer().save_pretrained(world / "bloom")
    plan = plan_of(world, ALONE, f"llm={world / 'bloom'}", "turns=isolated")
    for call in (lambda: assemble(plan, ALONE), lambda: preview(plan, 1)):
        with pytest.raises(UsageError, match="turns=isolated does not work") as caught:
            call()
        assert "ALiBi" in caught.value.why


def test_text_beyond_a_rotary_llms_context_is_cut_and_counted(world):
    plan = plan_of(world, ALONE, f"data={world / 'long.json'}")
    trainee = assemble(plan, ALONE)
    collator = build_collator(plan, trainee.prompt, trainee.vlm.llm.config)
    rows = collator.rows(plan.conversations[699:701])
    assert [row.truncated for row in rows] == [False, True]
    assert len(rows[1].ids) == 512
    assert rows[1].labels[-1] == rows[1].ids[-1]  # in the middle of the answer


def test_visual_tokens_beyond_a_rotary_llms_context_are_warned_about(capsys):
    config = tiny_llm().config
    assert check_context(config, 512 - 16) == 512
    assert check_context(config, 512 - 15) is None
    assert "more than the LLM's context of 512" in capsys.readouterr().err


def test_the_preview_finds_the_largest_micro_batch(world):
    seen = preview(plan_of(world, ALONE, f"data={world / 'long.json'}"), 1)
    assert (seen.rows, seen.positions) == (4, 512)
