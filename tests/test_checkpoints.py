"""Is there always a whole checkpoint with what the training was: saved beside it, pruned, damaged, on a full disk?"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from full_disk import FullDisk
from tiny_llm import tiny_llm
from train_world import arguments, make_world

from vlmx.console import progress
from vlmx.errors import ConfigError, OutOfSpaceError
from vlmx.models.connectors import build_connector
from vlmx.models.vlm import VLM
from vlmx.runs import RunFolder
from vlmx.train.checkpoints import CheckpointCorruptError, read_record, read_weights, saved_steps
from vlmx.train.command import train as train_command
from vlmx.train.keeper import Keeper, best_steps
from vlmx.train.meter import Meter
from vlmx.train.parallel import World
from vlmx.train.settings import CheckpointConfig

ALONE = World(rank=0, size=1, device=torch.device("cpu"), distributed=False)


def new_model(seed=0, *, frozen=False):
    torch.manual_seed(seed)
    vlm = VLM(build_connector("mlp2", 6, 32), tiny_llm())
    vlm.llm.requires_grad_(not frozen)
    trained = [p for p in vlm.parameters() if p.requires_grad]
    return vlm, torch.optim.AdamW(trained, lr=0.1)


def change(vlm, optimizer):
    for parameter in vlm.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def state_of(vlm, optimizer):
    weights = {name: value.clone() for name, value in vlm.state_dict().items()}
    moments = {
        f"{number}.{name}": torch.as_tensor(value).clone()
        for number, moments in optimizer.state_dict()["state"].items()
        for name, value in moments.items()
    }
    return weights | moments


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def keeper(folder, **config):
    return Keeper(folder, CheckpointConfig(**{"keep": 9, **config}), {"connector": "mlp2"}, ALONE)


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints of steps 1, 2 and 3, and the state at each of them."""
    vlm, optimizer = new_model()
    states, keeping = {}, keeper(tmp_path)
    for step in (1, 2, 3):
        change(vlm, optimizer)
        states[step] = state_of(vlm, optimizer)
        keeping.save(step, vlm, optimizer, losses=[1.0 / step])
        change(vlm, optimizer)  # while it is being written
    keeping.close()
    return tmp_path, states


def test_a_checkpoint_is_the_state_when_it_was_saved(saved):
    folder, states = saved
    assert saved_steps(folder) == [1, 2, 3]
    vlm, optimizer = new_model(seed=1)
    record = keeper(folder).restore(vlm, optimizer)
    assert (record.step, record.losses, record.card) == (3, (1 / 3,), {"connector": "mlp2"})
    assert_equal(state_of(vlm, optimizer), states[3])
    assert_equal(read_weights(folder, 2), {name: states[2][name] for name in vlm.state_dict()})


def test_moments_are_the_checkpoints_and_settings_the_configurations(saved):
    folder, states = saved
    vlm, _ = new_model(seed=1)
    settings = {"lr": 0.3, "betas": (0.5, 0.6), "eps": 1e-4, "weight_decay": 0.7}
    optimizer = torch.optim.AdamW([{"params": list(vlm.parameters()), **settings}])
    keeper(folder).restore(vlm, optimizer)
    assert {key: optimizer.param_groups[0][key] for key in settings} == settings
    assert_equal(state_of(vlm, optimizer), states[3])


def test_frozen_weights_are_not_saved(tmp_path):
    vlm, optimizer = new_model(frozen=True)
    change(vlm, optimizer)
    keeping = keeper(tmp_path)
    keeping.save(1, vlm, optimizer, losses=[])
    keeping.close()
    assert all(name.startswith("connector.") for name in read_weights(tmp_path, 1))
    other, other_optimizer = new_model(seed=1, frozen=True)
    keeper(tmp_path).restore(other, other_optimizer)
    assert_equal(state_of(other, other_optimizer), state_of(vlm, optimizer))


@pytest.mark.parametrize("accuracies", [None, {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3, 5: 0.4}])
def test_the_newest_and_the_best_are_kept(tmp_path, accuracies):
    vlm, optimizer = new_model()
    keeping = keeper(tmp_path, keep=2, keep_best=1)
    for step, loss in {1: 3.0, 2: 2.0, 3: 1.0, 4: 4.0, 5: 5.0}.items():
        accuracy = accuracies[step] if accuracies else None
        keeping.save(step, vlm, optimizer, losses=[9.0, loss], accuracy=accuracy)
    keeping.close()
    best = 2 if accuracies else 3
    assert saved_steps(tmp_path) == [best, 4, 5]
    assert best_steps(tmp_path, [best, 4, 5])[0] == best
    assert read_record(tmp_path, best).accuracy == (0.9 if accuracies else None)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "checkpoint.json"])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(saved, capsys, name, damage):
    folder, states = saved
    damage(folder / "step-3" / name)
    vlm, optimizer = new_model(seed=1)
    assert keeper(folder).restore(vlm, optimizer).step == 2
    assert_equal(state_of(vlm, optimizer), states[2])
    said = capsys.readouterr().err
    assert "the checkpoint of step 3 is damaged" in said
    assert name in said
    assert saved_steps(folder) == [1, 2]
    assert (folder / "step-3.damaged").is_dir()


def test_no_whole_checkpoint_is_an_error(saved):
    folder, _ = saved
    for step in (1, 2, 3):
        (folder / f"step-{step}" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointCorruptError, match=r"all checkpoints in .* are damaged") as caught:
        keeper(folder).restore(*new_model())
    assert caught.value.exit_code == 7
    assert "step-1: __0_0.distcp: No such file" in caught.value.why
    assert saved_steps(folder) == [1, 2, 3]
    assert keeper(folder / "nothing").restore(*new_model()) is None


@pytest.mark.parametrize("size", [100, 30_000, 150_000])
def test_a_full_disk_leaves_the_last_one_and_the_next_one_is_tried(saved, capsys, size):
    folder, states = saved
    vlm, optimizer = new_model()
    change(vlm, optimizer)
    keeping = keeper(folder)
    with FullDisk(size):
        keeping.save(4, vlm, optimizer, losses=[])
        keeping._wait()
    assert (
        "warning: the checkpoint of step 4 could not be written: no space left; that of step 3 is kept"
        in capsys.readouterr().err
    )
    assert [child.name for child in sorted(folder.iterdir())] == ["step-1", "step-2", "step-3"]
    keeping.save(5, vlm, optimizer, losses=[])
    keeping.close(must_be_saved=True)
    assert saved_steps(folder) == [1, 2, 3, 5]
    again, again_optimizer = new_model(seed=1)
    shutil.rmtree(folder / "step-5")
    keeper(folder).restore(again, again_optimizer)
    assert_equal(state_of(again, again_optimizer), states[3])


def test_a_full_disk_is_an_error_where_the_checkpoint_is_needed(saved):
    folder, _ = saved
    keeping = keeper(folder)
    with FullDisk(1000):
        keeping.save(4, *new_model(), losses=[])
        with pytest.raises(OutOfSpaceError, match="the checkpoint of step 4") as caught:
            keeping.close(must_be_saved=True)
    assert "that of step 3 is kept" in caught.value.why


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def plain(world):
    """An uninterrupted run."""
    train_command(arguments(world, world / "plain"), standalone_mode=False)
    return RunFolder(world / "plain")


def losses(run):
    return {line["step"]: line["loss"] for line in run.metrics() if "loss" in line}


def unfinished(plain, folder):
    """A copy of a run as if it had been killed after its last checkpoint."""
    shutil.copytree(plain.path, folder)
    (folder / "model" / "model.json").unlink()
    RunFolder(folder).set_status("running")
    return folder


def test_a_training_goes_on_when_its_checkpoints_find_no_room(world, plain, tmp_path, capsys):
    model = (plain.path / "model" / "llm" / "model.safetensors").stat().st_size
    with FullDisk(2 * model):  # the moments make a checkpoint three times as large as the model
        train_command(arguments(world, tmp_path / "run"), standalone_mode=False)
    run = RunFolder(tmp_path / "run")
    assert losses(run) == losses(plain)
    assert run.status["state"] == "done"
    assert run.status["checkpoints_not_written"] == [2, 4]
    assert "the checkpoint of step 2 could not be written: no space left; there is none before" in (
        capsys.readouterr().err
    )


class Lines:
    """A tracker that writes to a file."""

    def __init__(self, path):
        self.path = path

    def log(self, step, numbers):
        with open(self.path, "a") as file:
            file.write(f"{step} {dict(numbers)}\n")

    def close(self):
        self.log(-1, {})


def test_metrics_that_find_no_room_do_not_end_a_training(tmp_path, capsys):
    run = RunFolder.create(tmp_path / "run", kind="train", config={})
    run.log(step=1, loss=3.0)
    size = (run.path / "metrics.jsonl").stat().st_size
    (tmp_path / "lines").write_text("x" * size)
    with progress("train", 3, "steps") as bar:
        meter = Meter(run, bar, [Lines(tmp_path / "lines")], log_every=1, steps_per_epoch=3, total_steps=3)
        with FullDisk(size):
            meter.log(2, loss=2.0)
            meter.log(3, loss=2.0)
        meter.log(4, loss=1.0)
        with FullDisk(size):
            meter.close()
    assert list(losses(run)) == [1, 4]
    assert meter.lines_lost == 2
    assert (tmp_path / "lines").read_text() == "x" * size
    said = capsys.readouterr().err
    assert said.count("no space left while writing") == 1
    assert "the metrics of step 2: the training goes on without" in said
    assert said.count("Lines takes no more metrics") == 1


def test_resuming_falls_back_to_a_whole_checkpoint(world, plain, tmp_path, capsys):
    out = unfinished(plain, tmp_path / "run")
    flip(out / "checkpoints" / "step-4" / "__0_0.distcp")
    train_command(["--out", str(out), "--resume"], standalone_mode=False)
    assert RunFolder(out).status["resumed_after_step"] == 2
    assert losses(RunFolder(out)) == losses(plain)
    assert "set aside as step-4.damaged" in capsys.readouterr().err


def test_another_configuration_is_refused_unless_insisted_on(world, plain, tmp_path, capsys):
    out = unfinished(plain, tmp_path / "run")
    again = ["--out", str(out), "--resume"]
    changes = ["optim.lr=5e-4", "micro_batch=2", "checkpoint.keep=1", "log_every=2"]
    with pytest.raises(ConfigError) as caught:
        train_command([*again, *changes], standalone_mode=False)
    assert caught.value.why == "micro_batch: 4, now 2; optim.lr: 0.001, now 0.0005"
    assert "--resume-anyway" in caught.value.fix
    with pytest.raises(ConfigError) as caught:
        train_command([*again, "--resume-anyway", *changes, "seed=8"], standalone_mode=False)
    assert "seed cannot change in a run" in caught.value.fix
    train_command([*again, "--resume-anyway", *changes], standalone_mode=False)
    status = RunFolder(out).status
    assert status["state"] == "done"
    assert status["changed_when_resumed"] == [{"micro_batch": [4, 2], "optim.lr": [0.001, 0.0005]}]
    assert "going on with another configuration" in capsys.readouterr().err
    assert saved_steps(out / "checkpoints") == [2, 4]  # nothing new was saved, so nothing was pruned


def test_what_has_no_influence_may_change(world, plain, tmp_path):
    out = unfinished(plain, tmp_path / "run")
    train_command(
        ["--out", str(out), "--resume", "checkpoint.keep=1", "checkpoint.every_steps=5"], standalone_mode=False
    )
    assert losses(RunFolder(out)) == losses(plain)
    assert saved_steps(out / "checkpoints") == [5]
    record = json.loads((out / "checkpoints" / "step-5" / "checkpoint.json").read_text())
    assert record["losses"] == list(losses(plain).values())


def test_what_was_counted_before_is_counted(world, tmp_path):
    cut = ["max_text_tokens=12", "watch.max_cut=1", "watch.max_unlearned=1"]
    train_command(arguments(world, tmp_path / "whole", *cut), standalone_mode=False)
    whole = RunFolder(tmp_path / "whole")
    assert whole.status["conversations_truncated"] == 40
    out = unfinished(whole, tmp_path / "run")
    train_command(["--out", str(out), "--resume"], standalone_mode=False)
    assert RunFolder(out).status["resumed_after_step"] == 4
    assert RunFolder(out).status["conversations_truncated"] == 40


@pytest.mark.parametrize("part", ["freeze_llm=true", "lora.r=2"])
def test_resuming_where_only_a_part_learns(world, tmp_path, part):
    train_command(arguments(world, tmp_path / "whole", part), standalone_mode=False)
    whole = RunFolder(tmp_path / "whole")
    out = unfinished(whole, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "step-4")
    train_command(["--out", str(out), "--resume"], standalone_mode=False)
    assert RunFolder(out).status["resumed_after_step"] == 2
    assert losses(RunFolder(out)) == losses(whole)
    for name in ("connector.safetensors", "llm/model.safetensors"):
        assert (out / "model" / name).read_bytes() == (whole.path / "model" / name).read_bytes()
    size = (out / "checkpoints" / "step-4" / "__0_0.distcp").stat().st_size
    assert size < 2 * (whole.path / "model" / "llm" / "model.safetensors").stat().st_size  # no moments of the LLM


@pytest.mark.parametrize("part", ["freeze_llm=true", "freeze_llm=false"])
def test_resuming_before_the_first_image(world, tmp_path, part):
    settings = [part, "seed=9", "checkpoint.every_steps=1", "checkpoint.keep=9"]
    train_command(arguments(world, tmp_path / "whole", *settings), standalone_mode=False)
    whole = RunFolder(tmp_path / "whole")
    out = unfinished(whole, tmp_path / "run")
    for step in (2, 3, 4, 5):
        shutil.rmtree(out / "checkpoints" / f"step-{step}")
    train_command(["--out", str(out), "--resume"], standalone_mode=False)
    assert RunFolder(out).status["resumed_after_step"] == 1
    assert losses(RunFolder(out)) == losses(whole)
    assert (out / "model/connector.safetensors").read_bytes() == (
        whole.path / "model/connector.safetensors"
    ).read_bytes()


def test_a_finished_run_is_not_the_result_of_another_configuration(world, plain, capsys):
    train_command(arguments(world, plain.path, "--resume"), standalone_mode=False)
    assert "is finished, there is nothing to resume" in capsys.readouterr().err
    with pytest.raises(ConfigError) as caught:
        train_command(arguments(world, plain.path, "--resume", "optim.lr=1"), standalone_mode=False)
    assert caught.value.why == "optim.lr: 0.001, now 1.0"
    assert caught.value.fix == "choose another --out, or remove it"


def test_dropout_goes_on_as_if_never_stopped(world, tmp_path):
    lora = ["lora.r=2", "lora.dropout=0.5"]
    train_command(arguments(world, tmp_path / "whole", *lora), standalone_mode=False)
    whole = RunFolder(tmp_path / "whole")
    train_command(arguments(world, tmp_path / "without", "lora.r=2"), standalone_mode=False)
    assert losses(RunFolder(tmp_path / "without")) != losses(whole)
    assert sum(line.startswith("dropout is on (lora.dropout=0.5)") for line in whole.status["notes"]) == 1
    out = unfinished(whole, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "step-4")
    train_command(["--out", str(out), "--resume"], standalone_mode=False)
    assert RunFolder(out).status["resumed_after_step"] == 2
    assert losses(RunFolder(out)) == losses(whole)
