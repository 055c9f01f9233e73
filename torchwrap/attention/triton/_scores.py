"""What every kernel does with one tile of scores: which tiles a row of queries visits, which of their keys it sees, and the score itself.

A tile is a rectangle of queries `i` and keys `j`. The index tensors come shaped for broadcasting, `[M, 1]` and `[1, N]` or the reverse,
so the pass over queries and the pass over keys share this code. Conditions and tensors that a call lacks are None and vanish when the
kernel is compiled. Scores are in units of log2(e), because the card has a power of two and no exponential.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "LN2", "LOG2E", "VARYING", "finish", "kept", "key_range", "offset_of", "product", "query_range", "row_of_batch", "rows", "visible",
]  # fmt: skip

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Numbers that change from call to call: a kernel compiled anew for each that is 1 or a multiple of 16 would stall a generation.
VARYING = [
    "q_length", "kv_length", "q_offset", "kv_offset", "right", "left", "chunk", "seed_low", "seed_high", "threshold", "bounds_b", "start_i",
    "start_j",
]  # fmt: skip


@triton.jit
def floor_to(x, step):
    """Largest multiple of `step` that is not above x: the remainder has the sign of x on the card, of `step` in the interpreter."""
    rest = x % step
    return x - tl.where(rest < 0, rest + step, rest)


@triton.jit
def tanh(x):
    """tanh to about one unit in the last place of float32.

    1 - 2 / (exp(2x) + 1) loses everything near zero, where most capped scores lie; there an odd polynomial (coefficients: S. Moshier,
    Cephes, tanhf) serves instead. libdevice has a tanh, the interpreter has no libdevice.
    """
    z = x * x
    series = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z - 3.33332819422e-1
    return tl.where(tl.abs(x) < 0.625, x + x * z * series, 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1))


@triton.jit
def row_of_batch(b, kv_length, kv_start, kv_end, shifts, start_b, end_b, shift_b):
    """First and end column that row b of the batch has at all, and where its chunks begin."""
    first = 0
    end = kv_length
    shift = 0
    if kv_start is not None:
        first = tl.maximum(tl.load(kv_start + b * start_b), 0)
    if kv_end is not None:
        end = tl.minimum(tl.load(kv_end + b * end_b), kv_length)
    if shifts is not None:
        shift = tl.load(shifts + b * shift_b)
    return first, end, shift


@triton.jit
def offset_of(q_offset, q_offset_tensor):
    """Position of the first query; static caches hold it on the device, where reading it back would stall the host."""
    offset = q_offset
    if q_offset_tensor is not None:
        offset = tl.load(q_offset_tensor).to(tl.int32)
    return offset


@triton.jit
def key_range(p0, p1, first, end, kv_offset, right, left, chunk, shift, BLOCK: tl.constexpr):
    """Tiles [lo, hi) of keys that any query at positions p0..p1 sees, and [full_lo, full_hi) that all of them see whole.

    The columns of one query are an interval, and its borders grow with the position: the union is bounded by the first query's first
    and the last one's last column, the intersection by the reverse.
    """
    full_first = first
    full_end = end
    if right is not None:
        end = tl.minimum(end, p1 + right - kv_offset + 1)
        full_end = tl.minimum(full_end, p0 + right - kv_offset + 1)
    if left is not None:
        full_first = tl.maximum(full_first, p1 - left - kv_offset)
        first = tl.maximum(first, p0 - left - kv_offset)
    if chunk is not None:
        c0 = floor_to(p0 - shift, chunk) + shift - kv_offset
        c1 = floor_to(p1 - shift, chunk) + shift - kv_offset
        first = tl.maximum(first, c0)
        full_first = tl.maximum(full_first, c1)
        end = tl.minimum(end, c1 + chunk)
        full_end = tl.minimum(full_end, c0 + chunk)
    lo = first // BLOCK
    hi = tl.maximum((tl.maximum(end, 0) + BLOCK - 1) // BLOCK, lo)
    full_lo = tl.minimum((full_first + BLOCK - 1) // BLOCK, hi)
    full_hi = tl.minimum(tl.maximum(tl.maximum(full_end, 0) // BLOCK, full_lo), hi)
    return lo, hi, full_lo, full_hi


@triton.jit
def query_range(c0, c1, first, end, q_length, q_offset, kv_offset, right, left, chunk, shift, BLOCK: tl.constexpr):
    """Tiles of queries that see any of the columns c0..c1, and those whose every query sees them all: `key_range` from the other side."""
    lo_row = 0
    end_row = q_length
    full_row = 0
    full_end = q_length
    back = kv_offset - q_offset
    if right is not None:
        lo_row = tl.maximum(lo_row, c0 + back - right)
        full_row = tl.maximum(full_row, c1 + back - right)
    if left is not None:
        end_row = tl.minimum(end_row, c1 + back + left + 1)
        full_end = tl.minimum(full_end, c0 + back + left + 1)
    if chunk is not None:
        k0 = floor_to(c0 + kv_offset - shift, chunk) + shift - q_offset
        k1 = floor_to(c1 + kv_offset - shift, chunk) + shift - q_offset
        lo_row = tl.maximum(lo_row, k0)
        full_row = tl.maximum(full_row, k1)
        end_row = tl.minimum(end_row, k1 + chunk)
        full_end = tl.minimum(full_end, k0 + chunk)
    # Columns outside the row of the batch are seen by nobody.
    end_row = tl.where((c1 < first) | (c0 >= end), 0, end_row)
    full_end = tl.where((c0 < first) | (c1 >= end), 0, full_end)
    lo = lo_row // BLOCK
    hi = tl.maximum((tl.maximum(end_row, 0) + BLOCK - 1) // BLOCK, lo)
    full_lo = tl.minimum((full_row + BLOCK - 1) // BLOCK, hi)
    full_hi = tl.minimum(tl.maximum(tl.maximum(full_end, 0) // BLOCK, full_lo), hi)
    return lo, hi, full_lo, full_hi


@triton.jit
def visible(i, j, b, h, conditions):
    """bool, broadcast of i and j: the rule of `TileMask`, condition by condition. Rows past the end may come out either way."""
    (
        first, end, q_offset, kv_offset, right, left, chunk, shift, q_length, kv_length, key_mask, q_segments, k_segments, cells, patterns,
        mask_b, q_segments_b, k_segments_b, cells_b, cells_h, cells_i, start_i, start_j, BLOCK_I, BLOCK_J,
    ) = conditions  # fmt: skip
    seen = (j >= first) & (j < end)
    qpos = i + q_offset
    kpos = j + kv_offset
    if right is not None:
        seen = seen & (kpos <= qpos + right)
    if left is not None:
        seen = seen & (kpos >= qpos - left)
    if chunk is not None:
        seen = seen & (floor_to(kpos - shift, chunk) == floor_to(qpos - shift, chunk))
    if key_mask is not None:
        seen = seen & (tl.load(key_mask + b * mask_b + j, mask=j < kv_length, other=0) != 0)
    if q_segments is not None:
        mine = tl.load(q_segments + b * q_segments_b + i, mask=i < q_length, other=-1)
        theirs = tl.load(k_segments + b * k_segments_b + j, mask=j < kv_length, other=-2)
        seen = seen & (mine == theirs)
    if cells is not None:
        inside = (i < q_length) & (j < kv_length)
        row = i + start_i
        column = j + start_j
        at = cells + b * cells_b + h * cells_h + (row // BLOCK_I) * cells_i + column // BLOCK_J
        cell = tl.load(at, mask=inside, other=0).to(tl.int64)
        # Eight columns in a byte, the leftmost in the lowest bit.
        byte = patterns + (cell * BLOCK_I + row % BLOCK_I) * (BLOCK_J // 8) + column % BLOCK_J // 8
        seen = seen & (((tl.load(byte, mask=inside, other=0).to(tl.int32) >> (column % 8)) & 1) != 0)
    return seen


@triton.jit
def finish(raw, i, j, b, h, scale, softcap, bias, bias_strides, q_length, kv_length):
    """Scores in units of log2(e) from raw products, and tanh of the capped ones (else the scores again) for the derivative."""
    if softcap is not None:
        capped = tanh(raw * (scale / softcap))
        scores = capped * (softcap * LOG2E)
    else:
        scores = raw * (scale * LOG2E)
        capped = scores
    if bias is not None:
        zero = tl.zeros((), tl.int64)  # offsets of a bias pass 32 bits
        at = bias + (zero + b) * bias_strides[0] + (zero + h) * bias_strides[1]
        at = at + (zero + i) * bias_strides[2] + (zero + j) * bias_strides[3]
        scores += tl.load(at, mask=(i < q_length) & (j < kv_length), other=0).to(tl.float32) * LOG2E
    return scores, capped


@triton.jit
def mixed(x):
    """The 32-bit mixer of `torchwrap.attention.dropout`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def kept(i, j, pair, dropout):
    """Weights that dropout leaves, as `torchwrap.attention.dropout.factors` has them; `pair` is batch row * Hq + head."""
    low, high, threshold = dropout[0].to(tl.uint32), dropout[1].to(tl.uint32), dropout[2].to(tl.uint32)
    state = mixed(mixed(pair.to(tl.uint32) + high) ^ low)
    state = mixed(state + mixed(i.to(tl.uint32) ^ 0x9E3779B9))
    return mixed(state + j.to(tl.uint32) * 0x85EBCA6B) >= threshold


@triton.jit
def rows(pointer, stride, index, d, first, end, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, CHECKED: tl.constexpr, table=None):
    """A tile of vectors. `index` and `d` come shaped for the wanted orientation; what lies outside [first, end) is not touched and is 0.

    With a table, vector `index` is in row `table[index]` of the memory.
    """
    place = index
    if table is not None:
        place = tl.load(table + index, mask=(index >= first) & (index < end), other=0)
    at = pointer + place.to(tl.int64) * stride + d
    if CHECKED:
        inside = (index >= first) & (index < end)
        tile = tl.load(at, mask=inside, other=0.0) if WIDTH == BLOCK_D else tl.load(at, mask=inside & (d < WIDTH), other=0.0)
    else:
        tile = tl.load(at) if WIDTH == BLOCK_D else tl.load(at, mask=d < WIDTH, other=0.0)
    return tile


@triton.jit
def product(x, y, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """x @ y in float32. WIDEN: the operands as float32 too, where the machine has no product of their dtype (see `blocks.widen`)."""
    if WIDEN:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, input_precision=PRECISION)
