// Decode attention over a piece of the keys: all rows that share a key/value head in one pass, so that K and V are read from memory once.
//
// Tiling: the keys of a piece are taken in tiles of which K and V together fit the first-level cache. For each tile: scores of all rows
// (blocks of NR rows times W / NR keys stand in registers while the width is walked), softmax with running maximum, then
// values (NR rows times up to NU pairs of columns stand in registers while the keys are walked). While one of the two products is computed, the
// memory of the other is asked for in advance, at the end of a piece that of the next. Three rows, or five to eight, of bfloat16 that has to be
// widened go by turned.h.
// Memory traffic: S * (D + V) * itemsize per (batch, head), plus R * V * 4 bytes per piece.
//
// Source: Tri Dao, "FlashAttention-2", 2023, section 3 (running maximum); Tri Dao and others, "Flash-Decoding for long-context inference",
// 2023 (split over keys). Difference: scores in registers across keys and rows at once.
#include "blocks.h"
#include "turned.h"

#include <stdlib.h>

#define NAMED(name) JOIN(kernel_, name)

namespace {

constexpr int MAX_TILE = 128;
constexpr int ROW = MAX_TILE + W;  // scores of one row: a block of keys may reach past the tile

// Scores of columns the row does not see become -inf, which the padding to whole vectors is too.
void hide(float *scores, int64_t count, Range seen, Row &row) {
    for (int64_t j = 0; j < seen.first; j++) scores[j] = -INFINITY;
    for (int64_t j = seen.end; j < count; j++) scores[j] = -INFINITY;
    row.largest = largest_of(scores + seen.first, seen.end - seen.first);
}

// Differences of scores first, then log2(e): the product of a large score with it, rounded, would be an error of the exponent.
INLINE Vector power(const float *scores, Vector origin) { return exp2(mul(sub(load(scores), origin), all(LOG2E))); }

// Turns one row's scores into weights relative to the new maximum.
INLINE void soften(float *scores, int64_t count, Row &row) {
    const int64_t padded = (count + W - 1) / W * W;
    for (int64_t j = count; j < padded; j++) scores[j] = -INFINITY;
    const float before = row.maximum;
    if (row.largest > before) row.maximum = row.largest;
    // A row whose scores are all -inf so far: differences to -inf would be NaN.
    const float origin = row.maximum == -INFINITY ? 0 : row.maximum;
    row.factor = row.maximum == before ? 1 : exp2f((before - origin) * LOG2E);
    const Vector shift = all(origin);
    Vector added = mul(load(row.total), all(row.factor));
    int64_t j = 0;
    for (; j + 2 * W <= padded; j += 2 * W) {
        Vector one = power(scores + j, shift), two = power(scores + j + W, shift);
        store(scores + j, one), store(scores + j + W, two);
        added = add(added, add(one, two));
    }
    if (j < padded) {
        Vector one = power(scores + j, shift);
        store(scores + j, one);
        added = add(added, one);
    }
    store(row.total, added);
}

bool unseen(const Row *row, int64_t size, int64_t begin, int64_t end) {
    for (int64_t r = 0; r < size; r++)
        if (row[r].seen.first < end && row[r].seen.end > begin) return false;
    return true;
}

struct Plan {
    int64_t units, value_units;
    Blocks blocks;
};

template <class T> Plan plan(const DecodeCall &call) {
    return {(call.width + 2 * W - 1) / (2 * W), (call.value_width + 2 * W - 1) / (2 * W), {call.rows, AT_ONCE<T>}};
}

// Keys of a tile: as many as have their K and V in so many bytes.
template <class T> int64_t keys_in(const DecodeCall &call, int64_t bytes) {
    int64_t keys = MAX_TILE;
    while (keys > 16 && keys * (call.width + call.value_width) * (int64_t)sizeof(T) > bytes) keys /= 2;
    return keys;
}

template <class T> struct Scratch {
    Vector *q;
    float *values, *scores;
    Row *row;
    size_t bytes;
    Scratch(const DecodeCall &call, const Plan &plan, void *memory) {
        char *next = (char *)memory;
        auto take = [&](size_t size) { char *at = next; next += (size + 63) / 64 * 64; return at; };
        q = (Vector *)take(call.rows * plan.units * UNIT<T> * sizeof *q);
        values = (float *)take(call.rows * plan.value_units * 2 * W * sizeof(float));
        scores = (float *)take(call.rows * ROW * sizeof(float));
        row = (Row *)take(call.rows * sizeof(Row));
        bytes = next - (char *)memory;
    }
};

// The bias of a row joins the scores of `count` keys from j on; returns the largest.
float add_bias_of(const DecodeCall &call, const Piece &piece, int64_t row, int64_t j, int64_t count, float *scores) {
    const int64_t *strides = call.bias_strides, size = call.bias_dtype == FLOAT32 ? 4 : call.bias_dtype == BOOLEAN ? 1 : 2;
    const int64_t place = piece.own.batch * strides[0] + piece.own.head * strides[1] + row * strides[2] + j * strides[3];
    add_bias((const char *)call.bias + place * size, call.bias_dtype, strides[3], count, scores);
    return largest_of(scores, count);
}

template <class T> const T *keys_of(const DecodeCall &call, const Place &at) {
    return (const T *)call.k + at.batch * call.k_strides[0] + at.head * call.k_strides[1];
}

template <class T> void run_piece(const DecodeCall &call, const Piece &piece, void *memory) {
    using Unit = typename Dot<T>::Unit;
    const Place &own = piece.own, &next = piece.next;
    const Plan planned = plan<T>(call);
    const Scratch<T> scratch(call, planned, memory);
    const int64_t tile = keys_in<T>(call, piece.tile_bytes);
    const int64_t rows = call.rows, stride = planned.value_units * 2 * W;
    const Score how{call.scale, call.softcap};
    const T *q = (const T *)call.q + own.batch * call.q_strides[0] + own.head * call.q_strides[1];
    const T *k = keys_of<T>(call, own);
    const T *v = (const T *)call.v + own.batch * call.v_strides[0] + own.head * call.v_strides[1];

    Range all_rows{own.end, own.begin}, each_row{own.begin, own.end};  // what some row sees, and what all of them do
    for (int64_t r = 0; r < rows; r++) {
        Row &row = scratch.row[r];
        row = Row{-INFINITY, -INFINITY, 1, visible(call, own.batch, r), {}};
        if (row.seen.first < own.begin) row.seen.first = own.begin;
        if (row.seen.end > own.end) row.seen.end = own.end;
        if (row.seen.empty()) row.seen = {own.end, own.end};
        if (row.seen.first < all_rows.first) all_rows.first = row.seen.first;
        if (!row.seen.empty() && row.seen.end > all_rows.end) all_rows.end = row.seen.end;
        if (row.seen.first > each_row.first) each_row.first = row.seen.first;
        if (row.seen.end < each_row.end) each_row.end = row.seen.end;
    }
    memset(scratch.values, 0, rows * stride * sizeof(float));
    const Blocks &blocks = planned.blocks;
    for (int64_t block = 0; block < blocks.count; block++) {
        const T *from[AT_ONCE<T>];
        const int64_t begin = blocks.begin(block), size = blocks.size(block);
        Vector *to = scratch.q + begin * planned.units * UNIT<T>;
        for (int64_t r = 0; r < size; r++) from[r] = q + (begin + r) * call.q_strides[2];
        if constexpr (TURNS<T>)
            if (turns<T>(size)) {
                turn_queries(from, size, call.width, to);
                continue;
            }
        pack_block(from, size, call.width, (Unit *)to);
    }
    for (int64_t j = all_rows.first; j < all_rows.end; j += tile) {
        int64_t count = all_rows.end - j < tile ? all_rows.end - j : tile;
        Lines<T> keys{k + j * call.k_strides[2], call.k_strides[2], count}, values{v + j * call.v_strides[2], call.v_strides[2], count};
        const int64_t left = all_rows.end - j - count;
        Lines<T> keys_ahead{keys.base + count * keys.stride, keys.stride, left < tile ? left : tile};
        if (left == 0) {
            keys_ahead.base = keys_of<T>(call, next) + next.begin * keys.stride;
            keys_ahead.count = next.end - next.begin < tile ? next.end - next.begin : tile;
        }
        auto ask_values = [&] {
            if constexpr (TURNS<T>) return Beside(values, call.value_width);
            else return Ahead(values, call.value_width, blocks.count * count);
        }();
        auto ask_keys = [&] {
            if constexpr (TURNS<T>) return Beside(keys_ahead.count ? keys_ahead : keys, call.width);
            else return Ahead(keys_ahead, call.width, blocks.count * count * planned.value_units);
        }();
        const bool whole = !call.bias && each_row.first <= j && j + count <= each_row.end;  // all rows see all of the tile
        for (int64_t block = 0; block < blocks.count; block++) {
            const int64_t begin = blocks.begin(block), size = blocks.size(block);
            if (unseen(scratch.row + begin, size, j, j + count)) continue;
            const Vector *packed = scratch.q + begin * planned.units * UNIT<T>;
            float *scores = scratch.scores + begin * ROW, largest[AT_ONCE<T>];
            known<AT_ONCE<T>>(size, [&](auto n) {
                if constexpr (turns<T>(n)) turned_rows<n>(packed, keys, call.width, how, scores, ROW, scratch.row + begin, largest, ask_values);
                else score_rows<T, n>((const Unit *)packed, keys, call.width, how, scores, ROW, largest, ask_values);
            });
            for (int64_t r = 0; r < size; r++) {
                Row &row = scratch.row[begin + r];
                row.largest = largest[r];
                if (!whole) {
                    Range seen{row.seen.first - j, row.seen.end - j};
                    if (seen.first < 0) seen.first = 0;
                    if (seen.end > count) seen.end = count;
                    if (seen.empty()) {
                        memset(scores + r * ROW, 0, count * sizeof(float));
                        row.factor = 1;
                        continue;
                    }
                    if (call.bias) row.largest = add_bias_of(call, piece, begin + r, j, count, scores + r * ROW);
                    if (seen.first > 0 || seen.end < count) hide(scores + r * ROW, count, seen, row);
                }
                soften(scores + r * ROW, count, row);
            }
        }
        for (int64_t block = 0; block < blocks.count; block++) {
            const int64_t begin = blocks.begin(block), size = blocks.size(block);
            if (unseen(scratch.row + begin, size, j, j + count)) continue;
            const float *weights = scratch.scores + begin * ROW;
            const Row *row = scratch.row + begin;
            float *sums = scratch.values + begin * stride;
            known<AT_ONCE<T>>(size, [&](auto n) { value_rows<T, n>(weights, ROW, row, values, call.value_width, sums, stride, ask_keys); });
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        piece.maximum[r] = scratch.row[r].maximum;
        piece.sum[r] = sum(load(scratch.row[r].total));
        for (int64_t u = 0; u < planned.value_units; u++) {
            float ordered[2 * W];
            const float *at = scratch.values + r * stride + u * 2 * W;
            store_pair((const T *)nullptr, load(at), load(at + W), ordered);
            int64_t left = call.value_width - u * 2 * W;
            memcpy(piece.values + r * call.value_width + u * 2 * W, ordered, (left < 2 * W ? left : 2 * W) * sizeof(float));
        }
    }
}

template <class T> size_t scratch_of(const DecodeCall &call) { return Scratch<T>(call, plan<T>(call), nullptr).bytes; }

size_t scratch_bytes(const DecodeCall &call) {
    switch (call.dtype) {
        case FLOAT32: return scratch_of<float>(call);
        case BFLOAT16: return scratch_of<BFloat16>(call);
        default: return scratch_of<Float16>(call);
    }
}

void run(const DecodeCall &call, const Piece &piece, void *scratch) {
    switch (call.dtype) {
        case FLOAT32: return run_piece<float>(call, piece, scratch);
        case BFLOAT16: return run_piece<BFloat16>(call, piece, scratch);
        default: return run_piece<Float16>(call, piece, scratch);
    }
}

void store_as(const float *from, float factor, int64_t count, int32_t dtype, void *to) {
    switch (dtype) {
        case FLOAT32: return store_row(from, factor, count, (float *)to);
        case BFLOAT16: return store_row(from, factor, count, (BFloat16 *)to);
        default: return store_row(from, factor, count, (Float16 *)to);
    }
}

}  // namespace

extern const Kernel NAMED(INSTRUCTION_SET);
const Kernel NAMED(INSTRUCTION_SET) = {scratch_bytes, run, store_as};
