// What the kernels of swag_collect_ and swag_sample refuse, on every device: ops/swag.py has the same words for Python.
#pragma once
#include <c10/core/ScalarType.h>

#include "averaging_checks.h"

namespace losssurf {

// "torch.float32", as Python prints a dtype
inline std::string dtype_name(at::ScalarType dtype) {
  return "torch." + std::string(c10::getDtypeNames(dtype).first);
}

// "(2, 3) on cpu"
inline std::string place_of(const at::Tensor& t) { return shape_of(t.sizes()) + " on " + t.device().str(); }

inline void check_swag_dtype(const char* name, const char* label, size_t i, const at::Tensor& t) {
  TORCH_CHECK_TYPE(averaging_dtype(t.scalar_type()), name, ": ", label, "[", i, "] must have a floating dtype of ",
                   "(torch.float64, torch.float32, torch.bfloat16, torch.float16), got ", dtype_name(t.scalar_type()));
}

inline void check_swag_state(const char* name, at::TensorList mean, at::TensorList m2, at::TensorList deviations) {
  TORCH_CHECK_VALUE(m2.size() == mean.size(), name, ": m2 must hold ", mean.size(), " tensors like mean, got ",
                    m2.size());
  TORCH_CHECK_VALUE(deviations.empty() || deviations.size() == mean.size(), name, ": deviations must hold no tensor or ",
                    mean.size(), " like mean, got ", deviations.size());
  for (size_t i = 0; i < mean.size(); ++i) {
    const at::Tensor &a = mean[i], &b = m2[i];
    const at::ScalarType wide = a.scalar_type();
    TORCH_CHECK_TYPE((wide == at::kFloat || wide == at::kDouble) && b.scalar_type() == wide, name, ": mean[", i,
                     "] and m2[", i, "] must be both float32 or float64, got ", dtype_name(wide), ", ",
                     dtype_name(b.scalar_type()));
    TORCH_CHECK_VALUE(b.sizes() == a.sizes() && b.device() == a.device(), name, ": m2[", i, "] must be like mean[", i,
                      "], ", place_of(a), ", got ", place_of(b));
    TORCH_CHECK_VALUE(a.is_contiguous() && b.is_contiguous(), name, ": mean[", i, "] and m2[", i,
                      "] must be contiguous");
  }
  for (size_t i = 0; i < deviations.size(); ++i) {
    const at::Tensor &a = mean[i], &slots = deviations[i];
    const bool wide = a.scalar_type() == at::kDouble;
    const at::ScalarType dtype = slots.scalar_type();
    TORCH_CHECK_TYPE(averaging_dtype(dtype) && (dtype == at::kDouble) == wide, name, ": deviations[", i, "] must be ",
                     wide ? "float64" : "float32, bfloat16 or float16", " beside a ", dtype_name(a.scalar_type()),
                     " mean, got ", dtype_name(dtype));
    TORCH_CHECK_VALUE(slots.dim() == 2 && slots.size(0) >= 1 && slots.size(1) == a.numel() &&
                          slots.device() == a.device(),
                      name, ": deviations[", i, "] must be [K, ", a.numel(), "] on ", a.device(), ", got ",
                      place_of(slots));
    TORCH_CHECK_VALUE(slots.size(0) == deviations[0].size(0), name, ": deviations[", i, "] must hold ",
                      deviations[0].size(0), " columns like deviations[0], got ", slots.size(0));
    TORCH_CHECK_VALUE(slots.is_contiguous(), name, ": deviations[", i, "] must be contiguous");
  }
}

inline void check_collect(at::TensorList mean, at::TensorList m2, at::TensorList deviations, at::TensorList values,
                          int64_t n) {
  const char* name = "swag_collect_";
  check_swag_state(name, mean, m2, deviations);
  TORCH_CHECK_VALUE(values.size() == mean.size(), name, ": values must hold ", mean.size(),
                    " tensors like mean, got ", values.size());
  for (size_t i = 0; i < mean.size(); ++i) {
    check_swag_dtype(name, "values", i, values[i]);
    TORCH_CHECK_VALUE(values[i].sizes() == mean[i].sizes() && values[i].device() == mean[i].device(), name,
                      ": values[", i, "] must be like mean[", i, "], ", place_of(mean[i]), ", got ",
                      place_of(values[i]));
  }
  TORCH_CHECK_VALUE(n >= 0, name, ": n must not be negative, got ", n);
}

inline void check_sample(at::TensorList out, at::TensorList mean, at::TensorList m2, at::TensorList deviations,
                         const at::Tensor& seed, int64_t n, int64_t num_samples, at::IntArrayRef places) {
  const char* name = "swag_sample";
  check_swag_state(name, mean, m2, deviations);
  TORCH_CHECK_VALUE(n >= 1, name, ": n must be at least 1, nothing has been collected, got ", n);
  TORCH_CHECK_VALUE(out.size() == mean.size() && places.size() == 4 * mean.size(), name,
                    ": out and places must hold ", mean.size(), " like mean, got ", out.size(), ", ",
                    places.size() / 4);
  TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong, name, ": seed must be an int or a 0-d int64 tensor, got ",
                   dtype_name(seed.scalar_type()), " tensor");
  TORCH_CHECK_VALUE(seed.dim() == 0, name, ": seed must be a 0-d tensor, got shape ", shape_of(seed.sizes()));
  for (size_t i = 0; i < mean.size(); ++i) {
    const at::Tensor &o = out[i], &a = mean[i];
    check_swag_dtype(name, "out", i, o);
    std::vector<int64_t> sizes = a.sizes().vec();
    sizes.insert(sizes.begin(), num_samples);
    TORCH_CHECK_VALUE((num_samples == 1 && o.sizes() == a.sizes()) || o.sizes() == sizes, name, ": out[", i,
                      "] must be ", shape_of(sizes), ", got ", shape_of(o.sizes()));
    TORCH_CHECK_VALUE(o.device() == a.device(), name, ": out[", i, "] must be on mean's ", a.device(), ", got ",
                      o.device());
    TORCH_CHECK_VALUE(seed.device() == a.device(), name, ": seed must be on ", a.device(), ", got ", seed.device());
    const int64_t numel = a.numel(), offset = places[4 * i + 1], run = places[4 * i + 2], stride = places[4 * i + 3];
    TORCH_CHECK_VALUE(numel == 0 || (run >= 1 && numel % run == 0 && (numel == run || stride >= run)), name,
                      ": a place of ", numel, " elements must be whole runs that do not overlap, got offset ", offset,
                      ", run ", run, ", stride ", stride);
  }
}

}  // namespace losssurf
