// What the kernels of swag_collect_ and swag_sample_ refuse, on every device: ops/swag.py has the same words.
#pragma once
#include "averaging_checks.h"

namespace losssurf {

inline std::string shape_and_device(at::IntArrayRef sizes, const at::Tensor& t) {
  return shape_of(sizes) + " on " + t.device().str();
}

// `out` is what is written besides.
inline void check_swag_state(const char* name, at::TensorList mean, at::TensorList m2, at::TensorList deviations,
                             at::TensorList out) {
  const auto moment = [](const at::Tensor& t) {
    return t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble;
  };
  TORCH_CHECK_VALUE(m2.size() == mean.size(), name, ": m2 must hold ", mean.size(), " tensors like mean, got ",
                    m2.size());
  TORCH_CHECK_VALUE(deviations.empty() || deviations.size() == mean.size(), name,
                    ": deviations must hold no tensor or ", mean.size(), " like mean, got ", deviations.size());
  for (size_t i = 0; i < mean.size(); ++i) {
    const at::Tensor &a = mean[i], &b = m2[i];
    TORCH_CHECK_TYPE(moment(a) && b.scalar_type() == a.scalar_type(), name, ": mean[", i, "] and m2[", i,
                     "] must be both float32 or float64, got ", dtype_name(a), ", ", dtype_name(b));
    TORCH_CHECK_VALUE(b.sizes() == a.sizes() && b.device() == a.device(), name, ": m2[", i, "] must be like mean[", i,
                      "], ", shape_and_device(a.sizes(), a), ", got ", shape_and_device(b.sizes(), b));
    TORCH_CHECK_VALUE(a.is_contiguous() && b.is_contiguous(), name, ": mean[", i, "] and m2[", i,
                      "] must be contiguous");
  }
  for (size_t i = 0; i < deviations.size(); ++i) {
    const at::Tensor &slots = deviations[i], &a = mean[i];
    const bool wide = a.scalar_type() == at::kDouble;
    TORCH_CHECK_TYPE(averaging_dtype(slots.scalar_type()) && (slots.scalar_type() == at::kDouble) == wide, name,
                     ": deviations[", i, "] must be ", wide ? "float64" : "float32, bfloat16 or float16", " beside a ",
                     dtype_name(a), " mean, got ", dtype_name(slots));
    TORCH_CHECK_VALUE(slots.dim() == 2 && slots.size(0) >= 1 && slots.size(1) == a.numel() &&
                          slots.device() == a.device(),
                      name, ": deviations[", i, "] must be [K, ", a.numel(), "] on ", a.device(), ", got ",
                      shape_and_device(slots.sizes(), slots));
    TORCH_CHECK_VALUE(slots.size(0) == deviations[0].size(0), name, ": deviations[", i, "] must hold ",
                      deviations[0].size(0), " columns like deviations[0], got ", slots.size(0));
    TORCH_CHECK_VALUE(slots.is_contiguous(), name, ": deviations[", i, "] must be contiguous");
  }
  Extents memory(name);
  memory.add("out", out), memory.add("mean", mean), memory.add("m2", m2), memory.add("deviations", deviations);
  memory.check();
}

inline void check_swag_collect(at::TensorList mean, at::TensorList m2, at::TensorList deviations, at::TensorList values,
                               int64_t n) {
  const char* name = "swag_collect_";
  check_swag_state(name, mean, m2, deviations, {});
  TORCH_CHECK_VALUE(values.size() == mean.size(), name, ": values must hold ", mean.size(),
                    " tensors like mean, got ", values.size());
  for (size_t i = 0; i < mean.size(); ++i) {
    const at::Tensor &a = mean[i], &v = values[i];
    check_averaging_dtype(name, "values", i, v);
    TORCH_CHECK_VALUE(v.sizes() == a.sizes() && v.device() == a.device(), name, ": values[", i,
                      "] must be like mean[", i, "], ", shape_and_device(a.sizes(), a), ", got ",
                      shape_and_device(v.sizes(), v));
  }
  TORCH_CHECK_VALUE(n >= 0, name, ": n must not be negative, got ", n);
}

inline void check_swag_sample(at::TensorList out, at::TensorList mean, at::TensorList m2, at::TensorList deviations,
                              int64_t n, int64_t num_samples, at::IntArrayRef places) {
  const char* name = "swag_sample";
  check_swag_state(name, mean, m2, deviations, out);
  TORCH_CHECK_VALUE(n >= 1, name, ": n must be at least 1, nothing has been collected, got ", n);
  TORCH_CHECK_VALUE(out.size() == mean.size() && places.size() == 4 * mean.size(), name,
                    ": out and places must hold ", mean.size(), " like mean, got ", out.size(), ", ",
                    places.size() / 4);
  for (size_t i = 0; i < mean.size(); ++i) {
    const at::Tensor &o = out[i], &a = mean[i];
    check_averaging_dtype(name, "out", i, o);
    std::vector<int64_t> many(a.sizes().begin(), a.sizes().end());
    many.insert(many.begin(), num_samples);
    TORCH_CHECK_VALUE((num_samples == 1 && o.sizes() == a.sizes()) || o.sizes() == at::IntArrayRef(many), name,
                      ": out[", i, "] must be ", shape_of(many), ", got ", shape_of(o.sizes()));
    TORCH_CHECK_VALUE(o.device() == a.device(), name, ": out[", i, "] must be on mean's ", a.device(), ", got ",
                      o.device());
  }
}

}  // namespace losssurf
