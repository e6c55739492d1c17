// From tensors to tiles: what the ATen files share.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace losssurf {

// Bytes of a result that is stored past the caches: a reader would not find the first of them in an inner one.
constexpr int64_t kLargeOutput = 4 << 20;

inline DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default: TORCH_CHECK_TYPE(false, "losssurf_fast: no fp32 kernel for dtype ", t.scalar_type());
  }
}

// A contiguous tensor seen as rows of its last `cols` elements.
inline Matrix matrix_of(const at::Tensor& t, int64_t cols) {
  return {t.data_ptr(), cols, dtype_of(t)};
}

// A tensor's memory from element `first` on.
inline Array array_of(const at::Tensor& t, int64_t first) {
  return {static_cast<char*>(t.data_ptr()) + first * t.element_size(), dtype_of(t)};
}

inline NoiseStream noise_stream(const at::Tensor& seed, int64_t row_offset, int64_t col_offset, int64_t sample) {
  TORCH_CHECK_VALUE(seed.numel() == 1, "losssurf_fast: seed must be a 0-d int64 tensor, got shape ", seed.sizes());
  return {static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()), static_cast<uint32_t>(sample),
          static_cast<uint64_t>(row_offset), static_cast<uint64_t>(col_offset)};
}

// Noise [rows, cols] as a tensor (noise.cpp).
at::Tensor draw_noise(NoiseStream stream, int64_t rows, int64_t cols, at::ScalarType dtype);

// Calls body(tile) for tiles of at most `size` elements that cover rows x cols, in parallel.
template <class Body> void for_tiles(int64_t rows, int64_t cols, const Body& body, int64_t size = kTile) {
  if (rows == 0 || cols == 0) return;
  const int64_t tile_cols = std::min(cols, size);
  const int64_t tile_rows = std::max<int64_t>(1, size / tile_cols);
  const int64_t across = (cols + tile_cols - 1) / tile_cols;
  const int64_t down = (rows + tile_rows - 1) / tile_rows;
  at::parallel_for(0, across * down, std::max<int64_t>(1, 8 * kTile / size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / across * tile_rows, col = i % across * tile_cols;
      body(Tile{row, std::min(tile_rows, rows - row), col, std::min(tile_cols, cols - col)});
    }
  });
}

// Elements [begin, begin + n) of tensor `index` of a list: what one kernel call covers.
struct Chunk {
  size_t index;
  int64_t begin, n;
};

inline std::vector<Chunk> chunks_of(at::TensorList tensors, int64_t size) {
  std::vector<Chunk> chunks;
  for (size_t index = 0; index < tensors.size(); ++index)
    for (int64_t begin = 0, numel = tensors[index].numel(); begin < numel; begin += size)
      chunks.push_back({index, begin, std::min(size, numel - begin)});
  return chunks;
}

// Calls body(chunk, its number) in parallel, at least `grain` chunks in a thread.
template <class Body> void for_chunks(const std::vector<Chunk>& chunks, int64_t grain, const Body& body) {
  at::parallel_for(0, chunks.size(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(chunks[i], i);
  });
}

}  // namespace losssurf
