// What the kernels of curve_weights refuse, on every device: ops/curve.py has the same words for Python.
#pragma once
#include "averaging_checks.h"

namespace losssurf {

inline void check_coefficients(const char* name, const at::Tensor& coefficients) {
  TORCH_CHECK_VALUE(coefficients.dim() == 1 && coefficients.numel() >= 1, name,
                    ": coefficients must be [K], one for each bend, got ", shape_of(coefficients.sizes()));
  TORCH_CHECK_TYPE(coefficients.scalar_type() == at::kFloat || coefficients.scalar_type() == at::kDouble, name,
                   ": coefficients must be float32 or float64, got ", dtype_name(coefficients));
}

// Tensor p of bend j is bends[j P + p]. Returns P.
inline size_t check_curve_weights(at::TensorList bends, const at::Tensor& coefficients) {
  const char* name = "curve_weights";
  check_coefficients(name, coefficients);
  const size_t count = coefficients.numel();
  TORCH_CHECK_VALUE(bends.size() % count == 0, name, ": bends must be ", count, " lists of equal length, got ",
                    bends.size(), " tensors");
  const size_t size = bends.size() / count;
  const at::Device device = coefficients.device();
  for (size_t i = 0; i < bends.size(); ++i) {
    const size_t j = i / size, p = i % size;
    const at::Tensor &bend = bends[i], &first = bends[p];
    if (!averaging_dtype(bend.scalar_type()))
      check_averaging_dtype(name, ("bends[" + std::to_string(j) + "]").c_str(), p, bend);
    TORCH_CHECK_VALUE(bend.sizes() == first.sizes(), name, ": bends[", j, "][", p, "] must have the shape ",
                      shape_of(first.sizes()), " of bends[0][", p, "], got ", shape_of(bend.sizes()));
    TORCH_CHECK_TYPE(bend.scalar_type() == first.scalar_type(), name, ": bends[", j, "][", p, "] must be ",
                     dtype_name(first), " as bends[0][", p, "], got ", dtype_name(bend));
    TORCH_CHECK_VALUE(bend.device() == device, name, ": bends[", j, "][", p, "] must be on the coefficients' ", device,
                      ", got ", bend.device());
  }
  return size;
}

// grads[p] is that of weight p; needed[j P + p] says whether bends[j][p] wants one. The bends are looked at for the
// gradients of the coefficients alone, else their list may be empty. Returns P.
inline size_t check_curve_weights_backward(at::TensorList grads, at::TensorList bends, const at::Tensor& coefficients,
                                           size_t needed, bool need_coefficients) {
  const char* name = "curve_weights_backward";
  check_coefficients(name, coefficients);
  const size_t size = grads.size(), total = size * coefficients.numel();
  TORCH_CHECK_VALUE(needed == total, name, ": needed must hold ", total, " flags, got ", needed);
  TORCH_CHECK_VALUE(bends.size() == total || (bends.empty() && !need_coefficients), name, ": bends must hold ", total,
                    " tensors, got ", bends.size());
  for (size_t p = 0; p < size; ++p) {
    const at::Tensor& grad = grads[p];
    check_averaging_dtype(name, "grads", p, grad);
    TORCH_CHECK_VALUE(grad.device() == coefficients.device(), name, ": grads[", p, "] must be on the coefficients' ",
                      coefficients.device(), ", got ", grad.device());
    for (size_t i = p; i < bends.size(); i += size) {
      TORCH_CHECK_TYPE(bends[i].scalar_type() == grad.scalar_type(), name, ": grads[", p, "] must be ",
                       dtype_name(bends[i]), " as its bends, got ", dtype_name(grad));
      TORCH_CHECK_VALUE(bends[i].sizes() == grad.sizes(), name, ": grads[", p, "] must have its bends' shape ",
                        shape_of(bends[i].sizes()), ", got ", shape_of(grad.sizes()));
      TORCH_CHECK_VALUE(bends[i].device() == grad.device(), name, ": grads[", p, "] must be on its bends' ",
                        bends[i].device(), ", got ", grad.device());
    }
  }
  return size;
}

}  // namespace losssurf
