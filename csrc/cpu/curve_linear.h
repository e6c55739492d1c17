// The rule by which curve_linear runs.
#pragma once
#include <cstdint>

namespace losssurf {

// Whether `rows` of x, in elements of `element_size` bytes, are so few that combining the weight inside the product
// beats writing it.
bool curve_linear_on_the_fly(int64_t rows, int64_t element_size);

}  // namespace losssurf
