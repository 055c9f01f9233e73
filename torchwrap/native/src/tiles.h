// Products of small matrices of float32, or of bfloat16 with sums in float32: what attention over many queries consists of.
//
// bfloat16 is multiplied as it is only where the processor has an instruction for it, which `choices.cpp` takes only where it is fast; elsewhere
// it is widened to float32 where it is packed, as float16 always is: half the time of widening it in every product (AVX2, 1024 queries).
//
// The inner dimension goes in 32-bit *words*: one float32, or two neighbouring elements in bfloat16, a *pair*, as the instruction takes them. The left factor gives one word at a time, to all lanes; the right factor gives W columns of words. So a right factor
// is packed beforehand: `columns_of` makes it of rows that run along the inner dimension, `across` of rows that run across it.
// Sums of ROWS rows and up to COLUMNS columns stand in registers while the inner dimension is walked.
#pragma once

#include <type_traits>

#include "simd.h"

namespace {

// Of an element, float or BFloat16: its words, and how many of it are in one.
template <class T> using Word = std::conditional_t<std::is_same_v<T, float>, float, uint32_t>;
template <class T> constexpr int64_t PACKED = sizeof(Word<T>) / sizeof(T);

template <class T> constexpr int ROWS = 4;
template <class T> constexpr int VECTORS = REGISTERS == 32 ? 4 : 2;
// As fast as ROWS<BFloat16> times as many columns, and with few keys the last tile has less behind them.
template <> constexpr int ROWS<float> = REGISTERS == 32 ? 8 : 4;
template <> constexpr int VECTORS<float> = 2;
template <class T> constexpr int COLUMNS = VECTORS<T> * W;

#if defined(__AVX512BF16__)
using OfBFloat16 = BFloat16;  // what products of bfloat16 are made of
using Pairs = __m512bh;
INLINE Pairs words(const uint32_t *p) { return (Pairs)_mm512_loadu_si512(p); }
INLINE Pairs word(uint32_t p) { return (Pairs)_mm512_set1_epi32((int)p); }
INLINE Vector add_products(Vector sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, a, b); }

// Words of two rows, the first in the lower halves; and each row by itself.
INLINE void store_across(Vector a, Vector b, uint32_t *both, BFloat16 *row_a = nullptr, BFloat16 *row_b = nullptr) {
    const __m256i x = (__m256i)_mm512_cvtneps_pbh(a), y = (__m256i)_mm512_cvtneps_pbh(b);
    _mm512_storeu_si512(both, _mm512_or_si512(_mm512_cvtepu16_epi32(x), _mm512_slli_epi32(_mm512_cvtepu16_epi32(y), 16)));
    if (row_a) _mm256_storeu_si256((__m256i *)row_a, x), _mm256_storeu_si256((__m256i *)row_b, y);
}
// 2 * W numbers of one row.
INLINE void store_rounded(Vector a, Vector b, BFloat16 *to) { _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(b, a)); }
#else
using OfBFloat16 = float;
#endif

// To the nearest bfloat16, ties to even; what is not a number stays so.
INLINE uint32_t rounded(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
// The same for float16.
INLINE Float16 halved(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return {(uint16_t)(sign | 0x7e00)};
    if (bits >= 0x477ff000) return {(uint16_t)(sign | 0x7c00)};  // from 65520 on
    if (bits >= 0x38800000) return {(uint16_t)(sign | (bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13)};
    // Below 2^-14 numbers are 2^-24 apart, as those from 1/2 on are in float32.
    const float moved = fabsf(x) + .5f;
    memcpy(&bits, &moved, sizeof bits);
    return {(uint16_t)(sign | (bits - 0x3f000000))};
}
INLINE float widened(BFloat16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

INLINE Vector words(const float *p) { return load(p); }
INLINE Vector word(float x) { return all(x); }
INLINE Vector add_products(Vector sum, Vector a, Vector b) { return fma(a, b, sum); }
INLINE float widened(float x) { return x; }
INLINE void store_rounded(Vector a, Vector b, float *to) { store(to, a), store(to + W, b); }

// Where the words of the left factor are: of row r and step s at `base[r * row + s * step]`.
template <class T> struct Left {
    const Word<T> *base;
    int64_t row, step;
};

// sum[r][j] = over `steps` words of row r and columns j * W and on; the words of one step of the right factor are `step` words apart.
template <class T, int V, int R> INLINE void product(Vector (*sum)[V], Left<T> a, const Word<T> *b, int64_t step, int64_t steps) {
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < V; j++) sum[r][j] = zeros();
    for (int64_t s = 0; s < steps; s++) {
        decltype(words(b)) column[V];
        UNROLL for (int j = 0; j < V; j++) column[j] = words(b + s * step + j * W);
        UNROLL for (int r = 0; r < R; r++) {
            const auto row = word(a.base[r * a.row + s * a.step]);
            UNROLL for (int j = 0; j < V; j++) sum[r][j] = add_products(sum[r][j], row, column[j]);
        }
    }
}

// Errors grow with the number of terms that one register sums up (one chain of 511 products had 5.8 times those of torch's product), so that of
// a long product begins at zero again after so many steps (chosen: 32 costs as much again, 128 has the errors of torch).
constexpr int64_t CHAIN = 64;

// The same in pieces of CHAIN steps.
template <class T, int V, int R> INLINE void long_product(Vector (*sum)[V], Left<T> a, const Word<T> *b, int64_t step, int64_t steps) {
    product<T, V, R>(sum, a, b, step, steps < CHAIN ? steps : CHAIN);
    for (int64_t s = CHAIN; s < steps; s += CHAIN) {
        alignas(64) float before[R][V * W];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int j = 0; j < V; j++) store(before[r] + j * W, sum[r][j]);
        product<T, V, R>(sum, {a.base + s * a.step, a.row, a.step}, b + s * step, step, steps - s < CHAIN ? steps - s : CHAIN);
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int j = 0; j < V; j++) sum[r][j] = add(load(before[r] + j * W), sum[r][j]);
    }
}

// A product added to memory. Its inner dimension is at most a block, so it is one chain.
template <class T, int V, int R> void add_tile(float *to, int64_t stride, Left<T> a, const Word<T> *b, int64_t step, int64_t steps) {
    Vector sum[R][V];
    product<T, V, R>(sum, a, b, step, steps);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < V; j++) store(to + r * stride + j * W, add(load(to + r * stride + j * W), sum[r][j]));
}

// Rows in groups of ROWS, of which the last is smaller where that saves work. So many rows does it take for so many:
template <class T> INLINE int64_t grouped(int64_t rows) {
    const int64_t rest = rows % ROWS<T>;
    return rows - rest + (rest <= 2 ? rest : rest <= 4 ? 4 : ROWS<T>);
}
// The function of as many rows as a group has if so many are left, which is known while compiling.
template <class T, class Do> INLINE void of_group(int64_t left, Do act) {
    if (left >= ROWS<T>) return act(std::integral_constant<int, ROWS<T>>{});
    if (left == 1) return act(std::integral_constant<int, 1>{});
    if (left == 2) return act(std::integral_constant<int, 2>{});
    return act(std::integral_constant<int, 4>{});
}

// The tiles of a product of `rows` rows (as `grouped`) and `width` columns (a multiple of W): `act(R, V, row, column)`, R and V known while compiling.
template <class T, class Do> INLINE void each_tile(int64_t rows, int64_t width, Do act) {
    constexpr int MOST = VECTORS<T>;
    for (int64_t c = 0; c < width;) {
        const int64_t left = (width - c) / W, vectors = left >= MOST ? MOST : left >= 2 ? 2 : 1;
        for (int64_t r = 0; r < rows; r += ROWS<T>)
            of_group<T>(rows - r, [&](auto group) {
                if (vectors == MOST) act(group, std::integral_constant<int, MOST>{}, r, c);
                else if (vectors == 2) act(group, std::integral_constant<int, 2>{}, r, c);
                else act(group, std::integral_constant<int, 1>{}, r, c);
            });
        c += vectors * W;
    }
}

// `rows` rows of `width` numbers, `width` apart, plus left times right; right: `width` words per step. `between` is called before each tile.
template <class T, class Do> INLINE void add_matrix(float *to, int64_t rows, int64_t width, Left<T> a, const Word<T> *b, int64_t steps, Do between) {
    each_tile<T>(rows, width, [&](auto group, auto vectors, int64_t r, int64_t c) {
        between();
        add_tile<T, vectors, group>(to + r * width + c, width, {a.base + r * a.row, a.row, a.step}, b + c, width, steps);
    });
}

// A product in place of memory, `factor` times, of which `rows` rows and `columns` columns exist.
template <class T, int V, int R>
void put_tile(float *to, int64_t stride, int64_t rows, int64_t columns, float factor, Left<T> a, const Word<T> *b, int64_t step, int64_t steps) {
    Vector sum[R][V];
    product<T, V, R>(sum, a, b, step, steps);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < V; j++) {
            const Vector found = mul(sum[r][j], all(factor));
            if (r >= rows || columns <= j * W) continue;
            if (columns >= (j + 1) * W) store(to + r * stride + j * W, found);
            else store(to + r * stride + j * W, found, columns - j * W);
        }
}

// Rows of a tensor.
struct Rows {
    float *to;
    int64_t stride, rows, width;
};

// Those rows = `factor` times left times right, as in `add_matrix`, where the product has `padded` columns.
template <class T, class Do>
INLINE void put_matrix(const Rows &into, int64_t padded, float factor, Left<T> a, const Word<T> *b, int64_t steps, Do between) {
    each_tile<T>(grouped<T>(into.rows), padded, [&](auto group, auto vectors, int64_t r, int64_t c) {
        between();
        put_tile<T, vectors, group>(into.to + r * into.stride + c, into.stride, into.rows - r, into.width - c, factor,
                                    {a.base + r * a.row, a.row, a.step}, b + c, padded, steps);
    });
}

template <class T> const T NOTHING_THERE[MAX_WIDTH] = {};

// A right factor of which `count` rows run along the inner dimension (`width` elements, `padded` of them in the product): groups of COLUMNS
// rows, word s * COLUMNS + j of a group is word s of its row j. `row_at(n)` is where row n is, or null: zeros. Behind the last row there are
// zeros up to the next W.
template <class T, class At> void columns_of(At row_at, int64_t count, int64_t width, int64_t padded, Word<T> *to) {
    const int64_t whole = width / PACKED<T>, steps = padded / PACKED<T>;
    for (int64_t j = 0; j < count; j += W) {
        Word<T> *group = to + j / COLUMNS<T> * COLUMNS<T> * steps + j % COLUMNS<T>;
        const T *rows[W];
        for (int i = 0; i < W; i++)
            if (!(rows[i] = row_at(j + i))) rows[i] = NOTHING_THERE<T>;
        int64_t s = 0;
#if defined(__AVX512F__)
        if constexpr (std::is_same_v<T, float>)
            for (; s + W <= whole; s += W) {
                const float *from[W];
                for (int i = 0; i < W; i++) from[i] = rows[i] + s;
                transpose_square(from, group + s * COLUMNS<T>, COLUMNS<T>);
            }
#endif
        for (; s + 4 <= whole; s += 4)
            for (int i = 0; i < W; i += 4) {
                const void *from[4];
                for (int l = 0; l < 4; l++) from[l] = rows[i + l] + s * PACKED<T>;
                transpose(from, group + s * COLUMNS<T> + i, COLUMNS<T> * sizeof *to);
            }
        for (; s < steps; s++)
            for (int i = 0; i < W; i++) {
                Word<T> word = 0;
                const int64_t left = width - s * PACKED<T>;
                if (left > 0) memcpy(&word, rows[i] + s * PACKED<T>, (left < PACKED<T> ? left : PACKED<T>) * sizeof(T));
                group[s * COLUMNS<T> + i] = word;
            }
    }
}

// One row as a left factor, with zeros up to the padded width; null: all zeros.
template <class T> INLINE void copy_row(const T *row, int64_t width, int64_t padded, T *to) {
    if (row) memcpy((void *)to, row, width * sizeof *to);
    const int64_t from = row ? width : 0;
    memset((void *)(to + from), 0, (padded - from) * sizeof *to);
}
INLINE void copy_row(const float *row, int64_t width, int64_t padded, float *to) {
    int64_t d = 0;
    if (row) {
        for (; d + W <= width; d += W) store(to + d, load(row + d));
        if (d < width) {
            const int64_t left = padded - d < W ? padded - d : W;
            store(to + d, load(row + d, width - d), left), d += left;
        }
    }
    for (; d + W <= padded; d += W) store(to + d, zeros());
    for (; d < padded; d++) to[d] = 0;
}

// A right factor of which rows run across the inner dimension, those of one word: the first, and for pairs the second; null: zeros.
INLINE void across(const float *const *rows, int64_t width, int64_t padded, float *to) { copy_row(rows[0], width, padded, to); }
INLINE void across(const BFloat16 *const *rows, int64_t width, int64_t padded, uint32_t *to) {
    const BFloat16 *a = rows[0] ? rows[0] : NOTHING_THERE<BFloat16>, *b = rows[1] ? rows[1] : NOTHING_THERE<BFloat16>;
    for (int64_t d = 0; d < width; d++) to[d] = (uint32_t)a[d].bits | (uint32_t)b[d].bits << 16;
    memset(to + width, 0, (padded - width) * sizeof *to);
}

}  // namespace
