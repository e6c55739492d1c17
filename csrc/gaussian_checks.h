// What a call of gaussian_weights is about, and what its kernels refuse, on every device.
#pragma once
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "divergence.h"

namespace losssurf {

using Names = c10::List<std::string>;

// One tensor of weights, its parameters contiguous.
struct GaussianEntry {
  at::Tensor weight, scale;  // weight is undefined where the means are 0
  std::string parameterization;

  int64_t numel() const { return like().numel(); }
  const at::Tensor& like() const { return weight.defined() ? weight : scale; }
  bool wide() const { return scale.scalar_type() == at::kDouble; }
  int64_t covered() const { return numel() / std::max<int64_t>(1, scale.numel()); }  // weights of an element of scale
  int64_t run() const { return std::max<int64_t>(1, covered()); }
  bool shared() const { return parameterization == "layer" || parameterization == "neuron"; }
  bool multiplicative() const { return weight.defined() && parameterization != "additive"; }
};

struct PriorOf {
  bool given;
  KL kind;
  double std;
  PriorOf(c10::string_view name, double std) : given(name != "none"), kind(KL::normal), std(std) {
    if (name == "log_uniform") kind = KL::log_uniform;
    else if (name == "log_uniform_approximate") kind = KL::log_uniform_approximate;
    else if (name == "ard") kind = KL::ard;
    else TORCH_CHECK_VALUE(!given || name == "normal", "gaussian_weights: unknown prior '", name, "'");
  }
  bool scale_free() const { return kind != KL::normal; }  // the KL is a function of log_alpha
  Prior kernel() const { return {static_cast<float>(1 / std), static_cast<float>(2 * std::log(std))}; }
  // Whether the KL is taken weight by weight. Where it is a function of log_alpha, elements that weights share have it
  // taken once, and means of 0 have none.
  bool of_weights(const GaussianEntry& entry) const {
    return given && !(scale_free() && (entry.shared() || !entry.weight.defined()));
  }
  bool of_shared(const GaussianEntry& entry) const { return given && scale_free() && entry.shared(); }
};

inline std::vector<GaussianEntry> gaussian_entries(at::TensorList weights, at::TensorList scales,
                                                   const Names& parameterizations, const at::Tensor& seed) {
  TORCH_CHECK_VALUE(seed.numel() == 1 && seed.scalar_type() == at::kLong,
                    "gaussian_weights: seed must be a 0-d int64 tensor, got shape ", seed.sizes(), " and ",
                    seed.scalar_type());
  TORCH_CHECK_VALUE(parameterizations.size() == scales.size(), "gaussian_weights: parameterizations must hold ",
                    scales.size(), " names like scales, got ", parameterizations.size());
  std::vector<GaussianEntry> entries;
  size_t next = 0;
  for (size_t i = 0; i < scales.size(); ++i) {
    GaussianEntry entry{{}, scales[i].contiguous(), parameterizations.get(i)};
    if (entry.parameterization != "variance") {
      TORCH_CHECK_VALUE(next < weights.size(), "gaussian_weights: weights must hold a tensor for each scale but those of "
                        "'variance', got ", weights.size());
      entry.weight = weights[next++].contiguous();
    }
    const int64_t numel = entry.numel(), elements = entry.scale.numel();
    const int64_t rows = entry.like().dim() ? entry.like().size(0) : 1;
    const int64_t wanted = entry.parameterization == "layer" ? 1 : entry.parameterization == "neuron" ? rows : numel;
    TORCH_CHECK_VALUE(elements == wanted, "gaussian_weights: scales[", i, "] must have ", wanted, " elements, got ",
                      elements);
    TORCH_CHECK_TYPE(entry.wide() == (entry.like().scalar_type() == at::kDouble),
                     "gaussian_weights: weights and scales must both be float64 or neither");
    for (const at::Tensor& t : {entry.scale, entry.like()})
      TORCH_CHECK_VALUE(t.device() == seed.device(), "gaussian_weights: weights and scales must be on the seed's device, ",
                        seed.device(), ", got ", t.device());
    entries.push_back(std::move(entry));
  }
  TORCH_CHECK_VALUE(next == weights.size(), "gaussian_weights: weights must hold ", next, " tensors, got ",
                    weights.size());
  return entries;
}

template <class Entry> bool any_wide(const std::vector<Entry>& entries) {
  return std::any_of(entries.begin(), entries.end(), [](const Entry& entry) { return entry.wide(); });
}

// The results of gaussian_weights_backward: gradients to those parameters that are needed, weights first.
struct GaussianResults {
  std::vector<at::Tensor> like;          // the parameter of each result
  std::vector<int> of_weight, of_scale;  // of each entry: its place among the results, or -1
};
inline at::Tensor result_at(const std::vector<at::Tensor>& results, int place) {
  return place < 0 ? at::Tensor() : results[place];
}

template <class Entry>
GaussianResults gaussian_results(const std::vector<Entry>& entries, const c10::List<bool>& needed) {
  GaussianResults results;
  size_t flag = 0;
  const auto place = [&](const at::Tensor& parameter) {
    if (!parameter.defined() || !needed.get(flag++)) return -1;
    results.like.push_back(parameter);
    return static_cast<int>(results.like.size()) - 1;
  };
  for (const GaussianEntry& entry : entries) results.of_weight.push_back(place(entry.weight));
  for (const GaussianEntry& entry : entries) results.of_scale.push_back(place(entry.scale));
  return results;
}

// The gradients of the draws, contiguous.
template <class Entry>
std::vector<at::Tensor> gaussian_grads(const std::vector<Entry>& entries, at::TensorList grads, size_t weights,
                                       const c10::List<bool>& needed) {
  TORCH_CHECK_VALUE(grads.size() == entries.size() && needed.size() == weights + entries.size(),
                    "gaussian_weights_backward: grads must hold ", entries.size(), " tensors and needed ",
                    weights + entries.size(), " flags, got ", grads.size(), " and ", needed.size());
  std::vector<at::Tensor> result;
  for (size_t i = 0; i < entries.size(); ++i) {
    const at::Tensor &grad = grads[i], &like = entries[i].like();
    TORCH_CHECK_VALUE(grad.sizes() == like.sizes(), "gaussian_weights_backward: grads[", i, "] must have shape ",
                      like.sizes(), ", got ", grad.sizes());
    TORCH_CHECK_TYPE(entries[i].wide() == (grad.scalar_type() == at::kDouble), "gaussian_weights_backward: grads[", i,
                     "] must be float64 where its weight is, got ", grad.scalar_type());
    TORCH_CHECK_VALUE(grad.device() == like.device(), "gaussian_weights_backward: grads[", i, "] must be on ",
                      like.device(), ", got ", grad.device());
    result.push_back(grad.contiguous());
  }
  return result;
}

}  // namespace losssurf
