"""The tiling-mask: every tile of a causal or windowed mask is a shifted window of one small triangle.

Let `T[r, c] = (c <= r)` for 0 <= r, c < 2M. A tile of at most M x M whose first key stands `delta` after its first query has the causal
mask `T[a : a + BM, b : b + BN]` with `a = max(0, -delta)` and `b = max(0, delta)`: a view. A window of W keys is the causal tile without
the causal tile at `delta + W`. Beyond -M and M the view no longer changes, so `delta` is clipped.
Source: H. Lin et al., "FastAttention: Extend FlashAttention2 to NPUs and Low-resource GPUs", 2024, M-mask and B-mask; bands of two sides
and clipping are ours.
"""

from __future__ import annotations

import functools

import torch

__all__ = ["EDGE", "band_tile"]

EDGE = 128
"""M, rows and columns of the largest tile: a triangle of 64 KiB."""


@functools.lru_cache(maxsize=16)
def _triangle(device: torch.device) -> torch.Tensor:
    return torch.ones((2 * EDGE, 2 * EDGE), dtype=torch.bool, device=device).tril()


def band_tile(delta: int, rows: int, columns: int, *, right: int | None, left: int | None, device: torch.device) -> torch.Tensor:
    """The mask of one tile of a band: key position <= query position + right, and >= query position - left.

    Args:
        delta: position of the first key less that of the first query.
        rows: BM, at most `EDGE`.
        columns: BN, at most `EDGE`.
        right: None: no bound.
        left: None: no bound.
        device: of the result.

    Returns:
        bool [BM, BN]; without `left` a view of a tensor that all tiles share, not to be written to.

    Cost: none without `left`; else one byte per element.
    """
    seen = _shifted(-EDGE if right is None else delta - right, rows, columns, device)
    return seen if left is None else seen & ~_shifted(delta + left + 1, rows, columns, device)


def _shifted(delta: int, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    delta = max(-EDGE, min(delta, EDGE))
    a, b = max(0, -delta), max(0, delta)
    return _triangle(device)[a : a + rows, b : b + columns]
