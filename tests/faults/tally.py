"""Counting what became of the injected faults, and the judgement that does the counting.

A fault ends in one of five ways: the result is right all the same (*survived*), a typed error said what happened (*detected*), an
error of no class of ours came out (*untyped*), a number was wrong without a word (*silent wrong*), or bytes that belong to the user
changed (*data lost*). The last three fail the test that saw them, and are counted so that a report cannot leave them out.

Processes of one run (pytest-xdist starts several) add their counts to one JSON file under a lock; a file of an earlier run is replaced.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from torchwrap.core.errors import TorchwrapError

__all__ = ["COUNTS", "Faults", "Tally", "add_to_report", "same", "summary_line"]

COUNTS = ("injected", "survived", "detected", "untyped", "silent_wrong", "data_lost")
"""Names of the counts, in the order of the summary."""

Tally = Counter[str]


def leaves(output: Any) -> list[torch.Tensor]:
    """All tensors of a model's output, in order."""
    return [leaf for leaf in tree_leaves(getattr(output, "to_tuple", lambda: output)()) if torch.is_tensor(leaf)]


def same(one: Any, other: Any) -> bool:
    """Whether two outputs hold bit-identical tensors; no tensor at all is no output."""
    left, right = leaves(one), leaves(other)
    return len(left) == len(right) > 0 and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Faults:
    """Judges the actions of one test while a fault is there; every judgement is one injected fault.

    Args:
        tally: where outcomes are counted.
    """

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def count(self, outcome: str) -> None:
        """Note one outcome."""
        self._tally[outcome] += 1

    def survived(self, action: Callable[[], Any], expected: Any) -> Any:
        """The action must give the right result in spite of the fault."""
        return self.judged(action, expected)[0]

    def detected(self, action: Callable[[], Any], *kinds: type[BaseException], says: Iterable[object] = ()) -> Any:
        """The action must raise one of `kinds` (ours, or torch's own where the unwrapped model raises it too), naming all of `says`."""
        _, error = self.judged(action, None, *kinds, says=says)
        assert error is not None
        return error

    def judged(
        self, action: Callable[[], Any], expected: Any, *kinds: type[BaseException], says: Iterable[object] = ()
    ) -> tuple[Any, BaseException | None]:
        """The action must give the right result or raise one of `kinds`; (result, None) or (None, error).

        `expected` may be a predicate of the result; `None` means that no result is right.
        """
        self.count("injected")
        try:
            result = action()
        except BaseException as error:
            if not kinds or not isinstance(error, kinds):
                self.count("detected" if isinstance(error, TorchwrapError) else "untyped")
                raise
            self.count("detected")
            missing = [value for value in says if str(value) not in str(error)]
            assert not missing, f"{missing} not in the message: {error}"
            return None, error.with_traceback(None)  # frames would keep the model alive
        right = expected is not None and (expected(result) if callable(expected) else same(result, expected))
        self.count("survived" if right else "silent_wrong")
        assert right, "a wrong result without an error" if expected is not None else "no error, although no result is right"
        return result, None

    @contextmanager
    def intact(self, *paths: Path) -> Iterator[None]:
        """The user's files must hold the same bytes after the block as before it."""
        before = _digests(paths)
        try:
            yield
        finally:
            lost = [name for name, digest in before.items() if _digests([Path(name)]).get(name) != digest]
            for _ in lost:
                self.count("data_lost")
            assert not lost, f"changed or gone: {lost}"


def _digests(paths: Iterable[Path]) -> dict[str, str]:
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def summary_line(counts: dict[str, int]) -> str:
    """One line for the end of a session."""
    return "faults: " + ", ".join(f"{counts.get(name, 0)} {name.replace('_', ' ')}" for name in COUNTS)


def add_to_report(path: Path, counts: dict[str, int], run: str) -> dict[str, int]:
    """Add counts to the JSON report of a run, and return what is in it then.

    Args:
        path: the report; made if missing, replaced if it is of another run.
        run: identity of the run, equal in all of its processes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, "r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            known = json.load(file)
        except ValueError:
            known = {}
        before = known if known.get("run") == run else {}
        total = {name: int(before.get(name, 0)) + int(counts.get(name, 0)) for name in COUNTS}
        file.seek(0)
        file.truncate()
        json.dump({"run": run, **total}, file, indent=1)
    return total
