// One kernel as a host function: KERNEL_FILE is the .cu file, ENTRY the kernel in it.
#include KERNEL_FILE

namespace {

const Params* arguments;

void fiber() {
    ENTRY(*arguments);
    using namespace emulation;
    done[current] = 1;
    idle = 0;
    if (++finished == threads) setcontext(&launcher);
    do current = (current + step) % threads;
    while (done[current]);
    resume(fibers[current]);
}

}  // namespace

// Runs every block of the grid, one after the other. Returns null, or what went wrong.
extern "C" const char* launch(const Params* params, int x, int y, int z, int thread_count, int descending) {
    using namespace emulation;
    constexpr size_t stack = 256 << 10;
    static std::unique_ptr<char[]> stacks;
    if (threads != thread_count) stacks = std::make_unique<char[]>(stack * thread_count);
    threads = thread_count;
    arguments = params;
    step = descending ? threads - 1 : 1;
    shuffles = products = 0;
    for (int index = 0; index < x * y * z; ++index) {
        block[0] = index % x, block[1] = index / x % y, block[2] = index / x / y;
        fibers.assign(threads, {});
        warps.assign((threads + 31) / 32, {});
        done.assign(threads, 0);
        current = descending ? threads - 1 : 0;
        waiting = finished = 0;
        idle = 0;
        error = nullptr;
        for (int i = 0; i < threads; ++i) {
            ucontext_t& entry = fibers[i].entry;
            getcontext(&entry);
            entry.uc_stack.ss_sp = stacks.get() + i * stack;
            entry.uc_stack.ss_size = stack;
            makecontext(&entry, fiber, 0);
        }
        fibers[current].begun = true;
        swapcontext(&launcher, &fibers[current].entry);
        if (error) return error;
    }
    return nullptr;
}

extern "C" size_t params_size() { return sizeof(Params); }
