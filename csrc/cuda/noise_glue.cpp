// noise.cu as an operator. Triton serves philox_normal on CUDA; philox_normal_cuda is the device code that CUDA C++
// kernels draw their noise with, made callable so that a test can hold the two together.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "noise.h"

namespace losssurf {
namespace {

NoiseDType noise_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble: return NoiseDType::f64;
    case at::kFloat: return NoiseDType::f32;
    case at::kBFloat16: return NoiseDType::bf16;
    case at::kHalf: return NoiseDType::f16;
    default: TORCH_CHECK_TYPE(false, "philox_normal_cuda: dtype must be a floating one, got ", dtype);
  }
}

at::Tensor philox_normal_cuda(const at::Tensor& seed, int64_t rows, int64_t cols, int64_t row_offset,
                              int64_t col_offset, int64_t sample, at::ScalarType dtype) {
  const c10::cuda::CUDAGuard guard(seed.device());
  at::Tensor out = at::empty({rows, cols}, seed.options().dtype(dtype));
  losssurf_philox_normal(seed.const_data_ptr<int64_t>(), out.data_ptr(), noise_dtype(dtype), rows, cols, row_offset,
                         col_offset, static_cast<uint32_t>(sample), c10::cuda::getCurrentCUDAStream());
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
