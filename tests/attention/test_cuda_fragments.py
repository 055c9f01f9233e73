"""The layout of the Volta and Turing kernels, simulated: which lane holds what before and after every step of S = Q K^T, P, O = P V.

Numbers are float64 and lanes are an axis of length 32, so a wrong map gives a wrong product and nothing hides in rounding. The maps of the
instructions are those of the PTX manual; the steps between them are those of kernels/volta.cuh and kernels/turing.cuh.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

Array = npt.NDArray[np.float64]
LANE = np.arange(32)
WIDTH, KEYS = 64, 32


def m8n8k4(a: Array, b: Array, c: Array, b_rows: bool) -> Array:
    """Four products 8x8x4, one per quad-pair: a[32, 4], b[32, 4], c[32, 8] as the lanes hold them."""
    result = c.copy()
    for pair in range(4):
        lanes = [lane for lane in range(32) if lane % 16 // 4 == pair]
        left, right = np.zeros((8, 4)), np.zeros((4, 8))
        for lane in lanes:
            high = 4 * (lane >= 16)
            left[lane % 4 + high] = a[lane]
            if b_rows:
                right[lane % 4, high : high + 4] = b[lane]
            else:
                right[:, lane % 4 + high] = b[lane]
        product = left @ right
        for lane in lanes:
            for i in range(8):
                result[lane, i] += product[(lane & 1) + (i & 2) + 4 * (lane >= 16), (i & 4) + (lane & 2) + (i & 1)]
    return result


def m16n8k8(a: Array, b: Array, c: Array) -> Array:
    """One product 16x8x8: a[32, 4], b[32, 2], c[32, 4]."""
    left, right = np.zeros((16, 8)), np.zeros((8, 8))
    for lane in range(32):
        group, member = divmod(lane, 4)
        left[group, 2 * member : 2 * member + 2], left[group + 8, 2 * member : 2 * member + 2] = a[lane, :2], a[lane, 2:]
        right[2 * member : 2 * member + 2, group] = b[lane]
    product, result = left @ right, c.copy()
    for lane in range(32):
        group, member = divmod(lane, 4)
        result[lane] += [product[group + 8 * (i // 2), 2 * member + i % 2] for i in range(4)]
    return result


def volta(q: Array, k: Array, v: Array) -> Array:
    """O of one warp: 32 rows, the quad-pairs on top of each other."""
    rows = 8 * (LANE // 4 % 4) + LANE % 4 + 4 * (LANE // 16)
    columns = LANE % 4 + 4 * (LANE // 16)
    scores = np.zeros((KEYS // 8, 32, 8))
    for unit in range(0, WIDTH, 8):
        for half in (unit, unit + 4):
            for n in range(KEYS // 8):
                scores[n] = m8n8k4(q[rows, half : half + 4], k[8 * n + columns, half : half + 4], scores[n], b_rows=False)
    p = np.exp2(scores)
    sums = np.zeros((WIDTH // 8, 32, 8))
    second = (LANE & 2 != 0)[:, None]
    for n in range(KEYS // 8):
        for half in range(2):
            first_row, second_row = p[n][:, 4 * half : 4 * half + 2], p[n][:, 4 * half + 2 : 4 * half + 4]
            kept = np.where(second, second_row, first_row)
            got = np.where(second, first_row, second_row)[LANE ^ 2]  # the one shuffle
            operand = np.concatenate([np.where(second, got, kept), np.where(second, kept, got)], axis=1)
            row = 8 * n + 4 * half + LANE % 4
            for pair in range(WIDTH // 16):
                loaded = np.stack([v[row[lane], 16 * pair + 8 * (lane // 16) :][:8] for lane in range(32)])
                sums[2 * pair] = m8n8k4(operand, loaded[:, :4], sums[2 * pair], b_rows=True)
                sums[2 * pair + 1] = m8n8k4(operand, loaded[:, 4:], sums[2 * pair + 1], b_rows=True)
    out = np.full((32, WIDTH), np.nan)
    for lane in range(32):
        for tile in range(WIDTH // 8):
            for i in range(8):
                row = 2 * (lane & 12) + (lane & 1) + 2 * (i >> 1 & 1) + 4 * (lane >> 4)
                column = (i & 4) + (lane & 2) + (i & 1)
                out[row, 16 * (tile >> 1) + 8 * (column >> 2) + 4 * (tile & 1) + (column & 3)] = sums[tile, lane, i]
    return out


def turing(q: Array, k: Array, v: Array) -> Array:
    """O of one warp: 16 rows."""
    group, member = LANE // 4, 2 * (LANE % 4)
    neighbours = member[:, None] + np.arange(2)
    scores = np.zeros((KEYS // 8, 32, 4))
    for unit in range(0, WIDTH, 8):
        left = np.concatenate([q[group[:, None], unit + neighbours], q[group[:, None] + 8, unit + neighbours]], axis=1)
        for n in range(KEYS // 8):
            scores[n] = m16n8k8(left, k[8 * n + group[:, None], unit + neighbours], scores[n])
    p = np.exp2(scores)
    sums = np.zeros((WIDTH // 8, 32, 4))
    for n in range(KEYS // 8):
        for tile in range(WIDTH // 8):  # the accumulator map is the operand map: p goes in as it came out
            sums[tile] = m16n8k8(p[n], v[8 * n + neighbours, 8 * tile + group[:, None]], sums[tile])
    out = np.full((16, WIDTH), np.nan)
    for lane in range(32):
        for tile in range(WIDTH // 8):
            for i in range(4):
                out[lane // 4 + 8 * (i // 2), 8 * tile + 2 * (lane % 4) + i % 2] = sums[tile, lane, i]
    return out


@pytest.mark.parametrize(("warp", "rows"), [(volta, 32), (turing, 16)], ids=["volta", "turing"])
def test_a_warp_computes_exp2_of_q_k_transposed_times_v(warp: object, rows: int) -> None:
    random = np.random.default_rng(0)
    q, k, v = random.normal(size=(rows, WIDTH)) / 8, random.normal(size=(KEYS, WIDTH)), random.normal(size=(KEYS, WIDTH))
    assert callable(warp)
    np.testing.assert_allclose(warp(q, k, v), np.exp2(q @ k.T) @ v, rtol=0, atol=1e-12)


def conflicts(addresses: npt.NDArray[np.int64]) -> int:
    """How often the busiest bank group is visited when eight lanes load 16 bytes each from different addresses."""
    groups = np.unique(addresses) % 8
    return int(np.bincount(groups, minlength=8).max())


def volta_unit(row: npt.NDArray[np.int64], unit: int, units: int) -> npt.NDArray[np.int64]:
    return row * units + (unit ^ (row & 3 | row >> 1 & 4))


@pytest.mark.parametrize("units", [8, 16], ids=["64 wide", "128 wide"])
def test_loads_of_eight_lanes_never_meet_in_a_bank(units: int) -> None:
    rows = 8 * (LANE // 4 % 4) + LANE % 4 + 4 * (LANE // 16)
    columns = LANE % 4 + 4 * (LANE // 16)
    for unit in range(units):
        for phase in range(0, 32, 8):
            lanes = slice(phase, phase + 8)
            assert conflicts(volta_unit(rows[lanes], unit, units)) == 1, "first operand"
            assert conflicts(volta_unit(columns[lanes], unit, units)) == 1, "rows of K"
            assert conflicts(volta_unit(LANE[lanes] % 4, unit, units)) == 1, "rows of V"
        turing_rows = np.arange(8)
        assert conflicts(turing_rows * units + (unit ^ (turing_rows & 7))) == 1, "one 8x8 matrix"
