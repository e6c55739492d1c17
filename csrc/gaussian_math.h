// One Gaussian weight in fp32, for scalars and lanes alike (see scalar.h): ops/gaussian_weights.py has the contract.
//
// log_variance is log_alpha where the noise is multiplicative, else log_sigma2.
#pragma once
#include "kl_math.h"

namespace {

constexpr float kLeastWeight = 0x1p-63f;  // in magnitude: log_sigma2 of a smaller weight is that of this one

template <class F, class U> LSF_INLINE F gaussian_std(F log_variance) {
  return exponential<F, U>(constant<F>(0.5f) * log_variance);
}

template <class F, class U> LSF_INLINE F gaussian_draw(bool multiplicative, F mean, F log_variance, F eps) {
  const F sigma = gaussian_std<F, U>(log_variance);
  return fused_mul_add(multiplicative ? mean * sigma : sigma, eps, mean);
}

template <class F> struct GaussianGradients {
  F weight, scale;
};

// Those of the draw, from its gradient.
template <class F, class U>
LSF_INLINE GaussianGradients<F> gaussian_gradients(bool multiplicative, F grad, F mean, F log_variance, F eps) {
  const F noise = gaussian_std<F, U>(log_variance) * eps, factor = multiplicative ? mean : constant<F>(1.0f);
  return {multiplicative ? fused_mul_add(grad, noise, grad) : grad, constant<F>(0.5f) * grad * (factor * noise)};
}

// log_sigma2 of multiplicative noise
template <class F> LSF_INLINE F gaussian_log_sigma2(F weight, F log_alpha) {
  const F size = maximum(constant<F>(kLeastWeight), magnitude(weight));
  return fused_mul_add(constant<F>(2.0f), logarithm(size), log_alpha);
}

// What dKL / dlog_sigma2 = slope adds to dKL / dweight there: dlog_sigma2 / dweight = 2 / weight.
template <class F> LSF_INLINE F slope_by_variance(F weight, F slope) {
  const F by_variance = constant<F>(2.0f) * slope / weight;
  return magnitude(weight) > constant<F>(kLeastWeight) ? by_variance : constant<F>(0.0f);
}

// The share of the KL in a gradient, within the finite numbers of its dtype.
template <class F> LSF_INLINE F times_slope(F grad_kl, F slope, bool half) {
  return saturate(grad_kl * saturate(slope, false), half);
}

}  // namespace
