"""One parameter as an offloaded optimizer sees it, and where its values, its gradient and its state are.

The weight is in memory, in page-locked host memory or in a file; what the optimizer keeps per element is in the store, one record for each
name; what it keeps per parameter (a step count) is small and stays in memory. All streams of a parameter are cut at the same elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchwrap.core import errors
from torchwrap.core.tensors import is_placeholder
from torchwrap.optimizer.standin import StandIn
from torchwrap.storage.generations import GenerationStore, Record
from torchwrap.storage.pool import BLOCK, round_up
from torchwrap.stream.units import Piece, Unit
from torchwrap.weights.footprint import elements_of

__all__ = ["LARGE", "Target", "can_stream", "flat_weight", "in_place", "records_needed"]

LARGE = 64 << 10
"""Resident parameters below this many bytes are updated as a whole, with their state in memory: a request each would cost more (chosen)."""


@dataclass(eq=False, slots=True)
class Target:
    """One parameter.

    Attributes:
        name: its first name in the model.
        parameter: the parameter object.
        group: index of its parameter group.
        place: where it comes in the model's parameters.
        piece: what `offload` knows of it; `None` in a model that is not offloaded.
        unit: a unit it belongs to, which may be away but for it; `None` if it is in none.
        layout: what is kept per element, by name.
        streamed: its state is in the store between steps; otherwise it is updated as a whole, in memory.
        numbers: what is kept per parameter; `order` are all names in the order of the class.
        torn: the weight in memory is neither old nor new.
        changed: the weight is not the one the model came with.
    """

    name: str
    parameter: nn.Parameter
    group: int
    place: int
    piece: Piece | None
    unit: Unit | None
    layout: dict[str, torch.dtype]
    streamed: bool
    numbers: dict[str, Any] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    torn: bool = False
    changed: bool = False
    standin: StandIn | None = None

    @property
    def away(self) -> bool:
        """Whether the weight is not in the parameter."""
        return self.piece is not None and not self.piece.resident

    @property
    def numel(self) -> int:
        """Elements."""
        return self.parameter.numel()

    @property
    def weight_name(self) -> str:
        """Name of the weight's record."""
        return f"{self.name}:weight"

    def state_name(self, key: str) -> str:
        """Name of the record of one state tensor."""
        return f"{self.name}:state:{key}"

    def state(self, store: GenerationStore) -> dict[str, Any]:
        """What torch keeps in `optimizer.state[parameter]`; tensors show the store's file and are read when used. Empty before a step."""
        kept: dict[str, Any] = {}
        for key in self.order:
            if key in self.layout:
                kept[key] = store.file.followed(self.state_name(key)).view(self.parameter.shape)
            else:
                kept[key] = self.numbers[key]
        return kept

    def take_gradient(self, known: torch.Tensor | None, *, parked: bool) -> torch.Tensor:
        """Take the gradient over and leave a stand-in (see standin.py).

        Args:
            known: its norm, for those who ask the stand-in.
            parked: it may still be scaled.
        """
        gradient = self.parameter.grad
        assert gradient is not None
        self.standin = StandIn.of(self.name, gradient, known, parked=parked)
        self.parameter.grad = self.standin
        return gradient

    def gradient_norm(self) -> torch.Tensor:
        """Total norm of what is in the gradient's place, as torch's clipping computes it; a tensor of no dimension."""
        gradient = self.parameter.grad
        assert gradient is not None
        return torch.nn.utils.get_total_norm([gradient])

    def is_taken(self) -> bool:
        """Whether the gradient was taken and the stand-in is still in its place."""
        return self.standin is not None and self.parameter.grad is self.standin

    def is_zeroed(self) -> bool:
        """Whether the stand-in, if there is one, was set to zero."""
        return self.standin is not None and self.standin.is_zero()

    def gradient(self) -> torch.Tensor | None:
        """The gradient, if there is one to be used; one that was taken and then set to zero is one element, expanded."""
        if self.standin is None or not self.is_taken():
            return self.parameter.grad
        given = self.standin
        return torch.zeros((), dtype=given.dtype, device=given.device).expand(given.shape) if self.is_zeroed() else None


def can_stream(parameter: nn.Parameter, piece: Piece | None) -> bool:
    """Whether a parameter's state is worth, and able, to be streamed: large, dense, and its elements in order."""
    if piece is not None and not piece.resident:
        return True
    plain = type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor and parameter.layout == torch.strided
    return plain and parameter.is_contiguous() and parameter.numel() * parameter.element_size() >= LARGE


def in_place(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """`after`, in the tensors of `before` where there are some: who holds a state dict sees all of it change with a step, as torch's do."""
    found = dict(after)
    for key, new in after.items():
        old = before.get(key)
        if old is new or not (isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)):
            continue
        if old.shape == new.shape and old.dtype == new.dtype and not old.is_inference():
            found[key] = old.copy_(new)
    return found


def flat_weight(target: Target) -> torch.Tensor | None:
    """The weight as a flat tensor over its memory, `None` if it is in a file.

    Raises:
        ConflictError: somebody took the weight away since the optimizer was made.
    """
    piece = target.piece
    if target.away:
        assert piece is not None
        return None if piece.host is None else piece.host.view(piece.dtype)
    weight = target.parameter.detach()  # not `.data`: autograd must notice the change
    if is_placeholder(weight):
        raise errors.ConflictError(
            f"OffloadedOptimizer: the weight of {target.name} is away, but was not when the optimizer was made",
            where=target.name,
            fix="Wrap the model first, then make the optimizer.",
        )
    return weight.view(-1)


def records_needed(target: Target, chunk_bytes: int, store: GenerationStore) -> list[tuple[str, torch.dtype, tuple[int, ...], int, int]]:
    """(name, dtype, shape, lead, chunk) of the records of a parameter, for `GenerationStore.reserve`."""
    parameter, size = target.parameter, target.parameter.element_size()
    weight: Record | None = store.records.get(target.weight_name)
    if weight is not None:
        lead, chunk = weight.lead, weight.chunk
    else:
        residue = target.piece.residue if target.piece is not None and parameter.device.type == "cpu" else 0
        # At its own address modulo 64 the weight is read where it is used. An odd one is copied there by the reader.
        lead = residue // size if residue % 8 == 0 and residue % size == 0 else 0
        state = sum(dtype.itemsize for dtype in target.layout.values())
        chunk = min(max(BLOCK, elements_of(chunk_bytes, size, state) // BLOCK * BLOCK), round_up(lead + parameter.numel()))
    shape = tuple(parameter.shape)
    wanted: Mapping[str, torch.dtype] = {target.weight_name: parameter.dtype} | {
        target.state_name(key): dtype for key, dtype in target.layout.items()
    }
    return [(name, dtype, shape, lead, chunk) for name, dtype in wanted.items()]
