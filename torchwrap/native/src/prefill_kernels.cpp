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
    int64_t width, value_width;       // padded to whole vectors
    Word<T> *k_columns, *v_across;    // right factors of a block of keys
    T *q_rows, *weights;              // (part, width), (HEIGHT, BLOCK): left factors
    float *values, *maximum, *sum;    // (part, value_width), (part), (part, W): what the rows have so far
    Range *seen;
    uint32_t *states;                 // of the rows, for dropout
    int64_t *bias;                    // where the rows' numbers are
    size_t bytes;

    Scratch(const PrefillCall &call, void *memory) : width(up(call.width, 16)), value_width(up(call.value_width, 16)) {
        Cut take{(char *)memory};
        take(k_columns, BLOCK * width / PACKED<T>), take(v_across, BLOCK / PACKED<T> * value_width);
        take(q_rows, call.part * width), take(weights, HEIGHT * BLOCK);
        take(values, call.part * value_width), take(maximum, call.part), take(sum, call.part * W), take(seen, call.part);
        take(states, call.part);
        take(bias, call.bias ? call.part : 0);
        bytes = take.next - (char *)memory;
    }
};

// Scores of ROWS rows and COLUMNS columns. They become powers of 2 only as differences: the product with log2(e) of a large score, rounded, would
// be an error of the exponent.
template <class T, bool CAPPED>
INLINE void scores(const PrefillCall &call, const Scratch<T> &at, int64_t row, int64_t column, Vector (*to)[VECTORS<T>]) {
    const int64_t steps = at.width / PACKED<T>;
    long_product<T, VECTORS<T>>(to, {(const Word<T> *)(at.q_rows + row * at.width), steps, 1}, at.k_columns + column * steps, COLUMNS<T>, steps);
    UNROLL for (int r = 0; r < ROWS<T>; r++)
        UNROLL for (int j = 0; j < VECTORS<T>; j++)
            to[r][j] = CAPPED ? mul(tanh(mul(to[r][j], all(call.scale / call.softcap))), all(call.softcap))
                              : mul(to[r][j], all(call.scale));
}

INLINE Vector power(const float *scores, Vector origin) { return exp2(mul(sub(load(scores), origin), all(LOG2E))); }

INLINE float largest(Vector x) {
    float lanes[W], most = -INFINITY;
    store(lanes, x);
    for (float lane : lanes) most = lane > most ? lane : most;
    return most;
}

// Weights of ROWS rows over the columns of `span`, and what they change in the rows' sums.
template <class T, bool CAPPED>
void weigh(const PrefillCall &call, const Scratch<T> &at, int64_t row, int64_t place, int64_t block, Range span, const Shown *bits) {
    alignas(64) float kept[ROWS<T>][BLOCK];
    Added<T> bias;
    Sight sights[BLOCK / COLUMNS<T>];
    Vector top[ROWS<T>];
    UNROLL for (int r = 0; r < ROWS<T>; r++) top[r] = all(-INFINITY);
    for (int64_t column = span.first; column < span.end; column += COLUMNS<T>) {
        const Sight how = sights[column / COLUMNS<T>] = bits ? bits->sight<T>(place, column) : sight<T>(at.seen + row, block + column);
        if (how == NOTHING) continue;
        if (call.bias) bias.read(call, at.bias + row, block + column);
        Vector found[ROWS<T>][VECTORS<T>];
        scores<T, CAPPED>(call, at, row, column, found);
        if (call.bias)
            UNROLL for (int r = 0; r < ROWS<T>; r++)
                UNROLL for (int j = 0; j < VECTORS<T>; j++) found[r][j] = add(found[r][j], load(bias.row[r] + j * W));
        UNROLL for (int r = 0; r < ROWS<T>; r++)
            UNROLL for (int j = 0; j < VECTORS<T>; j++) {
                if (how == SOME)
                    found[r][j] = bits ? if_shown(found[r][j], bits->at(place + r, column + j * W), all(-INFINITY))
                                       : if_seen(found[r][j], at.seen[row + r], block + column + j * W, all(-INFINITY));
                top[r] = larger(top[r], found[r][j]);
                store(kept[r] + column + j * W, found[r][j]);
            }
    }
    Vector origin[ROWS<T>], total[ROWS<T>];
    for (int r = 0; r < ROWS<T>; r++) {
        const float before = at.maximum[row + r], here = largest(top[r]);
        const float after = here > before ? here : before;
        // Differences to -inf would be NaN: a row whose scores are all -inf so far.
        origin[r] = all(after == -INFINITY ? 0 : after), total[r] = load(at.sum + (row + r) * W);
        if (after == before) continue;
        at.maximum[row + r] = after;
        const Vector factor = all(exp2f((before - after) * LOG2E));
        total[r] = mul(total[r], factor);
        float *values = at.values + (row + r) * at.value_width;
        for (int64_t d = 0; d < at.value_width; d += W) store(values + d, mul(load(values + d), factor));
    }
    for (int64_t column = span.first; column < span.end; column += COLUMNS<T>) {
        T *to = at.weights + place * BLOCK + column;
        if (sights[column / COLUMNS<T>] == NOTHING) {
            for (int r = 0; r < ROWS<T>; r++) memset((void *)(to + r * BLOCK), 0, COLUMNS<T> * sizeof *to);
            continue;
        }
        const auto tile = [&](auto drops) {
            UNROLL for (int r = 0; r < ROWS<T>; r++)
                UNROLL for (int j = 0; j < VECTORS<T>; j += 2) {
                    Vector one = power(kept[r] + column + j * W, origin[r]);
                    Vector two = power(kept[r] + column + (j + 1) * W, origin[r]);
                    total[r] = add(total[r], add(one, two));
                    if constexpr (drops) {
                        one = mul(one, factors(call, at.states[row + r], block + column + j * W));
                        two = mul(two, factors(call, at.states[row + r], block + column + (j + 1) * W));
                    }
                    store_rounded(one, two, to + r * BLOCK + j * W);
                }
        };
        if (call.threshold) tile(std::true_type{});
        else tile(std::false_type{});
    }
    for (int r = 0; r < ROWS<T>; r++) store(at.sum + (row + r) * W, total[r]);
}

// Tensors hold E, products are of T.
template <class T, class E> void rows_of(const PrefillCall &call, const PrefillTask &task, void *memory) {
    const Scratch<T> at(call, memory);
    const Range span = look(call, task, at.seen);
    const int64_t rows = up(task.end - task.begin, ROWS<T>);
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
            at.maximum[r] = call.sinks[task.head * call.group() + row / call.q_length];
            at.sum[r * W] = at.maximum[r] == -INFINITY ? 0 : 1;
        }
    }
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
                if (call.softcap > 0) weigh<T, true>(call, at, top + r, r, block, columns, hides ? &bits : nullptr);
                else weigh<T, false>(call, at, top + r, r, block, columns, hides ? &bits : nullptr);
            add_matrix<T>(at.values + top * at.value_width, count, at.value_width,
                          {(const Word<T> *)(at.weights + columns.first), BLOCK / PACKED<T>, 1},
                          at.v_across + columns.first / PACKED<T> * at.value_width,
                          (up(columns.end < span.end - block ? columns.end : span.end - block, PACKED<T>) - columns.first) / PACKED<T>);
        }
    }
    for (int64_t r = 0; r < task.end - task.begin; r++) {
        const int64_t row = task.begin + r;
        const float total = sum(load(at.sum + r * W)), origin = at.maximum[r] == -INFINITY ? 0 : at.maximum[r];
        call.lse[lse_of(call, task, row)] = total == 0 ? -INFINITY : origin + logf(total);
        store_row(at.values + r * at.value_width, total == 0 ? 0 : 1 / total, call.value_width,
                  (E *)call.out + place_of(call.out_strides, call, task, row));
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
