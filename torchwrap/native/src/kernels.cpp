// Decode attention over a piece of the keys: all rows that share a key/value head in one pass, so that K and V are read from memory once.
//
// Tiling: the keys of a piece are taken in tiles of which K and V together fit the first-level cache. For each tile: scores of all rows
// (blocks of NR rows times W / NR keys stand in registers while the width is walked), softmax with running maximum, then
// values (NR rows times up to NU pairs of columns stand in registers while the keys are walked). While one of the two products is computed, the
// memory of the other is asked for in advance.
// Memory traffic: S * (D + V) * itemsize per (batch, head), plus R * V * 4 bytes per piece.
//
// Source: Tri Dao, "FlashAttention-2", 2023, section 3 (running maximum); Tri Dao and others, "Flash-Decoding for long-context inference",
// 2023 (split over keys). Differences: base 2 throughout, scores in registers across keys and rows at once.
#include "simd.h"

#include <stdlib.h>

#define JOIN(a, b) a##b
#define NAMED(name) JOIN(kernel_, name)

namespace {

constexpr float LOG2E = 1.44269504f;
constexpr int MAX_TILE = 128;
constexpr int ROW = MAX_TILE + W;  // scores of one row: a block of keys may reach past the tile

// How W * 2 products of a query and a key are added up: two fused multiply-adds, or one instruction for pairs of bfloat16.
template <class T> struct Dot {
    struct Unit { Vector a, b; };
    INLINE Unit get(const T *p) { Unit u; load_pair(p, u.a, u.b); return u; }
    INLINE Unit get(const T *p, int count) { Unit u; load_pair(p, count, u.a, u.b); return u; }
    INLINE Vector add(Vector sum, Unit k, Unit q) { return fma(k.b, q.b, fma(k.a, q.a, sum)); }
};

#if defined(__AVX512BF16__)
template <> struct Dot<BFloat16> {
    using Unit = __m512i;
    INLINE Unit get(const BFloat16 *p) { return _mm512_loadu_si512(p); }
    INLINE Unit get(const BFloat16 *p, int count) { return _mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), p); }
    INLINE Vector add(Vector sum, Unit k, Unit q) { return _mm512_dpbf16_ps(sum, (__m512bh)k, (__m512bh)q); }
};
#endif

// `count` rows from `base`, `stride` elements apart.
template <class T> struct Lines {
    const T *base;
    int64_t stride, count;
};

// Memory that is asked for while something else is computed: `rows` of `bytes`, spread evenly over `steps` steps. In bursts it would wait:
// the processor keeps only so many lines under way at once.
struct Ahead {
    const char *next;
    int64_t stride, bytes, rows, steps, done = 0, due = 0;
    template <class T> Ahead(const Lines<T> &lines, int64_t width, int64_t steps)
        : next((const char *)lines.base), stride(lines.stride * sizeof(T)), bytes(width * sizeof(T)), rows(lines.count), steps(steps) {}
    // One step of the computation has been made, or `count` of them.
    INLINE void step(Ahead &ahead, int64_t count) {
        ahead.done += count * ahead.rows;
        for (; ahead.due < ahead.done; ahead.due += ahead.steps, ahead.next += ahead.stride)
            for (int64_t at = 0; at < ahead.bytes; at += 64) __builtin_prefetch(ahead.next + at, 0, 3);
    }
};

// What turns a product of a query and a key into a score, base 2.
struct Score {
    float scale, softcap;  // softcap 0: none
    INLINE Vector of(const Score &how, Vector product) {
        if (how.softcap > 0) return mul(tanh(mul(product, all(how.scale / how.softcap))), all(how.softcap * LOG2E));
        return mul(product, all(how.scale * LOG2E));
    }
};

// scores[r * ROW + j] for NR rows and all keys, and the largest of each row; q is packed [unit][row].
template <class T, int NR>
void score_rows(const typename Dot<T>::Unit *q, const Lines<T> &keys, int64_t width, const Score &how, float *scores, float *largest,
                Ahead &ahead) {
    constexpr int NK = W / NR;
    using Unit = typename Dot<T>::Unit;
    const int64_t units = width / (2 * W), rest = width % (2 * W);
    Vector top = all(-INFINITY);
    for (int64_t j = 0; j < keys.count; j += NK) {
        const T *line[NK];
        UNROLL for (int i = 0; i < NK; i++) {
            // Keys behind the last are the last again: their scores are never read, and change no maximum.
            int64_t at = j + i < keys.count ? j + i : keys.count - 1;
            line[i] = keys.base + at * keys.stride;
        }
        Ahead::step(ahead, NK);
        Vector sum[W];
        UNROLL for (int i = 0; i < W; i++) sum[i] = zeros();
        int64_t u = 0;
        for (; u < units; u++) {
            Unit k[NK];
            UNROLL for (int i = 0; i < NK; i++) k[i] = Dot<T>::get(line[i] + u * 2 * W);
            UNROLL for (int r = 0; r < NR; r++) {
                Unit row = q[u * NR + r];
                UNROLL for (int i = 0; i < NK; i++) sum[r * NK + i] = Dot<T>::add(sum[r * NK + i], k[i], row);
            }
        }
        if (rest) {
            UNROLL for (int i = 0; i < NK; i++) {
                Unit k = Dot<T>::get(line[i] + u * 2 * W, (int)rest);
                UNROLL for (int r = 0; r < NR; r++) sum[r * NK + i] = Dot<T>::add(sum[r * NK + i], k, q[u * NR + r]);
            }
        }
        Vector found = Score::of(how, sums(sum));
        top = larger(top, found);
        float lanes[W];
        store(lanes, found);
        UNROLL for (int r = 0; r < NR; r++) memcpy(scores + r * ROW + j, lanes + r * NK, NK * sizeof(float));
    }
    float lanes[W];
    store(lanes, top);
    UNROLL for (int r = 0; r < NR; r++) {
        largest[r] = -INFINITY;
        UNROLL for (int i = 0; i < NK; i++) largest[r] = lanes[r * NK + i] > largest[r] ? lanes[r * NK + i] : largest[r];
    }
}

// One row of the running softmax. `total` has a sum in each lane: they are added up once, at the end.
struct Row {
    float maximum, largest;  // of all tiles so far, and of this one
    float factor;            // what this tile's maximum made of older weights
    Range seen;
    float total[W];
};

// values[r][...] = values[r][...] * factor of the row + weights[r] . v, for NU pairs of columns; PART: one pair of `part` columns.
template <class T, int NR, int NU, bool PART>
void value_columns(const float *weights, const Row *row, const Lines<T> &v, float *values, int64_t values_stride, int part,
                   Ahead &ahead) {
    Vector sum[NR][2 * NU];
    UNROLL for (int r = 0; r < NR; r++) {
        UNROLL for (int c = 0; c < 2 * NU; c++) sum[r][c] = mul(load(values + r * values_stride + c * W), all(row[r].factor));
    }
    for (int64_t j = 0; j < v.count; j++) {
        Ahead::step(ahead, NU);
        Vector line[2 * NU];
        UNROLL for (int u = 0; u < NU; u++) {
            const T *at = v.base + j * v.stride + u * 2 * W;
            if (PART) load_pair(at, part, line[2 * u], line[2 * u + 1]);
            else load_pair(at, line[2 * u], line[2 * u + 1]);
        }
        UNROLL for (int r = 0; r < NR; r++) {
            Vector weight = all(weights[r * ROW + j]);
            UNROLL for (int c = 0; c < 2 * NU; c++) sum[r][c] = fma(weight, line[c], sum[r][c]);
        }
    }
    UNROLL for (int r = 0; r < NR; r++) {
        UNROLL for (int c = 0; c < 2 * NU; c++) store(values + r * values_stride + c * W, sum[r][c]);
    }
}

template <class T, int NR>
void value_rows(const float *weights, const Row *row, const Lines<T> &v, int64_t width, float *values, int64_t values_stride,
                Ahead &ahead) {
    constexpr int FIT = REGISTERS / (4 * NR), NU = FIT < 1 ? 1 : FIT > 4 ? 4 : FIT;
    int64_t units = width / (2 * W), rest = width % (2 * W), u = 0;
    auto at = [&](int64_t unit) { return Lines<T>{v.base + unit * 2 * W, v.stride, v.count}; };
    for (; u + NU <= units; u += NU)
        value_columns<T, NR, NU, false>(weights, row, at(u), values + u * 2 * W, values_stride, 0, ahead);
    for (; u < units; u++)
        value_columns<T, NR, 1, false>(weights, row, at(u), values + u * 2 * W, values_stride, 0, ahead);
    if (rest) value_columns<T, NR, 1, true>(weights, row, at(u), values + u * 2 * W, values_stride, (int)rest, ahead);
}

// Scores of columns the row does not see become -inf, which the padding to whole vectors is too.
void hide(float *scores, int64_t count, Range seen, Row &row) {
    for (int64_t j = 0; j < seen.first; j++) scores[j] = -INFINITY;
    for (int64_t j = seen.end; j < count; j++) scores[j] = -INFINITY;
    row.largest = -INFINITY;
    for (int64_t j = seen.first; j < seen.end; j++) row.largest = scores[j] > row.largest ? scores[j] : row.largest;
}

// Turns one row's scores into weights relative to the new maximum.
void soften(float *scores, int64_t count, Row &row) {
    const int64_t padded = (count + W - 1) / W * W;
    for (int64_t j = count; j < padded; j++) scores[j] = -INFINITY;
    const float before = row.maximum;
    if (row.largest > before) row.maximum = row.largest;
    // A row whose scores are all -inf so far: differences to -inf would be NaN.
    const float origin = row.maximum == -INFINITY ? 0 : row.maximum;
    row.factor = row.maximum == before ? 1 : exp2f(before - origin);
    const Vector shift = all(origin);
    Vector added = mul(load(row.total), all(row.factor));
    int64_t j = 0;
    for (; j + 2 * W <= padded; j += 2 * W) {
        Vector one = exp2(sub(load(scores + j), shift)), two = exp2(sub(load(scores + j + W), shift));
        store(scores + j, one), store(scores + j + W, two);
        added = add(added, add(one, two));
    }
    if (j < padded) {
        Vector one = exp2(sub(load(scores + j), shift));
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
    int64_t units, value_units, tile, blocks;
};

template <class T> Plan plan(const DecodeCall &call) {
    Plan plan;
    plan.units = (call.width + 2 * W - 1) / (2 * W);
    plan.value_units = (call.value_width + 2 * W - 1) / (2 * W);
    int64_t bytes = (call.width + call.value_width) * (int64_t)sizeof(T);
    plan.tile = MAX_TILE;
    while (plan.tile > 16 && plan.tile * bytes > 16384) plan.tile /= 2;
    plan.blocks = (call.rows + 3) / 4;
    return plan;
}

template <class T> struct Scratch {
    typename Dot<T>::Unit *q;
    float *values, *scores;
    Row *row;
    size_t bytes;
    Scratch(const DecodeCall &call, const Plan &plan, void *memory) {
        char *next = (char *)memory;
        auto take = [&](size_t size) { char *at = next; next += (size + 63) / 64 * 64; return at; };
        q = (typename Dot<T>::Unit *)take(call.rows * plan.units * sizeof *q);
        values = (float *)take(call.rows * plan.value_units * 2 * W * sizeof(float));
        scores = (float *)take(call.rows * ROW * sizeof(float));
        row = (Row *)take(call.rows * sizeof(Row));
        bytes = next - (char *)memory;
    }
};

template <class T> void run_piece(const DecodeCall &call, const Piece &piece, void *memory) {
    const Plan planned = plan<T>(call);
    const Scratch<T> scratch(call, planned, memory);
    const int64_t rows = call.rows, stride = planned.value_units * 2 * W;
    const Score how{call.scale, call.softcap};
    const T *q = (const T *)call.q + piece.batch * call.q_strides[0] + piece.head * call.q_strides[1];
    const T *k = (const T *)call.k + piece.batch * call.k_strides[0] + piece.head * call.k_strides[1];
    const T *v = (const T *)call.v + piece.batch * call.v_strides[0] + piece.head * call.v_strides[1];

    Range all_rows{piece.end, piece.begin};
    for (int64_t r = 0; r < rows; r++) {
        Row &row = scratch.row[r];
        row = Row{-INFINITY, -INFINITY, 1, visible(call, piece.batch, r), {}};
        if (row.seen.first < piece.begin) row.seen.first = piece.begin;
        if (row.seen.end > piece.end) row.seen.end = piece.end;
        if (row.seen.empty()) row.seen = {piece.end, piece.end};
        if (row.seen.first < all_rows.first) all_rows.first = row.seen.first;
        if (!row.seen.empty() && row.seen.end > all_rows.end) all_rows.end = row.seen.end;
    }
    memset(scratch.values, 0, rows * stride * sizeof(float));
    // Rows are shared out evenly: five are three and two, not four and one.
    auto block_begin = [&](int64_t block) { return block * rows / planned.blocks; };
    for (int64_t block = 0; block < planned.blocks; block++) {
        int64_t begin = block_begin(block), count = block_begin(block + 1) - begin;
        for (int64_t r = 0; r < count; r++)
            for (int64_t u = 0; u < planned.units; u++) {
                const T *at = q + (begin + r) * call.q_strides[2] + u * 2 * W;
                int64_t left = call.width - u * 2 * W;
                scratch.q[begin * planned.units + u * count + r] = left >= 2 * W ? Dot<T>::get(at) : Dot<T>::get(at, (int)left);
            }
    }
    for (int64_t j = all_rows.first; j < all_rows.end; j += planned.tile) {
        int64_t count = all_rows.end - j < planned.tile ? all_rows.end - j : planned.tile;
        Lines<T> keys{k + j * call.k_strides[2], call.k_strides[2], count}, values{v + j * call.v_strides[2], call.v_strides[2], count};
        const int64_t left = all_rows.end - j - count;
        const Lines<T> keys_ahead{keys.base + count * keys.stride, keys.stride, left < planned.tile ? left : planned.tile};
        Ahead ask_values(values, call.value_width, planned.blocks * count);
        Ahead ask_keys(keys_ahead, call.width, planned.blocks * count * planned.value_units);
        for (int64_t block = 0; block < planned.blocks; block++) {
            const int64_t begin = block_begin(block), size = block_begin(block + 1) - begin;
            if (unseen(scratch.row + begin, size, j, j + count)) continue;
            const auto *packed = scratch.q + begin * planned.units;
            float *scores = scratch.scores + begin * ROW, largest[4];
            switch (size) {
                case 1: score_rows<T, 1>(packed, keys, call.width, how, scores, largest, ask_values); break;
                case 2: score_rows<T, 2>(packed, keys, call.width, how, scores, largest, ask_values); break;
                case 3: score_rows<T, 3>(packed, keys, call.width, how, scores, largest, ask_values); break;
                default: score_rows<T, 4>(packed, keys, call.width, how, scores, largest, ask_values); break;
            }
            for (int64_t r = 0; r < size; r++) {
                Row &row = scratch.row[begin + r];
                Range seen{row.seen.first - j, row.seen.end - j};
                if (seen.first < 0) seen.first = 0;
                if (seen.end > count) seen.end = count;
                row.largest = largest[r];
                if (seen.empty()) {
                    memset(scores + r * ROW, 0, count * sizeof(float));
                    row.factor = 1;
                } else {
                    if (seen.first > 0 || seen.end < count) hide(scores + r * ROW, count, seen, row);
                    soften(scores + r * ROW, count, row);
                }
            }
        }
        for (int64_t block = 0; block < planned.blocks; block++) {
            const int64_t begin = block_begin(block), size = block_begin(block + 1) - begin;
            if (unseen(scratch.row + begin, size, j, j + count)) continue;
            const float *weights = scratch.scores + begin * ROW;
            const Row *row = scratch.row + begin;
            float *sums = scratch.values + begin * stride;
            switch (size) {
                case 1: value_rows<T, 1>(weights, row, values, call.value_width, sums, stride, ask_keys); break;
                case 2: value_rows<T, 2>(weights, row, values, call.value_width, sums, stride, ask_keys); break;
                case 3: value_rows<T, 3>(weights, row, values, call.value_width, sums, stride, ask_keys); break;
                default: value_rows<T, 4>(weights, row, values, call.value_width, sums, stride, ask_keys); break;
            }
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

}  // namespace

extern const Kernel NAMED(INSTRUCTION_SET);
const Kernel NAMED(INSTRUCTION_SET) = {scratch_bytes, run};
