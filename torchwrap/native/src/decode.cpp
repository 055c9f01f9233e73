// Shares a call of `decode` out over pieces of keys, lets threads take them in turn, and merges the pieces of each (batch, head).
//
// Where keys lie in runs (pages of a pool), each run is a piece: the kernels see neighbouring keys, whatever the order of the pages.
// Only the columns that some row of a batch entry sees are cut: a window of a long cache still makes work for all threads. The pieces depend on
// sizes and limits alone and are merged in their order, so the result does not depend on the number of threads.
// Merge: with maxima m_i, sums l_i and values a_i of the pieces, m = max m_i, weight w_i = e^(m_i - m),
// out = sum w_i a_i / sum w_i l_i, lse = m + ln(sum w_i l_i).
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <new>

#include "choices.h"
#include "parallel.h"

namespace {

constexpr int64_t PIECES = 128, SHORTEST = 256, LONGEST = 4096;
constexpr int64_t SHARE = 4;  // a thread takes so much of its share of what is left at once (chosen)
// Bytes of K and V up to which they are taken to lie in the second-level cache. There the time between two tiles counts for more than that two tiles
// leave room in the first: tiles of 24 KiB take 0.87 to 0.98 of the time of 16 KiB, and 1.01 to 1.05 of it where memory is farther (measured).
constexpr int64_t NEAR = 1 << 20, NEAR_TILE = 24 << 10, TILE = 16 << 10;
constexpr int64_t ALONE = 1 << 17;  // bytes of K and V below which waking a second thread costs more than it brings (chosen)

struct Work {
    const DecodeCall &call;
    const Kernel &kernel;
    const Range *spans;                 // (B): columns from the first to the last that some row sees
    int64_t length, splits, tasks;      // keys per piece, pieces per (batch, head), pieces in all
    int64_t tile_bytes;                 // of K and V, of a tile
    float *values, *maximum, *sum;      // (tasks, R, V), (tasks, R), (tasks, R)
    std::atomic<int> *left;             // (batch * head): pieces not finished
    const int32_t *owner;               // batch entry of each run, or null: there are no runs
    const int64_t threads;
    std::atomic<int64_t> next{0};
    std::atomic<bool> no_memory{false};

    // Task `from + i * step` is piece i of a pair. With runs the heads of one run are neighbours: they share its memory.
    void merge(int64_t pair) const {
        const int64_t rows = call.rows, width = call.value_width, batch = pair / call.heads;
        const int64_t step = owner ? call.heads : 1, from = owner ? call.run_of[batch] * step + pair % call.heads : pair * splits;
        const int64_t behind = from + (owner ? call.run_of[batch + 1] - call.run_of[batch] : splits) * step;
        for (int64_t r = 0; r < rows; r++) {
            alignas(64) float own[MAX_WIDTH];
            float top = -INFINITY, total = 0;
            for (int64_t i = from; i < behind; i += step)
                if (maximum[i * rows + r] > top) top = maximum[i * rows + r];
            const float origin = top == -INFINITY ? 0 : top;
            // What one piece has is merged with nothing.
            const bool alone = behind == from + step;
            const float *merged = alone ? values + (from * rows + r) * width : own;
            if (alone) total = sum[from * rows + r];
            else memset(own, 0, width * sizeof *own);
            for (int64_t i = from; i < behind && !alone; i += step) {
                const float part = sum[i * rows + r];
                if (part == 0) continue;  // sees no key of this piece; NaN is not equal to zero
                const float weight = maximum[i * rows + r] == -INFINITY ? 1 : expf(maximum[i * rows + r] - origin);
                const float *from_piece = values + (i * rows + r) * width;
                total += weight * part;
                for (int64_t c = 0; c < width; c++) own[c] += weight * from_piece[c];
            }
            const int64_t place = pair * rows + r;
            if (call.lse) call.lse[place] = total == 0 ? -INFINITY : (float)(origin + log((double)total));
            char *out = (char *)call.out + place * width * (call.out_dtype == FLOAT32 ? 4 : 2);
            kernel.store(merged, total == 0 ? 0 : 1 / total, width, call.out_dtype, out);
        }
    }

    Place place_of(int64_t task) const {
        const int64_t run = task / call.heads, pair = owner ? owner[run] * call.heads + task % call.heads : task / splits;
        const Range span = owner ? Range{call.runs[2 * run], call.runs[2 * run + 1]} : spans[pair / call.heads];
        const int64_t wanted = span.first + (owner ? 0 : task % splits * length), begin = wanted < span.end ? wanted : span.end;
        return {pair / call.heads, pair % call.heads, begin, !owner && begin + length < span.end ? begin + length : span.end};
    }

    // Takes neighbouring tasks for one thread, as memory is read faster in one go; fewer and fewer of them, so that no thread waits for another in
    // the end. Returns how many, from `from` on.
    int64_t take(int64_t &from) {
        int64_t many;
        from = next.load(std::memory_order_relaxed);
        do {
            if (from >= tasks) return 0;
            many = (tasks - from) / (SHARE * threads);
            if (many < 1) many = 1;
        } while (!next.compare_exchange_weak(from, from + many, std::memory_order_relaxed));
        return many;
    }

    void run() {
        const torchwrap::Memory scratch(kernel.scratch_bytes(call));
        if (!scratch.at) {
            no_memory = true;
            return;
        }
        const int64_t rows = call.rows;
        for (int64_t from = 0, many; (many = take(from)) > 0;) {
            Place place = place_of(from);
            for (int64_t task = from; task < from + many; task++) {
                const Place own = place;
                place = task + 1 < tasks ? place_of(task + 1) : Place{own.batch, own.head, 0, 0};
                float *of_piece = values + task * rows * call.value_width;
                kernel.piece(call, {own, place, tile_bytes, maximum + task * rows, sum + task * rows, of_piece}, scratch.at);
                const int64_t pair = own.batch * call.heads + own.head;
                if (left[pair].fetch_sub(1, std::memory_order_acq_rel) == 1) merge(pair);
            }
        }
    }
};

// Columns from the first to the last that some row of a batch entry sees.
Range span_of(const DecodeCall &call, int64_t batch) {
    Range span{call.keys, 0};
    // Without limits of their own all rows see the same.
    for (int64_t r = 0; r < (call.limits ? call.rows : 1); r++) {
        const Range seen = visible(call, batch, r);
        if (seen.empty()) continue;
        if (seen.first < span.first) span.first = seen.first;
        if (seen.end > span.end) span.end = seen.end;
    }
    return span.empty() ? Range{0, 0} : span;
}

}  // namespace

// Reads memory as `decode` does, by the same threads, and does nothing else: what its speed is compared with.
EXPORT uint64_t torchwrap_read(const uint64_t *memory, int64_t words, int threads) {
    struct Reading {
        const uint64_t *memory;
        int64_t words;
        std::atomic<int64_t> next{0};
        std::atomic<uint64_t> total{0};
    } reading{memory, words};
    torchwrap::on_threads(threads, [](void *argument) {
        Reading &all = *(Reading *)argument;
        constexpr int64_t PART = 1 << 15;
        uint64_t total = 0;
        for (int64_t from; (from = all.next.fetch_add(PART, std::memory_order_relaxed)) < all.words;) {
            const int64_t end = from + PART < all.words ? from + PART : all.words;
            for (int64_t i = from; i < end; i++) total += all.memory[i];
        }
        all.total += total;
    }, &reading);
    return reading.total;
}

// 0: done. 1: no memory. 2: the instruction set cannot run here.
EXPORT int torchwrap_decode(const DecodeCall *asked) {
    const DecodeCall &call = *asked;
    const torchwrap::Choice *chosen = torchwrap::choice(call.instruction_set);
    if (!chosen) return 2;
    const int64_t pairs = call.batch * call.heads, rows = call.rows;
    if (pairs == 0 || rows == 0) return 0;
    int64_t longest = 0, total = 0;
    const int64_t runs = call.run_of ? call.run_of[call.batch] : 0;
    const torchwrap::Memory tables(call.batch * sizeof(Range) + runs * sizeof(int32_t));
    if (!tables.at) return 1;
    Range *spans = (Range *)tables.at;
    int32_t *owners = (int32_t *)(spans + call.batch);
    for (int64_t b = 0; call.run_of && b < call.batch; b++)
        for (int64_t run = call.run_of[b]; run < call.run_of[b + 1]; run++) {
            owners[run] = (int32_t)b;
            total += call.runs[2 * run + 1] - call.runs[2 * run];
        }
    for (int64_t b = 0; !call.run_of && b < call.batch; b++) {
        spans[b] = span_of(call, b);
        const int64_t keys = spans[b].end - spans[b].first;
        total += keys;
        if (keys > longest) longest = keys;
    }
    int64_t length = (call.heads * total / PIECES + 63) / 64 * 64;
    length = length < SHORTEST ? SHORTEST : length > LONGEST ? LONGEST : length;
    const int64_t splits = longest > length ? (longest + length - 1) / length : 1;
    const int64_t tasks = call.run_of ? runs * call.heads : pairs * splits;

    const int64_t bytes = call.heads * total * (call.width + call.value_width) * (call.dtype == FLOAT32 ? 4 : 2);
    int64_t threads = bytes * rows < ALONE || call.threads < 1 ? 1 : call.threads;
    if (threads > tasks) threads = tasks;

    const int64_t numbers = tasks * rows * (call.value_width + 2);
    const torchwrap::Memory parts(numbers * sizeof(float) + pairs * sizeof(std::atomic<int>));
    if (!parts.at) return 1;
    float *values = (float *)parts.at, *maximum = values + tasks * rows * call.value_width;
    Work work{call, *chosen->decode, spans, length, splits, tasks, bytes <= NEAR ? NEAR_TILE : TILE, values, maximum,
              maximum + tasks * rows, (std::atomic<int> *)(values + numbers),
              call.run_of ? owners : nullptr, threads};
    for (int64_t pair = 0; pair < pairs; pair++) {
        const int32_t *of = call.run_of ? call.run_of + pair / call.heads : nullptr;
        new (work.left + pair) std::atomic<int>((int)(of ? of[1] - of[0] : splits));
        if (of && of[1] == of[0]) work.merge(pair);  // no piece will
    }

    if (tasks == 0) return 0;
    torchwrap::on_threads((int)threads, [](void *argument) { ((Work *)argument)->run(); }, &work);
    // A thread without memory leaves its share to the others; only when all of them had none is something missing.
    return work.next.load() < tasks && work.no_memory ? 1 : 0;
}
