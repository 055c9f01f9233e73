"""Attention in Triton: kernels for cards with matrix units (compute capability 8.0 and later), and without them from 6.0.

`backend` says what is refused and runs the rest; `launches` makes kernels, grids and arguments of a call; `blocks` chooses tiles for a
card; `conditions` turns a mask into arguments. The kernels are in `_scores` (one tile), `_forward` and `_backward`; only these import
triton, and they are imported when a call is computed.
"""

from torchwrap.attention.triton.backend import Triton
from torchwrap.attention.triton.blocks import Blocks

__all__ = ["Blocks", "Triton"]
