// Shares a call of `prefill` out, or of its gradients: parts of the rows that share a key/value head are tasks, which threads take in turn.
//
// A task owns the results of its queries. Gradients of keys are sums over tasks: for each block of keys the tasks that see it add to it one after
// another, always in the order in which they are handed out, so the result does not depend on the number of threads. A task waits only
// for tasks that were taken before it, so somebody always goes on. Parts go from the last row to the first: below a causal mask the longest
// come first, and the shortest fill the ends.
#include <math.h>
#include <string.h>

#include <atomic>
#include <mutex>
#include <new>
#include <thread>

#include "choices.h"
#include "parallel.h"

namespace {

constexpr int64_t TASKS = 32, LONGEST = 512;  // parts are made for as many tasks, of at least two blocks; of one where rows are few
constexpr int64_t ALONE = 1 << 20;            // products of a row and a key, times width, below which one thread is enough: 10 to 20 microseconds
constexpr int64_t FEW_ALONE = 1 << 17;        // the same for gradients of few rows: rows times bytes of K and V (as in decode.cpp)

// Which of those tasks that add to the same numbers of the gradient of the bias a task is, and which of such chains (`of`) it is in. Numbers for all
// batch entries join tasks alike in all else; those for all heads or rows, all tasks of a batch entry.
Turn bias_chain(const PrefillCall &call, int64_t parts, int64_t task) {
    const int64_t each = call.kv_heads * parts, batch = task / each;
    const bool batches = !call.dbias_strides[0], rest = !call.dbias_strides[1] || !call.dbias_strides[2];
    if (rest) return {(int32_t)(batches ? task : task % each), (int32_t)(batches ? 0 : batch)};
    return {(int32_t)(batches ? batch : 0), (int32_t)(batches ? task % each : task)};
}

struct Work {
    const PrefillCall &call;
    const PrefillKernel &kernel;
    const Turn *turns;   // (B or 1, parts, blocks)
    std::atomic<int> *progress;  // (pairs, blocks): tasks that have added to it
    int64_t parts, blocks, tasks;
    std::atomic<int> *bias_progress = nullptr;  // (chains, blocks): the same for the gradient of a bias that tasks share
    // Sums that are not the results themselves have places, one for each pair that is worked on: places of pairs, tasks done of pairs, free places.
    // Pairs come one after another, so that these are at most as many as threads.
    int32_t *place = nullptr, *finished = nullptr, *free = nullptr;
    int64_t next = 0;
    int64_t threads = 1;
    std::mutex taking;
    std::atomic<bool> no_memory{false};

    // The number of the next task, or -1.
    int64_t take() {
        const std::lock_guard<std::mutex> lock(taking);
        if (next == tasks) return -1;
        if (place && next % parts == 0) place[next / parts] = *free++;
        return next++;
    }
    void give_back(int64_t pair) {
        if (!place) return;
        const std::lock_guard<std::mutex> lock(taking);
        if (++finished[pair] == parts) *--free = place[pair];
    }

    void run() {
        const torchwrap::Memory scratch(kernel.scratch_bytes(call));
        if (!scratch.at) {
            no_memory = true;
            return;
        }
        const int64_t rows = call.group * call.q_length;
        for (int64_t number; (number = take()) >= 0;) {
            const int64_t pair = number / parts, part = number % parts, begin = (parts - 1 - part) * call.part;
            const int64_t end = begin + call.part < rows ? begin + call.part : rows, batch = pair / call.kv_heads;
            const Turn chain = bias_chain(call, parts, number);
            const int64_t next = parts == 1 && number + threads < tasks ? number + threads : -1;
            kernel.run(call, {batch, pair % call.kv_heads, begin, end, place ? place[pair] : 0, chain.number,
                              next < 0 ? -1 : next / call.kv_heads, next < 0 ? -1 : next % call.kv_heads,
                              turns + ((call.limits_shared ? 0 : batch) * parts + part) * blocks, progress + pair * blocks,
                              bias_progress ? bias_progress + chain.of * blocks : nullptr, wait, done}, scratch.at);
            give_back(pair);
        }
    }

    static void wait(void *progress, int64_t block, int64_t number) {
        while (((std::atomic<int> *)progress)[block].load(std::memory_order_acquire) != number) std::this_thread::yield();
    }
    static void done(void *progress, int64_t block) { ((std::atomic<int> *)progress)[block].fetch_add(1, std::memory_order_release); }
};

// The turns of one batch entry; returns whether some block is added to by more than one task.
bool count_turns(const PrefillCall &call, int64_t batch, int64_t parts, int64_t blocks, Turn *turns, int32_t *seen) {
    const int64_t rows = call.group * call.q_length;
    int32_t *of = seen + blocks + 1;
    memset(of, 0, blocks * sizeof *of);
    for (int64_t part = 0; part < parts; part++) {
        // Each interval adds one at its beginning and takes it away behind its end; running sums are what is seen.
        memset(seen, 0, (blocks + 1) * sizeof *seen);
        const int64_t begin = (parts - 1 - part) * call.part, end = begin + call.part < rows ? begin + call.part : rows;
        for (int64_t row = begin; row < end; row++) {
            const Range range = seen_by(call, batch, row);
            if (!range.empty()) seen[range.first / BLOCK]++, seen[(range.end - 1) / BLOCK + 1]--;
        }
        int32_t open = 0;
        for (int64_t block = 0; block < blocks; block++) {
            open += seen[block];
            turns[part * blocks + block].number = open > 0 ? of[block]++ : -1;
        }
    }
    bool shared = false;
    for (int64_t block = 0; block < blocks; block++) {
        if (of[block] > 1) shared = true;
        for (int64_t part = 0; part < parts; part++) turns[part * blocks + block].of = of[block];
    }
    return shared;
}

// Gradients of the blocks of keys that no task sees are zeros.
void clear_unseen(const PrefillCall &call, int64_t table, int64_t blocks, const Turn *turns) {
    const int64_t first = call.limits_shared ? 0 : table, end = call.limits_shared ? call.batch : table + 1, size = call.dtype == FLOAT32 ? 4 : 2;
    const auto clear = [&](void *tensor, const int64_t *strides, int64_t width, int64_t pair, int64_t key) {
        memset((char *)tensor + (pair / call.kv_heads * strides[0] + pair % call.kv_heads * strides[1] + key * strides[2]) * size, 0, width * size);
    };
    for (int64_t key = 0; key < call.k_length; key++) {
        if (turns[key / BLOCK].of) continue;
        for (int64_t pair = first * call.kv_heads; pair < end * call.kv_heads; pair++)
            clear(call.dk, call.dk_strides, call.width, pair, key), clear(call.dv, call.dv_strides, call.value_width, pair, key);
    }
}

// Parts of the rows of one (batch, head).
int64_t split(PrefillCall &call) {
    const int64_t rows = call.group * call.q_length, all = rows * call.batch * call.kv_heads;
    const int64_t wanted = (all / TASKS + HEIGHT - 1) / HEIGHT * HEIGHT;
    const int64_t least = all <= 4 * HEIGHT ? HEIGHT : 2 * HEIGHT;
    call.part = wanted < least ? least : wanted > LONGEST ? LONGEST : wanted;
    if (call.part > rows) call.part = (rows + 7) / 8 * 8;  // no kernel has more rows in a tile
    return (rows + call.part - 1) / call.part;
}

int64_t threads_for(const PrefillCall &call, int64_t tasks) {
    const int64_t threads = call.batch * call.heads * call.q_length * call.k_length * call.width < ALONE ? 1 : call.threads;
    return threads < tasks ? threads : tasks;
}

int go(Work &work) {
    work.threads = threads_for(work.call, work.tasks);
    torchwrap::on_threads((int)work.threads, [](void *argument) { ((Work *)argument)->run(); }, &work);
    // A thread without memory leaves its share to the others; only when all of them had none is something missing.
    return work.next < work.tasks && work.no_memory ? 1 : 0;
}

}  // namespace

// Both return 0: done; 1: no memory; 2: the instruction set cannot run here. No size is zero.
EXPORT int torchwrap_prefill(const PrefillCall *asked) {
    PrefillCall call = *asked;
    call.group = call.heads / call.kv_heads;
    const torchwrap::Choice *chosen = torchwrap::choice(call.instruction_set);
    if (!chosen) return 2;
    const int64_t parts = split(call);
    Work work{call, *chosen->prefill, nullptr, nullptr, parts, 0, call.batch * call.kv_heads * parts};
    return go(work);
}

namespace {

// Gradients of few rows: a pair is a task, and keys are read once for all its rows.
int few(PrefillCall call, const PrefillKernel &kernel) {
    struct Pairs {
        const PrefillCall &call;
        const PrefillKernel &kernel;
        const int64_t count;
        std::atomic<int64_t> next{0};
        std::atomic<bool> no_memory{false};
    };
    call.part = call.group * call.q_length;
    Pairs pairs{call, kernel, call.batch * call.kv_heads};
    const int64_t bytes = pairs.count * call.k_length * (call.width + call.value_width) * (call.dtype == FLOAT32 ? 4 : 2);
    const int64_t threads = bytes * call.part < FEW_ALONE ? 1 : call.threads;
    torchwrap::on_threads((int)(threads < pairs.count ? threads : pairs.count), [](void *argument) {
        Pairs &all = *(Pairs *)argument;
        const torchwrap::Memory scratch(all.kernel.scratch_bytes(all.call));
        if (!scratch.at) {
            all.no_memory = true;
            return;
        }
        for (int64_t pair; (pair = all.next.fetch_add(1, std::memory_order_relaxed)) < all.count;)
            all.kernel.run(all.call, {pair / all.call.kv_heads, pair % all.call.kv_heads, 0, all.call.part, 0, 0, -1, -1}, scratch.at);
    }, &pairs);
    return pairs.next.load() < pairs.count && pairs.no_memory ? 1 : 0;
}

}  // namespace

EXPORT int torchwrap_gradients(const PrefillCall *asked) {
    PrefillCall call = *asked;
    call.group = call.heads / call.kv_heads;
    const torchwrap::Choice *chosen = torchwrap::choice(call.instruction_set);
    if (!chosen) return 2;
    if (call.few) return few(call, *chosen->few);
    const int64_t parts = split(call), pairs = call.batch * call.kv_heads, blocks = (call.k_length + BLOCK - 1) / BLOCK;
    const int64_t tables = call.limits_shared ? 1 : call.batch;
    const torchwrap::Memory turns(tables * parts * blocks * sizeof(Turn)), counts((2 * blocks + 1) * sizeof(int32_t));
    const torchwrap::Memory progress(pairs * blocks * sizeof(std::atomic<int>));
    if (!turns.at || !counts.at || !progress.at) return 1;
    bool shared = false;
    for (int64_t b = 0; b < tables; b++) {
        Turn *own = (Turn *)turns.at + b * parts * blocks;
        shared |= count_turns(call, b, parts, blocks, own, (int32_t *)counts.at);
        clear_unseen(call, b, blocks, own);
    }
    for (int64_t i = 0; i < pairs * blocks; i++) new ((std::atomic<int> *)progress.at + i) std::atomic<int>(0);
    const int64_t chains = call.dbias ? pairs * parts : 0;
    const torchwrap::Memory bias_progress(chains * blocks * sizeof(std::atomic<int>));
    if (!bias_progress.at) return 1;
    for (int64_t i = 0; i < chains * blocks; i++) new ((std::atomic<int> *)bias_progress.at + i) std::atomic<int>(0);

    const int64_t width = (call.width + 15) / 16 * 16, value_width = (call.value_width + 15) / 16 * 16, threads = threads_for(call, pairs * parts);
    // In float32 results hold the sums.
    const int64_t places = !shared || call.dtype == FLOAT32 ? 0 : threads < pairs ? threads : pairs;
    const torchwrap::Memory sums(places * call.k_length * (width + value_width) * sizeof(float)), holders((2 * pairs + places) * sizeof(int32_t));
    if (!sums.at || !holders.at) return 1;
    call.dk_sums = (float *)sums.at, call.dv_sums = call.dk_sums + places * call.k_length * width;
    Work work{call, *chosen->gradients, (Turn *)turns.at, (std::atomic<int> *)progress.at, parts, blocks, pairs * parts};
    if (chains) work.bias_progress = (std::atomic<int> *)bias_progress.at;
    if (places > 0) {
        work.place = (int32_t *)holders.at, work.finished = work.place + pairs, work.free = work.finished + pairs;
        memset(work.finished, 0, pairs * sizeof *work.finished);
        for (int64_t i = 0; i < places; i++) work.free[i] = (int32_t)i;
    }
    return go(work);
}
