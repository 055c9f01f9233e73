// Blocks that torch's CPU allocator frees are kept for its next requests of the same size, up to a bound.
//
// torch takes memory with posix_memalign and gives it back with free, both in libc10.so. Those two entries of that library's own table of
// imported functions are pointed here, and nowhere else's. What is kept are ordinary blocks of the C library: torch's allocator object, its
// deleters and its reports to profilers stay as they are, any block may be freed by whoever holds it, before and after, in a forked child
// as well, and undoing is two stores. No header of torch is needed, so the library still serves every version of it.
//
// A size is rounded up to whole GRAINs, which costs addresses but no memory: pages exist once they are touched, large ones where a whole one
// fits and the system has them for who asks. The block freed last is taken first, it may still be in the processor's cache; the one freed
// first is let go first. An allocation never waits: where another thread is at the list, the call goes to the C library. A fork does: the
// child finds the list free, and empty, because pages that both have would be copied as soon as the parent uses them again.
#include <stdint.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

enum Refusal : int { NONE = 0, SYSTEM = 1, NO_TORCH = 2, REPLACED = 3, PROTECTED = 4, BUSY = 5 };

#if defined(__linux__) && defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))

#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <link.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

namespace {

#if defined(__x86_64__)
constexpr uint32_t IMPORTED[] = {R_X86_64_JUMP_SLOT, R_X86_64_GLOB_DAT};
#else
constexpr uint32_t IMPORTED[] = {R_AARCH64_JUMP_SLOT, R_AARCH64_GLOB_DAT};
#endif
constexpr size_t GRAIN = 64 << 10, HUGE_PAGE = 2 << 20;
constexpr int MOST = 1024;  // blocks; where that binds, the oldest is let go
constexpr int PATIENCE = 10000;  // naps of 0.1 ms before a change of the bound is given up; who is at the list may be off the processor

// The C library's own, whatever name is found first in this process.
struct Library {
    int (*posix_memalign)(void **, size_t, size_t);
    void (*free)(void *);
    size_t (*usable)(void *);
} c;

struct Block {
    void *at;
    size_t bytes;  // whole GRAINs of it
};

Block blocks[MOST];  // the oldest first
int count;
size_t kept;
std::atomic_flag busy = ATOMIC_FLAG_INIT;
std::atomic<size_t> bound{0}, least{SIZE_MAX};
std::atomic<uint64_t> taken{0}, missed{0};

struct Slot {
    void **at, *before, *ours;
    bool read_only;
};
Slot slots[8];
int found;

bool at_once() { return !busy.test_and_set(std::memory_order_acquire); }
bool patiently() {
    for (int turn = 0; turn < PATIENCE; turn++) {
        if (at_once()) return true;
        const timespec nap{0, 100000};
        nanosleep(&nap, nullptr);
    }
    return false;
}
void done() { busy.clear(std::memory_order_release); }

void remove(int index) {
    kept -= blocks[index].bytes;
    memmove(blocks + index, blocks + index + 1, (--count - index) * sizeof(Block));
}

// Lets the oldest go until `bytes` more fit; false if they never do. The list is held on entry and on return.
bool make_room(size_t bytes) {
    while (count && (count == MOST || kept + bytes > bound.load())) {
        void *oldest = blocks[0].at;
        remove(0);
        c.free(oldest);
    }
    return kept + bytes <= bound.load();
}

thread_local bool forking;  // and has the list
void before_fork() {
    forking = patiently();
    if (forking) make_room(SIZE_MAX / 2);
}
void after_fork() {
    if (forking) done();
    forking = false;
}

// A gradient is written from end to end, so pages of 2 MiB take no more memory than those of 4 KiB, and are one fault instead of 512.
void in_huge_pages(void *at, size_t bytes) {
    const uintptr_t first = ((uintptr_t)at + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE, end = ((uintptr_t)at + bytes) / HUGE_PAGE * HUGE_PAGE;
    if (first < end) madvise((void *)first, end - first, MADV_HUGEPAGE);
}

int take(void **result, size_t alignment, size_t bytes) {
    if (bytes < least.load(std::memory_order_relaxed) || bytes > SIZE_MAX - GRAIN) return c.posix_memalign(result, alignment, bytes);
    const size_t wanted = (bytes + GRAIN - 1) / GRAIN * GRAIN;
    if (at_once()) {
        for (int i = count - 1; i >= 0; i--) {
            if (blocks[i].bytes != wanted || (uintptr_t)blocks[i].at % alignment) continue;
            *result = blocks[i].at;
            remove(i);
            done();
            taken.fetch_add(1, std::memory_order_relaxed);
            return 0;
        }
        done();
    }
    missed.fetch_add(1, std::memory_order_relaxed);
    int error = c.posix_memalign(result, alignment, wanted);
    if (!error && wanted <= bound.load(std::memory_order_relaxed)) in_huge_pages(*result, wanted);
    if (error == ENOMEM && at_once()) {  // what is kept may be what is missing
        make_room(SIZE_MAX / 2);
        done();
        error = c.posix_memalign(result, alignment, bytes);
    }
    return error;
}

void give_back(void *at) {
    const size_t bytes = at ? c.usable(at) / GRAIN * GRAIN : 0;
    if (bytes >= least.load(std::memory_order_relaxed) && bytes <= bound.load(std::memory_order_relaxed) && at_once()) {
        const bool room = make_room(bytes);
        if (room) {
            blocks[count++] = {at, bytes};
            kept += bytes;
        }
        done();
        if (room) return;
    }
    c.free(at);
}

bool set(const Slot &slot, void *value) {
    const uintptr_t page = sysconf(_SC_PAGESIZE), start = (uintptr_t)slot.at / page * page;
    if (slot.read_only && mprotect((void *)start, page, PROT_READ | PROT_WRITE)) return false;
    __atomic_store_n(slot.at, value, __ATOMIC_RELEASE);
    if (slot.read_only) mprotect((void *)start, page, PROT_READ);
    return true;
}

void restore() {
    for (int i = 0; i < found; i++)
        if (__atomic_load_n(slots[i].at, __ATOMIC_ACQUIRE) == slots[i].ours) set(slots[i], slots[i].before);  // unless a tool came after us
}

// Fills `slots` from the tables of libc10.so. ELF specification, "Dynamic Section" and "Relocation".
int look_at(dl_phdr_info *info, size_t, void *refusal) {
    const char *name = info->dlpi_name ? strrchr(info->dlpi_name, '/') : nullptr;
    if (!name || strcmp(name, "/libc10.so")) return 0;
    const ElfW(Addr) base = info->dlpi_addr;
    const ElfW(Dyn) *dynamic = nullptr;
    uintptr_t hard_from = 0, hard_to = 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) &part = info->dlpi_phdr[i];
        if (part.p_type == PT_DYNAMIC) dynamic = (const ElfW(Dyn) *)(base + part.p_vaddr);
        if (part.p_type == PT_GNU_RELRO) {  // the loader protects whole pages
            const uintptr_t page = sysconf(_SC_PAGESIZE);
            hard_from = (base + part.p_vaddr) / page * page;
            hard_to = (base + part.p_vaddr + part.p_memsz) / page * page;
        }
    }
    uintptr_t tables[2] = {0, 0}, sizes[2] = {0, 0}, symbols = 0, strings = 0;
    const auto address = [base](ElfW(Addr) value) { return value < base ? base + value : value; };
    for (; dynamic && dynamic->d_tag != DT_NULL; dynamic++) {
        const ElfW(Addr) value = dynamic->d_un.d_ptr;
        if (dynamic->d_tag == DT_JMPREL) tables[0] = address(value);
        if (dynamic->d_tag == DT_PLTRELSZ) sizes[0] = value;
        if (dynamic->d_tag == DT_RELA) tables[1] = address(value);
        if (dynamic->d_tag == DT_RELASZ) sizes[1] = value;
        if (dynamic->d_tag == DT_SYMTAB) symbols = address(value);
        if (dynamic->d_tag == DT_STRTAB) strings = address(value);
    }
    int &why = *(int *)refusal;
    why = REPLACED;
    found = 0;
    if (!symbols || !strings) return 1;
    bool both[2] = {false, false};
    for (int table = 0; table < 2; table++) {
        const ElfW(Rela) *entry = (const ElfW(Rela) *)tables[table], *end = (const ElfW(Rela) *)(tables[table] + sizes[table]);
        for (; entry && entry < end; entry++) {
            const uint32_t kind = ELF64_R_TYPE(entry->r_info);
            if (kind != IMPORTED[0] && kind != IMPORTED[1]) continue;
            const char *symbol = (const char *)strings + ((const ElfW(Sym) *)symbols)[ELF64_R_SYM(entry->r_info)].st_name;
            const bool frees = !strcmp(symbol, "free");
            if (!frees && strcmp(symbol, "posix_memalign")) continue;
            void **at = (void **)(base + entry->r_offset), *theirs = frees ? (void *)c.free : (void *)c.posix_memalign;
            // Another allocator, or a tool that watches: it sees all or nothing.
            if (kind == IMPORTED[0] && *at != theirs) return 1;
            if (*at != theirs || found == (int)(sizeof slots / sizeof slots[0])) continue;
            const bool hard = (uintptr_t)at >= hard_from && (uintptr_t)at < hard_to;
            slots[found++] = {at, theirs, frees ? (void *)give_back : (void *)take, hard};
            both[frees] = true;
        }
    }
    if (both[0] && both[1]) why = NONE;
    return 1;
}

// With the list held.
int look() {
    void *own = dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD);
    if (!own) return SYSTEM;
    *(void **)&c.posix_memalign = dlsym(own, "posix_memalign");
    *(void **)&c.free = dlsym(own, "free");
    *(void **)&c.usable = dlsym(own, "malloc_usable_size");
    if (!c.posix_memalign || !c.free || !c.usable) return SYSTEM;
    int why = NO_TORCH;
    dl_iterate_phdr(look_at, &why);
    return why;
}

}  // namespace

// What stands in the way, without doing anything.
EXPORT int torchwrap_blocks_refusal() {
    if (bound.load()) return NONE;
    if (!patiently()) return BUSY;
    const int why = bound.load() ? NONE : look();
    done();
    return why;
}

// Keeps up to `bytes` more, of blocks from `smallest` bytes on. 0, or what stands in the way.
EXPORT int torchwrap_blocks_hold(uint64_t bytes, uint64_t smallest) {
    if (!bytes) return NONE;
    if (!patiently()) return BUSY;
    static const bool prepared = !pthread_atfork(before_fork, after_fork, after_fork);
    int why = !prepared ? SYSTEM : bound.load() ? NONE : look();
    for (int i = 0; why == NONE && !bound.load() && i < found; i++)
        if (!set(slots[i], slots[i].ours)) why = PROTECTED;
    if (why == NONE) {
        least = smallest < GRAIN ? GRAIN : smallest;
        bound += bytes;
    } else {
        restore();
    }
    done();
    return why;
}

// Takes a hold back; with the last one everything kept is let go and the entries are as they were.
EXPORT void torchwrap_blocks_release(uint64_t bytes) {
    const bool held = patiently();
    size_t before = bound.load();
    while (!bound.compare_exchange_weak(before, before > bytes ? before - bytes : 0)) {}
    if (!held) return;  // it keeps nothing more, and goes on without it
    make_room(0);
    if (!bound.load()) {
        least = SIZE_MAX;
        restore();
    }
    done();
}

// Bytes kept now, requests served from what was kept and requests not, since the library was loaded.
EXPORT void torchwrap_blocks_counts(uint64_t *counts) {
    counts[0] = 0;
    if (patiently()) {
        counts[0] = kept;
        done();
    }
    counts[1] = taken.load();
    counts[2] = missed.load();
}

#else

EXPORT int torchwrap_blocks_refusal() { return SYSTEM; }
EXPORT int torchwrap_blocks_hold(uint64_t, uint64_t) { return SYSTEM; }
EXPORT void torchwrap_blocks_release(uint64_t) {}
EXPORT void torchwrap_blocks_counts(uint64_t *counts) { counts[0] = counts[1] = counts[2] = 0; }

#endif
