// What a call works with: threads, and memory that is given back when it ends.
#pragma once

#include <stdint.h>
#include <stdlib.h>

namespace torchwrap {

// What all calls together hold grows by so many bytes; `most_bytes` tells.
void holds(int64_t bytes);

// Aligned to cache lines; `at` is null when there was none.
struct Memory {
    const size_t bytes;
    void *at;
    explicit Memory(size_t asked) : bytes((asked + 64) / 64 * 64), at(aligned_alloc(64, bytes)) { holds((int64_t)bytes); }
    ~Memory() { free(at), holds(-(int64_t)bytes); }
    Memory(const Memory &) = delete;
};

// The function is called once per thread, at the same time; it has to share the work out itself. At least one call happens.
void on_threads(int threads, void (*function)(void *), void *argument);

// The most bytes of `Memory` at one time since this was last asked.
int64_t most_bytes();

// "torch's OpenMP" or "own threads".
const char *thread_source();

}  // namespace torchwrap
