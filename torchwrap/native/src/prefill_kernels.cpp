// Attention of many queries in bfloat16, with every sum in float32: some rows of queries over all the keys they see.
//
// Keys go in blocks of BLOCK, packed once for all rows of the task, rows in blocks of HEIGHT. Of a block of keys, ROWS rows of scores are
// computed in registers and kept; the running maximum turns them into weights, which are stored in bfloat16, and another product
// adds weights times values to what the rows have so far. What hides keys is the interval of columns that each row sees: tiles that no row
// sees are left out, those at its ends are compared. A sink is a score that comes first and has no value.
//
// Source: Tri Dao, "FlashAttention-2", 2023, algorithm 1. Differences: keys in the outer loop, base 2, rows of all query heads that share a
// key/value head are one long list.
#include "blocks.h"

#include <math.h>

#define NAMED(name) JOIN(prefill_, name)

namespace {

struct Scratch {
    int64_t width, value_width;       // padded to whole vectors
    uint32_t *k_columns, *v_pairs;    // right factors of a block of keys
    uint16_t *q_rows, *weights;       // (part, width), (HEIGHT, BLOCK): left factors
    float *values, *maximum, *sum;    // (part, value_width), (part), (part, W): what the rows have so far
    Range *seen;
    size_t bytes;

    Scratch(const PrefillCall &call, void *memory) : width(up(call.width, 16)), value_width(up(call.value_width, 16)) {
        Cut take{(char *)memory};
        take(k_columns, BLOCK * width / 2), take(v_pairs, BLOCK / 2 * value_width);
        take(q_rows, call.part * width), take(weights, HEIGHT * BLOCK);
        take(values, call.part * value_width), take(maximum, call.part), take(sum, call.part * W), take(seen, call.part);
        bytes = take.next - (char *)memory;
    }
};

// Scores of ROWS rows and COLUMNS columns, base 2.
template <bool CAPPED>
INLINE void scores(const PrefillCall &call, const Scratch &at, int64_t row, int64_t column, Vector (*to)[VECTORS]) {
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int j = 0; j < VECTORS; j++) to[r][j] = zeros();
    add_product<VECTORS>(to, {(const uint32_t *)(at.q_rows + row * at.width), at.width / 2, 1}, at.k_columns + column * at.width / 2, COLUMNS,
                         at.width / 2);
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int j = 0; j < VECTORS; j++)
            to[r][j] = CAPPED ? mul(tanh(mul(to[r][j], all(call.scale / call.softcap))), all(call.softcap * LOG2E))
                              : mul(to[r][j], all(call.scale * LOG2E));
}

INLINE float largest(Vector x) {
    float lanes[W], most = -INFINITY;
    store(lanes, x);
    for (float lane : lanes) most = lane > most ? lane : most;
    return most;
}

// Weights of ROWS rows over the columns of `span`, and what they change in the rows' sums.
template <bool CAPPED> void weigh(const PrefillCall &call, const Scratch &at, int64_t row, int64_t place, int64_t block, Range span) {
    alignas(64) float kept[ROWS][BLOCK];
    Sight sights[BLOCK / COLUMNS];
    Vector top[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) top[r] = all(-INFINITY);
    for (int64_t column = span.first; column < span.end; column += COLUMNS) {
        const Sight how = sights[column / COLUMNS] = sight(at.seen + row, block + column);
        if (how == NOTHING) continue;
        Vector found[ROWS][VECTORS];
        scores<CAPPED>(call, at, row, column, found);
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int j = 0; j < VECTORS; j++) {
                if (how == SOME) found[r][j] = if_seen(found[r][j], at.seen[row + r], block + column + j * W, all(-INFINITY));
                top[r] = larger(top[r], found[r][j]);
                store(kept[r] + column + j * W, found[r][j]);
            }
    }
    Vector origin[ROWS], total[ROWS];
    for (int r = 0; r < ROWS; r++) {
        const float before = at.maximum[row + r], here = largest(top[r]);
        const float after = here > before ? here : before;
        // Differences to -inf would be NaN: a row whose scores are all -inf so far.
        origin[r] = all(after == -INFINITY ? 0 : after), total[r] = load(at.sum + (row + r) * W);
        if (after == before) continue;
        at.maximum[row + r] = after;
        const Vector factor = all(exp2f(before - after));
        total[r] = mul(total[r], factor);
        float *values = at.values + (row + r) * at.value_width;
        for (int64_t d = 0; d < at.value_width; d += W) store(values + d, mul(load(values + d), factor));
    }
    for (int64_t column = span.first; column < span.end; column += COLUMNS) {
        uint16_t *to = at.weights + place * BLOCK + column;
        if (sights[column / COLUMNS] == NOTHING) {
            for (int r = 0; r < ROWS; r++) memset(to + r * BLOCK, 0, COLUMNS * sizeof *to);
            continue;
        }
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int j = 0; j < VECTORS; j += 2) {
                const Vector one = exp2(sub(load(kept[r] + column + j * W), origin[r]));
                const Vector two = exp2(sub(load(kept[r] + column + (j + 1) * W), origin[r]));
                total[r] = add(total[r], add(one, two));
                store_rounded(one, two, to + r * BLOCK + j * W);
            }
    }
    for (int r = 0; r < ROWS; r++) store(at.sum + (row + r) * W, total[r]);
}

void run(const PrefillCall &call, const PrefillTask &task, void *memory) {
    const Scratch at(call, memory);
    const Range span = look(call, task, at.seen);
    const int64_t rows = up(task.end - task.begin, ROWS);
    memset(at.values, 0, call.part * at.value_width * sizeof(float)), memset(at.sum, 0, call.part * W * sizeof(float));
    for (int64_t r = 0; r < call.part; r++) {
        const int64_t row = task.begin + r;
        const bool real = !at.seen[r].empty();
        copy_row(real ? (const uint16_t *)call.q + place_of(call.q_strides, call, task, row) : nullptr, call.width, at.width, at.q_rows + r * at.width);
        at.maximum[r] = -INFINITY;
        if (call.sinks && row < task.end) {
            at.maximum[r] = call.sinks[task.head * call.group() + row / call.q_length] * LOG2E;
            at.sum[r * W] = at.maximum[r] == -INFINITY ? 0 : 1;
        }
    }
    for (int64_t block = span.first / BLOCK * BLOCK; block < span.end; block += BLOCK) {
        Keys(call.k, call.k_strides, task, block, span).pack_columns(call.width, at.width, at.k_columns);
        Keys(call.v, call.v_strides, task, block, span).pack_pairs(call.value_width, at.value_width, at.v_pairs);
        for (int64_t top = 0; top < rows; top += HEIGHT) {
            const int64_t count = rows - top < HEIGHT ? rows - top : HEIGHT;
            const Range columns = columns_seen(at.seen + top, count, block);
            if (columns.empty()) continue;
            for (int64_t r = 0; r < count; r += ROWS)
                if (call.softcap > 0) weigh<true>(call, at, top + r, r, block, columns);
                else weigh<false>(call, at, top + r, r, block, columns);
            add_matrix(at.values + top * at.value_width, count, at.value_width, {(const uint32_t *)(at.weights + columns.first), BLOCK / 2, 1},
                       at.v_pairs + columns.first / 2 * at.value_width, (columns.end - columns.first) / 2);
        }
    }
    for (int64_t r = 0; r < task.end - task.begin; r++) {
        const int64_t row = task.begin + r;
        const float total = sum(load(at.sum + r * W)), origin = at.maximum[r] == -INFINITY ? 0 : at.maximum[r];
        call.lse[lse_of(call, task, row)] = total == 0 ? -INFINITY : origin * LN2 + logf(total);
        store_row(at.values + r * at.value_width, total == 0 ? 0 : 1 / total, call.value_width,
                  (uint16_t *)call.out + place_of(call.out_strides, call, task, row));
    }
}

size_t scratch_bytes(const PrefillCall &call) { return Scratch(call, nullptr).bytes; }

}  // namespace

extern const PrefillKernel NAMED(INSTRUCTION_SET);
const PrefillKernel NAMED(INSTRUCTION_SET) = {scratch_bytes, run};
