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
    if (!deviation.data) continue;
    void* row = element({deviation.data, 0, deviation.dtype}, 0, done);
    stream(deviation.dtype, deviations, count, halves, row);
  }
  _mm_sfence();
}

// ---- sampling ---------------------------------------------------------------------------------------------

// Samples drawn together, and vectors of each: their sums, the columns' vectors and a coefficient fit the registers.
constexpr int kSwagGroup = 6;
template <int Samples> constexpr int kSwagWidth = Samples == 1 ? 8 : kLanes == 16 ? 4 : 2;
constexpr ptrdiff_t kSwagNoise = kSwagPiece + 16;  // noise starts inside a quad and ends with a whole one

// What the vectors of a piece share: its first element, and each sample's coefficients, noise and results.
template <int Samples> struct SwagPiece {
  int64_t begin;
  const float* coefficients;
  const float* noise[Samples];
  float* weights[Samples];
};

// `Width` vectors at i. One sample waits for memory, so it asks for the next vectors ahead; more wait for the fmas.
template <DType T, int Samples, int Width, class Extent>
LSF_INLINE void sample_vectors(const SwagParameter& p, const SwagPiece<Samples>& piece, ptrdiff_t i, Extent extent) {
  constexpr ptrdiff_t kAhead = Width * kLanes, kSize = T == DType::f32 ? 4 : 2;
  const float *mean = p.mean + piece.begin + i, *m2 = p.m2 + piece.begin + i;
  const char* column = (const char*)element(p.columns, 0, piece.begin + i);
  Floats low_rank[Samples][Width] = {};
  for (int64_t j = 0; j < p.rank; ++j, column += p.columns.stride * kSize) {
    Floats d[Width];
#pragma GCC unroll 8
    for (int v = 0; v < Width; ++v) {
      d[v] = load_as<T>(column, v * kLanes, extent);
      if (Samples == 1) __builtin_prefetch(column + (v * kLanes + kAhead) * kSize);
    }
#pragma GCC unroll 8
    for (int g = 0; g < Samples; ++g) {
      const Floats c = splat(piece.coefficients[g * p.rank + j]);
#pragma GCC unroll 8
      for (int v = 0; v < Width; ++v) low_rank[g][v] = fused_mul_add(c, d[v], low_rank[g][v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < Width; ++v) {
    const ptrdiff_t at = v * kLanes;
    const Floats centre = load(mean + at, extent), squares = load(m2 + at, extent);
    if (Samples == 1) __builtin_prefetch(mean + at + kAhead), __builtin_prefetch(m2 + at + kAhead);
#pragma GCC unroll 8
    for (int g = 0; g < Samples; ++g) {
      const Floats z = load(piece.noise[g] + i + at, extent);
      store(piece.weights[g] + i + at, swag_element(centre, squares, z, low_rank[g][v], p.variance_scale), extent);
    }
  }
}

template <DType T, int Samples>
LSF_INLINE void sample_rows(const SwagParameter& p, const SwagPiece<Samples>& piece, ptrdiff_t n) {
  constexpr int kWidth = kSwagWidth<Samples>;
  ptrdiff_t i = 0;
  for (; i + kWidth * kLanes <= n; i += kWidth * kLanes) sample_vectors<T, Samples, kWidth>(p, piece, i, Whole{});
  for (; i + kLanes <= n; i += kLanes) sample_vectors<T, Samples, 1>(p, piece, i, Whole{});
  if (i < n) sample_vectors<T, Samples, 1>(p, piece, i, Part{n - i});
}

// The noise of elements [begin, begin + n) of sample s, in a buffer of kSwagNoise.
LSF_INLINE const float* draw_elements(const SwagParameter& p, int64_t s, int64_t begin, ptrdiff_t n, float* buffer) {
  NoiseStream noise = p.noise;
  noise.sample += (uint32_t)s;
  const auto column = [&](int64_t i) { return i / p.run * p.stride + i % p.run; };
  if (begin % p.run + n <= p.run) {
    draw_quads(noise, Tile{0, 1, column(begin), n}, buffer);
    return buffer + ((noise.col_offset + column(begin)) & 3);
  }
  float quads[kSwagNoise];
  for (int64_t i = begin, count; i < begin + n; i += count) {
    const int64_t left = p.run - i % p.run;
    count = left < begin + n - i ? left : begin + n - i;
    draw_quads(noise, Tile{0, 1, column(i), count}, quads);
    memcpy(buffer + (i - begin), quads + ((noise.col_offset + column(i)) & 3), 4 * count);
  }
  return buffer;
}

template <int Samples> LSF_INLINE void sample_piece(const SwagParameter& p, int64_t first, int64_t begin, ptrdiff_t n) {
  alignas(64) float noise[Samples][kSwagNoise], weights[Samples][kSwagPiece];
  alignas(64) uint16_t halves[kSwagPiece];
  SwagPiece<Samples> piece = {begin, p.coefficients + first * p.rank, {}, {}};
  // The first vectors of the columns come while the noise is drawn.
  for (int64_t j = 0; Samples == 1 && j < p.rank; ++j)
    for (int line = 0; line < 8; ++line) __builtin_prefetch((const char*)element(p.columns, j, begin) + 64 * line);
  for (int g = 0; g < Samples; ++g) {
    piece.noise[g] = draw_elements(p, first + g, begin, n, noise[g]);
    void* row = element(p.out, first + g, begin);
    piece.weights[g] = p.past_caches ? weights[g] : staging(p.out.dtype, row, weights[g]);
  }
  switch (p.columns.dtype) {
    case DType::f32: sample_rows<DType::f32>(p, piece, n); break;
    case DType::bf16: sample_rows<DType::bf16>(p, piece, n); break;
    case DType::f16: sample_rows<DType::f16>(p, piece, n); break;
  }
  for (int g = 0; g < Samples; ++g) {
    void* row = element(p.out, first + g, begin);
    if (p.past_caches) stream(p.out.dtype, weights[g], n, halves, row);
    else narrow(p.out.dtype, weights[g], n, row);
  }
}

void swag_sample(const SwagParameter& p, int64_t begin, int64_t n) {
  for (const int64_t end = begin + n; begin < end; begin += kSwagPiece) {
    const ptrdiff_t count = end - begin < kSwagPiece ? end - begin : kSwagPiece;
    int64_t s = 0;
    for (; s + kSwagGroup <= p.samples; s += kSwagGroup) sample_piece<kSwagGroup>(p, s, begin, count);
    for (; s < p.samples; ++s) sample_piece<1>(p, s, begin, count);
  }
  _mm_sfence();
}

}  // namespace
