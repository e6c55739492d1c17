// Lanes of one instruction set: vector types and the primitives of scalar.h on them.
//
// Included once by each isa_*.cpp, which first defines LSF_ISA (the name of its table) and LSF_LANES (4, 8 or 16)
// and opens the compiler's target. No STL, no ATen: a weak symbol compiled for AVX-512 here could be
// picked by the linker for everybody.
#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <string.h>

#include "../scalar.h"
#include "kernels.h"

namespace {

constexpr int kLanes = LSF_LANES;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
// Words in 64-bit lanes, where a product keeps both its halves: the word is the lower half, the upper is arbitrary.
typedef uint64_t WideWords __attribute__((vector_size(4 * kLanes)));

LSF_INLINE Words bits_of(Floats x) { return reinterpret_cast<Words>(x); }
LSF_INLINE Floats float_of(Words x) { return reinterpret_cast<Floats>(x); }
LSF_INLINE Floats splat(float x) { return x - Floats{}; }  // x - 0, not 0 + x: keeps -0
LSF_INLINE Words splat(uint32_t x) { return x + Words{}; }
LSF_INLINE Words shift_right_signed(Words x, int bits) {
  return reinterpret_cast<Words>(reinterpret_cast<Ints>(x) >> bits);
}
LSF_INLINE Floats signed_to_float(Words x) {
  return __builtin_convertvector(reinterpret_cast<Ints>(x), Floats);
}
LSF_INLINE Floats xor_sign(Floats x, Words sign) { return float_of(bits_of(x) ^ (sign & 0x80000000u)); }
LSF_INLINE Floats load(const float* p) {
  Floats x;
  memcpy(&x, p, sizeof x);
  return x;
}
LSF_INLINE void store(float* p, Floats x) { memcpy(p, &x, sizeof x); }

#if LSF_LANES == 16
LSF_INLINE Floats fused_mul_add(Floats a, Floats b, Floats c) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
LSF_INLINE Floats sqrt_rn(Floats x) { return (Floats)_mm512_sqrt_ps((__m512)x); }
LSF_INLINE void store_past_caches(void* p, Floats x) { _mm512_stream_ps((float*)p, (__m512)x); }  // p is aligned
LSF_INLINE Floats to_float(Words x) { return __builtin_convertvector(x, Floats); }
LSF_INLINE void quarter_turn(Words turn, Floats& x, Floats& y) {
  const __mmask16 turns = _mm512_test_epi32_mask((__m512i)turn, _mm512_set1_epi32(1 << 30));
  const __m512 before = (__m512)x;
  x = (Floats)_mm512_mask_xor_ps(before, turns, (__m512)y, _mm512_set1_ps(-0.0f));
  y = (Floats)_mm512_mask_blend_ps(turns, (__m512)y, before);
}
LSF_INLINE void split_exponent(Floats u, Floats& mantissa, Floats& exponent) {
  mantissa = (Floats)_mm512_getmant_ps((__m512)u, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  exponent = (Floats)_mm512_getexp_ps((__m512)float_of(bits_of(u) + 0x00400000u));  // 3/2 carries into it
}
LSF_INLINE Floats maximum(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
LSF_INLINE Floats minimum(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
LSF_INLINE WideWords product(WideWords a, uint32_t m) {
  return (WideWords)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
}
LSF_INLINE Words interleave(WideWords low, WideWords high) {
  return (Words)_mm512_mask_shuffle_epi32((__m512i)low, 0xAAAA, (__m512i)high, _MM_PERM_CCAA);
}
LSF_INLINE Floats unpack_low(Floats a, Floats b) { return (Floats)_mm512_unpacklo_ps((__m512)a, (__m512)b); }
LSF_INLINE Floats unpack_high(Floats a, Floats b) { return (Floats)_mm512_unpackhi_ps((__m512)a, (__m512)b); }
LSF_INLINE Floats from_half(const uint16_t* p) {
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
LSF_INLINE void to_half(Floats x, uint16_t* p) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
#elif LSF_LANES == 8
LSF_INLINE Floats fused_mul_add(Floats a, Floats b, Floats c) {
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
LSF_INLINE Floats sqrt_rn(Floats x) { return (Floats)_mm256_sqrt_ps((__m256)x); }
LSF_INLINE void store_past_caches(void* p, Floats x) { _mm256_stream_ps((float*)p, (__m256)x); }
LSF_INLINE Floats to_float(Words x) {  // high half exact, low half added in one rounding
  return fused_mul_add(signed_to_float(x >> 16), splat(65536.0f), signed_to_float(x & 0xFFFFu));
}
LSF_INLINE void quarter_turn(Words turn, Floats& x, Floats& y) {
  const __m256 sign = (__m256)(turn << 1);
  const Floats before = x;
  x = (Floats)_mm256_blendv_ps((__m256)before, (__m256)-y, sign);
  y = (Floats)_mm256_blendv_ps((__m256)y, (__m256)before, sign);
}
LSF_INLINE Floats maximum(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
LSF_INLINE Floats minimum(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
LSF_INLINE WideWords product(WideWords a, uint32_t m) {
  return (WideWords)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
}
LSF_INLINE Words interleave(WideWords low, WideWords high) {
  return (Words)_mm256_blend_epi32((__m256i)low, (__m256i)(high << 32), 0xAA);
}
LSF_INLINE Floats unpack_low(Floats a, Floats b) { return (Floats)_mm256_unpacklo_ps((__m256)a, (__m256)b); }
LSF_INLINE Floats unpack_high(Floats a, Floats b) { return (Floats)_mm256_unpackhi_ps((__m256)a, (__m256)b); }
LSF_INLINE Floats from_half(const uint16_t* p) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
LSF_INLINE void to_half(Floats x, uint16_t* p) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#else  // any x86-64: lane by lane where SSE2 has no instruction; libm's fmaf rounds once everywhere
// A call, because inlined into every formula these four took the compiler minutes.
__attribute__((noinline)) Floats fused_mul_add(Floats a, Floats b, Floats c) {
  for (int i = 0; i < kLanes; ++i) c[i] = fmaf(a[i], b[i], c[i]);
  return c;
}
LSF_INLINE Floats sqrt_rn(Floats x) { return (Floats)_mm_sqrt_ps((__m128)x); }
LSF_INLINE void store_past_caches(void* p, Floats x) { _mm_stream_ps((float*)p, (__m128)x); }
LSF_INLINE Floats to_float(Words x) {
  Floats y;
  for (int i = 0; i < kLanes; ++i) y[i] = to_float(x[i]);
  return y;
}
LSF_INLINE Floats minimum(Floats a, Floats b) { return (Floats)_mm_min_ps((__m128)a, (__m128)b); }
LSF_INLINE void quarter_turn(Words turn, Floats& x, Floats& y) {
  const Ints turns = reinterpret_cast<Ints>(turn << 1) < 0;
  const Floats before = x;
  x = turns ? -y : before;
  y = turns ? before : y;
}
LSF_INLINE Floats maximum(Floats a, Floats b) { return (Floats)_mm_max_ps((__m128)a, (__m128)b); }
LSF_INLINE WideWords product(WideWords a, uint32_t m) {
  return (WideWords)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
}
LSF_INLINE Words interleave(WideWords low, WideWords high) { return (Words)((low & 0xFFFFFFFFu) | high << 32); }
LSF_INLINE Floats unpack_low(Floats a, Floats b) { return (Floats)_mm_unpacklo_ps((__m128)a, (__m128)b); }
LSF_INLINE Floats unpack_high(Floats a, Floats b) { return (Floats)_mm_unpackhi_ps((__m128)a, (__m128)b); }
LSF_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
  if (magnitude >= 0x7C00u) return float_of(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));  // rebias, subnormals too
}
LSF_INLINE uint16_t float_to_half(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u, magnitude = bits_of(x) & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return (uint16_t)(sign | 0x7E00u | (magnitude >> 13 & 0x3FFu));
  if (magnitude >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u);
  if (magnitude < 0x38800000u)  // subnormal: the adder rounds at the last half bit
    return (uint16_t)(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u));
  return (uint16_t)(sign | (magnitude + 0xFFFu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13);
}
LSF_INLINE Floats from_half(const uint16_t* p) {
  Floats x;
  for (int i = 0; i < kLanes; ++i) x[i] = half_to_float(p[i]);
  return x;
}
LSF_INLINE void to_half(Floats x, uint16_t* p) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(x[i]);
}
#endif

#if LSF_LANES != 16
LSF_INLINE void split_exponent(Floats u, Floats& mantissa, Floats& exponent) {
  const Words offset = bits_of(u) - 0x3F400000u;  // bits of 3/4
  mantissa = float_of(bits_of(u) - (offset & 0xFF800000u));
  exponent = signed_to_float(shift_right_signed(offset, 23));
}
#endif
LSF_INLINE void mul_hi_lo(WideWords a, uint32_t m, WideWords& hi, WideWords& lo) {
  lo = product(a, m);
  hi = lo >> 32;
}

LSF_INLINE Floats from_bfloat(const uint16_t* p) {
#if LSF_LANES == 16
  return float_of((Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);
#elif LSF_LANES == 8
  return float_of((Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
  typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));
  Shorts x;
  memcpy(&x, p, sizeof x);
  return float_of(__builtin_convertvector(x, Words) << 16);
#endif
}
LSF_INLINE void to_bfloat(Floats x, uint16_t* p) {  // nearest even; NaN stays NaN
  typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));
  const Words bits = bits_of(x);
  const Words rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  const Words quiet = bits >> 16 | 0x40u;
  const Ints is_nan = x != x;
  const Shorts out = __builtin_convertvector(is_nan ? quiet : rounded, Shorts);
  memcpy(p, &out, sizeof out);
}

// ---- rows: whole vectors, then one partial vector that never touches memory past the end -----------
struct Whole {};
struct Part {
  ptrdiff_t n;
};
LSF_INLINE Floats load(const float* p, Whole) { return load(p); }
LSF_INLINE void store(float* p, Floats x, Whole) { store(p, x); }
#if LSF_LANES == 16
LSF_INLINE Floats load(const float* p, Part part) {
  return (Floats)_mm512_maskz_loadu_ps((__mmask16)((1u << part.n) - 1), p);
}
LSF_INLINE void store(float* p, Floats x, Part part) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << part.n) - 1), (__m512)x);
}
#elif LSF_LANES == 8
LSF_INLINE __m256i lanes_of(Part part) { return (__m256i)((Ints){0, 1, 2, 3, 4, 5, 6, 7} < (int32_t)part.n); }
LSF_INLINE Floats load(const float* p, Part part) { return (Floats)_mm256_maskload_ps(p, lanes_of(part)); }
LSF_INLINE void store(float* p, Floats x, Part part) { _mm256_maskstore_ps(p, lanes_of(part), (__m256)x); }
#else
LSF_INLINE Floats load(const float* p, Part part) {
  Floats x = {};
  for (ptrdiff_t i = 0; i < part.n; ++i) x[i] = p[i];
  return x;
}
LSF_INLINE void store(float* p, Floats x, Part part) {
  for (ptrdiff_t i = 0; i < part.n; ++i) p[i] = x[i];
}
#endif

// body(i, extent) for every vector of a row of n; load and store take the extent.
template <class Body> LSF_INLINE void for_vectors(ptrdiff_t n, Body body) {
  ptrdiff_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, Whole{});
  if (i < n) body(i, Part{n - i});
}

LSF_INLINE void* element(Matrix m, int64_t row, int64_t col) {
  return (char*)m.data + (row * m.stride + col) * (m.dtype == DType::f32 ? 4 : 2);
}

// A vector at element i of a row of dtype T, in registers all the way.
template <DType T> LSF_INLINE Floats load_as(const void* row, ptrdiff_t i, Whole) {
  if constexpr (T == DType::f32) return load((const float*)row + i);
  else if constexpr (T == DType::bf16) return from_bfloat((const uint16_t*)row + i);
  else return from_half((const uint16_t*)row + i);
}
template <DType T> LSF_INLINE Floats load_as(const void* row, ptrdiff_t i, Part part) {
  if constexpr (T == DType::f32) return load((const float*)row + i, part);
  else {
    uint16_t padded[kLanes] = {};
    memcpy(padded, (const uint16_t*)row + i, 2 * part.n);
    return load_as<T>(padded, 0, Whole{});
  }
}
template <DType T> LSF_INLINE void store_as(void* row, ptrdiff_t i, Floats x, Whole) {
  if constexpr (T == DType::f32) store((float*)row + i, x);
  else if constexpr (T == DType::bf16) to_bfloat(x, (uint16_t*)row + i);
  else to_half(x, (uint16_t*)row + i);
}
template <DType T> LSF_INLINE void store_as(void* row, ptrdiff_t i, Floats x, Part part) {
  if constexpr (T == DType::f32) store((float*)row + i, x, part);
  else {
    uint16_t padded[kLanes];
    store_as<T>(padded, 0, x, Whole{});
    memcpy((uint16_t*)row + i, padded, 2 * part.n);
  }
}

// A row stored in any dtype, as fp32: the row itself, or its copy in scratch.
LSF_INLINE const float* widen(DType t, const void* row, ptrdiff_t n, float* scratch) {
  if (t == DType::f32) return (const float*)row;
  const uint16_t* p = (const uint16_t*)row;
  ptrdiff_t i = 0;
  uint16_t last[kLanes] = {};
  if (t == DType::bf16) {
    for (; i + kLanes <= n; i += kLanes) store(scratch + i, from_bfloat(p + i));
    for (ptrdiff_t j = i; j < n; ++j) last[j - i] = p[j];
    if (i < n) store(scratch + i, from_bfloat(last), Part{n - i});
  } else {
    for (; i + kLanes <= n; i += kLanes) store(scratch + i, from_half(p + i));
    for (ptrdiff_t j = i; j < n; ++j) last[j - i] = p[j];
    if (i < n) store(scratch + i, from_half(last), Part{n - i});
  }
  return scratch;
}
// Where a row's fp32 results go before `narrow` rounds them: the row itself, or scratch.
LSF_INLINE float* staging(DType t, void* row, float* scratch) {
  return t == DType::f32 ? (float*)row : scratch;
}
LSF_INLINE void narrow(DType t, const float* staged, ptrdiff_t n, void* row) {
  if (t == DType::f32) return;
  uint16_t* p = (uint16_t*)row;
  ptrdiff_t i = 0;
  uint16_t last[kLanes];
  if (t == DType::bf16) {
    for (; i + kLanes <= n; i += kLanes) to_bfloat(load(staged + i), p + i);
    if (i < n) to_bfloat(load(staged + i, Part{n - i}), last);
  } else {
    for (; i + kLanes <= n; i += kLanes) to_half(load(staged + i), p + i);
    if (i < n) to_half(load(staged + i, Part{n - i}), last);
  }
  for (ptrdiff_t j = i; j < n; ++j) p[j] = last[j - i];
}

// Copies past the caches, for a result that is not read soon. The caller ends with a fence: _mm_sfence.
LSF_INLINE void stream(const void* from, size_t bytes, void* to) {
  constexpr size_t kLine = 64;
  const size_t head = -(size_t)to % kLine, first = head < bytes ? head : bytes;
  memcpy(to, from, first);
  size_t i = first;
  for (; i + kLine <= bytes; i += kLine)
    for (size_t part = i; part < i + kLine; part += sizeof(Floats)) {
      Floats x;
      memcpy(&x, (const char*)from + part, sizeof x);
      store_past_caches((char*)to + part, x);
    }
  memcpy((char*)to + i, (const char*)from + i, bytes - i);
}
// A row of fp32 results into memory of any dtype, past the caches; scratch holds the row in 16 bits.
LSF_INLINE void stream(DType t, const float* staged, ptrdiff_t n, uint16_t* scratch, void* row) {
  narrow(t, staged, n, scratch);
  if (t == DType::f32) stream(staged, 4 * n, row);
  else stream(scratch, 2 * n, row);
}

// Calls compute(in vectors, out vectors) over n elements, chunk by chunk, through fp32 buffers where needed.
template <int kIn, int kOut, class Compute>
LSF_INLINE void map_chunks(int64_t n, const Array* in, const Array* out, Compute compute) {
  constexpr int64_t kChunk = kTile / 4;
  float in_buffer[kIn][kChunk], out_buffer[kOut][kChunk];
  for (int64_t done = 0; done < n; done += kChunk) {
    const int64_t count = n - done < kChunk ? n - done : kChunk;
    const float* a[kIn];
    void* results[kOut];
    float* b[kOut];
    for (int k = 0; k < kIn; ++k)
      a[k] = widen(in[k].dtype, element({in[k].data, 0, in[k].dtype}, 0, done), count, in_buffer[k]);
    for (int k = 0; k < kOut; ++k) {
      results[k] = element({out[k].data, 0, out[k].dtype}, 0, done);
      b[k] = staging(out[k].dtype, results[k], out_buffer[k]);
    }
    for_vectors(count, [&](ptrdiff_t i, auto extent) {
      Floats x[kIn], y[kOut];
      for (int k = 0; k < kIn; ++k) x[k] = load(a[k] + i, extent);
      compute(x, y);
      for (int k = 0; k < kOut; ++k) store(b[k] + i, y[k], extent);
    });
    for (int k = 0; k < kOut; ++k) narrow(out[k].dtype, b[k], count, results[k]);
  }
}

}  // namespace
