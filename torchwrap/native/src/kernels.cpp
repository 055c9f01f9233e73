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

INLINE void prefetch(const char *p, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at, 0, 3);
}

// What is walked row by row: `count` rows from `base`, `stride` elements apart.
template <class T> struct Lines {
    const T *base;
    int64_t stride, count;
    INLINE void prefetch_row(const Lines &lines, int64_t row, int64_t width) {
        if (row < lines.count) prefetch((const char *)(lines.base + row * lines.stride), width * sizeof(T));
    }
};

// scores[r * ROW + j] for NR rows and all keys; q is packed [unit][row].
template <class T, int NR>
void score_rows(const typename Dot<T>::Unit *q, const Lines<T> &keys, int64_t width, float *scores, const Lines<T> *ahead, int64_t ahead_width) {
    constexpr int NK = W / NR;
    using Unit = typename Dot<T>::Unit;
    int64_t units = width / (2 * W), rest = width % (2 * W);
    for (int64_t j = 0; j < keys.count; j += NK) {
        const T *line[NK];
        for (int i = 0; i < NK; i++) {
            // Keys behind the last are the last again: their scores are overwritten or never read.
            int64_t at = j + i < keys.count ? j + i : keys.count - 1;
            line[i] = keys.base + at * keys.stride;
            if (ahead) Lines<T>::prefetch_row(*ahead, j + i, ahead_width);
        }
        Vector sum[W];
        for (int i = 0; i < W; i++) sum[i] = zeros();
        int64_t u = 0;
        for (; u < units; u++) {
            Unit k[NK];
            for (int i = 0; i < NK; i++) k[i] = Dot<T>::get(line[i] + u * 2 * W);
            for (int r = 0; r < NR; r++) {
                Unit row = q[u * NR + r];
                for (int i = 0; i < NK; i++) sum[r * NK + i] = Dot<T>::add(sum[r * NK + i], k[i], row);
            }
        }
        if (rest)
            for (int i = 0; i < NK; i++) {
                Unit k = Dot<T>::get(line[i] + u * 2 * W, (int)rest);
                for (int r = 0; r < NR; r++) sum[r * NK + i] = Dot<T>::add(sum[r * NK + i], k, q[u * NR + r]);
            }
        float lanes[W];
        store(lanes, sums(sum));
        for (int r = 0; r < NR; r++) memcpy(scores + r * ROW + j, lanes + r * NK, NK * sizeof(float));
    }
}

// values[r][...] = values[r][...] * factor[r] + weights[r] . v, for NU pairs of columns; PART: one pair of `part` columns.
template <class T, int NR, int NU, bool PART>
void value_columns(const float *weights, const float *factor, const Lines<T> &v, float *values, int64_t values_stride, int part,
                   const Lines<T> *ahead, int64_t ahead_width) {
    Vector sum[NR][2 * NU];
    for (int r = 0; r < NR; r++)
        for (int c = 0; c < 2 * NU; c++) sum[r][c] = mul(load(values + r * values_stride + c * W), all(factor[r]));
    for (int64_t j = 0; j < v.count; j++) {
        if (ahead) Lines<T>::prefetch_row(*ahead, j, ahead_width);
        Vector line[2 * NU];
        for (int u = 0; u < NU; u++) {
            const T *at = v.base + j * v.stride + u * 2 * W;
            if (PART) load_pair(at, part, line[2 * u], line[2 * u + 1]);
            else load_pair(at, line[2 * u], line[2 * u + 1]);
        }
        for (int r = 0; r < NR; r++) {
            Vector weight = all(weights[r * ROW + j]);
            for (int c = 0; c < 2 * NU; c++) sum[r][c] = fma(weight, line[c], sum[r][c]);
        }
    }
    for (int r = 0; r < NR; r++)
        for (int c = 0; c < 2 * NU; c++) store(values + r * values_stride + c * W, sum[r][c]);
}

template <class T, int NR>
void value_rows(const float *weights, const float *factor, const Lines<T> &v, int64_t width, float *values, int64_t values_stride,
                const Lines<T> *ahead, int64_t ahead_width) {
    constexpr int FIT = REGISTERS / (4 * NR), NU = FIT < 1 ? 1 : FIT > 4 ? 4 : FIT;
    int64_t units = width / (2 * W), rest = width % (2 * W), u = 0;
    auto at = [&](int64_t unit) { return Lines<T>{v.base + unit * 2 * W, v.stride, v.count}; };
    for (; u + NU <= units; u += NU, ahead = nullptr)
        value_columns<T, NR, NU, false>(weights, factor, at(u), values + u * 2 * W, values_stride, 0, ahead, ahead_width);
    for (; u < units; u++, ahead = nullptr)
        value_columns<T, NR, 1, false>(weights, factor, at(u), values + u * 2 * W, values_stride, 0, ahead, ahead_width);
    if (rest) value_columns<T, NR, 1, true>(weights, factor, at(u), values + u * 2 * W, values_stride, (int)rest, ahead, ahead_width);
}

// Turns one row's scores into weights relative to the new maximum; returns what older sums and values are multiplied with.
float soften(float *scores, int64_t count, Range seen, float scale, float softcap, float &maximum, float &total) {
    int64_t padded = (count + W - 1) / W * W;
    Vector top = all(-INFINITY);
    for (int64_t j = 0; j < padded; j += W) {
        Vector x = load(scores + j);
        x = softcap > 0 ? mul(tanh(mul(x, all(scale / softcap))), all(softcap * LOG2E)) : mul(x, all(scale * LOG2E));
        store(scores + j, x);
    }
    for (int64_t j = 0; j < seen.first; j++) scores[j] = -INFINITY;
    for (int64_t j = seen.end; j < padded; j++) scores[j] = -INFINITY;
    for (int64_t j = 0; j < padded; j += W) top = larger(top, load(scores + j));
    float before = maximum, now = largest(top);
    maximum = now > before ? now : before;
    // A row whose scores are all -inf so far: differences to -inf would be NaN.
    float origin = maximum == -INFINITY ? 0 : maximum;
    Vector added = zeros();
    for (int64_t j = 0; j < padded; j += W) {
        Vector weight = exp2(sub(load(scores + j), all(origin)));
        store(scores + j, weight);
        added = add(added, weight);
    }
    float factor = before == -INFINITY ? 0 : exp2f(before - origin);
    total = total * factor + sum(added);
    return factor;
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
    while (plan.tile > 16 && plan.tile * bytes > 32768) plan.tile /= 2;
    plan.blocks = (call.rows + 3) / 4;
    return plan;
}

template <class T> struct Scratch {
    typename Dot<T>::Unit *q;
    float *values, *scores, *factor;
    Range *seen;
    size_t bytes;
    Scratch(const DecodeCall &call, const Plan &plan, void *memory) {
        char *next = (char *)memory;
        auto take = [&](size_t size) { char *at = next; next += (size + 63) / 64 * 64; return at; };
        q = (typename Dot<T>::Unit *)take(call.rows * plan.units * sizeof *q);
        values = (float *)take(call.rows * plan.value_units * 2 * W * sizeof(float));
        scores = (float *)take(call.rows * ROW * sizeof(float));
        factor = (float *)take(call.rows * sizeof(float));
        seen = (Range *)take(call.rows * sizeof(Range));
        bytes = next - (char *)memory;
    }
};

template <class T> void run_piece(const DecodeCall &call, const Piece &piece, void *memory) {
    const Plan planned = plan<T>(call);
    const Scratch<T> scratch(call, planned, memory);
    const int64_t rows = call.rows, stride = planned.value_units * 2 * W;
    const T *q = (const T *)call.q + piece.batch * call.q_strides[0] + piece.head * call.q_strides[1];
    const T *k = (const T *)call.k + piece.batch * call.k_strides[0] + piece.head * call.k_strides[1];
    const T *v = (const T *)call.v + piece.batch * call.v_strides[0] + piece.head * call.v_strides[1];

    Range all_rows{piece.end, piece.begin};
    for (int64_t r = 0; r < rows; r++) {
        piece.maximum[r] = -INFINITY, piece.sum[r] = 0;
        Range seen = visible(call, piece.batch, r);
        if (seen.first < piece.begin) seen.first = piece.begin;
        if (seen.end > piece.end) seen.end = piece.end;
        scratch.seen[r] = seen;
        if (seen.empty()) continue;
        if (seen.first < all_rows.first) all_rows.first = seen.first;
        if (seen.end > all_rows.end) all_rows.end = seen.end;
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
        int64_t next = all_rows.end - j - count;
        Lines<T> keys{k + j * call.k_strides[2], call.k_strides[2], count}, values{v + j * call.v_strides[2], call.v_strides[2], count};
        Lines<T> keys_ahead{keys.base + count * keys.stride, keys.stride, next < planned.tile ? next : planned.tile};
        const Lines<T> *ask_values = &values, *ask_keys = &keys_ahead;
        for (int64_t block = 0; block < planned.blocks; block++) {
            int64_t begin = block_begin(block), end = block_begin(block + 1);
            bool any = false;
            for (int64_t r = begin; r < end; r++) any |= scratch.seen[r].first < j + count && scratch.seen[r].end > j && !scratch.seen[r].empty();
            if (!any) continue;
            auto *packed = scratch.q + begin * planned.units;
            float *scores = scratch.scores + begin * ROW, *factor = scratch.factor + begin, *sums = scratch.values + begin * stride;
            switch (end - begin) {
                case 1: score_rows<T, 1>(packed, keys, call.width, scores, ask_values, call.value_width); break;
                case 2: score_rows<T, 2>(packed, keys, call.width, scores, ask_values, call.value_width); break;
                case 3: score_rows<T, 3>(packed, keys, call.width, scores, ask_values, call.value_width); break;
                default: score_rows<T, 4>(packed, keys, call.width, scores, ask_values, call.value_width); break;
            }
            ask_values = nullptr;
            for (int64_t r = begin; r < end; r++) {
                Range seen{scratch.seen[r].first - j, scratch.seen[r].end - j};
                if (seen.first < 0) seen.first = 0;
                if (seen.end > count) seen.end = count;
                float *row = scratch.scores + r * ROW;
                if (seen.empty()) {
                    memset(row, 0, count * sizeof(float));
                    scratch.factor[r] = 1;
                } else {
                    scratch.factor[r] = soften(row, count, seen, call.scale, call.softcap, piece.maximum[r], piece.sum[r]);
                }
            }
            switch (end - begin) {
                case 1: value_rows<T, 1>(scores, factor, values, call.value_width, sums, stride, ask_keys, call.width); break;
                case 2: value_rows<T, 2>(scores, factor, values, call.value_width, sums, stride, ask_keys, call.width); break;
                case 3: value_rows<T, 3>(scores, factor, values, call.value_width, sums, stride, ask_keys, call.width); break;
                default: value_rows<T, 4>(scores, factor, values, call.value_width, sums, stride, ask_keys, call.width); break;
            }
            ask_keys = nullptr;
        }
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t u = 0; u < planned.value_units; u++) {
            float ordered[2 * W];
            const float *at = scratch.values + r * stride + u * 2 * W;
            store_pair((const T *)nullptr, load(at), load(at + W), ordered);
            int64_t left = call.value_width - u * 2 * W;
            memcpy(piece.values + r * call.value_width + u * 2 * W, ordered, (left < 2 * W ? left : 2 * W) * sizeof(float));
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
