"""Is a training that was stopped or killed the same, when resumed, as one that never was? With real signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_world import arguments, make_world

from vlmx.runs import RunFolder
from vlmx.train.checkpoints import saved_steps
from vlmx.train.command import train as train_command

HERE = Path(__file__).parent
PATIENCE_S = 300  # for processes that take seconds on an idle machine
LONG = ["epochs=20", "checkpoint.every_steps=1000"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world):
    """An uninterrupted run of 100 steps."""
    train_command(arguments(world, world / "whole", *LONG), standalone_mode=False)
    return RunFolder(world / "whole")


def losses(run):
    return {line["step"]: line["loss"] for line in run.metrics()}


def weights(run):
    model = run.path / "model"
    return {**load_file(model / "connector.safetensors"), **load_file(model / "llm" / "model.safetensors")}


def start(command, out):
    """Start a training, and come back when it has done some steps."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline_s = time.monotonic() + PATIENCE_S
    while len(list(RunFolder(out).metrics())) < 5 and time.monotonic() < deadline_s and process.poll() is None:
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_stops(world, whole, tmp_path, number, code):
    out = tmp_path / "run"
    process = start([sys.executable, "-m", "vlmx", "train", *arguments(world, out, *LONG)], out)
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code, said
    (step,) = saved_steps(out / "checkpoints")
    assert 5 <= step < 100
    assert f"stopped after step {step} of 100, which is saved; vlmx train --out {out} --resume goes on with it" in said
    assert RunFolder(out).status["state"] == "interrupted"
    train_command(["--out", str(out), "--resume"], standalone_mode=False)
    run = RunFolder(out)
    assert run.status["resumed_after_step"] == step
    assert losses(run) == losses(whole)
    for key, value in weights(whole).items():
        assert torch.equal(weights(run)[key], value), key


@pytest.mark.slow
def test_torchrun_is_stopped_and_one_process_goes_on(world, whole, tmp_path):
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start([*torchrun, str(HERE / "train_main.py"), *arguments(world, out, *LONG)], out)
    process.send_signal(signal.SIGTERM)  # to the agent, which passes it on
    _, said = process.communicate(timeout=PATIENCE_S)
    assert said.count("which is saved") == 1, said
    (step,) = saved_steps(out / "checkpoints")
    assert RunFolder(out).status["state"] == "interrupted"
    assert len(list((out / "checkpoints" / f"step-{step}").glob("*.distcp"))) == 2
    train_command(["--out", str(out), "--resume"], standalone_mode=False)
    status = RunFolder(out).status
    assert status["resumed_after_step"] == step
    assert [(one["state"], one["world_size"], one["steps"]) for one in status["sessions"]] == [
        ("interrupted", 2, [0, step]),
        ("done", 1, [step, 100]),
    ]
    assert losses(RunFolder(out)) == pytest.approx(losses(whole), abs=1e-5)


def kill(tmp_path, rounds, seed):
    command = [sys.executable, str(HERE / "train_kill_main.py"), str(tmp_path), str(rounds), str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, check=False, timeout=1800, capture_output=True, text=True, env=environment, cwd=HERE
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_killed_while_saving_and_resumed_is_uninterrupted(tmp_path):
    found = kill(tmp_path, rounds=1, seed=4)
    assert found["while_writing"] >= 1


@pytest.mark.slow
def test_killed_many_times(tmp_path):
    found = kill(tmp_path, rounds=12, seed=2)
    assert found["while_writing"] >= 10
