// What crosses the border: one call of `decode` as plain numbers and addresses, and what each instruction set's file offers.
//
// Letters: B batch, H key/value heads, R rows of queries that share one key/value head, S keys, D width of queries and keys, V width of values.
// Strides count elements; the last dimension of q, k and v is contiguous.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Raised with every change of what Python and the library say to each other; torchwrap/native/library.py holds the same number.
#define TORCHWRAP_INTERFACE 2

enum DType : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

extern "C" struct DecodeCall {
    const void *q, *k, *v;           // (B, H, R, D), (B, H, S, D), (B, H, S, V)
    const int32_t *first, *end;      // (B), or null: columns [first, end) hold keys
    const int32_t *limits;           // (B, R, 2), or null: columns [first, end) that a row sees
    float *out, *lse;                // (B, H, R, V), (B, H, R), contiguous
    int64_t q_strides[3], k_strides[3], v_strides[3];
    int64_t batch, heads, rows, keys, width, value_width;
    float scale, softcap;            // softcap 0: none
    int32_t dtype, threads, instruction_set;
};

struct Range {
    int64_t first, end;
    bool empty() const { return first >= end; }
};

// Columns that the mask leaves to one row of one batch entry: its own limits, the range of keys, and what there is.
static inline Range visible(const DecodeCall &call, int64_t batch, int64_t row) {
    Range range{0, call.keys};
    if (call.first && call.first[batch] > range.first) range.first = call.first[batch];
    if (call.end && call.end[batch] < range.end) range.end = call.end[batch];
    if (call.limits) {
        const int32_t *own = call.limits + 2 * (batch * call.rows + row);
        if (own[0] > range.first) range.first = own[0];
        if (own[1] < range.end) range.end = own[1];
    }
    return range;
}

// One piece of work: the rows of (batch, head) over the keys [begin, end). Results are partial: `sum` and `values` are relative to
// 2^maximum, rows that see no key of the piece have maximum -inf, sum 0, values 0.
struct Piece {
    int64_t batch, head, begin, end;
    float *maximum, *sum;  // (R)
    float *values;         // (R, V)
};

struct Kernel {
    size_t (*scratch_bytes)(const DecodeCall &);
    void (*piece)(const DecodeCall &, const Piece &, void *scratch);  // scratch is aligned to 64 bytes
};

// Each is compiled from kernels.cpp with other flags; which of them exist is said by macros of the same names in capitals.
extern const Kernel kernel_baseline, kernel_avx2, kernel_avx512, kernel_avx512_bf16;
