// SWAG's moments and samples, in pieces of a parameter that stay in the inner caches: ops/swag.py has the contract.
#pragma once
#include "noise_kernels.h"

#include "../averaging_math.h"  // after the overloads for lanes

namespace {

constexpr ptrdiff_t kSwagPiece = kTile / 2;

// ---- collecting -------------------------------------------------------------------------------------------

void swag_collect(float weight, bool first, int64_t n, float* mean, float* m2, Array value, Array deviation) {
  float value_buffer[kSwagPiece];
  alignas(64) float deviations[kSwagPiece];
  alignas(64) uint16_t halves[kSwagPiece];
  for (int64_t done = 0; done < n; done += kSwagPiece) {
    const int64_t count = n - done < kSwagPiece ? n - done : kSwagPiece;
    const float* v = widen(value.dtype, element({value.data, 0, value.dtype}, 0, done), count, value_buffer);
    for_vectors(count, [&](ptrdiff_t i, auto extent) {
      float *a = mean + done + i, *b = m2 + done + i;
      const auto next = welford_element(load(a, extent), load(b, extent), load(v + i, extent), weight, first);
      store(a, next.mean, extent);
      store(b, next.m2, extent);
      store(deviations + i, next.deviation, extent);
    });
    if (deviation.data) stream(deviation.dtype, deviations, count, halves, element({deviation.data, 0, deviation.dtype}, 0, done));
  }
  _mm_sfence();
}

// ---- sampling ---------------------------------------------------------------------------------------------

constexpr ptrdiff_t kSwagRow = kSwagPiece + 16;  // noise starts inside a quad, and ends with a whole one
#if LSF_LANES == 16
constexpr int kSwagGroup = 6, kSwagWidth = 4, kSwagSingleWidth = 8;  // 24 sums, 4 columns and a coefficient in 32 registers
#else
constexpr int kSwagGroup = 6, kSwagWidth = 2, kSwagSingleWidth = 8;
#endif

template <DType T> LSF_INLINE Floats load_column(const void* column, ptrdiff_t i, Whole) {
  if constexpr (T == DType::f32) return load((const float*)column + i);
  else if constexpr (T == DType::bf16) return from_bfloat((const uint16_t*)column + i);
  else return from_half((const uint16_t*)column + i);
}
template <DType T> LSF_INLINE Floats load_column(const void* column, ptrdiff_t i, Part part) {
  if constexpr (T == DType::f32) return load((const float*)column + i, part);
  else {
    uint16_t padded[kLanes] = {};
    memcpy(padded, (const uint16_t*)column + i, 2 * part.n);
    return load_column<T>(padded, 0, Whole{});
  }
}

// sums[g] = sum_j coefficients[g][j] column_j, for Samples and Width vectors of the row at i, all in registers.
template <DType T, int Samples, int Width, class Extent>
LSF_INLINE void low_rank_vectors(const SwagParameter& p, const float* coefficients, int64_t begin, ptrdiff_t i, Extent extent,
                         float* low_rank) {
  Floats sums[Samples][Width] = {};
  const char* column = (const char*)element(p.columns, 0, begin);
  const int64_t step = p.columns.stride * (T == DType::f32 ? 4 : 2);
  for (int64_t j = 0; j < p.rank; ++j, column += step) {
    Floats d[Width];
#pragma GCC unroll 8
    for (int v = 0; v < Width; ++v) d[v] = load_column<T>(column, i + v * kLanes, extent);
#pragma GCC unroll 8
    for (int g = 0; g < Samples; ++g) {
      const Floats c = splat(coefficients[g * p.rank + j]);
#pragma GCC unroll 8
      for (int v = 0; v < Width; ++v) sums[g][v] = fused_mul_add(c, d[v], sums[g][v]);
    }
  }
#pragma GCC unroll 8
  for (int g = 0; g < Samples; ++g)
#pragma GCC unroll 8
    for (int v = 0; v < Width; ++v) store(low_rank + g * kSwagRow + i + v * kLanes, sums[g][v]);
}

template <DType T, int Samples, int Width>
LSF_INLINE void low_rank_piece(const SwagParameter& p, const float* coefficients, int64_t begin, ptrdiff_t n, float* low_rank) {
  ptrdiff_t i = 0;
  for (; i + Width * kLanes <= n; i += Width * kLanes)
    low_rank_vectors<T, Samples, Width>(p, coefficients, begin, i, Whole{}, low_rank);
  for (; i + kLanes <= n; i += kLanes) low_rank_vectors<T, Samples, 1>(p, coefficients, begin, i, Whole{}, low_rank);
  if (i < n) low_rank_vectors<T, Samples, 1>(p, coefficients, begin, i, Part{n - i}, low_rank);
}

// The noise of elements [begin, begin + n) of sample s, in a buffer of kSwagRow.
LSF_INLINE const float* draw_place(const SwagParameter& p, int64_t s, int64_t begin, ptrdiff_t n, float* buffer) {
  NoiseStream stream = p.noise;
  stream.sample += (uint32_t)s;
  const int64_t first = begin / p.run * p.stride + begin % p.run;
  if (begin % p.run + n <= p.run) {
    draw_quads(stream, Tile{0, 1, first, n}, buffer);
    return buffer + ((stream.col_offset + first) & 3);
  }
  float quads[kSwagRow];
  for (ptrdiff_t done = 0, count; done < n; done += count) {
    const int64_t i = begin + done, col = i / p.run * p.stride + i % p.run;
    count = p.run - i % p.run < n - done ? p.run - i % p.run : n - done;
    draw_quads(stream, Tile{0, 1, col, count}, quads);
    memcpy(buffer + done, quads + ((stream.col_offset + col) & 3), 4 * count);
  }
  return buffer;
}

template <int Samples> LSF_INLINE void sample_piece(const SwagParameter& p, int64_t first, int64_t begin, ptrdiff_t n) {
  alignas(64) float noise[Samples][kSwagRow], low_rank[Samples][kSwagRow], weights[Samples][kSwagRow];
  alignas(64) uint16_t halves[kSwagPiece];
  const float* z[Samples];
  for (int g = 0; g < Samples; ++g) z[g] = draw_place(p, first + g, begin, n, noise[g]);
  constexpr int kWidth = Samples == 1 ? kSwagSingleWidth : kSwagWidth;
  const float* c = p.coefficients + first * p.rank;
  switch (p.columns.dtype) {
    case DType::f32: low_rank_piece<DType::f32, Samples, kWidth>(p, c, begin, n, low_rank[0]); break;
    case DType::bf16: low_rank_piece<DType::bf16, Samples, kWidth>(p, c, begin, n, low_rank[0]); break;
    case DType::f16: low_rank_piece<DType::f16, Samples, kWidth>(p, c, begin, n, low_rank[0]); break;
  }
  float* y[Samples];
  for (int g = 0; g < Samples; ++g)
    y[g] = p.past_caches ? weights[g] : staging(p.out.dtype, element(p.out, first + g, begin), weights[g]);
  for_vectors(n, [&](ptrdiff_t i, auto extent) {
    const Floats mean = load(p.mean + begin + i, extent), m2 = load(p.m2 + begin + i, extent);
#pragma GCC unroll 8
    for (int g = 0; g < Samples; ++g) {
      const Floats weight =
          swag_element(mean, m2, load(z[g] + i, extent), load(low_rank[g] + i, extent), p.variance_scale);
      store(y[g] + i, weight, extent);
    }
  });
  for (int g = 0; g < Samples; ++g) {
    void* row = element(p.out, first + g, begin);
    if (p.past_caches) stream(p.out.dtype, y[g], n, halves, row);
    else narrow(p.out.dtype, y[g], n, row);
  }
}

void swag_sample(const SwagParameter& p, int64_t begin, int64_t n) {
  for (int64_t end = begin + n; begin < end; begin += kSwagPiece) {
    const ptrdiff_t count = end - begin < kSwagPiece ? end - begin : kSwagPiece;
    int64_t s = 0;
    for (; s + kSwagGroup <= p.samples; s += kSwagGroup) sample_piece<kSwagGroup>(p, s, begin, count);
    for (; s < p.samples; ++s) sample_piece<1>(p, s, begin, count);
  }
  _mm_sfence();
}

}  // namespace
