// Rows of the lrt family: the noisy epilogue, its gradient, and the elementwise passes around the GEMMs.
#pragma once
#include "noise_kernels.h"

#include "../elementary.h"  // after the overloads for lanes

namespace {

template <class Extent> LSF_INLINE Floats alpha_at(Alpha alpha, int64_t col, ptrdiff_t i, Extent extent) {
  if (!alpha.data) return splat(1.0f);
  return alpha.stride ? load(alpha.data + col + i, extent) : splat(*alpha.data);
}

// sqrt(max(alpha var, 0) + 1e-16); maximum keeps a NaN in its second argument.
LSF_INLINE Floats deviation(Floats var, Floats alpha) {
  return sqrt_rn(fused_mul_add(maximum(splat(0.0f), var), alpha, splat(1e-16f)));
}

void lrt_sample(NoiseStream stream, Tile tile, Matrix mean, const float* bias, Alpha alpha, Matrix var, Matrix out) {
  TileNoise noise;
  draw(stream, tile, noise);
  float mean_buffer[kTile], var_buffer[kTile], out_buffer[kTile];
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t row = tile.row + r;
    const float* eps = noise.row(r);
    const float* m = mean.data ? widen(mean.dtype, element(mean, row, tile.col), tile.cols, mean_buffer) : nullptr;
    const float* v = widen(var.dtype, element(var, row, tile.col), tile.cols, var_buffer);
    void* result = element(out, row, tile.col);
    float* y = staging(out.dtype, result, out_buffer);
    for_vectors(tile.cols, [&](ptrdiff_t i, auto extent) {
      Floats centre = m ? load(m + i, extent) : splat(0.0f);
      if (bias) centre = centre + load(bias + tile.col + i, extent);
      const Floats std = deviation(load(v + i, extent), alpha_at(alpha, tile.col, i, extent));
      store(y + i, fused_mul_add(std, load(eps + i, extent), centre), extent);
    });
    narrow(out.dtype, y, tile.cols, result);
  }
}

void lrt_sample_backward(NoiseStream stream, Tile tile, Matrix grad, Alpha alpha, Matrix var, Matrix grad_var,
                         float* bias_sums, float* alpha_sums) {
  TileNoise noise;
  draw(stream, tile, noise);
  float grad_buffer[kTile], var_buffer[kTile], out_buffer[kTile];
  // 5e7 |grad noise| at var = 0 must stay finite in fp16.
  const Floats limit = splat(grad_var.dtype == DType::f16 ? 65504.0f : 3.4028234663852886e38f);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t row = tile.row + r;
    const float* eps = noise.row(r);
    const float* g = widen(grad.dtype, element(grad, row, tile.col), tile.cols, grad_buffer);
    const float* v = widen(var.dtype, element(var, row, tile.col), tile.cols, var_buffer);
    void* result = element(grad_var, row, tile.col);
    float* dv = staging(grad_var.dtype, result, out_buffer);
    for_vectors(tile.cols, [&](ptrdiff_t i, auto extent) {
      const Floats gi = load(g + i, extent), vi = load(v + i, extent);
      const Floats ai = alpha_at(alpha, tile.col, i, extent);
      const Floats slope = splat(0.5f) / deviation(vi, ai) * ai;
      Floats d = gi * load(eps + i, extent) * slope;
      d = minimum(limit, maximum(-limit, d)) + (gi - gi);  // not finite where grad is not
      d = vi < splat(0.0f) ? splat(0.0f) : d;
      store(dv + i, d, extent);
      if (bias_sums) store(bias_sums + i, load(bias_sums + i, extent) + gi, extent);
      if (alpha_sums) store(alpha_sums + i, fused_mul_add(d, vi, load(alpha_sums + i, extent)), extent);
    });
    narrow(grad_var.dtype, dv, tile.cols, result);
  }
}

void map(Map op, int64_t n, const Array* in, const Array* out) {
  switch (op) {
    case Map::square:
      return map_chunks<1, 1>(n, in, out, [](const Floats* x, Floats* y) { y[0] = x[0] * x[0]; });
    case Map::exp:
      return map_chunks<1, 1>(n, in, out, [](const Floats* x, Floats* y) { y[0] = exponential<Floats, Words>(x[0]); });
    case Map::exp_square:
      return map_chunks<2, 1>(n, in, out, [](const Floats* x, Floats* y) {
        y[0] = exponential<Floats, Words>(x[0]) * (x[1] * x[1]);
      });
    case Map::add_product:
      return map_chunks<3, 1>(n, in, out, [](const Floats* x, Floats* y) {
        y[0] = fused_mul_add(x[1] + x[1], x[2], x[0]);
      });
    case Map::product_exp:
      return map_chunks<2, 1>(n, in, out, [](const Floats* x, Floats* y) {
        y[0] = x[0] * exponential<Floats, Words>(x[1]);
      });
    case Map::weight_grads:
      return map_chunks<4, 2>(n, in, out, [](const Floats* x, Floats* y) {
        const Floats scaled = exponential<Floats, Words>(x[3]) * x[1] * x[2];  // alpha w dsigma2
        y[0] = fused_mul_add(splat(2.0f), scaled, x[0]);
        y[1] = scaled * x[1];
      });
  }
}

}  // namespace
