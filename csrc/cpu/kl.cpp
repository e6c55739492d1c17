// CPU kernels of the kl family: ops/kl.py has the contract. One parallel region covers a whole model's tensors.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "kl.h"
#include "tiles.h"

namespace losssurf {
namespace {

using at::Tensor;
using Slopes = std::vector<Tensor>;

// ---- fp64 -----------------------------------------------------------------------------------------------

struct Term {
  double value, slope;
};

// With mu = 1 / (2 alpha), J ~ Poisson(mu):  KL = E sum_{i < J} 1 / (2 i + 1),  -slope = mu E 1 / (2 J + 1), in which
// no term is negative; past mu = 36 the asymptotic series of Dawson's function.
Term log_uniform(double log_alpha) {
  constexpr double kFar = 36;
  const double mu = 0.5 * std::exp(-log_alpha);
  if (mu <= kFar) {
    double probability = std::exp(-mu), harmonic = 0, value = 0, mean = 0;
    for (int j = 0; j < 160; ++j) {
      value += probability * harmonic;
      mean += probability / (2 * j + 1);
      harmonic += 1.0 / (2 * j + 1);
      probability *= mu / (j + 1);
    }
    return {value, -mu * mean};
  }
  constexpr double kConstant = 0.63518142273073910;  // (ln 2 + Euler's gamma) / 2
  double value = kConstant - 0.5 * log_alpha, minus_slope = 0.5, term = 0.5;
  for (int k = 1; k < 30; ++k) {
    term *= (2 * k - 1) / (2 * mu);
    value -= term / k;
    minus_slope += term;
  }
  return {value, -minus_slope};
}

double sigmoid(double x) { return x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x)); }

Term ard(double log_alpha) {
  const double softplus = std::max(-log_alpha, 0.0) + std::log1p(std::exp(-std::abs(log_alpha)));
  return {0.5 * softplus, -0.5 * sigmoid(-log_alpha)};
}

Term log_uniform_approximate(double log_alpha) {
  constexpr double k1 = 0.63576, k2 = 1.8732, k3 = 1.48695;
  const double s = sigmoid(-k2 - k3 * log_alpha);
  const Term a = ard(log_alpha);
  return {a.value + k1 * s, a.slope - k1 * k3 * s * sigmoid(k2 + k3 * log_alpha)};
}

}  // namespace

double kl_sum_double(KL kind, double prior_std, int64_t n, const double* param, const double* weight, double* slope,
                     double* slope_weight) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double w = weight ? weight[i] : 0.0;
    Term term;
    double to_weight;
    if (kind == KL::normal) {
      const double x = param[i] - 2 * std::log(prior_std), scaled = w / prior_std;
      term = {0.5 * (std::expm1(x) - x + scaled * scaled), 0.5 * std::expm1(x)};
      to_weight = scaled / prior_std;
    } else {
      const double log_alpha = weight ? param[i] - 2 * std::log(std::abs(w)) : param[i];
      term = kind == KL::ard           ? ard(log_alpha)
             : kind == KL::log_uniform ? log_uniform(log_alpha)
                                       : log_uniform_approximate(log_alpha);
      constexpr double kLimit = std::numeric_limits<double>::max();
      to_weight = w == 0 ? 0 : std::clamp(-2 * term.slope / w, -kLimit, kLimit);
    }
    sum += term.value;
    if (slope) slope[i] = term.slope;
    if (slope && weight) slope_weight[i] = to_weight;
  }
  return sum;
}

namespace {

// ---- lists ------------------------------------------------------------------------------------------------

std::vector<Tensor> contiguous(at::TensorList tensors) {
  std::vector<Tensor> result;
  for (const Tensor& t : tensors) result.push_back(t.contiguous());
  return result;
}

// What the kernels' pointers rely on; ops/kl.py has the checks that explain.
void check_lists(KL kind, const std::vector<Tensor>& params, const std::vector<Tensor>& weights,
                 at::IntArrayRef counts) {
  const char* op = kind == KL::normal ? "kl_normal" : kind == KL::ard ? "kl_ard" : "kl_log_uniform";
  const size_t count = params.size();
  TORCH_CHECK_VALUE(count > 0 && counts.size() == count && (weights.empty() || weights.size() == count), op,
                    ": parameters, at least one, and counts must be as many, weight as many or none, got ", count, ", ",
                    counts.size(), " and ", weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    TORCH_CHECK_VALUE(weights[i].sizes() == params[i].sizes(), op, ": weight must have its parameter's shape ",
                      params[i].sizes(), ", got ", weights[i].sizes());
    TORCH_CHECK_TYPE((weights[i].scalar_type() == at::kDouble) == (params[i].scalar_type() == at::kDouble), op,
                     ": weight and its parameter must both be float64 or neither, got ", weights[i].scalar_type(),
                     ", ", params[i].scalar_type());
  }
}

// (sum_i counts[i] sum KL(params[i], weights[i]), slopes to params then weights); weights may be empty.
std::tuple<Tensor, Slopes> kl_forward(KL kind, double prior_std, at::TensorList params_in, at::TensorList weights_in,
                                      at::IntArrayRef counts, bool want_slopes) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const std::vector<Tensor> params = contiguous(params_in), weights = contiguous(weights_in);
  check_lists(kind, params, weights, counts);
  const size_t count = params.size();
  Slopes slopes;
  if (want_slopes) {
    for (const Tensor& t : params) slopes.push_back(at::empty_like(t));
    for (const Tensor& t : weights) slopes.push_back(at::empty_like(t));
  }
  const std::vector<Chunk> chunks = chunks_of(params, kTile);
  std::vector<double> sums(chunks.size());
  const auto kernel = kernels().kl_sum;
  const Prior prior{static_cast<float>(1 / prior_std), static_cast<float>(2 * std::log(prior_std))};
  for_chunks(chunks, 8, [&](Chunk chunk, int64_t i) {
    const auto [index, begin, n] = chunk;
    if (params[index].scalar_type() == at::kDouble) {
      const auto at = [=](const Tensor& t) { return t.data_ptr<double>() + begin; };
      sums[i] = kl_sum_double(kind, prior_std, n, at(params[index]), weights.empty() ? nullptr : at(weights[index]),
                              want_slopes ? at(slopes[index]) : nullptr,
                              want_slopes && !weights.empty() ? at(slopes[count + index]) : nullptr);
      return;
    }
    Array in[2] = {array_of(params[index], begin), {}}, out[2] = {};
    if (!weights.empty()) in[1] = array_of(weights[index], begin);
    if (want_slopes) out[0] = array_of(slopes[index], begin);
    if (want_slopes && !weights.empty()) out[1] = array_of(slopes[count + index], begin);
    sums[i] = kernel(kind, prior, n, in, want_slopes ? out : nullptr);
  });
  // In the order of the chunks: the same bits for any number of threads.
  double total = 0;
  for (size_t i = 0; i < chunks.size(); ++i) total += sums[i] * counts[chunks[i].index];
  const bool wide = std::any_of(params.begin(), params.end(), [](const Tensor& t) { return t.scalar_type() == at::kDouble; });
  const Tensor sum = at::empty({}, params[0].options().dtype(wide ? at::kDouble : at::kFloat));
  if (wide) *sum.data_ptr<double>() = total;
  else *sum.data_ptr<float>() = static_cast<float>(total);  // infinite past fp32's range
  return {sum, slopes};
}

KL log_uniform_kind(bool exact) { return exact ? KL::log_uniform : KL::log_uniform_approximate; }

Tensor kl_log_uniform_cpu(at::TensorList log_alpha, at::TensorList weight, at::IntArrayRef counts, bool exact) {
  return std::get<0>(kl_forward(log_uniform_kind(exact), 1, log_alpha, weight, counts, false));
}
std::tuple<Tensor, Slopes> kl_log_uniform_slopes_cpu(at::TensorList log_alpha, at::TensorList weight,
                                                     at::IntArrayRef counts, bool exact) {
  return kl_forward(log_uniform_kind(exact), 1, log_alpha, weight, counts, true);
}
Tensor kl_ard_cpu(at::TensorList log_alpha, at::TensorList weight, at::IntArrayRef counts) {
  return std::get<0>(kl_forward(KL::ard, 1, log_alpha, weight, counts, false));
}
std::tuple<Tensor, Slopes> kl_ard_slopes_cpu(at::TensorList log_alpha, at::TensorList weight,
                                             at::IntArrayRef counts) {
  return kl_forward(KL::ard, 1, log_alpha, weight, counts, true);
}
Tensor kl_normal_cpu(at::TensorList log_sigma2, at::TensorList weight, at::IntArrayRef counts, double prior_std) {
  return std::get<0>(kl_forward(KL::normal, prior_std, log_sigma2, weight, counts, false));
}
std::tuple<Tensor, Slopes> kl_normal_slopes_cpu(at::TensorList log_sigma2, at::TensorList weight,
                                                at::IntArrayRef counts, double prior_std) {
  return kl_forward(KL::normal, prior_std, log_sigma2, weight, counts, true);
}

// out[i] = slopes[i] grad counts[i], all contiguous.
void scale(at::TensorList slopes, const Tensor& grad, at::IntArrayRef counts, at::TensorList out) {
  const double factor = grad.item<double>();
  const auto kernel = kernels().kl_scale;
  for_chunks(chunks_of(slopes, kTile), 8, [&](Chunk chunk, int64_t) {
    const auto [index, begin, n] = chunk;
    const double scale = factor * counts[index];
    if (slopes[index].scalar_type() == at::kDouble) {
      const double* in = slopes[index].const_data_ptr<double>() + begin;
      std::transform(in, in + n, out[index].data_ptr<double>() + begin, [=](double x) { return scale * x; });
      return;
    }
    const Array in = array_of(slopes[index], begin), result = array_of(out[index], begin);
    kernel(static_cast<float>(scale), n, &in, &result);
  });
}

std::vector<Tensor> kl_backward_cpu(at::TensorList slopes_in, const Tensor& grad, at::IntArrayRef counts) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Slopes slopes = contiguous(slopes_in);
  TORCH_CHECK_VALUE(counts.size() == slopes.size() && grad.numel() == 1,
                    "kl_backward: counts must be as many as slopes and grad 0-d, got ", counts.size(), ", ",
                    slopes.size(), " and ", grad.sizes());
  std::vector<Tensor> grads;
  for (const Tensor& t : slopes) grads.push_back(at::empty_like(t));
  scale(slopes, grad, counts, grads);
  return grads;
}

}  // namespace
}  // namespace losssurf

TORCH_LIBRARY_IMPL(losssurf_fast, CPU, m) {
  m.impl("kl_log_uniform", &losssurf::kl_log_uniform_cpu);
  m.impl("kl_log_uniform_slopes", &losssurf::kl_log_uniform_slopes_cpu);
  m.impl("kl_ard", &losssurf::kl_ard_cpu);
  m.impl("kl_ard_slopes", &losssurf::kl_ard_slopes_cpu);
  m.impl("kl_normal", &losssurf::kl_normal_cpu);
  m.impl("kl_normal_slopes", &losssurf::kl_normal_slopes_cpu);
  m.impl("kl_backward", &losssurf::kl_backward_cpu);
}
