"""Bytes of tensors alive at once while a model runs on shapes, and what convolutions take besides.

Counted is each piece of memory that an operator makes, from then until it is freed. A convolution on the CPU works on reordered copies of
what it reads and writes, which nobody sees as tensors; their sizes are those measured with torch 2.13 and oneDNN on processors with
AVX-512, on 2-d convolutions of 1x1 to 16x16 in float32 and bfloat16, on 1-d, 3-d and transposed ones (`_convolution`).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):
    """Counts while it is entered.

    Args:
        known: addresses (`_cdata`) of storages that do not count.
        device: where the model computes.
    """

    def __init__(self, known: set[int], device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known, self._device = known, device
        self._events: list[tuple[int, int]] = []  # (number of the storage, bytes more or less); 0 is for what an operator needs meanwhile
        self._numbers: dict[int, int] = {}
        self._left_out: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self._count(tensor.untyped_storage())
        if self._device.type == "cpu" and (more := _meanwhile(func, args, result)):
            self._events += [(0, more), (0, -more)]
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._numbers or key in self._known:
            return
        number = self._numbers[key] = len(self._events) + 1
        self._events.append((number, storage.nbytes()))
        weakref.finalize(storage, self._gone, key, number, storage.nbytes())

    def _gone(self, key: int, number: int, nbytes: int) -> None:
        self._numbers.pop(key, None)
        self._events.append((number, -nbytes))

    def leave_out(self, tensor: torch.Tensor) -> None:
        """This one does not count, from its beginning."""
        number = self._numbers.get(tensor.untyped_storage()._cdata)
        if number is not None:
            self._left_out.add(number)

    @property
    def peak(self) -> int:
        """Most bytes alive at once so far."""
        now = most = 0
        for number, nbytes in self._events:
            if number not in self._left_out:
                now += nbytes
                most = max(most, now)
        return most


def _meanwhile(func: Any, args: Any, result: Any) -> int:
    """Bytes that an operator needs while it runs, beside what it makes."""
    name = func._schema.name
    if name == "aten::convolution":
        return _convolution(args[0], args[1], result, stride=args[3], transposed=args[6], backward=False)
    if name == "aten::convolution_backward":
        return _convolution(args[1], args[2], args[0], stride=args[4], transposed=args[7], backward=True)
    return 0


def _convolution(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, *, stride: Any, transposed: bool, backward: bool) -> int:
    strided = any(int(step) > 1 for step in stride)
    if all(size == 1 for size in weight.shape[2:]) and not strided:
        return min(x.nbytes, y.nbytes)
    if not x.is_contiguous() and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return 0  # it computes in this order
    if backward:
        return 2 * x.nbytes if strided and not transposed else x.nbytes + y.nbytes
    return (2 if transposed else 1) * max(x.nbytes, y.nbytes)
