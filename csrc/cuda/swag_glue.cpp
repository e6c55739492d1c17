// swag.cu as the operators swag_collect_ and swag_sample_.
#include "../swag_checks.h"

#include <torch/library.h>

#include <cmath>
#include <map>
#include <tuple>

#include "glue.h"
#include "swag.h"

namespace losssurf {
namespace {

using at::Tensor;

void swag_collect_cuda(at::TensorList mean, at::TensorList m2, at::TensorList deviations, at::TensorList values,
                       int64_t n) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  check_swag_collect(mean, m2, deviations, values, n);
  check_on_gpu("swag_collect_", "mean", mean);
  std::map<std::tuple<c10::DeviceIndex, FloatType, FloatType, FloatType>, std::vector<CollectTensors>> groups;
  std::vector<Tensor> sources;
  for (size_t i = 0; i < mean.size(); ++i) {
    const Tensor& value = sources.emplace_back(values[i].contiguous());
    CollectTensors tensors = {value.numel(), mean[i].data_ptr(), m2[i].data_ptr(), nullptr, value.const_data_ptr()};
    FloatType deviation = FloatType::f32;
    if (!deviations.empty()) {
      const Tensor& slots = deviations[i];
      deviation = float_type(slots);
      tensors.deviation =
          static_cast<char*>(slots.data_ptr()) + n % slots.size(0) * slots.size(1) * slots.element_size();
    }
    groups[{value.device().index(), float_type(mean[i]), deviation, float_type(value)}].push_back(tensors);
  }
  for (const auto& [key, tensors] : groups) {
    const auto [device, mean_type, deviation, value] = key;
    const c10::cuda::CUDAGuard guard(device);
    losssurf_swag_collect(mean_type, deviation, value, tensors.data(), tensors.size(), n,
                          c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

void swag_sample_cuda(at::TensorList out, at::TensorList mean, at::TensorList m2, at::TensorList deviations,
                      const Tensor& seed, int64_t n, double scale, bool cov, bool block, int64_t sample,
                      int64_t num_samples, at::IntArrayRef places, int64_t num_params) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  check_swag_sample(out, mean, m2, deviations, n, num_samples, places);
  TORCH_CHECK_VALUE(seed.is_cuda() && seed.numel() == 1, "swag_sample: seed must be a 0-d tensor on mean's GPU, got ",
                    shape_and_device(seed.sizes(), seed));
  for (const Tensor& a : mean)
    TORCH_CHECK_VALUE(a.device() == seed.device(), "swag_sample: seed must be on ", a.device(), ", got ",
                      seed.device());
  const int64_t held = cov && !deviations.empty() ? std::min(n, deviations[0].size(0)) : 0, rank = held > 1 ? held : 0;
  std::map<std::tuple<FloatType, FloatType, FloatType>, std::vector<SampleTensors>> groups;
  std::vector<Tensor> targets;
  for (size_t i = 0; i < mean.size(); ++i) {
    const Tensor& target = targets.emplace_back(out[i].contiguous());
    const FloatType mean_type = float_type(mean[i]);
    TORCH_CHECK_VALUE(rank <= losssurf_swag_max_rank(mean_type), "swag_sample: deviations must hold at most ",
                      losssurf_swag_max_rank(mean_type), " columns on a GPU, got ", rank);
    const int64_t* place = places.data() + 4 * i;
    groups[{mean_type, rank > 0 ? float_type(deviations[i]) : FloatType::f32, float_type(target)}].push_back(
        {mean[i].numel(), mean[i].const_data_ptr(), m2[i].const_data_ptr(),
         rank > 0 ? deviations[i].const_data_ptr() : nullptr, target.data_ptr(), place[0], place[1], place[2],
         place[3]});
  }
  const SampleOptions options = {
      .seed = seed.const_data_ptr<int64_t>(),
      .rank = static_cast<int>(rank),
      .block = block,
      .first_sample = static_cast<uint32_t>(sample),
      .samples = num_samples,
      .num_params = num_params,
      .variance_scale = scale / static_cast<double>(n),
      .coefficient = rank > 0 ? std::sqrt(scale / static_cast<double>(rank - 1)) : 0,
  };
  const c10::cuda::CUDAGuard guard(seed.device());
  for (const auto& [key, tensors] : groups) {
    const auto [mean_type, deviation, out_type] = key;
    losssurf_swag_sample(mean_type, deviation, out_type, tensors.data(), tensors.size(), &options,
                         c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  for (size_t i = 0; i < out.size(); ++i)
    if (!targets[i].is_same(out[i])) out[i].copy_(targets[i]);
}

}  // namespace
}  // namespace losssurf

TORCH_LIBRARY_IMPL(losssurf_fast, CUDA, m) {
  m.impl("swag_collect_", &losssurf::swag_collect_cuda);
  m.impl("swag_sample_", &losssurf::swag_sample_cuda);
}
