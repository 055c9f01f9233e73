// Scores of a few rows of bfloat16 by fused multiply-adds, with four keys in every vector.
//
// `score_rows` (rows.h) adds up the product of each query and key over the lanes of a vector of its own: 45 instructions for 16 products, of
// which the multiplications of 64 elements are 64. Here the words of four keys are turned within the quarters of vectors first, once for all
// rows, so that a vector holds four keys, and what is left to add up are its quarters: 9 instructions for 16 products.
//
//     key 0: a0 a1 a2 a3 | a4 ...        vector 0: a0 b0 c0 d0 | a4 b4 c4 d4 | ...
//     key 1: b0 b1 b2 b3 | b4 ...   ->   vector 1: a1 b1 c1 d1 | a5 b5 c5 d5 | ...      (a word: two neighbouring elements)
//
// A query has each word four times in that order, beforehand, as two vectors of float32: of even and of odd elements.
// Only where bfloat16 is widened: instructions for products of its pairs are too few for that to be worth anything.
#pragma once

#include <utility>

#include "rows.h"

namespace {

#if defined(__AVX512F__) && !defined(__AVX512BF16__)
template <class T> constexpr bool TURNS = std::is_same_v<T, BFloat16>;
#else
template <class T> constexpr bool TURNS = false;
#endif

constexpr int QUARTERS = 4;  // of a vector

// Rows that go through the cache together; whether keys are turned for so many (up to two the lanes are added up sooner, and four fill the
// vectors of `score_rows` without a rest: measured); and vectors of each for 2 * W elements.
template <class T> constexpr int AT_ONCE = TURNS<T> ? 8 : 4;
template <class T> constexpr bool turns(int64_t rows) { return TURNS<T> && (rows == 3 || rows > 4); }
template <class T> constexpr int64_t UNIT = TURNS<T> ? 2 * QUARTERS : sizeof(typename Dot<T>::Unit) / sizeof(Vector);

// As `score_rows` and `pack_block`, for rows that `turns` names. Where no score is above the maximum of its row so far, that is said to be the
// largest.
template <int NR>
void turned_rows(const Vector *q, const Lines<BFloat16> &keys, int64_t width, const Score &how, float *scores, int64_t line_of,
                 const Row *row, float *largest, Beside &ahead);
template <class T> void turn_queries(const T *const *rows, int64_t count, int64_t width, Vector *to);

#if defined(__AVX512F__) && !defined(__AVX512BF16__)

// [unit][vector][even, odd][row].
template <class T> void turn_queries(const T *const *rows, int64_t count, int64_t width, Vector *to) {
    for (int64_t d = 0; d < width; d += 2 * W)
        for (int64_t r = 0; r < count; r++) {
            const int64_t left = width - d;
            const __m512i words = _mm512_maskz_loadu_epi16(left < 2 * W ? (__mmask32)((1ull << left) - 1) : ~0u, rows[r] + d);
            const __m512i of_quarter[QUARTERS] = {_mm512_shuffle_epi32(words, _MM_PERM_AAAA), _mm512_shuffle_epi32(words, _MM_PERM_BBBB),
                                                  _mm512_shuffle_epi32(words, _MM_PERM_CCCC), _mm512_shuffle_epi32(words, _MM_PERM_DDDD)};
            Vector *at = to + d / (2 * W) * UNIT<T> * count + r;
            for (const __m512i &word : of_quarter) widen(word, at[0], at[count]), at += 2 * count;
        }
}

// The function of 0 ... N - 1, which are known while compiling: arrays of vectors that it works with stand in registers.
template <class F, int... I> INLINE void each(F act, std::integer_sequence<int, I...>) { (act(std::integral_constant<int, I>{}), ...); }
template <int N, class F> INLINE void each(F act) { each(act, std::make_integer_sequence<int, N>{}); }
#define INLINED __attribute__((always_inline))

// Of two vectors, the sums of their first two quarters and of their last two.
INLINE Vector fold(Vector a, Vector b) { return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); }

// Adds the products of NR rows with one unit of four keys to their sums.
template <int NR, class Sum> INLINE void add_turned(__m512i a, __m512i b, __m512i c, __m512i d, const Vector *q, Sum sum) {
    const __m512i low = _mm512_unpacklo_epi32(a, b), high = _mm512_unpackhi_epi32(a, b);
    const __m512i low2 = _mm512_unpacklo_epi32(c, d), high2 = _mm512_unpackhi_epi32(c, d);
    const __m512i words[QUARTERS] = {_mm512_unpacklo_epi64(low, low2), _mm512_unpackhi_epi64(low, low2), _mm512_unpacklo_epi64(high, high2),
                                     _mm512_unpackhi_epi64(high, high2)};
    each<QUARTERS>([&](auto word) INLINED {
        Vector even, odd;
        widen(words[word], even, odd);
        each<NR>([&](auto r) INLINED { sum(r) = fma(even, q[2 * word * NR + r], sum(r)); });
        each<NR>([&](auto r) INLINED { sum(r) = fma(odd, q[(2 * word + 1) * NR + r], sum(r)); });
    });
}

// Sums of NR rows and 4 * G keys, [row][pair of groups], each pair folded.
template <int NR, int G>
INLINE void turned_sums(const Vector *q, const BFloat16 *keys, int64_t stride, int64_t width, Vector *folded, Beside &ahead) {
    constexpr int64_t LONGEST = 4;  // units that one sum takes in turn (chosen)
    const int64_t units = width / (2 * W), rest = width % (2 * W);
    Vector sum[NR * G];
    each<NR * G>([&](auto i) INLINED { sum[i] = zeros(); });
    int64_t u = 0;
    const auto add_units = [&](int64_t end) INLINED {
        for (; u < end; u++, q += UNIT<BFloat16> * NR)
            each<G>([&](auto g) INLINED {
                // Queries are read again for every group of keys: were they kept, the sums would have no registers. Volatile, so that memory is
                // asked for group by group, not for all at the beginning: takes 2 to 4 % less.
                asm volatile("" : "+r"(q));
                const BFloat16 *const at = keys + 4 * g * stride + u * 2 * W;
                for (int i = 0; i < 4; i++) Beside::unit(ahead);
                add_turned<NR>(_mm512_loadu_si512(at), _mm512_loadu_si512(at + stride), _mm512_loadu_si512(at + 2 * stride),
                               _mm512_loadu_si512(at + 3 * stride), q, [&](auto r) INLINED -> Vector & { return sum[r * G + g]; });
            });
    };
    add_units(units < LONGEST ? units : LONGEST);
    // Errors grow with the number of terms that one register takes in turn, so a sum begins at zero again.
    while (u < units) {
        alignas(64) float before[NR * G][W];
        each<NR * G>([&](auto i) INLINED { store(before[i], sum[i]), sum[i] = zeros(); });
        add_units(units < u + LONGEST ? units : u + LONGEST);
        each<NR * G>([&](auto i) INLINED { sum[i] = add(load(before[i]), sum[i]); });
    }
    if (rest) {
        const __mmask32 some = (__mmask32)((1ull << rest) - 1);
        each<G>([&](auto g) INLINED {
            asm volatile("" : "+r"(q));
            const BFloat16 *const at = keys + 4 * g * stride + u * 2 * W;
            for (int i = 0; i < 4; i++) Beside::unit(ahead);
            add_turned<NR>(_mm512_maskz_loadu_epi16(some, at), _mm512_maskz_loadu_epi16(some, at + stride),
                           _mm512_maskz_loadu_epi16(some, at + 2 * stride), _mm512_maskz_loadu_epi16(some, at + 3 * stride), q,
                           [&](auto r) INLINED -> Vector & { return sum[r * G + g]; });
        });
    }
    each<NR * G / 2>([&](auto i) INLINED { folded[i] = fold(sum[2 * i], sum[2 * i + 1]); });
}

template <int NR>
void turned_rows(const Vector *q, const Lines<BFloat16> &keys, int64_t width, const Score &how, float *scores, int64_t line_of,
                 const Row *row, float *largest, Beside &asked) {
    Beside ahead = asked;  // in registers
    constexpr int G = NR > 4 ? 2 : 4, PARTS = 4 / G;  // groups of four keys, so that the sums of all stand in registers
    Vector top[NR];
    each<NR>([&](auto r) INLINED { top[r] = all(-INFINITY); });
    for (int64_t j = 0; j < keys.count; j += W) {
        const BFloat16 *base = keys.base + j * keys.stride;
        int64_t stride = keys.stride;
        alignas(64) BFloat16 copies[W * MAX_WIDTH];
        if (keys.count - j < W) {
            // Keys behind the last are the last again: their scores are never read, and change no maximum.
            for (int64_t i = 0; i < W; i++)
                memcpy(copies + i * width, keys.base + (j + i < keys.count ? j + i : keys.count - 1) * stride, width * sizeof *copies);
            base = copies, stride = width;
        }
        Vector folded[PARTS][NR * G / 2];
        each<PARTS>([&](auto part) INLINED {
            turned_sums<NR, G>(q, base + part * 4 * G * stride, stride, width, folded[part], ahead);
        });
        each<NR>([&](auto r) INLINED {
            const Vector found = Score::of(how, PARTS == 1 ? fold(folded[0][2 * r], folded[0][2 * r + 1]) : fold(folded[0][r], folded[PARTS - 1][r]));
            top[r] = larger(top[r], found);
            store(scores + r * line_of + j, found);
        });
    }
    asked = ahead;
    // A maximum that stays, as most do, need not be looked for among the lanes.
    for (int r = 0; r < NR; r++) {
        const bool above = _mm512_cmp_ps_mask(top[r], all(row[r].maximum), _CMP_GT_OQ);
        largest[r] = above ? _mm512_reduce_max_ps(top[r]) : row[r].maximum;
    }
}

#endif

}  // namespace
