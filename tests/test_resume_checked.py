"""Is a training gone on with only where it may be, by one process at a time, and is what happened to it recorded?"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from full_disk import FullDisk
from safetensors.torch import load_file
from train_world import arguments, make_world
from transformers import GPT2Config, LlamaConfig, OPTConfig

from vlmx.cli import main
from vlmx.errors import RunError
from vlmx.runs import RunFolder
from vlmx.train.checkpoints import read_weights
from vlmx.train.command import train as train_command
from vlmx.train.parallel import World
from vlmx.train.remarks import dropout_of, remarks
from vlmx.train.settings import LoraConfig, TrainConfig

ALONE = World(rank=0, size=1, device=torch.device("cpu"), distributed=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def plain(world):
    """An uninterrupted run of five steps, with checkpoints of steps 2 and 4."""
    train_command(arguments(world, world / "plain"), standalone_mode=False)
    return RunFolder(world / "plain")


@pytest.fixture
def killed(plain, tmp_path):
    """A copy of it as if it had been killed after its last checkpoint."""
    shutil.copytree(plain.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    RunFolder(tmp_path / "run").set_status("running")
    return RunFolder(tmp_path / "run")


def resume(run, *extra):
    train_command(["--out", str(run.path), "--resume", *extra], standalone_mode=False)


def fails(capsys, command):
    """Exit code, and what is said."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["train", *command])
    return caught.value.code, capsys.readouterr().err


def losses(run):
    return {line["step"]: line["loss"] for line in run.metrics()}


def test_what_is_insisted_on_holds_from_the_next_step(killed):
    rates = ["optim.lr=1e-15", "optim.connector_lr=1e-15", "optim.weight_decay=0.5", "optim.betas=[0.5,0.6]"]
    before = read_weights(killed.path / "checkpoints", 4)
    resume(killed, "--resume-anyway", *rates)
    model = killed.path / "model"
    llm = {f"llm.{name}": value for name, value in load_file(model / "llm" / "model.safetensors").items()}
    connector = load_file(model / "connector.safetensors")
    after = llm | {f"connector.{name}": value for name, value in connector.items()}
    assert len(after) > 10
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-12)
    assert [line["lr"] for line in killed.metrics()][-1] < 1e-15 < [line["lr"] for line in killed.metrics()][-2]


def test_a_torn_line_of_metrics_does_not_matter(plain, killed):
    with open(killed.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    resume(killed)
    assert losses(killed) == losses(plain)


def test_a_checkpoint_that_lost_its_index_is_said_to_be_damaged(killed, capsys):
    checkpoints = killed.path / "checkpoints"
    (checkpoints / "step-4" / ".metadata").unlink()
    aside = shutil.copytree(killed.path, killed.path.with_name("other"))
    resume(killed)
    assert killed.status["resumed_after_step"] == 2
    assert ".metadata: No such file or directory); it was set aside as step-4.damaged" in capsys.readouterr().err
    (aside / "checkpoints" / "step-2" / ".metadata").unlink()
    code, said = fails(capsys, ["--out", str(aside), "--resume"])
    assert code == 7
    assert "all checkpoints in" in said
    assert "no checkpoint yet" not in said


@pytest.fixture
def own_data(world, tmp_path):
    """An unfinished run on data of its own, and these."""
    data, out = tmp_path / "photos.json", tmp_path / "run"
    shutil.copy(world / "photos.json", data)
    train_command([*arguments(world, out), "--data", str(data), "images=photos"], standalone_mode=False)
    RunFolder(out).set_status("failed")
    return RunFolder(out), data


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda rows: rows[3]["conversations"][1].update(value="changed"), ["data digest"]),
        (lambda rows: rows[3].update(image="4.jpg"), ["data digest"]),
        (lambda rows: rows.reverse(), ["order digest", "data digest"]),
        (lambda rows: rows.pop(), ["order digest", "data digest"]),
    ],
)
def test_changed_data_are_refused(own_data, capsys, change, differs):
    run, data = own_data
    kept, status = data.read_text(), run.status
    rows = json.loads(kept)
    change(rows)
    data.write_text(json.dumps(rows))
    for insist in ("--resume", "--resume-anyway"):
        code, said = fails(capsys, ["--out", str(run.path), insist])
        assert code == 7
        assert "was started with other data" in said
        why = next(line for line in said.splitlines() if line.startswith("why "))
        assert [part for part in ("order digest", "data digest", "fingerprint") if part in why] == differs
        assert f"data digest: {status['data_digest'][:12]}, now " in why
    assert run.status == status
    data.write_text(kept)
    resume(run)
    assert run.status["state"] == "done"


HOLD = "import sys, time; from pathlib import Path; from vlmx.runs import RunFolder\n"
HOLD += "with RunFolder(Path(sys.argv[1])).held(): print('held', flush=True); time.sleep(600)"


def test_a_run_that_is_being_trained_is_left_alone(killed, capsys):
    status = killed.status
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(killed.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        for insist in ("--resume", "--resume-anyway"):
            code, said = fails(capsys, ["--out", str(killed.path), insist, "log_every=2"])
            assert code == 7
            assert f"there is a training in {killed.path} already" in said
            assert f"process {holder.pid} on {os.uname().nodename}" in said
        assert killed.status == status
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    resume(killed)  # the system has taken the lock back
    assert killed.status["state"] == "done"


def test_a_folder_that_is_no_run_is_not_even_locked(world, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(RunError, match="is not a run folder"):
        train_command(arguments(world, tmp_path), standalone_mode=False)
    assert [child.name for child in tmp_path.iterdir()] == ["note.txt"]


def test_no_room_for_the_model_is_an_error_and_the_run_goes_on_later(world, plain, tmp_path, capsys):
    out = tmp_path / "run"
    size = (plain.path / "model" / "llm" / "model.safetensors").stat().st_size
    with FullDisk(size - 1):
        code, said = fails(capsys, arguments(world, out))
    assert code == 6
    assert f"error  no space left for the model in {out / 'model'}" in said
    assert not (out / "model").exists()
    run = RunFolder(out)
    assert run.status["state"] == "failed"
    assert run.status["error"].startswith("no space left for the model in")
    resume(run)
    assert run.status["state"] == "done"
    assert losses(run) == losses(plain)


def test_every_end_is_recorded(world, plain, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    with pytest.raises(RunError, match="stopped at step 2"):
        train_command(
            [*arguments(world, out), "checkpoint.every_steps=1", "optim.lr=1e30", "optim.max_grad_norm=1e30"],
            standalone_mode=False,
        )
    run = RunFolder(out)
    started = run.status["started"]
    assert run.status["error"].startswith("training stopped at step 2")
    shutil.rmtree(out / "checkpoints")
    (out / "model").write_text("in the way")
    again = ["--resume-anyway", "optim.lr=1e-3", "optim.max_grad_norm=1"]
    with pytest.raises(FileExistsError):  # not an error of ours
        resume(run, *again)
    assert run.status["state"] == "failed"
    assert run.status["error"].startswith("FileExistsError: ")
    (out / "model").unlink()
    resume(run)
    status = run.status
    assert status["state"] == "done"
    assert "error" not in status
    assert status["started"] == started
    sessions = status["sessions"]
    assert [(one["state"], one["steps"]) for one in sessions] == [
        ("failed", [0, 1]),
        ("failed", [0, 5]),
        ("done", [5, 5]),
    ]
    assert {one["host"] for one in sessions} == {os.uname().nodename}
    assert {one["world_size"] for one in sessions} == {1}
    assert status["seconds"] == pytest.approx(sum(one["seconds"] for one in sessions), abs=0.06)
    assert len(status["changed_when_resumed"]) == 1


def test_dropout_and_a_reduction_without_effect_are_said():
    llama, config = LlamaConfig(), TrainConfig(cache="c")
    assert remarks(config, llama, ALONE) == []
    assert dropout_of(config, GPT2Config()) == {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
    assert dropout_of(config, OPTConfig()) == {"dropout": 0.1}
    adapters = TrainConfig(cache="c", lora=LoraConfig(r=2, dropout=0.25))
    assert dropout_of(adapters, llama) == {"lora.dropout": 0.25}
    (said,) = remarks(adapters, llama, ALONE)
    assert said.startswith("dropout is on (lora.dropout=0.25): what it drops depends on micro-batches")
    two = World(rank=0, size=2, device=torch.device("cpu"), distributed=True)
    for precision, where, why in (("fp32", two, "precision is fp32"), ("bf16", ALONE, "there is one process")):
        (said,) = remarks(TrainConfig(cache="c", reduce="bf16", precision=precision), llama, where)
        assert said.startswith(f"reduce=bf16 changes nothing here: {why}")
    assert remarks(TrainConfig(cache="c", reduce="bf16", precision="bf16"), llama, two) == []
