// What the kernels of lerp_ and ema_ refuse, on every device: ops/averaging.py has the same words for Python.
#pragma once
#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace losssurf {

inline bool averaging_dtype(at::ScalarType t) {
  return t == at::kFloat || t == at::kBFloat16 || t == at::kHalf || t == at::kDouble;
}

// "(2, 3)", as Python prints a shape
inline std::string shape_of(at::IntArrayRef sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

// "torch.float32", as Python prints a dtype
inline std::string dtype_name(const at::Tensor& t) {
  return "torch." + std::string(c10::getDtypeNames(t.scalar_type()).first);
}

inline void check_averaging_dtype(const char* name, const char* label, size_t i, const at::Tensor& t) {
  TORCH_CHECK_TYPE(averaging_dtype(t.scalar_type()), name, ": ", label, "[", i, "] must have a floating dtype of ",
                   "(torch.float64, torch.float32, torch.bfloat16, torch.float16), got ", dtype_name(t));
}

// `copies` lists of averages, one after the other, of the same values
inline void check_lerp(const char* name, at::TensorList averages, at::TensorList values, size_t copies) {
  TORCH_CHECK_VALUE(averages.size() == copies * values.size(), name, ": averages must hold ",
                    copies == 1 ? "" : std::to_string(copies) + " times ", values.size(), " tensors like values, got ",
                    averages.size());
  std::vector<std::pair<const void*, size_t>> places;
  places.reserve(averages.size());
  for (size_t i = 0; i < averages.size(); ++i) {
    const at::Tensor& average = averages[i];
    const at::Tensor& value = values[i % values.size()];
    check_averaging_dtype(name, "averages", i, average);
    check_averaging_dtype(name, "values", i, value);
    TORCH_CHECK_VALUE(average.sizes() == value.sizes(), name, ": averages[", i, "] must have the value's shape ",
                      shape_of(value.sizes()), ", got ", shape_of(average.sizes()));
    TORCH_CHECK_VALUE(average.device() == value.device(), name, ": averages[", i, "] must be on the value's ",
                      value.device(), ", got ", average.device());
    TORCH_CHECK_VALUE(at::has_internal_overlap(average) != at::MemOverlap::Yes, name, ": averages[", i,
                      "] must not be expanded, several of its elements are one in memory");
    if (average.numel() > 0) places.emplace_back(average.const_data_ptr(), i);
  }
  std::sort(places.begin(), places.end());
  for (size_t k = 1; k < places.size(); ++k)
    TORCH_CHECK_VALUE(places[k].first != places[k - 1].first, name, ": averages must be distinct tensors, ",
                      places[k - 1].second, " and ", places[k].second, " share their memory");
}

}  // namespace losssurf
