"""Random masks of every kind, small enough to be compared element by element."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchwrap.attention.masks.dictionary import of_dense
from torchwrap.attention.masks.mask import TileMask


def whole(mask: TileMask) -> torch.Tensor:
    """bool [B, H, Sq, Sk], without the warning of `to_dense`."""
    return mask.rectangles((0, mask.shape[2]), (0, mask.shape[3]))


def random_mask(draw: random.Random) -> TileMask:
    """One mask; each condition is there or not, lengths are 1 to 40."""
    batch, q_length, kv_length = draw.choice((1, 1, 2, 3)), draw.randint(1, 40), draw.randint(1, 40)
    conditions: dict[str, object] = {"kv_offset": draw.choice((0, 0, 3)), "q_offset": draw.choice((None, 0, draw.randint(-5, 45)))}
    if draw.random() < 0.6:
        conditions["right"] = draw.choice((0, 0, draw.randint(0, 10)))
    if draw.random() < 0.4:
        conditions["left"] = draw.randint(0, 20)
    if draw.random() < 0.2:
        conditions["chunk"] = draw.randint(1, 20)
        if draw.random() < 0.5:
            conditions["shift"] = torch.randint(0, 20, (batch,), dtype=torch.int32)
    if draw.random() < 0.3:
        ends = torch.randint(0, kv_length + 1, (batch, 2), dtype=torch.int32)
        conditions["kv_start"], conditions["kv_end"] = ends.amin(1), ends.amax(1)
    if draw.random() < 0.2:
        conditions["key_mask"] = torch.rand(batch, kv_length) < draw.choice((0.5, 0.95))
    if draw.random() < 0.3:
        order = draw.random() < 0.7
        for name, length in (("q_segments", q_length), ("k_segments", kv_length)):
            numbers = torch.randint(0, 4, (draw.choice((1, batch)), length), dtype=torch.int32)
            conditions[name] = numbers.sort().values if order else numbers
    if draw.random() < 0.2:
        # Few distinct rows and columns, so that whole tiles are empty and full.
        dense = torch.rand(batch, draw.choice((1, 2)), -(-q_length // 8), -(-kv_length // 8)) < 0.6
        dense = dense.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :q_length, :kv_length]
        conditions["dictionary"] = of_dense(dense, block=draw.choice(((8, 8), (5, 16), (128, 128))))
    return TileMask(batch, q_length, kv_length, **conditions)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned with memory of its own."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() and leaf.untyped_storage().nbytes() >= leaf.numel():
                self.elements = max(self.elements, leaf.numel())
        return result
