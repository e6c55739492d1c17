// Running averages, one chunk of one tensor at a time.
#pragma once
#include "simd.h"

#include "../averaging_math.h"  // after the overloads for lanes

namespace {

// fp32 averages of half-precision values, which widen in registers: map_chunks would write them to L1 first, and that
// takes as long as all the rest.
template <Floats (*kWiden)(const uint16_t*)>
LSF_INLINE int64_t lerp_widening(LerpWeight w, int64_t n, const uint16_t* value, float* average) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(average + i, lerp_element(load(average + i), kWiden(value + i), w));
  return i;
}

void lerp(double weight, int64_t n, Array value, Array average) {
  const LerpWeight w = LerpWeight::of(weight);
  int64_t done = 0;
  if (average.dtype == DType::f32 && value.dtype == DType::bf16)
    done = lerp_widening<from_bfloat>(w, n, (const uint16_t*)value.data, (float*)average.data);
  if (average.dtype == DType::f32 && value.dtype == DType::f16)
    done = lerp_widening<from_half>(w, n, (const uint16_t*)value.data, (float*)average.data);
  const auto rest = [done](Array a) { return Array{element({a.data, 0, a.dtype}, 0, done), a.dtype}; };
  const Array in[] = {rest(average), rest(value)};
  map_chunks<2, 1>(n - done, in, in, [=](const Floats* x, Floats* y) { y[0] = lerp_element(x[0], x[1], w); });
}

}  // namespace
