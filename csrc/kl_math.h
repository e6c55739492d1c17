// KL divergences of one weight and their slopes, in fp32, for scalars and lanes alike (see scalar.h).
//
// ops/kl.py has the formulas. Every polynomial is minimax: Remez exchange in double precision on 4001 Chebyshev points
// against the integral of ops/kl.py, relative error where the result is a factor, coefficients rounded to fp32 and
// listed from the highest power down. No division, no logarithm: both come out of one exponential.
#pragma once
#include "elementary.h"
#include "philox.h"  // minus_two_log

namespace {

// value = KL, slope = dKL / dlog_alpha
template <class F> struct KLTerm {
  F value, slope;
};

// a where x < bound, else b
template <class F> LSF_INLINE F below(F x, float bound, F a, F b) {
  return select_by_sign(bits_of(x - constant<F>(bound)), a, b);
}
template <class F> LSF_INLINE F magnitude(F x) { return maximum(-x, x); }

// Horner's rule on the coefficients `a` where the sign bit of `choose_a` is set, on `b` elsewhere.
template <class F, class U, int kCount>
LSF_INLINE F polynomial(F x, U choose_a, const float (&a)[kCount], const float (&b)[kCount]) {
  F result = select_by_sign(choose_a, constant<F>(a[0]), constant<F>(b[0]));
#pragma GCC unroll 16
  for (int k = 1; k < kCount; ++k)
    result = fused_mul_add(result, x, select_by_sign(choose_a, constant<F>(a[k]), constant<F>(b[k])));
  return result;
}
template <class F, int kCount> LSF_INLINE F polynomial(F x, const float (&a)[kCount]) {
  F result = constant<F>(a[0]);
#pragma GCC unroll 16
  for (int k = 1; k < kCount; ++k) result = fused_mul_add(result, x, constant<F>(a[k]));
  return result;
}

// Exact log-uniform KL. With lambda = 1 / alpha, on either side of lambda = 13:
//   lambda <= 13:  KL = lambda S(lambda),                              -slope = lambda R(lambda)
//   lambda > 13:   KL = (ln 2 + gamma)/2 - log_alpha/2 + V(1/lambda),   -slope = Q(1/lambda)
// as polynomials in x in [-1, 1]; their errors are 3e-8, 7e-8, 3e-9, 7e-8.
template <class F, class U> LSF_INLINE KLTerm<F> kl_log_uniform_exact(F log_alpha) {
  constexpr float kSplit = -2.5649493574615367f;  // -ln 13
  constexpr float S[] = {3.022202326974366e-05f, -0.00012035486724926159f, 0.0003428653290029615f,
                         -0.001060620415955782f, 0.003093571634963155f, -0.008036316372454166f,
                         0.018760917708277702f, -0.039365872740745544f, 0.07441774755716324f,
                         -0.12939254939556122f, 0.22537894546985626f};
  constexpr float V[] = {1.3258912986202631e-05f, -9.53941025727545e-07f, -5.745076123275794e-05f,
                         -3.4529809909145115e-06f, 0.00012991458061151206f, 7.721161819063127e-05f,
                         -0.00016797233547549695f, -0.000514816609211266f, -0.0019054346485063434f,
                         -0.022070467472076416f, -0.02052479051053524f};
  constexpr float R[] = {-6.571142876055092e-05f, 0.0002726056263782084f, -0.0007429301622323692f,
                         0.0021393124479800463f, -0.005878659430891275f, 0.014122403226792812f,
                         -0.029605917632579803f, 0.05365755409002304f, -0.08242727816104889f,
                         0.10515182465314865f, -0.10994931310415268f, 0.09598646312952042f};
  constexpr float Q[] = {6.406463944585994e-05f, -9.688795398687944e-05f, -0.0002800583024509251f,
                         0.0003886040358338505f, 0.000619290629401803f, -0.0006943452171981335f,
                         -0.001215680968016386f, 0.00026722252368927f, 0.0022236329969018698f,
                         0.005357241723686457f, 0.025881055742502213f, 0.5220704078674316f};
  const U far = bits_of(log_alpha - constant<F>(kSplit));  // sign bit: lambda > 13
  const F t = exponential<F, U>(select_by_sign(far, log_alpha, -log_alpha));
  const F one = constant<F>(1.0f), zero = constant<F>(0.0f);
  const F x = fused_mul_add(t, select_by_sign(far, constant<F>(26.0f), constant<F>(2.0f / 13.0f)), -one);
  const F factor = select_by_sign(far, one, t);
  const F line = fused_mul_add(log_alpha, constant<F>(-0.5f), constant<F>(0.635181422730739f));
  return {fused_mul_add(polynomial(x, far, V, S), factor, select_by_sign(far, line, zero)),
          -(polynomial(x, far, Q, R) * factor)};
}

// t = exp(-|x|) and 1 / (1 + t), relative error 5e-8: together sigmoid(|x|) and sigmoid(-|x|)
template <class F> struct Logistic {
  F t, inverse;
};
template <class F, class U> LSF_INLINE Logistic<F> logistic(F x) {
  constexpr float I[] = {-4.527060082182288e-05f, 0.00013581180246546865f, -0.00029425890534184873f,
                         0.0008827766869217157f, -0.0027473594527691603f, 0.008242078125476837f,
                         -0.024690868332982063f, 0.07407260686159134f, -0.222222238779068f, 0.6666666865348816f};
  const F t = exponential<F, U>(-magnitude(x));
  return {t, polynomial(fused_mul_add(t, constant<F>(2.0f), constant<F>(-1.0f)), I)};
}

// softplus(-log_alpha) / 2 and its slope
template <class F, class U> LSF_INLINE KLTerm<F> kl_ard(F log_alpha) {
  // ln(1 + t) / t on [0, 1], relative error 5e-9
  constexpr float L[] = {-6.33598756394349e-06f, 2.0520894395303912e-05f, -5.273368151392788e-05f,
                         0.00018087736680172384f, -0.0006428217166103423f, 0.002289717085659504f,
                         -0.00846096221357584f, 0.033152252435684204f, -0.14426355063915253f, 0.8109301924705505f};
  const Logistic<F> s = logistic<F, U>(log_alpha);
  const F half = constant<F>(0.5f);
  const F log1p_t = s.t * polynomial(fused_mul_add(s.t, constant<F>(2.0f), constant<F>(-1.0f)), L);
  const F sigmoid = s.inverse * below(log_alpha, 0.0f, constant<F>(1.0f), s.t);  // of -log_alpha
  return {half * (below(log_alpha, 0.0f, -log_alpha, constant<F>(0.0f)) + log1p_t), -half * sigmoid};
}

// The three-constant approximation of the log-uniform KL: ARD's and k1 sigmoid(-k2 - k3 log_alpha).
template <class F, class U> LSF_INLINE KLTerm<F> kl_log_uniform_approximate(F log_alpha) {
  constexpr float k1 = 0.63576f, k2 = 1.8732f, k3 = 1.48695f;
  const F u = fused_mul_add(log_alpha, constant<F>(k3), constant<F>(k2));
  const Logistic<F> s = logistic<F, U>(u);
  const KLTerm<F> ard = kl_ard<F, U>(log_alpha);
  const F sigmoid = s.inverse * below(u, 0.0f, constant<F>(1.0f), s.t);  // of -u
  return {fused_mul_add(sigmoid, constant<F>(k1), ard.value),
          fused_mul_add(s.t * s.inverse * s.inverse, constant<F>(-k1 * k3), ard.slope)};
}

// log_alpha of a weight with a variance of its own: log_sigma2 - 2 ln |weight|; infinite where the weight is 0, NaN
// where it is not finite.
template <class F, class U> LSF_INLINE F log_alpha_of(F weight, F log_sigma2) {
  const F log_alpha = log_sigma2 + minus_two_log<F, U>(magnitude(weight)) + (weight - weight);
  return weight == constant<F>(0.0f) ? constant<F>(INFINITY) : log_alpha;
}

// dKL / dweight from the slope: dlog_alpha / dweight = -2 / weight. Near 0 the KL is even in the weight: 0.
template <class F> LSF_INLINE F weight_slope(F weight, F slope) {
  return weight == constant<F>(0.0f) ? constant<F>(0.0f) : constant<F>(-2.0f) * slope / weight;
}

// KL(N(weight, exp(log_sigma2)) || N(0, 1 / precision)), log_variance = -ln precision; slope to log_sigma2.
template <class F, class U>
LSF_INLINE KLTerm<F> kl_normal(F weight, F log_sigma2, F precision, F log_variance) {
  const F half = constant<F>(0.5f), one = constant<F>(1.0f);
  const F x = log_sigma2 - log_variance;
  const F ratio = exponential<F, U>(x);
  return {half * fused_mul_add(weight * weight, precision, ratio - one - x), half * (ratio - one)};
}

}  // namespace
