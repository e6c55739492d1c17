// Elementary functions in fp32 from mul, fma and integer steps, for scalars and lanes alike (see scalar.h).
#pragma once
#include "scalar.h"

namespace {

// ln(x) for x > 0, within 1.5 units in the last place or 5e-8: x = 2^n (1 + f), f in [-1/4, 1/2),
// ln(1 + f) = f - f^2 / 2 + f^3 P(f) with P minimax (Remez).
template <class F> LSF_INLINE F logarithm(F x) {
  const auto subnormal = x < constant<F>(0x1p-126f);
  F mantissa, exponent;
  split_exponent(subnormal ? x * constant<F>(0x1p24f) : x, mantissa, exponent);
  exponent = subnormal ? exponent - constant<F>(24.0f) : exponent;
  const F f = mantissa - constant<F>(1.0f);  // exact (Sterbenz)
  F p = constant<F>(0.05357204005122185f);
  p = fused_mul_add(p, f, constant<F>(-0.11968647688627243f));
  p = fused_mul_add(p, f, constant<F>(0.14920814335346222f));
  p = fused_mul_add(p, f, constant<F>(-0.1681283861398697f));
  p = fused_mul_add(p, f, constant<F>(0.1998281627893448f));
  p = fused_mul_add(p, f, constant<F>(-0.24995385110378265f));
  p = fused_mul_add(p, f, constant<F>(0.3333345055580139f));
  const F f2 = f * f;
  return fused_mul_add(exponent, constant<F>(0.693147180559945f),
                       fused_mul_add(f2 * f, p, fused_mul_add(f2, constant<F>(-0.5f), f)));
}

// exp(x) = 2^n (1 + r + r^2 p) with |r| < 0.35; shifted = n + 1.5 2^23 as a float, whose low bits are n.
template <class F> struct ExpParts {
  F r, p, shifted;
};
template <class F> LSF_INLINE ExpParts<F> exp_parts(F x) {
  const F shift = constant<F>(12582912.0f);  // 1.5 2^23: adding it rounds to an integer
  const F shifted = fused_mul_add(x, constant<F>(1.44269504088896341f), shift);
  const F n = shifted - shift;
  F r = fused_mul_add(n, constant<F>(-0.693145751953125f), x);  // ln 2 in two parts, the first exact times n
  r = fused_mul_add(n, constant<F>(-1.42860682030941723e-6f), r);
  F p = constant<F>(1.9875691500e-4f);
  p = fused_mul_add(p, r, constant<F>(1.3981999507e-3f));
  p = fused_mul_add(p, r, constant<F>(8.3334519073e-3f));
  p = fused_mul_add(p, r, constant<F>(4.1665795894e-2f));
  p = fused_mul_add(p, r, constant<F>(1.6666665459e-1f));
  p = fused_mul_add(p, r, constant<F>(5.0000001201e-1f));
  return {r, p, shifted};
}
template <class F> LSF_INLINE F exp_mantissa(ExpParts<F> e) {
  return fused_mul_add(e.p, e.r * e.r, e.r) + constant<F>(1.0f);
}

// exp(x) within 1 ulp for every x, subnormal results, 0, inf and NaN included.
template <class F, class U> LSF_INLINE F exponential(F x) {
  // NaN passes minimum and maximum as second argument.
  const ExpParts<F> e = exp_parts(minimum(constant<F>(89.0f), maximum(constant<F>(-104.0f), x)));
  // 2^n in two factors, so that neither leaves the range of exponents.
  const U whole = bits_of(e.shifted) - bits_of(constant<F>(12582912.0f));
  const U half = shift_right_signed(whole, 1);
  return exp_mantissa(e) * float_of((half << 23) + 0x3F800000u) * float_of(((whole - half) << 23) + 0x3F800000u);
}

// exp(x) for x < 88, 0 where it is below 2^-126.5: without the steps, and the CPU's traps, of subnormal numbers.
template <class F, class U> LSF_INLINE F exponential_or_zero(F x) {
  const ExpParts<F> e = exp_parts(maximum(constant<F>(-88.0f), x));  // at -88, n = -127: the factor is 0
  return exp_mantissa(e) * float_of((bits_of(e.shifted) << 23) + 0x3F800000u);  // only n stays in 32 bits
}

}  // namespace
