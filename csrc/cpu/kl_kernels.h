// Sums of the kl family and their slopes, in one pass over the parameters.
#pragma once
#include "lrt_kernels.h"  // map_chunks

#include "../kl_math.h"  // after the overloads for lanes

namespace {

// 64 partial sums whatever the number of lanes, then these in order: the same bits for every instruction set.
LSF_INLINE double sum_in_order(const float* values, ptrdiff_t n) {
  constexpr int kPartials = 64, kVectors = kPartials / kLanes;
  Floats sums[kVectors] = {};
  ptrdiff_t i = 0;
  for (; i + kPartials <= n; i += kPartials)
#pragma GCC unroll 16
    for (int k = 0; k < kVectors; ++k) sums[k] += load(values + i + k * kLanes);
  float partials[kPartials];
  for (int k = 0; k < kVectors; ++k) store(partials + k * kLanes, sums[k]);
  for (int k = 0; i < n; ++i, ++k) partials[k] += values[i];
  double sum = 0;
  for (const float partial : partials) sum += partial;
  return sum;
}

// `body` gives y[0] = KL and y[1 + k] = its slope to x[k], for kIn inputs.
template <int kIn, class Body>
LSF_INLINE double sum_and_slopes(int64_t n, const Array* in, const Array* slopes, Body body) {
  float values[kTile];
  Array out[1 + kIn] = {{values, DType::f32}};
  if (slopes) {
    for (int k = 0; k < kIn; ++k) out[1 + k] = slopes[k];
    map_chunks<kIn, 1 + kIn>(n, in, out, body);
  } else {
    map_chunks<kIn, 1>(n, in, out, [&](const Floats* x, Floats* y) {
      Floats all[1 + kIn];
      body(x, all);
      y[0] = all[0];
    });
  }
  return sum_in_order(values, n);
}

// Within the finite numbers of a dtype, which dlog_alpha / dweight = -2 / weight leaves near 0.
LSF_INLINE Floats saturate(Floats x, DType dtype) {
  const Floats limit = splat(dtype == DType::f16 ? 65504.0f : 3.3895313892515355e38f);
  return minimum(limit, maximum(-limit, x));
}

template <KLTerm<Floats> (*kTerm)(Floats log_alpha)>
LSF_INLINE double sum_of(int64_t n, const Array* in, const Array* slopes) {
  if (!in[1].data)
    return sum_and_slopes<1>(n, in, slopes, [](const Floats* x, Floats* y) {
      const KLTerm<Floats> term = kTerm(x[0]);
      y[0] = term.value, y[1] = term.slope;
    });
  const DType dtype = slopes ? slopes[1].dtype : DType::f32;
  return sum_and_slopes<2>(n, in, slopes, [=](const Floats* x, Floats* y) {
    const KLTerm<Floats> term = kTerm(log_alpha_of(x[1], x[0]));
    y[0] = term.value, y[1] = term.slope, y[2] = saturate(weight_slope(x[1], term.slope), dtype);
  });
}

LSF_INLINE double sum_of_normal(Prior prior, int64_t n, const Array* in, const Array* slopes) {
  const Floats precision = splat(prior.precision), log_variance = splat(prior.log_variance);
  const DType dtype = slopes ? slopes[0].dtype : DType::f32;
  if (!in[1].data)
    return sum_and_slopes<1>(n, in, slopes, [=](const Floats* x, Floats* y) {
      const KLTerm<Floats> term = kl_normal<Floats, Words>(splat(0.0f), x[0], precision, log_variance);
      y[0] = term.value, y[1] = saturate(term.slope, dtype);
    });
  return sum_and_slopes<2>(n, in, slopes, [=](const Floats* x, Floats* y) {
    const KLTerm<Floats> term = kl_normal<Floats, Words>(x[1], x[0], precision, log_variance);
    y[0] = term.value, y[1] = saturate(term.slope, dtype), y[2] = x[1] * precision;
  });
}

double kl_sum(KL kind, Prior prior, int64_t n, const Array* in, const Array* slopes) {
  switch (kind) {
    case KL::log_uniform: return sum_of<kl_log_uniform_exact<Floats, Words>>(n, in, slopes);
    case KL::log_uniform_approximate: return sum_of<kl_log_uniform_approximate<Floats, Words>>(n, in, slopes);
    case KL::ard: return sum_of<kl_ard<Floats, Words>>(n, in, slopes);
    case KL::normal: return sum_of_normal(prior, n, in, slopes);
  }
  return 0;
}

void kl_scale(float scale, int64_t n, const Array* in, const Array* out) {
  const Floats factor = splat(scale);
  map_chunks<1, 1>(n, in, out, [=](const Floats* x, Floats* y) { y[0] = factor * x[0]; });
}

}  // namespace
