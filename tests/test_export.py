"""Is an exported model the trained one: as a transformers LLaVA, in its parts, from a checkpoint, with adapters?"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny_llm import tiny_llm, tiny_tokenizer
from train_world import arguments, make_world

from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.spec import CacheSpec
from vlmx.errors import RunError, SpecMismatchError, UsageError
from vlmx.extract.backbones.base import build_backbone
from vlmx.models.connectors import build_connector
from vlmx.models.folder import ModelCard, load_model, save_model
from vlmx.models.prompts import choose_prompt
from vlmx.models.vlm import VLM
from vlmx.runs import RunFolder
from vlmx.serve.clip_tower import tower_config, tower_state
from vlmx.serve.export import export_run
from vlmx.serve.export_command import export
from vlmx.train.command import train as train_command

QUESTION = "what is the red one?"
CLIP = "timm:vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world):
    """A trained model; its encoder is none that LLaVA knows."""
    train_command(arguments(world, world / "run"), standalone_mode=False)
    return RunFolder(world / "run")


def saved_run(
    folder,
    spec,
    *,
    connector="mlp2",
    prompt="plain",
    dim=256,
    grid=(4, 4),
    tied=False,
    full=False,
    rope="fp32",
    template=None,
):
    """A run folder with an untrained model."""
    torch.manual_seed(1)
    tokenizer, llm = tiny_tokenizer(chat=prompt == "chat"), tiny_llm(tied=tied)
    with torch.no_grad():
        for layer in llm.model.layers:
            layer.self_attn.q_proj.weight *= 50  # or attention would be even, and no position matter
    tokenizer.chat_template = template or tokenizer.chat_template
    if full:  # the tokenizer knows as many tokens as the LLM has rows
        llm.resize_token_embeddings(len(tokenizer))
    vlm = VLM(build_connector(connector, dim, 32), llm, eos_ids=[tokenizer.eos_token_id])
    fields = {"connector": connector, "dim_vision": dim, "dim_llm": 32, "prompt": prompt, "llm": "none"}
    card = ModelCard(**fields, spec=spec, grid=grid, rope=rope)
    run = RunFolder.create(folder, kind="train", config={})
    save_model(folder / "model", vlm, tokenizer, card)
    return run


def clip_spec(**changes):
    fields = {
        "backbone": CLIP,
        "weights_sha256": "random:3",
        "forward_version": 1,
        "feature": "blocks.8",
        "out_norm": "none",
        "geometry": Geometry(mode="letterbox", height=64, width=64, fill=(122, 116, 104)),
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
    }
    return CacheSpec(**(fields | changes))


def our_logits(run, visual_ND):
    saved = load_model(run.path / "model")
    ids = saved.prompt.encode_question(QUESTION)
    return saved.vlm.first_token_logits(visual_ND[None], [ids])[0]


@pytest.mark.parametrize(
    ("prompt", "tied", "full"),
    [("plain", False, False), ("plain", True, True), ("vicuna-v1.5", False, True), ("chat", False, False)],
)
def test_llava_has_the_same_logits(tmp_path, prompt, tied, full):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    run = saved_run(tmp_path / "run", clip_spec(), prompt=prompt, tied=tied, full=full)
    backbone = build_backbone(CLIP, res=(64, 64), weights="random:3", block=8)
    assert export_run(run, tmp_path / "out") == "llava"
    model, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.eval()
    pixels_BCHW = torch.randn(1, 3, 64, 64)
    ids = choose_prompt(prompt, tiny_tokenizer(chat=prompt == "chat")).encode_question(QUESTION)
    input_ids = torch.tensor([[ids[0], *[model.config.image_token_id] * 16, *ids[1:]]])
    with torch.inference_mode():
        theirs = model(input_ids=input_ids, pixel_values=pixels_BCHW).logits[0, -1]
        visual_ND = backbone(pixels_BCHW)[0]
    ours = our_logits(run, visual_ND)
    torch.testing.assert_close(theirs[: len(ours)], ours, rtol=0, atol=1e-5)
    output = model.generate(input_ids=input_ids, pixel_values=pixels_BCHW, max_new_tokens=5, do_sample=False)
    assert model.config.image_token_id not in output[0, input_ids.shape[1] :]

    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    photo = np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8)
    if prompt == "chat":
        text = "<s><image>" + processor.tokenizer.decode(ids[1:])
    else:
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        text = processor.apply_chat_template([{"role": "user", "content": content}])
    inputs = processor(images=photo, text=text, return_tensors="pt", add_special_tokens=False)
    assert inputs["input_ids"].tolist() == input_ids.tolist()
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)


def test_the_processor_prepares_photos_as_the_cache_does(tmp_path):
    from PIL import Image
    from transformers import AutoProcessor

    from vlmx.extract.preprocess import prepare

    spec = clip_spec()
    export_run(saved_run(tmp_path / "run", spec), tmp_path / "out")
    rows, columns = np.mgrid[0:90, 0:150]
    smooth = np.stack([rows, columns, 255 - columns], axis=-1).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "photo.png")
    ours_CHW = prepare((tmp_path / "photo.png").read_bytes(), spec.geometry, spec.mean, spec.std)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    theirs = processor.image_processor(Image.open(tmp_path / "photo.png"), return_tensors="np")["pixel_values"][0]
    assert np.abs(np.asarray(ours_CHW) - theirs).mean() < 0.02  # a level of 255 is 0.015


@pytest.mark.parametrize("activation", ["GELU", "QuickGELU"])
def test_the_tower_is_the_timm_network(activation):
    from timm.layers import QuickGELU
    from transformers import CLIPVisionConfig, CLIPVisionModel

    backbone = build_backbone(CLIP, res=(48, 48), weights="random:0", block=2)
    if activation == "QuickGELU":
        for block in backbone.net.net.blocks:
            block.mlp.act = QuickGELU()
    config = tower_config(backbone)
    assert config["num_hidden_layers"] == 3
    tower = CLIPVisionModel(CLIPVisionConfig(**config)).eval()
    tower.load_state_dict(tower_state(backbone))
    pixels_BCHW = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        theirs = tower(pixels_BCHW, output_hidden_states=True).hidden_states[-1][:, 1:]
        torch.testing.assert_close(theirs, backbone(pixels_BCHW), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vit-mini-scenes", "vmamba-mini-scenes"])
def test_other_encoders_are_no_tower(name):
    assert tower_config(build_backbone(name, res=(64, 64), weights="random:0")) is None


def run_readme(folder, more=""):
    """What the README's code, and `more` after it, print in a process that has no vlmx."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    before = """
import sys
import vlmx, torchvision  # some builds of torchvision cannot be imported on their own
for name in [name for name in sys.modules if name.partition(".")[0] == "vlmx"]:
    del sys.modules[name]
sys.modules["vlmx"] = None
"""
    result = subprocess.run(
        [sys.executable, "-c", before + code + more],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("prompt", ["vicuna-v1.5", "chat"])
def test_the_code_of_a_llava_runs_without_vlmx(tmp_path, prompt):
    from PIL import Image

    export_run(saved_run(tmp_path / "run", clip_spec(), prompt=prompt), tmp_path / "out")
    Image.new("RGB", (90, 60), (200, 30, 30)).save(tmp_path / "out" / "photo.jpg")
    printed = run_readme(tmp_path / "out", "print(inputs['input_ids'].tolist())")
    saved = load_model(tmp_path / "run" / "model")
    ids = saved.prompt.encode_question("What is this?")
    image = json.loads((tmp_path / "out" / "config.json").read_text())["image_token_index"]
    assert json.loads(printed.splitlines()[-1]) == [[ids[0], *[image] * 16, *ids[1:]]]


ENDS_ITS_TURNS = (  # no BOS, an end that is not EOS, a block before each answer, and the day
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ strftime_now('%d') }} {{ m['content'] }}{% else %}"
    "A:[]{{ m['content'] }}<s>{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


@pytest.mark.parametrize(
    ("prompt", "rope", "template"),
    [
        pytest.param("plain", "fp32", None, marks=pytest.mark.slow),
        ("vicuna-v1.5", "bf16", None),
        pytest.param("chat", "fp32", None, marks=pytest.mark.slow),
        ("chat", "fp32", ENDS_ITS_TURNS),
    ],
)
def test_the_code_of_the_parts_runs_without_vlmx(tmp_path, prompt, rope, template):
    spec = clip_spec(backbone="vmamba-s-coco", feature="stage3", out_norm="trained")
    run = saved_run(
        tmp_path / "run", spec, connector="mlp3", prompt=prompt, dim=6, grid=(2, 2), rope=rope, template=template
    )
    assert export_run(run, tmp_path / "out") == "parts"
    visual_ND = torch.randn(4, 6)
    np.save(tmp_path / "out" / "visual.npy", visual_ND.numpy())
    ask = f"""
import json, numpy
visual_ND = torch.from_numpy(numpy.load("visual.npy"))
with torch.inference_mode():
    logits = llm(inputs_embeds=embeddings(visual_ND, "  {QUESTION}\\n")).logits[0, -1].float().tolist()
print(json.dumps({{"logits": logits, "answer": answer(visual_ND, "{QUESTION}", max_new_tokens=8)}}))
"""
    found = json.loads(run_readme(tmp_path / "out", ask).splitlines()[-1])
    torch.testing.assert_close(torch.tensor(found["logits"]), our_logits(run, visual_ND), rtol=0, atol=1e-5)
    saved = load_model(tmp_path / "out")
    ids = saved.prompt.encode_question(QUESTION)
    assert found["answer"] == saved.prompt.decode(saved.vlm.generate(visual_ND[None], [ids], 8)[0])
    if template:
        assert saved.prompt.tokenizer.decode(ids) == f"26 {QUESTION}A:[]"
        assert llm_of(tmp_path / "out")["eos_token_id"] == [0, 1]
    assert "because its connector is mlp3, not mlp2" in (tmp_path / "out" / "README.md").read_text()


def llm_of(folder):
    return json.loads((folder / "llm" / "generation_config.json").read_text())


def test_rounded_positions_are_no_llava_and_change_logits(tmp_path):
    run = saved_run(tmp_path / "run", clip_spec(), rope="bf16")
    with pytest.raises(UsageError, match="this model is no LLaVA") as caught:
        export_run(run, tmp_path / "out", layout="llava")
    assert caught.value.why == "its LLM learned with rounded rotary positions (rope=bf16), which LLaVA does not compute"
    plain = saved_run(tmp_path / "plain", clip_spec())
    visual_ND = torch.randn(16, 256)
    assert (our_logits(run, visual_ND) - our_logits(plain, visual_ND)).abs().max() > 1e-4


def test_the_command(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(export, [str(run.path), "-o", "out", "--dtype", "bfloat16"], catch_exceptions=False)
    assert result.output.splitlines()[-1] == "out"
    assert load_file("out/connector.safetensors")["0.weight"].dtype == torch.bfloat16
    with pytest.raises(UsageError, match="out exists already"):
        export_run(run, Path("out"))
    with pytest.raises(UsageError, match="this model is no LLaVA") as caught:
        export_run(run, Path("other"), layout="llava")
    assert caught.value.why == "vit-mini-scenes is no CLIP ViT"
    assert not Path("other").exists()


def test_other_weights_of_the_encoder_are_refused(tmp_path):
    run = saved_run(tmp_path / "run", clip_spec())
    with pytest.raises(SpecMismatchError, match="not the weights of"):
        export_run(run, tmp_path / "out", weights="random:4")


def test_a_checkpoint(run, tmp_path):
    last = load_file(run.path / "model" / "connector.safetensors")
    export_run(run, tmp_path / "four", step="4", layout="parts")
    four = load_file(tmp_path / "four" / "connector.safetensors")
    assert four.keys() == last.keys()
    assert not torch.equal(four["0.weight"], last["0.weight"])
    export_run(run, tmp_path / "best", step="best", layout="parts")
    assert (tmp_path / "best" / "model.json").exists()
    with pytest.raises(RunError, match="has no checkpoint '3'") as caught:
        export_run(run, tmp_path / "three", step="3")
    assert caught.value.why == "it has those of the steps 2, 4"


def test_adapters_are_merged(world, tmp_path):
    """The last checkpoint and the model at the end are the same when the run ends with a checkpoint."""
    out = tmp_path / "run"
    train_command([*arguments(world, out), "lora.r=2", "checkpoint.every_steps=5"], standalone_mode=False)
    export_run(RunFolder(out), tmp_path / "end", layout="parts")
    export_run(RunFolder(out), tmp_path / "five", step="5", layout="parts")
    end, five, start = (
        load_file(f / "llm" / "model.safetensors") for f in (tmp_path / "end", tmp_path / "five", world)
    )
    assert end.keys() == five.keys() == start.keys()
    assert not torch.equal(end["model.layers.0.mlp.up_proj.weight"], start["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(end["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    for name, value in end.items():
        torch.testing.assert_close(five[name], value, rtol=0, atol=1e-6)
