// Turing: a warp multiplies 16 rows with mma.m16n8k8, operands from shared memory by ldmatrix (both exist since sm_75; no cp.async).
//
//   first operand, register j     row l/4 + 8j, k = 2*(l%4) + {0, 1}
//   second operand                k = 2*(l%4) + {0, 1}, column l/4
//   accumulator, element i        row l/4 + 8*(i/2), column 2*(l%4) + i%2
// The accumulator map of 8 columns is the first operand's map, so probabilities become an operand by rounding alone. Rows of K load as
// they lie, rows of V with the transposing form. Shared-memory rows are units of 16 bytes, XOR-swizzled by the row's low three bits: the
// eight rows of one 8x8 matrix then lie in eight different banks. Source: PTX ISA 8.8, mma.m16n8k8 and ldmatrix.
#pragma once
#include "shim.cuh"

constexpr int UNITS = HEAD / 8;  // 16-byte units of a row
constexpr int ROWS = 16;         // rows of a warp
constexpr int VALUES = 4;        // accumulator elements of a lane for 8 columns, in two rows ("slots")

DEVICE int unit_at(int row, int unit) { return row * UNITS + (unit ^ (row & 7)); }

DEVICE int slot_of(int i) { return i >> 1; }
DEVICE int row_of(int slot) { return (lane_id() >> 2) + 8 * slot; }
DEVICE int column_of(int i) { return 2 * (lane_id() & 3) + (i & 1); }
DEVICE int output_column(int tile, int i) { return 8 * tile + column_of(i); }

DEVICE float row_max(float x) {
    x = fmaxf(x, shfl_xor(x, 1));
    return fmaxf(x, shfl_xor(x, 2));
}
DEVICE float row_sum(float x) {
    x += shfl_xor(x, 1);
    return x + shfl_xor(x, 2);
}

// acc[16, 8 N] += a[16, HEAD] b[8 N, HEAD]^T, N even: one load brings two steps of k for 16 rows of either operand.
template <int N>
DEVICE void multiply_rows(float (&acc)[N][VALUES], const uint4* a, int a_row, const uint4* b, int b_row) {
    static_assert(N % 2 == 0, "two tiles share a load");
    const int lane = lane_id();
    _Pragma("unroll 2") for (int unit = 0; unit < UNITS; unit += 2) {  // all of them at once would spill registers
        unsigned left[4];
        ldmatrix_x4(left, a + unit_at(a_row + (lane & 15), unit + (lane >> 4)));
        UNROLL for (int n = 0; n < N; n += 2) {
            unsigned right[4];
            ldmatrix_x4(right, b + unit_at(b_row + 8 * n + (lane & 7) + ((lane >> 4) << 3), unit + ((lane >> 3) & 1)));
            mma_m16n8k8(acc[n], left[0], left[1], right[0]);
            mma_m16n8k8(acc[n], left[2], left[3], right[1]);
            mma_m16n8k8(acc[n + 1], left[0], left[1], right[2]);
            mma_m16n8k8(acc[n + 1], left[2], left[3], right[3]);
        }
    }
}

// out[16, HEAD] += p[16, 8 N] b[8 N, HEAD].
template <int N>
DEVICE void multiply_values(float (&out)[UNITS][VALUES], const float (&p)[N][VALUES], const uint4* b, int b_row) {
    const int lane = lane_id();
    UNROLL for (int n = 0; n < N; ++n) {
        const unsigned a0 = pack(p[n][0], p[n][1]);
        const unsigned a1 = pack(p[n][2], p[n][3]);
        UNROLL for (int tile = 0; tile < UNITS; tile += 4) {
            unsigned right[4];
            ldmatrix_x4_trans(right, b + unit_at(b_row + 8 * n + (lane & 7), tile + (lane >> 3)));
            UNROLL for (int i = 0; i < 4; ++i) mma_m16n8k8(out[tile + i], a0, a1, right[i]);
        }
    }
}
