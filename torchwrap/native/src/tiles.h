// Products of small matrices of bfloat16 with sums in float32: what attention over many queries consists of.
//
// The inner dimension goes in pairs, as the processor's instruction for bfloat16 takes them: a *pair* is two neighbouring elements of it in one
// 32-bit word. The left factor gives one pair at a time, to all lanes; the right factor gives W columns of pairs. So a right factor
// is packed beforehand: `columns_of` makes it of rows that run along the inner dimension, `pairs_of` of rows that run across it.
// Sums of ROWS rows and up to COLUMNS columns stand in registers while the inner dimension is walked.
#pragma once

#include "simd.h"

namespace {

constexpr int ROWS = 4, VECTORS = REGISTERS == 32 ? 4 : 2, COLUMNS = VECTORS * W;

#if defined(__AVX512BF16__)
using Pairs = __m512bh;
INLINE Pairs pairs(const uint32_t *p) { return (Pairs)_mm512_loadu_si512(p); }
INLINE Pairs pair(uint32_t p) { return (Pairs)_mm512_set1_epi32((int)p); }
INLINE Vector add_products(Vector sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, a, b); }

// Words of two rows, the first in the lower halves; and each row by itself.
INLINE void store_rounded(Vector a, Vector b, uint32_t *both, uint16_t *row_a = nullptr, uint16_t *row_b = nullptr) {
    const __m256i x = (__m256i)_mm512_cvtneps_pbh(a), y = (__m256i)_mm512_cvtneps_pbh(b);
    _mm512_storeu_si512(both, _mm512_or_si512(_mm512_cvtepu16_epi32(x), _mm512_slli_epi32(_mm512_cvtepu16_epi32(y), 16)));
    if (row_a) _mm256_storeu_si256((__m256i *)row_a, x), _mm256_storeu_si256((__m256i *)row_b, y);
}
// 2 * W numbers of one row.
INLINE void store_rounded(Vector a, Vector b, uint16_t *to) { _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(b, a)); }
#else
struct Pairs { Vector even, odd; };
INLINE Pairs pairs(const uint32_t *p) { Pairs a; load_pair((const BFloat16 *)p, a.even, a.odd); return a; }
INLINE Pairs pair(uint32_t p) {
    const uint32_t words[2] = {p << 16, p & 0xffff0000u};
    float parts[2];
    memcpy(parts, words, sizeof parts);
    return {all(parts[0]), all(parts[1])};
}
INLINE Vector add_products(Vector sum, Pairs a, Pairs b) { return fma(a.odd, b.odd, fma(a.even, b.even, sum)); }

INLINE uint32_t rounded(float x);
INLINE void store_rounded(Vector a, Vector b, uint32_t *both, uint16_t *row_a = nullptr, uint16_t *row_b = nullptr) {
    float x[W], y[W];
    store(x, a), store(y, b);
    for (int i = 0; i < W; i++) {
        const uint32_t low = rounded(x[i]), high = rounded(y[i]);
        both[i] = low | high << 16;
        if (row_a) row_a[i] = (uint16_t)low, row_b[i] = (uint16_t)high;
    }
}
INLINE void store_rounded(Vector a, Vector b, uint16_t *to) {
    float x[2 * W];
    store(x, a), store(x + W, b);
    for (int i = 0; i < 2 * W; i++) to[i] = (uint16_t)rounded(x[i]);
}
#endif

// To the nearest bfloat16, ties to even; what is not a number stays so.
INLINE uint32_t rounded(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
INLINE float widened(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// Where the pairs of the left factor are: of row r and step s at `base[r * row + s * step]`.
struct Left {
    const uint32_t *base;
    int64_t row, step;
};

// sum[r][j] += over `steps` pairs of row r and columns j * W and on; the pairs of one step of the right factor are `step` words apart.
template <int V> INLINE void add_product(Vector (*sum)[V], Left a, const uint32_t *b, int64_t step, int64_t steps) {
    for (int64_t s = 0; s < steps; s++) {
        Pairs column[V];
        UNROLL for (int j = 0; j < V; j++) column[j] = pairs(b + s * step + j * W);
        UNROLL for (int r = 0; r < ROWS; r++) {
            const Pairs row = pair(a.base[r * a.row + s * a.step]);
            UNROLL for (int j = 0; j < V; j++) sum[r][j] = add_products(sum[r][j], row, column[j]);
        }
    }
}

// The same added to memory.
template <int V> void add_tile(float *to, int64_t stride, Left a, const uint32_t *b, int64_t step, int64_t steps) {
    Vector sum[ROWS][V];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int j = 0; j < V; j++) sum[r][j] = load(to + r * stride + j * W);
    add_product<V>(sum, a, b, step, steps);
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int j = 0; j < V; j++) store(to + r * stride + j * W, sum[r][j]);
}

// `rows` rows (a multiple of ROWS) of `width` numbers (a multiple of 16), `width` apart, plus left times right; right: `width` words per step.
INLINE void add_matrix(float *to, int64_t rows, int64_t width, Left a, const uint32_t *b, int64_t steps) {
    for (int64_t c = 0; c < width;) {
        const int64_t left = (width - c) / W, vectors = left >= VECTORS ? VECTORS : left >= 2 ? 2 : 1;
        for (int64_t r = 0; r < rows; r += ROWS) {
            const Left from{a.base + r * a.row, a.row, a.step};
            if (vectors == VECTORS) add_tile<VECTORS>(to + r * width + c, width, from, b + c, width, steps);
            else if (vectors == 2) add_tile<2>(to + r * width + c, width, from, b + c, width, steps);
            else add_tile<1>(to + r * width + c, width, from, b + c, width, steps);
        }
        c += vectors * W;
    }
}

// A right factor of which `count` rows run along the inner dimension (`width` elements, `padded` of them in the product): groups of COLUMNS
// rows, word s * COLUMNS + j of a group is pair s of its row j. `row_at(n)` is where row n is, or null: zeros.
template <class At> void columns_of(At row_at, int64_t count, int64_t width, int64_t padded, uint32_t *to) {
    for (int64_t group = 0; group < count; group += COLUMNS, to += padded / 2 * COLUMNS) {
        for (int64_t j = 0; j < COLUMNS; j++) {
            const uint16_t *row = row_at(group + j);
            int64_t s = 0;
            if (row) {
                for (; s < width / 2; s++) memcpy(to + s * COLUMNS + j, row + 2 * s, 4);
                if (width % 2) to[s++ * COLUMNS + j] = row[width - 1];
            }
            for (; s < padded / 2; s++) to[s * COLUMNS + j] = 0;
        }
    }
}

// A right factor of which two rows across the inner dimension make the pairs: word d is (first[d], second[d]); null: zeros.
INLINE void pairs_of(const uint16_t *first, const uint16_t *second, int64_t width, int64_t padded, uint32_t *to) {
    static const uint16_t nothing[MAX_WIDTH] = {};
    const uint16_t *a = first ? first : nothing, *b = second ? second : nothing;
    for (int64_t d = 0; d < width; d++) to[d] = (uint32_t)a[d] | (uint32_t)b[d] << 16;
    memset(to + width, 0, (padded - width) * sizeof *to);
}

}  // namespace
