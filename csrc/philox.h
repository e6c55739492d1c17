// Philox4x32-10 words and the normals made of them: the one C++ copy of the noise contract.
//
//   words    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011
//   normals  Box and Muller, 1958:  r = sqrt(-2 ln u),  even = r cos(theta),  odd = r sin(theta)
//
// Only fma, mul, sqrt.rn and integer steps occur, and no product is added without an explicit fma,
// so every backend that rounds correctly returns the same bits.
#pragma once
#include "scalar.h"

namespace {

// ---- words ------------------------------------------------------------------------------------
// Round r uses the key plus r Weyl steps. Loops over many counters tabulate the ten keys (cpu/noise_kernels.h).
struct PhiloxKey {
  uint32_t lo, hi;
  LSF_INLINE PhiloxKey round(int r) const { return {lo + r * 0x9E3779B9u, hi + r * 0xBB67AE85u}; }
};

// The four counter words going in, the four random words coming out.
template <class U> struct PhiloxWords {
  U w0, w1, w2, w3;
};

template <class U, class Key> LSF_INLINE PhiloxWords<U> philox4x32_10(PhiloxWords<U> c, const Key& key) {
#pragma GCC unroll 10
  for (int r = 0; r < 10; ++r) {
    U hi0, lo0, hi1, lo1;
    mul_hi_lo(c.w0, 0xD2511F53u, hi0, lo0);
    mul_hi_lo(c.w2, 0xCD9E8D57u, hi1, lo1);
    c = {hi1 ^ c.w1 ^ key.round(r).lo, lo1, hi0 ^ c.w3 ^ key.round(r).hi, lo0};
  }
  return c;
}

// ---- normals ----------------------------------------------------------------------------------
// Minimax polynomials (Remez, coefficients rounded to fp32):
//   -2 ln(1 + f) = -2 f + f^2 + f^3 P(f)   on [sqrt(1/2) - 1, sqrt(2) - 1], absolute error < 7e-8
//   sin(pi x / 2) = x S(x^2),  cos(pi x / 2) = 1 + x^2 C(x^2)   on [-1/2, 1/2], error < 5e-9
template <class F, class U> LSF_INLINE F minus_two_log(F u) {
  const U offset = bits_of(u) - 0x3F3504F3u;  // bits of sqrt(1/2)
  const U exponent = shift_right_signed(offset, 23);
  const F f = float_of(bits_of(u) - (exponent << 23)) - constant<F>(1.0f);  // exact (Sterbenz)
  F p = constant<F>(-0.1785474717617035f);
  p = fused_mul_add(p, f, constant<F>(0.28689518570899963f));
  p = fused_mul_add(p, f, constant<F>(-0.29742157459259033f));
  p = fused_mul_add(p, f, constant<F>(0.3313245475292206f));
  p = fused_mul_add(p, f, constant<F>(-0.39932143688201904f));
  p = fused_mul_add(p, f, constant<F>(0.5000346302986145f));
  p = fused_mul_add(p, f, constant<F>(-0.6666767597198486f));
  const F f2 = f * f;
  const F log_mantissa = fused_mul_add(f2 * f, p, fused_mul_add(f, constant<F>(-2.0f), f2));
  return fused_mul_add(signed_to_float(exponent), constant<F>(-1.3862943649291992f), log_mantissa);
}

// Words (a, b) to the normals of an even and the following odd column.
template <class F, class U> LSF_INLINE void box_muller(U a, U b, F& even, F& odd) {
  // u in (0, 1]
  const F u = fused_mul_add(to_float(a), constant<F>(0x1p-32f), constant<F>(0x1p-33f));
  const F r = sqrt_rn(minus_two_log<F, U>(u));

  // theta = 2 pi b / 2^32 = pi/2 (quadrant + x): the top two bits of t are the quadrant; the low 30
  // bits of b, as a signed fraction, are x in [-1/2, 1/2). Exact in integers.
  const U t = b + 0x20000000u;
  const F x = signed_to_float(b << 2) * constant<F>(0x1p-32f);
  const F x2 = x * x;
  F s = constant<F>(-0.004602177068591118f);
  s = fused_mul_add(s, x2, constant<F>(0.07968022674322128f));
  s = fused_mul_add(s, x2, constant<F>(-0.6459634900093079f));
  s = fused_mul_add(s, x2, constant<F>(1.5707963705062866f));
  s = s * x;
  F c = constant<F>(0.0009067435166798532f);
  c = fused_mul_add(c, x2, constant<F>(-0.02086152881383896f));
  c = fused_mul_add(c, x2, constant<F>(0.253669410943985f));
  c = fused_mul_add(c, x2, constant<F>(-1.2337005138397217f));
  c = fused_mul_add(c, x2, constant<F>(1.0f));

  // (cos, sin) of theta are (c, s), (-s, c), (-c, -s), (s, -c) in quadrants 0 to 3.
  const U odd_quadrant = t << 1;  // in the sign bit
  even = r * xor_sign(select_by_sign(odd_quadrant, s, c), t ^ odd_quadrant);
  odd = r * xor_sign(select_by_sign(odd_quadrant, c, s), t);
}

}  // namespace
