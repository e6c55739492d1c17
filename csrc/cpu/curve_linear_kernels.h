// The products of curve_linear at few rows: ops/curve_linear.py has the contract.
//
// One side of each is made on the fly and lies in a cache, the other is small; a library spends its time on packing
// there. (Reading the next bends ahead by prefetches while the cores multiply took twice as long: they hold fewer lines
// in flight than the hardware's own prefetching of the streams does.)
#pragma once
#include "simd.h"

namespace {

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

}  // namespace
