"""How does the whole product run on the embedded mini study?

    extract + probe (per encoder)  ->  train + eval + shuffled control (per encoder and connector)  ->  report

Every arrow is the command that a user would type; each chain of commands is one process with one thread, so that the
chains of a stage run side by side on the cores there are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click

from vlmx.console import format_seconds, note, show_error
from vlmx.errors import RunError, VlmxError

ENCODERS = ("vit-mini-scenes", "vmamba-mini-scenes")
CONNECTORS = ("mlp2", "mlp3")
_CHILD = "from vlmx.serve.demo import main; main()"


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Commands that one process runs one after another.

    Attributes:
        label: what the user sees in front of its progress lines.
        commands: argument lists, each beginning with the command's name.
    """

    label: str
    commands: Sequence[Sequence[str]]


def run_demo(folder: Path, *, encoders: Sequence[str], connectors: Sequence[str], quick: bool) -> Path:
    """Extract, probe, train, evaluate, report.

    Args:
        folder: receives `caches/`, `runs/` and `report.html`; finished parts found there are kept.
        encoders: names of mini backbones.
        connectors: names of connectors.
        quick: train for a few steps and answer few questions: shows that everything runs, not what it can do.

    Returns:
        Path of the report.

    Raises:
        UnknownNameError: there is no such encoder or connector; nothing was done.
        RunError: a command failed; its output is above, its name and exit code in the message.
    """
    from vlmx.extract.backbones import catalogue
    from vlmx.models.connectors import CONNECTORS

    for encoder in encoders:
        catalogue.row(encoder)
    for connector in connectors:
        CONNECTORS.get(connector)
    start = time.monotonic()
    caches, runs = folder / "caches", folder / "runs"
    note(f"vlmx demo: {len(encoders)} encoders x {len(connectors)} connectors on the embedded mini study")
    _run_stage("phase one: every photo through every encoder, once", [_encoder_chain(e, caches) for e in encoders])
    pairs = [(encoder, connector) for encoder in encoders for connector in connectors]
    chains = [
        _run_chain_of(encoder, connector, caches, runs / f"{encoder}-{connector}", quick)
        for encoder, connector in pairs
    ]
    _run_stage("phase two: connector and language model, from the cached tokens", chains)
    report = folder / "report.html"
    names = [str(runs / f"{encoder}-{connector}") for encoder, connector in pairs]
    run_chain([["report", *names, "--caches", str(caches), "-o", str(report)]])
    note(f"done in {format_seconds(time.monotonic() - start)}")
    return report


def _encoder_chain(encoder: str, caches: Path) -> Chain:
    extract = ["extract", "--backbone", encoder, "--data", "mini", "--out", str(caches), "--threads", "1"]
    return Chain(label=encoder, commands=[extract, ["probe", "--cache", encoder, "--caches", str(caches)]])


def _run_chain_of(encoder: str, connector: str, caches: Path, run: Path, quick: bool) -> Chain:
    shared = ["--caches", str(caches)]
    train = ["train", "--cache", encoder, *shared, "--config", "mini", "--connector", connector, "--out", str(run)]
    train += ["--resume", *(["max_steps=30"] if quick else [])]  # a finished run is left alone
    evaluate = ["eval", "--run", str(run), *shared, *(["--limit", "40"] if quick else [])]
    commands = [train, evaluate, [*evaluate, "--control", "shuffled"]]
    return Chain(label=f"{encoder} {connector}", commands=commands)


def main() -> None:
    """A child process: run the chain in the first argument and exit with the code of its error, if any."""
    try:
        run_chain(json.loads(sys.argv[1]))
    except VlmxError as error:
        show_error(error)
        sys.exit(error.exit_code)


def run_chain(commands: Sequence[Sequence[str]]) -> None:
    """Run commands in this process, so that the heavy libraries are imported once."""
    from vlmx.evaluate import command as evaluate
    from vlmx.evaluate.report import command as report
    from vlmx.extract import command as extract
    from vlmx.train import command as train

    table: dict[str, click.Command] = {
        "extract": extract.extract,
        "probe": evaluate.probe,
        "train": train.train,
        "eval": evaluate.evaluate,
        "report": report.report,
    }
    for name, *arguments in commands:
        table[name].main(args=list(arguments), prog_name=f"vlmx {name}", standalone_mode=False)


def _run_stage(title: str, chains: Sequence[Chain]) -> None:
    note(f"\n== {title}")
    workers = max(1, min(len(chains), os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        for chain, code in zip(chains, pool.map(_run_process, chains), strict=True):
            if code != 0:
                raise RunError(
                    f"the demo stopped at '{chain.label}'",
                    why=f"its process ended with exit code {code}; the lines beginning with [{chain.label}] say more",
                    fix="correct the cause and give `vlmx demo` again: what is finished is kept",
                )


def _run_process(chain: Chain) -> int:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, json.dumps(chain.commands)],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    with _OUTPUT_LOCK:
        note(f"[{chain.label}] started")
    for line in process.stdout:
        with _OUTPUT_LOCK:
            note(f"[{chain.label}] {line.rstrip()}")
    return process.wait()


_OUTPUT_LOCK = threading.Lock()
