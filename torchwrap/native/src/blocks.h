// Blocks of rows and keys, as the kernels for many queries pack them for the products of tiles.h.
#pragma once

#include "rows.h"

namespace {

INLINE int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Cuts memory into arrays that begin at cache lines; from null it only counts.
struct Cut {
    char *next;
    template <class T> void operator()(T *&at, int64_t count) { at = (T *)next, next += up(count * (int64_t)sizeof(T), 64); }
};

// Which query of which head a row of a task is.
struct Query { int64_t head, number; };
INLINE Query query_of(const PrefillCall &call, const PrefillTask &task, int64_t row) {
    const int64_t head = row < call.q_length ? 0 : row / call.q_length;  // a division takes the time of 20 sums
    return {task.head * call.group + head, row - head * call.q_length};
}
// Where it is in a tensor with query heads.
INLINE int64_t place_of(const int64_t *strides, const PrefillCall &call, const PrefillTask &task, int64_t row) {
    const Query query = query_of(call, task, row);
    return task.batch * strides[0] + query.head * strides[1] + query.number * strides[2];
}
// The same for lse, which is contiguous.
INLINE int64_t lse_of(const PrefillCall &call, const PrefillTask &task, int64_t row) {
    return (task.batch * call.kv_heads + task.head) * call.group * call.q_length + row;
}

// Memory of the task that probably comes next, asked for while this one is computed, some rows at every step: all at once they would wait for
// each other. Heads of a few tokens lie apart, and the processor does not foresee where. Of many rows only the first ones.
class Coming {
    static constexpr int64_t MOST = 128;
    struct Rows { const char *at; int64_t stride, bytes, left; } of[8];
    int tensors = 0, now = 0;
    int64_t all = 0, each = 0;
    const PrefillCall &call;
    const PrefillTask &task;

public:
    Coming(const PrefillCall &call, const PrefillTask &task) : call(call), task(task) {}
    void queries(const void *tensor, const int64_t *strides, int64_t width) {
        add(tensor, strides, task.next_batch, task.next_head * call.group, call.q_length, width);
    }
    void keys(const void *tensor, const int64_t *strides, int64_t width) {
        add(tensor, strides, task.next_batch, task.next_head, call.k_length, width);
    }
    // What this task itself will write.
    void own(const void *tensor, const int64_t *strides, int64_t width) {
        if (task.next_batch >= 0) add(tensor, strides, task.batch, task.head * call.group, call.q_length, width);
    }
    void add(const void *tensor, const int64_t *strides, int64_t batch, int64_t head, int64_t rows, int64_t width) {
        if (batch < 0) return;
        const int64_t size = call.dtype == FLOAT32 ? 4 : 2;
        of[tensors++] = {(const char *)tensor + (batch * strides[0] + head * strides[1]) * size, strides[2] * size, width * size,
                         rows < MOST ? rows : MOST};
        all += of[tensors - 1].left;
    }
    void in_steps(int64_t steps) { each = (all + steps - 1) / steps; }
    void step() {
        for (int64_t row = 0; row < each && now < tensors; row++) {
            Rows &rows = of[now];
            for (int64_t byte = 0; byte < rows.bytes; byte += 64) __builtin_prefetch(rows.at + byte, 0, 2);
            rows.at += rows.stride;
            if (--rows.left <= 0) now++;
        }
    }
};

// What the rows of a task see, from its first row on, and everything that any of them sees. Rows behind its end see nothing.
INLINE Range look(const PrefillCall &call, const PrefillTask &task, Range *seen) {
    Range span{call.k_length, 0};
    for (int64_t r = 0; r < call.part; r++) {
        const int64_t row = task.begin + r;
        seen[r] = row < task.end ? seen_by(call, task.batch, row) : Range{0, 0};
        if (seen[r].empty()) {
            seen[r] = {0, 0};
            continue;
        }
        if (seen[r].first < span.first) span.first = seen[r].first;
        if (seen[r].end > span.end) span.end = seen[r].end;
    }
    return span;
}

// Columns of the block of keys from `block` on that some of these rows see, widened to whole tiles.
template <class T> INLINE Range columns_seen(const Range *seen, int64_t rows, int64_t block) {
    Range span{BLOCK, 0};
    for (int64_t r = 0; r < rows; r++) {
        if (seen[r].end <= block || seen[r].first >= block + BLOCK) continue;
        if (seen[r].first - block < span.first) span.first = seen[r].first > block ? seen[r].first - block : 0;
        if (seen[r].end - block > span.end) span.end = seen[r].end < block + BLOCK ? seen[r].end - block : BLOCK;
    }
    return span.empty() ? Range{0, 0} : Range{span.first / COLUMNS<T> * COLUMNS<T>, up(span.end, COLUMNS<T>)};
}

enum Sight { NOTHING, SOME, EVERYTHING };

// Of a tile of R rows whose first column is `left`, what its rows see.
template <class T, int R> INLINE Sight sight(const Range *seen, int64_t left) {
    bool none = true, whole = true;
    for (int r = 0; r < R; r++) {
        if (seen[r].first < left + COLUMNS<T> && seen[r].end > left) none = false;
        if (seen[r].first > left || seen[r].end < left + COLUMNS<T>) whole = false;
    }
    return none ? NOTHING : whole ? EVERYTHING : SOME;
}

// W numbers, the first of column `left`, with something else in place of those that a row does not see.
INLINE Vector if_seen(Vector x, Range seen, int64_t left, Vector otherwise) {
    alignas(64) static const float lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Vector column = load(lanes);
    x = if_below(column, (float)(seen.first - left), otherwise, x);
    return if_below(sub(zeros(), column), (float)(left - seen.end + 1), otherwise, x);
}

// A row as products take it: where it is, or widened to float32.
template <class T, class E> using Wide = T[std::is_same_v<T, E> ? 1 : MAX_WIDTH];
template <class T> INLINE const T *row_as(const T *row, int64_t, T *) { return row; }
INLINE const float *row_as(const BFloat16 *row, int64_t width, float *wide) {
    for (int64_t d = 0; d < width; d++) wide[d] = widened(row[d]);
    return wide;
}
INLINE const float *row_as(const Float16 *row, int64_t width, float *wide) {
    for (int64_t d = 0; d < width; d += 2 * W) {
        const int64_t count = width - d < 2 * W ? width - d : 2 * W;
        Vector a, b;
        float both[2 * W];
        if (count == 2 * W) load_pair(row + d, a, b);
        else load_pair(row + d, (int)count, a, b);
        store(both, a), store(both + W, b);
        memcpy(wide + d, both, count * sizeof *both);
    }
    return wide;
}

// Keys or values of a block, of which a task sees those in `span`; the others count as zeros, whatever they hold. Vectors behind the last are not
// packed. They are T in products and E in memory.
template <class T, class E> struct Keys {
    const E *base;
    int64_t stride, block, count;
    Range span;
    Keys(const void *tensor, const int64_t *strides, const PrefillTask &task, int64_t block, Range span)
        : base((const E *)tensor + task.batch * strides[0] + task.head * strides[1]), stride(strides[2]), block(block), span(span) {
        count = span.end - block < BLOCK ? up(span.end - block, W) : BLOCK;
    }
    const T *row(int64_t n, int64_t width, T *wide) const {
        return block + n >= span.first && block + n < span.end ? row_as(base + (block + n) * stride, width, wide) : nullptr;
    }
    void pack_columns(int64_t width, int64_t padded, Word<T> *to) const {
        Wide<T, E> wide[W];
        columns_of<T>([&](int64_t n) { return row(n, width, wide[n % W]); }, count, width, padded, to);
    }
    void pack_across(int64_t width, int64_t padded, Word<T> *to) const {
        Wide<T, E> wide;
        for (int64_t n = 0; n < count; n += PACKED<T>, to += padded) {
            const T *rows[2] = {row(n, width, wide), PACKED<T> == 1 ? nullptr : row(n + 1, width, wide)};
            across(rows, width, padded, to);
        }
    }
};

INLINE void store_row(const float *from, float factor, int64_t width, float *to) {
    int64_t d = 0;
    for (; d + W <= width; d += W) store(to + d, mul(load(from + d), all(factor)));
    if (d < width) store(to + d, mul(load(from + d, width - d), all(factor)), width - d);
}
INLINE void store_row(const float *from, float factor, int64_t width, BFloat16 *to) {
    for (int64_t d = 0; d < width; d++) to[d].bits = (uint16_t)rounded(from[d] * factor);
}
INLINE void store_row(const float *from, float factor, int64_t width, Float16 *to) {
    int64_t d = 0;
#if defined(__F16C__)
    for (; d + 8 <= width; d += 8)
        _mm_storeu_si128((__m128i *)(to + d), _mm256_cvtps_ph(_mm256_mul_ps(_mm256_loadu_ps(from + d), _mm256_set1_ps(factor)), 0));
#endif
    for (; d < width; d++) to[d] = halved(from[d] * factor);
}

}  // namespace
