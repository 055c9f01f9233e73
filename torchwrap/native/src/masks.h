// What a call adds to its scores, and which keys it hides one by one, for tiles of a pair of blocks.
//
// A bias is read where it is, or widened into a tile. Keys that are no interval are hidden by bits, made anew for each pair of blocks from
// all that says something about them: bytes, numbers of segments, tiles of a dictionary; and the intervals too, so that bits say all. Of a tile then
// two words tell whether its rows see nothing, something or everything. Making the bits takes a twentieth of the time of the products (width 32).
#pragma once

#include "blocks.h"

namespace {

// `count` numbers of a row, `stride` apart, in float32.
// Whole vectors are written, with zeros behind the last number: what is read at once from parts of a vector waits.
INLINE void widened(const float *from, int64_t count, float *to) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(to + i, load(from + i));
    if (i < count) store(to + i, load(from + i, count - i));
}
INLINE void widened(const BFloat16 *from, int64_t count, float *to) { row_as(from, count, to); }
INLINE void widened(const Float16 *from, int64_t count, float *to) { row_as(from, count, to); }
template <class E> void widened(const E *from, int64_t stride, int64_t count, float *to) {
    if (stride == 1) return widened(from, count, to);
    E line[BLOCK];
    for (int64_t i = 0; i < count; i++) line[i] = from[i * stride];
    widened(line, count, to);
}

// What is added to the scores of a tile: each row where it is in memory, or here.
template <class T> struct Added {
    const float *row[ROWS<T>];
    alignas(64) float here[ROWS<T>][COLUMNS<T>];

    // `places`: where the rows of the tile, R of them, begin in the bias.
    template <int R> void read(const PrefillCall &call, const int64_t *places, int64_t column) {
        const int64_t stride = call.bias_strides[3], left = call.k_length - column, count = left < COLUMNS<T> ? left : COLUMNS<T>;
        for (int r = 0; r < R; r++) {
            const int64_t from = places[r] + column * stride;
            if (call.bias_dtype == FLOAT32 && stride == 1 && count == COLUMNS<T>) {
                row[r] = (const float *)call.bias + from;
                continue;
            }
            row[r] = r && places[r] == places[r - 1] ? row[r - 1] : here[r];
            if (row[r] != here[r]) continue;
            switch (call.bias_dtype) {
                case FLOAT32: widened((const float *)call.bias + from, stride, count, here[r]); break;
                case BFLOAT16: widened((const BFloat16 *)call.bias + from, stride, count, here[r]); break;
                default: widened((const Float16 *)call.bias + from, stride, count, here[r]);
            }
            for (int64_t i = call.bias_dtype == FLOAT32 ? up(count, W) : count; i < COLUMNS<T>; i++) here[r][i] = 0;
        }
    }
};

// Where a row of a task is in a bias or mask of four dimensions.
INLINE int64_t place_in(const int64_t *strides, const PrefillCall &call, const PrefillTask &task, int64_t row) {
    return place_of(strides, call, task, row < task.end ? row : task.begin);
}

// Which keys of a block the rows of a block see: bit c % 32 of word c / 32 is for column c.
struct Shown {
    static constexpr int64_t WORDS = BLOCK / 32;
    uint32_t of[HEIGHT][WORDS];

    // Those of W columns from one that is a multiple of it, in the lowest bits.
    uint32_t at(int64_t row, int64_t column) const { return of[row][column / 32] >> column % 32 & ((1u << W) - 1); }

    template <class T, int R> Sight sight(int64_t row, int64_t column) const {
        uint32_t any = 0, every = (1u << W) - 1;
        for (int r = 0; r < R; r++)
            for (int j = 0; j < VECTORS<T>; j++) any |= at(row + r, column + j * W), every &= at(row + r, column + j * W);
        return !any ? NOTHING : every == (1u << W) - 1 ? EVERYTHING : SOME;
    }
};

// W numbers, with something else in place of those whose bit is 0.
INLINE Vector if_shown(Vector x, uint32_t bits, Vector otherwise) {
#if defined(__AVX512F__)
    return _mm512_mask_mov_ps(otherwise, (__mmask16)bits, x);
#else
    float lanes[W];
    for (int i = 0; i < W; i++) lanes[i] = bits >> i & 1 ? 0.f : -1.f;
    return if_below(load(lanes), 0, otherwise, x);
#endif
}

INLINE uint32_t word_of(const uint8_t *bytes, int64_t stride, int64_t count) {
    uint32_t word = 0;
#if defined(__AVX2__)
    if (stride == 1 && count == 32)
        return ~(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i *)bytes), _mm256_setzero_si256()));
#endif
    for (int64_t i = 0; i < count; i++) word |= (uint32_t)(bytes[i * stride] != 0) << i;
    return word;
}
INLINE uint32_t word_of(const int32_t *numbers, int32_t number, int64_t count) {
    uint32_t word = 0;
#if defined(__AVX512F__)
    const __mmask32 lanes = (__mmask32)((1ull << count) - 1);
    const __m512i wanted = _mm512_set1_epi32(number);
    word = _mm512_mask_cmpeq_epi32_mask((__mmask16)lanes, _mm512_maskz_loadu_epi32((__mmask16)lanes, numbers), wanted);
    return word | (uint32_t)_mm512_mask_cmpeq_epi32_mask((__mmask16)(lanes >> W), _mm512_maskz_loadu_epi32((__mmask16)(lanes >> W), numbers + W), wanted) << W;
#endif
    if (count == 32)
        for (int i = 0; i < 32; i++) word |= (uint32_t)(numbers[i] == number) << i;
    else
        for (int64_t i = 0; i < count; i++) word |= (uint32_t)(numbers[i] == number) << i;
    return word;
}
// Shown of a row of tiles, from `column` on, counted in the tiles.
INLINE uint32_t word_of(const PrefillCall &call, const int32_t *codes, int64_t row, int64_t column, int64_t count) {
    const int64_t across = call.tile_columns, bytes = across / 8;
    auto tile = [&](int64_t c) { return call.tiles + (codes[c / across] * call.tile_rows + row) * bytes + c % across / 8; };
    uint32_t word = 0;
    if (column % 32 == 0 && across % 32 == 0) {
        const uint8_t *four = tile(column);
        for (int i = 0; i < 4; i++) word |= (uint32_t)four[i] << 8 * i;
        return word;
    }
    for (int64_t i = 0; i < count; i++) word |= (uint32_t)(*tile(column + i) >> (column + i) % 8 & 1) << i;
    return word;
}

// Columns from `first` to `end`, as far as they are among the 32 from `column` on.
INLINE uint32_t word_of(Range seen, int64_t column) {
    const int64_t first = seen.first > column ? seen.first - column : 0, end = seen.end < column + 32 ? seen.end - column : 32;
    return first >= end ? 0 : (~0u << first) & (~0u >> (32 - end));
}

// Fills the bits of the rows `top` to `top + count` of a task for the tiles in `columns` of a block, and narrows these to what some row sees.
template <class T>
Range reveal(const PrefillCall &call, const PrefillTask &task, int64_t top, int64_t count, int64_t block, const Range *seen, Range columns,
             Shown &bits) {
    uint32_t any[Shown::WORDS] = {};
    for (int64_t r = 0; r < count; r++) {
        const int64_t row = task.begin + top + r;
        const auto [head, query] = query_of(call, task, row);
        const uint8_t *shown = call.shown ? call.shown + place_in(call.shown_strides, call, task, row) : nullptr;
        const int32_t *keys = call.q_segments ? call.k_segments + task.batch * call.segment_strides[1] : nullptr;
        const int64_t line = query + call.first_row;
        const int32_t *codes = !call.codes ? nullptr : call.codes + task.batch * call.code_strides[0] + head * call.code_strides[1]
                                                           + line / call.tile_rows * call.code_strides[2];
        for (int64_t w = columns.first / 32; 32 * w < columns.end; w++) {
            const int64_t column = block + 32 * w, left = call.k_length - column, length = left < 32 ? left : 32;
            uint32_t word = word_of(seen[top + r], column);
            if (word && shown) word &= word_of(shown + column * call.shown_strides[3], call.shown_strides[3], length);
            if (word && keys) word &= word_of(keys + column, call.q_segments[task.batch * call.segment_strides[0] + query], length);
            if (word && codes) word &= word_of(call, codes, line % call.tile_rows, column + call.first_column, length);
            bits.of[r][w] = word, any[w] |= word;
        }
    }
    Range found{BLOCK, 0};
    for (int64_t w = columns.first / 32; w < Shown::WORDS; w++) {
        if (!any[w]) continue;
        if (32 * w < found.first) found.first = 32 * w + __builtin_ctz(any[w]);
        found.end = 32 * w + 32 - __builtin_clz(any[w]);
    }
    return found.empty() ? Range{0, 0} : Range{found.first / COLUMNS<T> * COLUMNS<T>, up(found.end, COLUMNS<T>)};
}

}  // namespace
