"""Processes that tests of object stores start and kill; the first argument says which, the others are its own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from cache_samples import IDS, SHAPE, SLOTS, commit, spec_of

from vlmx.cache_specs.leases import LeaseClaims
from vlmx.cache_specs.object_place import ObjectPlace
from vlmx.cache_specs.reader import open_cache
from vlmx.cache_specs.writer import CacheWriter, Part
from vlmx.errors import VlmxError

MB = 1 << 20


class Process:
    """One of these processes; killed at the end if need be."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, __file__, *map(str, arguments)]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.popen.kill()
        self.popen.wait()

    def hear(self) -> str:
        return _of(self.popen.stdout).readline().strip()

    def ask(self) -> str:
        _of(self.popen.stdin).write("\n")
        _of(self.popen.stdin).flush()
        return self.hear()

    def send(self, number: int) -> None:
        self.popen.send_signal(number)


def _of(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def say(word: str) -> None:
    print(word, flush=True)


def upload(url: str, megabytes: str, pause_s: str) -> None:
    """Stream an object, say "half" on the way, and then how much memory that took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def parts() -> Iterator[bytes]:
        for number in range(int(megabytes)):
            if number == int(megabytes) // 2:
                say("half")
                time.sleep(float(pause_s))
            yield bytes([number % 251]) * MB

    ObjectPlace(url).write_stream("large", parts())
    say(str((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024))


def hold(url: str, renew_s: str, stale_s: str) -> None:
    """Take share 0; then ask, whenever a line comes in, whether it is still there."""
    claims = LeaseClaims(ObjectPlace(url), renew_s=float(renew_s), stale_s=float(stale_s))
    with claims.guard():
        say("taken" if claims.take(0) else f"refused: {claims.others()[0]}")
    for _ in sys.stdin:
        try:
            claims.still_mine()
            say("mine")
        except VlmxError as error:
            say(f"lost: {error.what}")
    claims.close()


def write(url: str, index: str, count: str, pause_s: str) -> None:
    """Fill the sample cache as one of several processes; say "committed" after each shard."""
    try:
        with CacheWriter(url, spec_of(), SHAPE, slots=SLOTS, part=Part(index=int(index), count=int(count))) as writer:
            plans = writer.plan(IDS)
            writer.begin_run({"command": "test"}, plans)
            say("begun")
            while share := writer.next_share():
                for plan in share:
                    commit(writer, plan)
                    say("committed")
                    time.sleep(float(pause_s))
            say("sealed" if writer.seal() else "left to others")
    except VlmxError as error:
        say(f"refused: {error}")


def fork_and_read(url: str) -> None:
    """What a forked child is told."""
    place = ObjectPlace(url)
    place.names()
    child = os.fork()
    if child == 0:
        try:
            place.names()
        except VlmxError as error:
            say(str(error))
        os._exit(0)
    os.waitpid(child, 0)


def pull(url: str, folder: str, seconds: str) -> None:
    """Read all images with copies of shards in `folder`, until all are there or time is up."""
    from vlmx.cache_specs.pull import pull_through

    source = open_cache(pull_through(ObjectPlace(url), folder))
    ids = sorted(source.ids)
    first_BND = source.read(ids)
    deadline = time.monotonic() + float(seconds)
    while len(list(Path(folder).glob("*/*.shard"))) < 3 and time.monotonic() < deadline:
        assert np.array_equal(source.read(ids), first_BND)
        time.sleep(0.02)
    assert np.array_equal(source.read(ids), first_BND)
    say("read")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
