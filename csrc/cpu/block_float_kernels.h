// Block floating point: mantissas of one block that share an exponent. ops/block_float.py has the contract.
#pragma once
#include "noise_kernels.h"

namespace {

constexpr ptrdiff_t kBlockPiece = kTile / 2;

// x 2^power is x times both factors, each of which fp32 holds.
struct PowerOfTwo {
  float first, second;
  explicit PowerOfTwo(int power) : first(factor(power >> 1)), second(factor(power - (power >> 1))) {}
  static float factor(int power) { return float_of((uint32_t)(power + 127) << 23); }
  LSF_INLINE Floats times(Floats x) const { return x * splat(first) * splat(second); }
};

uint32_t max_magnitude(int64_t n, Array x) {
  float buffer[kBlockPiece];
  Ints top = {};
  for (int64_t done = 0; done < n; done += kBlockPiece) {
    const int64_t count = n - done < kBlockPiece ? n - done : kBlockPiece;
    const float* p = widen(x.dtype, element({x.data, 0, x.dtype}, 0, done), count, buffer);
    for_vectors(count, [&](ptrdiff_t i, auto extent) {
      const Ints magnitude = reinterpret_cast<Ints>(bits_of(load(p + i, extent)) & 0x7FFFFFFFu);
      top = magnitude > top ? magnitude : top;
    });
  }
  int32_t result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result = top[lane] > result ? top[lane] : result;
  return (uint32_t)result;
}

template <class Int> LSF_INLINE void store_mantissas(Ints x, Int* p, Whole) {
  typedef Int Narrow __attribute__((vector_size(sizeof(Int) * kLanes)));
  const Narrow narrow = __builtin_convertvector(x, Narrow);
  memcpy(p, &narrow, sizeof narrow);
}
template <class Int> LSF_INLINE void store_mantissas(Ints x, Int* p, Part part) {
  for (ptrdiff_t i = 0; i < part.n; ++i) p[i] = (Int)x[i];
}

template <class Int>
LSF_INLINE void quantize(const NoiseStream* noise, int64_t n, Array x, int exponent, int word_length, Int* mantissa) {
  const PowerOfTwo scale(word_length - 2 - exponent);
  const int32_t highest = (1 << (word_length - 1)) - 1, lowest = -highest - (exponent < 127);
  float buffer[kBlockPiece], uniform[kBlockPiece + 16];
  for (int64_t done = 0; done < n; done += kBlockPiece) {
    const int64_t count = n - done < kBlockPiece ? n - done : kBlockPiece;
    const float* p = widen(x.dtype, element({x.data, 0, x.dtype}, 0, done), count, buffer);
    if (noise) draw_quads<Uniforms>(*noise, Tile{0, 1, done, count}, uniform);
    const float* u = uniform + (noise ? (noise->col_offset + done) & 3 : 0);
    for_vectors(count, [&](ptrdiff_t i, auto extent) {
      const Floats scaled = scale.times(load(p + i, extent));
      Ints whole = __builtin_convertvector(scaled, Ints);
      whole += __builtin_convertvector(whole, Floats) > scaled;  // from towards zero to the floor: true is -1
      const Floats missing = splat(1.0f) - (scaled - __builtin_convertvector(whole, Floats));
      whole -= (noise ? load(u + i, extent) : splat(0.5f)) >= missing;
      whole = whole > highest ? highest + Ints{} : whole < lowest ? lowest + Ints{} : whole;
      store_mantissas(whole, mantissa + done + i, extent);
    });
  }
}

void block_float_quantize(const NoiseStream* noise, int64_t n, Array x, int exponent, int word_length, void* mantissa) {
  if (word_length <= 8) quantize(noise, n, x, exponent, word_length, (int8_t*)mantissa);
  else quantize(noise, n, x, exponent, word_length, (int16_t*)mantissa);
}

template <class Int> LSF_INLINE void dequantize(int64_t n, const Int* mantissa, PowerOfTwo scale, float* out) {
  typedef Int Narrow __attribute__((vector_size(sizeof(Int) * kLanes)));
  for_vectors(n, [&](ptrdiff_t i, auto extent) {
    Narrow narrow = {};
    const ptrdiff_t left = n - i;
    memcpy(&narrow, mantissa + i, (left < kLanes ? left : kLanes) * sizeof(Int));
    store(out + i, scale.times(__builtin_convertvector(__builtin_convertvector(narrow, Ints), Floats)), extent);
  });
}

void block_float_dequantize(int64_t n, const void* mantissa, int exponent, int word_length, float* out) {
  const PowerOfTwo scale(exponent - word_length + 2);
  if (word_length <= 8) dequantize(n, (const int8_t*)mantissa, scale, out);
  else dequantize(n, (const int16_t*)mantissa, scale, out);
}

}  // namespace
