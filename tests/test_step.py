"""Are the settings of a step what they say: order, budget, profile, rounding, adapters, and nothing computed twice?"""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from step_checks import ALONE, one_step, plan_of, prepare
from tiny_llm import tiny_llm
from torch.nn import functional as F
from train_world import arguments

from vlmx.data.records import Conversation
from vlmx.errors import UnknownNameError, UsageError
from vlmx.models.folder import load_model, save_model
from vlmx.models.rope import round_positions
from vlmx.models.vlm import VLM
from vlmx.runs import RunFolder
from vlmx.train.assemble import assemble
from vlmx.train.collate import build_collator
from vlmx.train.command import train as train_command
from vlmx.train.feed import Feed
from vlmx.train.optim import lr_factor
from vlmx.train.parallel import full_weights
from vlmx.train.preview import activation_bytes, preview
from vlmx.train.sampler import batches_of, sizes_of, steps_an_epoch
from vlmx.train.settings import TrainConfig, profile_overrides
from vlmx.train.step import train_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("step"))


def feed_of(plan, *, rank=0, world=1):
    trainee = assemble(plan, ALONE)
    return Feed(plan, build_collator(plan, trainee.prompt, trainee.vlm.llm.config), rank=rank, world=world)


def run(folder, out, *extra):
    train_command(arguments(folder, out, "checkpoint.every_steps=0", *extra), standalone_mode=False)
    return RunFolder(out)


def test_steps_of_the_papers_training():
    turns = ()
    rows = [Conversation(id="a", image="a.jpg", turns=turns)] * 624_610
    rows += [Conversation(id="b", image=None, turns=turns)] * 40_688
    steps = steps_an_epoch(rows, 128)
    assert steps == steps_an_epoch(rows, 128, "paper") == 5198
    warm_up = [step for step in range(steps) if lr_factor(step, steps, 0.03) < lr_factor(step + 1, steps, 0.03)]
    assert len(warm_up) == 155
    assert lr_factor(0, steps, 0.03) == 0.0
    assert lr_factor(155, steps, 0.03) == 1.0


def test_batches_are_those_of_the_order(folder):
    plans = {order: plan_of(folder, ALONE, f"order={order}") for order in ("default", "paper")}
    for order, plan in plans.items():
        expected = batches_of(sizes_of(plan.conversations), seed=7, epoch=0, global_batch=8, order=order)
        seen = [step.example_ids for step in feed_of(plan).steps(0)]
        assert seen == [[plan.conversations[i].id for i in batch] for batch in expected]
    assert feed_of(plans["default"]).digest() != feed_of(plans["paper"]).digest()
    assert feed_of(plans["paper"]).digest() == feed_of(plans["paper"], rank=1, world=2).digest()


def test_a_step_without_images_leaves_the_connector_alone(folder):
    trainee, optimizer, plan, step = one_step(folder, ALONE)
    images, texts = step.micro_batches
    train_step(trainee.vlm, optimizer, replace(step, micro_batches=[images]), plan, ALONE)
    connector = {name: value.clone() for name, value in trainee.vlm.connector.state_dict().items()}
    head = trainee.vlm.llm.get_output_embeddings().weight.clone()
    train_step(trainee.vlm, optimizer, replace(step, images=[], micro_batches=[texts]), plan, ALONE)
    assert not torch.equal(head, trainee.vlm.llm.get_output_embeddings().weight)
    for name, value in trainee.vlm.connector.state_dict().items():
        assert torch.equal(value, connector[name]), name


def test_the_schedule_of_the_papers_order_is_made_from_the_conversations(folder):
    settings = ["global_batch=6", "micro_batch=3", "epochs=2"]
    plan = plan_of(folder, ALONE, "order=paper", *settings)
    assert (plan.total_steps, plan.schedule_steps) == (16, 14)  # 6 batches of images and 2 of text; 40 / 6 rounded up
    plan = plan_of(folder, ALONE, *settings)
    assert plan.schedule_steps == plan.total_steps


def test_the_papers_order_of_data_without_images_is_refused_before_anything_is_loaded(folder, tmp_path):
    rows = json.loads((folder / "photos.json").read_text())
    (tmp_path / "photos.json").write_text(json.dumps([row for row in rows if "image" not in row]))
    with pytest.raises(UsageError, match="needs examples with an image"):
        run(folder, tmp_path / "run", "order=paper", "--data", str(tmp_path / "photos.json"))
    assert not (tmp_path / "run").exists()


def test_micro_batches_stay_within_the_budget(folder):
    plan = plan_of(folder, ALONE, "micro_tokens=80", "global_batch=16")
    steps = [list(feed_of(plan, rank=rank, world=2).steps(0)) for rank in (0, 1)]
    sizes = [[micro.batch.input_ids_BT.numel() for micro in step.micro_batches] for share in steps for step in share]
    assert max(size for step in sizes for size in step) <= 80
    assert [len(step.micro_batches) for step in steps[0]] == [len(step.micro_batches) for step in steps[1]]
    assert len({len(step) for step in sizes}) > 1  # as many as are needed
    fixed = feed_of(plan_of(folder, ALONE, "global_batch=16", "micro_batch=16")).steps(0)
    for one, other, whole in zip(*steps, fixed, strict=True):
        assert sum(micro.tokens for micro in one.micro_batches + other.micro_batches) == whole.micro_batches[0].tokens


def test_a_budget_needs_only_equal_shares(folder):
    assert plan_of(folder, ALONE, "global_batch=7", "micro_tokens=80").total_steps == 7
    with pytest.raises(UsageError, match="cannot be divided among 2"):
        plan_of(folder, replace(ALONE, size=2), "global_batch=7", "micro_tokens=80")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["micro_tokens=64", "loss_mean=microbatch"], "micro_tokens makes them unequal"),
        (["freeze_llm=true", "lora.r=4"], "freeze_llm trains nothing"),
    ],
)
def test_settings_that_do_not_go_together(folder, overrides, text):
    with pytest.raises(UsageError) as caught:
        plan_of(folder, ALONE, *overrides)
    assert text in caught.value.why


def test_an_image_of_several_conversations_is_read_once_a_step(folder, monkeypatch):
    plan = plan_of(folder, ALONE, "global_batch=32", "micro_batch=2")
    read, real = [], plan.reader.read
    monkeypatch.setattr(plan.reader, "read", lambda ids, out=None: read.append(list(ids)) or real(ids, out))
    step = next(step for step in feed_of(plan).steps(0) if step.images)
    asked = [plan.image_ids[c.image] for c in plan.conversations if c.image is not None]
    assert len(asked) == 32
    assert max(map(Counter, read), key=len) == Counter(set(asked))  # 16 images, two conversations each
    for micro in step.micro_batches:
        expected = torch.from_numpy(real([step.images[number] for number in micro.images]))
        assert torch.equal(micro.batch.visual_UND, expected)


def test_steps_are_the_same_wherever_the_feed_begins(folder):
    plan = plan_of(folder, ALONE)
    later = list(feed_of(plan).steps(3))
    assert [step.index for step in later] == [3, 4]
    tokens_UND = [micro.batch.visual_UND.clone() for micro in next(feed_of(plan).steps(3)).micro_batches]
    whole = feed_of(plan).steps(0)
    for _ in range(3):
        next(whole)
    for micro, expected_UND in zip(next(whole).micro_batches, tokens_UND, strict=True):
        assert torch.equal(micro.batch.visual_UND, expected_UND)


def test_attention_is_causal_without_a_mask_and_logits_are_where_something_is_learned(folder, monkeypatch):
    trainee, optimizer, plan, step = one_step(folder, ALONE)
    calls, real = [], F.scaled_dot_product_attention

    def spy(*args, **kwargs):
        calls.append((kwargs.get("attn_mask"), kwargs.get("is_causal")))
        return real(*args, **kwargs)

    widths = []
    trainee.vlm.llm.get_output_embeddings().register_forward_hook(lambda _m, _i, out: widths.append(tuple(out.shape)))
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    train_step(trainee.vlm, optimizer, step, plan, ALONE)
    assert calls == [(None, True)] * 4  # two layers, two micro-batches
    assert widths == [(1, micro.supervised, 320) for micro in step.micro_batches]


def test_positions_share_phases_as_they_did_in_the_reference():
    """Counts of transformers 4.38.1's expression under autocast."""
    llm = tiny_llm()
    rotary = llm.model.rotary_emb

    def distinct(start):
        cos, sin = rotary(torch.zeros(1), torch.arange(start, start + 64)[None])
        return len({(float(c), float(s)) for c, s in zip(cos[0, :, 0], sin[0, :, 0], strict=True)})

    assert [distinct(start) for start in (0, 256, 512, 1024, 2048)] == [64] * 5
    round_positions(llm)
    assert [distinct(start) for start in (0, 256, 512, 1024, 2048)] == [64, 33, 17, 9, 5]


def test_rounded_positions_change_the_loss_a_little_and_stay_with_the_model(folder, tmp_path):
    losses = []
    for rope in ("fp32", "bf16"):
        trainee, optimizer, plan, step = one_step(folder, ALONE, f"rope={rope}")
        losses.append(train_step(trainee.vlm, optimizer, step, plan, ALONE).loss)
    assert losses[0] != losses[1]
    assert trainee.card.rope == "bf16"
    save_model(tmp_path, trainee.vlm, trainee.tokenizer, trainee.card)
    again = load_model(tmp_path).vlm
    with torch.no_grad():
        for micro in step.micro_batches:
            torch.testing.assert_close(again(micro.batch), trainee.vlm(micro.batch))
    assert losses[1] == pytest.approx(losses[0], abs=0.01)
    with pytest.raises(UsageError, match="rope=bf16 does not work"):
        one_step(folder, ALONE, "rope=bf16", f"llm={folder / 'gpt2'}")


def test_the_profile_is_a_set_of_switches_and_each_can_be_set_alone(folder, tmp_path):
    status = run(folder, tmp_path / "run", "--profile", "paper", "micro_batch=2", "rope=fp32")
    config = status.config
    assert (config["optim"]["weight_decay"], config["loss_mean"]) == (0, "microbatch")
    assert (config["order"], config["reduce"], config["rope"]) == ("paper", "bf16", "fp32")
    with pytest.raises(UnknownNameError, match="unknown profile 'papers'"):
        run(folder, tmp_path / "other", "--profile", "papers")
    defaults = TrainConfig(cache="c").model_dump()
    for item in profile_overrides("paper"):
        key = item.partition("=")[0].split(".")
        assert (defaults[key[0]][key[1]] if len(key) > 1 else defaults[key[0]]) != item.partition("=")[2]


def test_a_frozen_llm_stays_and_the_connector_learns(folder, tmp_path):
    model = run(folder, tmp_path / "run", "freeze_llm=true").path / "model"
    before, after = load_file(folder / "llm" / "model.safetensors"), load_file(model / "llm" / "model.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    connector = assemble(plan_of(folder, ALONE), ALONE).vlm.connector.state_dict()
    trained = load_file(model / "connector.safetensors")
    assert all(not torch.equal(value, connector[name]) for name, value in trained.items())


def test_adapters_are_what_is_trained_and_the_model_is_a_plain_llm(folder, tmp_path):
    trainee, optimizer, plan, step = one_step(
        folder, ALONE, "lora.r=2", "lora.alpha=8", "lora.targets=[q_proj,up_proj]"
    )
    vlm = trainee.vlm
    trained = {name for name, p in vlm.named_parameters() if p.requires_grad and not name.startswith("connector.")}
    assert len(trained) == 2 * 2 * 2  # layers, targets, A and B
    assert all("lora_" in name for name in trained)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 8 + 4
    before = {name: value.clone() for name, value in full_weights(vlm, ALONE, plan.config.lora).items()}
    plain = load_file(folder / "llm" / "model.safetensors")
    assert {name for name in before if name.startswith("llm.")} == {f"llm.{name}" for name in plain}
    assert all(torch.equal(before[f"llm.{name}"], value) for name, value in plain.items())  # B is zero
    for _ in range(2):
        train_step(vlm, optimizer, step, plan, ALONE)
    after = full_weights(vlm, ALONE, plan.config.lora)
    changed = {
        name.rpartition(".")[0].rpartition(".")[2]
        for name in plain
        if not torch.equal(after[f"llm.{name}"], plain[name])
    }
    assert changed == {"q_proj", "up_proj"}
    merged = VLM(vlm.connector, tiny_llm(), eos_ids=[1])
    merged.load_state_dict(dict(after))
    with torch.no_grad():
        for micro in step.micro_batches:
            torch.testing.assert_close(merged(micro.batch), vlm(micro.batch), rtol=1e-5, atol=1e-5)


def test_a_run_with_adapters_leaves_a_model_that_loads(folder, tmp_path):
    saved = load_model(run(folder, tmp_path / "run", "lora.r=2", "activation_checkpointing=true").path / "model")
    assert not any("lora" in name for name in saved.vlm.state_dict())
    with pytest.raises(UsageError, match="the adapters cannot be put into nothing_proj") as caught:
        run(folder, tmp_path / "wrong", "lora.r=2", "lora.targets=[nothing_proj]")
    assert "q_proj" in caught.value.fix


def test_the_start_of_adapters_follows_from_the_seed(folder):
    one, same, other = (
        assemble(plan_of(folder, ALONE, "lora.r=2", f"seed={seed}"), ALONE).vlm.state_dict() for seed in (1, 1, 2)
    )
    down = [name for name in one if "lora_A" in name]
    assert all(torch.equal(one[name], same[name]) for name in down)
    assert not any(torch.equal(one[name], other[name]) for name in down)
    assert len({float(one[name].sum()) for name in down}) == len(down)


def test_a_preview_shows_what_the_training_does(folder, tmp_path, capsys):
    plan = plan_of(folder, ALONE)
    seen = preview(plan, 1)
    status = run(folder, tmp_path / "run").status
    assert seen.digest == status["order_digest"]
    steps = list(feed_of(plan).steps(0))
    assert seen.first_batches == tuple(tuple(step.example_ids) for step in steps[:3])
    assert seen.tokens == sum(micro.tokens for step in steps for micro in step.micro_batches) / len(steps)
    assert seen.sizes.trained == sum(p.numel() for p in assemble(plan, ALONE).vlm.parameters())
    assert seen.state_bytes == 16 * seen.sizes.trained
    assert 0 < seen.step_s < 5
    assert preview(plan, 2).state_bytes == seen.state_bytes / 2
    capsys.readouterr()
    train_command(arguments(folder, tmp_path / "none", "--dry-run"), standalone_mode=False)
    shown = capsys.readouterr()
    assert status["order_digest"] in shown.out
    assert f"step 1: {', '.join(steps[0].example_ids[:6])} and 2 more" in shown.err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_estimated_as_what_autograd_keeps(folder, recompute):
    switch = f"activation_checkpointing={str(recompute).lower()}"
    trainee, _, plan, step = one_step(folder, ALONE, switch)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in trainee.vlm.parameters()}
    micro = step.micro_batches[0]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainee.vlm(micro.batch)
    measured = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)
    sizes = preview(plan, 1).sizes
    rows, positions = micro.batch.input_ids_BT.shape
    estimated = activation_bytes(
        sizes, tokens=rows * positions, learned=micro.supervised, half=False, recompute=recompute
    )
    assert measured <= estimated
    if not recompute:  # with it, a layer and the logits come on top, later
        assert estimated < 1.5 * measured


def test_no_option_is_a_prefix_of_one_of_torchruns():
    """torchrun reads options even behind `-m vlmx train`, and guesses at shortened ones."""
    from torch.distributed.run import get_args_parser

    options = [name for parameter in train_command.params for name in parameter.opts if name.startswith("--")]
    assert {"--cache", "--dry-run", "--profile", "--resume"} <= set(options)
    for option in options:
        given = ["--nproc-per-node", "2", "-m", "vlmx", "train", option, "x"]
        parsed = get_args_parser().parse_args(given)
        assert (parsed.training_script, parsed.training_script_args) == ("vlmx", ["train", option, "x"])
