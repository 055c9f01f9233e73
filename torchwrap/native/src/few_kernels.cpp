// Gradients of attention of a few rows that share a key/value head: keys and values are read where they lie, and the softmax is worked out again.
//
// With P = softmax(S), dP = dO V^T and delta = sum(P * dP) - dlse of each row: dS = P * (dP - delta), dV = P^T dO, dQ = scale * dS K,
// dK = scale * dS^T Q. The scores and dP of all keys are kept, 8 bytes for each row and key, so delta is a sum of the very numbers it is taken
// from: a row that sees one key, or has one weight of 1, gets exact zeros for dS. The many-rows kernel has delta from out, which may be rounded
// to a half type, and P from lse, which is off by the rounding of a large score; both are errors that the definition does not have.
// Memory traffic: S * (2 * D + V) * itemsize read and S * (D + V) * itemsize written for each key/value head, and the scratch twice.
//
// Source: Tri Dao, "FlashAttention-2", 2023, algorithm 2, for one block of rows.
#include "blocks.h"

#define NAMED(name) JOIN(few_, name)

namespace {

constexpr int64_t TILE = 64;  // keys at a time, of which a row of K serves dQ while V is still in the first-level cache (chosen)
constexpr int64_t AT_ONCE = 4;

template <class T> struct Scratch {
    int64_t units, value_units, width, value_width, line;  // units of 2 * W; widths padded to them; keys of a row
    typename Dot<T>::Unit *q_units, *grad_units;
    float *q, *grad;               // (rows, width): as they are added to dK and dV
    float *dq, *sums, *row_out;    // dQ in the order of pairs, what a tile adds to it, rows of dK or dV
    float *weights, *scores;       // (rows, line): P, and dP that becomes dS
    Row *row;
    Range *seen;
    size_t bytes;

    Scratch(const PrefillCall &call, void *memory)
        : units((call.width + 2 * W - 1) / (2 * W)), value_units((call.value_width + 2 * W - 1) / (2 * W)), width(units * 2 * W),
          value_width(value_units * 2 * W), line(up(call.k_length, W) + 2 * W) {
        Cut take{(char *)memory};
        const int64_t rows = call.part;
        take(q_units, rows * units), take(grad_units, rows * value_units), take(q, rows * width), take(grad, rows * value_width);
        take(dq, rows * width), take(sums, rows * width), take(row_out, AT_ONCE * (width > value_width ? width : value_width));
        take(weights, rows * line), take(scores, rows * line), take(row, rows), take(seen, rows);
        bytes = take.next - (char *)memory;
    }
};

// A row as it lies and as float32, with zeros behind it.
template <class T> void keep(const T *from, int64_t width, int64_t padded, float *to) {
    for (int64_t d = 0; d < padded; d += 2 * W) {
        Vector a = zeros(), b = zeros();
        if (from && width - d >= 2 * W) load_pair(from + d, a, b);
        else if (from && width > d) load_pair(from + d, (int)(width - d), a, b);
        store_pair((const T *)nullptr, a, b, to + d);
    }
}

// The sum of a term for each key, W at once; in pieces, as a long chain has large errors.
template <class Term> INLINE float total_of(int64_t count, Term term) {
    Vector total = zeros();
    for (int64_t from = 0; from < count; from += CHAIN * W) {
        const int64_t end = count - from < CHAIN * W ? count : from + CHAIN * W;
        Vector sum = zeros();
        for (int64_t j = from; j < end; j += W) sum = add(sum, term(j));
        total = add(total, sum);
    }
    return sum(total);
}

// Scores become P, and dP becomes dS; returns delta. What the row does not see is 0 in both, whatever it was.
float differentiate(float *weights, float *scores, int64_t count, Range seen, float of_lse) {
    const int64_t padded = up(count, W);
    for (int64_t j = 0; j < seen.first; j++) weights[j] = -INFINITY, scores[j] = 0;
    for (int64_t j = seen.end; j < padded; j++) weights[j] = -INFINITY, scores[j] = 0;
    const float top = largest_of(weights + seen.first, seen.end - seen.first);
    const Vector origin = all(top == -INFINITY ? 0 : top);
    const float total = total_of(padded, [&](int64_t j) {
        const Vector weight = exp2(mul(sub(load(weights + j), origin), all(LOG2E)));
        store(weights + j, weight);
        return weight;
    });
    const Vector factor = all(total == 0 ? 0 : 1 / total);
    const float delta = total_of(padded, [&](int64_t j) {
        const Vector weight = mul(load(weights + j), factor);
        store(weights + j, weight);
        return mul(weight, load(scores + j));
    }) - of_lse;
    for (int64_t j = 0; j < padded; j += W) store(scores + j, mul(load(weights + j), sub(load(scores + j), all(delta))));
    for (int64_t j = 0; j < seen.first; j++) weights[j] = scores[j] = 0;
    for (int64_t j = seen.end; j < padded; j++) weights[j] = scores[j] = 0;
    return delta;
}

// Rows of dK or dV: of each key the sum over rows of its weights times `from`. `factors` holds them for the first key.
template <class T>
void key_rows(const float *factors, int64_t line, const float *from, int64_t rows, int64_t width, int64_t padded, int64_t count, float *own,
              float factor, T *to, int64_t stride) {
    for (int64_t j = 0; j < count; j += AT_ONCE) {
        const int64_t here = count - j < AT_ONCE ? count - j : AT_ONCE;
        for (int64_t d = 0; d < padded; d += 2 * W) {
            Vector a[AT_ONCE], b[AT_ONCE];
            UNROLL for (int i = 0; i < AT_ONCE; i++) a[i] = b[i] = zeros();
            for (int64_t r = 0; r < rows; r++) {
                const Vector one = load(from + r * padded + d), two = load(from + r * padded + d + W);
                UNROLL for (int i = 0; i < AT_ONCE; i++) {
                    const Vector weight = all(factors[r * line + j + i]);  // behind the last key there is room
                    a[i] = fma(weight, one, a[i]), b[i] = fma(weight, two, b[i]);
                }
            }
            UNROLL for (int i = 0; i < AT_ONCE; i++) store(own + i * padded + d, a[i]), store(own + i * padded + d + W, b[i]);
        }
        for (int64_t i = 0; i < here; i++) store_row(own + i * padded, factor, width, to + (j + i) * stride);
    }
}

template <class T> void rows_of(const PrefillCall &call, const PrefillTask &task, void *memory) {
    const Scratch<T> at(call, memory);
    const Range span = look(call, task, at.seen);
    const int64_t rows = task.end, keys = span.empty() ? 0 : span.end - span.first;
    const Blocks blocks{rows};
    const auto row_of = [&](const void *tensor, const int64_t *strides, int64_t row) {
        return at.seen[row].empty() ? nullptr : (const T *)tensor + place_of(strides, call, task, row);
    };
    const auto keys_at = [&](auto *tensor, const int64_t *strides) { return tensor + task.batch * strides[0] + task.head * strides[1]; };
    const T *k = keys_at((const T *)call.k, call.k_strides), *v = keys_at((const T *)call.v, call.v_strides);
    T *dk = keys_at((T *)call.dk, call.dk_strides), *dv = keys_at((T *)call.dv, call.dv_strides);
    // Keys that nobody sees are not read.
    const auto clear = [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; j++) {
            memset((void *)(dk + j * call.dk_strides[2]), 0, call.width * sizeof(T));
            memset((void *)(dv + j * call.dv_strides[2]), 0, call.value_width * sizeof(T));
        }
    };
    clear(0, keys ? span.first : call.k_length), clear(keys ? span.end : call.k_length, call.k_length);

    memset(at.dq, 0, rows * at.width * sizeof(float)), memset(at.sums, 0, rows * at.width * sizeof(float));
    for (int64_t r = 0; r < rows; r++) {
        keep(row_of(call.q, call.q_strides, r), call.width, at.width, at.q + r * at.width);
        keep(row_of(call.grad_out, call.grad_strides, r), call.value_width, at.value_width, at.grad + r * at.value_width);
        at.row[r].factor = 0;
    }
    for (int64_t block = 0; block < blocks.count; block++) {
        const int64_t begin = blocks.begin(block), size = blocks.size(block);
        const T *q[4], *grad[4];
        for (int64_t r = 0; r < size; r++) {
            const T *const of_q = row_of(call.q, call.q_strides, begin + r), *const of_grad = row_of(call.grad_out, call.grad_strides, begin + r);
            q[r] = of_q ? of_q : NOTHING_THERE<T>, grad[r] = of_grad ? of_grad : NOTHING_THERE<T>;
        }
        pack_block(q, size, call.width, at.q_units + begin * at.units);
        pack_block(grad, size, call.value_width, at.grad_units + begin * at.value_units);
        for (int64_t j = 0; j < keys; j += TILE) {
            const int64_t count = keys - j < TILE ? keys - j : TILE;
            const Lines<T> of_k{k + (span.first + j) * call.k_strides[2], call.k_strides[2], count};
            const Lines<T> of_v{v + (span.first + j) * call.v_strides[2], call.v_strides[2], count};
            Ahead ask_values(of_v, call.value_width, count), nothing(Lines<T>{of_v.base, 0, 0}, 0, 1);
            float largest[4];
            known(size, [&](auto n) {
                score_rows<T, n>(at.q_units + begin * at.units, of_k, call.width, {call.scale, 0}, at.weights + begin * at.line + j, at.line,
                                 largest, ask_values);
                score_rows<T, n>(at.grad_units + begin * at.value_units, of_v, call.value_width, {1, 0}, at.scores + begin * at.line + j,
                                 at.line, largest, nothing);
            });
        }
    }
    const int64_t size = call.bias_dtype == FLOAT32 ? 4 : call.bias_dtype == BOOLEAN ? 1 : 2;
    for (int64_t r = 0; r < rows; r++) {
        float *weights = at.weights + r * at.line, *scores = at.scores + r * at.line;
        const Range own = at.seen[r].empty() ? Range{0, 0} : Range{at.seen[r].first - span.first, at.seen[r].end - span.first};
        if (call.bias && !own.empty()) {
            const int64_t place = place_of(call.bias_strides, call, task, r) + span.first * call.bias_strides[3];
            add_bias((const char *)call.bias + place * size, call.bias_dtype, call.bias_strides[3], keys, weights);
        }
        const float of_lse = call.grad_lse && !own.empty() ? call.grad_lse[lse_of(call, task, r)] : 0;
        const float delta = differentiate(weights, scores, keys, own, of_lse);
        if (call.delta) call.delta[lse_of(call, task, r)] = delta;
        for (int64_t i = up(keys, W); i < at.line; i++) weights[i] = scores[i] = 0;
    }
    for (int64_t j = 0; j < keys; j += TILE) {
        const int64_t count = keys - j < TILE ? keys - j : TILE;
        const Lines<T> of_k{k + (span.first + j) * call.k_strides[2], call.k_strides[2], count};
        for (int64_t block = 0; block < blocks.count; block++) {
            const int64_t begin = blocks.begin(block);
            Ahead nothing(Lines<T>{of_k.base, 0, 0}, 0, 1);
            float *sums = at.sums + begin * at.width;
            known(blocks.size(block), [&](auto n) {
                value_rows<T, n>(at.scores + begin * at.line + j, at.line, at.row + begin, of_k, call.width, sums, at.width, nothing);
            });
        }
        for (int64_t i = 0; i < rows * at.width; i += W) store(at.dq + i, add(load(at.dq + i), load(at.sums + i)));
        key_rows(at.scores + j, at.line, at.q, rows, call.width, at.width, count, at.row_out, call.scale,
                 dk + (span.first + j) * call.dk_strides[2], call.dk_strides[2]);
        key_rows(at.weights + j, at.line, at.grad, rows, call.value_width, at.value_width, count, at.row_out, 1,
                 dv + (span.first + j) * call.dv_strides[2], call.dv_strides[2]);
    }
    for (int64_t r = 0; r < rows; r++) {
        float *own = at.dq + r * at.width;
        for (int64_t d = 0; d < at.width; d += 2 * W) store_pair((const T *)nullptr, load(own + d), load(own + d + W), at.sums + d);
        store_row(at.sums, call.scale, call.width, (T *)call.dq + place_of(call.dq_strides, call, task, r));
    }
}

size_t scratch_bytes(const PrefillCall &call) {
    switch (call.dtype) {
        case FLOAT32: return Scratch<float>(call, nullptr).bytes;
        case BFLOAT16: return Scratch<BFloat16>(call, nullptr).bytes;
        default: return Scratch<Float16>(call, nullptr).bytes;
    }
}
void run(const PrefillCall &call, const PrefillTask &task, void *memory) {
    switch (call.dtype) {
        case FLOAT32: return rows_of<float>(call, task, memory);
        case BFLOAT16: return rows_of<BFloat16>(call, task, memory);
        default: return rows_of<Float16>(call, task, memory);
    }
}

}  // namespace

extern const PrefillKernel NAMED(INSTRUCTION_SET);
const PrefillKernel NAMED(INSTRUCTION_SET) = {scratch_bytes, run};
