"""Train in processes that are killed at random instants and resumed until they come to the end, and compare.

    python tests/train_kill_main.py FOLDER ROUNDS SEED

A checkpoint is written after every second step, and only the newest is kept. Prints a JSON line: how many processes
were killed, and how many of these while a checkpoint was being written.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import torch
from train_world import arguments, make_world

import vlmx.train.loop  # noqa: F401  before the processes are forked, so that they need not import it
from vlmx.runs import RunFolder
from vlmx.train.checkpoints import saved_steps
from vlmx.train.command import train

EVERY = 2
OPTIONS = ("epochs=4", f"checkpoint.every_steps={EVERY}", "checkpoint.keep=1")


def begin(command: list[str], stderr: Path) -> int:
    """Train in a process of its own; gives its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        train(command, standalone_mode=False)
        code = 0
    finally:
        os._exit(code)


def begun(run: Path) -> list[int]:
    """Steps whose checkpoint is being written."""
    names = os.listdir(run / "checkpoints") if (run / "checkpoints").is_dir() else []
    return [int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d+)\.partial", name))]


def kill_somewhen(child: int, run: Path, dice: random.Random) -> bool:
    """Kill the process at a random instant, or as soon as a random checkpoint is half written; False: it has ended."""
    at_step, wait_s = dice.randrange(EVERY, 20, EVERY), dice.choice((0, 0, dice.uniform(0, 0.03)))
    patience_s = time.monotonic() + 60
    while at_step not in begun(run) and time.monotonic() < patience_s:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
    time.sleep(wait_s)
    os.kill(child, signal.SIGKILL)
    return True


def content(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.glob("model/**/*.safetensors")}


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in RunFolder(run).metrics()}


def main(folder: Path, rounds: int, seed: int) -> None:
    dice = random.Random(seed)
    torch.set_num_threads(1)
    world, stderr = make_world(folder), folder / "stderr"
    whole = folder / "whole"
    status = os.waitpid(begin([*arguments(world, whole), *OPTIONS], stderr), 0)[1]
    assert status == 0, stderr.read_text()[-3000:]
    killed = while_writing = 0
    for number in range(rounds):
        run, command = folder / f"run-{number}", [*arguments(world, folder / f"run-{number}"), *OPTIONS]
        while True:
            child = begin(command, stderr)
            if kill_somewhen(child, run, dice):
                os.waitpid(child, 0)
                killed += 1
            else:
                status = os.waitpid(child, 0)[1]
                assert status == 0, stderr.read_text()[-3000:]
                break
            newest = max(saved_steps(run / "checkpoints"), default=0)
            if begun(run):
                while_writing += 1
                assert max(begun(run)) - newest == EVERY, "more than the checkpoint in hand is lost"
            done = max(losses(run), default=0)
            assert done - newest <= 2 * EVERY, (done, newest)
            command = ["--out", str(run), "--resume"]
        assert losses(run) == losses(whole)
        assert content(run) == content(whole)
    print(json.dumps({"killed": killed, "while_writing": while_writing}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
