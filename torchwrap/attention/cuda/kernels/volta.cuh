// Volta: a warp multiplies 32 rows with the four quad-pairs of mma.m8n8k4 stacked on top of each other, all sharing the second operand.
//
// Quad-pair p holds rows 8p ... 8p+7; lane l belongs to quad-pair (l / 4) % 4 and is in its upper half when l >= 16.
//   first operand, element i      row l%4 + 4*(l/16), k = i
//   second operand "col"          k = i, column l%4 + 4*(l/16): four neighbours of one row of K, so K is not transposed
//   second operand "row"          k = l%4, column i + 4*(l/16): four neighbours of one row of V, so V is not transposed either
//   accumulator, element i        row (l&1) + (i&2) + 4*(l/16), column (i&4) + (l&2) + (i&1)
// Probabilities go from the accumulator map to the first operand's with two shuffles per 8x8 tile and no shared memory: lanes l and l^2
// own the same two rows and complementary columns, so each gives away one row and completes the other.
// Shared-memory rows are units of 16 bytes, XOR-swizzled by row bits 0, 1 and 3: eight lanes that load together read rows r ... r+3 of two
// quad-pairs, that is of r and r+8. Source: PTX ISA 8.8, mma.m8n8k4; the layout change is derived here and simulated in the tests.
#pragma once
#include "shim.cuh"

constexpr int UNITS = HEAD / 8;  // 16-byte units of a row
constexpr int ROWS = 32;         // rows of a warp
constexpr int VALUES = 8;        // accumulator elements of a lane for 8 columns, in two rows ("slots")

DEVICE int unit_at(int row, int unit) { return row * UNITS + (unit ^ ((row & 3) | ((row >> 1) & 4))); }

DEVICE int slot_of(int i) { return (i >> 1) & 1; }
DEVICE int row_of(int slot) { return 2 * (lane_id() & 12) + (lane_id() & 1) + 2 * slot + 4 * (lane_id() >> 4); }
DEVICE int column_of(int i) { return (i & 4) + (lane_id() & 2) + (i & 1); }
// Columns of the sums are permuted within 16, see multiply_values; element i+1 is the right neighbour of an even i.
DEVICE int output_column(int tile, int i) {
    int column = column_of(i);
    return 16 * (tile >> 1) + 8 * (column >> 2) + 4 * (tile & 1) + (column & 3);
}

DEVICE float row_max(float x) { return fmaxf(x, shfl_xor(x, 2)); }
DEVICE float row_sum(float x) { return x + shfl_xor(x, 2); }

// acc[32, 8 N] += a[32, HEAD] b[8 N, HEAD]^T. One 16-byte load feeds two steps: both operands take the same four k of it.
template <int N>
DEVICE void multiply_rows(float (&acc)[N][VALUES], const uint4* a, int a_row, const uint4* b, int b_row) {
    const int lane = lane_id();
    const int column = (lane & 3) + 4 * (lane >> 4);
    const int row = a_row + 2 * (lane & 12) + column;
    _Pragma("unroll 2") for (int unit = 0; unit < UNITS; ++unit) {  // all of them at once would spill registers
        const uint4 left = a[unit_at(row, unit)];
        UNROLL for (int n = 0; n < N; ++n) {
            const uint4 right = b[unit_at(b_row + 8 * n + column, unit)];
            mma_m8n8k4_col(acc[n], left.x, left.y, right.x, right.y);
            mma_m8n8k4_col(acc[n], left.z, left.w, right.z, right.w);
        }
    }
}

// out[32, HEAD] += p[32, 8 N] b[8 N, HEAD]. A 16-byte load of a row of b serves two tiles: the lower half-warp holds the first 8 of 16
// columns, the upper half the last 8, and the tiles share them four by four.
template <int N>
DEVICE void multiply_values(float (&out)[UNITS][VALUES], const float (&p)[N][VALUES], const uint4* b, int b_row) {
    const int lane = lane_id();
    const bool second = lane & 2;
    UNROLL for (int n = 0; n < N; ++n) {
        UNROLL for (int half = 0; half < 2; ++half) {
            const unsigned first_row = pack(p[n][4 * half], p[n][4 * half + 1]);
            const unsigned second_row = pack(p[n][4 * half + 2], p[n][4 * half + 3]);
            const unsigned kept = second ? second_row : first_row;
            const unsigned got = shfl_xor(second ? first_row : second_row, 2);
            const unsigned a0 = second ? got : kept;
            const unsigned a1 = second ? kept : got;
            const int row = b_row + 8 * n + 4 * half + (lane & 3);
            UNROLL for (int pair = 0; pair < UNITS / 2; ++pair) {
                const uint4 right = b[unit_at(row, 2 * pair + (lane >> 4))];
                mma_m8n8k4_row(out[2 * pair], a0, a1, right.x, right.y);
                mma_m8n8k4_row(out[2 * pair + 1], a0, a1, right.z, right.w);
            }
        }
    }
}
