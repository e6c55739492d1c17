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
  static LSF_INLINE PhiloxKey of(int64_t seed) {
    return {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)};
  }
};

// The four counter words going in, the four random words coming out. Where U is a vector, a counter word that
// all lanes share may stay a scalar: the products it takes part in are then scalar too.
template <class U0, class U1 = U0, class U2 = U0, class U3 = U0> struct PhiloxWords {
  U0 w0;
  U1 w1;
  U2 w2;
  U3 w3;
};

template <int Round = 0, class Key, class U0, class U1, class U2, class U3>
LSF_INLINE auto philox4x32_10(PhiloxWords<U0, U1, U2, U3> c, const Key& key) {
  U0 hi0, lo0;
  U2 hi1, lo1;
  mul_hi_lo(c.w0, 0xD2511F53u, hi0, lo0);
  mul_hi_lo(c.w2, 0xCD9E8D57u, hi1, lo1);
  auto w0 = hi1 ^ (c.w1 ^ key.round(Round).lo);
  auto w2 = hi0 ^ (c.w3 ^ key.round(Round).hi);
  const PhiloxWords<decltype(w0), U2, decltype(w2), U0> next = {w0, lo1, w2, lo0};
  if constexpr (Round == 9) return next;
  else return philox4x32_10<Round + 1>(next, key);
}

// ---- normals ----------------------------------------------------------------------------------
// Minimax polynomials (Remez, coefficients rounded to fp32):
//   -2 ln(1 + f) = f L(f)   on [-1/4, 1/2], such that r is within 6e-8
//   sin(pi x / 2) = x S(x^2),  cos(pi x / 2) = C(x^2)   on [-1/2, 1/2], error < 6e-9
template <class F, class... C> LSF_INLINE F polynomial(F x, float leading, C... others) {  // by Horner's rule
  F p = constant<F>(leading);
  ((p = fused_mul_add(p, x, constant<F>(others))), ...);
  return p;
}

template <class F> LSF_INLINE F minus_two_log(F u) {
  F mantissa, exponent;
  split_exponent(u, mantissa, exponent);
  const F f = mantissa - constant<F>(1.0f);  // exact (Sterbenz)
  const F p = polynomial(f, 0.13199958205223083f, -0.28356441855430603f, 0.34856998920440674f, -0.4021680951118469f,
                         0.4994148910045624f, -0.6665959358215332f, 1.0000079870224f, -2.0f);
  return fused_mul_add(exponent, constant<F>(-1.3862943649291992f), p * f);
}

// Words (a, b) to the normals of an even and the following odd column.
template <class F, class U> LSF_INLINE void box_muller(U a, U b, F& even, F& odd) {
  // u in (0, 1]
  const F u = fused_mul_add(to_float(a), constant<F>(0x1p-32f), constant<F>(0x1p-33f));
  const F r = sqrt_rn(minus_two_log(u));

  // theta = 2 pi b / 2^32 = pi/2 (quadrant + x): the top two bits of t are the quadrant; the low 30
  // bits of b, as a signed fraction, are x in [-1/2, 1/2). Exact in integers.
  const U t = b + 0x20000000u;
  const F x = signed_to_float(b << 2) * constant<F>(0x1p-32f);
  const F x2 = x * x;
  odd = x * polynomial(x2, -0.004602177068591118f, 0.07968022674322128f, -0.6459634900093079f, 1.5707963705062866f);
  even = polynomial(x2, 0.0009067435166798532f, -0.02086152881383896f, 0.253669410943985f, -1.2337005138397217f, 1.0f);

  // Two bits of t turn (cos, sin) of x into those of theta: bit 30 by a quarter, bit 31 by a half.
  quarter_turn(t, even, odd);
  const F turned_r = xor_sign(r, t);
  even = even * turned_r;
  odd = odd * turned_r;
}

// The four normals of a quad of columns, on scalars.
LSF_INLINE void normal_quad(const PhiloxKey& key, uint32_t quad, uint64_t row, uint32_t sample, float (&normal)[4]) {
  const PhiloxWords<uint32_t> counter = {quad, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), sample};
  const PhiloxWords<uint32_t> w = philox4x32_10(counter, key);
  box_muller(w.w0, w.w1, normal[0], normal[1]);
  box_muller(w.w2, w.w3, normal[2], normal[3]);
}

}  // namespace
