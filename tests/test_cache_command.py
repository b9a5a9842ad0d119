"""What do the commands of `vlmx cache` print, delete, and return?"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from cache_samples import (
    BROKEN,
    GOOD,
    IDS,
    SHAPE,
    SLOTS,
    commit,
    content,
    flip,
    shard_path,
    spec_of,
    write,
)
from click.testing import CliRunner, Result
from s3_server import use_server

from vlmx.cache_specs.claims import WRITERS
from vlmx.cache_specs.command import cache as cache_command
from vlmx.cache_specs.ids import ImageEntry, ImageTable, image_id
from vlmx.cache_specs.layout import shard_key
from vlmx.cache_specs.manifest import MANIFEST
from vlmx.cache_specs.places import PARTIAL, place_of
from vlmx.cache_specs.reader import open_cache
from vlmx.cache_specs.rubbish import EARLIER_PARTIAL, delete, find_rubbish
from vlmx.cache_specs.writer import CacheWriter, Part
from vlmx.errors import CacheCorruptError, CacheError, UsageError
from vlmx.runs import RunFolder

NAME = spec_of().name


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "caches").parent


def run(root: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(cache_command, [*map(str, arguments), "--root", str(root)])


def printed(result: Result) -> Any:
    return json.loads(result.stdout)


def fails(result: Result, kind: type[CacheError]) -> CacheError:
    assert isinstance(result.exception, kind), result.output
    assert result.exception.exit_code == 5
    return result.exception


def test_ls(root: Path) -> None:
    write(root, dtype="int8", codec="blosc", stop_after=1)
    (root / f"{NAME[:-12]}0123456789ab").mkdir()
    shown = run(root, "ls")
    assert shown.exit_code == 0
    rows = [line.split() for line in shown.stdout.splitlines()]
    assert [NAME, "9", "1", "672", "B", "float16", "yes", "unknown"] in rows
    assert f"{NAME[:-12]}0123456789ab: it has no manifest.jsonl" in shown.stdout
    lines = {line["name"]: line for line in printed(run(root, "ls", "--json"))}
    assert len(lines) == 3
    assert (lines[NAME]["images"], lines[NAME]["sealed"], lines[NAME]["bytes"]) == (9, True, 672)
    assert "no cache below" in run(root / "nothing", "ls").output


def test_info(root: Path) -> None:
    write(root, dtype="int8")
    shown = run(root, "info", "vit-s-in21k@32x48-" + spec_of("int8").fingerprint[:6])
    for part in (
        "random:0 (untrained)",
        "6 (2 x 3) x 4 int8",
        "9 in 3 shards of 4",
        "letterbox",
        "8-bit error",
        "0 of 216 numbers clipped",
        f"undecodable {BROKEN}",
    ):
        assert part in shown.output
    found = printed(run(root, "info", NAME, "--json"))
    assert (found["images"], found["grid"], found["sealed"], found["error"]) == (9, [2, 3], True, None)
    assert found["runs"] == [{"shards": [[0, 2]], "command": "test"}]


def test_verify(root: Path) -> None:
    other = write(root, dtype="bfloat16")
    assert run(root, "verify", NAME, "--full").exit_code == 0
    assert run(root, "verify", "--all", "--full").exit_code == 0
    flip(shard_path(root / NAME, 0), 60)
    assert run(root, "verify", NAME).exit_code == 0
    damaged = run(root, "verify", "--all", "--full")
    assert "1 of 2 caches" in fails(damaged, CacheCorruptError).what
    assert f"image {IDS[1]} at byte 52" in damaged.stdout
    assert f"cache repair {root / NAME}" in fails(damaged, CacheCorruptError).fix
    rows = printed(run(root, "verify", NAME, str(other), "--full", "--json"))
    assert [row["ok"] for row in rows] == [False, True]
    (shard,) = rows[0]["damaged"]
    assert (shard["shard"], shard["file"]) == (0, shard_key(0))
    assert shard["images"] == [{"id": IDS[1], "offset": 52}]
    (other / MANIFEST).write_bytes(b"{}\n")
    unreadable = run(root, "verify", "--all")
    assert "manifest" in fails(unreadable, CacheCorruptError).why or other.name in fails(unreadable, CacheError).why
    assert [row["ok"] for row in printed(run(root, "verify", "--all", "--json"))] == [True, False]
    assert isinstance(run(root, "verify").exception, UsageError)
    assert isinstance(run(root, "verify", NAME, "--all").exception, UsageError)


def test_diff(tmp_path: Path, root: Path) -> None:
    colleague = write(tmp_path / "colleague")
    same = run(root, "diff", NAME, colleague)
    assert same.exit_code == 0
    assert "the same, to the last byte" in same.stdout
    write(colleague.parent, [*IDS, image_id(b"new")])
    other = run(root, "diff", NAME, colleague)
    assert "1 images are only in one of them" in fails(other, CacheError).why
    assert "not the same" in other.stdout
    found = printed(run(root, "diff", NAME, colleague, "--all", "--json"))
    assert found["only_second"] == [image_id(b"new")]
    assert found["distance"]["images"] == found["distance"]["identical"] == 9
    wider = write(root, dtype="float32")
    found = printed(run(root, "diff", NAME, wider, "--json"))
    assert found["spec"] == ["dtype: float16, not float32"]
    assert found["distance"]["identical"] == 0
    assert 0 < found["distance"]["relative"] < found["limit"] == 1e-3
    assert not found["alike"]


def test_gc_leaves_a_sound_cache_alone(root: Path) -> None:
    before = content(root)
    result = run(root, "gc", "--older-than", "0", "--delete")
    assert result.exit_code == 0
    assert "nothing can go" in result.output
    assert content(root) == before


def littered(root: Path) -> Path:
    """A cache of which a writer was killed, as one that is killed leaves it."""
    cache = root / NAME
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        writer = CacheWriter(root, spec_of(), SHAPE, slots=SLOTS, part=Part(index=0, count=2))
        (plan, *_) = writer.plan([*IDS, *(image_id(b"new %d" % number) for number in range(9))])
        commit(writer, plan)
        key = shard_key(9)
        writer.place.write(key, b"renamed, and then killed")
        (cache / PARTIAL).mkdir(exist_ok=True)
        (cache / PARTIAL / "host-1-0").write_bytes(b"half")
        (cache / ".manifest.jsonl.77.tmp").write_bytes(b"half")
        (cache / EARLIER_PARTIAL).write_bytes(b"half")
        os.write(told, b"x")
        time.sleep(60)
        os._exit(0)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    os.close(told)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return cache


LITTER = {PARTIAL, EARLIER_PARTIAL, WRITERS, ".manifest.jsonl.77.tmp", "tokens.zarr/tokens/c/9"}


def test_gc_removes_what_a_killed_writer_left_and_keeps_its_commits(root: Path) -> None:
    cache = littered(root)
    listed = run(root, "gc", "--older-than", "0")
    assert listed.exit_code == 0
    assert {item.key for item in find_rubbish(root, older_than_s=0).rubbish} == LITTER
    for key in LITTER:
        assert f"can go: {cache}/{key} (" in listed.stdout
        assert (cache / key).exists()
    assert "is not finished and nobody writes it: 14 images are stored" in listed.stdout
    found = printed(run(root, "gc", "--older-than", "0", "--delete", "--json"))
    assert {item["url"] for item in found["rubbish"] if item["deleted"]} == {f"{cache}/{key}" for key in LITTER}
    for key in LITTER:
        assert not (cache / key).exists()
    assert len(open_cache(cache, allow_partial=True)) == 13
    assert printed(run(root, "gc", "--older-than", "0", "--json"))["rubbish"] == []


def test_gc_looks_at_age(root: Path) -> None:
    cache = littered(root)
    found = find_rubbish(root, older_than_s=3600)
    assert (found.rubbish, found.young) == ((), 5)
    assert "5 more were changed less than 1 days ago" in run(root, "gc").output
    hours_ago = time.time() - 7200
    os.utime(cache / ".manifest.jsonl.77.tmp", (hours_ago, hours_ago))
    (old,) = find_rubbish(root, older_than_s=3600).rubbish
    assert old.key == ".manifest.jsonl.77.tmp"


def test_gc_does_not_touch_a_cache_that_somebody_writes(root: Path) -> None:
    cache = littered(root)
    items = find_rubbish(root, older_than_s=0).rubbish
    with CacheWriter(root, spec_of(), SHAPE) as writer:
        writer.place.write(shard_key(9), b"not yet committed")
        before = content(root)
        result = run(root, "gc", "--older-than", "0", "--delete")
        assert f"stays: {NAME} is being written by process {os.getpid()} on" in result.stdout
        assert not any(delete(item) for item in items)
        assert content(root) == before
    assert cache.exists()


def test_gc_does_not_delete_a_shard_that_was_committed_meanwhile(root: Path) -> None:
    new = [image_id(b"new %d" % number) for number in range(4)]
    with CacheWriter(root, spec_of(), SHAPE) as writer:
        writer.place.write(shard_key(3), b"not yet committed")
    (item,) = [item for item in find_rubbish(root, older_than_s=0).rubbish if item.kind == "shard"]
    write(root, [*IDS, *new])
    assert not delete(item)
    assert len(open_cache(root / NAME).read(new)) == 4


def test_gc_of_caches_without_any_shard_and_of_tables(root: Path) -> None:
    empty = write(root, dtype="float32", stop_after=0)
    never = root / f"{NAME[:-12]}0123456789ab"
    never.mkdir()
    (never / "writer.lock").write_bytes(b"")
    used, unused = (image_id(b"x"), GOOD[0]), image_id(b"y")
    ImageTable.merge(root, "used", [ImageEntry(key=str(i), id=id_, width=1, height=1) for i, id_ in enumerate(used)])
    ImageTable.merge(root, "unused", [ImageEntry(key="0", id=unused, width=1, height=1)])
    for name in ("used", "unused", "never"):
        (root / "datasets" / f"{name}.stamps.jsonl").write_text("")
    (root / "datasets" / "never.stamps.lock").write_text("")
    hours_ago = time.time() - 7200
    for path in (root / "datasets").iterdir():
        if path.name != "never.stamps.jsonl":
            os.utime(path, (hours_ago, hours_ago))
    old = {item.key for item in find_rubbish(root, older_than_s=3600).rubbish}
    assert old == {"datasets/unused.jsonl", "datasets/unused.stamps.jsonl"}  # somebody may be reading the other one
    found = {item.url for item in find_rubbish(root, older_than_s=0).rubbish}
    tables = {f"{root}/datasets/{name}.jsonl" for name in ("unused", "unused.stamps", "never.stamps")}
    tables.add(f"{root}/datasets/never.stamps.lock")
    assert found == {str(empty), str(never), *tables}
    assert run(root, "gc", "--older-than", "0", "--delete").exit_code == 0
    assert sorted(path.name for path in root.iterdir()) == sorted(["datasets", NAME])
    assert sorted(path.name for path in (root / "datasets").iterdir()) == [
        "used.jsonl",
        "used.stamps.jsonl",
        "writer.lock",
    ]


def test_gc_judges_no_table_while_a_cache_cannot_be_read(root: Path) -> None:
    lost = write(root, dtype="float32")
    (lost / MANIFEST).unlink()
    ImageTable.merge(root, "perhaps", [ImageEntry(key="0", id=image_id(b"y"), width=1, height=1)])
    found = find_rubbish(root, older_than_s=0)
    assert found.rubbish == ()
    assert {one.name for one in found.kept} == {lost.name, "datasets"}


def test_gc_names_caches_that_no_run_used(tmp_path: Path, root: Path) -> None:
    other = write(root, dtype="float32")
    runs = tmp_path / "runs"
    RunFolder.create(runs / "a", kind="train", config={"cache": NAME})
    RunFolder.create(runs / "b", kind="train", config={"cache": f"{NAME}+long-gone@1x1"})
    result = run(root, "gc", "--runs", runs, "--delete", "--older-than", "0")
    assert f"stays: {other.name} no run below {runs} was trained on it" in result.stdout
    assert f"stays: {NAME}" not in result.stdout
    assert other.exists()


def test_the_commands_on_an_object_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    root = use_server(monkeypatch).url(request.node.name)
    with CacheWriter(root, spec_of(), SHAPE, slots=SLOTS) as writer:
        for plan in writer.plan(IDS):
            commit(writer, plan)
        writer.seal()
    place = place_of(root).child(NAME)
    arguments = ("--root", root)
    (line,) = printed(CliRunner().invoke(cache_command, ["ls", "--json", *arguments]))
    assert (line["name"], line["images"], line["sealed"]) == (NAME, 9, True)
    same = CliRunner().invoke(cache_command, ["diff", place.url, str(write(tmp_path))])
    assert "the same, to the last byte" in same.stdout
    damaged = bytearray(place.read(shard_key(0)))
    damaged[60] ^= 1
    place.write(shard_key(0), bytes(damaged))
    place.write(shard_key(9), b"renamed, and then killed")
    (report,) = printed(CliRunner().invoke(cache_command, ["verify", NAME, "--full", "--json", *arguments]))
    assert report["damaged"][0]["images"] == [{"id": IDS[1], "offset": 52}]
    assert find_rubbish(root, older_than_s=3600).young == 1
    with CacheWriter(root, spec_of(), SHAPE):  # it has removed what was not committed
        place.write(shard_key(9), b"not yet committed")
        gc = CliRunner().invoke(cache_command, ["gc", "--older-than", "0", "--delete", *arguments])
        assert f"stays: {NAME} is being written by process {os.getpid()} on" in gc.stdout
    deleted = CliRunner().invoke(cache_command, ["gc", "--older-than", "0", "--delete", *arguments])
    assert f"deleted: {place}/tokens.zarr/tokens/c/9 (was never committed, 17 B)" in deleted.stdout
    assert place.size(shard_key(9)) is None
    assert place.size(shard_key(0)) is not None
