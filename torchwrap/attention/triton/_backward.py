"""Backward in three passes without atomic additions, so that gradients are the same bits in every run.

T. Dao, "FlashAttention-2", 2023, algorithm 2, cut in two: one pass owns tiles of keys and walks over the queries that see them (dK, dV),
one owns tiles of queries and walks over their keys (dQ); both recompute the weights from the logarithm of their sum. With
`delta = rowsum(dO * O) - dLSE` (first pass): `P = exp(S - LSE)`, `dV = P^T dO`, `dS = P * (dO V^T - delta)`, under a cap times
`1 - tanh^2`, `dQ = scale * dS K`, `dK = scale * dS^T Q`. A query that saw nothing has LSE = -inf; read as +inf it gets weights of zero.

The pass over keys adds up the heads of a group in its registers. A bias that several rows, heads or batch rows share gets its gradient in a
pass of its own that owns tiles of the bias, for the same reason. Traffic: as forward, about `2 (D + Dv)` elements per tile of each pass.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchwrap.attention.triton._scores import (
    LOG2E,
    VARYING,
    finish,
    kept,
    key_range,
    offset_of,
    product,
    query_range,
    row_of_batch,
    rows,
    visible,
)  # fmt: skip

__all__ = ["bias_kernel", "keys_kernel", "prepare_kernel", "queries_kernel"]


@triton.jit
def prepare_kernel(
    out, grad_out, grad_lse, delta, stride_ob, stride_oh, stride_oi, stride_gb, stride_gh, stride_gi, stride_lb, stride_lh, stride_li,
    q_length, HEADS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries * B * Hq): delta, float32 `[B, Hq, Sq]`."""
    tiles = tl.cdiv(q_length, BLOCK_M)
    i = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    b = pair // HEADS
    h = pair % HEADS
    dv = tl.arange(0, BLOCK_DV)
    mine = rows(out + b * stride_ob + h * stride_oh, stride_oi, i[:, None], dv[None, :], 0, q_length, DV, BLOCK_DV, True)
    theirs = rows(grad_out + b * stride_gb + h * stride_gh, stride_gi, i[:, None], dv[None, :], 0, q_length, DV, BLOCK_DV, True)
    result = tl.sum(mine.to(tl.float32) * theirs.to(tl.float32), 1)
    if grad_lse is not None:
        result -= tl.load(grad_lse + b * stride_lb + h * stride_lh + i * stride_li, mask=i < q_length, other=0.0)
    tl.store(delta + pair * q_length + i, result, mask=i < q_length)


@triton.jit
def _sums(lse, delta, row, i, q_length):
    """LSE in units of log2(e), +inf where a query saw nothing or is none, and delta."""
    sums = tl.load(lse + row + i, mask=i < q_length, other=-float("inf"))
    sums = tl.where(sums == -float("inf"), float("inf"), sums * LOG2E)
    return sums, tl.load(delta + row + i, mask=i < q_length, other=0.0)


@triton.jit
def _weights(
    raw, products, sums, delta, i, j, b, h, pair, scale, softcap, bias, bias_strides, conditions, dropout, keep, MASKED: tl.constexpr
):  # fmt: skip
    """Of one tile, from q k^T and dO v^T: the weights as they met the values, dS before the cap (for a bias) and after it."""
    scores, capped = finish(raw, i, j, b, h, scale, softcap, bias, bias_strides, conditions[8], conditions[9])
    if MASKED:
        scores = tl.where(visible(i, j, b, h, conditions), scores, -float("inf"))
    weights = tl.exp2(scores - sums)
    used = weights
    if keep is not None:
        stays = kept(i, j, pair, dropout)
        used = tl.where(stays, weights * keep, 0.0)
        products = tl.where(stays, products * keep, 0.0)
    outer = weights * (products - delta)
    inner = outer
    if softcap is not None:
        inner = outer * (1 - capped * capped)
    return used, outer, inner


@triton.jit
def _queries(
    grad_k, grad_v, key, value, q, grad_out, stride_qi, stride_gi, i0, j, b, h, pair, lse, delta, d, dv, scale, softcap, bias, bias_strides,
    conditions, dropout, keep, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of queries for the keys j; everything transposed, so that the weights need not change places before the products."""
    q_length = conditions[8]
    i = i0 + tl.arange(0, BLOCK_M)
    query = rows(q, stride_qi, i[None, :], d[:, None], 0, q_length, D, BLOCK_D, MASKED)
    outgoing = rows(grad_out, stride_gi, i[:, None], dv[None, :], 0, q_length, DV, BLOCK_DV, MASKED)
    sums, less = _sums(lse, delta, pair.to(tl.int64) * q_length, i, q_length)
    raw = product(key, query, PRECISION, WIDEN)
    products = product(value, tl.trans(outgoing), PRECISION, WIDEN)
    used, _, inner = _weights(
        raw, products, sums[None, :], less[None, :], i[None, :], j[:, None], b, h, pair, scale, softcap, bias, bias_strides, conditions,
        dropout, keep, MASKED,
    )  # fmt: skip
    if not WIDEN:
        used = used.to(outgoing.dtype)
        inner = inner.to(query.dtype)
    grad_v += product(used, outgoing, PRECISION, WIDEN)
    grad_k += product(inner, tl.trans(query), PRECISION, WIDEN)
    return grad_k, grad_v


@triton.jit(do_not_specialize=VARYING)
def keys_kernel(
    q, k, v, grad_out, lse, delta, bias, grad_k, grad_v,
    q_offset_tensor, kv_start, kv_end, shifts, key_mask, q_segments, k_segments, tile_bounds, cells, patterns,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_kj, stride_vb, stride_vh, stride_vj,
    stride_gb, stride_gh, stride_gi, stride_dkb, stride_dkh, stride_dkj, stride_dvb, stride_dvh, stride_dvj,
    bias_b, bias_h, bias_i, bias_j, start_b, end_b, shift_b, mask_b,
    q_segments_b, k_segments_b, cells_b, cells_h, cells_i, start_i, start_j, bounds_b, scale, softcap, keep, seed_low, seed_high, threshold,
    q_length, kv_length, q_offset, kv_offset, right, left, chunk,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, ALL_EDGES: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of keys * B * Hkv): dK and dV. With `tile_bounds` (BLOCK_M x BLOCK_N), queries that miss the keys are skipped."""
    tiles = tl.cdiv(kv_length, BLOCK_N)
    tile = tl.program_id(0) % tiles
    pair_kv = tl.program_id(0) // tiles
    b = pair_kv // (HEADS // GROUP)
    h_kv = pair_kv % (HEADS // GROUP)
    b64 = b.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    position = offset_of(q_offset, q_offset_tensor)
    first, end, shift = row_of_batch(b, kv_length, kv_start, kv_end, shifts, start_b, end_b, shift_b)
    key = rows(k + b64 * stride_kb + h_kv.to(tl.int64) * stride_kh, stride_kj, j[:, None], d[None, :], first, end, D, BLOCK_D, True)
    value = rows(v + b64 * stride_vb + h_kv.to(tl.int64) * stride_vh, stride_vj, j[:, None], dv[None, :], first, end, DV, BLOCK_DV, True)
    last = tl.minimum(tile * BLOCK_N + BLOCK_N, kv_length) - 1
    lo, hi, full_lo, full_hi = query_range(
        tile * BLOCK_N, last, first, end, q_length, position, kv_offset, right, left, chunk, shift, BLOCK_M
    )
    # A tile that ends behind the last key needs its comparisons: the keys there are zeros, not hidden.
    if tile * BLOCK_N + BLOCK_N > kv_length:
        full_lo = lo
        full_hi = lo
    if ALL_EDGES or tile_bounds is not None:
        full_lo = lo
        full_hi = lo
    conditions = (
        first, end, position, kv_offset, right, left, chunk, shift, q_length, kv_length, key_mask, q_segments, k_segments, cells, patterns,
        mask_b, q_segments_b, k_segments_b, cells_b, cells_h, cells_i, start_i, start_j, BLOCK_I, BLOCK_J,
    )  # fmt: skip
    dropout = (seed_low, seed_high, threshold)
    bias_strides = (bias_b, bias_h, bias_i, bias_j)
    sum_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sum_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in tl.range(0, GROUP):
        h = h_kv * GROUP + member
        pair = b * HEADS + h
        q_head = q + b64 * stride_qb + h.to(tl.int64) * stride_qh
        g_head = grad_out + b64 * stride_gb + h.to(tl.int64) * stride_gh
        for whole in tl.range(full_lo, full_hi):
            sum_k, sum_v = _queries(
                sum_k, sum_v, key, value, q_head, g_head, stride_qi, stride_gi, whole * BLOCK_M, j, b, h, pair, lse, delta, d, dv, scale,
                softcap, bias, bias_strides, conditions, dropout, keep, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, PRECISION, WIDEN, False,
            )  # fmt: skip
        before = full_lo - lo
        for edge in tl.range(0, before + hi - full_hi):
            at = tl.where(edge < before, lo + edge, full_hi + edge - before)
            visit = True
            if tile_bounds is not None:
                bounds = tile_bounds + b * bounds_b + at * 4
                visit = (tl.load(bounds) <= tile) & (tile < tl.load(bounds + 1))
            if visit:
                sum_k, sum_v = _queries(
                    sum_k, sum_v, key, value, q_head, g_head, stride_qi, stride_gi, at * BLOCK_M, j, b, h, pair, lse, delta, d, dv, scale,
                    softcap, bias, bias_strides, conditions, dropout, keep, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, PRECISION, WIDEN, True,
                )  # fmt: skip
    there = (j < kv_length)[:, None]
    at_k = grad_k + b64 * stride_dkb + h_kv.to(tl.int64) * stride_dkh + j.to(tl.int64)[:, None] * stride_dkj + d[None, :]
    at_v = grad_v + b64 * stride_dvb + h_kv.to(tl.int64) * stride_dvh + j.to(tl.int64)[:, None] * stride_dvj + dv[None, :]
    tl.store(at_k, (sum_k * scale).to(grad_k.dtype.element_ty), mask=there & (d < D)[None, :])
    tl.store(at_v, sum_v.to(grad_v.dtype.element_ty), mask=there & (dv < DV)[None, :])


@triton.jit
def _keys(
    grad_q, query, outgoing, k, v, stride_kj, stride_vj, j0, i, b, h, pair, sums, less, d, dv, scale, softcap, bias, bias_strides,
    conditions, dropout, keep, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys for the queries i."""
    j = j0 + tl.arange(0, BLOCK_N)
    key = rows(k, stride_kj, j[None, :], d[:, None], conditions[0], conditions[1], D, BLOCK_D, MASKED)
    value = rows(v, stride_vj, j[None, :], dv[:, None], conditions[0], conditions[1], DV, BLOCK_DV, MASKED)
    raw = product(query, key, PRECISION, WIDEN)
    products = product(outgoing, value, PRECISION, WIDEN)
    _, _, inner = _weights(
        raw, products, sums[:, None], less[:, None], i[:, None], j[None, :], b, h, pair, scale, softcap, bias, bias_strides, conditions,
        dropout, keep, MASKED,
    )  # fmt: skip
    if not WIDEN:
        inner = inner.to(key.dtype)
    return grad_q + product(inner, tl.trans(key), PRECISION, WIDEN)


@triton.jit(do_not_specialize=VARYING)
def queries_kernel(
    q, k, v, grad_out, lse, delta, bias, grad_q,
    q_offset_tensor, kv_start, kv_end, shifts, key_mask, q_segments, k_segments, tile_bounds, cells, patterns,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_kj, stride_vb, stride_vh, stride_vj,
    stride_gb, stride_gh, stride_gi, stride_dqb, stride_dqh, stride_dqi,
    bias_b, bias_h, bias_i, bias_j, start_b, end_b, shift_b, mask_b,
    q_segments_b, k_segments_b, cells_b, cells_h, cells_i, start_i, start_j, bounds_b, scale, softcap, keep, seed_low, seed_high, threshold,
    q_length, kv_length, q_offset, kv_offset, right, left, chunk,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, ALL_EDGES: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries * B * Hq): dQ."""
    tiles = tl.cdiv(q_length, BLOCK_M)
    tile = tl.program_id(0) % tiles
    pair = tl.program_id(0) // tiles
    if right is not None:
        tile = tiles - 1 - tile
    b = pair // HEADS
    h = pair % HEADS
    b64 = b.to(tl.int64)
    h64 = h.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = rows(q + b64 * stride_qb + h64 * stride_qh, stride_qi, i[:, None], d[None, :], 0, q_length, D, BLOCK_D, True)
    outgoing = rows(grad_out + b64 * stride_gb + h64 * stride_gh, stride_gi, i[:, None], dv[None, :], 0, q_length, DV, BLOCK_DV, True)
    sums, less = _sums(lse, delta, pair.to(tl.int64) * q_length, i, q_length)
    k += b64 * stride_kb + (h // GROUP).to(tl.int64) * stride_kh
    v += b64 * stride_vb + (h // GROUP).to(tl.int64) * stride_vh
    position = offset_of(q_offset, q_offset_tensor)
    first, end, shift = row_of_batch(b, kv_length, kv_start, kv_end, shifts, start_b, end_b, shift_b)
    if tile_bounds is not None:
        bounds = tile_bounds + b * bounds_b + tile * 4
        lo, hi, full_lo, full_hi = tl.load(bounds), tl.load(bounds + 1), tl.load(bounds + 2), tl.load(bounds + 3)
    else:
        p0 = position + tile * BLOCK_M
        p1 = position + tl.minimum(tile * BLOCK_M + BLOCK_M, q_length) - 1
        lo, hi, full_lo, full_hi = key_range(p0, p1, first, end, kv_offset, right, left, chunk, shift, BLOCK_N)
    if ALL_EDGES:
        full_lo = lo
        full_hi = lo
    conditions = (
        first, end, position, kv_offset, right, left, chunk, shift, q_length, kv_length, key_mask, q_segments, k_segments, cells, patterns,
        mask_b, q_segments_b, k_segments_b, cells_b, cells_h, cells_i, start_i, start_j, BLOCK_I, BLOCK_J,
    )  # fmt: skip
    dropout = (seed_low, seed_high, threshold)
    bias_strides = (bias_b, bias_h, bias_i, bias_j)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for whole in tl.range(full_lo, full_hi):
        total = _keys(
            total, query, outgoing, k, v, stride_kj, stride_vj, whole * BLOCK_N, i, b, h, pair, sums, less, d, dv, scale, softcap, bias,
            bias_strides, conditions, dropout, keep, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, WIDEN, False,
        )  # fmt: skip
    before = full_lo - lo
    for edge in tl.range(0, before + hi - full_hi):
        j0 = tl.where(edge < before, lo + edge, full_hi + edge - before) * BLOCK_N
        total = _keys(
            total, query, outgoing, k, v, stride_kj, stride_vj, j0, i, b, h, pair, sums, less, d, dv, scale, softcap, bias, bias_strides,
            conditions, dropout, keep, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, WIDEN, True,
        )  # fmt: skip
    at = grad_q + b64 * stride_dqb + h64 * stride_dqh + i.to(tl.int64)[:, None] * stride_dqi + d[None, :]
    tl.store(at, (total * scale).to(grad_q.dtype.element_ty), mask=(i < q_length)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=VARYING)
def bias_kernel(
    q, k, v, grad_out, lse, delta, bias, grad_bias,
    q_offset_tensor, kv_start, kv_end, shifts, key_mask, q_segments, k_segments, tile_bounds, cells, patterns,
    stride_qb, stride_qh, stride_qi, stride_kb, stride_kh, stride_kj, stride_vb, stride_vh, stride_vj, stride_gb, stride_gh, stride_gi,
    bias_b, bias_h, bias_i, bias_j, start_b, end_b, shift_b, mask_b,
    q_segments_b, k_segments_b, cells_b, cells_h, cells_i, start_i, start_j, bounds_b, scale, softcap, keep, seed_low, seed_high, threshold,
    q_length, kv_length, q_offset, kv_offset, right, left, chunk, batch, owners, shared_heads,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, ALL_EDGES: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries, or 1 with ONE_ROW, * tiles of keys * batch rows * heads of the bias): dS added up over all that share it.

    `owners` is the number of batch rows of the bias, `shared_heads` that of heads which read one head of it; `grad_bias` is contiguous.
    """
    tiles = tl.cdiv(kv_length, BLOCK_N)
    rows_of_tiles = tl.cdiv(q_length, BLOCK_M)
    own_tiles = 1 if ONE_ROW else rows_of_tiles
    tile = tl.program_id(0) % tiles
    own_tile = tl.program_id(0) // tiles % own_tiles
    owner = tl.program_id(0) // tiles // own_tiles
    bias_heads = HEADS // shared_heads
    b_first = owner // bias_heads
    h_first = (owner % bias_heads) * shared_heads
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    position = offset_of(q_offset, q_offset_tensor)
    dropout = (seed_low, seed_high, threshold)
    bias_strides = (bias_b, bias_h, bias_i, bias_j)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in tl.range(b_first, batch, owners):
        first, end, shift = row_of_batch(b, kv_length, kv_start, kv_end, shifts, start_b, end_b, shift_b)
        conditions = (
            first, end, position, kv_offset, right, left, chunk, shift, q_length, kv_length, key_mask, q_segments, k_segments, cells,
            patterns, mask_b, q_segments_b, k_segments_b, cells_b, cells_h, cells_i, start_i, start_j, BLOCK_I, BLOCK_J,
        )  # fmt: skip
        for h in tl.range(h_first, h_first + shared_heads):
            # Loop variables are plain numbers in the interpreter.
            b64 = tl.full((), 0, tl.int64) + b
            h64 = tl.full((), 0, tl.int64) + h
            pair = b64 * HEADS + h64
            kv = h64 // GROUP
            key = rows(k + b64 * stride_kb + kv * stride_kh, stride_kj, j[None, :], d[:, None], first, end, D, BLOCK_D, True)
            value = rows(v + b64 * stride_vb + kv * stride_vh, stride_vj, j[None, :], dv[:, None], first, end, DV, BLOCK_DV, True)
            for step in tl.range(own_tile, rows_of_tiles, own_tiles):
                i = step * BLOCK_M + tl.arange(0, BLOCK_M)
                query = rows(q + b64 * stride_qb + h64 * stride_qh, stride_qi, i[:, None], d[None, :], 0, q_length, D, BLOCK_D, True)
                g_head = grad_out + b64 * stride_gb + h64 * stride_gh
                outgoing = rows(g_head, stride_gi, i[:, None], dv[None, :], 0, q_length, DV, BLOCK_DV, True)
                sums, less = _sums(lse, delta, pair * q_length, i, q_length)
                raw = product(query, key, PRECISION, WIDEN)
                products = product(outgoing, value, PRECISION, WIDEN)
                _, outer, _ = _weights(
                    raw, products, sums[:, None], less[:, None], i[:, None], j[None, :], b, h, pair, scale, softcap, bias, bias_strides,
                    conditions, dropout, keep, True,
                )  # fmt: skip
                total += outer
    if ONE_ROW:
        at = grad_bias + owner.to(tl.int64) * kv_length + j
        tl.store(at, tl.sum(total, 0), mask=j < kv_length)
    else:
        i = own_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        at = grad_bias + (owner.to(tl.int64) * q_length + i[:, None]) * kv_length + j[None, :]
        tl.store(at, total, mask=(i < q_length)[:, None] & (j < kv_length)[None, :])
