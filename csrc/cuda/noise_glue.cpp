// noise.cu as an operator. Triton serves philox_normal on CUDA; philox_normal_cuda is the device code that CUDA C++
// kernels draw their noise with, made callable so that a test can hold the two together.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "glue.h"
#include "noise.h"

namespace losssurf {
namespace {

at::Tensor philox_normal_cuda(const at::Tensor& seed, int64_t rows, int64_t cols, int64_t row_offset,
                              int64_t col_offset, int64_t sample, at::ScalarType dtype) {
  const c10::cuda::CUDAGuard guard(seed.device());
  at::Tensor out = at::empty({rows, cols}, seed.options().dtype(dtype));
  const FloatType type = float_type(dtype, "philox_normal_cuda");
  losssurf_philox_normal(seed.const_data_ptr<int64_t>(), out.data_ptr(), type, rows, cols, row_offset, col_offset,
                         static_cast<uint32_t>(sample), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace
}  // namespace losssurf

TORCH_LIBRARY_FRAGMENT(losssurf_fast, m) {
  m.def("philox_normal_cuda(Tensor seed, int rows, int cols, int row_offset=0, int col_offset=0, int sample=0, "
        "ScalarType dtype=float) -> Tensor");
}
TORCH_LIBRARY_IMPL(losssurf_fast, CUDA, m) { m.impl("philox_normal_cuda", &losssurf::philox_normal_cuda); }
