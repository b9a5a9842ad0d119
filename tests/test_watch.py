"""Is it said when a training goes wrong: a loss that explodes, boxes that collapse? And where do its metrics go?"""

import json
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from train_world import arguments, make_world

from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.ids import ImageEntry, ImageTable
from vlmx.cache_specs.reader import open_cache
from vlmx.data.mini.study import scene_keys
from vlmx.data.records import Question
from vlmx.errors import BackendError, DataError, RunError, UnknownNameError, UsageError
from vlmx.runs import RunFolder
from vlmx.train.checkpoints import read_record
from vlmx.train.command import train as train_command
from vlmx.train.meter import Alarm
from vlmx.train.settings import TrainConfig, WatchConfig
from vlmx.train.watch import CollapseAlarm, Seen, Watch, score

SQUARE = Geometry(mode="letterbox", height=224, width=224, fill=(0, 0, 0))
WATCH = ["watch.benchmarks=mini-ref,mini-count", "watch.limit=4"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = make_world(tmp_path_factory.mktemp("world"))
    known = ImageTable.open(root / "caches", "photos")
    ids = [known.id_of(f"{n}.jpg") for n in range(20)]
    entries = [ImageEntry(key=k, id=ids[n % 20], width=64, height=64) for n, k in enumerate(scene_keys("test"))]
    ImageTable.merge(root / "caches", "mini", entries)
    return root


@pytest.fixture(scope="module")
def plain(world):
    train_command(arguments(world, world / "plain"), standalone_mode=False)
    return RunFolder(world / "plain")


def losses(run):
    return {line["step"]: line["loss"] for line in run.metrics() if "loss" in line}


def test_metrics_of_a_step(plain):
    first, *_, last = plain.metrics()
    assert set(first) == {
        "step", "epoch", "loss", "lr", "grad_norm", "supervised_tokens", "tokens_per_s", "data_wait", "memory_bytes"
    }  # fmt: skip
    assert last["epoch"] == 1
    assert 1e7 < first["memory_bytes"] <= last["memory_bytes"]


def test_without_a_terminal_a_line_says_how_it_goes(world, tmp_path, capsys):
    train_command(arguments(world, tmp_path / "run", "max_steps=2"), standalone_mode=False)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train run")]
    assert "2/2 steps" in line
    for field in ("loss ", "lr ", "tokens/s ", "data wait ", "memory "):
        assert field in line


def alarm(losses, **config):
    found = Alarm(WatchConfig(**{"explode_factor": 5.0, "explode_steps": 3, **config}))
    for number, loss in enumerate(losses):
        found.check(number + 1, loss, [f"c{number + 1}", "c"])
    return found


def test_an_exploded_loss_stops_with_the_batch_where_it_began():
    with pytest.raises(RunError, match=r"step 103: .* above 5 x its median of 2 since step 101") as caught:
        alarm([2.0] * 100 + [11.0] * 3)
    assert caught.value.why == "the batch of step 101 was c101, c"
    assert "remove the checkpoints after step 100 and go on with --resume-anyway optim.lr=LOWER" in caught.value.fix


def test_what_is_no_explosion():
    alarm([2.0] * 100 + [11.0, 11.0, 2.0] * 20)  # single bad batches
    alarm([2.0] * 40 + [11.0] * 200)  # it was not known yet what is normal
    alarm([2.0] * 100 + [9.9] * 200)
    alarm([2.0] * 100 + [11.0] * 200, explode_factor=None)


def test_a_long_explosion_does_not_become_normal():
    with pytest.raises(RunError, match="since step 101"):
        alarm([2.0] * 100 + [11.0] * 90, explode_steps=90)


def test_a_resumed_training_knows_the_losses_before():
    resumed = Alarm(WatchConfig(explode_factor=5.0, explode_steps=1), alarm([2.0] * 100).losses)
    with pytest.raises(RunError, match="stopped at step 201"):
        resumed.check(201, 11.0, ["c"])


def test_an_exploded_training_has_failed(world, tmp_path):
    extra = [
        "epochs=40",
        "optim.connector_lr=1e-7",
        "watch.explode_factor=1.0001",
        "watch.explode_steps=1",
        "checkpoint.every_steps=0",
    ]
    with pytest.raises(RunError, match=r"above 1\.0001 x its median"):
        train_command(arguments(world, tmp_path / "run", *extra, "optim.lr=1e-7"), standalone_mode=False)
    run = RunFolder(tmp_path / "run")
    assert run.status["state"] == "failed"
    assert 100 < max(losses(run)) < 200


def question(number, *, box=None, answers=()):
    return Question(
        id=str(number),
        benchmark="b",
        image="i",
        prompt="?",
        kind="text" if box is None else "box",
        question_type="t",
        answers=answers,
        box=box,
        image_wh=(224, 224),
    )


def test_held_out_accuracy():
    left, right = (0.0, 0.0, 112.0, 224.0), (112.0, 0.0, 224.0, 224.0)
    questions = [question(0, box=left), question(1, box=right), question(2, box=right)]
    questions += [question(3, answers=("Two", "2")), question(4, answers=("red",))]
    texts = ["[0.0, 0.0, 0.5, 1.0]", "[0.0, 0.0, 0.5, 1.0]", "no box", "two.", "blue"]
    seen = score(questions, texts, SQUARE)
    assert (seen.boxes, seen.texts) == (3, 2)
    assert seen.box == pytest.approx(1 / 3)
    assert seen.box_chance == pytest.approx(1 / 6)  # of six wrong pairs, the second box fits the first question
    assert seen.text == 1 / 2
    assert seen.mean == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert seen.numbers == {"text_accuracy": seen.text, "box_accuracy": seen.box, "box_chance": seen.box_chance}


def test_nothing_is_said_about_questions_that_do_not_exist():
    asked = [question(0, answers=("red",)), question(1, box=(0.0, 0.0, 112.0, 224.0))]
    assert score(asked[:1], ["red"], SQUARE).numbers == {"text_accuracy": 1.0}
    assert score(asked[1:], ["[0.0, 0.0, 0.5, 1.0]"], SQUARE).numbers == {"box_accuracy": 1.0}


def seen(text, box):
    return Seen(text=text, texts=64, box=box, boxes=64, box_chance=0.05)


def test_the_collapse_alarm_says_once_what_helps():
    wide = Geometry(mode="letterbox", height=800, width=1333, fill=(0, 0, 0))
    found = CollapseAlarm(connector="mlp2", geometry=wide)
    said = [found.add(seen(text, 0.06)) for text in (0.2, 0.4, 0.5, 0.6)]
    assert [text is not None for text in said] == [False, False, True, False]
    assert "text answers went from 20% to 50%, but boxes are right in 6%, where guessing gives 5%" in said[2]
    assert "connector=mlp3 and a cache at --res 512" in said[2]


@pytest.mark.parametrize(
    ("texts", "boxes"),
    [
        ((0.2, 0.4, 0.5), (0.05, 0.1, 0.4)),  # boxes are learned
        ((0.2, 0.4, 0.5), (0.4, 0.3, 0.05)),  # they were
        ((0.5, 0.52, 0.5), (0.05, 0.05, 0.05)),  # nothing is learned
        ((0.2, 0.5), (0.05, 0.05)),  # too early to say
    ],
)
def test_the_collapse_alarm_is_silent(texts, boxes):
    found = CollapseAlarm(connector="mlp2", geometry=SQUARE)
    for text, box in zip(texts, boxes, strict=True):
        assert found.add(seen(text, box)) is None


def watch_of(world, **config):
    return Watch(TrainConfig(cache="vit-mini", watch=WatchConfig(**config)), open_cache("vit-mini", world / "caches"))


def looked(run, step, look):
    run.log(step=step, loss=1.0)
    run.log(step=step, **look.numbers)


def test_a_resumed_training_knows_the_looks_before(world, tmp_path):
    watch = watch_of(world, benchmarks="mini-ref,mini-count", limit=64)
    run = RunFolder.create(tmp_path / "run", kind="train", config={})
    assert watch.recall(run, 0) == []
    looked(run, 10, seen(0.2, 0.05))
    looked(run, 20, seen(0.4, 0.05))
    looked(run, 30, seen(0.6, 0.05))  # it is killed, and the checkpoint of step 20 is the newest
    assert watch.recall(run, 20) == [seen(0.2, 0.05), seen(0.4, 0.05)]
    resumed = CollapseAlarm(connector="mlp2", geometry=SQUARE)
    for look in watch.recall(run, 20):
        assert resumed.add(look) is None
    assert "text answers went from 20% to 60%" in resumed.add(seen(0.6, 0.05))


def test_looks_at_other_questions_do_not_count(world, tmp_path):
    run = RunFolder.create(tmp_path / "run", kind="train", config={})
    first, second = watch_of(world, benchmarks="mini-ref"), watch_of(world, benchmarks="mini-ref", limit=8)
    first.recall(run, 0)
    looked(run, 10, Seen(text=0.0, texts=0, box=0.5, boxes=64, box_chance=0.0))
    assert second.recall(run, 10) == []
    looked(run, 20, Seen(text=0.0, texts=0, box=0.25, boxes=8, box_chance=0.125))
    assert second.recall(run, 20) == [Seen(text=0.0, texts=0, box=0.25, boxes=8, box_chance=0.125)]
    assert second.recall(run, 5) == []  # the checkpoints after it were damaged
    looked(run, 10, Seen(text=0.0, texts=0, box=0.0, boxes=8, box_chance=0.0))
    assert run.status["held_out"]["since_step"] == 5


def test_watching_is_logged_and_changes_nothing(world, plain, capsys):
    train_command(arguments(world, world / "watched", *WATCH), standalone_mode=False)
    run = RunFolder(world / "watched")
    assert losses(run) == losses(plain)
    looks = [line for line in run.metrics() if "box_accuracy" in line]
    assert [line["step"] for line in looks] == [2, 4]
    assert set(looks[0]) == {"step", "text_accuracy", "box_accuracy", "box_chance"}
    mean = (looks[1]["text_accuracy"] + looks[1]["box_accuracy"]) / 2
    assert read_record(run.path / "checkpoints", 4).accuracy == mean
    assert "after step 2: text_accuracy" in capsys.readouterr().err


@pytest.mark.slow
def test_watching_in_two_processes(world, plain, tmp_path):
    main = str(Path(__file__).parent / "train_main.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", main]
    command = [*torchrun, *arguments(world, tmp_path / "run", *WATCH)]
    result = subprocess.run(command, check=False, timeout=300, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    run = RunFolder(tmp_path / "run")
    assert losses(run) == pytest.approx(losses(plain), abs=1e-5)
    assert [line["step"] for line in run.metrics() if "box_accuracy" in line] == [2, 4]


def test_what_cannot_be_watched_is_refused_before_anything_is_done(world, tmp_path):
    with pytest.raises(UsageError, match="would never be answered"):
        train_command(arguments(world, tmp_path / "run", *WATCH, "checkpoint.every_steps=0"), standalone_mode=False)
    with pytest.raises(UnknownNameError, match="did you mean 'mini-count'"):
        train_command(arguments(world, tmp_path / "run", "watch.benchmarks=mini-coun"), standalone_mode=False)
    pope = ["watch.benchmarks=pope", "watch.data_root=photos"]
    with pytest.raises(DataError, match="published data are missing below photos") as caught:
        train_command(arguments(world, tmp_path / "run", *pope), standalone_mode=False)
    assert caught.value.fix.endswith("give the folder that has them with watch.data_root=FOLDER")
    assert not (tmp_path / "run").exists()


def test_trackers_that_are_not_installed_are_named(world, tmp_path):
    missing = [name for name in ("tensorboard", "trackio", "wandb") if find_spec(name) is None]
    if not missing:
        pytest.skip("all trackers are installed")
    options = [text for name in missing for text in ("--log-to", name)]
    with pytest.raises(BackendError) as caught:
        train_command([*arguments(world, tmp_path / "run"), *options], standalone_mode=False)
    assert caught.value.fix.startswith(f"pip install {' '.join(missing)}")
    assert not (tmp_path / "run").exists()


def test_tensorboard(world, plain, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    train_command([*arguments(world, out), "--log-to", "tensorboard"], standalone_mode=False)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert logged == pytest.approx(losses(plain), abs=1e-6)
    assert json.loads((out / "status.json").read_text())["state"] == "done"


TRACKIO = """
calls = []
def init(**given):
    print("* banner")
    calls.append([given["name"], given["resume"]])
def log(numbers, step): calls[-1].append(step)
def finish(): print("* finished")
"""

WANDB = """
import os
from types import SimpleNamespace
class Error(Exception): pass
def setup(): return SimpleNamespace(settings=SimpleNamespace(mode=os.environ.get("WANDB_MODE", "online")))
def login(verify): raise Error("No API key configured.")
def init(**given):
    if given["name"] == "refused": raise Error("not yours")
    return SimpleNamespace(log=log, finish=finish)
def log(numbers, step):
    if step == 3: raise Error("it is gone")
def finish(): raise AssertionError("it takes nothing any more")
"""


@pytest.fixture
def tracker(tmp_path, monkeypatch):
    """Installs a module in the place of a tracker's."""

    def install(name, source):
        (tmp_path / "modules").mkdir()
        (tmp_path / "modules" / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path / "modules")
        monkeypatch.delitem(sys.modules, name, raising=False)
        return import_module(name)

    yield install
    for name in ("trackio", "wandb"):
        sys.modules.pop(name, None)


def test_runs_of_the_same_name_are_two_of_trackio(world, tmp_path, capsys, tracker):
    trackio = tracker("trackio", TRACKIO)
    for parent in ("p1", "p2"):
        out = tmp_path / parent / "x"
        train_command([*arguments(world, out, "max_steps=2"), "--log-to", "trackio"], standalone_mode=False)
        assert capsys.readouterr().out == f"{out}\n"
    shutil.rmtree(out / "model")
    RunFolder(out).set_status("failed")
    train_command(["--out", str(out), "--caches", str(world / "caches"), "--resume"], standalone_mode=False)
    first, second, resumed = trackio.calls
    assert first[0] != second[0]
    assert (first[0][:2], second[0][:2]) == ("x-", "x-")
    assert (first[1:], second[1:]) == (["never", 1, 2], ["never", 1, 2])
    assert resumed == [second[0], "allow"]


def test_wandb_without_a_login(world, tmp_path, monkeypatch, tracker):
    tracker("wandb", WANDB)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(BackendError, match="No API key configured") as caught:
        train_command([*arguments(world, tmp_path / "run"), "--log-to", "wandb"], standalone_mode=False)
    assert "`wandb login`, or WANDB_MODE=offline" in caught.value.fix
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(BackendError, match="not yours"):
        train_command([*arguments(world, tmp_path / "refused"), "--log-to", "wandb"], standalone_mode=False)


def test_a_tracker_that_fails_ends_no_training(world, plain, tmp_path, capsys, monkeypatch, tracker):
    tracker("wandb", WANDB)
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_command([*arguments(world, tmp_path / "run"), "--log-to", "wandb"], standalone_mode=False)
    assert losses(RunFolder(tmp_path / "run")) == losses(plain)
    said = [line for line in capsys.readouterr().err.splitlines() if "WandB" in line]
    assert said == ["warning: WandB takes no more metrics (it is gone): the training goes on without"]
