"""Every exception and warning the library raises, in one table.

A message has three parts: what happened (with the offending value), where (module, file, segment or field path), and what to do
about it, as code where possible. Each class is also a built-in exception, so that code written without knowledge of torchwrap
(`except MemoryError`, `except OSError`) still catches the right thing.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BudgetError",
    "ConfigError",
    "ConflictError",
    "CorruptDataError",
    "DiskFullError",
    "KernelError",
    "NotAppliedError",
    "PlanError",
    "StorageError",
    "TorchwrapError",
    "TorchwrapWarning",
    "UnsafePathError",
    "UnsupportedModelError",
    "WorkError",
]


class TorchwrapError(Exception):
    """Base of every error of this library.

    Args:
        what: what happened, with the offending value.
        where: module, file, segment or field path concerned.
        fix: what the user can do, as code where possible.
    """

    args: tuple[Any, ...]
    what: str
    where: str
    fix: str

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        message = f"{what} (at {where})" if where else what
        self.args = (f"{message}. {fix}" if fix else message,)  # Dynamo 2.13 cannot trace `super().__init__` of an exception

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are rebuilt from `args`, which holds the joined message: a copy in another process must not join twice.
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(cls: type[TorchwrapError], args: tuple[object, ...], state: dict[str, object]) -> TorchwrapError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(TorchwrapError, ValueError):
    """A field is out of range, unknown, or in the wrong unit."""


class UnsupportedModelError(TorchwrapError, TypeError):
    """The model lacks a part that a technique needs, or has one it cannot serve."""


class ConflictError(TorchwrapError, RuntimeError):
    """Two techniques, or a technique and a foreign mechanism, claim one module."""


class NotAppliedError(TorchwrapError, LookupError):
    """Something was to be removed or inspected that is not there."""


class PlanError(TorchwrapError, ValueError):
    """A plan file is malformed, newer than this library, or names an unknown technique; or what is to be planned fits nowhere."""


class BudgetError(TorchwrapError, MemoryError):
    """A memory budget cannot be met.

    Args:
        needed: the smallest budget that works, in bytes.
        available: what was given, in bytes.
        largest: fully qualified name of the largest item that has to fit.
    """

    needed: int
    available: int
    largest: str

    def __init__(
        self, what: str, *, needed: int, available: int, largest: str = "", where: str = "", fix: str = ""
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.needed, self.available, self.largest = needed, available, largest


class StorageError(TorchwrapError, OSError):
    """Reading or writing a spill store or a checkpoint failed."""


class DiskFullError(StorageError):
    """A folder cannot take what has to be written to it.

    Args:
        needed: bytes that have to be written.
        available: bytes free for this user.
    """

    needed: int
    available: int

    def __init__(self, what: str, *, needed: int, available: int, where: str = "", fix: str = "") -> None:
        super().__init__(what, where=where, fix=fix)
        self.needed, self.available = needed, available


class CorruptDataError(StorageError):
    """Stored bytes are not what was written: truncated, altered, stale, or of another file."""


class UnsafePathError(StorageError):
    """A path leaves its root, is a symbolic link, or belongs to or is writable by somebody else."""


class WorkError(TorchwrapError, RuntimeError):
    """Work handed to another thread or another process failed, or did not end in time."""


class KernelError(TorchwrapError, RuntimeError):
    """A kernel for an accelerator could not be compiled, loaded or launched."""


class TorchwrapWarning(UserWarning):
    """Something works, but not as well as the user may think; the message says what to do."""
