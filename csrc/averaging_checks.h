// What the kernels of lerp_ and ema_ refuse, on every device: ops/averaging.py has the same words for Python.
#pragma once
#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <string>
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

// The memory of tensors of which at least one is written. Two of them may not share any; interleaved ones, such as
// columns of a matrix, are compared by their first elements alone.
class Extents {
 public:
  explicit Extents(const char* name) : name_(name) {}
  void add(const char* label, at::TensorList tensors) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const at::Tensor& t = tensors[i];
      if (t.numel() == 0) continue;
      TORCH_CHECK_VALUE(at::has_internal_overlap(t) != at::MemOverlap::Yes, name_, ": ", label, "[", i,
                        "] must not be expanded, several of its elements are one in memory");
      const bool dense = t.is_contiguous() || t.is_non_overlapping_and_dense();
      const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
      extents_.push_back({begin, begin + (dense ? t.numel() : 1) * t.element_size(), label, i, extents_.size()});
    }
  }
  void check() {
    std::sort(extents_.begin(), extents_.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
    for (size_t k = 1; k < extents_.size(); ++k) {
      const Extent &a = extents_[k - 1], &b = extents_[k];
      const bool in_order = a.place < b.place;  // named as they were given, not as they lie in memory
      const Extent &first = in_order ? a : b, &second = in_order ? b : a;
      TORCH_CHECK_VALUE(a.end <= b.begin, name_, ": ", first.label, "[", first.index, "] and ", second.label, "[",
                        second.index, "] must not share memory");
    }
  }

 private:
  struct Extent {
    uintptr_t begin, end;
    const char* label;
    size_t index, place;
  };
  const char* name_;
  std::vector<Extent> extents_;
};

// `copies` lists of averages, one after the other, of the same values
inline void check_lerp(const char* name, at::TensorList averages, at::TensorList values, size_t copies) {
  TORCH_CHECK_VALUE(averages.size() == copies * values.size(), name, ": averages must hold ",
                    copies == 1 ? "" : std::to_string(copies) + " times ", values.size(), " tensors like values, got ",
                    averages.size());
  for (size_t i = 0; i < averages.size(); ++i) {
    const at::Tensor& average = averages[i];
    const at::Tensor& value = values[i % values.size()];
    check_averaging_dtype(name, "averages", i, average);
    check_averaging_dtype(name, "values", i, value);
    TORCH_CHECK_VALUE(average.sizes() == value.sizes(), name, ": averages[", i, "] must have the value's shape ",
                      shape_of(value.sizes()), ", got ", shape_of(average.sizes()));
    TORCH_CHECK_VALUE(average.device() == value.device(), name, ": averages[", i, "] must be on the value's ",
                      value.device(), ", got ", average.device());
  }
  Extents memory(name);
  memory.add("averages", averages);
  memory.check();
}

}  // namespace losssurf
