"""How does a published checkpoint get onto this machine: resumable, checked, and never by surprise when offline?

Files on the Hugging Face hub go through huggingface_hub into its cache. Others are fetched here: to `<file>.part`,
continued with a range request if the server still has the same file, renamed when all bytes have arrived.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmx.console import format_bytes, note, progress
from vlmx.errors import OutOfSpaceError, WeightsError
from vlmx.extract.weights.lookup import HubFile, hub_file
from vlmx.extract.weights.refusals import is_web_page
from vlmx.runs import space_error, sync_folder

if TYPE_CHECKING:
    from vlmx.extract.backbones.catalogue import BackboneRow

OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
TIMEOUT_S = 30.0
TRIES = 4  # after a connection that broke; each goes on where the last one ended
_CHUNK_BYTES = 1 << 20


def why_not(url: str) -> str:
    """Why no download is tried, or ""."""
    if not url:
        return "it is not published"
    if switched_on := [name for name in OFFLINE_SWITCHES if os.environ.get(name, "").upper() in _TRUE]:
        return f"offline mode ({switched_on[0]} is set)"
    if not url.startswith(("https://", "http://")):
        return f"{url} is no address to download from"
    return ""


_TRUE = ("1", "ON", "YES", "TRUE")


def download(row: BackboneRow, folder: Path) -> Path:
    """Fetch the published file of `row`: into the hub's cache if it is on the hub, else to `folder`.

    Raises:
        WeightsError: no connection, a status other than success, a web page instead of the file, or a short file.
        OutOfSpaceError: the disk is full; what has arrived is kept and a second call goes on from there.
    """
    note(f"the weights of {row.name} are not on this machine; downloading {row.url}")
    wanted = hub_file(row.url)
    return from_hub(wanted) if wanted else from_url(row.url, folder / row.file)


def from_hub(wanted: HubFile) -> Path:
    """Fetch a file with huggingface_hub, which shows progress, resumes, and honours its own settings and tokens."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    # The first base is the error of the HTTP library, which is another one in each version of huggingface_hub.
    errors: tuple[Any, ...] = (*HfHubHTTPError.__bases__, OSError, RuntimeError)

    try:
        return Path(hf_hub_download(wanted.repo, wanted.file, revision=wanted.revision))
    except errors as error:
        if isinstance(error, OSError) and (full := space_error(error, Path(wanted.file))) is not error:
            raise full from error
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise WeightsError(f"{wanted.repo} could not be read from the Hugging Face hub", why=reason) from error


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What the server said before the bytes.

    Attributes:
        start: the first byte that it sends.
        total_bytes: size of the whole file, or None if it does not say.
        validator: the ETag or date that must still hold when the download goes on later, or "".
    """

    start: int
    total_bytes: int | None
    validator: str


class _Broken(Exception):
    """The connection ended before the file."""


def from_url(url: str, path: Path) -> Path:
    """Fetch `url` to `path` through `<path>.part`.

    Raises:
        WeightsError, OutOfSpaceError: see `download`.
    """
    part = path.with_name(path.name + ".part")
    with _locked(path):
        if path.exists():  # another process was faster
            return path
        part.touch()
        try:
            _fetch_all(url, part)
        finally:
            if part.stat().st_size == 0:
                _forget(part)
        os.replace(part, path)
        _note_of(part).unlink(missing_ok=True)
    sync_folder(path.parent)
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Make the folder of `path`, and be the only process that downloads it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_name(f".{path.name}.lock").open("ab")
    except OSError as error:
        raise WeightsError(
            f"cannot write to {path.parent}", why=str(error), fix="let $VLMX_WEIGHTS name another folder"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_all(url: str, part: Path) -> None:
    for attempt in range(TRIES):
        before = part.stat().st_size
        try:
            return _fetch(url, part)
        except _Broken as error:
            arrived = part.stat().st_size
            if attempt == TRIES - 1 or arrived <= before:
                raise WeightsError(
                    f"the download of {url} broke off",
                    why=f"{error}; {arrived} bytes are kept in {part}",
                    fix="give the same command again, it goes on from there",
                ) from error
    raise AssertionError("unreachable")


def _fetch(url: str, part: Path) -> None:
    """Append what is missing to `part`, or write it anew if the server cannot continue."""
    have, validator = part.stat().st_size, _read_note(part, url)
    if not validator:
        have = 0
    headers = {"Accept-Encoding": "identity", "User-Agent": "vlmx"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and have:
                if error.headers.get("Content-Range") == f"bytes */{have}":
                    return None  # nothing is missing
                _forget(part)  # the part is no beginning of this file
                part.touch()
                return _fetch(url, part)
            raise WeightsError(f"{url} cannot be downloaded", why=f"HTTP status {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise WeightsError(f"{url} cannot be reached", why=f"no network, or the server is down: {reason}") from error
    with response:
        answer = _answer(response, url, have)
        _write_note(part, url, answer.validator)
        _receive(response, url, part, answer)
    return None


def _answer(response: Any, url: str, have: int) -> _Answer:
    headers = response.headers
    if headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise WeightsError(
            f"{url} is a web page, not weights", why="the server sent HTML", fix="open it in a browser, save the file"
        )
    etag = headers.get("ETag", "")
    length = headers.get("Content-Length", "")
    size = int(length) if length.isdigit() else None
    start = 0
    if response.status == http.client.PARTIAL_CONTENT:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if not found or int(found[1]) != have:
            raise WeightsError(f"{url} cannot be continued", why=f"asked from byte {have}, got {found and found[0]}")
        start = have
        size = int(found[2]) - have if found[2].isdigit() else size
    return _Answer(
        start=start,
        total_bytes=None if size is None else start + size,
        # A weak ETag does not promise the same bytes.
        validator=etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", ""),
    )


def _receive(response: http.client.HTTPResponse, url: str, part: Path, answer: _Answer) -> None:
    total = answer.total_bytes
    missing = 0 if total is None else total - answer.start
    free = shutil.disk_usage(part.parent).free
    if missing > free:
        raise OutOfSpaceError(
            f"no room for {part}",
            why=f"{format_bytes(missing)} are missing, {format_bytes(free)} are free",
            fix="free some space, or let $VLMX_WEIGHTS name a folder on another disk",
        )
    label = f"{part.stem} (from {format_bytes(answer.start)} on)" if answer.start else part.stem
    # unbuffered: what a full disk refuses would be written once more when the file is closed, and refused there
    with part.open("r+b", buffering=0) as file, progress(label, missing // 1000, "kB") as bar:
        file.truncate(answer.start)
        file.seek(answer.start)
        while chunk := _next_chunk(response):
            if file.tell() == 0 and is_web_page(chunk[:512]):
                raise WeightsError(f"{url} is a web page, not weights", fix="open it in a browser and save the file")
            rest = memoryview(chunk)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError as error:
                full = space_error(error, part)
                raise full if full is not error else WeightsError(f"cannot write {part}", why=str(error)) from error
            bar.advance((file.tell() - answer.start) // 1000 - bar.done)
        if total is not None and file.tell() != total:
            raise _Broken(f"{file.tell()} of {total} bytes arrived")
        os.fsync(file.fileno())


def _next_chunk(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(str(error) or type(error).__name__) from error


def _note_of(part: Path) -> Path:
    """Beside a partial file: what it is the beginning of."""
    return part.with_name(part.name + ".json")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note_of(part).unlink(missing_ok=True)


def _write_note(part: Path, url: str, validator: str) -> None:
    _note_of(part).write_text(json.dumps({"url": url, "validator": validator}), encoding="utf-8")


def _read_note(part: Path, url: str) -> str:
    """The validator of the partial file if it is of this address, else ""."""
    try:
        found = json.loads(_note_of(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(found.get("validator", "")) if isinstance(found, dict) and found.get("url") == url else ""
