// CPU kernels of the noise family: ops/noise.py has the contract.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "tiles.h"

namespace losssurf {

at::Tensor draw_noise(NoiseStream stream, int64_t rows, int64_t cols, at::ScalarType dtype) {
  const bool widened = dtype == at::kDouble;  // fp64 is the fp32 normal
  at::Tensor out = at::empty({rows, cols}, at::TensorOptions().dtype(widened ? at::kFloat : dtype));
  const Matrix matrix = matrix_of(out, cols);
  const auto kernel = kernels().philox_normal;
  // Whole quads of fp32 need no buffer and no small tiles.
  const bool unbuffered = matrix.dtype == DType::f32 && cols % 4 == 0 && stream.col_offset % 4 == 0;
  for_tiles(rows, cols, [&](Tile tile) { kernel(stream, tile, matrix); }, unbuffered ? 8 * kTile : kTile);
  return widened ? out.to(at::kDouble) : out;
}

namespace {

at::Tensor philox_normal_cpu(const at::Tensor& seed, int64_t rows, int64_t cols, int64_t row_offset,
                             int64_t col_offset, int64_t sample, at::ScalarType dtype) {
  return draw_noise(noise_stream(seed, row_offset, col_offset, sample), rows, cols, dtype);
}

at::Tensor philox_words_cpu(const at::Tensor& seed, const at::Tensor& counters) {
  TORCH_CHECK_VALUE(seed.numel() == 1 && counters.dim() > 0 && counters.size(-1) == 4,
                    "philox_words: seed must be 0-d and counters [..., 4], got ", seed.sizes(), " and ", counters.sizes());
  const at::Tensor in = counters.contiguous();
  at::Tensor out = at::empty_like(in);
  kernels().philox_words(*seed.const_data_ptr<int64_t>(), in.const_data_ptr<int64_t>(), in.numel() / 4,
                         out.data_ptr<int64_t>());
  return out;
}

}  // namespace
}  // namespace losssurf

TORCH_LIBRARY_IMPL(losssurf_fast, CPU, m) {
  m.impl("philox_normal", &losssurf::philox_normal_cpu);
  m.impl("philox_words", &losssurf::philox_words_cpu);
}
