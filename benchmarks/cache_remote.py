"""How fast are random reads from an object store, beside zarr-python? Run by `benchmarks/cache.py`, or alone.

    python benchmarks/cache_remote.py [--delay-ms 20] [--images 512]

fp16 tokens, 1024 x 384 an image, batches of 16 random images; each request takes 20 ms longer than it would. Once from
a real S3 server on this machine (SeaweedFS), and once from a web server that costs next to no processor time: servers
and readers share this machine's cores, and with the first the server is what limits a reader that has many requests in
flight. zarr-python reads the same objects through obstore, as its documentation says: image by image, and with
`oindex`; and as few people write it, with all images of a batch in flight (`asyncio.gather` of its internal arrays).
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from vlmx.cache_specs.geometry import Geometry
from vlmx.cache_specs.layout import ARRAY
from vlmx.cache_specs.loader import TokenLoader
from vlmx.cache_specs.object_store import bucket_of
from vlmx.cache_specs.places import place_of
from vlmx.cache_specs.reader import open_cache
from vlmx.cache_specs.spec import CacheSpec, TokenShape
from vlmx.cache_specs.writer import CacheWriter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from s3_server import BUCKET, running_server, slow_network

BATCH = 16
SLOTS = 128  # images of a shard
TURNS = 7
BATCHES_OF_LOADER = 12
GOAL = 3.0
SHAPE = TokenShape(grid=(32, 32), dim=384)
SPEC = CacheSpec(
    backbone="random-1024",
    weights_sha256="random:0",
    forward_version=1,
    feature="last",
    out_norm="none",
    geometry=Geometry(mode="letterbox", height=512, width=512, fill=(127, 127, 127)),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def remote(images: int = 512, delay_s: float = 0.02) -> dict[str, float]:
    """Print and give the ratios ours / zarr-python."""
    from obstore.store import HTTPStore, S3Store

    client: Any = {"allow_http": True}
    server = running_server()
    os.environ.update(server.environment())
    ids = [f"{number:064x}" for number in range(images)]
    url = fill(f"s3://{BUCKET}/benchmark", ids)
    with slow_network(server.endpoint, delay_s) as endpoint:
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        bucket_of.cache_clear()
        prefix = url.removeprefix(f"s3://{BUCKET}/")
        rates = measure(url, S3Store(BUCKET, prefix=prefix, client_options=client), ids)
    ratios = show(f"remote reads, S3 (SeaweedFS), {1000 * delay_s:.0f} ms a request", rates)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(fill(folder, ids))
        with web_server(Path(folder), delay_s) as address:
            rates = measure(f"{address}/{path.name}", HTTPStore(f"{address}/{path.name}", client_options=client), ids)
    return ratios | show(f"remote reads, web server, {1000 * delay_s:.0f} ms a request", rates)


def show(title: str, rates: dict[str, float]) -> dict[str, float]:
    print(f"\n{title}, {SHAPE.num_tokens} x {SHAPE.dim}")
    for way, rate in rates.items():
        print(f"  {way:44s} {rate:10,.0f} images/s")
    ratios = {}
    for way, goal in (
        ("zarr-python a[i]", GOAL),
        ("zarr-python oindex", GOAL),
        ("zarr-python, gathered by hand", None),
    ):
        ratio = ratios[f"{title}: ours / {way}"] = rates["ours"] / rates[way]
        verdict = "" if goal is None else f"   goal {goal}: {'met' if ratio >= goal else 'NOT met'}"
        print(f"  ours / {way} = {ratio:.1f}{verdict}")
    return ratios


def fill(root: str, ids: list[str]) -> str:
    """A cache of random tokens; its url or folder."""
    start = time.perf_counter()
    with CacheWriter(root, SPEC, SHAPE, slots=SLOTS) as writer:
        writer.plan(ids)
        while share := writer.next_share():
            for plan in share:
                dice = np.random.default_rng(plan.index)
                size = (len(plan.ids), SHAPE.num_tokens, SHAPE.dim)
                writer.commit(plan, dice.standard_normal(size, dtype=np.float32).astype(np.float16))
        writer.seal()
        place = writer.place
    print(f"{len(ids)} images written to {place} in {time.perf_counter() - start:.1f} s, no delay")
    return place.url


def measure(url: str, store: Any, ids: list[str]) -> dict[str, float]:
    """Images a second of each way, turn by turn."""
    import zarr
    from zarr.storage import ObjectStore

    array: Any = zarr.open_array(ObjectStore(store, read_only=True), path=ARRAY, mode="r")
    reader = open_cache(place_of(url))
    out_BND = np.empty((BATCH, SHAPE.num_tokens, SHAPE.dim), np.float16)
    dice = np.random.default_rng(0)
    reader.read(ids)  # the indices and checksums, as in the first epoch

    async def together(numbers: list[int]) -> Any:
        return await asyncio.gather(*(array._async_array.getitem((number,)) for number in numbers))

    def zarr_gather(numbers: list[int]) -> Any:
        from zarr.core.sync import sync

        return np.stack(sync(together(numbers)))

    ways: dict[str, Callable[[list[int]], Any]] = {
        "ours": lambda numbers: reader.read([ids[number] for number in numbers], out_BND),
        "zarr-python a[i]": lambda numbers: np.stack([array[number] for number in numbers]),
        "zarr-python oindex": lambda numbers: array.oindex[numbers],
        "zarr-python, gathered by hand": zarr_gather,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    ahead_s = []
    for _ in range(TURNS):
        for way, read in ways.items():
            numbers = dice.choice(len(ids), BATCH, replace=False).tolist()
            start = time.perf_counter()
            got = read(numbers)
            seconds[way].append(time.perf_counter() - start)
            assert np.array_equal(got, reader.read([ids[number] for number in numbers])), way
        chosen = [dice.choice(ids, BATCH, replace=False).tolist() for _ in range(BATCHES_OF_LOADER)]
        start = time.perf_counter()
        with TokenLoader(reader, chosen, threads=4, ahead=8) as loader:
            assert sum(1 for _ in loader) == BATCHES_OF_LOADER
        ahead_s.append(time.perf_counter() - start)
    rates = {way: BATCH / statistics.median(taken) for way, taken in seconds.items()}
    return {**rates, "ours, loader of 4 threads": BATCH * BATCHES_OF_LOADER / statistics.median(ahead_s)}


@contextmanager
def web_server(folder: Path, delay_s: float) -> Iterator[str]:
    """A url under which a process of its own serves the folder, slowly."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(folder, delay_s, there), daemon=True)
    process.start()
    yield f"http://127.0.0.1:{here.recv()}"
    process.terminate()
    process.join()


def _serve(folder: Path, delay_s: float, port: Any) -> None:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def do_GET(self, *, body: bool = True) -> None:
            time.sleep(delay_s)
            path = folder / unquote(self.path).lstrip("/")
            if not path.is_file():
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            size = path.stat().st_size
            found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            first, end = 0, size
            if found and found[1]:
                first, end = int(found[1]), min(int(found[2]) + 1, size)
            elif found:
                first = size - min(int(found[2]), size)
            self.send_response(206 if found else 200)
            self.send_header("Content-Length", str(end - first))
            self.send_header("Last-Modified", formatdate(usegmt=True))
            if found:
                self.send_header("Content-Range", f"bytes {first}-{end - 1}/{size}")
            self.end_headers()
            if body:
                self.wfile.flush()
                with open(path, "rb") as file:
                    while first < end:
                        first += os.sendfile(self.connection.fileno(), file.fileno(), first, end - first)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128
        disable_nagle_algorithm = True

    server = Server(("127.0.0.1", 0), Handler)
    port.send(server.server_port)
    server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay-ms", type=float, default=20.0)
    parser.add_argument("--images", type=int, default=512)
    options = parser.parse_args()
    remote(options.images, options.delay_ms / 1000)
