// The primitives that the torch-free headers are written in, on scalars: CUDA and plain C++.
//
// philox.h, elementary.h, kl_math.h and averaging_math.h are templates over F (float) and U (uint32_t). cpu/simd.h
// overloads every function here for vectors of lanes and is included before them, so one text serves all backends.
#pragma once
#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define LSF_INLINE __host__ __device__ __forceinline__
#define LSF_UNROLL _Pragma("unroll")  // the loop after it, wholly
#else
#define LSF_INLINE inline __attribute__((always_inline))
#define LSF_UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

LSF_INLINE void mul_hi_lo(uint32_t a, uint32_t b, uint32_t& hi, uint32_t& lo) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  hi = static_cast<uint32_t>(product >> 32);
  lo = static_cast<uint32_t>(product);
}
LSF_INLINE float to_float(uint32_t x) { return static_cast<float>(x); }          // nearest even
LSF_INLINE float signed_to_float(uint32_t x) { return static_cast<float>(static_cast<int32_t>(x)); }
LSF_INLINE uint32_t shift_right_signed(uint32_t x, int bits) {
  return static_cast<uint32_t>(static_cast<int32_t>(x) >> bits);
}
LSF_INLINE uint32_t bits_of(float x) {
  union { float f; uint32_t u; } both = {x};
  return both.u;
}
LSF_INLINE float float_of(uint32_t x) {
  union { uint32_t u; float f; } both = {x};
  return both.f;
}
LSF_INLINE float fused_mul_add(float a, float b, float c) { return fmaf(a, b, c); }
#ifdef __CUDA_ARCH__
LSF_INLINE float sqrt_rn(float x) { return __fsqrt_rn(x); }
#else
LSF_INLINE float sqrt_rn(float x) { return sqrtf(x); }
#endif
LSF_INLINE double fused_mul_add(double a, double b, double c) { return a * b + c; }  // rounded twice, as in plain torch
LSF_INLINE double sqrt_rn(double x) { return sqrt(x); }
// The second argument where either is NaN, as on x86.
LSF_INLINE float minimum(float a, float b) { return a < b ? a : b; }
LSF_INLINE float maximum(float a, float b) { return a > b ? a : b; }
// Turns the vector (x, y) by 90 degrees where bit 30 of `turn` is set.
LSF_INLINE void quarter_turn(uint32_t turn, float& x, float& y) {
  const float before = x;
  if (turn >> 30 & 1u) x = -y, y = before;
}
// x, negated where the sign bit of `sign` is set
LSF_INLINE float xor_sign(float x, uint32_t sign) { return float_of(bits_of(x) ^ (sign & 0x80000000u)); }
// u = mantissa 2^exponent with the mantissa in [3/4, 3/2), for normal u > 0
LSF_INLINE void split_exponent(float u, float& mantissa, float& exponent) {
  const uint32_t offset = bits_of(u) - 0x3F400000u;  // bits of 3/4
  mantissa = float_of(bits_of(u) - (offset & 0xFF800000u));
  exponent = signed_to_float(shift_right_signed(offset, 23));
}

// What constants among F are given in: float for lanes too, double for double.
template <class F> struct ConstantOf { typedef float type; };
template <> struct ConstantOf<double> { typedef double type; };
template <class F> using Constant = typename ConstantOf<F>::type;
template <class F> LSF_INLINE F constant(Constant<F> x) { return x - F{}; }  // not x + 0: keeps -0

}  // namespace
