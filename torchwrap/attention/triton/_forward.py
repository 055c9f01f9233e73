"""Forward: one program owns BLOCK_M queries and walks over the tiles of keys they see, with a running maximum and sum.

T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023, algorithm 1; for few queries the keys are
cut into parts that other programs take, and `combine_kernel` merges (T. Dao et al., "Flash-Decoding for long-context inference", 2023).
Tiles that every query sees whole come first and without any comparison, then the ones on a border; the rest is never visited
(R. Shah's Tiling-mask, in FastAttention, arXiv 2410.16663, 2024).

Tiling: with PACK > 1 the queries of PACK heads that share keys stand beside each other in one tile, row r being query r // PACK of head
r % PACK, so that decoding reads the cache once for the whole group. Traffic per program: BLOCK_M * D for queries, (D + Dv) * keys seen
for keys and values; summed, `B * Hq / PACK * ceil(Sq * PACK / BLOCK_M) * seen * (D + Dv)` elements, most of it from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchwrap.attention.triton._scores import LN2, LOG2E, VARYING, finish, kept, key_range, offset_of, product, row_of_batch, rows, visible

__all__ = ["combine_kernel", "forward_kernel"]


@triton.jit
def _attend(
    accumulated, top, total, query, k, v, stride_k, stride_v, j0, i, b, h, pair, d, dv, scale, softcap, bias, bias_strides, conditions,
    dropout, keep, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, MASKED: tl.constexpr, table,
):  # fmt: skip
    """One tile of keys from column j0: the online softmax."""
    first, end = conditions[0], conditions[1]
    q_length, kv_length = conditions[8], conditions[9]
    columns = j0 + tl.arange(0, BLOCK_N)
    key = rows(k, stride_k, columns[None, :], d[:, None], first, end, D, BLOCK_D, MASKED, table)
    raw = product(query, key, PRECISION, WIDEN)
    scores, _ = finish(raw, i[:, None], columns[None, :], b, h[:, None], scale, softcap, bias, bias_strides, q_length, kv_length)
    if MASKED:
        scores = tl.where(visible(i[:, None], columns[None, :], b, h[:, None], conditions), scores, -float("inf"))
    highest = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen nothing has no maximum: -inf - -inf would be NaN.
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    weights = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(weights, 1)
    if keep is not None:
        weights = tl.where(kept(i[:, None], columns[None, :], pair[:, None], dropout), weights * keep, 0.0)
    value = rows(v, stride_v, columns[:, None], dv[None, :], first, end, DV, BLOCK_DV, MASKED, table)
    accumulated = accumulated * fade[:, None]
    if not WIDEN:
        weights = weights.to(value.dtype)
    accumulated += product(weights, value, PRECISION, WIDEN)
    return accumulated, highest, total


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q, k, v, out, lse, sinks, bias,
    q_offset_tensor, kv_start, kv_end, shifts, key_mask, q_segments, k_segments, tile_bounds, cells, patterns, table,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_kj, stride_vb, stride_vh, stride_vj,
    stride_os, stride_ob, stride_oh, stride_oi, stride_ls, bias_b, bias_h, bias_i, bias_j, start_b, end_b, shift_b, mask_b,
    q_segments_b, k_segments_b, cells_b, cells_h, cells_i, start_i, start_j, bounds_b, scale, softcap, keep, seed_low, seed_high, threshold,
    q_length, kv_length, q_offset, kv_offset, right, left, chunk,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    PARTIAL: tl.constexpr, ALL_EDGES: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows * B * Hq / PACK, parts). With PARTIAL, `out` and `lse` are float32 partials and sinks wait for the merge.

    With a `table`, key j is in row `table[j]` of the memory that k and v point to: keys in pages are read where they lie.

    The number of parts is no constant: it grows with the cache, and a compilation at every step of it would stall a generation.
    """
    tiles = tl.cdiv(q_length * PACK, BLOCK_M)
    tile = tl.program_id(0) % tiles
    pair = tl.program_id(0) // tiles
    split = tl.program_id(1)
    if right is not None:
        # The last queries see the most keys: started first, they do not hold up the end.
        tile = tiles - 1 - tile
    b = pair // (HEADS // PACK)
    h0 = (pair % (HEADS // PACK)) * PACK
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    i = r // PACK
    h = h0 + r % PACK
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    b64 = b.to(tl.int64)
    q += b64 * stride_qb
    k += b64 * stride_kb + (h0 // GROUP).to(tl.int64) * stride_kh
    v += b64 * stride_vb + (h0 // GROUP).to(tl.int64) * stride_vh
    there = i < q_length
    at = q + h.to(tl.int64)[:, None] * stride_qh + i.to(tl.int64)[:, None] * stride_qi + d[None, :]
    query = tl.load(at, mask=there[:, None] & (d < D)[None, :], other=0.0)

    position = offset_of(q_offset, q_offset_tensor)
    first, end, shift = row_of_batch(b, kv_length, kv_start, kv_end, shifts, start_b, end_b, shift_b)
    if tile_bounds is not None:
        bounds = tile_bounds + b * bounds_b + tile * 4
        lo, hi, full_lo, full_hi = tl.load(bounds), tl.load(bounds + 1), tl.load(bounds + 2), tl.load(bounds + 3)
    else:
        p0 = position + tile * BLOCK_M // PACK
        p1 = position + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // PACK, q_length - 1)
        lo, hi, full_lo, full_hi = key_range(p0, p1, first, end, kv_offset, right, left, chunk, shift, BLOCK_N)
    if ALL_EDGES:
        full_lo = lo
        full_hi = lo
    if PARTIAL:
        part = tl.cdiv(hi - lo, tl.num_programs(1))
        part_lo = tl.minimum(lo + split * part, hi)
        part_hi = tl.minimum(part_lo + part, hi)
        full_lo = tl.minimum(tl.maximum(full_lo, part_lo), part_hi)
        full_hi = tl.minimum(tl.maximum(full_hi, full_lo), part_hi)
        lo = part_lo
        hi = part_hi

    conditions = (
        first, end, position, kv_offset, right, left, chunk, shift, q_length, kv_length, key_mask, q_segments, k_segments, cells, patterns,
        mask_b, q_segments_b, k_segments_b, cells_b, cells_h, cells_i, start_i, start_j, BLOCK_I, BLOCK_J,
    )  # fmt: skip
    dropout = (seed_low, seed_high, threshold)
    bias_strides = (bias_b, bias_h, bias_i, bias_j)
    accumulated = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for whole in tl.range(full_lo, full_hi):
        accumulated, top, total = _attend(
            accumulated, top, total, query, k, v, stride_kj, stride_vj, whole * BLOCK_N, i, b, h, b * HEADS + h, d, dv, scale, softcap,
            bias, bias_strides, conditions, dropout, keep, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, WIDEN, False, table,
        )  # fmt: skip
    before = full_lo - lo
    for edge in tl.range(0, before + hi - full_hi):
        j0 = tl.where(edge < before, lo + edge, full_hi + edge - before) * BLOCK_N
        accumulated, top, total = _attend(
            accumulated, top, total, query, k, v, stride_kj, stride_vj, j0, i, b, h, b * HEADS + h, d, dv, scale, softcap,
            bias, bias_strides, conditions, dropout, keep, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, WIDEN, True, table,
        )  # fmt: skip
    if not PARTIAL and sinks is not None:
        # A sink is a key without a value (merge of a partial with out = 0, lse = sink).
        sink = tl.load(sinks + h).to(tl.float32) * LOG2E
        highest = tl.maximum(top, sink)
        level = tl.where(highest == -float("inf"), 0.0, highest)
        fade = tl.exp2(top - level)
        total = total * fade + tl.exp2(sink - level)
        accumulated = accumulated * fade[:, None]
        top = highest
    empty = total == 0.0
    result = accumulated / tl.where(empty, 1.0, total)[:, None]
    logsum = tl.where(empty, -float("inf"), top * LN2 + tl.log(tl.where(empty, 1.0, total)))
    at = out + split.to(tl.int64) * stride_os + b64 * stride_ob + h.to(tl.int64)[:, None] * stride_oh
    at += i.to(tl.int64)[:, None] * stride_oi + dv[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=there[:, None] & (dv < DV)[None, :])
    row = (b64 * HEADS + h) * q_length + i
    tl.store(lse + split.to(tl.int64) * stride_ls + row, logsum, mask=there)


@triton.jit(do_not_specialize=["q_length", "splits"])
def combine_kernel(
    partial, partial_lse, out, lse, sinks, stride_ps, stride_ls, stride_ob, stride_oh, stride_oi, q_length, splits,
    HEADS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hq * Sq): `out` and `lse` of one row from its `splits` partials, each read once; BLOCK_S is a power of two >= splits."""
    row = tl.program_id(0).to(tl.int64)
    i = row % q_length
    h = (row // q_length) % HEADS
    b = row // q_length // HEADS
    parts = tl.arange(0, BLOCK_S)
    sums = tl.load(partial_lse + parts * stride_ls + row, mask=parts < splits, other=-float("inf"))
    highest = tl.max(sums, 0)
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32)
        highest = tl.maximum(highest, sink)
    level = tl.where(highest == -float("inf"), 0.0, highest)
    total = tl.sum(tl.exp2((sums - level) * LOG2E), 0)
    if sinks is not None:
        total += tl.exp2((sink - level) * LOG2E)
    dv = tl.arange(0, BLOCK_DV)
    result = tl.zeros([BLOCK_DV], tl.float32)
    for part in tl.range(0, splits):
        weight = tl.exp2((tl.load(partial_lse + part * stride_ls + row) - level) * LOG2E)
        result += weight * tl.load(partial + part * stride_ps + row * DV + dv, mask=dv < DV, other=0.0)
    empty = total == 0.0
    result = result / tl.where(empty, 1.0, total)
    at = out + b * stride_ob + h * stride_oh + i * stride_oi + dv
    tl.store(at, result.to(out.dtype.element_ty), mask=dv < DV)
    tl.store(lse + row, tl.where(empty, -float("inf"), level + tl.log(tl.where(empty, 1.0, total))))
