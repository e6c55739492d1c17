// averaging.cu as the operators lerp_ and ema_.
#include "../averaging_checks.h"

#include <torch/library.h>

#include <map>
#include <tuple>

#include "averaging.h"
#include "glue.h"

namespace losssurf {
namespace {

using at::Tensor;

// Tensors for one launch
struct Group {
  std::vector<LerpTensors> tensors;
  size_t last;  // which value the last of them is
};

// averages[k P + i] <- lerp(averages[k P + i], values[i], weights[k]) for P values
void average(const char* name, at::TensorList averages, at::TensorList values, at::ArrayRef<double> weights) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  check_lerp(name, averages, values, weights.size());
  check_on_gpu(name, "averages", averages);
  const size_t size = values.size();
  std::vector<Tensor> targets(averages.begin(), averages.end()), sources(values.begin(), values.end());
  for (size_t i = 0; i < size && !weights.empty(); ++i) {
    const Tensor order = targets[i].is_non_overlapping_and_dense() ? targets[i] : targets[i].contiguous();
    sources[i] = in_order_of(order, values[i]);
    for (size_t k = i; k < averages.size(); k += size) targets[k] = in_order_of(order, averages[k]);
  }

  for (size_t begin = 0; begin < weights.size(); begin += kMaxAverages) {
    const size_t count = std::min<size_t>(kMaxAverages, weights.size() - begin);
    std::map<std::tuple<c10::DeviceIndex, FloatType, FloatType>, Group> groups;
    for (size_t i = 0; i < size; ++i)
      for (size_t k = 0; k < count; ++k) {
        const Tensor& target = targets[(begin + k) * size + i];
        Group& group = groups[{target.device().index(), float_type(target), float_type(sources[i])}];
        if (group.tensors.empty() || group.last != i)
          group.tensors.push_back({target.numel(), sources[i].const_data_ptr(), {}});
        group.last = i;
        group.tensors.back().averages[k] = target.data_ptr();
      }
    for (const auto& [key, group] : groups) {
      const auto [device, average_type, value_type] = key;
      const c10::cuda::CUDAGuard guard(device);
      losssurf_lerp(average_type, value_type, group.tensors.data(), group.tensors.size(), weights.data() + begin, count,
                    c10::cuda::getCurrentCUDAStream());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
  for (size_t i = 0; i < averages.size(); ++i)
    if (!targets[i].is_same(averages[i])) averages[i].copy_(targets[i]);
}

void lerp_cuda(at::TensorList averages, at::TensorList values, double weight) {
  average("lerp_", averages, values, weight);
}

void ema_cuda(at::TensorList averages, at::TensorList values, at::ArrayRef<double> decays) {
  std::vector<double> weights;
  for (const double decay : decays) weights.push_back(1 - decay);
  average("ema_", averages, values, weights);
}

}  // namespace
}  // namespace losssurf

TORCH_LIBRARY_IMPL(losssurf_fast, CUDA, m) {
  m.impl("lerp_", &losssurf::lerp_cuda);
  m.impl("ema_", &losssurf::ema_cuda);
}
