// Products of a few rows with many, as attention of a few queries consists of them: nothing is packed but the few, and every row of the many is read
// where it lies, once for all of the few.
#pragma once

#include "tiles.h"

#define JOIN(a, b) a##b

namespace {

constexpr float LOG2E = 1.44269504f;
constexpr int64_t LINE = 64;  // bytes of the cache, and of 2 * W elements of bfloat16

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
    // The same where several rows are walked at once, unit by unit: `begin` comes once for all of them, `unit` for each of a row.
    INLINE void begin(Ahead &ahead, int64_t count) { step(ahead, count); }
    INLINE void unit(Ahead &) {}
};

// The same without counting: with each unit that is read one line is asked for, in the order of memory. Where rows differ in length from those
// that are read, or are fewer, that is too little, or also what is behind them: which is never read, so it need not exist.
struct Beside {
    const char *next;
    int64_t lines, skip, left;  // lines of a row; bytes from its last line to the next row; lines left of this row
    template <class T> Beside(const Lines<T> &from, int64_t width)
        : next((const char *)from.base), lines((width * (int64_t)sizeof(T) + LINE - 1) / LINE),
          skip(from.stride * (int64_t)sizeof(T) - lines * LINE), left(lines) {}
    INLINE void step(Beside &beside, int64_t count) {
        UNROLL for (int i = 0; i < count; i++) {
            __builtin_prefetch(beside.next, 0, 3);
            const bool last = --beside.left == 0;
            beside.next += LINE + (last ? beside.skip : 0), beside.left = last ? beside.lines : beside.left;
        }
    }
    INLINE void begin(Beside &, int64_t) {}
    INLINE void unit(Beside &beside) { step(beside, 1); }
};

constexpr int64_t LINKS = 8;  // units that one sum takes in turn (chosen)

// What turns a product of a query and a key into a score.
struct Score {
    float scale, softcap;  // softcap 0: none
    INLINE Vector of(const Score &how, Vector product) {
        if (how.softcap > 0) return mul(tanh(mul(product, all(how.scale / how.softcap))), all(how.softcap));
        return mul(product, all(how.scale));
    }
};

// scores[r * line_of + j] for NR rows and all keys, and the largest of each row; q is packed [unit][row]. Up to W - 1 numbers behind the last key of
// a row are written.
template <class T, int NR, class Next>
INLINE void score_rows(const typename Dot<T>::Unit *q, const Lines<T> &keys, int64_t width, const Score &how, float *scores, int64_t line_of,
                       float *largest, Next &asked) {
    constexpr int NK = W / NR;
    Next ahead = asked;  // in registers
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
        Next::begin(ahead, NK);
        Vector sum[W];
        UNROLL for (int i = 0; i < W; i++) sum[i] = zeros();
        int64_t u = 0;
        const auto add_unit = [&](int64_t u) {
            Unit k[NK];
            UNROLL for (int i = 0; i < NK; i++) Next::unit(ahead);
            UNROLL for (int i = 0; i < NK; i++) k[i] = Dot<T>::get(line[i] + u * 2 * W);
            UNROLL for (int r = 0; r < NR; r++) {
                Unit row = q[u * NR + r];
                UNROLL for (int i = 0; i < NK; i++) sum[r * NK + i] = Dot<T>::add(sum[r * NK + i], k[i], row);
            }
        };
        for (; u < units && u < LINKS; u++) add_unit(u);
        // Errors grow with the number of terms that one register takes in turn, so a sum begins at zero again.
        while (u < units) {
            alignas(64) float before[W][W];
            UNROLL for (int i = 0; i < W; i++) store(before[i], sum[i]), sum[i] = zeros();
            for (const int64_t end = u + LINKS; u < units && u < end; u++) add_unit(u);
            UNROLL for (int i = 0; i < W; i++) sum[i] = add(load(before[i]), sum[i]);
        }
        if (rest) {
            UNROLL for (int i = 0; i < NK; i++) {
                Next::unit(ahead);
                Unit k = Dot<T>::get(line[i] + u * 2 * W, (int)rest);
                UNROLL for (int r = 0; r < NR; r++) sum[r * NK + i] = Dot<T>::add(sum[r * NK + i], k, q[u * NR + r]);
            }
        }
        Vector found = Score::of(how, sums(sum));
        top = larger(top, found);
        float lanes[W];
        store(lanes, found);
        UNROLL for (int r = 0; r < NR; r++) memcpy(scores + r * line_of + j, lanes + r * NK, NK * sizeof(float));
    }
    asked = ahead;
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

// values[r][...] = values[r][...] * factor of the row + weights[r] . v, for NU pairs of columns; PART: the last pair is of `part` columns.
template <class T, int NR, int NU, bool PART, class Next>
NOINLINE void value_columns(const float *weights, int64_t line_of, const Row *row, const Lines<T> &v, float *values, int64_t values_stride,
                            int part, Next &asked) {
    Next ahead = asked;  // in registers
    Vector sum[NR][2 * NU];
    UNROLL for (int r = 0; r < NR; r++) {
        UNROLL for (int c = 0; c < 2 * NU; c++) sum[r][c] = mul(load(values + r * values_stride + c * W), all(row[r].factor));
    }
    const T *at = v.base;
    const int64_t stride = v.stride;
    for (int64_t left = v.count; left > 0; left--, at += stride, weights++) {
        Next::step(ahead, NU);
        Vector line[2 * NU];
        UNROLL for (int u = 0; u < NU; u++) {
            if (PART && u == NU - 1) load_pair(at + u * 2 * W, part, line[2 * u], line[2 * u + 1]);
            else load_pair(at + u * 2 * W, line[2 * u], line[2 * u + 1]);
        }
        if (NR > 1) UNROLL for (int c = 0; c < 2 * NU; c++) hold(line[c]);
        UNROLL for (int r = 0; r < NR; r++) {
            Vector weight = all(weights[r * line_of]);
            UNROLL for (int c = 0; c < 2 * NU; c++) sum[r][c] = fma(weight, line[c], sum[r][c]);
        }
    }
    asked = ahead;
    UNROLL for (int r = 0; r < NR; r++) {
        UNROLL for (int c = 0; c < 2 * NU; c++) store(values + r * values_stride + c * W, sum[r][c]);
    }
}

// The function of a number from 1 to MOST, which is then known while compiling.
template <int MOST = 4, int N = 1, class Do> INLINE void known(int64_t number, Do act) {
    if constexpr (N < MOST)
        if (number != N) return known<MOST, N + 1>(number, act);
    return act(std::integral_constant<int, N>{});
}

// As many pairs of columns at a time as have registers, and about as many each time: one pair of one row is too few sums to keep multipliers busy.
template <class T, int NR, class Next>
void value_rows(const float *weights, int64_t line_of, const Row *row, const Lines<T> &v, int64_t width, float *values,
                int64_t values_stride, Next &ahead) {
    constexpr int FIT = REGISTERS / (4 * NR), MOST = FIT < 1 ? 1 : FIT > 4 ? 4 : FIT;
    const int64_t units = (width + 2 * W - 1) / (2 * W), rest = width % (2 * W);
    for (int64_t u = 0, times = (units + MOST - 1) / MOST; u < units; times--) {
        const int64_t now = (units - u + times - 1) / times;
        const Lines<T> at{v.base + u * 2 * W, v.stride, v.count};
        float *to = values + u * 2 * W;
        u += now;
        known<MOST>(now, [&](auto n) {
            if (rest && u == units) value_columns<T, NR, n, true>(weights, line_of, row, at, to, values_stride, (int)rest, ahead);
            else value_columns<T, NR, n, false>(weights, line_of, row, at, to, values_stride, 0, ahead);
        });
    }
}

// How rows are shared out into blocks of at most four, or so many: evenly, so that five are three and two, not four and one.
struct Blocks {
    int64_t rows, most = 4, count = (rows + most - 1) / most;
    int64_t begin(int64_t block) const { return block * rows / count; }
    int64_t size(int64_t block) const { return begin(block + 1) - begin(block); }
};

// Rows of a block as `score_rows` takes them.
template <class T> void pack_block(const T *const *rows, int64_t count, int64_t width, typename Dot<T>::Unit *to) {
    for (int64_t u = 0; u * 2 * W < width; u++)
        for (int64_t r = 0; r < count; r++) {
            const int64_t left = width - u * 2 * W;
            const T *at = rows[r] + u * 2 * W;
            to[u * count + r] = left >= 2 * W ? Dot<T>::get(at) : Dot<T>::get(at, (int)left);
        }
}

// The largest of `count` numbers; what is no number is passed over.
inline float largest_of(const float *from, int64_t count) {
    Vector top = all(-INFINITY);
    int64_t j = 0;
    for (; j + W <= count; j += W) top = larger(load(from + j), top);
    float lanes[W], most = -INFINITY;
    store(lanes, top);
    for (float lane : lanes) most = lane > most ? lane : most;
    for (; j < count; j++) most = from[j] > most ? from[j] : most;
    return most;
}

// `count` numbers of a bias, `stride` apart, join the scores of a row; 0 of BOOLEAN hides.
inline void add_bias(const void *bias, int32_t dtype, int64_t stride, int64_t count, float *scores) {
    constexpr int64_t MOST = 128;
    alignas(64) float wide[MOST + W];
    for (int64_t j = 0; j < count; j += MOST) {
        const int64_t here = count - j < MOST ? count - j : MOST;
        const float *from = wide;
        switch (dtype) {
            case FLOAT32:
                if (stride == 1) from = (const float *)bias + j;
                else
                    for (int64_t i = 0; i < here; i++) wide[i] = ((const float *)bias)[(j + i) * stride];
                break;
            case BFLOAT16:
                if (stride == 1)  // by itself, so that it is made of vectors
                    for (int64_t i = 0; i < here; i++) wide[i] = widened(((const BFloat16 *)bias)[j + i]);
                else
                    for (int64_t i = 0; i < here; i++) wide[i] = widened(((const BFloat16 *)bias)[(j + i) * stride]);
                break;
            case FLOAT16: {
                Float16 line[MOST + 2 * W];
                if (stride == 1) memcpy(line, (const Float16 *)bias + j, here * sizeof *line);
                else
                    for (int64_t i = 0; i < here; i++) line[i] = ((const Float16 *)bias)[(j + i) * stride];
                for (int64_t i = 0; i < here; i += 2 * W) {
                    Vector a, b;
                    float both[2 * W];
                    load_pair(line + i, a, b), store(both, a), store(both + W, b);
                    memcpy(wide + i, both, (here - i < 2 * W ? here - i : 2 * W) * sizeof *both);
                }
                break;
            }
            default:
                for (int64_t i = 0; i < here; i++) wide[i] = ((const uint8_t *)bias)[(j + i) * stride] ? 0 : -INFINITY;
        }
        int64_t i = 0;
        for (; i + W <= here; i += W) {
            const Vector x = load(from + i), score = load(scores + j + i);
            store(scores + j + i, dtype == BOOLEAN ? if_below(x, 0, x, score) : add(score, x));
        }
        for (; i < here; i++) scores[j + i] = dtype == BOOLEAN && from[i] < 0 ? from[i] : scores[j + i] + from[i];
    }
}

}  // namespace
