"""What autograd keeps in place of the tensors of a block, and the memory behind it.

Autograd keeps an *entry*: where in which *record* the tensor lies. A record is one piece of memory, so a tensor saved by several nodes,
or through several views, moves once. A *use* is one call of one block, with the records it saved. A record can be asked for at any time:
as long as its memory is there, because the write has not ended, somebody else uses it, or it was read for another node, that is what
everybody gets.

Hooks switch off autograd's check that saved tensors are not modified in place, and the tensor may be gone when it is due. Each entry
therefore keeps a *witness*: a tensor without memory that shares the version counter.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from torchwrap.activations.kept import modified
from torchwrap.activations.tiers import Loading, Place
from torchwrap.core.tensors import bind, over_storage

__all__ = ["Entry", "Record", "Use", "bytes_over"]


class Use:
    """One call of one block in a forward; lives as long as something that it saved, or until the next one."""

    __slots__ = ("__weakref__", "name", "previous", "records")

    def __init__(self, name: str, previous: weakref.ref[Use] | None) -> None:
        self.name: str = name
        self.previous: weakref.ref[Use] | None = previous
        self.records: list[weakref.ref[Record]] = []

    def living(self) -> list[Record]:
        """Records that a graph still needs, in the order of saving."""
        return [record for each in self.records if (record := each()) is not None]

    def before(self) -> Use | None:
        """The block that ran before this one, if its graph is alive."""
        return self.previous() if self.previous is not None else None


class Record:
    """One piece of memory that entries show.

    Attributes:
        memory: (nbytes,) uint8 over it while it has to stay.
        alive: the storage it lies in, as long as somebody keeps that, and its offset there.
        begun: its bytes are being, or were, stored; what is written to the memory from now on is not part of it.
        wanted: a backward has come to it, so that its memory stays until that has passed.
        version: of the tensor it was made for.
        owner: the block that saved it first, so that a backward comes to it last.
    """

    __slots__ = ("__weakref__", "_trash", "alive", "begun", "loading", "mark", "memory", "owner", "place", "version", "wanted")

    def __init__(self, memory: torch.Tensor, version: int, owner: Use, trash: deque[Place]) -> None:
        self.memory: torch.Tensor | None = memory
        self.version: int = version
        self.owner: weakref.ref[Use] = weakref.ref(owner)
        self._trash = trash
        self.alive: tuple[weakref.ref[torch.UntypedStorage], int] | None = None
        self.begun: bool = False
        self.wanted: bool = False
        self.place: Place | None = None
        self.loading: Loading | None = None
        self.mark: Any = None

    @property
    def nbytes(self) -> int:
        """Its size."""
        if self.memory is not None:
            return self.memory.numel()
        assert self.place is not None
        return self.place.nbytes

    def present(self) -> torch.Tensor | None:
        """The bytes, if they are in memory."""
        if self.memory is not None:
            return self.memory
        if self.alive is not None and (storage := self.alive[0]()) is not None:
            assert self.place is not None
            return bytes_over(storage, self.alive[1], self.place.nbytes)
        return None

    def let_go(self) -> None:
        """Keep the stored bytes only."""
        if self.memory is not None:
            self.alive = (weakref.ref(self.memory.untyped_storage()), int(self.memory.storage_offset()))
            self.memory = None

    def __del__(self) -> None:
        place: Place | None = getattr(self, "place", None)  # missing if an interrupt ended `__init__`
        if place is not None:
            self._trash.append(place)  # any thread, perhaps one that holds locks: freed by the writer


class Entry:
    """What autograd keeps in place of a tensor.

    Args:
        bring: returns a record's bytes in memory, (nbytes,) uint8, for the block that asks.
        use: the block that saved the tensor.
        record: holds the tensor's bytes.
        tensor: shape (...), of any strided layout.
        offset: of the tensor's first element in the record, bytes.
    """

    __slots__ = ("_bring", "_conjugate", "_dtype", "_negative", "_offset", "_record", "_size", "_stride", "_use", "_version", "_witness")

    def __init__(self, bring: Callable[[Record, Use], torch.Tensor], use: Use, record: Record, tensor: torch.Tensor, offset: int) -> None:
        self._bring, self._use, self._record, self._dtype = bring, use, record, tensor.dtype
        self._offset, self._size, self._stride = offset, tensor.size(), tensor.stride()
        self._conjugate, self._negative = tensor.is_conj(), tensor.is_neg()
        self._witness, self._version = tensor.detach(), tensor._version
        bind(self._witness, tensor.new_empty(0))

    def restore(self) -> torch.Tensor:
        """A tensor like the one that was saved, over the record's memory.

        Raises:
            RuntimeError: it was modified in place since; autograd's own words.
            StorageError, CorruptDataError: reading it failed.
        """
        if self._witness._version != self._version:
            raise modified(f"a tensor of type {self._dtype} and shape {list(self._size)}")
        memory = self._bring(self._record, self._use)
        with torch.no_grad():
            offset = (int(memory.storage_offset()) + self._offset) // self._dtype.itemsize
            tensor = over_storage(memory.untyped_storage(), self._dtype, offset, self._size, self._stride)
            tensor = torch._conj(tensor) if self._conjugate else tensor
            return torch._neg_view(tensor) if self._negative else tensor


def bytes_over(storage: torch.UntypedStorage, offset: int, nbytes: int) -> torch.Tensor:
    """(nbytes,) uint8 that shares the storage's memory."""
    return over_storage(storage, torch.uint8, offset, (nbytes,), (1,))
