// The shim of torchwrap/attention/cuda/kernels on a host: every thread of a block is a fiber, a warp meets at each exchange.
//
// What moves between lanes, what is rounded to fp16 and where each number lies is exact. Not modelled: the order and the truncation of the
// sums inside a tensor core (here: float32, k ascending), and the last bit of the card's exp2. Fragment maps are written from the tables of
// the PTX manual, not from the kernels. Lanes that meet at different instructions, and barriers that not everybody reaches, are errors.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

using std::max;
using std::min;

#define DEVICE inline
#define KERNEL(threads) extern "C" void
#define SHARED static
#define UNROLL

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace emulation {

enum class Kind { none, shuffle, mma, ldmatrix };

struct Warp {
    int arrived = 0;
    unsigned generation = 0;
    Kind kind = Kind::none;
    unsigned in[32][4], out[32][4];
    float* sums[32];
    const uint4* rows[32];
};

struct Fiber {
    ucontext_t entry;
    jmp_buf where;
    bool begun = false;
};

inline int current, threads, waiting, finished;
inline int step = 1;  // threads run in ascending order, or in descending: what lacks a barrier shows in one of them
inline unsigned block[3], barrier_generation;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::vector<char> done;
inline ucontext_t launcher;
inline long idle;  // switches since anybody got further
inline const char* error;
inline long shuffles, products;

[[noreturn]] inline void fail(const char* reason) {
    error = reason;
    setcontext(&launcher);
    std::abort();
}

// A switch of contexts saves the mask of signals, which is a call of the system: a thread is entered by one, and is left and found again by jumps.
[[noreturn]] inline void resume(Fiber& fiber) {
    if (fiber.begun) _longjmp(fiber.where, 1);
    fiber.begun = true;
    setcontext(&fiber.entry);
    std::abort();
}

// Whoever waits for its warp lets only that warp run, so that a warp gets as far as it can before another begins: a missing barrier shows.
inline void next_fiber(bool of_this_warp) {
    if (++idle > 4L * threads) fail("threads wait for each other: a barrier or an exchange is not reached by all");
    const int from = current, first = of_this_warp ? current / 32 * 32 : 0, count = of_this_warp ? min(32, threads - first) : threads;
    do current = first + (current - first + (step == 1 ? 1 : count - 1)) % count;
    while (done[current]);
    if (current != from && _setjmp(fibers[from].where) == 0) resume(fibers[current]);
}

template <class Compute>
void meet(Kind kind, Compute compute) {
    Warp& warp = warps[current / 32];
    if (warp.arrived == 0) warp.kind = kind;
    if (warp.kind != kind) fail("lanes of one warp meet at different instructions");
    const unsigned generation = warp.generation;
    if (++warp.arrived < 32) {
        while (warp.generation == generation) next_fiber(true);
        return;
    }
    compute(warp);
    warp.arrived = 0;
    ++warp.generation;
    idle = 0;
}

inline float half(unsigned packed, int which) {
    const unsigned short bits = which ? packed >> 16 : packed & 0xffff;
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return static_cast<float>(value);
}

inline unsigned short bits(float value) {
    const _Float16 rounded = static_cast<_Float16>(value);
    unsigned short result;
    std::memcpy(&result, &rounded, 2);
    return result;
}

}  // namespace emulation

inline int thread_id() { return emulation::current; }
inline int lane_id() { return emulation::current & 31; }
inline int block_x() { return emulation::block[0]; }
inline int block_y() { return emulation::block[1]; }
inline int block_z() { return emulation::block[2]; }
inline float infinity() { return INFINITY; }
inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline unsigned pack(float low, float high) { return emulation::bits(low) | static_cast<unsigned>(emulation::bits(high)) << 16; }

inline void barrier() {
    using namespace emulation;
    const unsigned generation = barrier_generation;
    if (++waiting < threads) {
        while (barrier_generation == generation) next_fiber(false);
        return;
    }
    waiting = 0;
    ++barrier_generation;
    idle = 0;
}

inline unsigned shfl_xor(unsigned value, int mask) {
    using namespace emulation;
    const int lane = lane_id();
    Warp& warp = warps[current / 32];
    warp.in[lane][0] = value;
    warp.in[lane][1] = lane ^ mask;
    meet(Kind::shuffle, [](Warp& w) {
        for (int l = 0; l < 32; ++l) w.out[l][0] = w.in[w.in[l][1]][0];
        ++shuffles;
    });
    return warp.out[lane][0];
}

inline float shfl_xor(float value, int mask) {
    unsigned word;
    std::memcpy(&word, &value, 4);
    word = shfl_xor(word, mask);
    std::memcpy(&value, &word, 4);
    return value;
}

namespace emulation {

// Element i of an operand held in 32-bit words of two halves.
inline float element(const unsigned* words, int i) { return half(words[i / 2], i % 2); }

inline void m8n8k4(bool by_rows, float* d, unsigned a0, unsigned a1, unsigned b0, unsigned b1) {
    const int lane = lane_id();
    Warp& warp = warps[current / 32];
    const unsigned words[4] = {a0, a1, b0, b1};
    std::copy(words, words + 4, warp.in[lane]);
    warp.sums[lane] = d;
    meet(Kind::mma, [by_rows](Warp& w) {
        for (int pair = 0; pair < 4; ++pair) {
            float a[8][4], b[4][8];
            for (int l = 0; l < 32; ++l) {
                if (l % 16 / 4 != pair) continue;
                for (int i = 0; i < 4; ++i) {
                    a[l % 4 + (l < 16 ? 0 : 4)][i] = element(w.in[l], i);
                    const int k = by_rows ? l % 4 : i, n = by_rows ? i + (l < 16 ? 0 : 4) : l % 4 + (l < 16 ? 0 : 4);
                    b[k][n] = element(w.in[l] + 2, i);
                }
            }
            for (int l = 0; l < 32; ++l) {
                if (l % 16 / 4 != pair) continue;
                for (int i = 0; i < 8; ++i) {
                    const int row = (l & 1) + (i & 2) + (l < 16 ? 0 : 4), column = (i & 4) + (l & 2) + (i & 1);
                    for (int k = 0; k < 4; ++k) w.sums[l][i] += a[row][k] * b[k][column];
                }
            }
        }
        ++products;
    });
}

inline void load_matrices(unsigned (&r)[4], const uint4* row, bool transposed) {
    const int lane = lane_id();
    Warp& warp = warps[current / 32];
    warp.rows[lane] = row;
    meet(Kind::ldmatrix, [transposed](Warp& w) {
        for (int m = 0; m < 4; ++m) {
            unsigned short matrix[8][8];
            for (int i = 0; i < 8; ++i) std::memcpy(matrix[i], w.rows[8 * m + i], 16);
            for (int l = 0; l < 32; ++l) {
                const int fixed = l / 4, pair = 2 * (l % 4);
                const unsigned low = transposed ? matrix[pair][fixed] : matrix[fixed][pair];
                const unsigned high = transposed ? matrix[pair + 1][fixed] : matrix[fixed][pair + 1];
                w.out[l][m] = low | high << 16;
            }
        }
    });
    std::copy(warp.out[lane], warp.out[lane] + 4, r);
}

}  // namespace emulation

inline void mma_m8n8k4_col(float (&d)[8], unsigned a0, unsigned a1, unsigned b0, unsigned b1) { emulation::m8n8k4(false, d, a0, a1, b0, b1); }
inline void mma_m8n8k4_row(float (&d)[8], unsigned a0, unsigned a1, unsigned b0, unsigned b1) { emulation::m8n8k4(true, d, a0, a1, b0, b1); }
inline void ldmatrix_x4(unsigned (&r)[4], const uint4* row) { emulation::load_matrices(r, row, false); }
inline void ldmatrix_x4_trans(unsigned (&r)[4], const uint4* row) { emulation::load_matrices(r, row, true); }

inline void mma_m16n8k8(float (&d)[4], unsigned a0, unsigned a1, unsigned b0) {
    using namespace emulation;
    const int lane = lane_id();
    Warp& warp = warps[current / 32];
    const unsigned words[4] = {a0, a1, b0, 0};
    std::copy(words, words + 4, warp.in[lane]);
    warp.sums[lane] = d;
    meet(Kind::mma, [](Warp& w) {
        float a[16][8], b[8][8];
        for (int l = 0; l < 32; ++l) {
            for (int i = 0; i < 4; ++i) a[l / 4 + (i < 2 ? 0 : 8)][l % 4 * 2 + i % 2] = element(w.in[l], i);
            for (int i = 0; i < 2; ++i) b[l % 4 * 2 + i][l / 4] = element(w.in[l] + 2, i);
        }
        for (int l = 0; l < 32; ++l) {
            for (int i = 0; i < 4; ++i) {
                const int row = l / 4 + (i < 2 ? 0 : 8), column = l % 4 * 2 + i % 2;
                for (int k = 0; k < 8; ++k) w.sums[l][i] += a[row][k] * b[k][column];
            }
        }
        ++products;
    });
}
