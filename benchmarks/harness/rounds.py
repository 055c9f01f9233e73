"""What all campaigns share: contenders that take turns, each run in a fresh process, and rivals that may not survive their limit.

Rounds start with a different contender each time, so that a machine that changes speed within minutes changes it for all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.harness.cgroup import ChildResult, run_child

__all__ = ["ROOT", "Rounds"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(kw_only=True)
class Rounds:
    """Contenders, what each run of them measured, and who is out of the race.

    Args:
        names: contenders, in the order of the first round.
        threads: compute threads of every contender.
        say: called with one line per finished run.
        runs: what was measured, per contender.
        dropped: contenders without figures, and why.
    """

    names: Sequence[str]
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    say: Callable[[str], None] = print
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    ours: ClassVar[Sequence[str]] = ()
    """Contenders that have to survive: their end is an error and not a result."""

    @property
    def title(self) -> str:
        """Group name in results and targets."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Make what the contenders read; not timed, not limited."""
        raise NotImplementedError

    def run(self, name: str) -> float:
        """One measured run; its seconds, infinity for a contender that was dropped.

        Raises:
            RuntimeError: one of ours failed, or a rival for another reason than the limit; with its output.
        """
        record = None if name in self.dropped else self.measure(name)
        return math.inf if record is None else self.seconds(record)

    def measure(self, name: str) -> dict[str, Any] | None:
        """One run, kept and told; None if it was dropped."""
        raise NotImplementedError

    def seconds(self, record: dict[str, Any]) -> float:
        """The figure of a run that is compared."""
        raise NotImplementedError

    def summary(self) -> dict[str, Any]:
        """Everything measured, and what follows from it."""
        raise NotImplementedError

    def round(self, index: int) -> None:
        """Run every contender once, starting with another one each time."""
        first = index % len(self.names)
        for name in (*self.names[first:], *self.names[:first]):
            self.run(name)

    def child(
        self,
        name: str,
        command: Sequence[str],
        *,
        limit: int | None = None,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 900.0,
    ) -> ChildResult | None:
        """Run a command in a fresh memory group; None for a rival that was ended by its limit, which is then dropped.

        Raises:
            RuntimeError: one of ours failed, or a rival for another reason than the limit; with its output.
        """
        variables = {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        found = run_child(command, limit=limit, environment={**variables, **(environment or {})}, folder=ROOT, timeout_s=timeout_s)
        if found.killed and limit is not None and name not in self.ours:
            self.drop(name, f"ended by the out-of-memory killer at {found.peak_bytes} of {limit} bytes")
            return None
        return found.check()

    def drop(self, name: str, reason: str) -> None:
        """Take a contender out of the race, with its runs so far: one that dies in one round of three is no figure to compare with."""
        self.dropped[name] = reason
        self.runs.pop(name, None)
        self.say(f"{self.title} {name:<17} {reason}")

    def keep(self, name: str, child: ChildResult, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Store what a run reported, what the kernel counted, and `figures`."""
        counted = ("limit_bytes", "peak_bytes", "hwm_bytes", "failures", "refaulted_pages", "wall_s")
        record = {**child.data, **{key: getattr(child, key) for key in counted}, **figures}
        self.runs.setdefault(name, []).append(record)
        return record

    def head(self) -> dict[str, Any]:
        """First entries of a summary."""
        return {
            "title": self.title,
            "threads": self.threads,
            "rounds": max(map(len, self.runs.values()), default=0),
            "dropped": dict(self.dropped),
        }
