// Gradients of attention, with every sum in float32: some rows of queries against all the keys they see. Products are of float32, or of bfloat16
// where the processor is faster at that (tiles.h); halves are widened to float32 where they are packed.
//
// With P = exp(S - lse) and delta = sum(dO * O) - dlse of each row: dV = P^T dO, dS = P * (dO V^T - delta), dQ = scale * dS K,
// dK = scale * dS^T Q; dropout multiplies P in dV, and dO V^T, with the same factors. Keys go in blocks of BLOCK, rows in blocks of HEIGHT. Of a pair of blocks, tiles of ROWS x COLUMNS
// of S and dO V^T are computed in registers, turned into P and dS and stored in the type of the products; three products of these
// then make dV, dK and dQ. Sums of dQ are kept for the task, those of dV and dK for the block of keys, and join what other tasks have found for
// it; in float32, where at most HEIGHT rows see the block, products of dV and dK are the gradients and go straight to the tensors.
// What hides keys is the interval of columns that each row sees, or bits (masks.h): tiles that no row sees are left out, those that rows
// see in part are compared. The gradient of a bias is the sum of dS over all that share its numbers; tasks add to it in turn.
// Memory traffic of a pair of blocks stays in the second-level cache; keys and values are packed once for each task.
//
// Source: Tri Dao, "FlashAttention-2", 2023, algorithm 2. Differences: five products in the type of the tensors, rows of all query heads
// that share a key/value head are one long list.
#include "dropout.h"
#include "masks.h"

#include <math.h>

#define NAMED(name) JOIN(gradients_, name)

namespace {

template <class T> struct Scratch {
    int64_t width, value_width;                       // padded to whole vectors
    Word<T> *k_columns, *v_columns, *k_across;        // right factors of a block of keys
    T *q_rows, *grad_rows;                            // (rows, width): left factors of the rows of the task
    Word<T> *q_across, *grad_across;                  // the same as right factors
    Word<T> *weight_across, *score_across;            // (HEIGHT, BLOCK) elements: P and dS of a pair of blocks
    T *score_rows;                                    // (HEIGHT, BLOCK): dS again
    float *dq, *dk, *dv, *lse, *delta, *products;     // products: (rows, W), sums of P * dO V^T
    float *kept;                                      // (HEIGHT, BLOCK): dS in float32, for the gradient of the bias
    int64_t *bias;                                    // where the rows' numbers are
    Range *seen;
    uint32_t *states;                                 // of the rows, for dropout
    size_t bytes;

    Scratch(const PrefillCall &call, void *memory) : width(up(call.width, W)), value_width(up(call.value_width, W)) {
        Cut take{(char *)memory};
        // Where a word is one element, rows are the same matrix, whichever way it is walked.
        const auto both = [&take](T *&rows, Word<T> *&across, int64_t count) {
            take(rows, count);
            if constexpr (PACKED<T> == 1) across = rows;
            else take(across, count / PACKED<T>);
        };
        const int64_t rows = call.part;
        take(k_columns, BLOCK * width / PACKED<T>), take(v_columns, BLOCK * value_width / PACKED<T>);
        take(k_across, BLOCK / PACKED<T> * width), both(q_rows, q_across, rows * width), both(grad_rows, grad_across, rows * value_width);
        both(score_rows, score_across, HEIGHT * BLOCK), take(weight_across, HEIGHT / PACKED<T> * BLOCK);
        take(dq, rows * width), take(dk, BLOCK * width), take(dv, BLOCK * value_width);
        take(lse, rows), take(delta, rows), take(products, rows * W), take(seen, rows), take(states, rows);
        take(bias, call.bias ? rows : 0), take(kept, call.dbias ? HEIGHT * BLOCK : 0);
        bytes = take.next - (char *)memory;
    }
};

INLINE float dot(const float *a, const float *b, int64_t width) {
    Vector total = zeros();
    int64_t d = 0;
    for (; d + W <= width; d += W) total = fma(load(a + d), load(b + d), total);
    if (d < width) total = fma(load(a + d, width - d), load(b + d, width - d), total);
    return sum(total);
}
INLINE float dot(const BFloat16 *a, const BFloat16 *b, int64_t width) {
    alignas(64) float lanes[16] = {};
    int64_t d = 0;
    for (; d + 16 <= width; d += 16)
        for (int l = 0; l < 16; l++) lanes[l] += widened(a[d + l]) * widened(b[d + l]);
    for (; d < width; d++) lanes[d % 16] += widened(a[d]) * widened(b[d]);
    float total = 0;
    for (int l = 0; l < 16; l += W) total += sum(load(lanes + l));
    return total;
}

// Left and right factors of the rows, and their numbers. Rows that see nothing are zeros, whatever they hold.
template <class T, class E> void pack_rows(const PrefillCall &call, const PrefillTask &task, const Scratch<T> &at, int64_t rows) {
    for (int64_t r = 0; r < rows; r += 2) {
        const T *q[2] = {}, *grad[2] = {};
        Wide<T, E> wide[5];
        for (int64_t i = r; i < r + 2; i++) {
            const int64_t row = task.begin + i;
            at.lse[i] = at.delta[i] = 0;
            if (call.threshold) at.states[i] = state_of(call, task, row);
            if (call.bias) at.bias[i] = place_in(call.bias_strides, call, task, row);
            if (!at.seen[i].empty()) {
                const float lse = call.lse[lse_of(call, task, row)];
                const auto taken = [&](const void *tensor, const int64_t *strides, int64_t width, T *to) {
                    return row_as((const E *)tensor + place_of(strides, call, task, row), width, to);
                };
                q[i - r] = taken(call.q, call.q_strides, call.width, wide[i - r]);
                grad[i - r] = taken(call.grad_out, call.grad_strides, call.value_width, wide[2 + i - r]);
                at.lse[i] = lse == -INFINITY ? 0 : lse;
                at.delta[i] = dot(taken(call.out, call.out_strides, call.value_width, wide[4]), grad[i - r], call.value_width);
                if (call.grad_lse) at.delta[i] -= call.grad_lse[lse_of(call, task, row)];
            }
            copy_row(q[i - r], call.width, at.width, at.q_rows + i * at.width);
            copy_row(grad[i - r], call.value_width, at.value_width, at.grad_rows + i * at.value_width);
        }
        if constexpr (PACKED<T> == 1) continue;
        across(q, call.width, at.width, at.q_across + r / 2 * at.width);
        across(grad, call.value_width, at.value_width, at.grad_across + r / 2 * at.value_width);
    }
}

// Differences of scores first, then log2(e): the product of a large score with it, rounded, would be an error of the exponent.
INLINE Vector power(Vector x, Vector scale, Vector shift) { return exp2(mul(fma(x, scale, shift), all(LOG2E))); }

// P and dS of R rows from `row` of the task, `place` of the block of rows, and V vectors of columns from `column` of the block of keys; or only
// what they add to the rows' products.
template <class T, int V, int R, bool CUT, bool CAPPED>
void scores(const PrefillCall &call, const Scratch<T> &at, int64_t row, int64_t place, int64_t column, int64_t block, const Shown *bits,
            bool only_products) {
    alignas(64) float kept[R][V * W], left[R][V * W], slopes[CAPPED ? R : 1][V * W];
    const float inside = CAPPED ? call.scale / call.softcap : 0;
    const auto columns_at = [&](const Word<T> *from, int64_t steps) { return from + column / COLUMNS<T> * COLUMNS<T> * steps + column % COLUMNS<T>; };
    const auto cut = [&](Vector x, int r, int j) {
        return bits ? if_shown(x, bits->at(place + r, column + j * W), zeros()) : if_seen(x, at.seen[row + r], block + column + j * W, zeros());
    };
    {
        Added<T> bias;
        if (call.bias) bias.template read<R>(call, at.bias + row, block + column);
        Vector weight[R][V];
        const int64_t steps = at.width / PACKED<T>;
        long_product<T, V, R>(weight, {(const Word<T> *)(at.q_rows + row * at.width), steps, 1}, columns_at(at.k_columns, steps),
                                    COLUMNS<T>, steps);
        UNROLL for (int r = 0; r < R; r++) {
            const Vector shift = all(-at.lse[row + r]);
            UNROLL for (int j = 0; j < V; j++) {
                if (CAPPED) {
                    const Vector t = tanh(mul(weight[r][j], all(inside)));
                    store(slopes[r] + j * W, sub(all(1.f), mul(t, t)));
                    weight[r][j] = t;
                }
                const Vector factor = all(CAPPED ? call.softcap : call.scale);
                if (call.bias) weight[r][j] = power(fma(weight[r][j], factor, load(bias.row[r] + j * W)), all(1.f), shift);
                else weight[r][j] = power(weight[r][j], factor, shift);
                if (CUT) weight[r][j] = cut(weight[r][j], r, j);
                store(kept[r] + j * W, weight[r][j]);
            }
        }
        if (call.threshold)
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int j = 0; j < V; j++) {
                    const Vector factor = factors(call, at.states[row + r], block + column + j * W);
                    store(left[r] + j * W, factor), weight[r][j] = mul(weight[r][j], factor);
                }
        if (!only_products)
            UNROLL for (int r = 0; r < R; r += PACKED<T>)
                UNROLL for (int j = 0; j < V; j++) {
                    Word<T> *to = at.weight_across + (place + r) / PACKED<T> * BLOCK + column + j * W;
                    if constexpr (PACKED<T> == 1) store(to, weight[r][j]);
                    else store_across(weight[r][j], weight[r + 1][j], to);
                }
    }
    Vector score[R][V];
    const int64_t steps = at.value_width / PACKED<T>;
    long_product<T, V, R>(score, {(const Word<T> *)(at.grad_rows + row * at.value_width), steps, 1}, columns_at(at.v_columns, steps),
                                COLUMNS<T>, steps);
    if (call.threshold)
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int j = 0; j < V; j++) score[r][j] = mul(score[r][j], load(left[r] + j * W));
    UNROLL for (int r = 0; r < R; r++) {
        const Vector delta = all(at.delta[row + r]);
        Vector products = load(at.products + (row + r) * W);
        UNROLL for (int j = 0; j < V; j++) {
            const Vector weight = load(kept[r] + j * W);
            // What is hidden may be no number, and 0 times it is none.
            if (CUT) score[r][j] = cut(score[r][j], r, j);
            products = fma(weight, score[r][j], products);
            score[r][j] = mul(sub(score[r][j], delta), weight);
            // Again: a row's delta may be no number.
            if (CUT) score[r][j] = cut(score[r][j], r, j);
            if (call.dbias) store(at.kept + (place + r) * BLOCK + column + j * W, score[r][j]);
            if (CAPPED) score[r][j] = mul(score[r][j], load(slopes[r] + j * W));
        }
        store(at.products + (row + r) * W, products);
    }
    if (only_products) return;
    UNROLL for (int r = 0; r < R; r += PACKED<T>)
        UNROLL for (int j = 0; j < V; j++) {
            T *row = at.score_rows + (place + r) * BLOCK + column + j * W;
            if constexpr (PACKED<T> == 1) store(row, score[r][j]);
            else store_across(score[r][j], score[r + 1][j], at.score_across + (place + r) / PACKED<T> * BLOCK + column + j * W, row, row + BLOCK);
        }
}

template <class T> void no_scores(const Scratch<T> &at, int64_t place, int64_t rows, int64_t column, bool kept) {
    for (int64_t r = 0; r < rows; r++) {
        memset((void *)(at.score_rows + (place + r) * BLOCK + column), 0, COLUMNS<T> * sizeof(T));
        if (kept) memset(at.kept + (place + r) * BLOCK + column, 0, COLUMNS<T> * sizeof(float));
        if (r % PACKED<T>) continue;
        memset(at.weight_across + (place + r) / PACKED<T> * BLOCK + column, 0, COLUMNS<T> * sizeof(Word<T>));
        memset(at.score_across + (place + r) / PACKED<T> * BLOCK + column, 0, COLUMNS<T> * sizeof(Word<T>));
    }
}

// Returns the columns that some row sees, of which no key is behind `end`. With `straight`, the rows of dK and dV that belong to this block, what
// this pair adds to them is all there is, and goes there.
template <class T, bool CAPPED>
Range pair_of_blocks(const PrefillCall &call, const PrefillTask &task, const Scratch<T> &at, int64_t top, int64_t count, int64_t block,
                     int64_t end, bool only_products, const Rows *straight, Coming &coming) {
    Range span = columns_seen<T>(at.seen + top, count, block);
    Shown shown, *const bits = call.hides() ? &shown : nullptr;
    if (bits && !span.empty()) span = reveal<T>(call, task, top, count, block, at.seen, span, shown);
    if (span.empty()) return span;
    for (int64_t column = span.first; column < span.end; column += COLUMNS<T>)
        for (int64_t r = 0; r < count; r += ROWS<T>)
            of_group<T>(count - r, [&](auto group) {
                coming.step();
                if constexpr (group % PACKED<T> == 0) {
                    constexpr int ALL = VECTORS<T>, ONE = ALL == 2 ? 1 : ALL;
                    const bool is_short = end - column <= ONE * W;  // a last tile of one vector is not filled up to two
                    switch (bits ? bits->sight<T, group>(r, column) : sight<T, group>(at.seen + top + r, block + column)) {
                        case NOTHING: no_scores<T>(at, r, group, column, call.dbias); break;
                        case SOME:
                            if (is_short) scores<T, ONE, group, true, CAPPED>(call, at, top + r, r, column, block, bits, only_products);
                            else scores<T, ALL, group, true, CAPPED>(call, at, top + r, r, column, block, bits, only_products);
                            break;
                        case EVERYTHING: scores<T, ALL, group, false, CAPPED>(call, at, top + r, r, column, block, bits, only_products); break;
                    }
                }
            });
    if (only_products) return span;
    if (span.end > end) span.end = end;
    const int64_t columns = span.end - span.first;
    const auto between = [&] { coming.step(); };
    const Left<T> weights{at.weight_across + span.first, 1, BLOCK}, of_scores{at.score_across + span.first, 1, BLOCK};
    const Word<T> *grad = at.grad_across + top / PACKED<T> * at.value_width, *q = at.q_across + top / PACKED<T> * at.width;
    if (straight) {
        const auto seen = [&](const Rows &all) { return Rows{all.to + span.first * all.stride, all.stride, columns, all.width}; };
        put_matrix<T>(seen(straight[0]), at.width, call.scale, of_scores, q, count / PACKED<T>, between);
        put_matrix<T>(seen(straight[1]), at.value_width, 1, weights, grad, count / PACKED<T>, between);
    } else {
        add_matrix<T>(at.dv + span.first * at.value_width, grouped<T>(columns), at.value_width, weights, grad, count / PACKED<T>, between);
        add_matrix<T>(at.dk + span.first * at.width, grouped<T>(columns), at.width, of_scores, q, count / PACKED<T>, between);
    }
    add_matrix<T>(at.dq + top * at.width, count, at.width, {(const Word<T> *)(at.score_rows + span.first), BLOCK / PACKED<T>, 1},
                  at.k_across + span.first / PACKED<T> * at.width, up(columns, PACKED<T>) / PACKED<T>, between);
    return span;
}

// dS of a pair of blocks joins the gradient of the bias.
template <class S, class T>
void add_to_bias(const PrefillCall &call, const PrefillTask &task, const Scratch<T> &at, int64_t top, int64_t count, int64_t block, Range span) {
    const int64_t stride = call.dbias_strides[3], last = call.k_length - block < span.end ? call.k_length - block : span.end;
    for (int64_t r = 0; r < count && task.begin + top + r < task.end; r++) {
        S *to = (S *)call.dbias + place_in(call.dbias_strides, call, task, task.begin + top + r) + block * stride;
        const float *from = at.kept + r * BLOCK;
        if (stride == 1)
            for (int64_t c = span.first; c < last; c++) to[c] += from[c];
        else
            for (int64_t c = span.first; c < last; c++) to[c * stride] += from[c];
    }
}

// The sums of a block of keys join those of the tasks before, or become the result if this is the last task that sees the block. In float32
// the result holds the sums.
template <class E>
void deliver(const float *own, int64_t padded, int64_t width, int64_t count, float *sums, bool first, bool last, float factor, E *to,
             int64_t stride) {
    for (int64_t n = 0; n < count; n++, own += padded, to += stride) {
        float *sum = sums + n * padded;
        if constexpr (std::is_same_v<E, float>) sum = to;
        if (!first)
            for (int64_t d = 0; d < width; d++) sum[d] += own[d];
        else if (!last)
            memcpy(sum, own, width * sizeof *sum);
        if (last) store_row(first ? own : sum, factor, width, to);
    }
}

constexpr int64_t FEW_KEYS = 64, FEW_QUERIES = 16, FEW_COLUMNS = 4;  // chosen: random calls of more obey the law (twice the definition's error) without it

// Tensors hold E, products are of T.
template <class T, class E> void rows_of(const PrefillCall &call, const PrefillTask &task, void *memory) {
    const Scratch<T> at(call, memory);
    const int64_t rows = grouped<T>(up(task.end - task.begin, PACKED<T>));
    const Range span = look(call, task, at.seen);
    pack_rows<T, E>(call, task, at, rows);
    memset(at.dq, 0, rows * at.width * sizeof(float)), memset(at.products, 0, rows * W * sizeof(float));
    Coming coming(call, task);
    coming.queries(call.q, call.q_strides, call.width), coming.queries(call.grad_out, call.grad_strides, call.value_width);
    coming.queries(call.out, call.out_strides, call.value_width);
    coming.keys(call.k, call.k_strides, call.width), coming.keys(call.v, call.v_strides, call.value_width);
    coming.own(call.dq, call.dq_strides, call.width);
    // Those of scores, and of dV, dK and dQ.
    const int64_t of_rows = (rows + ROWS<T> - 1) / ROWS<T>, of_keys = (call.k_length + ROWS<T> - 1) / ROWS<T>;
    coming.in_steps(of_rows * ((call.k_length + COLUMNS<T> - 1) / COLUMNS<T>) + of_rows + 2 * of_keys);
    // Turns in the gradient of the bias: one for each block, or one for all where all columns share their numbers. Tasks that add nothing to a
    // block let their turn pass.
    const bool apart = call.dbias_strides[3] != 0;
    int64_t next = 0;
    bool ours = false;
    const auto pass = [&](int64_t until) {
        for (; task.bias_progress && next < until; next++)
            task.wait(task.bias_progress, next, task.bias_turn), task.done(task.bias_progress, next);
    };
    const auto pairs = [&](int64_t block, bool only_products, const Rows *straight = nullptr) {
        Keys<T, E>(call.k, call.k_strides, task, block, span).pack_columns(call.width, at.width, at.k_columns);
        Keys<T, E>(call.v, call.v_strides, task, block, span).pack_columns(call.value_width, at.value_width, at.v_columns);
        for (int64_t top = 0; top < rows; top += HEIGHT) {
            const int64_t count = rows - top < HEIGHT ? rows - top : HEIGHT;
            const auto pair = call.softcap > 0 ? pair_of_blocks<T, true> : pair_of_blocks<T, false>;
            const Range found = pair(call, task, at, top, count, block, span.end - block, only_products, straight, coming);
            for (int side = 0; straight && side < 2; side++)  // keys that nobody sees
                for (int64_t n = 0; n < straight[side].rows; n++)
                    if (found.empty() || n < found.first || n >= found.end)
                        memset(straight[side].to + n * straight[side].stride, 0, straight[side].width * sizeof(float));
            if (!call.dbias || only_products) continue;
            if (task.bias_progress && !ours) task.wait(task.bias_progress, next, task.bias_turn), ours = true;
            if (found.empty()) continue;
            if (call.dbias_wide) add_to_bias<double>(call, task, at, top, count, block, found);
            else add_to_bias<float>(call, task, at, top, count, block, found);
        }
    };
    const auto delta_of = [&](int64_t r) {
        return sum(load(at.products + r * W)) - (call.grad_lse ? call.grad_lse[lse_of(call, task, task.begin + r)] : 0);
    };
    // A row with one large weight has gradients near zero, as differences of large numbers. Its out is rounded to a half type, and delta with
    // it: so there delta comes from a pass of its own. Where keys and queries are many, the law of errors is kept without one: such an out
    // is nearly the value, unless dropout multiplies that by 1 / (1 - p).
    const bool small = call.k_length <= FEW_KEYS || call.q_length <= FEW_QUERIES || call.value_width <= FEW_COLUMNS;
    if ((call.threshold || small) && !call.some_keys && !std::is_same_v<E, float>) {
        for (int64_t block = span.first / BLOCK * BLOCK; block < span.end; block += BLOCK)
            if (task.turns[block / BLOCK].number >= 0) pairs(block, true);
        for (int64_t r = 0; r < task.end - task.begin; r++) at.delta[r] = delta_of(r);
        memset(at.products, 0, rows * W * sizeof(float));
    }
    for (int64_t block = span.first / BLOCK * BLOCK; block < span.end; block += BLOCK) {
        const Turn turn = task.turns[block / BLOCK];
        if (turn.number < 0) continue;
        pass(apart ? block / BLOCK : 0);
        Keys<T, E>(call.k, call.k_strides, task, block, span).pack_across(call.width, at.width, at.k_across);
        const int64_t count = call.k_length - block < BLOCK ? call.k_length - block : BLOCK, padded = up(count, 8);
        auto row = [&](void *tensor, const int64_t *strides) {
            return (E *)tensor + task.batch * strides[0] + task.head * strides[1] + block * strides[2];
        };
        // Of a few rows, which no other task adds to, sums are not kept: they are the result.
        const bool alone = std::is_same_v<E, float> && turn.of == 1 && rows <= HEIGHT;
        if (alone) {
            const Rows straight[2] = {{(float *)row(call.dk, call.dk_strides), call.dk_strides[2], count, call.width},
                                      {(float *)row(call.dv, call.dv_strides), call.dv_strides[2], count, call.value_width}};
            pairs(block, false, straight);
        } else {
            memset(at.dk, 0, padded * at.width * sizeof(float)), memset(at.dv, 0, padded * at.value_width * sizeof(float));
            pairs(block, false);
        }
        if (ours && apart) task.done(task.bias_progress, next++), ours = false;
        if (alone) continue;
        const int64_t place = task.place * call.k_length + block;
        const bool first = turn.number == 0, last = turn.number == turn.of - 1;
        if (turn.of > 1) task.wait(task.progress, block / BLOCK, turn.number);
        deliver(at.dk, at.width, call.width, count, call.dk_sums + place * at.width, first, last, call.scale, row(call.dk, call.dk_strides),
                call.dk_strides[2]);
        deliver(at.dv, at.value_width, call.value_width, count, call.dv_sums + place * at.value_width, first, last, 1,
                row(call.dv, call.dv_strides), call.dv_strides[2]);
        if (turn.of > 1) task.done(task.progress, block / BLOCK);
    }
    if (ours) task.done(task.bias_progress, next++);
    pass(apart ? (call.k_length + BLOCK - 1) / BLOCK : 1);
    for (int64_t r = 0; r < task.end - task.begin; r++) {
        const int64_t row = task.begin + r;
        store_row(at.dq + r * at.width, call.scale, call.width, (E *)call.dq + place_of(call.dq_strides, call, task, row));
        if (call.delta) call.delta[lse_of(call, task, row)] = delta_of(r);
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
