// Noise of one tile into an L1 buffer, for every kernel that consumes noise; and its plain copy.
#pragma once
#include "simd.h"

namespace {

constexpr ptrdiff_t kCounters = 2 * kLanes;  // per step: two vectors, whose latencies overlap

// The buffer of a tile's noise: rows of whole quads, so that a row may start inside a quad.
struct TileNoise {
  alignas(64) float data[kTile * 4 + 8 * kCounters];
  ptrdiff_t stride;  // floats per row
  ptrdiff_t skip;    // columns before the tile's first one in its quad
  const float* row(int64_t r) const { return data + r * stride + skip; }
};

// Words (w0, w1) give columns 4q and 4q + 1, words (w2, w3) columns 4q + 2 and 4q + 3.
LSF_INLINE void store_quads(float* out, Floats n0, Floats n1, Floats n2, Floats n3) {
#if LSF_LANES == 16
  const __m512 a = (__m512)n0, b = (__m512)n1, c = (__m512)n2, d = (__m512)n3;
  const __m512 ab_lo = _mm512_unpacklo_ps(a, b), ab_hi = _mm512_unpackhi_ps(a, b);
  const __m512 cd_lo = _mm512_unpacklo_ps(c, d), cd_hi = _mm512_unpackhi_ps(c, d);
  // q[j] holds the quads of lanes j, j + 4, j + 8, j + 12.
  const __m512 q0 = _mm512_shuffle_ps(ab_lo, cd_lo, 0x44), q1 = _mm512_shuffle_ps(ab_lo, cd_lo, 0xEE);
  const __m512 q2 = _mm512_shuffle_ps(ab_hi, cd_hi, 0x44), q3 = _mm512_shuffle_ps(ab_hi, cd_hi, 0xEE);
  const __m512 s01_lo = _mm512_shuffle_f32x4(q0, q1, 0x44), s01_hi = _mm512_shuffle_f32x4(q0, q1, 0xEE);
  const __m512 s23_lo = _mm512_shuffle_f32x4(q2, q3, 0x44), s23_hi = _mm512_shuffle_f32x4(q2, q3, 0xEE);
  _mm512_storeu_ps(out, _mm512_shuffle_f32x4(s01_lo, s23_lo, 0x88));
  _mm512_storeu_ps(out + 16, _mm512_shuffle_f32x4(s01_lo, s23_lo, 0xDD));
  _mm512_storeu_ps(out + 32, _mm512_shuffle_f32x4(s01_hi, s23_hi, 0x88));
  _mm512_storeu_ps(out + 48, _mm512_shuffle_f32x4(s01_hi, s23_hi, 0xDD));
#elif LSF_LANES == 8
  const __m256 a = (__m256)n0, b = (__m256)n1, c = (__m256)n2, d = (__m256)n3;
  const __m256 ab_lo = _mm256_unpacklo_ps(a, b), ab_hi = _mm256_unpackhi_ps(a, b);
  const __m256 cd_lo = _mm256_unpacklo_ps(c, d), cd_hi = _mm256_unpackhi_ps(c, d);
  const __m256 q0 = _mm256_shuffle_ps(ab_lo, cd_lo, 0x44), q1 = _mm256_shuffle_ps(ab_lo, cd_lo, 0xEE);
  const __m256 q2 = _mm256_shuffle_ps(ab_hi, cd_hi, 0x44), q3 = _mm256_shuffle_ps(ab_hi, cd_hi, 0xEE);
  _mm256_storeu_ps(out, _mm256_permute2f128_ps(q0, q1, 0x20));
  _mm256_storeu_ps(out + 8, _mm256_permute2f128_ps(q2, q3, 0x20));
  _mm256_storeu_ps(out + 16, _mm256_permute2f128_ps(q0, q1, 0x31));
  _mm256_storeu_ps(out + 24, _mm256_permute2f128_ps(q2, q3, 0x31));
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    out[4 * lane] = n0[lane];
    out[4 * lane + 1] = n1[lane];
    out[4 * lane + 2] = n2[lane];
    out[4 * lane + 3] = n3[lane];
  }
#endif
}

LSF_INLINE Words lane_index() {
  Words x;
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = lane;
  return x;
}

// Two vectors in step, so that the latencies of one hide behind the other.
struct TwoWords {
  Words a, b;
};
struct TwoFloats {
  Floats a, b;
};
#define LSF_TWO(T, op, R) \
  LSF_INLINE T operator op(T x, R y) { return {x.a op y, x.b op y}; } \
  LSF_INLINE T operator op(T x, T y) { return {x.a op y.a, x.b op y.b}; }
LSF_TWO(TwoWords, ^, uint32_t)
LSF_TWO(TwoWords, +, uint32_t)
LSF_TWO(TwoWords, -, uint32_t)
LSF_TWO(TwoWords, <<, int)
LSF_TWO(TwoFloats, *, float)
LSF_TWO(TwoFloats, -, float)
#undef LSF_TWO
LSF_INLINE void mul_hi_lo(TwoWords x, uint32_t m, TwoWords& hi, TwoWords& lo) {
  mul_hi_lo(x.a, m, hi.a, lo.a);
  mul_hi_lo(x.b, m, hi.b, lo.b);
}
LSF_INLINE TwoFloats to_float(TwoWords x) { return {to_float(x.a), to_float(x.b)}; }
LSF_INLINE TwoFloats signed_to_float(TwoWords x) { return {signed_to_float(x.a), signed_to_float(x.b)}; }
LSF_INLINE TwoWords shift_right_signed(TwoWords x, int n) { return {shift_right_signed(x.a, n), shift_right_signed(x.b, n)}; }
LSF_INLINE TwoWords bits_of(TwoFloats x) { return {bits_of(x.a), bits_of(x.b)}; }
LSF_INLINE TwoFloats float_of(TwoWords x) { return {float_of(x.a), float_of(x.b)}; }
LSF_INLINE TwoFloats fused_mul_add(TwoFloats x, TwoFloats y, TwoFloats z) {
  return {fused_mul_add(x.a, y.a, z.a), fused_mul_add(x.b, y.b, z.b)};
}
LSF_INLINE TwoFloats sqrt_rn(TwoFloats x) { return {sqrt_rn(x.a), sqrt_rn(x.b)}; }
LSF_INLINE TwoFloats xor_sign(TwoFloats x, TwoWords y) { return {xor_sign(x.a, y.a), xor_sign(x.b, y.b)}; }
LSF_INLINE TwoFloats select_by_sign(TwoWords s, TwoFloats x, TwoFloats y) {
  return {select_by_sign(s.a, x.a, y.a), select_by_sign(s.b, x.b, y.b)};
}
template <> LSF_INLINE TwoFloats constant<TwoFloats>(float x) { return {splat(x), splat(x)}; }
}
#include "../philox.h"
namespace {

// The ten round keys, in memory for broadcasting loads.
struct KeyTable {
  PhiloxKey keys[10];
  explicit KeyTable(uint64_t seed) {
    const PhiloxKey key = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    for (int r = 0; r < 10; ++r) keys[r] = key.round(r);
  }
  LSF_INLINE PhiloxKey round(int r) const { return keys[r]; }
};

LSF_INLINE void store_normals(float* out, Words w0, Words w1, Words w2, Words w3) {
  TwoFloats even, odd;
  box_muller<TwoFloats, TwoWords>({w0, w2}, {w1, w3}, even, odd);
  store_quads(out, even.a, odd.a, even.b, odd.b);
}

// Fills the buffer with the tile's noise. Lanes walk the quads row by row, across row ends, so that
// narrow matrices waste no lane.
LSF_INLINE void draw(NoiseStream stream, Tile tile, TileNoise& noise) {
  const uint64_t first_col = stream.col_offset + tile.col;
  const uint64_t first_row = stream.row_offset + tile.row;
  const uint32_t first_quad = (uint32_t)(first_col >> 2);
  noise.skip = first_col & 3;
  const ptrdiff_t quads = (noise.skip + tile.cols + 3) / 4;
  noise.stride = 4 * quads;
  const KeyTable keys(stream.seed);
  const Words index = lane_index();
  const ptrdiff_t total = quads * tile.rows;
  const TwoWords sample = {splat(stream.sample), splat(stream.sample)};
  ptrdiff_t r = 0, q = 0;  // row and quad of the first lane
  for (ptrdiff_t done = 0; done < total; done += kCounters) {
    TwoWords quad, row_low, row_high;
    if (q + kCounters <= quads) {
      const uint64_t row = first_row + r;
      quad.a = index + (uint32_t)(first_quad + q);
      quad.b = quad.a + (uint32_t)kLanes;
      row_low.a = row_low.b = splat((uint32_t)row);
      row_high.a = row_high.b = splat((uint32_t)(row >> 32));
      q += kCounters;
      if (q == quads) q = 0, ++r;
    } else {
      uint32_t next[3][kCounters];
      for (int lane = 0; lane < kCounters; ++lane) {
        const uint64_t row = first_row + r;
        next[0][lane] = (uint32_t)(first_quad + q);
        next[1][lane] = (uint32_t)row;
        next[2][lane] = (uint32_t)(row >> 32);
        if (++q == quads) q = 0, ++r;
      }
      memcpy(&quad, next[0], sizeof quad);
      memcpy(&row_low, next[1], sizeof quad);
      memcpy(&row_high, next[2], sizeof quad);
    }
    const PhiloxWords<TwoWords> w = philox4x32_10(PhiloxWords<TwoWords>{quad, row_low, row_high, sample}, keys);
    store_normals(noise.data + 4 * done, w.w0.a, w.w1.a, w.w2.a, w.w3.a);
    store_normals(noise.data + 4 * (done + kLanes), w.w0.b, w.w1.b, w.w2.b, w.w3.b);
  }
}

void philox_normal(NoiseStream stream, Tile tile, Matrix out) {
  TileNoise noise;
  draw(stream, tile, noise);
  for (int64_t r = 0; r < tile.rows; ++r) {
    void* row = element(out, tile.row + r, tile.col);
    const float* eps = noise.row(r);
    if (out.dtype == DType::f32) memcpy(row, eps, 4 * tile.cols);
    else narrow(out.dtype, eps, tile.cols, row);
  }
}

void philox_words(uint64_t seed, const int64_t* counters, int64_t n, int64_t* out) {
  const KeyTable keys(seed);
  for (int64_t i = 0; i < n; i += kLanes) {
    PhiloxWords<Words> c = {};
    for (int lane = 0; lane < kLanes && i + lane < n; ++lane) {
      const int64_t* p = counters + 4 * (i + lane);
      c.w0[lane] = (uint32_t)p[0], c.w1[lane] = (uint32_t)p[1], c.w2[lane] = (uint32_t)p[2], c.w3[lane] = (uint32_t)p[3];
    }
    c = philox4x32_10(c, keys);
    for (int lane = 0; lane < kLanes && i + lane < n; ++lane) {
      int64_t* p = out + 4 * (i + lane);
      p[0] = c.w0[lane], p[1] = c.w1[lane], p[2] = c.w2[lane], p[3] = c.w3[lane];
    }
  }
}

}  // namespace
