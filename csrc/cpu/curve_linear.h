// The rule by which curve_linear runs.
#pragma once
#include <cstdint>

namespace losssurf {

// Whether `rows` of x are so few, and a weight of `numel` elements so large, that combining the weight inside the
// product beats writing it; elements have `element_size` bytes.
bool curve_linear_on_the_fly(int64_t rows, int64_t numel, int64_t element_size);

}  // namespace losssurf
