// Which weights dropout takes: the hash of torchwrap/attention/dropout.py, for W columns of a row at once. It is a function of seed, batch row,
// head, query row and key column, so that forward and gradients agree whatever their tiles are, and nothing is stored.
#pragma once

#include "blocks.h"

namespace {

typedef uint32_t Whole __attribute__((vector_size(4 * W)));  // both compilers make the best instructions of it without being told

constexpr uint32_t STEP = 0x85ebca6b;  // between neighbouring columns

// Of one number, or of each of W.
template <class N> INLINE N mixed(N x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

// What all weights of a row have in common; `row` counts the queries of all heads that share a key/value head.
INLINE uint32_t state_of(const PrefillCall &call, const PrefillTask &task, int64_t row) {
    const Query query = query_of(call, task, row);
    const uint32_t state = mixed((uint32_t)call.seed ^ mixed((uint32_t)(task.batch * call.heads + query.head) + (uint32_t)(call.seed >> 32)));
    return mixed(state + mixed((uint32_t)query.number ^ 0x9e3779b9u));
}

// What to multiply the weights of the W columns from `column` on with: 0, or 1 / (1 - p).
INLINE Vector factors(const PrefillCall &call, uint32_t state, int64_t column) {
    alignas(64) static const uint32_t steps[16] = {
        0, STEP, 2 * STEP, 3 * STEP, 4 * STEP, 5 * STEP, 6 * STEP, 7 * STEP,
        8 * STEP, 9 * STEP, 10 * STEP, 11 * STEP, 12 * STEP, 13 * STEP, 14 * STEP, 15 * STEP};
    Whole number;
    memcpy(&number, steps, sizeof number);
    number = mixed(number + (state + (uint32_t)column * STEP));
    return (Vector)((Whole)(number >= call.threshold) & (Whole)all(call.keep));
}

}  // namespace
