// One vocabulary for vectors of float, whatever the processor: W lanes, loads that widen halves, and the few functions softmax needs.
//
// A *pair* is 2 * W consecutive elements of a row as two vectors. For bfloat16 the first holds the even and the second the odd elements,
// because a shift and a mask then widen 2 * W of them from one load. Sums over a row do not care about the order; results are put
// in order once, by `store_pair`.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "call.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))  // what fills the registers is compiled by itself
// Arrays of vectors stay in registers only when every index is known while compiling.
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(__AVX512F__)

constexpr int W = 16, REGISTERS = 32;
using Vector = __m512;

INLINE Vector zeros() { return _mm512_setzero_ps(); }
INLINE Vector all(float x) { return _mm512_set1_ps(x); }
INLINE Vector load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, Vector a) { _mm512_storeu_ps(p, a); }
INLINE Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
INLINE Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
INLINE Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
INLINE Vector div(Vector a, Vector b) { return _mm512_div_ps(a, b); }
INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
// The second argument is the answer when one is not a number: values go second, so that NaN survives.
INLINE Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }
INLINE Vector smaller(Vector a, Vector b) { return _mm512_min_ps(a, b); }
INLINE Vector nearest(Vector a) { return _mm512_roundscale_ps(a, 0); }
INLINE Vector if_below(Vector x, float bound, Vector then, Vector otherwise) {
    return _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask(x, all(bound), _CMP_LT_OQ), then);
}
INLINE Vector two_to(Vector whole) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(whole), _mm512_set1_epi32(127)), 23));
}
INLINE float sum(Vector a) { return _mm512_reduce_add_ps(a); }

INLINE void load_pair(const float *p, Vector &a, Vector &b) { a = load(p), b = load(p + W); }
INLINE void load_pair(const Float16 *p, Vector &a, Vector &b) {
    a = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
    b = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p + W)));
}
INLINE void widen(__m512i bits, Vector &even, Vector &odd) {
    even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000)));
}
INLINE void load_pair(const BFloat16 *p, Vector &a, Vector &b) { widen(_mm512_loadu_si512(p), a, b); }

// Lane i of the result is the sum of all lanes of a[i].
INLINE Vector sums(const Vector *a) {
    Vector quarter[4];
    for (int i = 0; i < 4; i++) {
        const Vector *g = a + 4 * i;
        Vector lower = add(_mm512_unpacklo_ps(g[0], g[1]), _mm512_unpackhi_ps(g[0], g[1]));
        Vector upper = add(_mm512_unpacklo_ps(g[2], g[3]), _mm512_unpackhi_ps(g[2], g[3]));
        __m512d low = _mm512_castps_pd(lower), high = _mm512_castps_pd(upper);
        quarter[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    }
    Vector left = add(_mm512_shuffle_f32x4(quarter[0], quarter[1], 0x88), _mm512_shuffle_f32x4(quarter[0], quarter[1], 0xdd));
    Vector right = add(_mm512_shuffle_f32x4(quarter[2], quarter[3], 0x88), _mm512_shuffle_f32x4(quarter[2], quarter[3], 0xdd));
    return add(_mm512_shuffle_f32x4(left, right, 0x88), _mm512_shuffle_f32x4(left, right, 0xdd));
}

#elif defined(__AVX2__)

constexpr int W = 8, REGISTERS = 16;
using Vector = __m256;

INLINE Vector zeros() { return _mm256_setzero_ps(); }
INLINE Vector all(float x) { return _mm256_set1_ps(x); }
INLINE Vector load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void store(float *p, Vector a) { _mm256_storeu_ps(p, a); }
INLINE Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
INLINE Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
INLINE Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
INLINE Vector div(Vector a, Vector b) { return _mm256_div_ps(a, b); }
INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
// The second argument is the answer when one is not a number: values go second, so that NaN survives.
INLINE Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }
INLINE Vector smaller(Vector a, Vector b) { return _mm256_min_ps(a, b); }
INLINE Vector nearest(Vector a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Vector if_below(Vector x, float bound, Vector then, Vector otherwise) {
    return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(x, all(bound), _CMP_LT_OQ));
}
INLINE Vector two_to(Vector whole) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23));
}

INLINE void load_pair(const float *p, Vector &a, Vector &b) { a = load(p), b = load(p + W); }
INLINE void load_pair(const Float16 *p, Vector &a, Vector &b) {
    a = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
    b = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + W)));
}
INLINE void load_pair(const BFloat16 *p, Vector &even, Vector &odd) {
    __m256i bits = _mm256_loadu_si256((const __m256i *)p);
    even = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(0xffff0000)));
}

// Lane i of the result is the sum of all lanes of a[i].
INLINE Vector sums(const Vector *a) {
    Vector low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    Vector high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
    return add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
INLINE float sum(Vector a) {
    Vector copies[W] = {a, zeros(), zeros(), zeros(), zeros(), zeros(), zeros(), zeros()};
    return _mm256_cvtss_f32(sums(copies));
}

#else

// Four lanes in the compiler's own vectors: SSE2 on any x86-64, NEON on any aarch64.
constexpr int W = 4, REGISTERS = 16;
typedef float Vector __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));

INLINE Vector zeros() { return Vector{}; }
INLINE Vector all(float x) { return Vector{x, x, x, x}; }
INLINE Vector load(const float *p) { Vector a; memcpy(&a, p, sizeof a); return a; }
INLINE void store(float *p, Vector a) { memcpy(p, &a, sizeof a); }
INLINE Vector add(Vector a, Vector b) { return a + b; }
INLINE Vector sub(Vector a, Vector b) { return a - b; }
INLINE Vector mul(Vector a, Vector b) { return a * b; }
INLINE Vector div(Vector a, Vector b) { return a / b; }
INLINE Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }
INLINE Vector smaller(Vector a, Vector b) { return a < b ? a : b; }
// Adding and taking away 1.5 * 2^23 leaves the nearest whole number, for what is smaller than 2^22.
INLINE Vector nearest(Vector a) { return (a + 12582912.f) - 12582912.f; }
INLINE Vector if_below(Vector x, float bound, Vector then, Vector otherwise) { return x < all(bound) ? then : otherwise; }
INLINE Vector two_to(Vector whole) { return (Vector)((__builtin_convertvector(whole, decltype(whole < whole)) + 127) << 23); }
INLINE float sum(Vector a) { return (a[0] + a[1]) + (a[2] + a[3]); }
INLINE Vector sums(const Vector *a) { return Vector{sum(a[0]), sum(a[1]), sum(a[2]), sum(a[3])}; }

INLINE Vector widen(const Float16 *p) {
    typedef uint16_t Half __attribute__((vector_size(8)));
    Half half;
    memcpy(&half, p, sizeof half);
    // The exponent's bias differs by 112; a product with 2^112 also makes normal numbers of the small ones.
    const Bits bits = __builtin_convertvector(half, Bits), largest = (Bits)((bits & 0x7c00u) == 0x7c00u);
    const Bits rest = (Bits)((Vector)((bits & 0x7fffu) << 13) * 0x1p112f);
    return (Vector)(rest | (largest & 0x7f800000u) | (bits & 0x8000u) << 16);
}
INLINE void load_pair(const float *p, Vector &a, Vector &b) { a = load(p), b = load(p + W); }
INLINE void load_pair(const Float16 *p, Vector &a, Vector &b) {
    a = widen(p), b = widen(p + W);
}
INLINE void load_pair(const BFloat16 *p, Vector &even, Vector &odd) {
    Bits bits;
    memcpy(&bits, p, sizeof bits);
    even = (Vector)(bits << 16), odd = (Vector)(bits & 0xffff0000u);
}

#endif

// Four words of each of four rows, the words of one place side by side; lines of the result are `stride` bytes apart.
INLINE void transpose(const void *const *rows, void *to, size_t stride) {
    char *line = (char *)to;
#if defined(__AVX2__)
    __m128 a = _mm_loadu_ps((const float *)rows[0]), b = _mm_loadu_ps((const float *)rows[1]);
    __m128 c = _mm_loadu_ps((const float *)rows[2]), d = _mm_loadu_ps((const float *)rows[3]);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    const __m128 lines[] = {a, b, c, d};
    for (int word = 0; word < 4; word++, line += stride) _mm_storeu_ps((float *)line, lines[word]);
#else
    for (int word = 0; word < 4; word++, line += stride)
        for (int row = 0; row < 4; row++) memcpy(line + 4 * row, (const char *)rows[row] + 4 * word, 4);
#endif
}

#if defined(__AVX512F__)
// W words of each of W rows: line i of the result has word i of all rows.
INLINE void transpose_square(const float *const *rows, float *to, int64_t stride) {
    for (int word = 0; word < W; word += 4) {
        Vector four[4];  // of rows i, i + 4, i + 8 and i + 12
        UNROLL for (int i = 0; i < 4; i++) {
            four[i] = _mm512_castps128_ps512(_mm_loadu_ps(rows[i] + word));
            four[i] = _mm512_insertf32x4(four[i], _mm_loadu_ps(rows[i + 4] + word), 1);
            four[i] = _mm512_insertf32x4(four[i], _mm_loadu_ps(rows[i + 8] + word), 2);
            four[i] = _mm512_insertf32x4(four[i], _mm_loadu_ps(rows[i + 12] + word), 3);
        }
        const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(four[0], four[1])), b = _mm512_castps_pd(_mm512_unpackhi_ps(four[0], four[1]));
        const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(four[2], four[3])), d = _mm512_castps_pd(_mm512_unpackhi_ps(four[2], four[3]));
        store(to + word * stride, _mm512_castpd_ps(_mm512_unpacklo_pd(a, c)));
        store(to + (word + 1) * stride, _mm512_castpd_ps(_mm512_unpackhi_pd(a, c)));
        store(to + (word + 2) * stride, _mm512_castpd_ps(_mm512_unpacklo_pd(b, d)));
        store(to + (word + 3) * stride, _mm512_castpd_ps(_mm512_unpackhi_pd(b, d)));
    }
}
#endif

// Has it in a register: what is read from memory once would else be read again for every use of it.
#if defined(__AVX512F__)
INLINE void hold(Vector &a) { asm("" : "+v"(a)); }
#elif defined(__x86_64__)
INLINE void hold(Vector &a) { asm("" : "+x"(a)); }
#elif defined(__aarch64__)
INLINE void hold(Vector &a) { asm("" : "+w"(a)); }
#else
INLINE void hold(Vector &) {}
#endif

// The first `count` elements of a vector or a pair; what lies behind them in memory is not touched, and counts as zero.
#if defined(__AVX512F__)
INLINE Vector load(const float *p, int64_t count) { return _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p); }
INLINE void store(float *p, Vector a, int64_t count) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), a); }
INLINE void load_pair(const float *p, int count, Vector &a, Vector &b) {
    const uint32_t lanes = (uint32_t)((1ull << count) - 1);
    a = _mm512_maskz_loadu_ps((__mmask16)lanes, p), b = _mm512_maskz_loadu_ps((__mmask16)(lanes >> W), p + W);
}
INLINE void load_pair(const Float16 *p, int count, Vector &a, Vector &b) {
    const uint32_t lanes = (uint32_t)((1ull << count) - 1);
    a = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)lanes, p));
    b = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)(lanes >> W), p + W));
}
INLINE void load_pair(const BFloat16 *p, int count, Vector &even, Vector &odd) {
    widen(_mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), p), even, odd);
}
#else
INLINE Vector load(const float *p, int64_t count) {
    float whole[W] = {};
    for (int64_t i = 0; i < count; i++) whole[i] = p[i];
    return load(whole);
}
INLINE void store(float *p, Vector a, int64_t count) {
    float whole[W];
    store(whole, a);
    for (int64_t i = 0; i < count; i++) p[i] = whole[i];
}
template <class T> INLINE void load_pair(const T *p, int count, Vector &a, Vector &b) {
    T whole[2 * W];
    memset((void *)whole, 0, sizeof whole);
    memcpy((void *)whole, p, count * sizeof(T));
    load_pair(whole, a, b);
}
#endif

INLINE void store_pair(const float *, Vector a, Vector b, float *to) { store(to, a), store(to + W, b); }
INLINE void store_pair(const Float16 *, Vector a, Vector b, float *to) { store(to, a), store(to + W, b); }
#if defined(__AVX512F__)
INLINE void store_pair(const BFloat16 *, Vector even, Vector odd, float *to) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    store(to, _mm512_permutex2var_ps(even, low, odd)), store(to + W, _mm512_permutex2var_ps(even, high, odd));
}
#else
INLINE void store_pair(const BFloat16 *, Vector a, Vector b, float *to) {
    float even[W], odd[W];
    store(even, a), store(odd, b);
    for (int i = 0; i < W; i++) to[2 * i] = even[i], to[2 * i + 1] = odd[i];
}
#endif

// (2^t - 1) for |t| <= 1/2, by the series of exp(t * ln 2): the first term left out is below 6e-9 of the result.
INLINE Vector power_series(Vector t) {
    Vector x = mul(t, all(0.693147181f)), y = all(1.f / 5040);
    y = fma(y, x, all(1.f / 720));
    y = fma(y, x, all(1.f / 120));
    y = fma(y, x, all(1.f / 24));
    y = fma(y, x, all(1.f / 6));
    y = fma(y, x, all(.5f));
    y = fma(y, x, all(1.f));
    return mul(x, y);
}

// 2^x for x <= 0; exactly zero below 2^-126 and for -inf.
#if defined(__AVX512F__)
// x = floor(x) + r with r in [0, 1): the polynomial of 2^r is off by 2e-9 at most (fitted), 1 at 0. A row of one key has the weight 1.
INLINE Vector exp2(Vector x) {
    const Vector r = _mm512_sub_ps(x, _mm512_roundscale_ps(x, 1));
    Vector y = all(2.16129151e-4f);
    y = fma(y, r, all(1.24678464e-3f));
    y = fma(y, r, all(9.67545157e-3f));
    y = fma(y, r, all(5.54852806e-2f));
    y = fma(y, r, all(.240229306f));
    y = fma(y, r, all(.693147044f));
    y = fma(y, r, all(1.f));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, all(-126.f), _CMP_NLT_UQ), y, x);  // not a number: stays none
}
#else
INLINE Vector exp2(Vector x) {
    Vector inside = larger(all(-126.f), x), whole = nearest(inside);
    Vector power = two_to(whole);
    return if_below(x, -126.f, zeros(), fma(power, power_series(sub(inside, whole)), power));
}
#endif

// The natural logarithm of what is not negative.
#if defined(__AVX512F__)
// x = m * 2^e with m between the roots of 1/2 and 2: the polynomial of log(m) is that of the Cephes library (S. Moshier, logf).
INLINE Vector logarithm(Vector x) {
    const Vector part = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    const __mmask16 large = _mm512_cmp_ps_mask(part, all(1.41421356f), _CMP_GT_OQ);
    const Vector e = _mm512_mask_add_ps(_mm512_getexp_ps(x), large, _mm512_getexp_ps(x), all(1.f));
    const Vector m = sub(_mm512_mask_mul_ps(part, large, part, all(.5f)), all(1.f)), square = mul(m, m);
    Vector y = all(7.0376836292e-2f);
    y = fma(y, m, all(-1.1514610310e-1f));
    y = fma(y, m, all(1.1676998740e-1f));
    y = fma(y, m, all(-1.2420140846e-1f));
    y = fma(y, m, all(1.4249322787e-1f));
    y = fma(y, m, all(-1.6668057665e-1f));
    y = fma(y, m, all(2.0000714765e-1f));
    y = fma(y, m, all(-2.4999993993e-1f));
    y = fma(y, m, all(3.3333331174e-1f));
    y = fma(e, all(-2.12194440e-4f), mul(mul(y, m), square));
    return fma(e, all(.693359375f), add(m, fma(square, all(-.5f), y)));
}
#else
INLINE Vector logarithm(Vector x) {
    float lanes[W];
    store(lanes, x);
    for (float &lane : lanes) lane = logf(lane);
    return load(lanes);
}
#endif

// With e = exp(2 x) - 1 the hyperbolic tangent is e / (e + 2), accurate also where it is small.
INLINE Vector tanh(Vector x) {
    Vector inside = smaller(all(40.f), larger(all(-40.f), mul(x, all(2.88539008f)))), whole = nearest(inside);
    Vector power = two_to(whole), e = fma(power, power_series(sub(inside, whole)), sub(power, all(1.f)));
    return div(e, add(e, all(2.f)));
}

}  // namespace
