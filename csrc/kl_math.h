// KL divergences of one weight and their slopes, in fp32, for scalars and lanes alike (see scalar.h).
//
// ops/kl.py has the formulas. Every polynomial is minimax: Remez exchange in double precision on 4001 Chebyshev points
// against the integral of ops/kl.py, relative error where the result is a factor, coefficients rounded to fp32 and
// listed from the highest power down. Value and slope come out of one exponential, without a logarithm.
#pragma once
#include "elementary.h"

namespace {

// value = KL, slope = dKL / dlog_alpha
template <class F> struct KLTerm {
  F value, slope;
};

template <class F> LSF_INLINE F magnitude(F x) { return maximum(-x, x); }

// Within the finite numbers of fp16 or else of bf16 and fp32, which dlog_alpha / dweight = -2 / weight leaves near 0.
template <class F> LSF_INLINE F saturate(F x, bool half) {
  const F limit = constant<F>(half ? 65504.0f : 3.3895313892515355e38f);
  return minimum(limit, maximum(-limit, x));
}

// Exact log-uniform KL. With lambda = 1 / alpha, on either side of lambda = 12:
//   lambda <= 12:  KL = lambda S,                                in x = 1 - lambda / 12
//   lambda > 12:   KL = (ln 2 + gamma)/2 - log_alpha/2 + V,      in x = 1 - 24 / lambda
// The slope is the derivative of these polynomials, d S / dlog_alpha = (x - 1) S'(x), so that value and slope agree.
// S and V come of minimax fits to the slope (relative error 3e-8 and 8e-8), integrated; S has no cancellation.
template <class F, class U> LSF_INLINE KLTerm<F> kl_log_uniform_exact(F log_alpha) {
  constexpr float kSplit = -2.4849066497880004f;  // -ln 12
  constexpr float S[] = {0.005813366733491421f, -0.01503963116556406f, 0.02707044780254364f,
                         -0.015892308205366135f, 0.021547872573137283f, 0.013029651716351509f,
                         0.028208494186401367f, 0.040840618312358856f, 0.0579250268638134f,
                         0.07859434187412262f, 0.10557018965482712f, 0.15233191847801208f};
  constexpr float V[] = {1.5017041732789949e-05f, 2.229033452749718e-05f, -5.22162408742588e-05f,
                         -9.002930164569989e-05f, 9.592333663022146e-05f, 0.00018148141680285335f,
                         -0.0002165944461012259f, -0.00016704873996786773f, 0.0007180957472883165f,
                         -0.002395004266873002f, 0.02426568791270256f, -0.022377602756023407f};
  const F one = constant<F>(1.0f);
  const auto far = log_alpha < constant<F>(kSplit);  // lambda > 12
  const F t = exponential_or_zero<F, U>(far ? log_alpha : -log_alpha);
  const F w = t * (far ? constant<F>(-24.0f) : constant<F>(-1.0f / 12.0f));
  const F x = w + one;
  F p = far ? constant<F>(V[0]) : constant<F>(S[0]), derivative = p;
  LSF_UNROLL
  for (int k = 1; k < 12; ++k) {
    if (k > 1) derivative = fused_mul_add(derivative, x, p);
    p = fused_mul_add(p, x, far ? constant<F>(V[k]) : constant<F>(S[k]));
  }
  const F line = fused_mul_add(log_alpha, constant<F>(-0.5f), constant<F>(0.635181422730739f));
  const F slope = fused_mul_add(w, derivative, far ? constant<F>(-0.5f) : p);
  return {fused_mul_add(p, far ? one : t, far ? line : constant<F>(0.0f)), slope * (far ? one : -t)};
}

// softplus(-log_alpha) / 2, without its slope, from t = exp(-|log_alpha|)
template <class F> LSF_INLINE F half_softplus(F log_alpha, F t) {
  // ln(1 + t) / t on [0, 1] in 2 t - 1, relative error 5e-9
  constexpr float L[] = {-6.33598756394349e-06f, 2.0520894395303912e-05f, -5.273368151392788e-05f,
                         0.00018087736680172384f, -0.0006428217166103423f, 0.002289717085659504f,
                         -0.00846096221357584f, 0.033152252435684204f, -0.14426355063915253f, 0.8109301924705505f};
  const F x = fused_mul_add(t, constant<F>(2.0f), constant<F>(-1.0f));
  F p = constant<F>(L[0]);
  LSF_UNROLL
  for (int k = 1; k < 10; ++k) p = fused_mul_add(p, x, constant<F>(L[k]));
  return constant<F>(0.5f) * fused_mul_add(t, p, maximum(constant<F>(0.0f), -log_alpha));
}
// t = exp(-|x|) or, where x < 0, 1: times 1 / (1 + t) this is sigmoid(-x)
template <class F> LSF_INLINE F sigmoid_numerator(F x, F t) {
  return x < constant<F>(0.0f) ? constant<F>(1.0f) : t;
}

template <class F, class U> LSF_INLINE KLTerm<F> kl_ard(F log_alpha) {
  const F t = exponential_or_zero<F, U>(-magnitude(log_alpha));
  const F half_sigmoid = sigmoid_numerator(log_alpha, t) * constant<F>(0.5f) / (t + constant<F>(1.0f));
  return {half_softplus(log_alpha, t), -half_sigmoid};
}

// The three-constant approximation of the log-uniform KL: ARD's and k1 sigmoid(-u), u = k2 + k3 log_alpha.
template <class F, class U> LSF_INLINE KLTerm<F> kl_log_uniform_approximate(F log_alpha) {
  constexpr double k1 = 0.63576, k2 = 1.8732, k3 = 1.48695;
  const F one = constant<F>(1.0f), u = fused_mul_add(log_alpha, constant<F>(k3), constant<F>(k2));
  const F t = exponential_or_zero<F, U>(-magnitude(log_alpha)), s = exponential_or_zero<F, U>(-magnitude(u));
  // One division for the two sigmoids.
  const F t1 = t + one, s1 = s + one, inverse = one / (t1 * s1), inverse_s1 = inverse * t1;
  const F half_sigmoid = sigmoid_numerator(log_alpha, t) * constant<F>(0.5f) * (inverse * s1);
  const F sigmoid_u = sigmoid_numerator(u, s) * inverse_s1;
  return {fused_mul_add(sigmoid_u, constant<F>(k1), half_softplus(log_alpha, t)),
          fused_mul_add(s * (inverse_s1 * inverse_s1), constant<F>(-k1 * k3), -half_sigmoid)};
}

// log_alpha of a weight with a variance of its own: log_sigma2 - 2 ln |weight|; infinite where the weight is 0, NaN
// where it is not finite.
template <class F> LSF_INLINE F log_alpha_of(F weight, F log_sigma2) {
  const F log_alpha = fused_mul_add(constant<F>(-2.0f), logarithm(magnitude(weight)), log_sigma2) + (weight - weight);
  return weight == constant<F>(0.0f) ? constant<F>(INFINITY) : log_alpha;
}

// dKL / dweight from the slope: dlog_alpha / dweight = -2 / weight. Near 0 the KL is even in the weight: 0.
template <class F> LSF_INLINE F weight_slope(F weight, F slope) {
  return weight == constant<F>(0.0f) ? constant<F>(0.0f) : constant<F>(-2.0f) * slope / weight;
}

// KL(N(weight, exp(log_sigma2)) || N(0, p^2)), inverse_std = 1 / p, log_variance = 2 ln p; slope to log_sigma2.
// With x = log_sigma2 - log_variance:  KL = (exp(x) - 1 - x + (weight / p)^2) / 2,  slope = (exp(x) - 1) / 2.
template <class F, class U>
LSF_INLINE KLTerm<F> kl_normal(F weight, F log_sigma2, F inverse_std, F log_variance) {
  const F half = constant<F>(0.5f), largest = constant<F>(89.0f), x = log_sigma2 - log_variance;
  const ExpParts<F> e = exp_parts(minimum(largest, maximum(constant<F>(-87.0f), x)));
  // Halves of exp(x) - 1 = h r^2 p + (h r + (h - 1/2)), h = 2^(n-1). Near x = 0, h = 1/2 and r = x, so that what is
  // left after subtracting x / 2 has no rounding error.
  const F h = float_of((bits_of(e.shifted) << 23) + 0x3F000000u);  // n >= -126: at -127 the sum would turn negative
  const F tail = h * (e.r * e.r) * e.p;
  const F line = x > largest ? constant<F>(INFINITY) : fused_mul_add(h, e.r, h - half);
  const F spread = fused_mul_add(half, -x, line) + tail;
  const F scaled = weight * inverse_std;
  return {fused_mul_add(half * scaled, scaled, spread), line + tail};
}
template <class F> LSF_INLINE F kl_normal_weight_slope(F weight, F inverse_std) {
  return weight * inverse_std * inverse_std;
}

}  // namespace
