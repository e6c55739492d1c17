// Noise as a CUDA kernel, on the same philox.h as the CPU: ops/noise.py has the contract.
#include "noise.h"

#include "../philox.h"
#include "float_type.cuh"

namespace {

constexpr int kThreads = 256;

// A thread makes whole quads, at least 16 bytes of output at a time. Chunks start at multiples of a quad in the
// numbering that includes col_offset, so the first and the last chunk of a row may stick out of it.
template <class T> struct Chunk {
  static constexpr int kPack = 16 / sizeof(T);
  static constexpr int kSize = kPack < 4 ? 4 : kPack;
  struct alignas(16) Pack {
    T value[kPack];
  };
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    philox_normal(const int64_t* seed, T* out, int64_t rows, int64_t cols, int64_t row_offset, int64_t col_offset,
                  uint32_t sample) {
  constexpr int kSize = Chunk<T>::kSize, kPack = Chunk<T>::kPack;
  const PhiloxKey key = PhiloxKey::of(*seed);
  const int64_t skip = col_offset % 4, chunks = (skip + cols + kSize - 1) / kSize;
  for (int64_t r = blockIdx.y * int64_t{blockDim.y} + threadIdx.y; r < rows; r += int64_t{gridDim.y} * blockDim.y) {
    const uint64_t row = static_cast<uint64_t>(row_offset + r);
    for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < chunks; i += int64_t{gridDim.x} * blockDim.x) {
      const int64_t col = i * kSize - skip;
      typename Chunk<T>::Pack packs[kSize / kPack];
#pragma unroll
      for (int j = 0; j < kSize; j += 4) {
        float normal[4];
        normal_quad(key, static_cast<uint32_t>((col_offset + col + j) >> 2), row, sample, normal);
#pragma unroll
        for (int k = 0; k < 4; ++k) convert(normal[k], packs[(j + k) / kPack].value[(j + k) % kPack]);
      }
      T* to = out + r * cols + col;
      if (col >= 0 && col + kSize <= cols && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
#pragma unroll
        for (int p = 0; p < kSize / kPack; ++p) reinterpret_cast<typename Chunk<T>::Pack*>(to)[p] = packs[p];
      } else {
#pragma unroll
        for (int k = 0; k < kSize; ++k)
          if (col + k >= 0 && col + k < cols) to[k] = packs[k / kPack].value[k % kPack];
      }
    }
  }
}

template <class T>
void launch(const int64_t* seed, void* out, int64_t rows, int64_t cols, int64_t row_offset, int64_t col_offset,
            uint32_t sample, cudaStream_t stream) {
  const int64_t chunks = (col_offset % 4 + cols + Chunk<T>::kSize - 1) / Chunk<T>::kSize;
  unsigned across = 1;  // threads along a row: narrow matrices put several rows into a block
  while (across < kThreads && across < chunks) across *= 2;
  const dim3 block(across, kThreads / across);
  const int64_t blocks_across = (chunks + block.x - 1) / block.x, blocks_down = (rows + block.y - 1) / block.y;
  const dim3 grid(static_cast<unsigned>(blocks_across < 1 << 20 ? blocks_across : 1 << 20),
                  static_cast<unsigned>(blocks_down < 65535 ? blocks_down : 65535));
  philox_normal<<<grid, block, 0, stream>>>(seed, static_cast<T*>(out), rows, cols, row_offset, col_offset, sample);
}

}  // namespace

extern "C" void losssurf_philox_normal(const int64_t* seed, void* out, FloatType dtype, int64_t rows, int64_t cols,
                                       int64_t row_offset, int64_t col_offset, uint32_t sample, cudaStream_t stream) {
  if (rows == 0 || cols == 0) return;
  with_type(dtype, [&](auto type) {
    launch<typename decltype(type)::type>(seed, out, rows, cols, row_offset, col_offset, sample, stream);
  });
}
