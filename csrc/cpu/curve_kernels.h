// Weights on a curve and their gradients, in pieces of a tensor that stay in L1: ops/curve.py has the contract.
#pragma once
#include "simd.h"

#include "../curve_math.h"  // after the overloads for lanes

namespace {

constexpr ptrdiff_t kCurvePiece = kTile / 2;
constexpr int kCurveWidth = 4;  // vectors at once, so that a bend's address is looked up once for all
constexpr ptrdiff_t kCurveAhead = 512;  // bytes; asked for early, the bends come a tenth faster from memory
constexpr ptrdiff_t kCurveSums = 64;  // partial sums of a product, in every instruction set

// ---- weights ----------------------------------------------------------------------------------------------

template <DType T, DType Out, int Width, class Extent>
LSF_INLINE void sum_vectors(const CurveSum& sum, int64_t from, void* out, ptrdiff_t i, Extent extent) {
  Floats total[Width] = {};
  for (int64_t j = 0; j < sum.count; ++j) {
    const float c = sum.coefficients[j];
#pragma GCC unroll 4
    for (int v = 0; v < Width; ++v) {
      const ptrdiff_t at = from + i + v * kLanes;
      const Floats bend = load_as<T>(sum.bends[j], at, extent);
      if (Width > 1) __builtin_prefetch((const char*)sum.bends[j] + (at * (T == DType::f32 ? 4 : 2) + kCurveAhead));
      total[v] = j == 0 ? curve_first(bend, c) : curve_next(total[v], bend, c);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < Width; ++v) store_as<Out>(out, i + v * kLanes, total[v], extent);
}

// `out` holds the n elements from `from` on.
template <DType T, DType Out> LSF_INLINE void sum_row(const CurveSum& sum, int64_t from, ptrdiff_t n, void* out) {
  constexpr ptrdiff_t kStep = kCurveWidth * kLanes;
  ptrdiff_t i = 0;
  for (; i + kStep <= n; i += kStep) sum_vectors<T, Out, kCurveWidth>(sum, from, out, i, Whole{});
  for (; i + kLanes <= n; i += kLanes) sum_vectors<T, Out, 1>(sum, from, out, i, Whole{});
  if (i < n) sum_vectors<T, Out, 1>(sum, from, out, i, Part{n - i});
}

template <DType T, DType Out> void sum_rows(const CurveSum& sum, int64_t begin, int64_t n) {
  constexpr ptrdiff_t kSize = Out == DType::f32 ? 4 : 2;
  char* out = (char*)sum.out.data;
  if (!sum.past_caches) return sum_row<T, Out>(sum, begin, n, out);
  alignas(64) char staged[kCurvePiece * kSize];
  for (int64_t done = 0; done < n; done += kCurvePiece) {
    const ptrdiff_t count = n - done < kCurvePiece ? n - done : kCurvePiece;
    sum_row<T, Out>(sum, begin + done, count, staged);
    stream(staged, count * kSize, out + done * kSize);
  }
  _mm_sfence();
}

template <DType T> void sum_rows_as(const CurveSum& sum, int64_t begin, int64_t n) {
  switch (sum.out.dtype) {
    case DType::f32: return sum_rows<T, DType::f32>(sum, begin, n);
    case DType::bf16: return sum_rows<T, DType::bf16>(sum, begin, n);
    case DType::f16: return sum_rows<T, DType::f16>(sum, begin, n);
  }
}

void curve_sum(const CurveSum& sum, int64_t begin, int64_t n) {
  switch (sum.dtype) {
    case DType::f32: return sum_rows_as<DType::f32>(sum, begin, n);
    case DType::bf16: return sum_rows_as<DType::bf16>(sum, begin, n);
    case DType::f16: return sum_rows_as<DType::f16>(sum, begin, n);
  }
}

// ---- the gradient of a coefficient ------------------------------------------------------------------------

// Element i goes to partial sum i mod 64, whatever the lanes, so that every instruction set rounds alike.
template <DType G, DType T> LSF_INLINE double product_of(const void* grad, const void* bend, ptrdiff_t from, ptrdiff_t n) {
  constexpr int kVectors = kCurveSums / kLanes;
  Floats sums[kVectors] = {};
  const auto add = [&](Floats& sum, ptrdiff_t i, auto extent) {
    sum = curve_dot(sum, load_as<G>(grad, i, extent), load_as<T>(bend, i, extent));
  };
  const ptrdiff_t end = from + n;
  ptrdiff_t i = from;
  for (; i + kCurveSums <= end; i += kCurveSums)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) add(sums[v], i + v * kLanes, Whole{});
  for (int v = 0; i < end; ++v, i += kLanes) {
    if (i + kLanes <= end) add(sums[v], i, Whole{});
    else add(sums[v], i, Part{end - i});
  }
  float lanes[kCurveSums];
  for (int v = 0; v < kVectors; ++v) store(lanes + v * kLanes, sums[v]);
  double totals[8] = {}, total = 0;
  for (ptrdiff_t k = 0; k < kCurveSums; k += 8)
    for (int l = 0; l < 8; ++l) totals[l] += lanes[k + l];
  for (int l = 0; l < 8; ++l) total += totals[l];
  return total;
}

template <DType G, DType T> double product_of_rows(int64_t n, const void* grad, const void* bend) {
  double total = 0;
  for (int64_t from = 0; from < n; from += kTile)
    total += product_of<G, T>(grad, bend, from, n - from < kTile ? n - from : kTile);
  return total;
}

template <DType T> double product_with(int64_t n, Array grad, const void* bend) {
  if (grad.dtype == DType::f32) return product_of_rows<DType::f32, T>(n, grad.data, bend);
  return product_of_rows<T, T>(n, grad.data, bend);
}

double curve_product(int64_t n, Array grad, Array bend) {
  switch (bend.dtype) {
    case DType::f32: return product_with<DType::f32>(n, grad, bend.data);
    case DType::bf16: return product_with<DType::bf16>(n, grad, bend.data);
    case DType::f16: return product_with<DType::f16>(n, grad, bend.data);
  }
  return 0;
}

}  // namespace
