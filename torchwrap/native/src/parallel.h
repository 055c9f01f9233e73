// What a call works with: threads, and memory that is given back when it ends.
#pragma once

#include <stdlib.h>

namespace torchwrap {

// Aligned to cache lines; `at` is null when there was none.
struct Memory {
    void *at;
    explicit Memory(size_t bytes) : at(aligned_alloc(64, (bytes + 64) / 64 * 64)) {}
    ~Memory() { free(at); }
    Memory(const Memory &) = delete;
};

// The function is called once per thread, at the same time; it has to share the work out itself. At least one call happens.
void on_threads(int threads, void (*function)(void *), void *argument);

// "torch's OpenMP" or "own threads".
const char *thread_source();

}  // namespace torchwrap
