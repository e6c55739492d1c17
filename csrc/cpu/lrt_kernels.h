// Rows of the lrt family: the noisy epilogue, its gradient, and the elementwise passes around the GEMMs.
#pragma once
#include "noise_kernels.h"

#include "../elementary.h"  // after the overloads for lanes

namespace {

// out [columns of `in`, rows of `in`], both in rows of whole quads.
LSF_INLINE void transpose(const TileNoise& in, int64_t rows, int64_t cols, TileNoise& out) {
  out.skip = 0;
  out.stride = (rows + 3) & ~3;
  for (int64_t r = 0; r < rows; r += 4)
    for (int64_t c = 0; c < cols; c += 4) {
      __m128 a = _mm_loadu_ps(in.row(r) + c), b = _mm_loadu_ps(in.row(r + 1) + c);
      __m128 d = _mm_loadu_ps(in.row(r + 2) + c), e = _mm_loadu_ps(in.row(r + 3) + c);
      _MM_TRANSPOSE4_PS(a, b, d, e);
      float* const block = out.data + c * out.stride + r;
      _mm_storeu_ps(block, a);
      _mm_storeu_ps(block + out.stride, b);
      _mm_storeu_ps(block + 2 * out.stride, d);
      _mm_storeu_ps(block + 3 * out.stride, e);
    }
}

// The noise of a tile in the rows and columns that the output has in memory.
void draw(const LrtNoise& noise, Tile tile, TileNoise& out) {
  if (noise.layout == LrtLayout::channels_last) {
    const int64_t n = tile.row / noise.positions;
    TileNoise drawn;
    draw(noise.stream,
         Tile{n * noise.channels_total + tile.col, tile.cols, tile.row - n * noise.positions, tile.rows}, drawn);
    return transpose(drawn, tile.cols, tile.rows, out);
  }
  if (noise.layout == LrtLayout::channels_first)
    tile.row += tile.row / noise.channels * (noise.channels_total - noise.channels);
  draw(noise.stream, tile, out);
}

// What the channels have, beside a vector of the output: the row's, or those of its columns.
template <bool kByRow, class Extent>
LSF_INLINE Floats of_channels(const float* values, int64_t channel, ptrdiff_t i, Extent extent) {
  return kByRow ? splat(values[channel]) : load(values + channel + i, extent);
}
template <bool kByRow, class Extent>
LSF_INLINE Floats of_channels(Alpha alpha, int64_t channel, ptrdiff_t i, Extent extent) {
  if (!alpha.data) return splat(1.0f);
  return alpha.stride ? of_channels<kByRow>(alpha.data, channel, i, extent) : splat(*alpha.data);
}
template <bool kByRow> LSF_INLINE int64_t first_channel(const LrtNoise& noise, Tile tile, int64_t row) {
  return kByRow ? row % noise.channels : tile.col;
}

// sqrt(max(alpha var, 0) + 1e-16); maximum keeps a NaN in its second argument.
LSF_INLINE Floats deviation(Floats var, Floats alpha) {
  return sqrt_rn(fused_mul_add(maximum(splat(0.0f), var), alpha, splat(1e-16f)));
}

template <bool kByRow> void lrt_sample_rows(const LrtSample& s, Tile tile) {
  TileNoise noise;
  draw(s.noise, tile, noise);
  float mean_buffer[kTile], var_buffer[kTile], out_buffer[kTile];
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t row = tile.row + r, channel = first_channel<kByRow>(s.noise, tile, row);
    const float* eps = noise.row(r);
    const float* m = s.mean.data ? widen(s.mean.dtype, element(s.mean, row, tile.col), tile.cols, mean_buffer) : nullptr;
    const float* v = widen(s.var.dtype, element(s.var, row, tile.col), tile.cols, var_buffer);
    void* result = element(s.out, row, tile.col);
    float* y = staging(s.out.dtype, result, out_buffer);
    for_vectors(tile.cols, [&](ptrdiff_t i, auto extent) {
      Floats centre = m ? load(m + i, extent) : splat(0.0f);
      if (s.bias) centre = centre + of_channels<kByRow>(s.bias, channel, i, extent);
      const Floats std = deviation(load(v + i, extent), of_channels<kByRow>(s.alpha, channel, i, extent));
      store(y + i, fused_mul_add(std, load(eps + i, extent), centre), extent);
    });
    narrow(s.out.dtype, y, tile.cols, result);
  }
}

void lrt_sample(const LrtSample& s, Tile tile) {
  if (s.noise.layout == LrtLayout::channels_first) lrt_sample_rows<true>(s, tile);
  else lrt_sample_rows<false>(s, tile);
}

LSF_INLINE float sum_of_lanes(Floats x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

template <bool kByRow>
void lrt_sample_backward_rows(const LrtSampleBackward& s, Tile tile, float* bias_sums, float* alpha_sums) {
  TileNoise noise;
  draw(s.noise, tile, noise);
  float grad_buffer[kTile], var_buffer[kTile], out_buffer[kTile];
  // 5e7 |grad noise| at var = 0 must stay finite in fp16.
  const Floats limit = splat(s.grad_var.dtype == DType::f16 ? 65504.0f : 3.4028234663852886e38f);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t row = tile.row + r, channel = first_channel<kByRow>(s.noise, tile, row);
    const float* eps = noise.row(r);
    const float* g = widen(s.grad.dtype, element(s.grad, row, tile.col), tile.cols, grad_buffer);
    const float* v = widen(s.var.dtype, element(s.var, row, tile.col), tile.cols, var_buffer);
    void* result = element(s.grad_var, row, tile.col);
    float* dv = staging(s.grad_var.dtype, result, out_buffer);
    Floats bias_sum = {}, alpha_sum = {};  // of the row, over short parts: long sums lose digits
    constexpr ptrdiff_t kPart = 16 * kLanes;
    for (ptrdiff_t begin = 0; begin < tile.cols; begin += kPart) {
      Floats bias_part = {}, alpha_part = {};
      for_vectors(tile.cols - begin < kPart ? tile.cols - begin : kPart, [&](ptrdiff_t j, auto extent) {
        const ptrdiff_t i = begin + j;
        const Floats gi = load(g + i, extent), vi = load(v + i, extent);
        const Floats ai = of_channels<kByRow>(s.alpha, channel, i, extent);
        const Floats slope = splat(0.5f) / deviation(vi, ai) * ai;
        Floats d = gi * load(eps + i, extent) * slope;
        d = minimum(limit, maximum(-limit, d)) + (gi - gi);  // not finite where grad is not
        d = vi < splat(0.0f) ? splat(0.0f) : d;
        store(dv + i, d, extent);
        if constexpr (kByRow) {
          bias_part = bias_part + gi;
          alpha_part = fused_mul_add(d, vi, alpha_part);
        } else {
          if (bias_sums) store(bias_sums + i, load(bias_sums + i, extent) + gi, extent);
          if (alpha_sums) store(alpha_sums + i, fused_mul_add(d, vi, load(alpha_sums + i, extent)), extent);
        }
      });
      bias_sum = bias_sum + bias_part;
      alpha_sum = alpha_sum + alpha_part;
    }
    narrow(s.grad_var.dtype, dv, tile.cols, result);
    if (kByRow && bias_sums) bias_sums[r] += sum_of_lanes(bias_sum);
    if (kByRow && alpha_sums) alpha_sums[r] += sum_of_lanes(alpha_sum);
  }
}

void lrt_sample_backward(const LrtSampleBackward& s, Tile tile, float* bias_sums, float* alpha_sums) {
  if (s.noise.layout == LrtLayout::channels_first) lrt_sample_backward_rows<true>(s, tile, bias_sums, alpha_sums);
  else lrt_sample_backward_rows<false>(s, tile, bias_sums, alpha_sums);
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
