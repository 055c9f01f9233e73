"""The buffers of a block as one call found them, for when it is computed again.

Running statistics, power iterations and counters are written in the forward. Computing a block again must find what its first call found,
and leave what that left. So a call notes its block's buffers and keeps copies; while it is made again the modules have copies of those
copies in place of their buffers, which nobody touches: not their values, not their identity, not autograd's counts of changes.

Large buffers are mostly tables and masks that are only read. The first call with each is compared with a copy; from then on it is not
copied, and autograd's count of its changes tells if it is written after all.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from torchwrap.core import errors

__all__ = ["LARGE", "Buffers", "Found"]

LARGE = 64 << 10  # bytes; chosen: copying less costs about as much as asking

_Table = dict[str, torch.Tensor | None]


class Buffers:
    """What is known of the buffers of one model's blocks."""

    def __init__(self) -> None:
        self._read: dict[bool, weakref.WeakValueDictionary[int, torch.Tensor]] = {
            training: weakref.WeakValueDictionary() for training in (False, True)
        }
        self._own: dict[int, tuple[_Table, int]] = {}  # by module: its buffers while copies stand in for them, and how many calls do so
        self._lock = threading.Lock()  # never held while a block runs

    def found(self, block: nn.Module) -> Found:
        """Note a block's buffers, before it is called."""
        return Found(self, block)

    def is_read_only(self, buffer: torch.Tensor, training: bool) -> bool:
        """A call was seen to leave it alone, with its module in this mode."""
        return self._read[training].get(id(buffer)) is buffer

    def learn(self, buffer: torch.Tensor, training: bool, *, written: bool) -> None:
        """What a call did with a buffer."""
        if written:
            self._read[training].pop(id(buffer), None)
        else:
            self._read[training][id(buffer)] = buffer

    @contextmanager
    def instead(self, tables: list[tuple[nn.Module, _Table]]) -> Iterator[None]:
        """Within the block, modules have these buffers in place of their own; threads may overlap, the last one puts back their own."""
        with self._lock:
            for module, table in tables:
                own, users = self._own.get(id(module), (dict(module._buffers), 0))
                self._own[id(module)] = own, users + 1
                _fill(module, table)
        try:
            yield
        finally:
            with self._lock:
                for module, _ in tables:
                    own, users = self._own.pop(id(module))
                    if users > 1:
                        self._own[id(module)] = own, users - 1
                    else:
                        _fill(module, own)


class Found:
    """The buffers that one call of a block found.

    Cost: a copy of each buffer, less the large ones that are only read, until the graph is gone; as much again while it is computed again.
    """

    def __init__(self, known: Buffers, block: nn.Module) -> None:
        self._known = known
        self._tables = [(module, dict(module._buffers)) for module in block.modules()]
        self._versions: dict[int, int] = {}
        self._copies: dict[int, torch.Tensor] = {}
        for module, _, buffer in self._each():
            self._versions[id(buffer)] = _version(buffer)
            if id(buffer) not in self._copies and not _fixed(buffer) and not known.is_read_only(buffer, module.training):
                self._copies[id(buffer)] = _copy(buffer)

    def _each(self) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
        for module, table in self._tables:
            for name, buffer in table.items():
                if buffer is not None:
                    yield module, name, buffer

    def called(self) -> None:
        """Learn from what the call left.

        Raises:
            UnsupportedModelError: it wrote to a large buffer that earlier ones only read.
        """
        self._check()
        for module, _, buffer in list(self._each()):
            copy = self._copies.get(id(buffer))
            if copy is not None and buffer.nbytes > LARGE and self._versions[id(buffer)] == _version(buffer) and torch.equal(buffer, copy):
                self._known.learn(buffer, module.training, written=False)
                del self._copies[id(buffer)]

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Within the block, the modules have buffers with the values found. Raises like `called`."""
        self._check()
        copies = {which: _copy(copy) for which, copy in self._copies.items()}
        tables = [(m, {name: None if b is None else copies.get(id(b), b) for name, b in table.items()}) for m, table in self._tables]
        with self._known.instead(tables):
            yield

    def _check(self) -> None:
        for module, name, buffer in self._each():
            if id(buffer) not in self._copies and _version(buffer) != self._versions[id(buffer)]:
                self._known.learn(buffer, module.training, written=True)
                raise errors.UnsupportedModelError(
                    f"torchwrap: buffer {name} of {type(module).__name__} ({buffer.nbytes} bytes) was written, which calls before left "
                    "alone, so no copy was made with which to compute its block again; copies are made from now on",
                    where=name,
                    fix='Repeat the step, or use activations="disk" or "keep".',
                )


def _fill(module: nn.Module, table: _Table) -> None:
    module._buffers.clear()
    module._buffers.update(table)


def _fixed(buffer: torch.Tensor) -> bool:
    return buffer.is_inference() or buffer.is_meta


def _version(buffer: torch.Tensor) -> int:
    return 0 if buffer.is_inference() else buffer._version


@torch.no_grad()
def _copy(buffer: torch.Tensor) -> torch.Tensor:
    """The same values in the same order in memory, because kernels may add up in another order in another layout."""
    values = buffer.detach()
    if type(values) is torch.Tensor and values.layout == torch.strided and values.numel():
        extent = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, values.stride(), strict=True))
        values = values.as_strided((extent,), (1,)).clone().as_strided(values.shape, values.stride())
    else:
        values = values.clone()
    return values.requires_grad_(buffer.requires_grad)
