// The products of curve_linear at few rows: ops/curve_linear.py has the contract.
//
// One side of each is made on the fly and lies in a cache, the other is small; a library spends its time on packing
// there. The next bends are read from memory while the cores multiply.
#pragma once
#include "simd.h"

namespace {

constexpr ptrdiff_t kCacheLine = 64;
constexpr int64_t kDepth = 128;     // of partial sums: the error of a sum of n grows with the longest chain of additions
constexpr int64_t kFeedEvery = 16;  // steps of a product between two reads ahead

// Without an instruction for it, an exact fma takes fifty times as long; no two backends share the bits of a product.
LSF_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if LSF_LANES == 4
  return a * b + c;
#else
  return fused_mul_add(a, b, c);
#endif
}

// Reads `ahead` into the L2 cache, `lines` at a time.
struct Feed {
  Ahead ahead;
  int64_t lines, piece, offset;

  LSF_INLINE void next() {
    for (int64_t i = 0; i < lines && piece < ahead.count; ++i) {
      __builtin_prefetch((const char*)ahead.pieces[piece] + offset, 0, 2);
      offset += kCacheLine;
      if (offset >= ahead.bytes) offset = 0, ++piece;
    }
  }
};

// R rows and V vectors of c; their sums stay in registers.
template <int R, int V> void product_tile(const SmallProduct& p, int64_t row, int64_t col, Feed& feed) {
  const float* a = p.a + row * p.a_row;
  const float* b = p.b + col;
  float* c = p.c + row * p.c_row + col;
  Floats acc[R][V] = {};
  for (int64_t k = 0; k < p.depth;) {
    const int64_t end = k + kFeedEvery < p.depth ? k + kFeedEvery : p.depth;
    for (; k < end; ++k, a += p.a_depth, b += p.b_row) {
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
    feed.next();
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

template <int V> void product_columns(const SmallProduct& p, int64_t col, Feed& feed) {
  int64_t row = 0;
  const auto tiles = [&](auto tile, int64_t rows) {
    for (; row + rows <= p.rows; row += rows) tile(p, row, col, feed);
  };
  if constexpr (V < kWidest) tiles(product_tile<12, V>, 12);
  tiles(product_tile<6, V>, 6);
  tiles(product_tile<4, V>, 4);
  tiles(product_tile<2, V>, 2);
  tiles(product_tile<1, V>, 1);
}

// How often Feed::next runs.
inline int64_t feeds_of(const SmallProduct& p) {
  const int64_t tiles_across = (p.cols / kLanes + kWidest - 1) / kWidest, tiles_down = (p.rows + 11) / 12;
  return tiles_across * tiles_down * ((p.depth + kFeedEvery - 1) / kFeedEvery);
}

void product_block(const SmallProduct& p, Feed& feed) {
  int64_t col = 0;
  for (; col + kWidest * kLanes <= p.cols; col += kWidest * kLanes) product_columns<kWidest>(p, col, feed);
  if constexpr (kWidest == 4)
    for (; col + 2 * kLanes <= p.cols; col += 2 * kLanes) product_columns<2>(p, col, feed);
  for (; col + kLanes <= p.cols; col += kLanes) product_columns<1>(p, col, feed);
}

void small_product(const SmallProduct& whole, const Ahead& ahead) {
  const int64_t lines = ahead.count * ((ahead.bytes + kCacheLine - 1) / kCacheLine), feeds = feeds_of(whole);
  Feed feed{ahead, feeds ? (lines + feeds - 1) / feeds : 0, 0, 0};
  SmallProduct p = whole;
  for (int64_t done = 0; done < whole.depth; done += kDepth) {
    p.depth = whole.depth - done < kDepth ? whole.depth - done : kDepth;
    p.a = whole.a + done * whole.a_depth;
    p.b = whole.b + done * whole.b_row;
    product_block(p, feed);
  }
}

}  // namespace
