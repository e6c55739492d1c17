// The rule by which curve_linear runs.
#pragma once
#include <c10/core/ScalarType.h>

#include <cstdint>

namespace losssurf {

// Whether few enough rows of `dtype` are multiplied that combining the weight inside the product beats writing it.
bool curve_linear_on_the_fly(int64_t rows, at::ScalarType dtype);

}  // namespace losssurf
