"""What one use of a block in the first step takes: bytes that autograd wants to keep, and seconds to make them."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch

from torchwrap.activations.kept import Kept
from torchwrap.core.tensors import data_of, tensor_bytes

__all__ = ["Measured", "storage_address"]


class Measured:
    """What one use of a block in the first step takes.

    Attributes:
        found: bytes of what autograd wanted to save, each piece of memory once.
        seconds: of the faster one of forward and recomputation; the first forward also warms up.
        again: it was recomputed.
        batch, rows: sequences, and tokens of all of them together; 0 if that cannot be told from the inputs.
    """

    def __init__(self, unit: int, device: torch.device, weights: set[int]) -> None:
        self.unit: int = unit
        self._device, self._weights = device, weights
        self.found: _Counter = _Counter()
        self.input_bytes = self.batch = self.rows = 0
        self.seconds: float = float("inf")
        self.again: bool = False
        self._begun = False

    def run(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Make the call and measure it: once in the forward, once when it is made again."""
        self.again, self._begun = self._begun, True
        began = self._now()
        try:
            with torch.autograd.graph.saved_tensors_hooks(_Counting(_Counter() if self.again else self.found, self._weights), _passed):
                return call(*args, **kwargs)
        finally:  # a recomputation is ended by an exception when everything needed is there
            self.seconds = min(self.seconds, self._now() - began)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.monotonic()


class _Counter:
    """Bytes of distinct storages. Their addresses do not tell, because what is recomputed is freed at once and its memory used again."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, storage: torch.UntypedStorage) -> None:
        seen = self._seen.get(storage._cdata)
        if seen is None or seen() is not storage:
            self._seen[storage._cdata] = weakref.ref(storage)
            self.nbytes += storage.nbytes()


class _Counting:
    """Counts what is saved and passes it on to the hooks outside."""

    def __init__(self, found: _Counter, weights: set[int]) -> None:
        self._found, self._weights = found, weights
        self._outer = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def __call__(self, tensor: torch.Tensor) -> tuple[Callable[[Any], torch.Tensor] | None, Any]:
        if tensor.layout != torch.strided:
            self._found.nbytes += tensor_bytes(tensor)
        elif storage_address(tensor) not in self._weights:
            self._found.add(tensor.untyped_storage())
        return (self._outer[1], self._outer[0](tensor)) if self._outer is not None else (None, Kept(tensor))


def _passed(packed: tuple[Callable[[Any], torch.Tensor] | None, Any]) -> torch.Tensor:
    unpack, inner = packed
    tensor: torch.Tensor = unpack(inner) if unpack is not None else inner.restore()
    return tensor


def storage_address(tensor: torch.Tensor) -> int:
    """Where a tensor's memory begins; 0 of a sparse one, which is several tensors."""
    return int(data_of(tensor).untyped_storage().data_ptr()) if tensor.layout == torch.strided else 0
