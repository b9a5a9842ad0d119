"""Are packed rows what each row alone is? Losses, gradients, isolation, positions, and when rows are packed at all."""

from dataclasses import replace

import pytest
import torch
from step_checks import ALONE, prepare
from step_checks import config_of as settings_of
from tiny_llm import tiny_tokenizer
from train_world import arguments

from vlmx.data.records import Conversation, Turn
from vlmx.errors import UsageError
from vlmx.models.packed import (
    ATTENTION,
    FAMILIES,
    PackedRows,
    attend_by_kernel,
    attend_by_row,
    has_kernel,
    is_right,
    pack_attention,
    why_not,
)
from vlmx.runs import RunFolder
from vlmx.train.assemble import assemble
from vlmx.train.budget import plan_micro_batches
from vlmx.train.collate import build_collator
from vlmx.train.command import train as train_command
from vlmx.train.packing import choose_packing
from vlmx.train.plan import make_plan
from vlmx.train.preview import preview
from vlmx.train.settings import TrainConfig, profile_overrides

CPU = torch.device("cpu")
SIZES = {
    **{"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    **{"max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
    **{"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": None}
NOT_GROUPED = {"gpt2", "gpt_neox", "opt", "phi"}
LENGTHS = (5, 1, 7)


def llm_of(family: str, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = SIZES if family in NOT_GROUPED else {**SIZES, **GROUPED}
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**sizes, **changes}))
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)  # so that tokens matter to each other
    return llm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("packing"))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_packed_rows_are_what_each_row_alone_is(family):
    llm = llm_of(family).eval()
    embeds_BTE = torch.randn(1, sum(LENGTHS), 32, generator=torch.Generator().manual_seed(0))
    rows = PackedRows.of(LENGTHS, CPU)
    positions_BT = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with torch.no_grad():
        alone = [llm(inputs_embeds=part, use_cache=False).logits for part in embeds_BTE.split(LENGTHS, dim=1)]
        together = llm(inputs_embeds=embeds_BTE, use_cache=False).logits
        pack_attention(llm)
        packed = llm(inputs_embeds=embeds_BTE, use_cache=False, **rows.arguments(positions_BT)).logits
        unpacked = llm(inputs_embeds=embeds_BTE, use_cache=False).logits
    expected = torch.cat(alone, dim=1)
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert (together - expected).abs().max() > 0.03 * expected.abs().max()  # what mixing them would do
    assert torch.equal(unpacked, together)  # calls without packed rows are as before


def micro_batch(trainee, plan, conversations, *, packed):
    collator = build_collator(plan, trainee.prompt, trainee.vlm.llm.config, packed=packed)
    rows = collator.rows(conversations)
    images = list(dict.fromkeys(row.image for row in rows if row.image is not None))
    micro = collator.batch(rows, {image: number for number, image in enumerate(images)})
    tokens_UND = torch.from_numpy(plan.reader.read([images[number] for number in micro.images]))
    return replace(micro, batch=replace(micro.batch, visual_UND=tokens_UND))


def loss_and_gradients(trainee, micro):
    trainee.vlm.zero_grad(set_to_none=False)
    loss = trainee.vlm(micro.batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainee.vlm.named_parameters() if p.grad is not None}


def conversation(name, *answers, image=None):
    turns = tuple(Turn(question=f"what is {number}?", answer=answer) for number, answer in enumerate(answers))
    return Conversation(id=name, image=image, turns=turns)


MIXED = [
    conversation("short", "a", image="3.jpg"),
    conversation("text", "the red one is it", "the one"),
    conversation("long", "it is the red one", "a cat", "yes", image="6.jpg"),
    conversation("silent", ""),
    conversation("same image", "no", image="3.jpg"),
]
BATCHES = {"mixed": MIXED, "text only": [MIXED[1], MIXED[3]], "one row": MIXED[:1], "nothing learned": [MIXED[3]]}


def unsupervised(micro):
    nothing = torch.zeros(0, dtype=torch.long)
    return replace(micro, batch=replace(micro.batch, predictor_S=nothing, target_S=nothing, weight_S=None))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("how", ["plain", "recomputed", "answers"])
def test_losses_and_gradients_are_those_of_padded_rows(folder, tmp_path, family, how):
    llm = llm_of(family, max_position_embeddings=128, **{"attn_pdrop": 0.0} if family == "gpt2" else {})
    llm.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ways = {"plain": (), "recomputed": ("activation_checkpointing=true",), "answers": ("loss_mean=answers",)}
    config = settings_of(folder, f"llm={tmp_path}", "packed=true", *ways[how])
    plan = make_plan(config, caches=folder / "caches", world_size=1)
    trainee = assemble(plan, ALONE)
    for name, conversations in BATCHES.items():
        padded = micro_batch(trainee, plan, conversations, packed=False)
        packed = micro_batch(trainee, plan, conversations, packed=True)
        if name == "nothing learned":
            padded, packed = unsupervised(padded), unsupervised(packed)
        else:
            assert packed.supervised > 0
        assert packed.batch.input_ids_BT.shape == (1, padded.tokens)
        assert (packed.weight, packed.silent) == (padded.weight, padded.silent)
        loss, gradients = loss_and_gradients(trainee, padded)
        packed_loss, packed_gradients = loss_and_gradients(trainee, packed)
        torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-5)
        assert packed_gradients.keys() == gradients.keys()
        most = max(float(gradient.abs().max()) for gradient in gradients.values())
        for key, gradient in gradients.items():
            torch.testing.assert_close(packed_gradients[key], gradient, rtol=1e-4, atol=1e-6 * max(1, most), msg=key)


def test_no_row_has_any_influence_on_another(folder):
    plan = make_plan(settings_of(folder, "packed=true"), caches=folder / "caches", world_size=1)
    trainee = assemble(plan, ALONE)
    batch = micro_batch(trainee, plan, MIXED, packed=True).batch
    ends = torch.tensor(batch.lengths).cumsum(0)
    row_S = torch.searchsorted(ends, batch.predictor_S, right=True)
    other_ids_BT = batch.input_ids_BT.clone()
    other_ids_BT[0, ends[0] + 1 : ends[1]] = 7  # the text of the second row
    with torch.no_grad():
        losses = [
            torch.stack(
                [
                    trainee.vlm(replace(b, predictor_S=b.predictor_S[n : n + 1], target_S=b.target_S[n : n + 1]))
                    for n in range(len(row_S))
                ]
            )
            for b in (batch, replace(batch, input_ids_BT=other_ids_BT))
        ]
    changed_S = losses[0] != losses[1]
    assert set(row_S[changed_S].tolist()) == {1}


def test_positions_start_again_in_each_row(folder):
    plan = make_plan(settings_of(folder, "packed=true"), caches=folder / "caches", world_size=1)
    batch = micro_batch(assemble(plan, ALONE), plan, MIXED[:2], packed=True).batch
    first, second = batch.lengths
    assert batch.position_BT.tolist() == [[*range(first), *range(second)]]
    assert PackedRows.of(batch.lengths, CPU).bounds.tolist() == [0, first, first + second]


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_the_kernel_takes_what_it_is_given(precision):
    """On tensors without memory, as there is no CUDA: names and order of arguments, shapes, and that it is learned
    through.
    """
    query_BHPC = torch.empty(1, 4, 13, 16, device="meta", dtype=precision, requires_grad=True)
    key_BKPC, value_BKPC = (torch.empty(1, 2, 13, 16, device="meta", dtype=precision) for _ in range(2))
    rows = PackedRows.of(LENGTHS, torch.device("meta"))
    output_BPHC = attend_by_kernel(query_BHPC, key_BKPC, value_BKPC, rows, 0.25)
    assert output_BPHC.shape == (1, 13, 4, 16)
    output_BPHC.sum().backward()
    assert query_BHPC.grad.shape == query_BHPC.shape


def test_a_kernel_is_tried_before_it_is_used():
    def together(query_BHPC, key_BKPC, value_BKPC, rows, scaling):
        one = PackedRows.of((sum(rows.lengths),), CPU)
        return attend_by_row(query_BHPC, key_BKPC, value_BKPC, one, scaling)

    def without_gradient(query_BHPC, key_BKPC, value_BKPC, rows, scaling):
        output_BPHC = attend_by_row(query_BHPC, key_BKPC, value_BKPC, rows, scaling)
        return output_BPHC.detach() + 0 * (query_BHPC.sum() + key_BKPC.sum() + value_BKPC.sum())

    assert is_right(attend_by_row, CPU, torch.bfloat16)
    assert not is_right(together, CPU, torch.bfloat16)
    assert not is_right(without_gradient, CPU, torch.bfloat16)
    assert not is_right(attend_by_kernel, CPU, torch.bfloat16)  # which it does not run on
    assert not has_kernel(CPU)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_attention_fails_instead_of_mixing_rows(attention):
    rows = PackedRows.of(LENGTHS, CPU).arguments(torch.arange(13)[None])
    with pytest.raises(RuntimeError):
        llm_of("llama", attn_implementation=attention)(inputs_embeds=torch.randn(1, 13, 32), use_cache=False, **rows)


def train(folder, out, *extra):
    train_command(arguments(folder, out, "checkpoint.every_steps=0", *extra), standalone_mode=False)
    return RunFolder(out)


def losses(run):
    return [line["loss"] for line in run.metrics()]


RUNS = {
    "fixed": (),
    "budget": ("micro_tokens=64",),
    "recomputed": ("activation_checkpointing=true", "loss_mean=answers"),
    "lora": ("lora.r=2", "optim.connector_lr=1e-3"),
    "half": ("precision=bf16",),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_training_has_the_same_curve(folder, tmp_path, name, capsys):
    padded = train(folder, tmp_path / "padded", *RUNS[name])
    assert "rows padded" in capsys.readouterr().err
    packed = train(folder, tmp_path / "packed", *RUNS[name], "packed=true")
    assert "rows packed" in capsys.readouterr().err
    assert losses(packed) == pytest.approx(losses(padded), abs=0.02 if name == "half" else 1e-5)
    assert (padded.status["packed"], packed.status["packed"]) == (False, True)
    assert (padded.config["packed"], packed.config["packed"]) == ("auto", True)
    assert ATTENTION not in (packed.path / "model" / "llm" / "config.json").read_text()


def test_answers_of_an_llm_with_packed_attention_are_as_before(folder):
    plan = make_plan(settings_of(folder, "packed=true"), caches=folder / "caches", world_size=1)
    visual_BND = torch.from_numpy(plan.reader.read(list(plan.image_ids.values())[:3]))
    prompts = [[0, 20, 21], [0, 22], [0, 30, 31, 32]]
    answers = [
        assemble(replace(plan, config=plan.config.model_copy(update={"packed": packed})), ALONE).vlm
        for packed in (False, True)
    ]
    first, second = (vlm.eval().generate(visual_BND, prompts, 8) for vlm in answers)
    assert first == second
    assert any(first)


def test_the_preview_counts_no_padding(folder):
    config = settings_of(folder, "packed=true", "micro_tokens=64")
    seen = preview(make_plan(config, caches=folder / "caches", world_size=1), 1)
    assert seen.padded == seen.tokens
    assert seen.positions <= 64 < seen.rows * seen.positions
    padded = preview(make_plan(settings_of(folder), caches=folder / "caches", world_size=1), 1)
    assert padded.padded > padded.tokens == seen.tokens


def test_when_rows_are_packed():
    gpu = torch.device("cuda")
    llama, gpt2 = llm_of("llama").config, llm_of("gpt2").config

    def choice(llm=llama, device=CPU, **changes):
        packing = choose_packing(TrainConfig(cache="c", **changes), llm, device)
        return packing.on, packing.text

    assert choice() == (False, "rows padded")
    assert choice(packed=True, precision="bf16") == (
        True,
        "rows packed (attention row by row: there is no fast kernel here)",
    )
    assert choice(packed=False, device=gpu) == (False, "rows padded")
    assert choice(device=gpu) == (False, "rows padded (not packed: there is no fast kernel for precision=fp32)")
    assert "no dropout of attention" in choice(gpt2, gpu, precision="bf16")[1]
    assert "packed=false" in profile_overrides("paper")
    assert "isolated turns" in choice(device=gpu, turns="isolated")[1]
    mistral = llm_of("mistral", sliding_window=4).config
    assert "sliding window" in choice(mistral, gpu)[1]
    assert why_not(llm_of("bloom").config) == "packed rows are not tested with LLMs of the family bloom"
    for llm, changes in ((mistral, {}), (llama, {"turns": "isolated"})):
        with pytest.raises(UsageError, match="packed=true does not work"):
            choice(llm, packed=True, **changes)


def test_the_budget_counts_packed_rows_without_padding():
    lengths = [10, 20, 10, 30, 10, 60, 10, 20]  # 170
    assert plan_micro_batches(lengths, 1, 60, packed=True) == [[[5], [3, 0, 2, 6], [1, 7, 4]]]  # 60, 60, 50
    assert plan_micro_batches(lengths, 1, 60) == [[[5], [1, 7], [0, 2, 4, 6], [3]]]  # 60, 40, 40, 30
