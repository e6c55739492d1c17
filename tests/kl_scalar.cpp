// csrc/kl_math.h on scalars, the text that CUDA would compile, as a filter: test_kl.py feeds it.
// Reads (log_alpha or log_sigma2, weight); writes the slope of each divergence on log_alpha, then kl_normal's two.
#include <stdio.h>

#include "kl_math.h"

int main() {
  float in[2];
  while (fread(in, sizeof in, 1, stdin) == 1) {
    const float log_alpha = log_alpha_of(in[1], in[0]);
    const auto normal = kl_normal<float, uint32_t>(in[1], in[0], 1.0f, 0.0f);
    const float out[] = {
        kl_log_uniform_exact<float, uint32_t>(log_alpha).slope,
        kl_log_uniform_approximate<float, uint32_t>(log_alpha).slope,
        kl_ard<float, uint32_t>(log_alpha).slope,
        normal.slope,
        weight_slope(in[1], kl_ard<float, uint32_t>(log_alpha).slope),
    };
    fwrite(out, sizeof out, 1, stdout);
  }
}
