// The kl family in double precision, for the families whose passes take a KL along.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace losssurf {

// kl_sum of kernels.h; weight may be null, slopes hold one pointer per input or none.
double kl_sum_double(KL kind, double prior_std, int64_t n, const double* param, const double* weight, double* slope,
                     double* slope_weight);

}  // namespace losssurf
