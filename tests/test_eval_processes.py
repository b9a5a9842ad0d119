"""Do processes that are killed, run out of disk, or work side by side leave the same answers.jsonl, byte for byte?"""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmark_files import make_data_root
from eval_world import extract_images, source_of, train_run, write_llm

from vlmx import cli
from vlmx.data.benchmarks import BENCHMARKS, load_benchmark
from vlmx.errors import UsageError
from vlmx.evaluate.answers import PARTS, answers_path, read_answers
from vlmx.evaluate.command import evaluate, score
from vlmx.runs import RunFolder

BENCH = ("gqa", "pope", "vizwiz")
OUT_OF_SPACE = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    root = make_data_root(folder / "data")
    sources = {
        BENCHMARKS.get(name).table: [question.image for question in load_benchmark(name, root=root)] for name in BENCH
    }
    extract_images(folder / "caches", [source_of(table, root, keys) for table, keys in sources.items()])
    train_run(folder / "run", folder / "caches", "pope", llm=write_llm(folder / "llm"))
    return folder


def arguments(world: Path, *options: str) -> list[str]:
    """Of `vlmx eval`, one question a group."""
    given = ["-r", world / "run", "--data-root", world / "data", "--caches", world / "caches"]
    return ["eval", *map(str, given), "--bench", ",".join(BENCH), "--batch-size", "1", *options]


def fork(world: Path, *options: str, full_at: int | None = None) -> int:
    """`vlmx eval` in a process that has all libraries already; gives its id."""
    child = os.fork()
    if child:
        return child
    with open(world / "out", "w") as out, open(world / "err", "w") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    if full_at is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (full_at, full_at))
    code: object = 0
    try:
        cli.main(arguments(world, *options))
    except SystemExit as done:
        code = done.code
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def end(child: int, world: Path, code: int = 0) -> str:
    """What a forked process has printed."""
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code, (world / "err").read_text()[-3000:]
    return (world / "out").read_text()


def launch(world: Path, *options: str, torchrun: int = 0) -> subprocess.Popen[str]:
    """`vlmx eval` as a user starts it."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(torchrun), "--master-port", "0"]
    command = [sys.executable, *(launcher if torchrun else []), "-m", "vlmx", *arguments(world, *options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def content(world: Path) -> dict[str, bytes]:
    """All that an evaluation leaves behind, but for its lock."""
    folder = world / "run" / "eval"
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".answers.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def forget(world: Path) -> None:
    shutil.rmtree(world / "run" / "eval", ignore_errors=True)


@pytest.fixture(scope="module")
def whole(world: Path) -> dict[str, bytes]:
    """What an uninterrupted evaluation leaves."""
    out = end(fork(world), world)
    assert all(name in out for name in BENCH)
    found = content(world)
    assert sorted(found) == sorted(f"{name}/{file}" for name in BENCH for file in ("answers.jsonl", "scores.json"))
    return found


def answered(world: Path, name: str) -> int:
    parts = list((world / "run/eval" / name / PARTS).glob("*/*.jsonl"))
    return sum(path.read_bytes().count(b"\n") - 1 for path in parts if path.exists())


@pytest.mark.parametrize(("name", "answers"), [("gqa", 0), ("pope", 1), ("vizwiz", 2)])
def test_killed_and_run_again(world: Path, whole: dict[str, bytes], name: str, answers: int) -> None:
    """Killed when so many answers to a benchmark are there, and in the middle of a line."""
    forget(world)
    child = fork(world)
    while not (world / "run/eval" / name).exists() or answered(world, name) < answers:
        if (world / "run/eval" / name / "answers.jsonl").exists():
            break
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for part in (world / "run/eval" / name / PARTS).glob("*/*.jsonl"):
        part.write_bytes(part.read_bytes()[: -random.Random(answers).randrange(1, 30)])
    assert end(fork(world), world).count("95 % interval") == 1
    assert content(world) == whole


def test_a_full_disk(world: Path, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    forget(world)
    end(fork(world, full_at=len(whole["gqa/answers.jsonl"]) - 200), world, OUT_OF_SPACE)
    assert "no space left while writing" in (world / "err").read_text()
    header, answers = read_answers(answers_path(RunFolder(world / "run"), "gqa", "none"))
    assert 0 < len(answers) < header.to_ask
    score.main([str(world / "run")], standalone_mode=False)  # what there is can be scored, and is marked
    assert f"({header.to_ask - len(answers)} not answered yet)" in capsys.readouterr().out
    end(fork(world), world)
    assert content(world) == whole


def test_processes_side_by_side(world: Path, whole: dict[str, bytes]) -> None:
    forget(world)
    process = launch(world, "--nproc", "2")
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    assert content(world) == whole
    assert out.count("95 % interval") == 1
    assert len(re.findall(r"eval gqa .*\b(\d+)/\1 questions", err)) == 1  # one of them shows how far it is
    assert end(fork(world), world).count("95 % interval") == 1  # nothing is left to do


@pytest.mark.slow
def test_torchrun(world: Path, whole: dict[str, bytes]) -> None:
    forget(world)
    process = launch(world, torchrun=2)
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    assert content(world) == whole
    assert out.count("95 % interval") == 1


def test_nproc_within_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="torchrun has started 2 processes already"):
        evaluate.main(["--run", "any", "--nproc", "2"], standalone_mode=False)


@pytest.mark.slow
def test_one_of_several_is_killed(world: Path, whole: dict[str, bytes]) -> None:
    """The other one goes on to its end, the command says who died, and the next one does the rest."""
    forget(world)
    process = launch(world, "--nproc", "2")
    victim = next(child for child in children_at_work(process, world) if "RANK=1" in environment_of(child))
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == 7, err[-3000:]
    assert "1 of 2 processes came to no end" in err
    assert "process 1: killed by SIGKILL" in err
    parts = (world / "run/eval").glob("*/answers.parts/*/0-of-2.jsonl")
    assert sum(path.read_bytes().count(b"\n") - 1 for path in parts) > 0
    end(fork(world), world)
    assert content(world) == whole


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_processes_end_with_the_one_that_started_them(
    world: Path, whole: dict[str, bytes], number: signal.Signals, code: int
) -> None:
    forget(world)
    process = launch(world, "--nproc", "2")
    children = children_at_work(process, world)
    process.send_signal(number)
    assert process.wait() == code
    while any(map(is_alive, children)):
        time.sleep(0.01)
    end(fork(world), world)
    assert content(world) == whole


def children_at_work(process: subprocess.Popen[str], world: Path) -> list[int]:
    """The processes that one has started, once both have taken their share."""
    while not all(any((world / "run/eval/gqa" / PARTS).glob(f"*/{i}-of-2.jsonl")) for i in range(2)):
        assert process.poll() is None
        time.sleep(0.001)
    return children_of(process.pid)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environment_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


def is_alive(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] not in "ZX"
