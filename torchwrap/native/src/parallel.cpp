// Threads: those of the OpenMP that torch has already loaded, so that its waiting threads do not compete with ours for the cores.
//
// Linking an OpenMP of our own would bring a second pool: after each of torch's operations its threads spin for a while, and ours would share
// the cores with them. GNU's entry point has a stable calling convention, and LLVM's and Intel's libraries offer it too. Where it cannot be found, and in
// a forked child (GNU OpenMP waits for ever there for threads that only the parent has), threads are started for the call.
#include "parallel.h"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace torchwrap {
namespace {

using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

const pid_t loaded_in = getpid();
std::atomic<int64_t> held{0}, most_held{0};

Parallel find() {
    static const Parallel found = (Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    return getpid() == loaded_in ? found : nullptr;
}

}  // namespace

void holds(int64_t bytes) {
    const int64_t now = held.fetch_add(bytes) + bytes;
    for (int64_t most = most_held; now > most && !most_held.compare_exchange_weak(most, now);) {}
}
int64_t most_bytes() { return most_held.exchange(held); }

const char *thread_source() { return find() ? "torch's OpenMP" : "own threads"; }

void on_threads(int threads, void (*function)(void *), void *argument) {
    if (threads <= 1) return function(argument);
    if (Parallel parallel = find()) return parallel(function, argument, (unsigned)threads, 0);
    std::vector<std::thread> others;
    others.reserve(threads - 1);
    try {
        while ((int)others.size() < threads - 1) others.emplace_back(function, argument);
    } catch (const std::system_error &) {
        // Fewer threads than wished for do the same work.
    }
    function(argument);
    for (std::thread &other : others) other.join();
}

}  // namespace torchwrap
