// Attention of many queries, with every sum in float32: some rows of queries over all the keys they see. Products are of float32, or of bfloat16
// where the processor is faster at that (tiles.h); halves are widened to float32 where they are packed.
//
// Keys go in blocks of BLOCK, packed once for all rows of the task, rows in blocks of HEIGHT. Of a block of keys, ROWS rows of scores are
// computed in registers and kept; the running maximum turns them into weights, which are stored in the type of the values, and another product
// adds weights times values to what the rows have so far. What hides keys is the interval of columns that each row sees, or bits (masks.h):
// tiles that no row sees are left out, those that rows see in part are compared. A sink is a score that comes first and has no value.
// Dropout changes what is stored and not what is summed up.
//
// Source: Tri Dao, "FlashAttention-2", 2023, algorithm 1. Differences: keys in the outer loop, rows of all query heads that share a
// key/value head are one long list.
#include "dropout.h"
#include "masks.h"

#include <math.h>

#define NAMED(name) JOIN(prefill_, name)

namespace {

template <class T> struct Scratch {
    int64_t width, value_width;       // padded to whole words, and to whole vectors
    Word<T> *k_columns, *v_across;    // right factors of a block of keys
    T *q_rows, *weights;              // (part, width), (HEIGHT, BLOCK): left factors
    float *values, *maximum, *sum;    // (part, value_width), (part), (part, W): what the rows have so far
    Range *seen;
    uint32_t *states;                 // of the rows, for dropout
    int64_t *bias;                    // where the rows' numbers are
    size_t bytes;

    Scratch(const PrefillCall &call, void *memory) : width(up(call.width, PACKED<T>)), value_width(up(call.value_width, W)) {
        Cut take{(char *)memory};
        take(k_columns, BLOCK * width / PACKED<T>), take(v_across, BLOCK / PACKED<T> * value_width);
        take(q_rows, call.part * width), take(weights, HEIGHT * BLOCK);
        take(values, call.part * value_width), take(maximum, call.part), take(sum, call.part * W), take(seen, call.part);
        take(states, call.part);
        take(bias, call.bias ? call.part : 0);
        bytes = take.next - (char *)memory;
    }
};

// Scores of R rows and V vectors of columns, and the largest of each row so far in each lane. They become powers of 2 only as differences: the
// product with log2(e) of a large score, rounded, would be an error of the exponent.
template <class T, int V, int R>
INLINE void scores(const PrefillCall &call, const Scratch<T> &at, int64_t row, int64_t place, int64_t column, int64_t block, bool cut,
                   const Shown *bits, float (*kept)[BLOCK], Vector *top) {
    Vector found[R][V];
    const int64_t steps = at.width / PACKED<T>;
    long_product<T, V, R>(found, {(const Word<T> *)(at.q_rows + row * at.width), steps, 1},
                          at.k_columns + column / COLUMNS<T> * COLUMNS<T> * steps + column % COLUMNS<T>, COLUMNS<T>, steps);
    if (call.softcap > 0) {
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int j = 0; j < V; j++) store(kept[r] + column + j * W, found[r][j]);
        for (int r = 0; r < R; r++)
            for (int64_t c = column; c < column + V * W; c += W)
                store(kept[r] + c, mul(tanh(mul(load(kept[r] + c), all(call.scale / call.softcap))), all(call.softcap)));
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int j = 0; j < V; j++) found[r][j] = load(kept[r] + column + j * W);
    } else {
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int j = 0; j < V; j++) found[r][j] = mul(found[r][j], all(call.scale));
    }
    if (call.bias) {
        Added<T> bias;
        bias.template read<R>(call, at.bias + row, block + column);
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int j = 0; j < V; j++) found[r][j] = add(found[r][j], load(bias.row[r] + j * W));
    }
    if (cut)
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int j = 0; j < V; j++)
                found[r][j] = bits ? if_shown(found[r][j], bits->at(place + r, column + j * W), all(-INFINITY))
                                   : if_seen(found[r][j], at.seen[row + r], block + column + j * W, all(-INFINITY));
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < V; j++) top[r] = larger(top[r], found[r][j]), store(kept[r] + column + j * W, found[r][j]);
}

INLINE float largest(Vector x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(x);
#else
    float lanes[W], most = -INFINITY;
    store(lanes, x);
    for (float lane : lanes) most = lane > most ? lane : most;
    return most;
#endif
}
INLINE Vector power(const float *scores, Vector origin) { return exp2(mul(sub(load(scores), origin), all(LOG2E))); }

// Weights of R rows over the columns of `span`, of which no key is behind `end`, and what they change in the rows' sums.
template <class T, int R>
void weigh(const PrefillCall &call, const Scratch<T> &at, int64_t row, int64_t place, int64_t block, Range span, int64_t end, const Shown *bits,
           Coming &coming) {
    alignas(64) float kept[R][BLOCK];
    Sight sights[BLOCK / COLUMNS<T>];
    Vector top[R];
    // A last tile of one vector is not filled up to two.
    const auto is_short = [&](int64_t column) { return VECTORS<T> == 2 && end - column <= W; };
    UNROLL for (int r = 0; r < R; r++) top[r] = all(-INFINITY);
    for (int64_t column = span.first; column < span.end; column += COLUMNS<T>) {
        const Sight how = sights[column / COLUMNS<T>] = bits ? bits->sight<T, R>(place, column) : sight<T, R>(at.seen + row, block + column);
        if (how == NOTHING) continue;
        coming.step();
        if (is_short(column)) scores<T, 1, R>(call, at, row, place, column, block, how == SOME, bits, kept, top);
        else scores<T, VECTORS<T>, R>(call, at, row, place, column, block, how == SOME, bits, kept, top);
    }
    float origin[R];
    Vector total[R];
    for (int r = 0; r < R; r++) {
        const float before = at.maximum[row + r], here = largest(top[r]), after = here > before ? here : before;
        // Differences to -inf would be NaN: a row whose scores are all -inf so far.
        origin[r] = after == -INFINITY ? 0 : after, total[r] = load(at.sum + (row + r) * W);
        if (after == before) continue;
        at.maximum[row + r] = after;
        if (before == -INFINITY) continue;  // nothing was added up, or what is no number
        const Vector factor = all(exp2f((before - after) * LOG2E));
        total[r] = mul(total[r], factor);
        float *values = at.values + (row + r) * at.value_width;
        for (int64_t d = 0; d < at.value_width; d += W) store(values + d, mul(load(values + d), factor));
    }
    for (int64_t column = span.first; column < span.end; column += COLUMNS<T>) {
        T *to = at.weights + place * BLOCK + column;
        if (sights[column / COLUMNS<T>] == NOTHING) {
            for (int r = 0; r < R; r++) memset((void *)(to + r * BLOCK), 0, COLUMNS<T> * sizeof *to);
            continue;
        }
        coming.step();
        const auto tile = [&](auto drops, auto vectors) {
            constexpr int V = vectors;
            for (int r = 0; r < R; r++) {
                const Vector shift = all(origin[r]);
                Vector weight[V];
                UNROLL for (int j = 0; j < V; j++) {
                    weight[j] = power(kept[r] + column + j * W, shift);
                    total[r] = add(total[r], weight[j]);
                    if constexpr (drops) weight[j] = mul(weight[j], factors(call, at.states[row + r], block + column + j * W));
                }
                if constexpr (V == 1) store((float *)(to + r * BLOCK), weight[0]);
                else UNROLL for (int j = 0; j < V; j += 2) store_rounded(weight[j], weight[j + 1], to + r * BLOCK + j * W);
            }
        };
        using All = std::integral_constant<int, VECTORS<T>>;
        using One = std::integral_constant<int, VECTORS<T> == 2 ? 1 : VECTORS<T>>;
        const auto of_width = [&](auto drops) { is_short(column) ? tile(drops, One{}) : tile(drops, All{}); };
        call.threshold ? of_width(std::true_type{}) : of_width(std::false_type{});
    }
    for (int r = 0; r < R; r++) store(at.sum + (row + r) * W, total[r]);
}

// Tensors hold E, products are of T.
template <class T, class E> void rows_of(const PrefillCall &call, const PrefillTask &task, void *memory) {
    const Scratch<T> at(call, memory);
    const Range span = look(call, task, at.seen);
    const int64_t rows = grouped<T>(task.end - task.begin);
    const bool hides = call.hides();
    Shown bits;
    memset(at.values, 0, rows * at.value_width * sizeof(float)), memset(at.sum, 0, rows * W * sizeof(float));
    for (int64_t r = 0; r < rows; r++) {
        const int64_t row = task.begin + r;
        Wide<T, E> wide;
        const E *real = (const E *)call.q + place_of(call.q_strides, call, task, at.seen[r].empty() ? task.begin : row);
        copy_row(at.seen[r].empty() ? nullptr : row_as(real, call.width, wide), call.width, at.width, at.q_rows + r * at.width);
        at.maximum[r] = -INFINITY;
        if (call.threshold) at.states[r] = state_of(call, task, row);
        if (call.bias) at.bias[r] = place_in(call.bias_strides, call, task, row);
        if (call.sinks && row < task.end) {
            at.maximum[r] = call.sinks[query_of(call, task, row).head];
            at.sum[r * W] = at.maximum[r] == -INFINITY ? 0 : 1;
        }
    }
    Coming coming(call, task);
    coming.queries(call.q, call.q_strides, call.width);
    coming.keys(call.k, call.k_strides, call.width), coming.keys(call.v, call.v_strides, call.value_width);
    coming.own(call.out, call.out_strides, call.value_width);
    // Those of scores, of weights, and of values.
    coming.in_steps((rows + ROWS<T> - 1) / ROWS<T> * (2 * ((call.k_length + COLUMNS<T> - 1) / COLUMNS<T>) + 1));
    for (int64_t block = span.first / BLOCK * BLOCK; block < span.end; block += BLOCK) {
        bool packed = false;
        for (int64_t top = 0; top < rows; top += HEIGHT) {
            const int64_t count = rows - top < HEIGHT ? rows - top : HEIGHT;
            Range columns = columns_seen<T>(at.seen + top, count, block);
            if (!columns.empty() && hides) columns = reveal<T>(call, task, top, count, block, at.seen, columns, bits);
            if (columns.empty()) continue;
            if (!packed) {
                Keys<T, E>(call.k, call.k_strides, task, block, span).pack_columns(call.width, at.width, at.k_columns);
                Keys<T, E>(call.v, call.v_strides, task, block, span).pack_across(call.value_width, at.value_width, at.v_across);
                packed = true;
            }
            for (int64_t r = 0; r < count; r += ROWS<T>)
                of_group<T>(count - r, [&](auto group) {
                    weigh<T, group>(call, at, top + r, r, block, columns, span.end - block, hides ? &bits : nullptr, coming);
                });
            add_matrix<T>(at.values + top * at.value_width, count, at.value_width,
                          {(const Word<T> *)(at.weights + columns.first), BLOCK / PACKED<T>, 1},
                          at.v_across + columns.first / PACKED<T> * at.value_width,
                          (up(columns.end < span.end - block ? columns.end : span.end - block, PACKED<T>) - columns.first) / PACKED<T>,
                          [&] { coming.step(); });
        }
    }
    for (int64_t first = 0; first < task.end - task.begin; first += W) {
        const int64_t count = task.end - task.begin - first < W ? task.end - task.begin - first : W;
        Vector each[W];
        UNROLL for (int i = 0; i < W; i++) each[i] = load(at.sum + (first + (i < count ? i : 0)) * W);
        const Vector total = sums(each);
        float factor[W], log_of[W];
        store(factor, div(all(1.f), total));
        if (call.lse) store(log_of, logarithm(total));
        for (int64_t i = 0; i < count; i++) {
            const int64_t r = first + i, row = task.begin + r;
            const bool none = factor[i] == INFINITY;  // the sum is 0
            if (call.lse) call.lse[lse_of(call, task, row)] = none ? -INFINITY : log_of[i] + (at.maximum[r] == -INFINITY ? 0 : at.maximum[r]);
            store_row(at.values + r * at.value_width, none ? 0 : factor[i], call.value_width,
                      (E *)call.out + place_of(call.out_strides, call, task, row));
        }
    }
}

size_t scratch_bytes(const PrefillCall &call) {
    return call.dtype == BFLOAT16 ? Scratch<OfBFloat16>(call, nullptr).bytes : Scratch<float>(call, nullptr).bytes;
}
void run(const PrefillCall &call, const PrefillTask &task, void *memory) {
    switch (call.dtype) {
        case FLOAT32: return rows_of<float, float>(call, task, memory);
        case BFLOAT16: return rows_of<OfBFloat16, BFloat16>(call, task, memory);
        default: return rows_of<float, Float16>(call, task, memory);
    }
}

}  // namespace

extern const PrefillKernel NAMED(INSTRUCTION_SET);
const PrefillKernel NAMED(INSTRUCTION_SET) = {scratch_bytes, run};
