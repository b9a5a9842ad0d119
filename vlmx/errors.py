"""What can go wrong, in one tree: every error says what happened, why, and how to fix it, and has an exit code.

| exit code | class | meaning |
| --- | --- | --- |
| 1 | VlmxError | anything else that vlmx reports on purpose |
| 2 | UsageError, UnknownNameError, ConfigError | the command, a name or a configuration is wrong; nothing was done |
| 3 | DataError | images or annotations are missing or unreadable |
| 4 | WeightsError | weights are missing, damaged or of another model |
| 5 | CacheError, CacheCorruptError, SpecMismatchError | a cache is missing, damaged or made with another spec |
| 6 | OutOfSpaceError | a disk is full; what was committed before is intact |
| 7 | RunError | a run folder is missing, is not one, or its training cannot go on |
| 8 | BackendError | a library or device that was asked for is not usable here |
"""

from __future__ import annotations


class VlmxError(Exception):
    """Base of all errors that a user can act on.

    Args:
        what: one sentence, what happened (no trailing period).
        why: the cause, with the values that matter.
        fix: the next thing to type or change.
    """

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return "; ".join(part for part in (self.what, self.why, self.fix) if part)


def of_system(error: OSError) -> VlmxError:
    """What the operating system refused, as an error for users."""
    return VlmxError(
        f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""),
        why="the system does not let vlmx read or write there",
        fix="check the path, its permissions and its disk",
    )


class UsageError(VlmxError):
    """The command line asks for something that cannot be done."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that no registry knows."""


class ConfigError(VlmxError):
    """A configuration file or override is invalid; all problems are in `why`."""

    exit_code = 2


class DataError(VlmxError):
    """Images or annotations are missing or unreadable."""

    exit_code = 3


class WeightsError(VlmxError):
    """A weights file is missing, damaged, or belongs to another model."""

    exit_code = 4


class CacheError(VlmxError):
    """A cache is missing, incomplete, or lacks what was asked of it."""

    exit_code = 5


class CacheCorruptError(CacheError):
    """Bytes of a cache are not what was written."""


class SpecMismatchError(CacheError):
    """A cache was made with another spec than the one in use."""


class OutOfSpaceError(VlmxError):
    """The disk is full; everything committed before is intact."""

    exit_code = 6


class RunError(VlmxError):
    """A run folder is missing, is not one, or cannot go on."""

    exit_code = 7


class BackendError(VlmxError):
    """A library or a device that was asked for is not usable on this machine."""

    exit_code = 8
