// Sums of the kl family and their slopes, in one pass over the parameters.
#pragma once
#include "simd.h"

#include "../kl_math.h"  // after the overloads for lanes

namespace {

// KL and slopes of n elements: `body` gives y[0] = KL and y[1 + k] = its slope to x[k], for kIn inputs.
//
// The sum is taken in 64 columns, then over these in order: the same bits for every number of lanes.
template <int kIn, bool kSlopes, class Body>
LSF_INLINE double sum_and_slopes(int64_t n, const Array* in, const Array* slopes, Body body) {
  constexpr int64_t kChunk = kTile / 4, kColumns = 64;
  // Vectors in step, whose polynomials hide each other's latency; 16 registers hold one.
  constexpr int kTogether = kLanes == 16 ? 4 : 1;
  constexpr int kSlopeCount = kSlopes ? kIn : 0;
  float in_buffer[kIn][kChunk], slope_buffer[kIn][kChunk];
  Floats sums[kColumns / kLanes] = {};
  for (int64_t done = 0; done < n; done += kChunk) {
    const int64_t count = n - done < kChunk ? n - done : kChunk;
    const float* a[kIn];
    void* results[kIn];
    float* b[kIn];
    for (int k = 0; k < kIn; ++k)
      a[k] = widen(in[k].dtype, element({in[k].data, 0, in[k].dtype}, 0, done), count, in_buffer[k]);
    for (int k = 0; k < kSlopeCount; ++k) {
      results[k] = element({slopes[k].data, 0, slopes[k].dtype}, 0, done);
      b[k] = staging(slopes[k].dtype, results[k], slope_buffer[k]);
    }
    int64_t i = 0;
    for (; i + kColumns <= count; i += kColumns)
      for (int first = 0; first < kColumns / kLanes; first += kTogether) {
        Floats y[kTogether][1 + kIn];
#pragma GCC unroll 4
        for (int v = 0; v < kTogether; ++v) {
          Floats x[kIn];
          for (int k = 0; k < kIn; ++k) x[k] = load(a[k] + i + (first + v) * kLanes);
          body(x, y[v]);
        }
#pragma GCC unroll 4
        for (int v = 0; v < kTogether; ++v) {
          sums[first + v] += y[v][0];
          for (int k = 0; k < kSlopeCount; ++k) store(b[k] + i + (first + v) * kLanes, y[v][1 + k]);
        }
      }
    if (i < count) {
      float last[kColumns] = {};
      for_vectors(count - i, [&](ptrdiff_t j, auto extent) {
        Floats x[kIn], y[1 + kIn];
        for (int k = 0; k < kIn; ++k) x[k] = load(a[k] + i + j, extent);
        body(x, y);
        store(last + j, y[0], extent);
        for (int k = 0; k < kSlopeCount; ++k) store(b[k] + i + j, y[1 + k], extent);
      });
      for (int v = 0; v < kColumns / kLanes; ++v) sums[v] += load(last + v * kLanes);
    }
    for (int k = 0; k < kSlopeCount; ++k) narrow(slopes[k].dtype, b[k], count, results[k]);
  }
  float columns[kColumns];
  for (int v = 0; v < kColumns / kLanes; ++v) store(columns + v * kLanes, sums[v]);
  double sum = 0;
  for (const float column : columns) sum += column;
  return sum;
}

template <int kIn, class Body>
LSF_INLINE double sum_and_slopes(int64_t n, const Array* in, const Array* slopes, Body body) {
  return slopes ? sum_and_slopes<kIn, true>(n, in, slopes, body) : sum_and_slopes<kIn, false>(n, in, slopes, body);
}

LSF_INLINE Floats saturate(Floats x, DType dtype) { return saturate(x, dtype == DType::f16); }

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
  const Floats inverse_std = splat(prior.inverse_std), log_variance = splat(prior.log_variance);
  const DType dtype = slopes ? slopes[0].dtype : DType::f32;
  if (!in[1].data)
    return sum_and_slopes<1>(n, in, slopes, [=](const Floats* x, Floats* y) {
      const KLTerm<Floats> term = kl_normal<Floats, Words>(splat(0.0f), x[0], inverse_std, log_variance);
      y[0] = term.value, y[1] = saturate(term.slope, dtype);
    });
  const DType weight_dtype = slopes ? slopes[1].dtype : DType::f32;
  return sum_and_slopes<2>(n, in, slopes, [=](const Floats* x, Floats* y) {
    const KLTerm<Floats> term = kl_normal<Floats, Words>(x[1], x[0], inverse_std, log_variance);
    y[0] = term.value, y[1] = saturate(term.slope, dtype);
    y[2] = saturate(kl_normal_weight_slope(x[1], inverse_std), weight_dtype);
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
