"""Does phase two train: alone, under torchrun, killed and resumed, without any image library, and on wrong input?"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_llm import tiny_tokenizer, write_tiny_llm

from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.ids import ImageEntry, ImageTable, image_id
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.cache_specs.writer import CacheWriter
from vlmx.errors import CacheError, ConfigError, DataError, RunError, UnknownNameError, UsageError
from vlmx.models.folder import load_model
from vlmx.models.prompts import IGNORED
from vlmx.runs import RunFolder
from vlmx.train.checkpoints import saved_steps
from vlmx.train.collate import Row, _answer_weights
from vlmx.train.command import train as train_command

MAIN = Path(__file__).parent / "train_main.py"
IMAGES = 20
PATIENCE_S = 300  # for processes that take seconds on an idle machine
CONFIG = {
    "prompt": "plain",
    "turns": "isolated",
    "global_batch": 8,
    "micro_batch": 4,
    "optim": {"lr": 1e-3, "connector_lr": 3e-3},
    "checkpoint": {"every_steps": 2, "keep": 2},
    "log_every": 1,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a cache of 20 images, conversations about them (some without), an LLM and a configuration."""
    root = tmp_path_factory.mktemp("train")
    ids = [image_id(f"image {n}".encode()) for n in range(IMAGES)]
    tokens_BND = np.random.default_rng(0).normal(size=(IMAGES, 4, 6)).astype(np.float16)
    spec = CacheSpec(
        backbone="vit-mini-scenes",
        weights_sha256="random:0",
        forward_version=1,
        feature="last",
        out_norm="none",
        geometry=Geometry(mode="letterbox", height=64, width=64, fill=(127, 127, 127)),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    with CacheWriter(root / "caches", spec, TokenShape(grid=(2, 2), dim=6)) as writer:
        for plan in writer.plan(ids):
            writer.commit(plan, tokens_BND, {})
        writer.seal()
    entries = [ImageEntry(key=f"{n}.jpg", id=i, width=64, height=64) for n, i in enumerate(ids)]
    entries.append(ImageEntry(key="broken.jpg", id=image_id(b"broken"), error="truncated"))
    ImageTable.merge(root / "caches", "photos", entries)
    rows = [row(n, f"{n % IMAGES}.jpg" if n % 5 else None) for n in range(40)]
    (root / "photos.json").write_text(json.dumps(rows))
    write_tiny_llm(root / "llm")
    (root / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return root


def row(number, image):
    messages = [f"<image>\nis it {number}?", "yes" if number % 2 else "no", "what is it?", "a " * (number % 9)]
    return {
        "id": f"c{number}",
        **({"image": image} if image else {}),
        "conversations": [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(messages)],
    }


def arguments(world, out, *extra, data="photos.json"):
    options = {"cache": "vit-mini", "caches": world / "caches", "connector": "mlp2", "llm": world / "llm"}
    options |= {"data": world / data, "config": world / "config.yaml", "out": out}
    return [text for key, value in options.items() for text in (f"--{key}", str(value))] + list(extra)


def run_here(world, out, *extra, data="photos.json"):
    train_command(arguments(world, out, *extra, data=data), standalone_mode=False)
    return RunFolder(out)


def losses(run):
    return {line["step"]: line["loss"] for line in run.metrics()}


def weights(run):
    model = run.path / "model"
    return {**load_file(model / "connector.safetensors"), **load_file(model / "llm" / "model.safetensors")}


@pytest.fixture(scope="module")
def plain(world):
    """An uninterrupted run in one process."""
    return run_here(world, world / "plain")


def test_one_process(plain):
    assert plain.status["state"] == "done"
    assert plain.status["prompt"] == "plain"
    assert len(plain.status["order_digest"]) == 64
    by_step = losses(plain)
    assert list(by_step) == [1, 2, 3, 4, 5]  # 32 examples with an image, 8 without
    assert by_step[1] == pytest.approx(5.77, abs=0.3)  # about log(320) before anything is learned
    assert saved_steps(plain.path / "checkpoints") == [2, 4]
    saved = load_model(plain.path / "model")
    assert "untrained (random:0)" in plain.status["notes"][-1]
    assert saved.card.connector == "mlp2"
    assert saved.card.grid == (2, 2)
    ids = saved.prompt.encode_question("what is it?")
    assert len(saved.vlm.generate(torch.zeros(1, 4, 6), [ids], 3)[0]) <= 3


def test_training_learns(world):
    run = run_here(world, world / "learns", "epochs=12", "optim.lr=3e-3", "checkpoint.every_steps=0")
    by_step = losses(run)
    assert by_step[60] < 0.5 * by_step[1]
    assert saved_steps(run.path / "checkpoints") == []


def test_division_into_micro_batches_does_not_matter(world, plain):
    other = run_here(world, world / "micro", "micro_batch=2", "max_steps=5")
    assert losses(other) == pytest.approx(losses(plain), abs=1e-5)
    mean_of_means = run_here(world, world / "means", "micro_batch=2", "max_steps=5", "loss_mean=microbatch")
    assert abs(losses(mean_of_means)[1] - losses(plain)[1]) > 1e-3


def test_every_answer_counts_the_same_if_wanted(world, plain):
    one = run_here(world, world / "answers-4", "micro_batch=4", "max_steps=2", "loss_mean=answers")
    other = run_here(world, world / "answers-2", "micro_batch=2", "max_steps=2", "loss_mean=answers")
    assert losses(one) == pytest.approx(losses(other), abs=1e-5)
    assert abs(losses(one)[1] - losses(plain)[1]) > 1e-4


def test_weights_of_answers():
    turns = [np.array([0, 1, 1, 1, 2, 2]), np.array([0, 1, 1, 1])]
    labels = [np.array([IGNORED, IGNORED, 8, 8, IGNORED, 8]), np.array([IGNORED, 8, 8, 8])]
    rows = [
        Row(ids=t, labels=n, turns=t, positions=t, truncated=False, image=None)
        for t, n in zip(turns, labels, strict=True)
    ]
    assert _answer_weights(rows) == pytest.approx([1 / 2, 1 / 2, 1, 1 / 3, 1 / 3, 1 / 3])


@pytest.fixture(scope="module")
def two(world):
    """The same run in two processes, with the layers' activations recomputed."""
    out = world / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(MAIN)]
    extra = ["activation_checkpointing=true"]
    subprocess.run([*command, *arguments(world, out, *extra)], check=True, timeout=PATIENCE_S, capture_output=True)
    return RunFolder(out)


@pytest.mark.slow
def test_torchrun_has_the_same_losses(plain, two):
    assert two.status["state"] == "done"
    assert two.status["order_digest"] == plain.status["order_digest"]
    assert losses(two) == pytest.approx(losses(plain), abs=1e-5)
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(two)[key], value, rtol=0, atol=1e-5)


def test_bfloat16_is_near(world, plain):
    run = run_here(world, world / "bf16", "precision=bf16", "activation_checkpointing=true")
    assert losses(run) == pytest.approx(losses(plain), abs=0.03)
    assert losses(run) != losses(plain)


def test_killed_and_resumed_is_uninterrupted(world, plain):
    out = world / "killed"
    process = subprocess.Popen(
        [sys.executable, str(MAIN), *arguments(world, out)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline_s = time.monotonic() + PATIENCE_S
    while not saved_steps(out / "checkpoints") and time.monotonic() < deadline_s:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert RunFolder(out).status["state"] == "running"
    assert not (out / "model" / "model.json").exists()
    train_command(["--out", str(out), "--resume"], standalone_mode=False)
    run = RunFolder(out)
    assert run.status["resumed_after_step"] in (2, 4)
    assert losses(run) == losses(plain)
    for key, value in weights(plain).items():
        assert torch.equal(weights(run)[key], value), key


@pytest.mark.slow
def test_resume_in_another_number_of_processes(world, plain, two, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(two.path, out)
    (out / "model" / "model.json").unlink()
    RunFolder(out).set_status("running")
    run = run_here(world, out, "--resume", "activation_checkpointing=true")
    assert run.status["resumed_after_step"] == 4
    assert losses(run) == pytest.approx(losses(plain), abs=1e-5)


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("timm", "PIL", "torchvision", "cv2", "vlmx.extract"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from vlmx.train.command import train
train(sys.argv[1:], standalone_mode=False)
assert not {"timm", "PIL", "torchvision", "vlmx.extract"} & set(sys.modules)
"""


def test_no_image_library_is_needed(world, tmp_path):
    command = [sys.executable, "-c", BLOCK, *arguments(world, tmp_path / "run", "max_steps=1")]
    result = subprocess.run(command, check=False, timeout=PATIENCE_S, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr  # ours begin with "warning:"
    assert RunFolder(tmp_path / "run").status["state"] == "done"


def test_not_a_number_stops_with_the_examples(world, tmp_path):
    with pytest.raises(RunError, match="stopped at step 2") as caught:
        run_here(world, tmp_path / "run", "optim.lr=1e30", "optim.max_grad_norm=1e30")
    assert caught.value.why.startswith("its batch was c")
    assert RunFolder(tmp_path / "run").status["state"] == "failed"


def test_sliding_windows_and_isolated_turns_do_not_go_together(world, tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MistralConfig(
        vocab_size=320, num_hidden_layers=1, sliding_window=64, bos_token_id=0, eos_token_id=1, **sizes
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    llm = ["--llm", str(tmp_path / "llm")]
    with pytest.raises(UsageError, match="turns=isolated does not work"):
        run_here(world, tmp_path / "isolated", *llm)
    assert run_here(world, tmp_path / "causal", *llm, "turns=causal").status["state"] == "done"


def test_images_that_could_not_be_decoded_are_left_out_and_noted(world, tmp_path, capsys):
    (world / "one-broken.json").write_text(json.dumps([row(n, f"{n}.jpg") for n in range(8)] + [row(8, "broken.jpg")]))
    run = run_here(world, tmp_path / "run", "images=photos", data="one-broken.json")
    assert "1 conversations are left out: 1 images could not be decoded, e.g. broken.jpg (truncated)" in (
        capsys.readouterr().err
    )
    assert len(run.status["notes"]) == 2


def test_images_that_were_never_extracted(world, tmp_path):
    (world / "more.json").write_text(json.dumps([row(n, f"{n}.jpg") for n in range(IMAGES + 3)]))
    with pytest.raises(CacheError, match=r"3 of 23 images .* were never extracted") as caught:
        run_here(world, tmp_path / "run", "images=photos", data="more.json")
    assert caught.value.fix.startswith("vlmx extract --backbone vit-mini-scenes --res 64")
    with pytest.raises(DataError, match=r"the images of .* were never extracted") as caught:
        run_here(world, tmp_path / "run", data="more.json")
    assert "has no image table 'more'" in caught.value.why
    assert not (tmp_path / "run").exists()


def test_wrong_rows_are_all_counted(world, tmp_path):
    rows = [row(0, "0.jpg"), {"id": "x"}, row(1, None)]
    rows[2]["conversations"][0]["from"] = "gpt"
    (world / "wrong.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"2 of 3 rows") as caught:
        run_here(world, tmp_path / "run", data="wrong.json")
    assert "row 3: message 1 is from 'gpt', expected 'human'" in caught.value.why


@pytest.mark.parametrize(
    ("extra", "error", "text"),
    [
        (["optim.learning_rate=1", "epoch=2"], ConfigError, "optim.learning_rate is not known"),
        (["--connector", "mlp4"], UnknownNameError, "unknown connector 'mlp4'"),
        (["--cache", "vitt-mini"], UnknownNameError, "unknown cache 'vitt-mini'"),
        (["--config", "papers"], UnknownNameError, "did you mean 'paper'"),
        (["--data", "mimi"], UnknownNameError, "did you mean 'mini'"),
        (["micro_batch=3"], UsageError, "a global batch of 8 cannot be divided"),
        (["prompt=chat"], UsageError, "no chat template"),
    ],
)
def test_wrong_input(world, tmp_path, extra, error, text):
    with pytest.raises(error) as caught:
        run_here(world, tmp_path / "run", *extra)
    assert text in str(caught.value)


def test_a_run_is_not_overwritten(world, plain, tmp_path):
    with pytest.raises(RunError, match="there is a run in"):
        run_here(world, plain.path)
    RunFolder(plain.path).set_status("running")
    with pytest.raises(ConfigError, match="another configuration") as caught:
        run_here(world, plain.path, "--resume", "seed=8")
    assert "seed: 7, now 8" in caught.value.why
    RunFolder(plain.path).set_status("done")
    before = losses(plain)
    run_here(world, plain.path, "--resume")
    assert losses(plain) == before
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(RunError, match="is not a run folder"):
        run_here(world, tmp_path)


def test_resume_needs_a_run():
    with pytest.raises(ConfigError, match="what to go on with"):
        train_command(["--resume"], standalone_mode=False)
    with pytest.raises(UsageError, match="--cache is missing"):
        train_command(["optim.lr=1"], standalone_mode=False)


def test_presets_are_valid():
    from vlmx.config import load_config
    from vlmx.train.settings import TrainConfig, described_keys, preset_names, preset_path

    assert preset_names() == ["mini", "paper"]
    paper, mini = (load_config(TrainConfig, preset_path(name), [], cache="c") for name in ("paper", "mini"))
    assert (paper.optim.lr, paper.global_batch, paper.micro_batch, paper.precision) == (2e-5, 128, 16, "bf16")
    assert (mini.data, mini.llm, mini.turns) == ("mini", "mini", "isolated")
    assert all(description for _, _, description in described_keys())
