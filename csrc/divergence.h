// Names that the kernels of every device share: the divergences of ops/kl.py, and the prior that one of them has.
#pragma once

enum class KL { log_uniform, log_uniform_approximate, ard, normal };

// N(0, exp(log_variance)), for KL::normal
struct Prior {
  float inverse_std, log_variance;
};
