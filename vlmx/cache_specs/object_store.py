"""How does vlmx talk to a bucket, and what do the bucket's errors mean to a user?

Object stores are reached with obstore (Rust's `object_store`), which takes credentials and endpoints from the usual
environment variables, and repeats failed requests with growing pauses.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from vlmx.errors import BackendError, CacheError

T = TypeVar("T")

FIRST_RETRIES = 4  # until it has answered once: a typing mistake in an endpoint should not take a minute to show
RETRIES = 10
RETRY_TIMEOUT_S = 180.0
REQUEST_TIMEOUT_S = 120.0

_VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL (stores other than Amazon's), "
    "AWS_SKIP_SIGNATURE=true (public buckets)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY",
}
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_CAUSES = re.compile(
    r"Connection refused|dns error[^\"\n]*|failed to lookup address[^\"\n]*|operation timed out"
    r"|invalid peer certificate[^\"\n]*|Network is unreachable|No route to host|connection closed[^\"\n]*"
)
_user_pid: int | None = None  # the process whose threads serve obstore; a forked child does not have them


class Bucket:
    """A bucket, or a web server, as all places in it share it. Any number of threads may use it.

    Args:
        scheme: "s3", "gs", "az", "http" or "https".
        name: of the bucket or container; host and port of a web server.
    """

    def __init__(self, scheme: str, name: str) -> None:
        _require_obstore()
        self.scheme = scheme
        self.url = f"{scheme}://{name}"
        self._patient = _store(scheme, name, RETRIES)
        self._hasty = _store(scheme, name, FIRST_RETRIES)
        self._answered = False

    @property
    def store(self) -> Any:
        """The store of obstore.

        Raises:
            BackendError: this process was forked from one that has used it.
        """
        global _user_pid
        if _user_pid is None:
            _user_pid = os.getpid()
        if _user_pid != os.getpid():
            raise BackendError(
                f"{self.url} cannot be reached from this process",
                why="it was forked from a process that has used object stores, and the network threads are not forked",
                fix="start worker processes with the start method 'spawn'; the loaders of vlmx use threads",
            )
        return self._patient if self._answered else self._hasty

    def ask(self, ask: Callable[[Any], T], *, writing: bool = False) -> T:
        """What `ask(store)` gives.

        Raises:
            FileNotFoundError: there is no such object.
            CacheError: no permission, no such bucket, or the store does not want the request.
            BackendError: it cannot be reached.
            AlreadyExistsError, PreconditionError: of obstore.exceptions; a condition of the request does not hold.
        """
        from obstore import exceptions

        store = self.store
        try:
            answer = ask(store)
        except FileNotFoundError as error:
            if writing or "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                raise self._no_bucket(error) from error
            self._answered = True
            raise FileNotFoundError(str(error).split(":", 1)[0]) from error
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
            self._answered = True
            raise
        except exceptions.BaseError as error:
            raise self._failed(error) from error
        self._answered = True
        return answer

    def _no_bucket(self, error: Exception) -> CacheError:
        return CacheError(
            f"there is no bucket {self.url}",
            why=_reason(error),
            fix=f"check its name, or make it, which vlmx does not; settings: {_VARIABLES.get(self.scheme, 'none')}",
        )

    def _failed(self, error: Exception) -> CacheError | BackendError:
        if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
            return self._no_bucket(error)
        if re.search(r"status code: 40[13]", str(error)):
            return CacheError(
                f"{self.url} refuses access",
                why=_reason(error),
                fix=f"check credentials and permissions; vlmx reads {_VARIABLES.get(self.scheme, 'no credentials')}",
            )
        if "Server returned non-2xx" in str(error):
            return CacheError(
                f"{self.url} did not do what was asked of it",
                why=_reason(error),
                fix=f"check the url and {_VARIABLES.get(self.scheme, 'what the server allows')}",
            )
        endpoint = next((f"{name} is {os.environ[name]}" for name in _ENDPOINTS if name in os.environ), "")
        return BackendError(
            f"{self.url} cannot be reached",
            why="; ".join(filter(None, (_reason(error), endpoint if self.scheme == "s3" else ""))),
            fix=f"check network, url and {_VARIABLES.get(self.scheme, 'server')}, and give the same command again",
        )


@cache
def bucket_of(scheme: str, name: str) -> Bucket:
    """The bucket, with one pool of connections for the whole process."""
    return Bucket(scheme, name)


def _store(scheme: str, name: str, retries: int) -> Any:
    from obstore import exceptions
    from obstore import store as stores

    retry: Any = {"max_retries": retries, "retry_timeout": timedelta(seconds=RETRY_TIMEOUT_S)}
    client: Any = {"timeout": timedelta(seconds=REQUEST_TIMEOUT_S), "allow_http": _plain_http(scheme, os.environ)}
    try:
        if scheme == "s3":
            return stores.S3Store(name, client_options=client, retry_config=retry)
        if scheme == "gs":
            return stores.GCSStore(name, client_options=client, retry_config=retry)
        if scheme == "az":
            return stores.AzureStore(name, client_options=client, retry_config=retry)
        return stores.HTTPStore.from_url(f"{scheme}://{name}", client_options=client, retry_config=retry)
    except (exceptions.BaseError, ValueError) as error:
        raise BackendError(
            f"{scheme}://{name} cannot be used",
            why=_reason(error),
            fix=f"check the url and the environment variables {_VARIABLES.get(scheme, '')}",
        ) from error


def _plain_http(scheme: str, environment: Mapping[str, str]) -> bool:
    """Whether requests may go without encryption: the user named such an endpoint."""
    if scheme == "s3":
        return any(environment.get(name, "").startswith("http://") for name in _ENDPOINTS)
    return scheme == "http"


def _reason(error: Exception) -> str:
    """What matters of obstore's long texts."""
    text = str(error)
    code = re.search(r"<Code>([^<]*)</Code>", text)
    message = re.search(r"<Message>([^<]*)</Message>", text)
    if code:
        return f"{code[1]}: {message[1].splitlines()[0]}" if message and message[1] else code[1]
    cause = _CAUSES.search(text)
    first = re.sub(r"\s+", " ", text.split("Debug source")[0]).strip()
    return f"{cause[0]} ({first[:160]})" if cause else first[:300]


def _require_obstore() -> None:
    try:
        import obstore  # noqa: F401
    except ImportError as error:
        raise BackendError(
            "caches on object stores need the package obstore",
            why=str(error),
            fix="pip install 'vlmx[remote]'",
        ) from error
