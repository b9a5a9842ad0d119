"""Do several processes, on one machine or on many, make the cache that one makes, whatever happens to them?"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from cache_samples import content
from PIL import Image, ImageDraw

from vlmx import cli
from vlmx.cache_specs.claims import GUARD, Part
from vlmx.cache_specs.manifest import SEAL, read_manifest
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.cache_specs.writer import CacheWriter
from vlmx.errors import UsageError
from vlmx.extract.backbones.base import build_backbone
from vlmx.extract.plan import spec_of
from vlmx.extract.slurm import job_array
from vlmx.extract.worker import Worker, worker_of
from vlmx.processes import Rank

RES = 256
PHOTOS = 48
SLOTS = 2  # images a shard: 24 shards
TIMEOUT_S = 120.0


class Study:
    """The photos, the cache that one process makes of them, and commands that make others.

    Attributes:
        photos: a folder.
        whole: the cache's folder.
        spec, shape: of the cache.
        started: the processes.
    """

    def __init__(self, folder: Path) -> None:
        self.started: list[subprocess.Popen[str]] = []
        self.photos = folder / "photos"
        self.photos.mkdir()
        for number in range(PHOTOS):
            photo = Image.new("RGB", (90, 60), (number * 7 % 256, number * 31 % 256, 90))
            ImageDraw.Draw(photo).ellipse((number % 40, 5, number % 40 + 30, 50), fill=(250, number % 256, 10))
            photo.save(self.photos / f"{number:02}.png")
        backbone = build_backbone("vit-mini-scenes", res=(RES, RES), weights="random:0")
        self.spec: CacheSpec = spec_of(backbone, "float16")
        self.shape = TokenShape(grid=backbone.grid, dim=backbone.dim)
        cli.main(self.arguments(self.prepare(folder / "whole")))
        self.whole = folder / "whole" / self.spec.name

    def prepare(self, root: Path) -> Path:
        """A folder of caches in which the cache is begun, with small shards, and empty."""
        CacheWriter(root, self.spec, self.shape, slots=SLOTS).close()
        return root

    def arguments(self, root: Path, *more: str) -> list[str]:
        place = ["--data", str(self.photos), "--out", str(root), "--threads", "1"]
        encoder = ["--backbone", "vit-mini-scenes", "--weights", "random:0", "--res", str(RES)]
        return ["extract", *encoder, *place, *more]

    def start(self, root: Path, *more: str, part: str = "", launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        launch = launcher or (sys.executable,)
        process = subprocess.Popen(
            [*launch, "-m", "vlmx", *self.arguments(root, *more)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **({"VLMX_PART": part} if part else {})},
        )
        self.started.append(process)
        return process

    def same(self, root: Path) -> bool:
        """Whether the cache in `root`, and the image table beside it, are those that one process makes."""
        table = Path("datasets") / "photos.jsonl"
        return (
            content(root / self.spec.name) == content(self.whole)
            and (root / table).read_bytes() == (self.whole.parent / table).read_bytes()
        )

    def committed(self, root: Path) -> int:
        """Shards that are committed."""
        return len(read_manifest(root / self.spec.name).shards)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    study = Study(tmp_path_factory.mktemp("many"))
    yield study
    for process in study.started:  # those of tests that failed
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout, stderr, once it has ended."""
    out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out, err


def children(process: subprocess.Popen[str]) -> list[int]:
    """Process numbers, in the order in which they were started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@contextmanager
def asleep(processes: Sequence[subprocess.Popen[str]], cache: Path) -> Iterator[None]:
    """While the block runs, they stand still, and none of them keeps others from looking."""
    while True:
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        with open(cache / GUARD) as guard:
            try:
                fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                for process in processes:
                    process.send_signal(signal.SIGCONT)
        time.sleep(0.05)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


def runs(root: Path, spec: CacheSpec) -> list[dict[str, object]]:
    lines = (root / spec.name / "provenance.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_process_alone() -> None:
    assert worker_of({}) == Worker(part=Part())
    assert worker_of({"RANK": "", "WORLD_SIZE": ""}) == Worker(part=Part())


def test_a_rank_of_torchrun_on_the_second_machine() -> None:
    worker = worker_of({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})
    assert worker == Worker(part=Part(index=5, count=8), rank=Rank(index=5, count=8, local=1, locals=4), speaks=False)
    assert worker_of({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}).speaks


@pytest.mark.parametrize("said", [{"RANK": "x"}, {"RANK": "4", "WORLD_SIZE": "4"}, {"LOCAL_RANK": "1"}])
def test_an_impossible_rank_is_refused(said: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="gives this process no place"):
        worker_of(said)


def test_a_task_of_a_batch_system_speaks_for_itself_and_waits_for_nobody() -> None:
    assert worker_of({"VLMX_PART": "3/16"}) == Worker(part=Part(index=3, count=16), stays=False)


def test_processes_of_a_task_divide_its_part() -> None:
    worker = worker_of({"VLMX_PART": "3/16", "VLMX_CHILD": '{"index": 1, "count": 4, "descriptor": 9}'})
    assert worker.part == Part(index=13, count=64)
    assert (worker.rank.local, worker.rank.locals, worker.speaks, worker.stays) == (1, 4, False, False)


@pytest.mark.parametrize("text", ["", "1", "4/4", "-1/4", "1/0", "a/b", "0/4 "])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="VLMX_PART"):
        worker_of({"VLMX_PART": text})


def test_a_killed_process_is_started_again_and_the_store_is_that_of_one(study: Study, tmp_path: Path) -> None:
    root = study.prepare(tmp_path)
    parent = study.start(root, "--nproc", "2")
    wait_until(lambda: study.committed(root) >= 2)
    os.kill(children(parent)[1], signal.SIGKILL)
    code, out, err = ended(parent)
    assert (code, out) == (0, study.spec.name + "\n"), err
    assert "process 1 of 2 was killed by SIGKILL; started again (1 of 3)" in err
    assert study.same(root)
    assert err.count("has random weights") == 2  # at the beginning and at the end, by one process
    assert re.search(r"encode vit-mini-scenes  (\d+)/\1 images", err)  # of those missing when the first process came
    assert err.count("encode vit-mini-scenes  ") < PHOTOS // 4  # one bar
    assert {str(run["part"]) for run in runs(root, study.spec)} <= {"0/2", "1/2"}  # the first may have done all of it


@pytest.mark.slow
def test_a_second_command_is_refused_while_the_first_works(study: Study, tmp_path: Path) -> None:
    root = study.prepare(tmp_path)
    first = study.start(root)
    wait_until(lambda: study.committed(root) >= 1)
    with asleep([first], root / study.spec.name):
        for more in ((), ("--nproc", "2")):
            code, _, err = ended(study.start(root, *more))
            assert code == 5
            assert err.count("error  another process is writing") == 1
            assert f"it is held by process {first.pid} on" in err
    assert ended(first)[0] == 0
    assert study.same(root)


def test_a_command_is_refused_while_several_processes_work(study: Study, tmp_path: Path) -> None:
    root = study.prepare(tmp_path)
    with CacheWriter(root, study.spec, study.shape, part=Part(index=1, count=2)):
        with pytest.raises(SystemExit) as stop:
            cli.main(study.arguments(root))
        assert stop.value.code == 5
    cli.main(study.arguments(root))
    assert study.same(root)


def test_an_error_that_all_processes_meet_is_told_once(tmp_path: Path) -> None:
    arguments = ["extract", "--backbone", "vit-mini-scenes", "--data", str(tmp_path / "nowhere"), "--nproc", "2"]
    command = subprocess.run([sys.executable, "-m", "vlmx", *arguments], capture_output=True, text=True)
    assert command.returncode == 3, command.stderr
    assert [line.split()[0] for line in command.stderr.splitlines()] == ["error", "why", "fix"]


def test_what_the_system_refuses_to_all_processes_is_told_once(study: Study, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, _, err = ended(study.start(tmp_path / "file" / "caches", "--nproc", "2"))
    assert (code, err.count("error ")) == (1, 1), err
    assert "the system does not let vlmx read or write there" in err


def test_processes_that_all_die_again_and_again_end_with_a_summary(study: Study, tmp_path: Path) -> None:
    parent = study.start(study.prepare(tmp_path), "--nproc", "2")
    while parent.poll() is None:
        with suppress(FileNotFoundError, ProcessLookupError):
            for pid in children(parent):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    code, out, err = ended(parent)
    assert (code, out) == (128 + signal.SIGKILL, "")
    assert err.count("started again") == 6
    assert "error  2 of 2 processes failed, and the cache is not complete\n" in err
    assert "why    process 0, 1: killed by SIGKILL, SIGKILL, SIGKILL, SIGKILL\n" in err


def test_nproc_within_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        cli.main(["extract", "--backbone", "vit-mini-scenes", "--nproc", "2"])
    assert stop.value.code == 2


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_several_processes_make_the_store_of_one(study: Study, tmp_path: Path, count: int) -> None:
    root = study.prepare(tmp_path)
    code, out, err = ended(study.start(root, "--nproc", str(count)))
    assert (code, out) == (0, study.spec.name + "\n"), err
    assert study.same(root)


@pytest.mark.slow
def test_ranks_of_torchrun_make_the_store_of_one(study: Study, tmp_path: Path) -> None:
    root = study.prepare(tmp_path)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    code, out, err = ended(study.start(root, launcher=torchrun))
    assert (code, out) == (0, study.spec.name + "\n"), err
    assert study.same(root)
    assert {run["part"] for run in runs(root, study.spec)} <= {"0/2", "1/2"}
    assert err.count("different images") == 1


@pytest.mark.slow
def test_all_killed_and_resumed_by_another_number(study: Study, tmp_path: Path) -> None:
    root = study.prepare(tmp_path)
    parent = study.start(root, "--nproc", "3")
    wait_until(lambda: study.committed(root) >= 3)
    killed = children(parent)
    for pid in (parent.pid, *killed):
        os.kill(pid, signal.SIGKILL)
    ended(parent)
    assert 3 <= study.committed(root) < PHOTOS // SLOTS
    assert not (root / study.spec.name / SEAL).exists()
    assert ended(study.start(root, "--nproc", "2"))[0] == 0
    assert study.same(root)


@pytest.mark.slow
def test_a_process_that_dies_again_and_again_is_left_to_the_others(study: Study, tmp_path: Path) -> None:
    root = study.prepare(tmp_path)
    parent = study.start(root, "--nproc", "2")
    wait_until(lambda: len(children(parent)) == 2)
    first = children(parent)[0]
    for _ in range(4):
        wait_until(lambda: any(pid != first for pid in children(parent)))
        victim = next(pid for pid in children(parent) if pid != first)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda gone=victim: gone not in children(parent))  # type: ignore[misc]
    code, out, err = ended(parent)
    assert (code, out) == (0, study.spec.name + "\n"), err
    assert "started again (3 of 3)" in err
    assert "killed by SIGKILL, SIGKILL, SIGKILL, SIGKILL" in err
    assert study.same(root)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_stops_all_and_the_next_command_goes_on(
    study: Study, tmp_path: Path, number: signal.Signals, expected: int
) -> None:
    root = study.prepare(tmp_path)
    parent = study.start(root, "--nproc", "2")
    wait_until(lambda: study.committed(root) >= 2)
    pids = children(parent)
    parent.send_signal(number)
    code, out, err = ended(parent)
    assert (code, out) == (expected, ""), err
    assert err.count(f"error  stopped by {number.name}") == 1
    assert not any(map(alive, pids))
    assert not (root / study.spec.name / SEAL).exists()
    assert ended(study.start(root))[0] == 0
    assert study.same(root)


@pytest.mark.slow
def test_children_stop_when_their_parent_is_killed(study: Study, tmp_path: Path) -> None:
    root = study.prepare(tmp_path)
    parent = study.start(root, "--nproc", "2")
    wait_until(lambda: study.committed(root) >= 1)
    pids = children(parent)
    parent.kill()
    wait_until(lambda: not any(map(alive, pids)))
    ended(parent)
    assert not (root / study.spec.name / SEAL).exists()
    assert not (root / study.spec.name / "partial").exists() or not list((root / study.spec.name / "partial").iterdir())


@pytest.mark.slow
def test_two_jobs_started_by_mistake_share_the_work(study: Study, tmp_path: Path) -> None:
    root = study.prepare(tmp_path)
    jobs = [study.start(root, "--nproc", "2") for _ in range(2)]
    for job in jobs:
        code, out, err = ended(job)
        assert (code, out) == (0, study.spec.name + "\n"), err
    assert study.same(root)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_stops_all_with_one_error(study: Study, small_disk: Path) -> None:
    root = study.prepare(small_disk)
    code, out, err = ended(study.start(root, "--nproc", "2", "--force"))
    assert (code, out) == (6, "")
    assert err.count("error ") == 1, err
    assert "error  no space left while writing" in err
    assert 0 < study.committed(root) < PHOTOS // SLOTS
    moved = small_disk.parent / "larger" / study.spec.name
    shutil.copytree(root / study.spec.name, moved)
    assert ended(study.start(moved.parent, "--nproc", "2"))[0] == 0
    assert study.same(moved.parent)


@pytest.mark.slow
def test_a_process_that_comes_later_takes_its_part(study: Study, tmp_path: Path) -> None:
    root = study.prepare(tmp_path)
    three = [study.start(root, part=f"{index}/3") for index in range(3)]
    wait_until(lambda: study.committed(root) >= 1)
    with asleep(three, root / study.spec.name):
        before = study.committed(root)
        code, out, err = ended(study.start(root, part="3/4"))
        assert (code, out) == (0, study.spec.name + "\n"), err
        assert "other processes are still at work" in err
        assert study.committed(root) > before
    for process in three:
        code, out, err = ended(process)
        assert (code, out) == (0, study.spec.name + "\n"), err
    assert study.same(root)
    assert {str(run["part"]) for run in runs(root, study.spec)} >= {"0/3", "3/4"}


@pytest.mark.slow
def test_the_tasks_of_a_job_array(study: Study, tmp_path: Path) -> None:
    root = study.prepare(tmp_path / "caches")
    script = tmp_path / "job.sh"
    printed = subprocess.run(
        [sys.executable, "-m", "vlmx", *study.arguments(root, "--slurm", "2")],
        capture_output=True,
        text=True,
        check=True,
    )
    script.write_text(printed.stdout)
    asked = tmp_path / "asked"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)

    def task(index: int) -> subprocess.Popen[str]:
        slurm = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": str(index)}
        return subprocess.Popen(
            ["bash", str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            env={**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        )

    tasks = [task(0), task(1)]
    wait_until(lambda: study.committed(root) >= 2)
    tasks[1].send_signal(signal.SIGUSR1)  # its time is nearly over
    code, out, err = ended(tasks[1])
    assert code == 0, err
    assert "stopped by SIGTERM" in err
    assert asked.read_text() == "requeue 77_1\n"
    code, out, err = ended(tasks[0])  # nobody else is there, and so it does everything
    assert (code, out) == (0, study.spec.name + "\n"), err
    assert study.same(root)
    assert ended(task(1))[0] == 0
    assert asked.read_text() == "requeue 77_1\n"
    assert study.same(root)


def test_the_script_holds_the_command_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "it's here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for given in (["--slurm", "4", "--data", "a b"], ["--data", "a b", "--slurm=4"], ["--data", "a b", "--slurm"]):
        script = job_array(given, 4)
        assert "-m vlmx extract --data 'a b' &\n" in script
        assert "#SBATCH --array=0-3\n" in script
        assert 'export VLMX_PART="$SLURM_ARRAY_TASK_ID/4"\n' in script
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "cd '" in script
