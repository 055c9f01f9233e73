// What forward and backward share: which columns a row sees, moving tiles from global to shared memory, logits, storing sums.
//
// Set at compile time: VOLTA or TURING, HEAD (64 or 128), ROW_WARPS x KEY_WARPS warps of a block, KEYS rows of a moving tile,
// SOFTCAP 0 or 1.
#pragma once
#include "params.cuh"
#if defined(VOLTA)
#include "volta.cuh"
#else
#include "turing.cuh"
#endif

constexpr int THREADS = 32 * ROW_WARPS * KEY_WARPS;
constexpr int BLOCK_ROWS = ROW_WARPS * ROWS;
constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LN2 = 0.69314718055994530942f;

// Every mask these kernels take gives a row one interval of columns, and both ends grow with the row.
struct Columns {
    int first, last;
    DEVICE bool holds(int column) const { return first <= column && column <= last; }
};

DEVICE int valid_start(const Params& p, int batch) { return p.kv_start ? max(p.kv_start[batch], 0) : 0; }
DEVICE int valid_end(const Params& p, int batch) { return p.kv_end ? min(p.kv_end[batch], p.kv_length) : p.kv_length; }

DEVICE Columns seen_by(const Params& p, int position, int start, int end) {
    return {max(position + p.lower, start), min(position + p.upper, end - 1)};
}

DEVICE const uint4* row_units(const Rows& x, int batch, int head, int row) {
    return reinterpret_cast<const uint4*>(x.data + batch * x.batch + head * x.head + row * x.row);
}

// COUNT rows of HEAD halves on their way to shared memory, held in registers: the loads of the next tile run under the math of this one.
template <int COUNT>
struct Stage {
    static constexpr int EACH = COUNT * UNITS / THREADS;
    static_assert(EACH * THREADS == COUNT * UNITS, "threads share a tile evenly");
    uint4 value[EACH];

    // Rows outside [start, end) become zeros, whatever lies there: garbage in padding must not meet a zero probability as NaN.
    DEVICE void fetch(const Rows& x, int batch, int head, int first, int start, int end) {
        const int row = first + thread_id() / UNITS;
        const uint4* from = row_units(x, batch, head, row) + thread_id() % UNITS;
        UNROLL for (int i = 0; i < EACH; ++i, from += x.row * (THREADS / UNITS) / 8) {
            const int r = row + i * (THREADS / UNITS);
            value[i] = uint4{0, 0, 0, 0};
            if (start <= r && r < end) value[i] = *from;
        }
    }
    DEVICE void store(uint4* tile) const {
        UNROLL for (int i = 0; i < EACH; ++i) {
            const int index = thread_id() + i * THREADS;
            tile[unit_at(index / UNITS, index % UNITS)] = value[i];
        }
    }
};

// The same without registers in between, for tiles that are loaded once or where the sums leave no room.
template <int COUNT>
DEVICE void load_tile(uint4* tile, const Rows& x, int batch, int head, int first, int start, int end) {
    for (int index = thread_id(); index < COUNT * UNITS; index += THREADS) {
        const int row = first + index / UNITS;
        uint4 value{0, 0, 0, 0};
        if (start <= row && row < end) value = row_units(x, batch, head, row)[index % UNITS];
        tile[unit_at(index / UNITS, index % UNITS)] = value;
    }
}

// tanh through one exponential: a capped logit needs a small absolute error, and this one is a few 1e-7.
DEVICE float tanh_fast(float x) { return 1.0f - 2.0f * reciprocal_fast(exp2_fast(2.0f * LOG2E * x) + 1.0f); }

// Rows of sums, rounded to fp16, written by the lanes that hold them.
DEVICE void store_rows(const Rows& x, int batch, int head, int first, int end, const float (&sums)[UNITS][VALUES], float factor) {
    UNROLL for (int slot = 0; slot < 2; ++slot) {
        const int row = first + row_of(slot);
        if (row >= end) continue;
        unsigned* to = reinterpret_cast<unsigned*>(x.data + batch * x.batch + head * x.head + row * x.row);
        UNROLL for (int tile = 0; tile < UNITS; ++tile) {
            UNROLL for (int i = 0; i < VALUES; i += 2) {
                if (slot_of(i) == slot) to[output_column(tile, i) / 2] = pack(sums[tile][i] * factor, sums[tile][i + 1] * factor);
            }
        }
    }
}
