// Runs one function on several threads and waits for all of them.
#pragma once

namespace torchwrap {

// The function is called once per thread, at the same time; it has to share the work out itself. At least one call happens.
void on_threads(int threads, void (*function)(void *), void *argument);

// "torch's OpenMP" or "own threads".
const char *thread_source();

}  // namespace torchwrap
