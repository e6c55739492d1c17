// gaussian_weights.cu as the operators gaussian_weights and gaussian_weights_backward. A list with a float64 tensor takes
// their reference. Every result has an allocation of its own, as those of curve_glue.cpp.
#include "../gaussian_checks.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "gaussian_weights.h"
#include "glue.h"

namespace losssurf {
namespace {

using at::Tensor;

// Runs the operator's reference on any device: the kernel of every backend that has none of its own, as of this one.
template <class Signature, class... Arguments> auto call_reference(const char* name, Arguments&&... arguments) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
  return op.redispatch(c10::DispatchKeySet(c10::DispatchKey::Vulkan), std::forward<Arguments>(arguments)...);
}

GaussianTensors tensors_of(const GaussianEntry& entry, int64_t row, const PriorOf& prior) {
  const Tensor &weight = entry.weight, &scale = entry.scale;
  const bool own = entry.run() == 1 && entry.multiplicative();  // whatever the parameterization
  return {
      .numel = entry.numel(),
      .weight = weight.defined() ? weight.const_data_ptr() : nullptr,
      .scale = scale.const_data_ptr(),
      .run = entry.run(),
      .row = row,
      .type = float_type(entry.like()),
      .scale_type = float_type(scale),
      .multiplicative = entry.multiplicative(),
      .kl_times = prior.of_weights(entry) || (own && prior.given) ? 1.0f : 0.0f,
  };
}

GaussianOptions options_of(const Tensor& seed, int64_t sample, const PriorOf& prior) {
  return {
      .seed = seed.const_data_ptr<int64_t>(),
      .sample = static_cast<uint32_t>(sample),
      .has_kl = prior.given,
      .kl = prior.kind,
      .prior = prior.kernel(),
  };
}

std::tuple<std::vector<Tensor>, Tensor> gaussian_weights_cuda(at::TensorList weights, at::TensorList scales,
                                                              const Names& parameterizations, const Tensor& seed,
                                                              int64_t row_offset, int64_t sample,
                                                              c10::string_view prior_name, double prior_std) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const PriorOf prior(prior_name, prior_std);
  const auto entries = gaussian_entries(weights, scales, parameterizations, seed);
  if (any_wide(entries))
    return call_reference<decltype(gaussian_weights_cuda)>("losssurf_fast::gaussian_weights", weights, scales,
                                                           parameterizations, seed, row_offset, sample, prior_name,
                                                           prior_std);
  const c10::cuda::CUDAGuard guard(seed.device());
  std::vector<Tensor> out;
  std::vector<GaussianDraw> tensors;
  for (size_t i = 0; i < entries.size(); ++i) {
    out.push_back(at::empty_like(entries[i].like()));
    GaussianTensors t = tensors_of(entries[i], row_offset + static_cast<int64_t>(i), prior);
    tensors.push_back({t, out[i].data_ptr()});
    if (t.run == 1 || !prior.of_shared(entries[i])) continue;
    t.numel = entries[i].scale.numel(), t.weight = nullptr, t.kl_times = static_cast<float>(t.run), t.run = 1;
    tensors.push_back({t, nullptr});
  }
  const GaussianOptions options = options_of(seed, sample, prior);
  Tensor partials;
  if (options.has_kl) partials = at::zeros({kGaussianPartials}, seed.options().dtype(at::kDouble));
  losssurf_gaussian_weights(tensors.data(), static_cast<int64_t>(tensors.size()), &options,
                            options.has_kl ? partials.data_ptr<double>() : nullptr, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const Tensor kl = options.has_kl ? partials.sum().to(at::kFloat) : at::zeros({}, seed.options().dtype(at::kFloat));
  return {out, kl};
}

std::vector<Tensor> gaussian_weights_backward_cuda(
    at::TensorList grads_in, const Tensor& grad_kl_in, at::TensorList weights, at::TensorList scales,
    const Names& parameterizations, const c10::List<bool>& needed, const Tensor& seed, int64_t row_offset,
    int64_t sample, c10::string_view prior_name, double prior_std) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const PriorOf prior(prior_name, prior_std);
  const auto entries = gaussian_entries(weights, scales, parameterizations, seed);
  const std::vector<Tensor> grads = gaussian_grads(entries, grads_in, weights.size(), needed);
  if (any_wide(entries))
    return call_reference<decltype(gaussian_weights_backward_cuda)>(
        "losssurf_fast::gaussian_weights_backward", grads_in, grad_kl_in, weights, scales, parameterizations, needed,
        seed, row_offset, sample, prior_name, prior_std);
  TORCH_CHECK_VALUE(grad_kl_in.device() == seed.device() && grad_kl_in.numel() == 1,
                    "gaussian_weights_backward: grad_kl must be a 0-d tensor on ", seed.device(), ", got shape ",
                    grad_kl_in.sizes(), " on ", grad_kl_in.device());
  const c10::cuda::CUDAGuard guard(seed.device());
  const Tensor grad_kl = grad_kl_in.to(at::kFloat);
  const GaussianResults wanted = gaussian_results(entries, needed);
  std::vector<Tensor> results;
  for (const Tensor& like : wanted.like) results.push_back(at::empty_like(like));

  std::vector<GaussianGradient> tensors;
  std::vector<Tensor> sums;
  const auto address = [](const Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; };
  for (size_t i = 0; i < entries.size(); ++i) {
    const GaussianEntry& entry = entries[i];
    const Tensor to_weight = result_at(results, wanted.of_weight[i]), to_scale = result_at(results, wanted.of_scale[i]);
    if (!to_weight.defined() && !to_scale.defined()) continue;
    if (entry.numel() == 0) {  // no weight adds anything to the elements of scale
      if (to_scale.defined()) to_scale.zero_();
      continue;
    }
    GaussianGradient& t = tensors.emplace_back(GaussianGradient{
        tensors_of(entry, row_offset + static_cast<int64_t>(i), prior), grads[i].const_data_ptr(),
        float_type(grads[i]), address(to_weight), address(to_scale), nullptr});
    if (t.run == 1 || !to_scale.defined()) continue;
    sums.push_back(at::empty({gaussian_sums(t.numel, t.run)}, seed.options().dtype(at::kDouble)));
    t.sums = sums.back().data_ptr<double>();
  }
  const GaussianOptions options = options_of(seed, sample, prior);
  losssurf_gaussian_weights_backward(tensors.data(), static_cast<int64_t>(tensors.size()), &options,
                                     grad_kl.const_data_ptr<float>(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return results;
}

}  // namespace
}  // namespace losssurf

TORCH_LIBRARY_IMPL(losssurf_fast, CUDA, m) {
  m.impl("gaussian_weights", &losssurf::gaussian_weights_cuda);
  m.impl("gaussian_weights_backward", &losssurf::gaussian_weights_backward_cuda);
}
