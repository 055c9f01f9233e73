"""A mask as arguments of a kernel: numbers where they are rules, pointers where they are data.

Bands, chunks and padding are evaluated by the kernel from a few integers, so that nothing is computed on the host or read back from the
card. Packed sequences and dictionaries also bring the bounds of each row of tiles, `TileMask.tiles`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchwrap.attention.contract import Call

__all__ = ["arguments"]

# Reach beyond which a band is no bound: sums of two such stay within 32 bits.
_FAR = 1 << 30


def arguments(call: Call, queries: int, keys: int, pack: int = 1) -> dict[str, Any]:
    """The arguments that all kernels take from the mask of a call.

    Args:
        call: the call, with its mask on the device of q.
        queries: rows of a tile.
        keys: columns of a tile.
        pack: heads beside each other in the rows of a tile.
    """
    mask = call.mask
    found: dict[str, Any] = dict.fromkeys((
        "q_offset_tensor", "kv_start", "kv_end", "shifts", "key_mask", "q_segments", "k_segments", "tile_bounds", "cells", "patterns",
        "right", "left", "chunk",
    ))  # fmt: skip
    found |= dict.fromkeys((
        "start_b", "end_b", "shift_b", "mask_b", "q_segments_b", "k_segments_b", "cells_b", "cells_h", "cells_i", "start_i", "start_j",
        "bounds_b", "q_offset", "kv_offset",
    ), 0)  # fmt: skip
    found |= {"q_length": call.q_length, "kv_length": call.kv_length, "BLOCK_I": 1, "BLOCK_J": 1, "ALL_EDGES": False}
    if mask is None:
        return found
    found["kv_offset"] = mask.kv_offset
    if isinstance(mask.q_offset, Tensor) and mask.q_offset.device == call.q.device:
        found["q_offset_tensor"] = mask.q_offset
    else:
        found["q_offset"] = int(mask.q_offset)
    for name in ("right", "left", "chunk"):
        value = getattr(mask, name)
        found[name] = None if value is None else min(value, _FAR)
    for name, field, stride in (
        ("kv_start", mask.kv_start, "start_b"), ("kv_end", mask.kv_end, "end_b"), ("shifts", mask.shift, "shift_b"),
        ("key_mask", mask.key_mask, "mask_b"), ("q_segments", mask.q_segments, "q_segments_b"),
        ("k_segments", mask.k_segments, "k_segments_b"),
    ):  # fmt: skip
        if field is not None:
            field = field.contiguous()
            found[name] = field.view(torch.uint8) if field.dtype == torch.bool else field
            found[stride] = field.stride(0) if field.shape[0] > 1 else 0
    if mask.dictionary is not None:
        codes, (found["start_i"], found["start_j"]) = mask.dictionary.codes.contiguous(), mask.dictionary.start
        found["cells"], found["patterns"] = codes, mask.dictionary.tiles.contiguous()
        found["cells_b"], found["cells_h"] = (codes.stride(axis) if codes.shape[axis] > 1 else 0 for axis in (0, 1))
        found["cells_i"], (found["BLOCK_I"], found["BLOCK_J"]) = codes.stride(2), mask.dictionary.block
    if mask.key_mask is not None:
        found["ALL_EDGES"] = True
    if mask.q_segments is not None or mask.dictionary is not None:
        if pack > 1:
            # Rows of several heads do not line up with the mask's own tiles; the few there are get every comparison.
            found["ALL_EDGES"] = True
        else:
            tiles = mask.tiles(queries, keys)
            bounds = torch.stack([tiles.lo, tiles.hi, tiles.full_lo, tiles.full_hi], -1).to(torch.int32)
            found["tile_bounds"] = bounds
            found["bounds_b"] = bounds.stride(0) if bounds.shape[0] > 1 else 0
            found["ALL_EDGES"] = False
    return found
