// What the kernels use of a GPU, behind a few functions: PTX for compute capability 7.5 and later when nvcc or
// NVRTC compiles them, the emulation of host_shim.h when a C++ compiler does. No header of CUDA is needed.
//
// An op is one file of kernels:
//     KERNEL(128, 3) scale(float* out, const Half* x, int length, float factor) { ... }
//     LAUNCHER(scale)
// 128 threads a block, registers so that 3 blocks fit a multiprocessor. Arguments are pointers, int (Python's int)
// and float (Python's float); shared memory is static: SHARED(Half, tile, 1024). Sizes that the compiler has to know
// come as -DNAME=value.
//
// Fragments (PTX ISA, "Matrix Fragments for mma.m16n8k8"): lane l, g = l / 4, q = l % 4.
//     A 16x8 (MxK): a0 holds row g, a1 row g + 8; columns 2q, 2q + 1
//     B  8x8 (KxN): rows 2q, 2q + 1; column g
//     C 16x8 (MxN): c[0], c[1] row g, c[2], c[3] row g + 8; columns 2q, 2q + 1
// so C, packed to halves, is A. ldmatrix: lane 8i + r gives the address of the 16-byte row r of matrix i, and receives
// of each matrix row g, columns 2q, 2q + 1 (trans: rows 2q, 2q + 1, column g).
#pragma once

using Half = unsigned short;  // the bits of an IEEE half

#ifdef __CUDACC__

#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define LAUNCHER(kernel)
#define DEVICE static __device__ __forceinline__
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]

DEVICE void sync_threads() { __syncthreads(); }

template <class T>
DEVICE T shfl_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

// c += a b
DEVICE void mma_m16n8k8(float (&c)[4], unsigned a0, unsigned a1, unsigned b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

DEVICE void ldmatrix_x4(unsigned (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}

DEVICE void ldmatrix_x4_trans(unsigned (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}

// 2^x, log2 x, 1 / x: about 22 bits; what would be subnormal is 0.
DEVICE float ex2(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

DEVICE float lg2(float x) {
  asm("lg2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

DEVICE float rcp(float x) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

DEVICE float to_float(Half x) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x));
  return out;
}

// To the nearest half. On 7.5 a conversion takes the unit that also computes ex2: see pack_positive.
DEVICE Half to_half(float x) {
  Half out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(x));
  return out;
}

DEVICE unsigned float_bits(float x) { return __float_as_uint(x); }
DEVICE float float_from_bits(unsigned x) { return __uint_as_float(x); }
DEVICE unsigned upper_halves(unsigned low, unsigned high) { return __byte_perm(low, high, 0x7632); }

DEVICE unsigned with_sign_of(unsigned x, unsigned sign) {
  unsigned out;
  asm("lop3.b32 %0, %1, %2, 0x80000000, 0xd8;" : "=r"(out) : "r"(x), "r"(sign));  // c ? b : a, bit by bit
  return out;
}

#else
#include "host_shim.h"
#endif

DEVICE unsigned pack(Half low, Half high) { return low | static_cast<unsigned>(high) << 16; }
DEVICE unsigned pack(float low, float high) { return pack(to_half(low), to_half(high)); }
DEVICE float low_half(unsigned pair) { return to_float(static_cast<Half>(pair)); }
DEVICE float high_half(unsigned pair) { return to_float(static_cast<Half>(pair >> 16)); }

// 2^112 low and 2^112 high as two halves, without a conversion: scaled so, the exponent of a float has the bias of
// a half's, and the half is the float's bits 27..13. Rounds to nearest, ties away from zero. For 0 <= x < 2^-96:
// all else, infinity and NaN too, comes out as some other number.
DEVICE unsigned pack_positive(float low, float high) {
  return upper_halves(float_bits(low) * 8 + 0x8000, float_bits(high) * 8 + 0x8000);
}

// The same for -2^-96 < x < 2^-96.
DEVICE unsigned pack_signed(float low, float high) {
  const unsigned a = float_bits(low), b = float_bits(high);
  return upper_halves(with_sign_of(a * 8 + 0x8000, a), with_sign_of(b * 8 + 0x8000, b));
}
