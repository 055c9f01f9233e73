// What crosses the border: calls of `decode` and `prefill` as plain numbers and addresses, and what each instruction set's file offers.
//
// Letters: B batch, H key/value heads, R rows of queries that share one key/value head, S keys, D width of queries and keys, V width of values.
// Strides count elements; the last dimension of q, k and v is contiguous.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Raised with every change of what Python and the library say to each other; torchwrap/native/library.py holds the same number.
#define TORCHWRAP_INTERFACE 12

enum DType : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, BOOLEAN = 3 };  // BOOLEAN: a bias that hides keys where it is 0

extern "C" struct DecodeCall {
    const void *q, *k, *v;           // (B, H, R, D), (B, H, S, D), (B, H, S, V)
    const int32_t *first, *end;      // (B), or null: columns [first, end) hold keys
    const int32_t *limits;           // (B, R, 2), or null: columns [first, end) that a row sees
    // (P, 2) and (B + 1), or null: all rows of entry b see the columns of the runs [first, end) number run_of[b] ... run_of[b + 1] - 1, and no
    // others. Then first, end and limits are null, and k and v are of all entries: (H, S, D), (H, S, V), with strides of 0 for the batch.
    const int32_t *runs, *run_of;
    const void *bias;                // (B, H, R, S), or null: added to the scores after the cap; strides of 0 where a number serves many
    void *out;                       // (B, H, R, V), contiguous, float32 or as q
    float *lse;                      // (B, H, R), contiguous, or null: not wanted
    int64_t q_strides[3], k_strides[3], v_strides[3], bias_strides[4];
    int64_t batch, heads, rows, keys, width, value_width;
    float scale, softcap;            // softcap 0: none
    int32_t dtype, threads, instruction_set, out_dtype, bias_dtype;
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

struct Place { int64_t batch, head, begin, end; };

// One piece of work: the rows of (batch, head) over the keys [begin, end). Results are partial: `sum` and `values` are relative to
// e^maximum, rows that see no key of the piece have maximum -inf, sum 0, values 0.
struct Piece {
    Place own, next;       // next: what the same thread goes on with, most likely, so that its first keys are asked for; without keys: nothing
    int64_t tile_bytes;    // of K and V that are gone through at a time
    float *maximum, *sum;  // (R)
    float *values;         // (R, V)
};

struct Kernel {
    size_t (*scratch_bytes)(const DecodeCall &);
    void (*piece)(const DecodeCall &, const Piece &, void *scratch);  // scratch is aligned to 64 bytes
    void (*store)(const float *from, float factor, int64_t count, int32_t dtype, void *to);  // products with the factor, rounded
};

// A call of `prefill`, and of the gradients of one: many queries. G query heads share a key/value head.
extern "C" struct PrefillCall {
    const void *q, *k, *v;       // (B, G * H, Q, D), (B, H, S, D), (B, H, S, V)
    void *out;                   // (B, G * H, Q, V)
    float *lse;                  // (B, G * H, Q), contiguous; null in `prefill`: not wanted
    const int32_t *limits;       // (B or 1, Q, 2), or null: columns [first, end) that a query sees, alike for all heads
    const float *sinks;          // (G * H), or null; `prefill` only
    const void *grad_out;        // as out; this and the rest are for gradients only
    const float *grad_lse;       // as lse, or null
    void *dq, *dk, *dv;          // as q, k, v
    float *delta;                // as lse, or null: sum(dO * O) - dlse, from weights that were never rounded
    const void *bias;            // (B, G * H, Q, S), or null: added to the scores after the cap; strides of 0 where a number serves many
    void *dbias;                 // the same for its gradient, of zeros; or null. Sums of many numbers are float64: one chain of 4096 loses too much
    // What hides keys one by one. Each of it may be null; a key is seen if all that is there shows it.
    const uint8_t *shown;                    // (B, G * H, Q, S): 0 hides
    const int32_t *q_segments, *k_segments;  // (B, Q), (B, S): only tokens of equal number see each other
    const int32_t *codes;                    // (B, G * H, down, across): numbers of tiles
    const uint8_t *tiles;                    // (N, tile_rows, tile_columns / 8): a bit for each key, the leftmost lowest
    uint64_t seed;               // of dropout
    int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3], grad_strides[3], dq_strides[3], dk_strides[3], dv_strides[3];
    int64_t bias_strides[4], dbias_strides[4], shown_strides[4], segment_strides[2], code_strides[3];
    int64_t tile_rows, tile_columns, first_row, first_column;  // where in the tiles the first row and column are
    int64_t batch, heads, kv_heads, q_length, k_length, width, value_width;
    float scale, softcap;        // softcap 0: none
    float keep;                  // what dropout multiplies the weights with that it leaves
    uint32_t threshold;          // it takes those whose number is below; 0: none
    int32_t limits_shared, threads, instruction_set, dtype, bias_dtype, dbias_wide;
    int32_t some_keys;           // for gradients: lse and out are over more keys than these
    int32_t few;                 // the same: by few_kernels.cpp, which works the softmax out again and reads neither lse nor out
    // From here on the library's own: rows of one task, G, float32 sums of (places, S, padded width).
    int64_t part, group;
    float *dk_sums, *dv_sums;

    bool hides() const { return shown || q_segments || codes; }
};

// Rows and keys of one pair of blocks; width that queries, keys and values have at most.
constexpr int64_t HEIGHT = 64, BLOCK = 128, MAX_WIDTH = 512;

static inline Range seen_by(const PrefillCall &call, int64_t batch, int64_t row) {
    if (!call.limits) return {0, call.k_length};
    const int32_t *own = call.limits + 2 * ((call.limits_shared ? 0 : batch) * call.q_length + row % call.q_length);
    return {own[0] < 0 ? 0 : own[0], own[1] > call.k_length ? call.k_length : own[1]};
}

// Of the tasks that add to one block of keys, which one this is; -1: it does not.
struct Turn { int32_t number, of; };

// Some rows of (batch, head): `begin` to `end` of all G * Q queries that share it. For gradients, `turns` has an entry for each block of keys, and
// `place` is that of the sums. Of the tasks that add to the gradient of the bias where this one does, it is number `bias_turn`. The task that this
// thread probably has next is of all rows of `next_head` in `next_batch`; -1: none, or of some of them.
struct PrefillTask {
    int64_t batch, head, begin, end, place, bias_turn, next_batch, next_head;
    const Turn *turns;
    void *progress, *bias_progress;
    void (*wait)(void *progress, int64_t block, int64_t number);  // until so many tasks have added to this block
    void (*done)(void *progress, int64_t block);
};

struct PrefillKernel {
    size_t (*scratch_bytes)(const PrefillCall &);
    void (*run)(const PrefillCall &, const PrefillTask &, void *scratch);  // scratch is aligned to 64 bytes
};

// Each is compiled from a file of the same name and `_kernels.cpp` (that of decode: kernels.cpp) with other flags; which of them exist is said by macros of the
// same names in capitals.
extern const Kernel kernel_baseline, kernel_avx2, kernel_avx512, kernel_avx512_bf16;
extern const PrefillKernel prefill_baseline, prefill_avx2, prefill_avx512, prefill_avx512_bf16;
extern const PrefillKernel gradients_baseline, gradients_avx2, gradients_avx512, gradients_avx512_bf16;
extern const PrefillKernel few_baseline, few_avx2, few_avx512, few_avx512_bf16;
