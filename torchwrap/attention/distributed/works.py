"""Collective operations that are under way: started in order, waited for in order, and none left behind when something fails.

A process that leaves a collective half-way lets the others wait for ever, or match its next one with their last. So whatever happens,
everything that was started is waited for, the error says which block it was about, and the group is out of step from then on: the next
call over it raises at once and says since when, instead of adding up what does not belong together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from torchwrap.core import errors

__all__ = ["Group", "Outstanding", "StartSum", "Work", "exchange", "group_name", "group_size", "resolved", "start_sum"]

Group = Any  # torch.distributed.ProcessGroup, its name, or None for the default one

# What happened to groups that are out of step: torch knows of connections that are gone, not of processes that count differently.
_out_of_step: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


class Work(Protocol):
    """Something under way, as torch.distributed returns it."""

    def wait(self, timeout: timedelta = ...) -> Any:
        """Block until it is done; raises if it failed."""
        ...


StartSum = Callable[[Tensor, Group], Work]
"""Begins to add up a tensor over a group, in place."""


class Outstanding:
    """Works under way, as a context: leaving it waits for all of them.

    Args:
        what: the operation, for messages.
        group: of processes; anything that fails after the first start leaves it out of step. None: nothing is remembered.
        timeout_s: longest wait for one work in seconds; None: what the process group allows.

    Raises:
        WorkError: on entering: the group is out of step. On leaving the context or in `wait`: a work failed or did not end in time. The
            message names the first such block.
    """

    def __init__(self, what: str, *, group: Group = None, timeout_s: float | None = None) -> None:
        self.what: str = what
        self.timeout_s: float | None = timeout_s
        self._group = None if group is None else resolved(group)
        self._works: list[tuple[int, Work]] = []
        self._last: int | None = None

    def start(self, block: int, launch: Callable[[], Work | Sequence[Work]]) -> None:
        """Start what belongs to a block."""
        self._last = block
        try:
            works = launch()
        except RuntimeError as error:
            raise self._failed(block, error) from error
        self._works += [(block, work) for work in (works if isinstance(works, Sequence) else (works,))]

    def wait(self, block: int | None = None) -> None:
        """Wait for the works of a block and of all started before it; None: for all."""
        while self._works and (block is None or any(one == block for one, _ in self._works)):
            number, work = self._works.pop(0)
            try:
                self._wait(work, self.timeout_s)
            except Exception as error:  # whatever a back end raises for a peer that is gone
                raise self._failed(number, error) from error

    def __enter__(self) -> Outstanding:
        earlier = None if self._group is None else _out_of_step.get(self._group)
        if earlier is not None:
            raise errors.WorkError(
                f"{self.what} cannot begin: the process group is out of step since an earlier call ({earlier})",
                where="group",
                fix="Make a new group in every process (torch.distributed.new_group) and give it, or start the processes anew.",
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.wait()
        except errors.WorkError as failure:
            error = failure
            raise
        finally:
            if error is not None:
                self._wait_for_the_rest()
                if self._group is not None and self._last is not None:
                    _out_of_step[self._group] = f"{self.what} ended at block {self._last}: {type(error).__name__}"

    def _wait_for_the_rest(self) -> None:
        """After a failure: let everything end. Together they get the time of one."""
        deadline = None if self.timeout_s is None else time.monotonic() + self.timeout_s
        works, self._works = self._works, []
        for _, work in works:
            try:
                self._wait(work, None if deadline is None else max(0.001, deadline - time.monotonic()))
            except Exception:  # the first failure is already on its way to the caller, and these follow from it
                continue

    def _wait(self, work: Work, timeout_s: float | None) -> None:
        if timeout_s is None:
            work.wait()
        else:
            work.wait(timedelta(seconds=timeout_s))

    def _failed(self, block: int, error: Exception) -> errors.WorkError:
        return errors.WorkError(
            f"{self.what} of block {block} failed: {error}",
            where=f"block {block}",
            fix="Look at the other processes first: one that left or is late fails all others. The process group must be made anew.",
        )


def resolved(group: Group) -> Any:
    """The process group itself.

    Raises:
        ConfigError: torch.distributed has no process group, or none of this name (any more).
    """
    if not dist.is_available() or not dist.is_initialized():
        raise errors.ConfigError("there is no process group", where="group", fix="Call torch.distributed.init_process_group(...) first.")
    if not isinstance(group, str):
        return dist.group.WORLD if group is None else group
    try:
        return distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type, attr-defined]  # torch 2.13: there is no public way
    except RuntimeError as error:
        fix = "Make the group first, in every process, and then wrap the model."
        raise errors.ConfigError(f"there is no process group {group!r}", where="group", fix=fix) from error


def group_name(group: object, *, where: str) -> str | None:
    """The name of a process group, by which torch knows it in every process; None for None.

    Raises:
        ConfigError: it is neither a group nor a name.
    """
    name = group if group is None or isinstance(group, str) else getattr(group, "group_name", group)
    if name is None or isinstance(name, str):
        return name
    raise errors.ConfigError(
        f"{group!r} is no process group",
        where=where,
        fix="Give what torch.distributed.new_group(...) returns, mesh.get_group() of a device mesh, or torch.distributed.group.WORLD.",
    )


def group_size(group: Group) -> tuple[int, int]:
    """Number of this process in the group, and how many there are.

    Raises:
        ConfigError: there is no such process group, or this process is not in it.
    """
    found = resolved(group)
    try:
        rank, size = dist.get_rank(found), dist.get_world_size(found)
    except ValueError as error:  # what torch says of one that it does not know any more
        raise errors.ConfigError("the process group was destroyed", where="group", fix="Make a new one in every process.") from error
    if rank < 0:
        raise errors.ConfigError("this process is not in the group", where="group", fix="Give each process a group that it belongs to.")
    return rank, size


def start_sum(tensor: Tensor, group: Group) -> Work:
    """Begin to add up `tensor` over the group, in place."""
    work: Work = dist.all_reduce(tensor, group=resolved(group), async_op=True)
    return work


def exchange(out: Sequence[Tensor], into: Sequence[Tensor], group: Group) -> list[Work]:
    """Begin to send `out` to the next process of the group and to receive `into` from the one before."""
    found = resolved(group)
    rank, size = group_size(found)
    ranks = dist.get_process_group_ranks(found)
    after, before = ranks[(rank + 1) % size], ranks[(rank - 1) % size]
    sends = [dist.P2POp(dist.isend, one, after, found) for one in out]
    return list(dist.batch_isend_irecv([*sends, *(dist.P2POp(dist.irecv, one, before, found) for one in into)]))
