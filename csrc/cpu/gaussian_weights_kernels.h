// Draws of Gaussian weights with their KL, and the gradients of both, in pieces that stay in the inner caches:
// ops/gaussian_weights.py has the contract.
#pragma once
#include "kl_kernels.h"
#include "noise_kernels.h"

#include "../gaussian_math.h"  // after the overloads for lanes

namespace {

constexpr ptrdiff_t kGaussianPiece = kTile;

// What a pass reads of one piece, in fp32.
struct GaussianPiece {
  alignas(64) float noise[kGaussianPiece + 8];  // may start inside a quad and ends with a whole one
  alignas(64) float weight_buffer[kGaussianPiece], scale_buffer[kGaussianPiece], log_sigma2[kGaussianPiece];
  const float *eps, *weight, *scale;
  ptrdiff_t n;
};

LSF_INLINE void* element_of(Array a, int64_t i) { return element({a.data, 0, a.dtype}, 0, i); }

// Elements of scale, each repeated over the weights that it covers.
LSF_INLINE void repeat_scale(const GaussianTensor& t, int64_t begin, ptrdiff_t n, float* out) {
  for (int64_t i = begin, count; i < begin + n; i += count) {
    const int64_t left = t.run - i % t.run;
    count = left < begin + n - i ? left : begin + n - i;
    float scratch;
    const Floats value = splat(*widen(t.scale.dtype, element_of(t.scale, i / t.run), 1, &scratch));
    for_vectors(count, [&](ptrdiff_t j, auto extent) { store(out + (i - begin) + j, value, extent); });
  }
}

LSF_INLINE void read_piece(const GaussianTensor& t, int64_t begin, ptrdiff_t n, GaussianPiece& piece) {
  draw_quads(t.noise, Tile{0, 1, begin, n}, piece.noise);
  piece.eps = piece.noise + ((t.noise.col_offset + begin) & 3);
  piece.n = n;
  piece.weight = nullptr;
  if (t.weight.data) piece.weight = widen(t.weight.dtype, element_of(t.weight, begin), n, piece.weight_buffer);
  piece.scale = piece.scale_buffer;
  if (t.run == 1) piece.scale = widen(t.scale.dtype, element_of(t.scale, begin), n, piece.scale_buffer);
  else repeat_scale(t, begin, n, piece.scale_buffer);
}

// The KL of a piece and, unless they are null, its slopes to what it is made from: scale, or log_sigma2 where a prior
// of a fixed width meets multiplicative noise, and the weight.
LSF_INLINE double piece_kl(const GaussianTensor& t, GaussianPiece& piece, float* slope, float* weight_slope) {
  const bool normal = t.kl == KL::normal;
  Array in[2] = {{(void*)piece.scale, DType::f32}, {nullptr, DType::f32}};
  if (piece.weight && (normal || !t.multiplicative)) in[1].data = (void*)piece.weight;
  if (normal && t.multiplicative) {
    for_vectors(piece.n, [&](ptrdiff_t i, auto extent) {
      const Floats weight = load(piece.weight + i, extent), log_alpha = load(piece.scale + i, extent);
      store(piece.log_sigma2 + i, gaussian_log_sigma2(weight, log_alpha), extent);
    });
    in[0].data = piece.log_sigma2;
  }
  const Array slopes[2] = {{slope, DType::f32}, {weight_slope, DType::f32}};
  return kl_sum(t.kl, t.prior, piece.n, in, slope ? slopes : nullptr);
}

template <bool kMean, bool kMultiplicative> LSF_INLINE void draw_piece(const GaussianPiece& piece, float* drawn) {
  for_vectors(piece.n, [&](ptrdiff_t i, auto extent) {
    const Floats mean = kMean ? load(piece.weight + i, extent) : splat(0.0f);
    const Floats log_variance = load(piece.scale + i, extent), eps = load(piece.eps + i, extent);
    store(drawn + i, gaussian_draw<Floats, Words>(kMultiplicative, mean, log_variance, eps), extent);
  });
}

double gaussian_weights(const GaussianTensor& t, int64_t begin, int64_t n, Array out) {
  double kl = 0;
  GaussianPiece piece;
  alignas(64) float out_buffer[kGaussianPiece];
  for (const int64_t end = begin + n; begin < end; begin += kGaussianPiece) {
    read_piece(t, begin, end - begin < kGaussianPiece ? end - begin : kGaussianPiece, piece);
    void* const row = element_of(out, begin);
    float* const drawn = staging(out.dtype, row, out_buffer);
    if (!piece.weight) draw_piece<false, false>(piece, drawn);
    else if (t.multiplicative) draw_piece<true, true>(piece, drawn);
    else draw_piece<true, false>(piece, drawn);
    narrow(out.dtype, drawn, piece.n, row);
    if (t.has_kl) kl += piece_kl(t, piece, nullptr, nullptr);
  }
  return kl;
}

// Adds what the weights of each element of scale contribute. Sums of 16 columns, then over these in order: the same bits
// for every number of lanes.
LSF_INLINE void sum_runs(const float* x, int64_t run, int64_t first, int64_t begin, ptrdiff_t n, double* sums) {
  constexpr ptrdiff_t kSumColumns = 16;
  for (int64_t i = begin, count; i < begin + n; i += count) {
    const int64_t left = run - i % run;
    count = left < begin + n - i ? left : begin + n - i;
    const float* const row = x + (i - begin);
    Floats partial[kSumColumns / kLanes] = {};
    ptrdiff_t j = 0;
    for (; j + kSumColumns <= count; j += kSumColumns)
      for (int v = 0; v < kSumColumns / kLanes; ++v) partial[v] += load(row + j + v * kLanes);
    float columns[kSumColumns];
    for (int v = 0; v < kSumColumns / kLanes; ++v) store(columns + v * kLanes, partial[v]);
    double sum = 0;
    for (const float column : columns) sum += column;
    for (; j < count; ++j) sum += row[j];
    sums[i / run - first] += sum;
  }
}

// What the KL adds to the gradients: nothing, something to scale alone, or to both.
enum class KLGradient { none, scale, both };

template <bool kMultiplicative, KLGradient kKL>
LSF_INLINE void piece_gradients(const GaussianPiece& piece, const float* grad, Floats grad_kl, const float* slope,
                                const float* weight_slope, const GaussianTensor& t, float* to_weight,
                                float* to_scale) {
  for_vectors(piece.n, [&](ptrdiff_t i, auto extent) {
    const Floats w = kMultiplicative ? load(piece.weight + i, extent) : splat(1.0f);
    GaussianGradients<Floats> gradients = gaussian_gradients<Floats, Words>(
        kMultiplicative, load(grad + i, extent), w, load(piece.scale + i, extent), load(piece.eps + i, extent));
    if (kKL != KLGradient::none)
      gradients.scale += times_slope(grad_kl, load(slope + i, extent), t.scale.dtype == DType::f16);
    if (kKL == KLGradient::both) {
      Floats s = load(weight_slope + i, extent);
      if (kMultiplicative) s += slope_by_variance(w, load(slope + i, extent));
      gradients.weight += times_slope(grad_kl, s, t.weight.dtype == DType::f16);
    }
    store(to_weight + i, gradients.weight, extent);
    store(to_scale + i, gradients.scale, extent);
  });
}

void gaussian_weights_backward(const GaussianTensor& t, int64_t begin, int64_t n, Array grad, float grad_kl,
                               Array grad_weight, Array grad_scale, double* sums) {
  const int64_t first = begin / t.run;
  const Floats factor = splat(grad_kl);
  GaussianPiece piece;
  alignas(64) float slope[kGaussianPiece], weight_slope[kGaussianPiece], grad_buffer[kGaussianPiece];
  alignas(64) float weight_buffer[kGaussianPiece], scale_buffer[kGaussianPiece];
  for (const int64_t end = begin + n; begin < end; begin += kGaussianPiece) {
    read_piece(t, begin, end - begin < kGaussianPiece ? end - begin : kGaussianPiece, piece);
    const float* const g = widen(grad.dtype, element_of(grad, begin), piece.n, grad_buffer);
    void* const weight_row = grad_weight.data ? element_of(grad_weight, begin) : nullptr;
    void* const scale_row = grad_scale.data ? element_of(grad_scale, begin) : nullptr;
    float* const to_weight = weight_row ? staging(grad_weight.dtype, weight_row, weight_buffer) : weight_buffer;
    float* const to_scale = scale_row ? staging(grad_scale.dtype, scale_row, scale_buffer) : scale_buffer;
    if (t.has_kl) piece_kl(t, piece, slope, weight_slope);
    const auto gradients = [&]<bool kMultiplicative, KLGradient kKL>() {
      piece_gradients<kMultiplicative, kKL>(piece, g, factor, slope, weight_slope, t, to_weight, to_scale);
    };
    const bool both = t.has_kl && piece.weight && (t.kl == KL::normal || !t.multiplicative);
    if (t.multiplicative) {
      if (both) gradients.template operator()<true, KLGradient::both>();
      else if (t.has_kl) gradients.template operator()<true, KLGradient::scale>();
      else gradients.template operator()<true, KLGradient::none>();
    } else if (both) gradients.template operator()<false, KLGradient::both>();
    else if (t.has_kl) gradients.template operator()<false, KLGradient::scale>();
    else gradients.template operator()<false, KLGradient::none>();
    if (weight_row) narrow(grad_weight.dtype, to_weight, piece.n, weight_row);
    if (scale_row) narrow(grad_scale.dtype, to_scale, piece.n, scale_row);
    if (sums) sum_runs(to_scale, t.run, first, begin, piece.n, sums);
  }
}

}  // namespace
