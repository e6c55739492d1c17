// The products of curve_linear at few rows: ops/curve_linear.py has the contract.
//
// One side of each is made on the fly and lies in a cache, the other is small; a library spends its time on packing
// there. (Reading the next bends ahead by prefetches while the cores multiply took twice as long: they hold fewer lines
// in flight than the hardware's own prefetching of the streams does.)
#pragma once
#include "simd.h"

#include "../curve_math.h"  // after the overloads for lanes

namespace {

template <int N> struct Count {
  static constexpr int value = N;
};
template <DType T> struct Of {
  static constexpr DType value = T;
};

constexpr int64_t kDepth = 128;  // of partial sums: the error of a sum of n grows with the longest chain of additions

// Without an instruction for it, an exact fma takes fifty times as long; no two backends share the bits of a product.
LSF_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if LSF_LANES == 4
  return a * b + c;
#else
  return fused_mul_add(a, b, c);
#endif
}

// R rows and V vectors of c; their sums stay in registers.
template <int R, int V> void product_tile(const SmallProduct& p, int64_t row, int64_t col) {
  const float* a = p.a + row * p.a_row;
  const float* b = p.b + col;
  float* c = p.c + row * p.c_row + col;
  Floats acc[R][V] = {};
  for (int64_t k = 0; k < p.depth; ++k, a += p.a_depth, b += p.b_row) {
    Floats x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Floats ar = splat(a[r * p.a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = multiply_add(ar, x[v], acc[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = c + r * p.c_row + v * kLanes;
      store(to, load(to) + acc[r][v]);
    }
}

// Registers: 24 of AVX-512's 32 hold sums, 12 of the others' 16.
#if LSF_LANES == 16
constexpr int kWidest = 4;
#else
constexpr int kWidest = 2;
#endif

template <int V> void product_columns(const SmallProduct& p, int64_t col) {
  int64_t row = 0;
  const auto tiles = [&](auto tile, int64_t rows) {
    for (; row + rows <= p.rows; row += rows) tile(p, row, col);
  };
  if constexpr (V < kWidest) tiles(product_tile<12, V>, 12);
  tiles(product_tile<6, V>, 6);
  tiles(product_tile<4, V>, 4);
  tiles(product_tile<2, V>, 2);
  tiles(product_tile<1, V>, 1);
}

void product_block(const SmallProduct& p) {
  int64_t col = 0;
  for (; col + kWidest * kLanes <= p.cols; col += kWidest * kLanes) product_columns<kWidest>(p, col);
  if constexpr (kWidest == 4)
    for (; col + 2 * kLanes <= p.cols; col += 2 * kLanes) product_columns<2>(p, col);
  for (; col + kLanes <= p.cols; col += kLanes) product_columns<1>(p, col);
}

void small_product(const SmallProduct& whole) {
  SmallProduct p = whole;
  for (int64_t done = 0; done < whole.depth; done += kDepth) {
    p.depth = whole.depth - done < kDepth ? whole.depth - done : kDepth;
    p.a = whole.a + done * whole.a_depth;
    p.b = whole.b + done * whole.b_row;
    product_block(p);
  }
}

// ---- at very few rows: the combined vectors go from registers to the product --------------------------------

constexpr int64_t kDotPiece = 8192;  // elements of a chain of partial sums

// Calls body(first vector's element, the Width combined vectors, extent) for the n elements from `begin` on.
template <DType T, class Body> LSF_INLINE void for_combined(const CurveSum& sum, int64_t begin, int64_t n, Body body) {
  constexpr int kWidth = 4;
  constexpr int64_t kAhead = 1024, kSize = T == DType::f32 ? 4 : 2;
  const auto combine = [&](int64_t i, auto extent, auto width) {
    constexpr int kVectors = decltype(width)::value;
    Floats total[kVectors] = {};
    for (int64_t j = 0; j < sum.count; ++j) {
      const float c = sum.coefficients[j];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = begin + i + v * kLanes;
        const Floats bend = load_as<T>(sum.bends[j], at, extent);
        if (kVectors > 1 && v * kLanes * kSize % 64 == 0)
          __builtin_prefetch((const char*)sum.bends[j] + at * kSize + kAhead);
        total[v] = j == 0 ? curve_first(bend, c) : curve_next(total[v], bend, c);
      }
    }
    body(i, total, extent);
  };
  int64_t i = 0;
  for (; i + kWidth * kLanes <= n; i += kWidth * kLanes) combine(i, Whole{}, Count<kWidth>{});
  for (; i + kLanes <= n; i += kLanes) combine(i, Whole{}, Count<1>{});
  if (i < n) combine(i, Part{n - i}, Count<1>{});
}

template <DType T, int Rows> void dots(const CurveSum& sum, int64_t begin, int64_t n, FewRows x, float* out) {
  Floats sums[Rows][4] = {};
  for_combined<T>(sum, begin, n, [&](int64_t i, const auto& weights, auto extent) {
    constexpr int kVectors = sizeof weights / sizeof(Floats);
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sums[m][v] = multiply_add(weights[v], load(x.data + m * x.stride + i + v * kLanes, extent), sums[m][v]);
  });
  for (int m = 0; m < Rows; ++m) {
    const Floats both = (sums[m][0] + sums[m][1]) + (sums[m][2] + sums[m][3]);
    float total = 0;
    for (int l = 0; l < kLanes; ++l) total += both[l];
    out[m] += total;
  }
}

template <DType T, int Rows>
void add_rows(const CurveSum& sum, int64_t begin, int64_t n, const float* factors, FewRows y) {
  for_combined<T>(sum, begin, n, [&](int64_t i, const auto& weights, auto extent) {
    constexpr int kVectors = sizeof weights / sizeof(Floats);
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* to = y.data + m * y.stride + i + v * kLanes;
        store(to, multiply_add(weights[v], splat(factors[m]), load(to, extent)), extent);
      }
  });
}

// Calls body(dtype, rows) with both as constants.
template <class Body> LSF_INLINE void with_constants(DType dtype, int64_t rows, Body body) {
  const auto for_rows = [&](auto t) {
    switch (rows) {
      case 1: return body(t, Count<1>{});
      case 2: return body(t, Count<2>{});
      case 3: return body(t, Count<3>{});
      case 4: return body(t, Count<4>{});
    }
  };
  switch (dtype) {
    case DType::f32: return for_rows(Of<DType::f32>{});
    case DType::bf16: return for_rows(Of<DType::bf16>{});
    case DType::f16: return for_rows(Of<DType::f16>{});
  }
}

void curve_dots(const CurveSum& sum, int64_t begin, int64_t n, FewRows x, float* out) {
  with_constants(sum.dtype, x.rows, [&](auto t, auto rows) {
    for (int64_t done = 0; done < n; done += kDotPiece) {
      const int64_t count = n - done < kDotPiece ? n - done : kDotPiece;
      dots<decltype(t)::value, decltype(rows)::value>(sum, begin + done, count, {x.data + done, x.stride, x.rows}, out);
    }
  });
}

void curve_add(const CurveSum& sum, int64_t begin, int64_t n, const float* factors, FewRows y) {
  with_constants(sum.dtype, y.rows, [&](auto t, auto rows) {
    add_rows<decltype(t)::value, decltype(rows)::value>(sum, begin, n, factors, y);
  });
}

}  // namespace
