"""Is a model that was trained with adapters the same model after it was saved, whatever its layers are?"""

import pytest
import torch
from safetensors.torch import load_file
from step_checks import ALONE, config_of, one_step
from tiny_llm import tiny_llm, tiny_tokenizer
from train_world import arguments, make_world

from vlmx.errors import UsageError
from vlmx.models.adapters import add_adapters, is_adapter, merged
from vlmx.models.folder import load_model, save_model
from vlmx.runs import RunFolder
from vlmx.serve.export import export_run
from vlmx.train.assemble import set_trained
from vlmx.train.command import train
from vlmx.train.parallel import full_weights
from vlmx.train.step import train_step

SIZES = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
EXPERTS = {"intermediate_size": 48, "num_key_value_heads": 1, "num_local_experts": 2}


def family(kind, **more):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **more))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    llms = {
        "tied": tiny_llm(tied=True),
        "gpt2": family("gpt2", n_inner=48),
        "gpt2-untied": family("gpt2", n_inner=48, tie_word_embeddings=False),
        "mixtral": family("mixtral", **EXPERTS),
        "mixtral-tied": family("mixtral", **EXPERTS, tie_word_embeddings=True),
    }
    for name, llm in llms.items():
        llm.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    ("llm", "targets"),
    [
        ("llm", "null"),
        ("llm", "[lm_head, q_proj]"),
        ("tied", "null"),
        ("gpt2", "null"),
        ("gpt2-untied", "[attn.c_proj]"),  # square, so that no shape tells which side is which
        ("mixtral", "null"),
        ("mixtral-tied", "[q_proj, o_proj]"),
    ],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_saved_model_has_the_loss_of_the_trained_one(world, tmp_path, llm, targets, recompute):
    overrides = [f"llm={world / llm}", "lora.r=4", f"lora.targets={targets}", "optim.lr=0.05"]
    trainee, optimizer, plan, step = one_step(world, ALONE, *overrides, f"activation_checkpointing={recompute}")
    for _ in range(3):
        train_step(trainee.vlm, optimizer, step, plan, ALONE)
    vlm = trainee.vlm.eval()
    ups = [p for name, p in vlm.named_parameters() if is_adapter(name) and "lora_B" in name]
    assert ups
    assert all(p.abs().max() > 0.01 for p in ups)
    weights = full_weights(vlm, ALONE, plan.config.lora)
    save_model(tmp_path, vlm, trainee.tokenizer, trainee.card, weights=weights)
    reloaded = load_model(tmp_path).vlm
    with torch.no_grad():
        for micro in step.micro_batches:
            torch.testing.assert_close(reloaded(micro.batch), vlm(micro.batch), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_with_adapters_is_exported_like_the_model_at_the_end(world, tmp_path):
    more = [f"llm={world / 'gpt2'}", "lora.r=2", "max_steps=2", "optim.lr=0.05"]
    train([*arguments(world, tmp_path / "run"), *more], standalone_mode=False)
    for name, step in (("end", None), ("two", "2")):
        export_run(RunFolder(tmp_path / "run"), tmp_path / name, step=step, layout="parts")
    folders = (tmp_path / "end" / "llm", tmp_path / "two" / "llm", world / "gpt2")
    end, two, start = (load_file(folder / "model.safetensors") for folder in folders)
    assert end.keys() == two.keys() == start.keys()
    changed = {name.split(".", 3)[-1] for name, value in end.items() if not torch.equal(value, start[name])}
    assert changed == {f"{layer}.weight" for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    for name, value in end.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6)


def test_experts_keep_out_and_that_is_said(world):
    llm = family("mixtral", **EXPERTS)
    config = config_of(world, "lora.r=2")
    assert set_trained(llm, config) == [
        "no adapters for gate.weight, experts.gate_up_proj, experts.down_proj, which are not linear layers: they stay"
        " as they are"
    ]
    adapted = {name.split(".")[-4] for name, _ in llm.named_parameters() if is_adapter(name)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert set_trained(tiny_llm(), config) == []


@pytest.mark.parametrize(
    ("llm", "target", "why"),
    [
        (tiny_llm, "embed_tokens", "embed_tokens is no linear layer but Embedding"),
        (tiny_llm, "nope", "no layer is named nope"),
        (lambda: tiny_llm(tied=True), "lm_head", "lm_head shares its weights with the embedding"),
        (lambda: family("mixtral", **EXPERTS), "experts", "experts is no linear layer but MixtralExperts"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_the_training(llm, target, why):
    with pytest.raises(UsageError, match=r"the adapters cannot be put into q_proj, ") as caught:
        add_adapters(llm(), r=2, alpha=8, dropout=0, targets=["q_proj", target])
    assert caught.value.why.startswith(why)
    assert "q_proj" in caught.value.fix


def test_what_peft_refuses_is_a_clear_error():
    with pytest.raises(UsageError, match="the adapters cannot be put into the linear layers") as caught:
        add_adapters(family("mamba"), r=2, alpha=8, dropout=0, targets=None)
    assert "'out_proj' is incompatible" in caught.value.why
    assert caught.value.fix == "choose lora.targets among dt_proj, in_proj, x_proj"


def test_no_adapter_is_dropped():
    state = {"a.base_layer.other": torch.zeros(2), "a.lora_A.default.weight": torch.zeros(1, 2)}
    with pytest.raises(AssertionError, match="adapters without a layer"):
        merged(state, r=1, alpha=1)
