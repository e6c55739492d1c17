// What the glue files share: from torch's dtypes to the kernels', and tensors as the kernels walk through them.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "float_type.h"

namespace losssurf {

inline FloatType float_type(at::ScalarType dtype, const char* name = "losssurf_fast") {
  switch (dtype) {
    case at::kDouble: return FloatType::f64;
    case at::kFloat: return FloatType::f32;
    case at::kBFloat16: return FloatType::bf16;
    case at::kHalf: return FloatType::f16;
    default: TORCH_CHECK_TYPE(false, name, ": dtype must be a floating one, got ", dtype);
  }
}
inline FloatType float_type(const at::Tensor& t) { return float_type(t.scalar_type()); }

// A list with a tensor on a GPU comes here, whatever the others are on.
inline void check_on_gpu(const char* name, const char* label, at::TensorList tensors) {
  for (size_t i = 0; i < tensors.size(); ++i)
    TORCH_CHECK_VALUE(tensors[i].is_cuda(), name, ": ", label, " must all be on GPUs or all on the CPU, got ", label,
                      "[", i, "] on ", tensors[i].device());
}

// `t` with its elements in memory in the order of `like`, which has no gaps: itself or a copy.
inline at::Tensor in_order_of(const at::Tensor& like, const at::Tensor& t) {
  if (t.strides() == like.strides() || (t.is_contiguous() && like.is_contiguous())) return t;
  return at::empty_strided(like.sizes(), like.strides(), t.options()).copy_(t);
}

}  // namespace losssurf
