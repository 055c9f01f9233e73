// What the kernels need of the machine, and nothing else: who am I, exchange with my warp, multiply, wait.
//
// Everything above this file is plain C++, so the same kernels run on a card (NVRTC) and in a host emulation (g++, tests/attention), where
// `emulation.h` gives these names with a warp as arrays of 32. Inline PTX instead of CUDA's headers: NVRTC alone then compiles the kernels.
// Source: PTX ISA 8.8, sections "Matrix multiply-accumulate using mma" and "ldmatrix".
#pragma once

#ifndef __CUDACC__
#include "emulation.h"
#else

#define DEVICE __device__ __forceinline__
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define SHARED __shared__
#define UNROLL _Pragma("unroll")

DEVICE int thread_id() { return threadIdx.x; }
DEVICE int lane_id() { return threadIdx.x & 31; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int block_z() { return blockIdx.z; }
DEVICE void barrier() { __syncthreads(); }
DEVICE unsigned shfl_xor(unsigned value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE float shfl_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE float infinity() { return __int_as_float(0x7f800000); }

// Two floats rounded to fp16, the first in the low half.
DEVICE unsigned pack(float low, float high) {
    unsigned packed;
    asm("{.reg .f16 a, b; cvt.rn.f16.f32 a, %1; cvt.rn.f16.f32 b, %2; mov.b32 %0, {a, b};}" : "=r"(packed) : "f"(low), "f"(high));
    return packed;
}

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#if defined(VOLTA)
#define MMA_884(layout)                                                                                                               \
    asm volatile("mma.sync.aligned.m8n8k4.row." layout ".f32.f16.f16.f32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, {%10,%11}, "             \
                 "{%0,%1,%2,%3,%4,%5,%6,%7};"                                                                                         \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])                     \
                 : "r"(a0), "r"(a1), "r"(b0), "r"(b1))

// Four independent products 8x8x4, one per quad-pair; B given by columns, four consecutive k of one n.
DEVICE void mma_m8n8k4_col(float (&d)[8], unsigned a0, unsigned a1, unsigned b0, unsigned b1) { MMA_884("col"); }

// The same with B given by rows, four consecutive n of one k.
DEVICE void mma_m8n8k4_row(float (&d)[8], unsigned a0, unsigned a1, unsigned b0, unsigned b1) { MMA_884("row"); }
#else
DEVICE void mma_m16n8k8(float (&d)[4], unsigned a0, unsigned a1, unsigned b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(b));
}

// Four 8x8 matrices of halves; lane l gives the address of row l%8 of matrix l/8 and gets two neighbours of one row (of one column: trans).
DEVICE void ldmatrix_x4(unsigned (&r)[4], const uint4* row) {
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

DEVICE void ldmatrix_x4_trans(unsigned (&r)[4], const uint4* row) {
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
#endif

#endif  // __CUDACC__
