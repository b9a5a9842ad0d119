"""Do several processes train what one does? The traps of FSDP2 on gloo, and equal curves for every division."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from step_checks import ALONE, LLMS, RUNS, prepare, run_checks
from train_world import arguments

from vlmx.runs import RunFolder

PROGRAM = Path(__file__).parent / "step_checks.py"
PATIENCE_S = 300


def torchrun(folder: Path, world: int) -> list[dict]:
    """Results of each process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command += [str(PROGRAM), str(folder)]
    done = subprocess.run(command, check=False, timeout=PATIENCE_S, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank-{rank}-of-{world}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("step"))


@pytest.fixture(scope="module")
def alone(folder):
    run_checks(folder, ALONE)
    return torch.load(folder / "rank-0-of-1.pt", weights_only=True)


@pytest.fixture(scope="module")
def two(folder):
    return torchrun(folder, 2)


def saved(folder, run):
    model = folder / run / "model"
    return {**load_file(model / "connector.safetensors"), **load_file(model / "llm" / "model.safetensors")}


def test_a_process_without_an_image_takes_part_in_the_connectors_gradients(alone, two):
    for result in two:
        assert result["mixed"]["loss"] == alone["mixed"]["loss"]
        assert result["mixed"]["norm"] == alone["mixed"]["norm"]
    weights = two[0]["mixed"]["weights"]
    assert weights.keys() == alone["mixed"]["weights"].keys()
    assert all(torch.equal(value, weights[name]) for name, value in alone["mixed"]["weights"].items())


@pytest.mark.parametrize("llm", LLMS)
def test_an_llm_that_begins_on_the_meta_device_is_the_one_on_disk(alone, two, llm):
    """Its rotary positions, and the scale of Gemma's embeddings, are in no file."""
    assert [loss for result in two for loss in result["loading"][llm]["losses"]] == alone["loading"][llm]["losses"]


@pytest.mark.parametrize("llm", LLMS)
def test_no_process_holds_the_whole_llm(alone, two, llm):
    whole = alone["loading"][llm]["whole"]
    held = [result["loading"][llm]["held"] for result in two]
    assert sum(held) == whole
    assert max(held) == pytest.approx(whole / 2, rel=0.01)


def test_weights_and_gradients_are_float32_when_the_computation_is_not(alone, two):
    for result in (alone, *two):
        assert result["precision"]["fp32"]["dtypes"] == {"torch.float32"}
        assert result["precision"]["bf16"]["dtypes"] == {"torch.float32"}
        assert result["precision"]["fp32"]["loss"] == pytest.approx(alone["mixed"]["loss"], abs=0.03)
        assert result["precision"]["fp32"]["loss"] != alone["mixed"]["loss"]
    for result in two:
        assert not result["precision"]["fp32"]["rounded"]
        assert result["precision"]["bf16"]["rounded"]


@pytest.mark.parametrize("run", ["fixed", "recomputed", "isolated", "frozen"])
def test_two_processes_are_one_process_with_twice_the_micro_batches_bit_for_bit(folder, alone, two, run):
    assert two[0]["runs"][run] == alone["runs"][run]
    one, other = saved(folder, f"{run}-1"), saved(folder, f"{run}-2")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("run", ["budget", "packed", "lora"])
def test_two_processes_are_one_process(folder, alone, two, run):
    assert two[0]["runs"][run] == pytest.approx(alone["runs"][run], abs=1e-5)
    one, other = saved(folder, f"{run}-1"), saved(folder, f"{run}-2")
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5)


def test_the_means_of_micro_batches_depend_on_their_division_only(alone, two):
    """The paper's order deals examples to two processes in another way than to one, so the first losses are apart."""
    assert len(two[0]["runs"]["paper"]) == len(alone["runs"]["paper"])
    assert two[0]["runs"]["paper"][0] == pytest.approx(alone["runs"]["paper"][0], abs=0.1)


def test_micro_batches_by_tokens_have_the_loss_of_fixed_ones(alone, two):
    assert alone["runs"]["budget"] == pytest.approx(alone["runs"]["fixed"], abs=1e-6)
    assert two[0]["runs"]["budget"] == pytest.approx(alone["runs"]["fixed"], abs=1e-5)


def test_packed_rows_have_the_loss_of_padded_ones(alone, two):
    assert alone["runs"]["packed"] == pytest.approx(alone["runs"]["fixed"], abs=1e-5)
    assert two[0]["runs"]["packed"] == pytest.approx(alone["runs"]["fixed"], abs=1e-5)


def test_recomputed_layers_change_nothing(alone):
    assert alone["runs"]["recomputed"] == alone["runs"]["fixed"]


def test_processes_end_without_finalising_the_interpreter(folder, two):
    """gloo's threads can abort a process that does, after all work is done (pytorch/pytorch#190489)."""
    assert len(list(folder.glob("done-*.json"))) == len(two)
    assert not list(folder.glob("finalised-*"))


def test_torchrun_starts_the_command_with_its_options(folder, alone, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "vlmx", "train", *arguments(folder, tmp_path / "run", "--profile", "paper", "--dry-run")]
    done = subprocess.run(command, check=False, timeout=PATIENCE_S, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(f"paper, digest {RunFolder(folder / 'paper-1').status['order_digest']}") == 1
    assert "with 2 processes" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_four_processes_are_near_one(tmp_path, alone):
    four = torchrun(prepare(tmp_path), 4)
    assert four[3]["mixed"]["loss"] == pytest.approx(alone["mixed"]["loss"], abs=1e-5)
    for run in RUNS:
        if run != "paper":
            assert four[0]["runs"][run] == pytest.approx(alone["runs"][run], abs=1e-5), run
